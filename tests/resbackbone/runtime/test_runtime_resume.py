"""Which checkpoint --resume means, and weights files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from resbackbone.errors import InputError
from resbackbone.runtime.checkpoint import resolve_resume, save_checkpoint, save_weights


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"weight": torch.full((64, 64), float(step))}}


def test_resolve_resume(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert resolve_resume(None, folder) is None
    assert resolve_resume("auto", folder) is None
    first, second = (save_checkpoint(folder, step, state_of(step)) for step in (1, 2))
    assert resolve_resume("auto", folder) == second
    assert resolve_resume(str(first), tmp_path / "elsewhere") == first
    assert resolve_resume(str(first / "state.pt"), folder) == first / "state.pt"
    assert resolve_resume(str(folder), folder) == second
    assert resolve_resume(str(tmp_path), folder) == second
    with pytest.raises(InputError, match=r"there is no good checkpoint at this path; did you mean '.*step_0000000[12]'\?"):
        resolve_resume(str(folder / "step_00000003"), folder)
    with pytest.raises(InputError, match="--resume auto starts or continues by itself"):
        resolve_resume("nowhere", tmp_path / "empty")


def test_auto_never_starts_over_in_silence(tmp_path: Path) -> None:
    (save_checkpoint(tmp_path, 1, state_of(1)) / "state.pt").write_bytes(b"")
    with pytest.raises(InputError, match="every checkpoint here is damaged"):
        resolve_resume("auto", tmp_path)


def test_save_weights_round_trip(tmp_path: Path) -> None:
    shared = torch.arange(12.0)
    tensors = {"a": shared, "b": shared, "c": shared.view(3, 4).t(), "d": torch.ones(2, requires_grad=True), "empty": torch.zeros(0, 4)}
    save_weights(tmp_path / "new" / "w.safetensors", tensors, {"config": json.dumps({"x": 1})})
    with safe_open(tmp_path / "new" / "w.safetensors", "pt") as file:
        assert file.metadata() == {"config": '{"x": 1}'}
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
