"""Tar shards in webdataset's layout, which webdataset writes, on a disk, behind HTTP or in an object store (`stores.py`).

A split is a folder of `shard_00000.tar` … and `index.json`, which says what each holds; a sample is `NNNNNNNN.jpg` (or png …) and its
label, `NNNNNNNN.cls`. The index is written last, so a split that has one is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from resbackbone.classification.files import decode
from resbackbone.classification.sources import Source
from resbackbone.classification.stores import checked_place, is_remote, open_place
from resbackbone.classification.tar import tar_files
from resbackbone.classification.views import resize_shorter
from resbackbone.errors import InputError
from resbackbone.runtime.atomic import storage_errors, write_atomically
from resbackbone.runtime.random_state import item_seed
from resbackbone.runtime.sampler import shuffled

INDEX_FILE = "index.json"
VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9._-]+\.tar")  # a file in the index's own folder
_TRIES = 4  # to read a shard that isn't on a disk of ours
_WAIT_S = 1.0  # after the first failure; twice as long after each further one
_logger = logging.getLogger(__name__)
_KINDS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"BM": "bmp", b"RI": "webp"}


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What a split of shards holds. place: the folder or URL they are in; counts: int64 [shards], images in each; sizes: bytes of each."""

    place: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    counts: np.ndarray
    sizes: tuple[int, ...]

    @property
    def starts(self) -> np.ndarray:
        """int64 [shards + 1]: number of the first image of each shard, and of all images."""
        return np.concatenate([[0], np.cumsum(self.counts)])


def write_shards(
    source: Source, folder: Path, *, per_shard: int = 1000, short_side: int | None = None, quality: int = 90, seed: int | None = 0
) -> ShardIndex:
    """Write every image of `source` into shards of `per_shard`, each whole or not there, in an order shuffled by `seed` (None: as it is).

    short_side: images whose shorter side is larger are resized to it and written as JPEGs of `quality`; all others, and everything
    without it, byte for byte. Raises InputError for an image that can't be read, a folder that has shards already, a full disk.
    """
    if per_shard < 1:
        raise InputError(f"--per-shard {per_shard} is not possible; it is the number of images in a shard, usually 1000")
    if (folder / INDEX_FILE).exists():
        raise InputError(f"{folder} holds shards already; choose another --output, or remove them")
    total = len(source.labels)
    order = np.arange(total) if seed is None else shuffled(total, seed=item_seed(seed))
    shards = []
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number, start in enumerate(range(0, total, per_shard)):
            name = f"shard_{number:05d}.tar"
            indices = order[start : start + per_shard].tolist()
            shards.append(
                {"name": name, "samples": len(indices), **_write_shard(source, folder / name, indices, start, short_side, quality)}
            )
    index = {"version": VERSION, "classes": list(source.classes), "short_side": short_side, "shards": shards}
    write_atomically(folder / INDEX_FILE, json.dumps(index, indent=1).encode())
    return parse_index(json.dumps(index), place=str(folder))


def _write_shard(source: Source, path: Path, indices: list[int], first: int, short_side: int | None, quality: int) -> dict[str, Any]:
    webdataset = import_webdataset()
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            with webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
                for number, index in enumerate(indices, first):
                    data = _stored(source.read(index), short_side, quality, name=source.name(index))
                    kind = _KINDS.get(data[:2], "img")
                    writer.write({"__key__": f"{number:08d}", kind: data, "cls": str(int(source.labels[index])).encode()})
            file.flush()
            os.fsync(file.fileno())
        with temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = temporary.stat().st_size
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return {"bytes": size, "sha256": digest}


def _stored(data: bytes | np.ndarray, short_side: int | None, quality: int, *, name: str) -> bytes:
    pixels = data if isinstance(data, np.ndarray) else decode(data, name=name)  # also where the bytes stay: a bad image is found now
    if short_side is not None and min(pixels.shape[:2]) > short_side:
        return _encoded(resize_shorter(pixels, short_side), ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality])
    return data if isinstance(data, bytes) else _encoded(pixels, ".png", [])


