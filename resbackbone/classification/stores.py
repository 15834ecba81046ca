"""Opening what `data.root` names: a file, a URL, or an object in a store that fsspec knows. Never a command.

webdataset's own opener isn't used: it hands `pipe:…` to a shell, and a config, such as the one inside a weights file, may be anybody's.
"""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any

from resbackbone.errors import InputError, nearest

# Scheme of an object store -> the package through which fsspec reads it. Others of fsspec's stay out: some read local files, or templates.
OBJECT_STORES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
SCHEMES = ("http", "https", *OBJECT_STORES)
TIMEOUT_S = 60.0  # without a byte


def checked_place(root: str) -> str:
    """`data.root` without a trailing slash, `file://` taken off. Raises InputError for a command or a scheme that isn't read."""
    scheme, found, rest = root.partition("://")
    if root.startswith("pipe:"):
        raise InputError(
            f"data.root={root!r} is a command, and commands from a config are never run; mount the store as a folder, or name a URL "
            f"({', '.join(SCHEMES)})"
        )
    if found and scheme == "file":
        return rest.rstrip("/")
    if found and (scheme not in SCHEMES or "::" in rest):  # :: chains one of fsspec's file systems to another
        what = f"{scheme}:// is not read;{nearest(scheme, SCHEMES)}" if scheme not in SCHEMES else "a chain of stores is not read;"
        raise InputError(f"data.root={root!r}: {what} a folder or {', '.join(SCHEMES)} is")
    return root.rstrip("/")


def local_folder(output: str) -> Path:
    """The folder that shards are written to. Raises InputError for a store: Path would make a folder named "s3:" of it."""
    scheme, found, rest = output.partition("://")
    if found and scheme != "file":
        raise InputError(f"--output {output}: shards are written to a folder; write them to a disk, then copy them with the store's tool")
    return Path(rest if found else output)


def is_remote(place: str) -> bool:
    """Whether `place` is a URL rather than a path."""
    return "://" in place


def open_place(place: str) -> Any:
    """A binary stream of a path or a URL that `checked_place` has let through. Raises OSError, or whatever else its store raises."""
    scheme = place.partition("://")[0] if is_remote(place) else None
    if scheme is None:
        return Path(place).open("rb")
    if scheme in ("http", "https"):
        return urllib.request.urlopen(place, timeout=TIMEOUT_S)
    return _open_object(place, OBJECT_STORES[scheme])


def _open_object(place: str, package: str) -> Any:
    try:
        import fsspec

        return fsspec.open(place, "rb").open()
    except ImportError as error:
        raise InputError(f"{place} is read through fsspec, which needs {package} for it: pip install {package}") from error
