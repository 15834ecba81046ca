"""Several splits as one data set, as the paper joins COCO's train and val (He et al. 2015, appendix B)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from resbackbone.errors import InputError

from .annotations import Annotations, assemble
from .masks import PackedMasks
from .problems import ProblemLog
from .source import FolderSource


def join_sources(parts: Sequence[FolderSource], root: Path, log: ProblemLog) -> FolderSource:
    """The images of all `parts` in order, their file names counted from `root`; an image that is in two of them goes into `log`.

    There is no one annotation file then; evaluation takes the joined annotations as the truth. Raises InputError where the parts
    don't have the same classes with the same ids.
    """
    first = parts[0].annotations
    for part in parts[1:]:
        _check_classes(first, part.annotations, parts[0].annotation_file, part.annotation_file)
    image_ids = np.concatenate([part.annotations.image_ids for part in parts])
    is_first = _note_overlap(image_ids, log, [part.annotation_file for part in parts for _ in range(len(part.annotations))])
    joined = _concatenate([part.annotations for part in parts], [os.path.relpath(part.folder, root) for part in parts], image_ids)
    kept = joined if is_first.all() else joined.select(np.flatnonzero(is_first))
    return FolderSource(annotations=kept, folder=root, metric=parts[0].metric, exif=parts[0].exif)


def _concatenate(parts: Sequence[Annotations], folders: Sequence[str], image_ids: np.ndarray) -> Annotations:
    starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
    image_of_box = [start + np.repeat(np.arange(len(part)), np.diff(part.offsets)) for start, part in zip(starts, parts, strict=True)]
    masks = [part.masks for part in parts if part.masks is not None]
    return assemble(
        classes=parts[0].classes,
        category_ids=parts[0].category_ids.tolist(),
        image_ids=image_ids.tolist(),
        file_names=[f"{folder}/{part.file_name(index)}" for folder, part in zip(folders, parts, strict=True) for index in range(len(part))],
        sizes=np.concatenate([part.sizes for part in parts]),
        image_of_box=np.concatenate(image_of_box),
        boxes=np.concatenate([part.boxes for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        ignore=np.concatenate([part.ignore for part in parts]),
        areas=np.concatenate([part.areas for part in parts]),
        masks=PackedMasks.concatenate(masks) if len(masks) == len(parts) else None,
    )


def _check_classes(first: Annotations, other: Annotations, first_file: Path | None, other_file: Path | None) -> None:
    if first.classes == other.classes and first.category_ids.tolist() == other.category_ids.tolist():
        return
    only_first, only_other = sorted(set(first.classes) - set(other.classes)), sorted(set(other.classes) - set(first.classes))
    raise InputError(
        f"{first_file} and {other_file} can't be joined: their `categories` differ (only in the first {only_first[:5]}, only in the second "
        f"{only_other[:5]}); give both files the same names with the same ids"
    )


def _note_overlap(image_ids: np.ndarray, log: ProblemLog, files: Sequence[Path | None]) -> np.ndarray:
    """bool per image: whether it is the first with its id; the others are noted."""
    _, first = np.unique(image_ids, return_index=True)
    is_first = np.zeros(len(image_ids), dtype=bool)
    is_first[first] = True
    for index in np.flatnonzero(~is_first).tolist():
        number = image_ids[index].item()
        log.add("duplicate_id", f"image {number} is in two of the splits to join; they must not overlap", file=files[index], image=number)
    return is_first
