"""Everything a report shows, as one JSON object in one HTML file that needs nothing else. Its own text, style and script are beside."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from detection.evaluation.bootstrap import (
    LEAST_IMAGES,
    Interval,
    Verdicts,
    affordable_draws,
    class_aps,
    compare_aps,
    draws,
    images_with_objects,
    verdicts_of,
)
from detection.evaluation.coco import CocoEvaluation, class_names
from detection.evaluation.coco_matching import IOUS, CocoArrays, coco_arrays
from detection.evaluation.report.curves import SIZE_BORDERS, best_threshold, confusions, precision_recall, size_curve
from detection.evaluation.report.errors import KINDS, RIGHT, Errors, find_errors
from detection.evaluation.report.images import (
    MOST_BYTES,
    MOST_IMAGES,
    Pictures,
    Tally,
    choose_images,
    describe_found,
    describe_image,
    extent,
    picture_of,
    slider_of,
    tally,
)
from resbackbone.runtime.atomic import write_atomically

RESAMPLES = 1000
_PLACEHOLDERS = {"/*STYLE*/": "page.css", "/*SCRIPT*/": "page.js"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A detector's detections, judged. figures: what the tools print, by name; COCO's are those of `evaluation`.

    verdicts: behind figures that aren't COCO's (VOC's means), for their intervals; COCO's are made of `evaluation`. iou: VOC's threshold.
    """

    name: str
    evaluation: CocoEvaluation
    figures: dict[str, float]
    verdicts: dict[str, Verdicts] = field(default_factory=dict)
    iou: float = 0.5


@dataclass(frozen=True, kw_only=True)
class _Analysis:
    run: Run
    arrays: CocoArrays
    errors: Errors
    threshold: float
    counts: Tally
    drawn: dict[str, np.ndarray]  # figure → (E, 1 + draws) APs of each class (and IoU), in the data set and in draws of its images
    spread: np.ndarray  # (K,) in how many images each class has objects

    @property
    def has_intervals(self) -> bool:
        """Whether objects lie in two images or more: every draw of one image is that image."""
        return len(np.unique(self.arrays.object_image[~self.arrays.object_crowd])) > 1


def write_report(folder: Path, run: Run, *, pictures: Pictures, other: Run | None = None, most_images: int = MOST_IMAGES) -> Path:
    """Write folder/index.html; returns its path. other: a second run on the same images, shown beside the first."""
    if other is not None and other.name == run.name:
        run, other = replace(run, name=f"{run.name} (first)"), replace(other, name=f"{other.name} (second)")
    analyses = _analyse_all([one for one in (run, other) if one is not None])
    path = folder / "index.html"
    write_atomically(path, page(report_data(analyses, pictures, most_images=most_images)).encode(errors="replace"))  # lone surrogates
    return path


def _analyse_all(runs: list[Run]) -> list[_Analysis]:
    """With the same draws for every figure and every run, so that runs are compared on the same images."""
    all_arrays = [coco_arrays(run.evaluation.truth, run.evaluation.numbers) for run in runs]
    coco = [verdicts_of(arrays) for arrays in all_arrays]
    resamples = min(affordable_draws(verdicts, most=RESAMPLES) for verdicts in coco)
    times = draws(len(all_arrays[0].image_ids), resamples=resamples)
    return [_analyse(*one, times) for one in zip(runs, all_arrays, coco, strict=True)]


def _analyse(run: Run, arrays: CocoArrays, coco: Verdicts, times: np.ndarray) -> _Analysis:
    errors = find_errors(arrays)
    threshold = best_threshold(arrays, errors)
    counts = tally(arrays, errors, threshold=threshold)
    assert IOUS[0] == 0.5
    aps = class_aps(coco, times)
    drawn = {name: class_aps(verdicts, times) for name, verdicts in run.verdicts.items()}
    drawn |= {"AP": aps, "AP50": aps[: len(arrays.category_ids)]}
    spread = images_with_objects(coco)[: len(arrays.category_ids)]
    return _Analysis(run=run, arrays=arrays, errors=errors, threshold=threshold, counts=counts, drawn=drawn, spread=spread)


def report_data(analyses: list[_Analysis], pictures: Pictures, *, most_images: int) -> dict[str, Any]:
    """What the page's script reads, JSON-ready."""
    first = analyses[0]
    arrays, slider = first.arrays, slider_of(one.threshold for one in analyses)
    return {
        "classes": class_names(first.run.evaluation.truth),
        "kinds": KINDS,
        "sizeBorders": SIZE_BORDERS[:-1],
        "objects": _object_counts(arrays),
        "crowds": int(arrays.object_crowd.sum()),
        "imageCount": len(arrays.image_ids),
        "runs": [_run_data(one) for one in analyses],
        "leastScore": slider[0],
        "digits": slider[1],
        "resamples": first.drawn["AP"].shape[1] - 1 if first.has_intervals else 0,
        "leastImages": LEAST_IMAGES,
        "comparison": _comparison(*analyses) if len(analyses) == 2 else None,
        "images": _image_data(analyses, pictures, most_images, slider),
    }


