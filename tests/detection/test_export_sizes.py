"""Where an exported program and its detector pad an image differently, and what the export says of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from export_peers import TINY, blocks, in_eager_mode, random_detector, register_tiny, stand_in, write_detector

from detection import export
from detection.config import load_detection_config
from tools.export import main


@pytest.fixture(autouse=True)
def tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    register_tiny(monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("data.min_size=[128,64]", "data.min_size=64 is too small to export: the program pads to 96"),
        ("data.min_size=[32]", "the detector to 32, and finds other boxes there. Give data.min_size=65 or more"),
        ("data.max_size=64", "none of the 4 images can be compared: with data.min_size=128 and data.max_size=64"),
    ],
)
def test_a_detector_that_sees_less_than_the_program_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    weights = write_detector(tmp_path / "w.safetensors", "model.head=fpn")
    assert main([str(weights), "--to", "torch-export", arguments]) == 1
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [weights]


def test_images_that_the_program_pads_to_more_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two pictures and a panorama, which data.max_size makes 20 pixels high."""
    weights = write_detector(tmp_path / "w.safetensors", "model.head=fpn")
    stand_in(monkeypatch, weights)
    for name, size in (("a", (96, 128)), ("b", (128, 96)), ("panorama", (32, 256))):
        cv2.imwrite(str(tmp_path / f"{name}.png"), blocks(*size))
    assert main([str(weights), "--to", "torch-export", "--images", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "2 images, shorter side 128 and 96, batches of 1 and 2. Left out: 1 of 3, seen with a side below 65 px" in said
    (tmp_path / "w.pt2").unlink()
    assert main([str(weights), "--to", "torch-export", "--images", str(tmp_path / "panorama.png")]) == 1
    assert "none of the 1 images can be compared" in capsys.readouterr().err
    assert not (tmp_path / "w.pt2").exists()


@pytest.mark.parametrize(("height", "holds"), [(64, False), (export.LEAST_SIDE, True), (96, True)])
def test_from_which_side_on_program_and_detector_agree(height: int, holds: bool) -> None:
    detector = random_detector(load_detection_config(None, [*TINY, "model.head=fpn"]))
    picture = np.random.default_rng(0).integers(0, 256, (height, 160, 3), dtype=np.uint8)
    parity = export.compare(detector, in_eager_mode(detector), [picture], sizes=[height], max_size=160)
    assert parity.boxes > 20
    assert parity.holds is holds


def test_the_script_s_opencv_is_the_one_that_is_asked_for(repository: Path) -> None:
    """IMREAD_COLOR_RGB, with which the package and the documentation's script read images, came with 4.11."""
    (floor,) = re.findall(r'"opencv-python-headless>=([\d.]+)"', (repository / "pyproject.toml").read_text())
    (tested,) = re.findall(r"opencv-python-headless==([\d.]+)", (repository / "constraints.txt").read_text())
    (documented,) = re.findall(r"OpenCV \(([\d.]+) or newer\)", (repository / "docs" / "export.md").read_text())
    as_numbers = [[int(part) for part in version.split(".")] for version in ("4.11", floor, tested)]
    assert as_numbers == sorted(as_numbers)
    assert documented == floor


class WholeImage:
    """A program that finds one thing, as large as the image that it was given."""

    def get_modelmeta(self) -> Any:
        return SimpleNamespace(custom_metadata_map={"classes": json.dumps(["cat"]), "min_size": "800", "max_size": "1333"})

    def run(self, _: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        height, width = inputs["sizes"][0]
        return [np.array([[[0, 0, width, height]]], np.float32), np.ones((1, 1), np.float32), np.ones((1, 1), np.int64)]


@pytest.mark.parametrize("size", [(70, 1300), (375, 500), (3000, 4001)])
def test_the_documentation_s_script_reaches_the_far_edge(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: tuple[int, int]
) -> None:
    """Sizes are whole pixels once resized, so width and height were scaled a little differently."""
    pytest.importorskip("onnxruntime")
    text = (repository / "docs" / "export.md").read_text().split("<!-- file: run_onnx.py -->\n```python\n")[1].split("```")[0]
    script: dict[str, Any] = {"__name__": "run_onnx"}
    exec(text, script)
    script["onnxruntime"] = SimpleNamespace(InferenceSession=lambda *_, **__: WholeImage())
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((*size, 3), np.uint8))
    script["main"]("w.onnx", str(tmp_path / "a.png"))
    assert [float(word) for word in capsys.readouterr().out.split()[-4:]] == [0.0, 0.0, size[1], size[0]]
