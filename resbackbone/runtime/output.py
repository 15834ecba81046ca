"""The output folder: proven writable before any work, and never two runs in one."""

from __future__ import annotations

import os
from pathlib import Path

from resbackbone.errors import InputError
from resbackbone.runtime.atomic import storage_errors

# What a run leaves behind; any of these means the folder is taken.
RUN_FILES = ("config.yaml", "metrics.jsonl", "checkpoints", "model_final.safetensors")


def refuse_taken(output: Path, *, resume: str | None) -> None:
    """Raises InputError for a path that is a file, or a folder with another run in it while `resume` is None; writes nothing."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: this is a file; give a folder, which is made if it is not there")
    present = [name for name in RUN_FILES if (output / name).exists()]
    if present and resume is None:
        raise InputError(
            f"--output {output}: another run is in this folder ({', '.join(present)}); "
            "go on with it by --resume auto, or choose another folder"
        )


def prepare_output(path: Path | str, *, resume: str | None = None) -> Path:
    """Make the output folder and prove that it can be written. Call it on the main process, before any work.

    Raises InputError for a read-only folder, a full disk, a path that is a file, or a folder with another run in it while `resume`
    is None.
    """
    output = Path(path)
    refuse_taken(output, resume=resume)
    probe = output / f".write-test-{os.getpid()}"
    with storage_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        # Permissions do not tell (root, network disks, read-only mounts): only writing does.
        probe.write_bytes(b"x")
        probe.unlink()
    return output
