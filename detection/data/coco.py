"""COCO JSON: `annotations/instances_{split}.json` and a folder of images per split, or any such JSON beside any image folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from resbackbone.errors import InputError, nearest

from .annotations import Annotations, assemble
from .box_checks import check_boxes
from .coco_json import CocoFile, CocoFileWithMasks, CocoObjectWithMask, read_coco_file, read_segmentation
from .join import join_sources
from .masks import FARTHEST_PX, PackedMasks, compress_counts
from .problems import ProblemLog
from .source import FolderSource, check_file_names

HOW_TO_GET = (
    "COCO 2017 is at https://cocodataset.org/#download: unpack train2017.zip, val2017.zip and annotations_trainval2017.zip into one "
    "folder, so that it holds train2017/, val2017/ and annotations/instances_train2017.json, and set data.root to that folder"
)

NO_SEGMENTATION = (b"", b"[]", b"null")


def load(
    root: Path | None, split: str | tuple[str, ...], *, masks: bool = False, images: str | None = None, exif: bool = True
) -> FolderSource:
    """One split, or several joined, checked. split: `train2017`, or the path of a JSON below root; images: the image folder below root.

    Problems are handled as problems.POLICY says: InputError for the first that training refuses, a warning with counts for the rest.
    """
    source, log = scan(root, split, masks=masks, images=images, exif=exif)
    log.settle()
    assert source is not None, "a file without a refused problem has records"
    return source


def scan(
    root: Path | None, split: str | tuple[str, ...], *, masks: bool = False, images: str | None = None, exif: bool = True
) -> tuple[FolderSource | None, ProblemLog]:
    """The same without refusing: every problem in one pass, and a source of what is sound (None where nothing could be read)."""
    places = [locate(root, one, images=images) for one in ((split,) if isinstance(split, str) else split)]
    scanned = [scan_files(json_path, folder, masks=masks, exif=exif) for json_path, folder in places]
    if len(scanned) == 1:
        return scanned[0]
    log = ProblemLog([problem for _, one in scanned for problem in one.found])
    parts = [source for source, _ in scanned if source is not None]
    assert root is not None, "locate refuses None"
    return (join_sources(parts, root, log) if len(parts) == len(scanned) else None), log


def scan_files(json_path: Path, folder: Path, *, masks: bool | None = False, exif: bool = True) -> tuple[FolderSource | None, ProblemLog]:
    """`scan` for a JSON and an image folder anywhere. masks: None reads them where any object has one: a file of boxes alone is sound."""
    log = ProblemLog()
    content = read_coco_file(json_path, log, masks=masks is not False)
    if content is None:
        return None, log
    if masks is None:
        masks = any(bytes(one.segmentation) not in NO_SEGMENTATION for one in content.annotations if isinstance(one, CocoObjectWithMask))
    annotations = _to_arrays(content, json_path, folder, log, masks=masks)
    return FolderSource(annotations=annotations, folder=folder, annotation_file=json_path, exif=exif), log


def locate(root: Path | None, split: str, *, images: str | None = None) -> tuple[Path, Path]:
    """(JSON, image folder) of a split. Raises InputError that says what is not there and how to get COCO."""
    if root is None or not root.is_dir():
        raise InputError(f"data.root={root}: there is no such folder. {HOW_TO_GET}")
    named = split.endswith(".json")
    json_path = root / split if named else root / "annotations" / f"instances_{split}.json"
    folder = root / images if images is not None else (json_path.parent if named else root / split)
    if not json_path.is_file():
        there = sorted(path.name for path in json_path.parent.glob("*.json")) if json_path.parent.is_dir() else []
        hint = nearest(json_path.name, there) or (f" {json_path.parent} has: {', '.join(there[:8])}." if there else "")
        raise InputError(f"{json_path}: there is no such annotation file;{hint} {HOW_TO_GET}")
    if not folder.is_dir():
        raise InputError(
            f"{folder}: there is no such image folder; unpack the images there, or name another below data.root with data.images=FOLDER"
        )
    return json_path, folder


def _to_arrays(content: CocoFile | CocoFileWithMasks, path: Path, folder: Path, log: ProblemLog, *, masks: bool) -> Annotations:
    categories = sorted(content.categories, key=lambda category: category.id)
    category_ids = np.array([category.id for category in categories], dtype=np.int64)
    _note_duplicates(category_ids, "category", path, log)
    image_ids, file_names, sizes = _images(content, path, folder, log)
    objects = content.annotations
    wanted = _column(objects, "image_id", np.int64)
    image_of_box, known_image = _lookup(wanted, image_ids)
    labels, known_category = _lookup(_column(objects, "category_id", np.int64), category_ids)
    _note_unknown(content, wanted, known_category, path, log)
    known = known_image & known_category
    boxes = np.fromiter(chain.from_iterable(map(attrgetter("bbox"), objects)), np.float64, 4 * len(objects)).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    rows = np.flatnonzero(known)
    clipped, good = check_boxes(
        boxes[rows],
        sizes[image_of_box[rows]],
        log,
        where=lambda b: {"file": path, "image": objects[rows[b]].image_id, "annotation": objects[rows[b]].id},
        describe=lambda b: f"box [x, y, width, height] = {list(objects[rows[b]].bbox)}",
    )
    rows, clipped = rows[good], clipped[good]
    packed = _pack_masks(objects, rows, sizes[image_of_box[rows]], path, log) if masks else None
    return assemble(
        classes=[category.name for category in categories],
        category_ids=category_ids.tolist(),
        image_ids=image_ids.tolist(),
        file_names=file_names,
        sizes=sizes,
        image_of_box=image_of_box[rows],
        boxes=clipped,
        labels=labels[rows] + 1,
        ignore=_column(objects, "iscrowd", np.bool_)[rows],
        areas=_areas(objects, rows, clipped),
        masks=packed,
    )


def _column(records: Sequence[Any], name: str, dtype: type) -> np.ndarray:
    """One field of every record; straight into the array, since a list on the way costs as much again."""
    return np.fromiter(map(attrgetter(name), records), dtype, len(records))


def _areas(objects: Sequence[Any], rows: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """float32 [B]: the stated areas of `objects[rows]`, those of their boxes (xyxy [B, 4]) where none is stated."""
    stated = [record.area for record in objects]
    missing = np.array([area is None for area in stated], dtype=bool)[rows] if None in stated else np.zeros(len(rows), dtype=bool)
    areas = np.array(stated, dtype=np.float64)[rows]  # None becomes NaN
    areas[missing] = (boxes[missing, 2:] - boxes[missing, :2]).prod(axis=1)
    return areas.astype(np.float32)


def _images(content: CocoFile | CocoFileWithMasks, path: Path, folder: Path, log: ProblemLog) -> tuple[np.ndarray, list[str], np.ndarray]:
    """(ids, file names, sizes [I, 2] as (height, width)) of the images that are sound."""
    all_ids = _column(content.images, "id", np.int64)
    first = _note_duplicates(all_ids, "image", path, log)
    records = [image for image, keep in zip(content.images, first, strict=True) if keep]
    sized = []
    for image in records:
        if image.height < 1 or image.width < 1:
            log.add("bad_size", f"its size is stated as {image.width}×{image.height} pixels", file=path, image=image.id)
        else:
            sized.append(image)
    there = check_file_names([image.file_name for image in sized], folder, log, file=path, ids=[image.id for image in sized])
    records = [image for image, keep in zip(sized, there, strict=True) if keep]
    sizes = np.stack([_column(records, side, np.int64) for side in ("height", "width")], axis=1)
    return _column(records, "id", np.int64), [image.file_name for image in records], sizes


def _lookup(wanted: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position in `ids` of each wanted id (0 where it has none), and whether it has one."""
    if not len(ids):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    order = np.argsort(ids, kind="stable")
    places = np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)
    found = order[places]
    return found, ids[found] == wanted


