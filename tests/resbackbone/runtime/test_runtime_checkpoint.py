"""Checkpoints under attack: kills between any two file operations, full disks, cut-off files, hidden code."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import pickle
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resbackbone.errors import InputError
from resbackbone.runtime import atomic, checkpoint
from resbackbone.runtime.checkpoint import (
    best_step,
    find_checkpoint,
    load_checkpoint,
    mark_best,
    save_checkpoint,
    save_weights,
)


def state_of(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "model": OrderedDict(weight=torch.full((64, 64), float(step)), bias=torch.ones(3, dtype=torch.bfloat16)),
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.arange(5.0)}},
            "param_groups": [{"lr": 0.1, "params": [0], "nesterov": False}],
        },
        "ema": None,
        "best": float("-inf"),
        "name": "x",
        "shape": (1, 2),
    }


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.iterdir() if path.is_dir())


def test_round_trip(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "checkpoints", 12, state_of(12))
    assert path == tmp_path / "checkpoints" / "step_00000012"
    loaded = load_checkpoint(path)
    expected = state_of(12)
    assert torch.equal(loaded["model"].pop("weight"), expected["model"].pop("weight"))
    assert torch.equal(loaded["model"].pop("bias"), expected["model"].pop("bias"))
    assert torch.equal(loaded["optimizer"]["state"][0].pop("momentum_buffer"), expected["optimizer"]["state"][0].pop("momentum_buffer"))
    assert loaded == expected
    assert load_checkpoint(path / "state.pt")["step"] == 12
    assert sorted(os.listdir(path)) == ["checkpoint.json", "state.pt"]


def test_a_real_training_state_is_plain(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    path = save_checkpoint(tmp_path, 1, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    loaded = load_checkpoint(path)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    assert torch.equal(loaded["optimizer"]["state"][0]["momentum_buffer"], optimizer.state[model[0].weight]["momentum_buffer"])


@pytest.mark.parametrize("value", [np.float64(1.0), Path("x"), {1}, object(), [1, {"a": np.int64(2)}]])
def test_what_could_not_be_loaded_is_refused_when_it_is_saved(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match=r"state\['a'\]"):
        save_checkpoint(tmp_path, 1, {"a": value})
    assert find_checkpoint(tmp_path) is None


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        save_checkpoint(tmp_path, step, state_of(step), keep=2, best=step == 20)
    assert steps_in(tmp_path) == [20, 40, 50]
    assert best_step(tmp_path) == 20
    mark_best(tmp_path, 40)
    save_checkpoint(tmp_path, 60, state_of(60), keep=1)
    assert steps_in(tmp_path) == [40, 60]


def test_an_abandoned_future_does_not_win_over_the_run_that_went_on(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, state_of(step), best=step == 30)
    (tmp_path / "step_00000030" / "state.pt").write_bytes(b"x")
    save_checkpoint(tmp_path, 25, state_of(25), keep=1)
    assert steps_in(tmp_path) == [25]
    assert best_step(tmp_path) is None


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 10, {"value": 1})
    save_checkpoint(tmp_path, 10, {"value": 2})
    assert load_checkpoint(tmp_path / "step_00000010") == {"value": 2}
    assert sorted(os.listdir(tmp_path)) == ["step_00000010"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it, and cleaning up is switched off with it."""


def run_until_killed(action: Callable[[], Any]) -> bool:
    try:
        action()
    except Killed:
        return True
    return False


def patch_operations(patch: pytest.MonkeyPatch, *, fatal: int) -> None:
    """Make file operation number `fatal` (from 0) and all after it die."""
    counter = itertools.count()

    def counted(real: Any) -> Any:
        def operation(*arguments: Any, **options: Any) -> Any:
            if next(counter) >= fatal:
                raise Killed
            return real(*arguments, **options)

        return operation

    for name in ("fsync", "replace"):
        patch.setattr(os, name, counted(getattr(os, name)))
    patch.setattr(checkpoint.shutil, "rmtree", counted(checkpoint.shutil.rmtree))
    patch.setattr(checkpoint._HashingFile, "write", counted(checkpoint._HashingFile.write))


