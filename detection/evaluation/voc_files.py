"""Scoring a VOC detections file against a devkit: no images, no model."""

from __future__ import annotations

from pathlib import Path

from detection.data.source import Source
from detection.data.voc import scan_images, year_folders
from detection.evaluation.coco import Engine
from detection.evaluation.evaluate import voc_figures
from resbackbone.errors import InputError, nearest


def evaluate_voc_file(
    devkit: Path, image_set: str | None, detections: Path, *, iou: float = 0.5, engine: Engine = "auto"
) -> dict[str, float]:
    """The figures that `evaluate_source` gives for a detector, for the rows of a file.

    devkit: a folder with VOCdevkit/, the devkit, a VOC20xx folder, or any folder with Annotations/; image_set: `VOC2012/test`,
    `test`, a text file of image ids, or None for every annotation there is. Raises InputError.
    """
    return voc_figures(annotated_images(devkit, image_set), detections, iou=iou, engine=engine)


def annotated_images(devkit: Path, image_set: str | None) -> Source:
    """The annotations of an image set; its images need not be there. Raises InputError."""
    years = year_folders(devkit) if devkit.is_dir() else []
    if not years:
        raise InputError(f"--devkit {devkit}: there is no Annotations/ here, in a VOC20xx/ or in VOCdevkit/VOC20xx/")
    if image_set is None:
        listed = [(year, path.stem) for year in years for path in sorted((year / "Annotations").glob("*.xml"))]
    else:
        year, listing = _find_listing(devkit, years, image_set)
        listed = [(year, image_id) for image_id in _ids_of(listing)]
    if not listed:
        raise InputError(f"--image-set {image_set} of --devkit {devkit} lists no image")
    source, log = scan_images(listed, need_images=False)
    log.settle()
    return source


def _find_listing(devkit: Path, years: list[Path], image_set: str) -> tuple[Path, Path]:
    """(year folder, text file) of an image set: in ImageSets/Main, beside Annotations/, in the devkit folder, or a path of its own."""
    year_name, _, set_name = image_set.removesuffix(".txt").rpartition("/")
    chosen = [year for year in years if year.name == year_name] if year_name else years
    places = [(year, year / place / f"{set_name}.txt") for year in chosen for place in ("ImageSets/Main", ".")]
    found = [place for place in places if place[1].is_file()]
    if not found:
        loose = [path for path in (Path(image_set), devkit / f"{image_set.removesuffix('.txt')}.txt") if path.is_file()]
        found = [(_year_of(path, years), path) for path in loose[:1]]
    if len({listing for _, listing in found}) != 1:
        known = sorted({f"{year.name}/{path.stem}" for year in years for path in (year / "ImageSets" / "Main").glob("*.txt")})
        hint = nearest(image_set, known) or f" there are: {', '.join(known[:8]) or 'none; leave --image-set out to take every annotation'}"
        raise InputError(f"--image-set {image_set}: {'more than' if found else 'not'} one image set of this name in {devkit};{hint}")
    return found[0]


def _year_of(listing: Path, years: list[Path]) -> Path:
    """Whose annotations a text file from anywhere means: the only year there is, or the one whose folder has its first image."""
    first = next(iter(_ids_of(listing)), "")
    having = [year for year in years if (year / "Annotations" / f"{first}.xml").is_file()]
    return having[0] if having else years[0]


def _ids_of(listing: Path) -> list[str]:
    try:
        return [words[0] for line in listing.read_text(encoding="utf-8").splitlines() if (words := line.split())]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--image-set {listing}: cannot be read as a list of image ids ({error})") from None