def _encoded(pixels: np.ndarray, suffix: str, options: list[int]) -> bytes:
    done, encoded = cv2.imencode(suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
    assert done, f"OpenCV has no encoder for {suffix}"
    return encoded.tobytes()


# ------------------------------------------------------------------------------------------------------------------------------- reading


def read_index(root: str | None, split: str) -> ShardIndex:
    """The index of ROOT/SPLIT, a folder or a URL. Raises InputError where it is missing or isn't one, or a shard on disk is cut off."""
    if root is None:
        raise InputError(f"data.root is not set; data.kind=shards needs the folder or URL that holds {split}/{INDEX_FILE}")
    place = f"{checked_place(root)}/{split}"
    return parse_index(_read_text(f"{place}/{INDEX_FILE}"), place=place)


def parse_index(text: str, *, place: str) -> ShardIndex:
    """The index in `text`. Raises InputError for anything that isn't one."""
    try:
        content = json.loads(text)
        shards = content["shards"]
        index = ShardIndex(
            place=place,
            classes=tuple(str(name) for name in content["classes"]),
            names=tuple(str(shard["name"]) for shard in shards),
            counts=np.array([int(shard["samples"]) for shard in shards], dtype=np.int64),
            sizes=tuple(int(shard["bytes"]) for shard in shards),
        )
        version = content["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{place}/{INDEX_FILE} is not an index of shards ({error}); write it again with tools/make_shards.py") from None
    wrong = [name for name in index.names if not _NAME.fullmatch(name)]
    if version != VERSION or wrong or not index.names or index.counts.min() < 1:
        what = (
            f"names a shard {wrong[0]!r}"
            if wrong
            else f"is of version {version}"
            if version != VERSION
            else "names no shard, or an empty one"
        )
        raise InputError(f"{place}/{INDEX_FILE} {what}; write it again with tools/make_shards.py")
    if not is_remote(place):
        for name, size in zip(index.names, index.sizes, strict=True):
            _check_file(Path(place) / name, size)
    return index


def read_shard(index: ShardIndex, number: int, *, first: int = 0, last: int | None = None) -> Iterator[tuple[int, bytes, int]]:
    """(number of the image in the split, its bytes, its label) of one shard, in its order, from its image `first` to before `last`.

    A connection that fails or is cut is opened anew, and goes on after the last image given, `_TRIES` times in all. Raises InputError
    naming the shard where it can't be opened, is damaged, or holds fewer images than the index says.
    """
    url, last = f"{index.place}/{index.names[number]}", int(index.counts[number]) if last is None else last
    tries = _TRIES if is_remote(url) else 1
    for attempt in range(1, tries + 1):
        try:
            for place, data, label in _images(index, number, first, last):
                first = place + 1
                yield int(index.starts[number]) + place, data, label
            return
        except InputError:
            raise
        except Exception as error:  # tar's, the disk's, and each store has others of its own
            if attempt == tries:
                raise _broken(url, _reason(error)) from error
            wait_s = _WAIT_S * 2 ** (attempt - 1)
            _logger.warning("%s: %s; trying again in %g s (%d of %d)", url, _reason(error), wait_s, attempt + 1, tries)
            time.sleep(wait_s)


def _images(index: ShardIndex, number: int, first: int, last: int) -> Iterator[tuple[int, bytes, int]]:
    """(place in the shard, bytes, label) of its images from `first` to before `last`.

    Raises EOFError where there are fewer, ValueError for wrong ones, and what the tar file and its store raise.
    """
    url, seen = f"{index.place}/{index.names[number]}", 0
    with closing(open_place(url)) as stream:
        for key, files in groupby(tar_files(stream), key=lambda file: file[0].partition(".")[0]):
            if first <= seen < last:
                yield seen, *_content(dict(files), key, classes=len(index.classes))
            seen += 1
            if seen >= last:
                return
    raise EOFError(f"it holds {seen} images, the index says {int(index.counts[number])}")


def import_webdataset() -> Any:
    """webdataset, which only shards need. Raises InputError where it isn't installed."""
    try:
        import webdataset
    except ImportError as error:
        raise InputError('shards are read and written by webdataset: pip install "resbackbone[shards]"') from error
    return webdataset


def _content(files: dict[str, bytes], key: str, *, classes: int) -> tuple[bytes, int]:
    label = files.pop(f"{key}.cls", b"").decode(errors="replace").strip()
    images = list(files.values())
    if len(images) != 1 or not label.isdigit() or int(label) >= classes:
        raise ValueError(f"sample {key} has {len(images)} images and the label {label!r} of {classes} classes")
    return images[0], int(label)


def _reason(error: Exception) -> str:
    """What went wrong, without the stream and the URL that webdataset adds to an error's arguments."""
    return str(error if isinstance(error, OSError) or not error.args else error.args[0])[:200]


def _broken(url: str, reason: str) -> InputError:
    return InputError(f"{url}: this shard cannot be read ({reason}); copy it again, or write it again with tools/make_shards.py")


def _check_file(path: Path, size: int) -> None:
    actual = path.stat().st_size if path.is_file() else None
    if actual != size:
        what = "is not there" if actual is None else f"has {actual} bytes instead of {size}"
        raise InputError(f"{path} {what}; copy it again, or write the shards again with tools/make_shards.py")


def _read_text(url: str) -> str:
    try:
        with closing(open_place(url)) as stream:
            return io.TextIOWrapper(stream, encoding="utf-8").read()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{url} cannot be read ({str(error)[:200]}); data.root holds a folder of shards per split, from tools/make_shards.py"
        ) from None
