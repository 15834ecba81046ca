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
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from resbackbone.classification.files import UnreadableImage, decode
from resbackbone.classification.sources import SUFFIXES, Source
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
_OTHER_KIND = "img"
_IMAGES = SUFFIXES | {f".{_OTHER_KIND}"}
_MAX_UNREADABLE_IN_A_ROW = 100  # then the disk is gone, not a file


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What a split of shards holds. place: the folder or URL they are in; counts: int64 [shards], images in each; sizes: bytes of each."""

    place: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    counts: np.ndarray
    sizes: tuple[int, ...]

    @property
    def images(self) -> int:
        """How many there are in all."""
        return int(self.counts.sum())

    @property
    def starts(self) -> np.ndarray:
        """int64 [shards + 1]: number of the first image of each shard, and of all images."""
        return np.concatenate([[0], np.cumsum(self.counts)])


def write_shards(
    source: Source,
    folder: Path,
    *,
    per_shard: int = 1000,
    short_side: int | None = None,
    quality: int = 90,
    seed: int | None = 0,
    skip_unreadable: bool = False,
    report: Callable[[str], None] = _logger.info,
) -> ShardIndex:
    """Write every image of `source` into shards of `per_shard`, each whole or not there, in an order shuffled by `seed` (None: as it is).

    short_side: images whose shorter side is larger are resized to it and written as JPEGs of `quality`; all others, and everything
    without it, byte for byte. skip_unreadable: leave images out that can't be read, each named in a warning. report: gets a line
    after each shard. Raises InputError for an image that can't be read, a folder that has shards already, a full disk.
    """
    for option, value, meaning in (("--per-shard", per_shard, "images in a shard, such as 1000"), ("--short-side", short_side, "pixels")):
        if value is not None and value < 1:
            raise InputError(f"{option} {value} is not possible; it is a number of {meaning}, at least 1")
    _refuse_index(folder)
    total = len(source.labels)
    order = np.arange(total) if seed is None else shuffled(total, seed=item_seed(seed))
    samples = _readable(source, order.tolist(), short_side, quality, skip=skip_unreadable)
    shards: list[dict[str, Any]] = []
    started, written = time.monotonic(), 0
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for first in samples:
            name = f"shard_{len(shards):05d}.tar"
            shards.append({"name": name, **_write_shard(folder / name, chain([first], islice(samples, per_shard - 1)), number=written)})
            written += shards[-1]["samples"]
            speed = written / max(time.monotonic() - started, 1e-9)
            report(f"{name}: {written} of {total} images, {speed:.0f} images/s, {(total - written) / speed / 60:.0f} min left")
    if not shards:
        raise InputError(f"none of the {total} images can be read, the first being {source.name(0)}; is this the right --root?")
    return _write_index(folder, {"classes": list(source.classes), "short_side": short_side, "shards": shards})


def _readable(source: Source, order: list[int], short_side: int | None, quality: int, *, skip: bool) -> Iterator[tuple[bytes, int]]:
    """(bytes to store, label) of each image in `order` that can be read."""
    in_a_row = 0
    for index in order:
        try:
            yield _stored(source.read(index), short_side, quality, name=source.name(index)), int(source.labels[index])
            in_a_row = 0
        except UnreadableImage as error:
            in_a_row += 1
            if not skip:
                raise InputError(f"{error}. Or go on without it: --unreadable skip") from error
            if in_a_row == _MAX_UNREADABLE_IN_A_ROW:
                raise InputError(f"{in_a_row} images in a row cannot be read, the last: {error}; is the disk still there?") from error
            _logger.warning("%s; skipped", error)


def _write_shard(path: Path, samples: Iterator[tuple[bytes, int]], *, number: int) -> dict[str, Any]:
    """What the index says of the shard; `number`: of its first image in the split."""
    webdataset = import_webdataset()
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    count = 0
    try:
        with temporary.open("wb") as file:
            with webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
                for data, label in samples:
                    kind = _KINDS.get(data[:2], _OTHER_KIND)
                    writer.write({"__key__": f"{number + count:08d}", kind: data, "cls": str(label).encode()})
                    count += 1
            file.flush()
            os.fsync(file.fileno())
        described = {"samples": count, **_size_and_digest(temporary)}
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return described


def _size_and_digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _refuse_index(folder: Path) -> None:
    if (folder / INDEX_FILE).exists():
        raise InputError(f"{folder} holds shards already; choose another --output, or remove them")


def _write_index(folder: Path, content: dict[str, Any]) -> ShardIndex:
    text = json.dumps({"version": VERSION, **content}, indent=1)
    index = parse_index(text, place=str(folder))
    write_atomically(folder / INDEX_FILE, text.encode())
    return index


def index_shards(folder: Path, class_file: Path | None = None, *, report: Callable[[str], None] = _logger.info) -> ShardIndex:
    """Write the index of tars that others have made: samples of one image (.jpg, .png …), the number of its class (.cls), and any more.

    class_file: the names of the classes, one a line; without it they are called by their numbers. Raises InputError for a tar that
    can't be read, a sample that is none, and a folder that has an index already.
    """
    _refuse_index(folder)
    if class_file is not None and not class_file.is_file():
        raise InputError(f"--classes {class_file} is not there; give a file with the name of a class on each line")
    classes = [] if class_file is None else class_file.read_text().splitlines()
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise InputError(f"{folder} holds no .tar files; give the folder of one split, such as SHARDS/train")
    shards, largest = [], -1
    for path in paths:
        try:
            with path.open("rb") as stream:
                labels = [_content(dict(files), key, classes=len(classes) or None)[1] for key, files in _samples(stream)]
        except (ValueError, OSError) as error:
            raise InputError(f"{path} is no shard that can be read here: {_reason(error)}; make it again, uncompressed") from error
        if not labels:
            raise InputError(f"{path} holds no samples; remove it")
        largest = max(largest, *labels)
        shards.append({"name": path.name, "samples": len(labels), **_size_and_digest(path)})
        report(f"{path.name}: {len(labels)} images")
    return _write_index(folder, {"classes": classes or [str(number) for number in range(largest + 1)], "shards": shards})


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
        for key, files in _samples(stream):
            if first <= seen < last:
                yield seen, *_content(dict(files), key, classes=len(index.classes))
            seen += 1
            if seen >= last:
                return
    raise EOFError(f"it holds {seen} images, the index says {int(index.counts[number])}")


def import_webdataset() -> Any:
    """webdataset, which only writing shards needs. Raises InputError where it isn't installed."""
    try:
        import webdataset
    except ImportError as error:
        raise InputError('shards are written by webdataset: pip install "resbackbone[shards]" (reading them needs nothing)') from error
    return webdataset


def _samples(stream: Any) -> Iterator[tuple[str, Iterator[tuple[str, bytes]]]]:
    """(key, its files) of each sample: what comes in a row with one name up to the first dot, folders aside."""
    return groupby(tar_files(stream), key=lambda file: file[0][: len(file[0]) - len(_suffix(file[0]))])


def _suffix(name: str) -> str:
    _, dot, suffix = name.rpartition("/")[2].partition(".")
    return dot + suffix


def _content(files: dict[str, bytes], key: str, *, classes: int | None) -> tuple[bytes, int]:
    """(image, label); what else there is, such as a caption, is passed over."""
    label = files.get(f"{key}.cls", b"").decode(errors="replace").strip()
    images = [data for name, data in files.items() if _suffix(name).lower() in _IMAGES]
    if len(images) != 1 or not label.isdigit() or (classes is not None and int(label) >= classes):
        of = "" if classes is None else f" of {classes} classes"
        raise ValueError(f"sample {key} has {len(images)} images and the label {label[:40]!r}{of}")
    return images[0], int(label)


def _reason(error: Exception) -> str:
    """What went wrong, in few words."""
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