def page(data: dict[str, Any]) -> str:
    """The whole file. Text of data sets gets into it as JSON in which no tag can open or close, and as escaped HTML in the title."""
    here = files("detection.evaluation.report")
    text = (here / "page.html").read_text(encoding="utf-8")
    for mark, name in _PLACEHOLDERS.items():
        text = text.replace(mark, (here / name).read_text(encoding="utf-8"))
    title = " and ".join(run["name"] for run in data["runs"])
    # Last, as what comes from outside may hold anything, such as the marks.
    before, middle, after = text.replace("<!--TITLE-->", "\0").replace("<!--DATA-->", "\0").split("\0")
    return before + html.escape(title) + middle + script_safe(data) + after


def script_safe(data: Any) -> str:
    """JSON for a <script> element, with "<", ">" and "&" as escapes; NaN becomes null."""
    text = json.dumps(_without_nan(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _run_data(one: _Analysis) -> dict[str, Any]:
    arrays, errors, classes = one.arrays, one.errors, len(one.arrays.category_ids)
    names, figures = class_names(one.run.evaluation.truth), one.run.figures
    is_sure, is_right = arrays.score >= one.threshold, errors.kind == RIGHT
    sizes, _ = size_curve(arrays)
    drawn = {name: aps for name, aps in one.drawn.items() if figures.get(name, -1) >= 0 and one.has_intervals}
    return {
        "name": one.run.name,
        "figures": {name: value for name, value in figures.items() if "/" not in name.removeprefix("segm/")},
        "intervals": {name: _interval(compare_aps(aps, aps).first) for name, aps in drawn.items()},
        "iou": one.run.iou,
        "perClass": {kind: [figures.get(f"{kind}/{name}") for name in names] for kind in ("AP", "VOC", "VOC_11_point", "segm/AP")},
        "threshold": one.threshold,
        "detections": len(one.run.evaluation.numbers),
        "sure": np.bincount(arrays.label[is_sure & (is_right | (errors.kind >= 0))], minlength=classes).tolist(),
        "right": np.bincount(arrays.label[is_sure & is_right], minlength=classes).tolist(),
        "ap50": errors.ap.tolist(),
        "cost": errors.cost.tolist(),
        "count": errors.counts(arrays.label, arrays.object_label, classes).tolist(),
        "curves": precision_recall(one.run.evaluation.precision).transpose(0, 2, 1).round(4).tolist(),
        "sizes": sizes.tolist(),
        "confusion": [[*pair, times] for pair, times in sorted(confusions(arrays, errors, threshold=one.threshold).items())],
    }


def _object_counts(arrays: CocoArrays) -> list[list[int]]:
    """(S + 1, K): objects of each size, then of all sizes."""
    _, counts = size_curve(arrays)
    total = np.bincount(arrays.object_label[~arrays.object_crowd], minlength=len(arrays.category_ids))
    return [*counts.tolist(), total.tolist()]


def _comparison(first: _Analysis, second: _Analysis) -> dict[str, Any]:
    """Intervals of the differences, second - first: of figures both have, if objects lie in enough images, and of each class's AP50.

    A class without objects has null, and one whose objects lie in fewer than LEAST_IMAGES images no ends: [difference, null, null].
    """
    one, other = first.drawn, second.drawn
    classes: list[list[float | None] | None] = []
    for spread, *aps in zip(first.spread.tolist(), one["AP50"], other["AP50"], strict=True):
        difference = compare_aps(aps[0][None], aps[1][None]).difference
        classes.append(None if not spread else [difference.value, None, None] if spread < LEAST_IMAGES else _interval(difference))
    names = [name for name in one if name in other and first.has_intervals]
    return {"overall": {name: _interval(compare_aps(one[name], other[name]).difference) for name in names}, "classes": classes}


def _interval(found: Interval) -> list[float | None]:
    return [found.value, found.low, found.high]


def _image_data(analyses: list[_Analysis], pictures: Pictures, most: int, slider: tuple[float, int]) -> list[dict[str, Any]]:
    first, images, size = analyses[0], [], 0
    other = analyses[1].counts if len(analyses) == 2 else None
    for position in choose_images(first.arrays, first.errors, first.counts, other=other, most=most).tolist():
        image_id = int(first.arrays.image_ids[position])
        height, width = pictures.sizes.get(image_id, (0, 0))
        if min(height, width) < 1:
            height, width = extent(first.arrays, position)
        source, note = picture_of(pictures, image_id) if size < MOST_BYTES else ("", "left out to keep the page small")
        size += len(source)
        images.append(
            {
                "name": pictures.names.get(image_id) or str(image_id),
                "size": [width, height],
                "source": source,
                "note": note,
                **describe_image(first.arrays, position),
                "runs": [describe_found(one.arrays, one.errors, one.counts, position, slider=slider) for one in analyses],
            }
        )
    return images


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    return [_without_nan(one) for one in value] if isinstance(value, list | tuple) else value