def _note_duplicates(ids: np.ndarray, what: str, path: Path, log: ProblemLog) -> np.ndarray:
    """bool per id: whether it is the first with that number; the others are noted."""
    _, first = np.unique(ids, return_index=True)
    is_first = np.zeros(len(ids), dtype=bool)
    is_first[first] = True
    for number in ids[~is_first].tolist():
        place = {what: number} if what in ("image", "annotation") else {}
        log.add("duplicate_id", f"two entries of kind {what} have the id {number}; number them apart", file=path, **place)
    return is_first


def _note_unknown(
    content: CocoFile | CocoFileWithMasks, image_ids: np.ndarray, known_category: np.ndarray, path: Path, log: ProblemLog
) -> None:
    """Annotations that point at images or categories which the file does not list."""
    _note_duplicates(_column(content.annotations, "id", np.int64), "annotation", path, log)
    _, known_image = _lookup(image_ids, _column(content.images, "id", np.int64))
    names = [f"{category.id} ({category.name})" for category in content.categories]
    for row in np.flatnonzero(~(known_image & known_category)).tolist():
        record = content.annotations[row]
        if content.images and not known_image[row]:
            log.add("unknown_image", f"image_id {record.image_id} is not among `images`", file=path, annotation=record.id)
        if names and not known_category[row]:
            words = f"category_id {record.category_id} is not among `categories`: {', '.join(names[:6])}{' …' if len(names) > 6 else ''}"
            log.add("unknown_category", words, file=path, image=record.image_id, annotation=record.id)


