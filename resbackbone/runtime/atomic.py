"""Files that are whole or not there: written beside their place, fsynced, renamed; full and read-only disks told in plain words."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resbackbone.errors import InputError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}


def write_atomically(path: Path | str, data: bytes) -> None:
    """Write `data` to `path`: after a crash at any moment the old content or the new is there, never half of it.

    Makes the parent folder. Raises InputError for a full disk, a read-only folder, or a path that cannot be a file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with storage_errors(path.parent, needed_bytes=len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(folder: Path, *, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn an OSError inside the block into an InputError that says which folder, how much is free and what to do."""
    try:
        yield
    except OSError as error:
        raise InputError(describe_storage_error(error, folder, needed_bytes=needed_bytes)) from error


def describe_storage_error(error: OSError, folder: Path, *, needed_bytes: int | None = None) -> str:
    """Say in one sentence why `folder` could not be written and what to do about it."""
    if error.errno in _FULL:
        needed = f"{needed_bytes / 1e6:.1f} MB are needed, " if needed_bytes else ""
        return f"{folder}: the disk is full ({needed}{_free_mb(folder)} MB free); free some space or choose another --output"
    if error.errno in _READ_ONLY:
        return f"{folder}: this folder cannot be written ({os.strerror(error.errno)}); choose another --output or change its permissions"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{folder}: a file stands where a folder is needed; choose another --output or move that file"
    return f"{folder}: writing failed ({error.strerror or error}); choose another --output"


def _free_mb(folder: Path) -> str:
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return f"{shutil.disk_usage(existing).free / 1e6:.1f}"
