"""What a data format is: annotations up front, images one at a time. Each format is one file with a `load` that returns a `Source`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from resbackbone.errors import InputError, nearest

from .annotations import Annotations
from .images import UnreadableImage, read_image
from .problems import ProblemLog


class Source(Protocol):
    """A split of a data set. It must survive pickling where workers are spawned.

    annotation_file: a COCO JSON to evaluate against, or None (then annotations.to_coco() is the truth); metric: which figures are its own.
    """

    annotations: Annotations
    annotation_file: Path | None
    metric: Literal["coco", "voc"]

    def read_image(self, index: int) -> np.ndarray:
        """Image `index` as upright RGB uint8 [H, W, 3], the size the annotations state. Raises InputError."""
        ...


@dataclass(kw_only=True)
class FolderSource:
    """Images as files below one folder, named by the annotations."""

    annotations: Annotations
    folder: Path
    metric: Literal["coco", "voc"] = "coco"
    annotation_file: Path | None = None
    exif: bool = True

    def read_image(self, index: int) -> np.ndarray:
        """Image `index`, RGB uint8 [H, W, 3]. Raises UnreadableImage, or InputError if its size is not the annotations'."""
        path = self.folder / self.annotations.file_name(index)
        image = read_image(path, exif=self.exif)
        height, width = self.annotations.sizes[index].tolist()
        if image.shape[:2] != (height, width):
            raise InputError(wrong_size_message(path, stated=(height, width), found=image.shape[:2]))
        return image


def readable(source: Source, indices: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(index, pixels) of those of the images that can be read. The evaluation complains of the others; what only shows leaves them."""
    for index in indices:
        with contextlib.suppress(UnreadableImage):
            yield index, source.read_image(index)


def wrong_size_message(path: Path, *, stated: tuple[int, int], found: tuple[int, ...]) -> str:
    """The words for an image that is not as large as its annotation says; sizes are (height, width)."""
    turned = tuple(reversed(stated)) == tuple(found)
    hint = "; it is turned: try data.exif=false or true, whichever the boxes were drawn on" if turned else "; its boxes would be misplaced"
    return f"{path}: the annotation says {stated[1]}×{stated[0]} pixels (width×height), the file has {found[1]}×{found[0]}{hint}"


def check_file_names(names: list[str], folder: Path, log: ProblemLog, *, file: object, ids: list) -> list[bool]:
    """Which of `names` may be read: inside `folder`, and there. One listing a folder, no file is opened; the rest goes into `log`."""
    listings = {"": _names_in(folder)}
    good = []
    for name, image_id in zip(names, ids, strict=True):
        if name in listings[""] and "\\" not in name:  # as nearly all are: what a folder lists is no way out of it
            good.append(True)
            continue
        path = os.path.normpath(name)  # plain strings: a Path for each of 118,287 names takes as long as reading the JSON
        parent, base = os.path.split(path)
        if os.path.isabs(path) or ".." in name.replace("\\", "/").split("/") or base in ("", ".") or "\0" in name:
            log.add("path_escape", f"file name {name!r} leaves the image folder {folder}; name a file inside it", file=file, image=image_id)
            good.append(False)
            continue
        if parent not in listings:
            listings[parent] = _names_in(folder / parent)
        there = base in listings[parent]
        if not there:
            hint = nearest(base, listings[parent]) if len(listings[parent]) < 10_000 else ""
            log.add(
                "missing_file", f"image file {folder / path} is not there;{hint or ' copy it, or unlist it'}", file=file, image=image_id
            )
        good.append(there)
    return good


def _names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def check_same_classes(train: Source, val: Source) -> None:
    """Refuse to train on one list of classes and evaluate on another. Raises InputError."""
    ours, theirs = train.annotations, val.annotations
    if ours.classes == theirs.classes and ours.category_ids.tolist() == theirs.category_ids.tolist():
        return
    only_train, only_val = sorted(set(ours.classes) - set(theirs.classes)), sorted(set(theirs.classes) - set(ours.classes))
    raise InputError(
        "data.train and data.val do not have the same classes with the same ids: "
        f"only in train {only_train[:5]}, only in val {only_val[:5]}. Give both files the same `categories`"
    )
