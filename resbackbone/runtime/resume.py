"""Which checkpoint `--resume` means: one for all processes, and after a restart by torchrun the one that loses least."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from resbackbone.errors import InputError, nearest
from resbackbone.runtime import distributed
from resbackbone.runtime.atomic import write_atomically
from resbackbone.runtime.checkpoint import RECORD_FILE, STATE_FILE, checkpoints_in, find_checkpoint, first_whole

BEGINNING_FILE = "resumed.json"
# A machine may know a folder on a network disk from its memory; nfs(5) keeps that for up to 60 s (acdirmax).
SEEN_WITHIN_S = 90.0


def resolve_resume(resume: str | None, folder: Path | str) -> Path | None:
    """The checkpoint that `--resume` means: None, "auto" (the newest good one in `folder`, None if there is none yet), or a path.

    A path may be a checkpoint, a `checkpoints/` folder or an output folder. It says where a run begins: processes that torchrun started
    anew go on from what the run has saved since. The main process chooses. Raises InputError on every process when the path is none of
    these, when every checkpoint is damaged (starting over in silence would bury the run), or when a process sees other files.
    """
    if resume is None:
        return None
    folder, restarted = Path(folder), distributed.was_restarted()

    def choose() -> tuple[Path | None, str]:
        chosen = _newest(folder) if resume == "auto" else _begun_at(resume, folder, restarted=restarted)
        return chosen, _sight_of(chosen, folder)

    chosen, sight = distributed.on_main(choose)
    _check_all_see(chosen, sight, folder)
    return chosen


def _newest(folder: Path) -> Path | None:
    found = find_checkpoint(folder)
    if found is None and checkpoints_in(folder):
        raise InputError(f"{folder}: every checkpoint here is damaged; restore one, or start a new run in another --output")
    return found


def _begun_at(resume: str, folder: Path, *, restarted: bool) -> Path:
    """What a path means. What `folder` holds as the run begins there is noted: after a restart, everything else is the run's own."""
    note = _read(folder / BEGINNING_FILE) if restarted else {}
    is_known = note.get("resume") == resume
    if is_known and (own := first_whole(one for one in checkpoints_in(folder) if _stamp(one) not in note["found"])):
        return own  # looked for first: train.keep_checkpoints may have removed what the path names
    path = _checkpoint_at(Path(resume), folder)
    if not is_known and "TORCHELASTIC_RESTART_COUNT" in os.environ:
        note = {"resume": resume, "found": [_stamp(one) for one in checkpoints_in(folder)]}
        write_atomically(folder / BEGINNING_FILE, json.dumps(note).encode())
    return path


def _checkpoint_at(path: Path, folder: Path) -> Path:
    if path.is_file() or (path / STATE_FILE).is_file():
        return path
    found = find_checkpoint(path / "checkpoints") or find_checkpoint(path)
    if found is None:
        known = [str(checkpoint) for checkpoint in checkpoints_in(folder)]
        hint = nearest(str(path), known) or (f" there are: {', '.join(known)}" if known else " --resume auto starts or continues by itself")
        raise InputError(f"--resume {path}: there is no good checkpoint at this path;{hint}")
    return found


def _read(note: Path) -> dict[str, Any]:
    return json.loads(note.read_bytes()) if note.is_file() else {}


def _stamp(checkpoint: Path) -> str:
    # The time tells a step saved again from the one that was there, which may be equal to the bit.
    record = checkpoint / RECORD_FILE
    return f"{checkpoint.name} {record.stat().st_mtime_ns if record.is_file() else 0}"


# ------------------------------------------------------------------------------------------------------------------ the same on every rank


def _check_all_see(chosen: Path | None, expected: str, folder: Path) -> None:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while (mine := _sight_of(chosen, folder)) != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = [rank for rank, sees in enumerate(distributed.gather_objects(mine == expected)) if not sees]
    if blind:
        what = f"does not see {chosen}, where process 0 goes on" if chosen else "sees checkpoints where process 0 sees none"
        raise InputError(f"--output {folder.parent}: process {blind[0]} {what}; put the folder on a disk that all machines share")


def _sight_of(chosen: Path | None, folder: Path) -> str:
    """What this process sees of a choice, without reading all of it."""
    if chosen is None:
        return " ".join(one.name for one in checkpoints_in(folder))
    state_file = chosen / STATE_FILE if chosen.is_dir() else chosen
    record = state_file.with_name(RECORD_FILE)
    size = state_file.stat().st_size if state_file.is_file() else None
    return f"{size} bytes, {record.read_text() if record.is_file() else 'no record'}"
