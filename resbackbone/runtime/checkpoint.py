"""Checkpoints that are whole or not there, that nothing can hide code in, and that a full disk cannot take away.

A folder of them: `step_00001000/state.pt` with `checkpoint.json` (its size and SHA-256), and `best.json` naming the best step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from resbackbone.errors import InputError
from resbackbone.runtime.atomic import describe_storage_error, storage_errors, sync_folder, write_atomically

STATE_FILE = "state.pt"
RECORD_FILE = "checkpoint.json"
BEST_FILE = "best.json"
# `.replaced` is the older checkpoint of a step being saved again: all there is, should the process die between two renames.
_NAME = re.compile(r"step_(\d+)(\.replaced)?")
_PLAIN = (torch.Tensor, int, float, str, type(None))
_logger = logging.getLogger(__name__)


def checkpoint_name(step: int) -> str:
    """The folder that holds the checkpoint of a step."""
    return f"step_{step:08d}"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int = 3, best: bool = False) -> Path:
    """Write `folder/step_{step:08d}/` atomically, then remove all but the newest `keep` and the best. Returns its path.

    `state` may hold tensors, dicts, lists, tuples, numbers, texts, bools and None. Checkpoints of later steps belong to a course of
    training that was abandoned by resuming from an earlier one; they are removed too, so that `--resume auto` goes on from here.
    Raises InputError for a full disk or a folder that cannot be written; the earlier checkpoints are then all still there.
    """
    assert keep >= 1, "a run keeps at least its newest checkpoint"
    _check_plain(state, "state")
    folder = Path(folder)
    final = folder / checkpoint_name(step)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary = folder / f".{final.name}.tmp-{os.getpid()}"
        try:
            _write_state(temporary, step, state)
            _move_into_place(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if best:
        mark_best(folder, step)
    _prune(folder, step, keep)
    return final


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint folder (or the `state.pt` in it) onto the CPU, after checking its size and SHA-256.

    Raises InputError when it is missing, cut off or damaged, or holds anything but plain data: nothing in it is ever executed.
    """
    path = Path(path)
    state_file = path / STATE_FILE if path.is_dir() else path
    problem = _damage(state_file)
    if problem:
        raise InputError(f"{state_file}: {problem}; resume from another checkpoint (--resume auto takes the newest good one)")
    state = _read_plain(state_file)
    if not isinstance(state, dict):
        raise InputError(f"{state_file}: holds {type(state).__name__}, not a checkpoint; give a step_NNNNNNNN folder that training wrote")
    return state


def find_checkpoint(folder: Path | str) -> Path | None:
    """The newest checkpoint in `folder` whose size and SHA-256 are right, or None. Damaged ones are skipped with a warning."""
    return first_whole(checkpoints_in(Path(folder)))


def first_whole(checkpoints: Iterable[Path]) -> Path | None:
    """The first whose size and SHA-256 are right, or None. Damaged ones are skipped with a warning."""
    for candidate in checkpoints:
        problem = _damage(candidate / STATE_FILE)
        if not problem:
            return candidate
        _logger.warning("%s: %s; skipped", candidate, problem)
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """Newest first, damaged ones too; a replaced one after the one that replaced it."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (-step_of(path), path.name))


def mark_best(folder: Path, step: int) -> None:
    """Name the checkpoint of `step` the best, which keeps it from being removed."""
    assert (folder / checkpoint_name(step)).is_dir(), f"no checkpoint of step {step} in {folder}"
    write_atomically(folder / BEST_FILE, json.dumps({"step": step}).encode())


def best_step(folder: Path) -> int | None:
    """The step that `mark_best` named, or None."""
    try:
        return int(json.loads((Path(folder) / BEST_FILE).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_weights(path: Path | str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and text metadata as one safetensors file, atomically. Raises InputError as `write_atomically` does."""
    from safetensors.torch import save

    write_atomically(path, save(_independent(tensors), metadata))


# ------------------------------------------------------------------------------------------------------------------------------- writing