@pytest.mark.parametrize("again", [False, True])
def test_a_kill_between_any_two_file_operations_leaves_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    for fatal in itertools.count():
        folder = tmp_path / str(fatal)
        save_checkpoint(folder, 10, state_of(10))
        if again:
            save_checkpoint(folder, 20, state_of(20))
        with monkeypatch.context() as patch:
            patch_operations(patch, fatal=fatal)
            died = run_until_killed(lambda folder=folder: save_checkpoint(folder, 20, state_of(20), keep=1))
        found = find_checkpoint(folder)
        assert found is not None, f"nothing was left after a kill before operation {fatal}"
        assert load_checkpoint(found)["step"] in ((20,) if again else (10, 20))
        save_checkpoint(folder, 30, state_of(30), keep=1)
        assert os.listdir(folder) == ["step_00000030"]
        if not died:
            break
    assert fatal > 20, "the patched operations are not those that saving uses"


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_record(path: Path) -> None:
    path.with_name("checkpoint.json").unlink()


def broken_record(path: Path) -> None:
    path.with_name("checkpoint.json").write_text('{"size": ')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, r"it is cut off \(\d+ of \d+ bytes\)"),
        (flip_a_byte, "its content is damaged"),
        (empty, "it is cut off"),
        (Path.unlink, "there is no such checkpoint"),
        (no_record, "it was never completed"),
        (broken_record, "checkpoint.json cannot be read"),
    ],
)
def test_damage_is_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, message: str) -> None:
    good = save_checkpoint(tmp_path, 10, state_of(10))
    bad = save_checkpoint(tmp_path, 20, state_of(20))
    damage(bad / "state.pt")
    with pytest.raises(InputError, match=message):
        load_checkpoint(bad)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path) == good
    assert "step_00000020" in caplog.text
    assert "skipped" in caplog.text


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["RESBACKBONE_TEST_TRAP"],)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["torch zip", "bare pickle"])
def test_a_malicious_checkpoint_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    trap = tmp_path / "trap"
    monkeypatch.setenv("RESBACKBONE_TEST_TRAP", str(trap))
    path = tmp_path / "evil.pt"
    if kind == "torch zip":
        torch.save({"model": Malicious()}, path)
    else:
        path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(InputError, match=r"evil\.pt: refused, because it holds more than plain data and could run code"):
        load_checkpoint(path)
    assert not trap.exists()


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 not a zip", b"\x80\x02"])
def test_a_file_that_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lone.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"lone\.pt: cannot be read as a checkpoint; it is cut off or another kind of file"):
        load_checkpoint(path)


def test_a_lone_cut_off_zip_and_a_lone_tensor(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, tmp_path / "whole.pt")
    (tmp_path / "part.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    assert load_checkpoint(tmp_path / "whole.pt")["a"].sum() == 1000
    for name in ("part.pt", "tensor.pt"):
        with pytest.raises(InputError, match=name):
            load_checkpoint(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------- disks that cannot take it


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """The kernel itself refuses to let any file grow further (EFBIG): a real failed write half-way through."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = save_checkpoint(tmp_path, 10, state_of(10), keep=1)
    real, written = checkpoint._HashingFile.write, 0

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            nonlocal written
            written += len(data)
            if written > 4000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    def write(hashing: Any, data: bytes) -> int:
        if not isinstance(hashing.file, Full):
            hashing.file = Full(hashing.file)
        return real(hashing, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint._HashingFile, "write", write)
        with pytest.raises(InputError) as caught:
            save_checkpoint(tmp_path, 20, state_of(20), keep=1)
    assert written > 4000
    message = str(caught.value)
    assert f"{tmp_path}: the disk is full (0.0 MB are needed, " in message
    assert "MB free)" in message
    assert "earlier checkpoints are untouched" in message
    assert os.listdir(tmp_path) == [good.name]
    assert load_checkpoint(good)["step"] == 10
    assert load_checkpoint(save_checkpoint(tmp_path, 20, state_of(20), keep=1))["step"] == 20


def test_a_write_that_the_kernel_refuses(tmp_path: Path) -> None:
    good = save_checkpoint(tmp_path, 10, state_of(10))
    with file_size_limit(8192), pytest.raises(InputError, match=r"writing failed .*earlier checkpoints are untouched"):
        save_checkpoint(tmp_path, 20, state_of(20))
    assert os.listdir(tmp_path) == [good.name]
    assert find_checkpoint(tmp_path) == good


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_failed_fsync_counts_as_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    with pytest.raises(InputError, match=f"{tmp_path}: (the disk is full|this folder cannot be written)"):
        save_checkpoint(tmp_path, 10, state_of(10))
    assert os.listdir(tmp_path) == []


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(InputError, match="a file stands where a folder is needed"):
        save_checkpoint(tmp_path / "checkpoints", 10, state_of(10))


def test_save_weights_keeps_the_old_file_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": torch.ones(2)}, {})
    before = path.read_bytes()
    with file_size_limit(1000), pytest.raises(InputError, match="writing failed"):
        save_weights(path, {"a": torch.ones(1000)}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