def _pack_masks(objects: list[Any], rows: np.ndarray, sizes: np.ndarray, path: Path, log: ProblemLog) -> PackedMasks:
    """The segmentations of the kept boxes, checked, uncompressed run lengths compressed; one at a time, COCO's would fill the memory."""

    def note(row: int, words: str) -> None:
        record = objects[row]
        log.add("bad_mask", f"its segmentation cannot be used: {words}", file=path, image=record.image_id, annotation=record.id)

    def checked() -> Iterator[Any]:
        for row, (height, width) in zip(rows.tolist(), sizes.tolist(), strict=True):
            try:
                yield _segmentation(objects[row], height, width)
            except (ValueError, OverflowError, RecursionError) as error:
                note(row, str(error))
                yield []

    packed = PackedMasks.pack(checked())
    bad_codes, far = packed.broken(sizes.prod(axis=1))
    for box in bad_codes.tolist():
        height, width = sizes[box].tolist()
        note(rows[box], f"its counts are no run-length code of {height} × {width} pixels; encode the mask anew or delete the annotation")
    for box in far.tolist():
        note(rows[box], f"a coordinate of its polygons is beyond ±{FARTHEST_PX:,.0f} pixels; correct it or delete the annotation")
    return packed.without(np.concatenate([bad_codes, far])) if len(bad_codes) + len(far) else packed


def _segmentation(record: CocoObjectWithMask, height: int, width: int) -> list[list[float]] | dict[str, Any]:
    """One segmentation as `PackedMasks.pack` takes it without fail. Raises ValueError saying what is wrong.

    How far the points lie, and what compressed counts mean, is checked for all at once by `PackedMasks.broken`: one by one takes longer.
    """
    value = read_segmentation(record)
    if isinstance(value, list):
        # Fewer than three corners enclose nothing; COCO's tools take four numbers for a box.
        polygons = [polygon for polygon in value if len(polygon) >= 6 and len(polygon) % 2 == 0]
        if not polygons:
            raise ValueError("it has no polygon of three corners or more, and no run-length code")
        return polygons
    counts, (stated_height, stated_width) = value.counts, value.size
    if (stated_height, stated_width) != (height, width):
        stated = f"[{stated_height:.15g}, {stated_width:.15g}]"
        raise ValueError(f"the run-length code is for size {stated}, the image has [{height}, {width}] (height, width)")
    if isinstance(counts, list):
        wrong = next((run for run in counts if run < 0 or run % 1), None)
        if wrong is not None:
            raise ValueError(f"{wrong:.15g} is among its run lengths; they are whole numbers of pixels from 0 on")
        if sum(counts) != height * width:
            raise ValueError(f"its run lengths sum to {sum(counts):.15g}, not to the image's {height * width} pixels")
        return {"counts": compress_counts([int(run) for run in counts], height, width)}
    if not counts or not counts.isascii():
        raise ValueError(f"its run-length code has {'other than ASCII characters' if counts else 'nothing'} in counts")
    return {"counts": counts}