class _HashingFile:
    """A file that hashes what it is given and remembers why a write failed (torch.save turns that into its own RuntimeError)."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _write_state(folder: Path, step: int, state: dict[str, Any]) -> None:
    folder.mkdir()
    with (folder / STATE_FILE).open("wb") as file:
        hashing = _HashingFile(file)
        try:
            torch.save(state, hashing)  # type: ignore[arg-type]
        except (RuntimeError, OSError) as error:
            if hashing.error is None:
                raise
            message = describe_storage_error(hashing.error, folder.parent, needed_bytes=_tensor_bytes(state))
            raise InputError(f"{message}. The earlier checkpoints are untouched; go on with --resume auto") from error
        file.flush()
        os.fsync(file.fileno())
    record = {"step": step, "size": hashing.size, "sha256": hashing.digest.hexdigest()}
    write_atomically(folder / RECORD_FILE, json.dumps(record).encode())


def _move_into_place(temporary: Path, final: Path) -> None:
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        os.replace(final, replaced)
    os.replace(temporary, final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    # A process killed while writing leaves its temporary folder; only one process writes here.
    for leftover in folder.glob(".step_*.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _prune(folder: Path, step: int, keep: int) -> None:
    best = best_step(folder)
    if best is not None and best > step:
        (folder / BEST_FILE).unlink(missing_ok=True)
        best = None
    current = [checkpoint for checkpoint in checkpoints_in(folder) if step_of(checkpoint) <= step]
    kept = {checkpoint for checkpoint in current if step_of(checkpoint) == best}
    kept.update(current[:keep])
    for checkpoint in checkpoints_in(folder):
        if checkpoint not in kept:
            shutil.rmtree(checkpoint, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint folder's name gives."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match, f"{checkpoint} is not a checkpoint folder"
    return int(match[1])


def _check_plain(value: Any, where: str) -> None:
    # Found now, at the first save, and not when a run has died and needs its checkpoint.
    if type(value) in _PLAIN or isinstance(value, (bool, torch.Tensor)):
        return
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, f"{where} key")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    else:
        raise TypeError(f"{where} is {type(value).__module__}.{type(value).__name__}, which weights_only loading would refuse")


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(_tensor_bytes(item) for item in items)


def _independent(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return result


# ------------------------------------------------------------------------------------------------------------------------------- reading


def _damage(state_file: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. A lone state file, without the folder's record, is taken as it is."""
    if not state_file.is_file():
        return "there is no such checkpoint"
    record_file = state_file.with_name(RECORD_FILE)
    if not record_file.is_file():
        return f"it has no {RECORD_FILE}, so it was never completed" if _NAME.fullmatch(state_file.parent.name) else None
    try:
        record = json.loads(record_file.read_bytes())
        size, sha256 = int(record["size"]), str(record["sha256"])
    except (ValueError, KeyError, TypeError):
        return f"its {RECORD_FILE} cannot be read"
    actual = state_file.stat().st_size
    if actual != size:
        return f"it is cut off ({actual} of {size} bytes)" if actual < size else f"it has {actual} bytes instead of {size}"
    with state_file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == sha256 else "its content is damaged (the SHA-256 is not the one it was written with)"


def _read_plain(state_file: Path) -> Any:
    try:
        return torch.load(state_file, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler fed with arbitrary bytes may raise anything
        raise InputError(f"{state_file}: {_why_unreadable(state_file, error)}; use a checkpoint that this project wrote") from None


def _why_unreadable(state_file: Path, error: Exception) -> str:
    # Never torch's own text for a refused pickle: it recommends weights_only=False.
    wanted = re.search(r"GLOBAL (\S+)", str(error))
    if wanted:
        return f"refused, because it holds more than plain data and could run code (it asks for {wanted[1]})"
    if isinstance(error, pickle.UnpicklingError) and state_file.open("rb").read(1) in (b"\x80", b"P"):
        return "refused, because it holds more than plain data and could run code, or is damaged"
    detail = next(iter(str(error).splitlines()), "")[:120] if isinstance(error, (RuntimeError, OSError)) else ""
    return f"cannot be read as a checkpoint; it is cut off or another kind of file ({detail or type(error).__name__})"
