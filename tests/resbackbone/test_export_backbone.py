"""Exported backbones against the networks they come from; detectors are in tests/detection/test_export.py."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from resbackbone import create_backbone, export
from resbackbone.backbone import Preprocessing
from resbackbone.errors import InputError
from resbackbone.runtime.checkpoint import save_weights
from tools.export import main


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """torch.export logs every symbolic guard, and pytest would format them all."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def write_weights(path: Path) -> Path:
    torch.manual_seed(0)
    net = create_backbone("resnet20_cifar")
    state = {name: tensor for name, tensor in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    for name, tensor in state.items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    save_weights(path, state, {})
    return path


@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_a_backbone_runs_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str) -> None:
    if to == "onnx":
        pytest.importorskip("onnxscript")
    weights, program = write_weights(tmp_path / "w.safetensors"), tmp_path / f"net{export.ENDINGS[to]}"
    assert main([str(weights), "--to", to, "--output", str(program), "--name", "resnet20_cifar"]) == 0
    assert "equal to" in capsys.readouterr().out
    net = create_backbone("resnet20_cifar", weights=weights).eval()
    images = torch.randn(3, 3, 68, 100)  # of no size that the tool looked at
    with torch.no_grad():
        wanted = [features.numpy() for features in net(images).values()]
    for mine, theirs in zip(wanted, export.open_program(program, to=to)(images.numpy()), strict=True):
        np.testing.assert_allclose(theirs, mine, atol=1e-4)


def test_a_program_that_differs_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    weights = write_weights(tmp_path / "w.safetensors")
    net = create_backbone("resnet20_cifar", weights=weights).eval()

    def off(images: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [1.01 * features.numpy() for features in net(torch.from_numpy(images)).values()]

    monkeypatch.setattr(export, "write_program", lambda graph, path, *, to: path.write_bytes(b"x"))
    monkeypatch.setattr(export, "open_program", lambda path, *, to: off)
    assert main([str(weights), "--to", "torch-export", "--name", "resnet20_cifar"]) == 1
    assert "differs by 1.0e-02" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [weights]


@pytest.mark.parametrize(
    ("raised", "said"),
    [(OSError(28, "No space left on device"), "the disk is full"), (InputError("it differs"), "it differs"), (KeyboardInterrupt(), None)],
    ids=repr,
)
def test_an_earlier_program_outlives_one_that_fails(tmp_path: Path, raised: BaseException, said: str | None) -> None:
    path = tmp_path / "w.onnx"
    path.write_bytes(b"good")

    def fail() -> None:
        with export.checked_file(path) as program:
            program.write_bytes(b"unchecked")
            program.with_name("w.onnx.data").write_bytes(b"weights")
            assert path.read_bytes() == b"good"
            raise raised

    with pytest.raises(InputError if said else type(raised), match=said):
        fail()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"good"


def test_a_checked_program_takes_its_place_with_what_belongs_to_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "w.onnx"
    with export.checked_file(path) as program:
        program.write_bytes(b"checked")
        program.with_name("w.onnx.data").write_bytes(b"weights")
        assert list(path.parent.glob("*")) == [program.parent]
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == {"w.onnx": b"checked", "w.onnx.data": b"weights"}


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own writer would end the process."""
    graph = export.Graph(module=torch.nn.ReLU(), example=(torch.zeros(2, 3),), shapes={}, inputs=(), outputs=(), metadata={})
    graph = dataclasses.replace(graph, shapes={"input": {0: torch.export.Dim("images", min=1, max=8)}})

    def full(path: Path, data: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="the disk is full"), export.checked_file(tmp_path / "w.pt2") as program:
        export.write_program(graph, program, to="torch-export")


@pytest.mark.parametrize(
    ("said", "size", "wanted"),
    [
        (Preprocessing((0.5, 0.25, 0.0), (0.5, 0.5, 1.0)), (2, 3, 224, 448), (1.0, -0.5, 0.2)),
        (Preprocessing((0.0,) * 3, (1.0,) * 3, color_order="BGR", input_range=255.0), (2, 3, 224, 448), (51.0, 0.0, 255.0)),
        (Preprocessing((0.4,), (1.0,)), (2, 1, 224, 448), (0.0,)),
    ],
)
def test_a_real_image_is_prepared_as_the_weights_want_it(said: Preprocessing, size: tuple[int, ...], wanted: tuple[float, ...]) -> None:
    images = export.prepared(np.full((30, 90, 3), (255, 0, 51), np.uint8), said, divisor=32)
    assert images.shape[2:] == (160, 448)  # 149 × 448, in whole cells
    assert images.shape[:2] == size[:2]
    torch.testing.assert_close(images[1, :, 9, 9], torch.tensor(wanted))


def test_it_is_checked_on_real_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A program that differs on one of them only is refused."""
    weights, folder = write_weights(tmp_path / "w.safetensors"), tmp_path / "photos"
    folder.mkdir()
    for number in range(2):
        cv2.imwrite(str(folder / f"{number}.png"), np.full((60, 90, 3), 200 * number, np.uint8))
    net = create_backbone("resnet20_cifar", weights=weights).eval()
    seen: list[tuple[int, ...]] = []
    wrong_above = 100.0

    def run(images: np.ndarray) -> list[np.ndarray]:
        seen.append(images.shape)
        with torch.no_grad():
            return [(1.01 if images.mean() > wrong_above else 1) * maps.numpy() for maps in net(torch.from_numpy(images)).values()]

    monkeypatch.setattr(export, "write_program", lambda graph, path, *, to: path.write_bytes(b"x"))
    monkeypatch.setattr(export, "open_program", lambda path, *, to: run)
    command = [str(weights), "--to", "torch-export", "--name", "resnet20_cifar", "--images", str(folder)]
    assert main(command) == 0
    assert "and on 2 real images" in capsys.readouterr().out
    assert seen[4:] == [(2, 3, 224, 336)] * 2
    wrong_above = 0.5
    assert main(command) == 1
    assert "differs by 1.0e-02" in capsys.readouterr().err
    assert main([*command, "--images", "nosuch.jpg"]) == 1
    assert "no image at nosuch.jpg" in capsys.readouterr().err


def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.safetensors"), "--to", "torch-export"]) == 1
    assert "none.safetensors" in capsys.readouterr().err
    assert main([str(write_weights(tmp_path / "w.safetensors")), "--to", "caffe"]) == 1
    assert "choose from onnx, torch-export" in capsys.readouterr().err
    below = str(tmp_path / "w.safetensors" / "a.pt2")
    assert main([str(tmp_path / "w.safetensors"), "--to", "torch-export", "--output", below, "--name", "resnet20_cifar"]) == 1
    assert "a file stands where a folder is needed" in capsys.readouterr().err
