"""Scoring a VOC detections file against a devkit: no images, no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detection.data.source import Source
from detection.data.voc import VOC_CLASSES, scan_images, year_folders
from detection.evaluation.coco import evaluate_coco
from detection.evaluation.evaluate import voc_figures
from detection.evaluation.results import coco_image_ids, read_rows
from resbackbone.errors import InputError, nearest


def evaluate_voc_file(devkit: Path, image_set: str, detections: Path, *, engine: str = "auto") -> dict[str, float]:
    """The figures that `evaluate_source` gives for a detector, for the rows of a file.

    devkit: a folder with VOCdevkit/, the devkit, a VOC20xx folder, or any folder with Annotations/; image_set: `VOC2012/test`,
    `test`, or a text file of image ids. Raises InputError.
    """
    source = annotated_images(devkit, image_set)
    rows = read_rows(detections, ("image_id", "category", "score", "bbox"))
    figures = voc_figures(source, rows)
    return figures | evaluate_coco(source.annotations.to_coco(), _as_coco(rows, source), engine=engine)


def annotated_images(devkit: Path, image_set: str) -> Source:
    """The annotations of an image set; its images need not be there."""
    years = year_folders(devkit) if devkit.is_dir() else []
    if not years:
        raise InputError(f"--devkit {devkit}: no Annotations/ folder here, in a VOC20xx/ or in VOCdevkit/VOC20xx/")
    year_name, _, set_name = image_set.removesuffix(".txt").rpartition("/")
    of_name = [year for year in years if year.name == year_name] or years
    places = [Path(image_set), *(year / place / f"{set_name}.txt" for year in of_name for place in ("ImageSets/Main", "."))]
    listing = next((place for place in places if place.is_file()), None)
    if listing is None or (len(of_name) > 1 and listing != Path(image_set)):
        known = sorted({f"{year.name}/{path.stem}" for year in years for path in (year / "ImageSets/Main").glob("*.txt")})
        hint = nearest(image_set, known) or f" there are: {', '.join(known[:8]) or 'none'}; a text file of image ids does as well"
        raise InputError(f"--image-set {image_set}: there is no one image set of this name in {devkit};{hint}")
    year = next((year for year in of_name if year in listing.parents), of_name[0])
    ids = [words[0] for line in listing.read_text().splitlines() if (words := line.split())]
    source, log = scan_images([(year, image_id) for image_id in ids], need_images=False)
    log.settle()
    return source


def _as_coco(rows: list[dict[str, Any]], source: Source) -> list[dict[str, Any]]:
    number = dict(zip((str(name) for name in source.annotations.image_ids.tolist()), coco_image_ids(source), strict=True))
    category = {name: VOC_CLASSES.index(name) + 1 for name in VOC_CLASSES}
    return [
        {
            "image_id": number[str(row["image_id"])],
            "category_id": category[row["category"]],
            "score": row["score"],
            "bbox": [row["bbox"][0] - 1, row["bbox"][1] - 1, row["bbox"][2] - row["bbox"][0] + 1, row["bbox"][3] - row["bbox"][1] + 1],
        }
        for row in rows
    ]
