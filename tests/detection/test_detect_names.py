"""Inputs with names that aren't UTF-8, on disks that fail, with scores at the threshold: each is told for itself, and the rest goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from detection.detect import detect_all
from detection.inputs import printable
from detection.structures import Detections

# A process of its own: what OpenCV does with such a name ends it, without a word from Python.
_DETECTS = """
    import sys
    from pathlib import Path
    import numpy as np
    import torch
    from detection.detect import detect_all
    from detection.draw import save_image
    from detection.structures import Detections
    from resbackbone.errors import InputError

    class Steady:
        classes = ("cat",)

        def detect(self, images):
            box = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
            return [Detections(boxes=box, scores=torch.tensor([0.9]), labels=torch.tensor([1])) for _ in images]

    drawn, complaints = detect_all(Steady(), [sys.argv[1]], Path(sys.argv[2]))
    print(len(drawn), len(complaints))
    try:
        save_image(Path(sys.argv[2]) / "a.\\udce9", np.zeros((4, 4, 3), np.uint8))
    except InputError:
        print("refused")
"""


def write_clip(path: Path) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
    for _ in range(2):
        writer.write(np.full((64, 96, 3), 99, np.uint8))
    writer.release()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds caf\\xe9.jpg and caf\\xe9.mp4, which are Latin-1, clip.mp4 and z.png."""
    folder = tmp_path / "in"
    folder.mkdir()
    cv2.imwrite(str(folder / "photo.jpg"), np.full((64, 96, 3), 99, np.uint8))
    cv2.imwrite(str(folder / "z.png"), np.full((64, 96, 3), 99, np.uint8))
    write_clip(folder / "clip.mp4")
    try:
        (folder / "photo.jpg").rename(folder / "caf\udce9.jpg")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    (folder / "caf\udce9.mp4").write_bytes((folder / "clip.mp4").read_bytes())
    return folder


def run(folder: Path, output: Path, repository: Path) -> list[str]:
    command = [sys.executable, "-c", textwrap.dedent(_DETECTS), str(folder), str(output)]
    environment = {**os.environ, "PYTHONPATH": str(repository), "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_names_that_are_not_utf8(folder: Path, tmp_path: Path, repository: Path) -> None:
    output = tmp_path / "out"
    photo, video, clip, last, *rest = run(folder, output, repository)
    assert photo == rf"{folder}/caf\xe9.jpg: 1 detections of at least 0.5 → {output}/caf\xe9.jpg"
    assert video.startswith(rf"skipped: {folder}/caf\xe9.mp4: OpenCV can't open a video whose name")
    assert [line.partition(":")[0] for line in (clip, last)] == [f"{folder}/clip.mp4", f"{folder}/z.png"]
    assert rest == ["3 1", "refused"]
    assert {path.name for path in output.iterdir()} == {
        *("caf\udce9.jpg", "caf\udce9.json", "clip.mp4", "clip.json", "z.jpg", "z.json"),
    }
    assert json.loads((output / "caf\udce9.json").read_text())["source"] == str(folder / "caf\udce9.jpg")
    assert cv2.imdecode(np.fromfile(os.fsencode(output / "caf\udce9.jpg"), np.uint8), cv2.IMREAD_COLOR).shape == (320, 480, 3)


def test_an_output_that_is_not_utf8(folder: Path, tmp_path: Path, repository: Path) -> None:
    output = tmp_path / "se\udcf1or"
    _, _, clip, _, *rest = run(folder, output, repository)
    assert clip.startswith(rf"skipped: {tmp_path}/se\xf1or/clip.mp4: OpenCV can't write a video whose name")
    assert rest == ["2 2", "refused"]
    assert {path.name for path in output.iterdir()} == {"caf\udce9.jpg", "caf\udce9.json", "z.jpg", "z.json"}


def test_printable_leaves_good_names_alone() -> None:
    assert printable("café → 猫.jpg") == "café → 猫.jpg"
    assert printable("caf\udce9é") == r"caf\xe9é"


class Unsure:
    """A predictor that finds, in every picture, a cat of a given score."""

    classes = ("cat",)

    def __init__(self, score: float) -> None:
        self.score = score

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        box = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
        return [Detections(boxes=box, scores=torch.tensor([self.score]), labels=torch.tensor([1])) for _ in images]


@pytest.mark.parametrize(("score", "threshold", "count"), [(0.49996, 0.5, 0), (0.5, 0.5, 1), (0.70004, 0.70003, 1), (0.7, 0.7, 1)])
def test_what_is_counted_is_what_is_drawn(tmp_path: Path, score: float, threshold: float, count: int) -> None:
    image = np.full((480, 480, 3), 99, np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    said: list[str] = []
    predictor: Any = Unsure(score)
    detect_all(predictor, [str(tmp_path / "a.png")], tmp_path / "out", threshold=threshold, log=said.append)
    assert f": {count} detections of at least {threshold:g} " in said[0]
    drawn = cv2.imread(str(tmp_path / "out/a.jpg"))
    assert (np.abs(drawn.astype(int) - image).max() > 50) == bool(count)
    assert json.loads((tmp_path / "out/a.json").read_text())["detections"][0]["score"] == round(score, 4)


def test_a_disk_that_fails_is_not_the_outputs_fault(tmp_path: Path) -> None:
    if not Path("/proc/self/mem").exists():
        pytest.skip("nothing here opens but fails to be read")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").symlink_to("/proc/self/mem")
    cv2.imwrite(str(folder / "b.png"), np.full((64, 96, 3), 99, np.uint8))
    predictor: Any = Unsure(0.9)
    drawn, (complaint,) = detect_all(predictor, [str(folder)], tmp_path / "out", log=lambda text: None)
    assert [path.name for path in drawn] == ["b.jpg"]
    assert complaint.startswith(f"{folder}/a.jpg: cannot be read (Input/output error); ")
