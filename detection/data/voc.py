"""PASCAL VOC, read as the devkit lies on disk; several years and sets are joined by naming them: VOC2007/trainval, VOC2012/trainval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import numpy as np

from resbackbone.errors import InputError, nearest

from .annotations import Annotations, assemble
from .box_checks import check_boxes
from .problems import ProblemLog
from .source import FolderSource, check_file_names

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse"),
    *("motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
HOW_TO_GET = (
    "PASCAL VOC is at http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ and …/voc2007/: unpack VOCtrainval_11-May-2012.tar "
    "(and VOCtrainval_06-Nov-2007.tar, VOCtest_06-Nov-2007.tar) into one folder, so that it holds "
    "VOCdevkit/VOC2012/, and set data.root to that folder"
)


def load(
    root: Path | None, split: str | tuple[str, ...], *, masks: bool = False, exif: bool = True, classes: Sequence[str] = VOC_CLASSES
) -> FolderSource:
    """One image set or several joined, checked; root holds VOCdevkit/ (the devkit itself or a year's folder do as well).

    Problems are handled as problems.POLICY says: InputError for the first that training refuses, a warning with counts for the rest.
    """
    source, log = scan(root, split, masks=masks, exif=exif, classes=classes)
    log.settle()
    return source


def scan(
    root: Path | None, split: str | tuple[str, ...], *, masks: bool = False, exif: bool = True, classes: Sequence[str] = VOC_CLASSES
) -> tuple[FolderSource, ProblemLog]:
    """The same without refusing: every problem in one pass, and a source of what is sound."""
    if masks:
        raise InputError("data.kind=voc has no object masks (its XML holds boxes only); set model.mask=false, or convert to COCO JSON")
    if root is None or not root.is_dir():
        raise InputError(f"data.root={root}: there is no such folder. {HOW_TO_GET}")
    splits = (split,) if isinstance(split, str) else split
    listed = [(year, image_id) for one in splits for year, image_id in _image_set(root, one)]
    return scan_images(listed, classes=classes, exif=exif)


def scan_images(
    listed: Sequence[tuple[Path, str]], *, classes: Sequence[str] = VOC_CLASSES, exif: bool = True, need_images: bool = True
) -> tuple[FolderSource, ProblemLog]:
    """`scan` for (year folder, image id) pairs; all year folders lie side by side. need_images: an image without its file is a problem."""
    log = ProblemLog()
    rows, seen = _Rows(classes=tuple(classes)), set()
    for year, image_id in listed:
        if image_id in seen:
            log.add("duplicate_id", f"image {image_id} is listed twice; the image sets to join must not overlap", file=year, image=image_id)
            continue
        seen.add(image_id)
        _read_annotation(year, image_id, rows, log)
    folder = listed[0][0].parent if listed else Path()
    return FolderSource(annotations=_to_arrays(rows, folder, log, need_images), folder=folder, metric="voc", exif=exif), log


def year_folders(path: Path) -> list[Path]:
    """The VOC20xx folders (those with Annotations/) that `path` is, holds, or holds in VOCdevkit/."""
    for place in (path, path / "VOCdevkit"):
        if (place / "Annotations").is_dir():
            return [place]
        found = sorted(folder for folder in place.glob("*") if (folder / "Annotations").is_dir())
        if found:
            return found
    return []


def listed_images(year: Path) -> list[str]:
    """The image ids of all image sets of a year's folder, each once; of every annotation where it has no set."""
    # aeroplane_train.txt and the like repeat the images of train.txt.
    sets = [path for path in sorted((year / "ImageSets" / "Main").glob("*.txt")) if "_" not in path.stem]
    ids = [words[0] for path in sets for line in path.read_text().splitlines() if (words := line.split())]
    return list(dict.fromkeys(ids)) if sets else sorted(path.stem for path in (year / "Annotations").glob("*.xml"))


@dataclass
class _Rows:
    """What is read so far, one list entry an image or a box."""

    classes: tuple[str, ...]
    image_ids: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    image_of_box: list[int] = field(default_factory=list)
    corners: list[list[float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    difficult: list[bool] = field(default_factory=list)
    places: list[dict[str, Any]] = field(default_factory=list)


def _image_set(root: Path, split: str) -> list[tuple[Path, str]]:
    """The (year folder, image id) pairs of `VOC2012/trainval`, or of `trainval` where there is one year only."""
    year_name, _, set_name = split.rpartition("/")
    years = year_folders(root)
    if not years:
        raise InputError(f"data.root={root}: no VOCdevkit with a VOC20xx/Annotations folder in it. {HOW_TO_GET}")
    chosen = [year for year in years if year.name == year_name] if year_name else years
    if len(chosen) != 1:
        names = [year.name for year in years]
        hint = nearest(year_name, names) if year_name else f" say which: {names[0]}/{set_name}"
        raise InputError(
            f"the image set {split!r} names {'no' if year_name else 'more than one'} year of {root};{hint} (there: {', '.join(names)})"
        )
    listing = chosen[0] / "ImageSets" / "Main" / f"{set_name}.txt"
    if not listing.is_file():
        there = sorted(path.stem for path in listing.parent.glob("*.txt"))
        raise InputError(f"{listing}: there is no such image set;{nearest(set_name, there)} it has: {', '.join(there[:10]) or 'none'}")
    lines = (line.split() for line in listing.read_text().splitlines())
    return [(chosen[0], words[0]) for words in lines if words]


def _read_annotation(year: Path, image_id: str, rows: _Rows, log: ProblemLog) -> None:
    """Add one XML's image and boxes to `rows`."""
    path = year / "Annotations" / f"{image_id}.xml"
    if Path(image_id).name != image_id:
        log.add(
            "path_escape", f"the image id {image_id!r} leaves the devkit; an id is a file name without folders", file=year, image=image_id
        )
        return
    root = _parse(path, image_id, log)
    size = None if root is None else _size(root, path, image_id, log)
    if root is None or size is None:
        return
    rows.image_ids.append(image_id)
    rows.names.append(f"{year.name}/JPEGImages/{image_id}.jpg")
    rows.sizes.append(size)
    for number, element in enumerate(root.findall("object"), start=1):
        _read_object(element, {"file": path, "image": image_id, "annotation": number}, rows, log)


def _parse(path: Path, image_id: str, log: ProblemLog) -> Element | None:
    import defusedxml.ElementTree as SafeTree
    from defusedxml import DefusedXmlException

    try:
        return SafeTree.fromstring(path.read_bytes())
    except FileNotFoundError:
        log.add("missing_file", f"the annotation of image {image_id} is not there", file=path, image=image_id)
    except DefusedXmlException:
        log.add("unsafe_xml", "it declares XML entities, which can exhaust memory; an annotation needs none: delete the DOCTYPE", file=path)
    except ParseError as error:
        log.add("not_xml", f"not valid XML ({error}); is the file cut off?", file=path, image=image_id)
    return None


def _size(root: Element, path: Path, image_id: str, log: ProblemLog) -> tuple[int, int] | None:
    """(height, width) as the XML states it; opening every image to measure it would take minutes."""
    texts = [root.findtext(f"size/{name}") for name in ("height", "width")]
    if None in texts:
        log.add("missing_key", "it has no <size> with <width> and <height>", file=path, image=image_id)
        return None
    try:
        height, width = (int(float(text or "")) for text in texts)
    except ValueError:
        height = width = 0
    if height < 1 or width < 1:
        log.add("bad_size", f"its <size> says {texts[1]}×{texts[0]} pixels", file=path, image=image_id)
        return None
    return height, width


def _read_object(element: Element, place: dict[str, Any], rows: _Rows, log: ProblemLog) -> None:
    name = (element.findtext("name") or "").strip()
    texts = [element.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
    if None in texts:
        log.add("missing_key", f"object {place['annotation']} ({name}) has no <bndbox> with xmin, ymin, xmax and ymax", **place)
        return
    try:
        corners = [float(text or "") for text in texts]
    except ValueError:
        log.add("wrong_type", f"the <bndbox> {texts} is not made of numbers", **place)
        return
    if name not in rows.classes:
        log.add("unknown_category", f"the class {name!r} is not one of the {len(rows.classes)};{nearest(name, rows.classes)}", **place)
        return
    if any(value % 1 for value in corners):
        log.add("box_fractional", f"the box {corners} has fractions of pixels", **place)
    if min(corners[:2]) == 0:
        log.add("box_zero_based", f"the box {corners} starts at pixel 0, VOC's first pixel is 1", **place)
    rows.image_of_box.append(len(rows.image_ids) - 1)
    rows.corners.append(corners)
    rows.labels.append(rows.classes.index(name) + 1)
    rows.difficult.append((element.findtext("difficult") or "0").strip() == "1")
    rows.places.append(place)


def _to_arrays(rows: _Rows, folder: Path, log: ProblemLog, need_images: bool) -> Annotations:
    """Pixel numbers from 1, both ends inside, become [x1 - 1, y1 - 1, x2, y2] in continuous pixels."""
    sizes = np.array(rows.sizes, dtype=np.int64).reshape(-1, 2)
    image_of_box = np.array(rows.image_of_box, dtype=np.int64)
    boxes = np.array(rows.corners, dtype=np.float64).reshape(-1, 4) - np.array([1.0, 1.0, 0.0, 0.0])
    boxes, good = check_boxes(
        boxes,
        sizes[image_of_box],
        log,
        where=lambda b: rows.places[b],
        describe=lambda b: f"box [xmin, ymin, xmax, ymax] = {rows.corners[b]}",
    )
    annotations = assemble(
        classes=rows.classes,
        category_ids=range(1, len(rows.classes) + 1),
        image_ids=rows.image_ids,
        file_names=rows.names,
        sizes=sizes,
        image_of_box=image_of_box[good],
        boxes=boxes[good],
        labels=np.array(rows.labels, dtype=np.int64)[good],
        ignore=np.array(rows.difficult, dtype=bool)[good],
        areas=(boxes[good, 2:] - boxes[good, :2]).prod(axis=1),
    )
    if not need_images:
        return annotations
    there = check_file_names(rows.names, folder, log, file=folder, ids=rows.image_ids)
    return annotations if all(there) else annotations.select(np.flatnonzero(there))
