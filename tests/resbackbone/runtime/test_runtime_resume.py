"""Which checkpoint --resume means, and weights files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_runtime_distributed import run_two

from resbackbone.errors import InputError
from resbackbone.runtime import distributed
from resbackbone.runtime.checkpoint import save_checkpoint, save_weights, step_of
from resbackbone.runtime.resume import resolve_resume


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


# --------------------------------------------------------------------------------------------------------------------- torchrun's restarts


def resume_after(count: int, monkeypatch: pytest.MonkeyPatch, path: Path, folder: Path) -> int:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
    found = resolve_resume(str(path), folder)
    assert found is not None
    return step_of(found)


def test_a_path_says_where_a_run_begins_and_not_where_a_restart_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 5):
        save_checkpoint(tmp_path, step, state_of(step))
    path = tmp_path / "step_00000001"
    assert resume_after(0, monkeypatch, path, tmp_path) == 1
    assert resume_after(1, monkeypatch, path, tmp_path) == 1, "2 and 5 belong to the course that was left"
    save_checkpoint(tmp_path, 2, state_of(2))  # equal to the one that was there
    assert resume_after(1, monkeypatch, path, tmp_path) == 2
    save_checkpoint(tmp_path, 3, state_of(3), keep=1)
    assert not path.exists()
    assert resume_after(2, monkeypatch, path, tmp_path) == 3
    (tmp_path / "step_00000003/state.pt").write_bytes(b"")
    with pytest.raises(InputError, match="there is no good checkpoint at this path"):
        resume_after(2, monkeypatch, path, tmp_path)


def test_a_restart_before_the_beginning_still_begins_at_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state_of(step))
    for count in (1, 2):
        assert resume_after(count, monkeypatch, tmp_path / "step_00000001", tmp_path) == 1
    save_checkpoint(tmp_path, 3, state_of(3))
    assert resume_after(0, monkeypatch, tmp_path / "step_00000002", tmp_path) == 2, "another start, another path"


def test_another_run_is_where_a_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "old/checkpoints", 7, state_of(7))
    for count in (0, 1):
        assert resume_after(count, monkeypatch, tmp_path / "old", tmp_path / "new/checkpoints") == 7
    save_checkpoint(tmp_path / "new/checkpoints", 9, state_of(9))
    assert resume_after(2, monkeypatch, tmp_path / "old", tmp_path / "new/checkpoints") == 9


# ------------------------------------------------------------------------------------------------------------------------- two processes

PROGRAM = """
import sys
from pathlib import Path
from resbackbone.runtime import distributed, resume

resume.SEEN_WITHIN_S = float(sys.argv[2])
process = distributed.setup("cpu")
own = Path(sys.argv[3 + process.rank])
try:
    print(resume.resolve_resume(sys.argv[1], own / "checkpoints"))
except resume.InputError as error:
    print(f"error: {error}")
distributed.shutdown()
"""


def test_the_main_process_chooses(repository: Path, tmp_path: Path) -> None:
    found = save_checkpoint(tmp_path / "main/checkpoints", 4, state_of(4))
    save_checkpoint(tmp_path / "other/checkpoints", 6, state_of(6))  # what a machine might still see of another time
    said = run_two(repository, ["-c", PROGRAM, "auto", "0", str(tmp_path / "main"), str(tmp_path / "other")])
    assert [line.splitlines()[-1] for line in said] == [str(found)] * 2


def test_every_process_must_see_the_choice(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    save_checkpoint(tmp_path / "there/checkpoints", 6, state_of(6))
    said = run_two(repository, ["-c", PROGRAM, "auto", "0.5", str(tmp_path / "here"), str(tmp_path / "there")])
    wanted = "process 1 sees checkpoints where process 0 sees none; put the folder on a disk that all machines share"
    assert [line.splitlines()[-1].partition(": ")[2].partition(": ")[2] for line in said] == [wanted] * 2


def test_a_checkpoint_that_a_process_does_not_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = save_checkpoint(tmp_path / "checkpoints", 4, state_of(4))
    monkeypatch.setattr(distributed, "gather_objects", lambda sees: [True, not sees])
    with pytest.raises(InputError, match=f"--output {tmp_path}: process 1 does not see {found}, where process 0 goes on; put"):
        resolve_resume("auto", tmp_path / "checkpoints")
