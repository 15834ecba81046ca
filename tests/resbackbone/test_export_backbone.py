"""Exported backbones against the networks they come from; detectors are in tests/detection/test_export.py."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from resbackbone import create_backbone, export
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
    assert not (tmp_path / "w.pt2").exists()


def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.safetensors"), "--to", "torch-export"]) == 1
    assert "none.safetensors" in capsys.readouterr().err
    assert main([str(write_weights(tmp_path / "w.safetensors")), "--to", "caffe"]) == 1
    assert "choose from onnx, torch-export" in capsys.readouterr().err
