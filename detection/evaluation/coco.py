"""COCO's figures for boxes, masks and keypoints: pycocotools is the reference, hotcoco the fast engine with the same figures."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detection.evaluation.coco_truth import KEYPOINTS, IouType, check_run_lengths, read_coco_truth, segmentation_of
from detection.evaluation.rows import BoxRow, CocoRow, KeypointRow, MaskRow, check_finite, check_known, name_of, read_rows
from resbackbone.errors import InputError, nearest

Engine = Literal["auto", "pycocotools", "hotcoco"]
IOU_TYPES = ("bbox", "segm", "keypoints")
ENGINES = ("auto", "pycocotools", "hotcoco")
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KEYPOINT_NAMES = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
_ROWS: dict[str, type[CocoRow]] = {"bbox": BoxRow, "segm": MaskRow, "keypoints": KeypointRow}


@dataclass(frozen=True, kw_only=True)
class CocoEvaluation:
    """What judging one set of detections gives. T IoU thresholds, R recalls, K classes in the order of their ids, A areas, M maxDets.

    truth: as `read_coco_truth` gives it; numbers: float64 (N, 7), a row a box: image id, x, y, width, height, score, category id;
    figures: see `evaluate_coco`; precision: (T, R, K, A, M), -1 where a class has no object; area 0 is all, the last maxDets 100.
    """

    truth: dict[str, Any]
    numbers: np.ndarray
    figures: dict[str, float]
    precision: np.ndarray


def evaluate_coco(
    ground_truth: Path | dict[str, Any],
    detections: Path | list[dict[str, Any]],
    *,
    iou_type: IouType = "bbox",
    engine: Engine = "auto",
    image_ids: Collection[int] | None = None,
) -> dict[str, float]:
    """The figures COCO prints, by name, -1 where there is nothing to judge, and `AP/<class>` for each class.

    ground_truth: COCO JSON; every image in it counts, or those of `image_ids`. detections: COCO's results format; of masks the areas
    are the masks' own even where rows have a bbox. Raises InputError for what is malformed, naming the row.
    """
    return evaluate_coco_fully(ground_truth, detections, iou_type=iou_type, engine=engine, image_ids=image_ids).figures


def evaluate_coco_fully(
    ground_truth: Path | dict[str, Any],
    detections: Path | list[dict[str, Any]],
    *,
    iou_type: IouType = "bbox",
    engine: Engine = "auto",
    image_ids: Collection[int] | None = None,
) -> CocoEvaluation:
    """The same with what the figures were made of."""
    _check_choice(iou_type, IOU_TYPES, "iou_type")
    _check_choice(engine, ENGINES, "engine")
    truth = read_coco_truth(ground_truth, iou_type, image_ids=image_ids)
    images = [one["id"] for one in truth["images"]]
    rows = read_rows(detections, _ROWS[iou_type])
    where = name_of(detections, "detections")
    numbers = _checked_numbers(rows, truth, images, where)
    compute = _ENGINES[_chosen(engine, truth)]
    stats, precision = compute(truth, rows, numbers, iou_type)
    names = KEYPOINT_NAMES if iou_type == "keypoints" else NAMES
    figures = {name: float(value) for name, value in zip(names, stats, strict=True)} | _per_class(truth, precision)
    return CocoEvaluation(truth=truth, numbers=numbers, figures=figures, precision=precision)


_ALL, _SIZES = ("all",) * 3, ("small", "medium", "large")
_LINES = [
    *zip(NAMES, ("0.50:0.95", "0.50", "0.75", *("0.50:0.95",) * 9), (*_ALL, *_SIZES) * 2, (*(100,) * 6, 1, 10, *(100,) * 4), strict=True)
]
_KEYPOINT_LINES = [
    *zip(KEYPOINT_NAMES, ("0.50:0.95", "0.50", "0.75", *("0.50:0.95",) * 2) * 2, (*_ALL, *_SIZES[1:]) * 2, (20,) * 10, strict=True)
]


def format_coco(figures: dict[str, float], *, iou_type: IouType = "bbox", prefix: str = "") -> str:
    """The lines COCO's own tool prints, from figures named `prefix` + AP and so on."""
    lines = []
    for name, iou, area, most in _KEYPOINT_LINES if iou_type == "keypoints" else _LINES:
        title, kind = ("Average Precision", "(AP)") if name.startswith("AP") else ("Average Recall", "(AR)")
        lines.append(f" {title:<18} {kind} @[ IoU={iou:<9} | area={area:>6s} | maxDets={most:>3d} ] = {figures[prefix + name]:0.3f}")
    return "\n".join(lines)


def format_run(figures: dict[str, float]) -> str:
    """What `evaluate_source` found, as COCO prints it: boxes, and below them masks where there are any."""
    if "segm/AP" not in figures:
        return format_coco(figures)
    parts = [(kind, format_coco(figures, prefix=prefix)) for kind, prefix in (("bbox", ""), ("segm", "segm/"))]
    return "\n".join(f"Evaluate annotation type *{kind}*\n{lines}" for kind, lines in parts)


def _check_choice(value: str, known: tuple[str, ...], what: str) -> None:
    if value not in known:
        raise InputError(f"{what}={value} is not known;{nearest(value, known)} choose from {', '.join(known)}")


def _chosen(engine: Engine, truth: dict[str, Any]) -> str:
    """`auto` takes the fast engine wherever its figures are proven to be the reference's, by test_eval_engines.py."""
    odd = _odd_id(truth)
    if engine == "auto":
        return "hotcoco" if odd is None and importlib.util.find_spec("hotcoco") is not None else "pycocotools"
    if importlib.util.find_spec(engine) is None:
        raise InputError(f"the engine {engine} is not installed: pip install {engine}, or take the engine auto")
    if engine == "hotcoco" and odd is not None:
        raise InputError(f"hotcoco's figures are not COCO's where {odd}; take the engine auto or pycocotools, or number from 1")
    return engine


def _odd_id(truth: dict[str, Any]) -> str | None:
    # pycocotools reads a match with annotation 0 as no match, and so does everybody's published figure; hotcoco takes no negative ids.
    for what in ("images", "categories", "annotations"):
        lowest = min((one["id"] for one in truth[what]), default=1)
        if lowest < (1 if what == "annotations" else 0):
            return f"{what} have the id {lowest}"
    return None


def _checked_numbers(rows: list[CocoRow], truth: dict[str, Any], image_ids: list[int], where: str) -> np.ndarray:
    """(N, …) float64: image id, [x, y, width, height] or keypoints, score, category id. Raises InputError for rows that are wrong."""
    if rows and isinstance(rows[0], KeypointRow):
        lengths = [len(row.keypoints) for row in rows if isinstance(row, KeypointRow)]
        odd = next((number for number, length in enumerate(lengths) if length != 3 * KEYPOINTS), None)
        if odd is not None:
            raise InputError(f"{where}, row [{odd}]: {lengths[odd]} numbers in keypoints, not {KEYPOINTS} points [x, y, v]")
    numbers = _numbers(rows)
    check_finite(rows, numbers, where)
    named = ", ".join(f"{one['id']} is {one['name']}" for one in truth["categories"][:3])
    hint = f" ({named} …): give the annotations' own ids, not a network's labels"
    check_known(numbers[:, 0].astype(np.int64), image_ids, f"{where}: no image of the annotations has the id")
    categories = [one["id"] for one in truth["categories"]]
    check_known(numbers[:, -1].astype(np.int64), categories, f"{where}: no category has the id", hint)
    if rows and isinstance(rows[0], MaskRow):
        sizes = {one["id"]: (one["height"], one["width"]) for one in truth["images"]}
        masks = [(number, row.image_id, row.segmentation) for number, row in enumerate(rows) if isinstance(row, MaskRow)]
        check_run_lengths(masks, sizes, lambda number: f"{where}, row [{number}]")
    return numbers


def _numbers(rows: list[CocoRow]) -> np.ndarray:
    if rows and isinstance(rows[0], BoxRow):
        lines: list[Any] = [(row.image_id, *row.bbox, row.score, row.category_id) for row in rows if isinstance(row, BoxRow)]
    elif rows and isinstance(rows[0], KeypointRow):
        lines = [(row.image_id, *row.keypoints, row.score, row.category_id) for row in rows if isinstance(row, KeypointRow)]
    else:
        lines = [(row.image_id, row.score, row.category_id) for row in rows]
    return np.array(lines, dtype=np.float64) if lines else np.zeros((0, 3))


def _pycocotools(truth: dict[str, Any], rows: list[CocoRow], numbers: np.ndarray, iou_type: IouType) -> tuple[list[float], np.ndarray]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco, nothing = COCO(), COCO()
        coco.dataset, nothing.dataset = truth, truth | {"annotations": []}
        coco.createIndex()
        nothing.createIndex()
        found = coco.loadRes([_as_dict(row) for row in rows]) if rows else nothing  # loadRes fails on an empty list
        evaluation = COCOeval(coco, found, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.eval is not None
    return list(evaluation.stats), evaluation.eval["precision"]


def _hotcoco(truth: dict[str, Any], rows: list[CocoRow], numbers: np.ndarray, iou_type: IouType) -> tuple[list[float], np.ndarray]:
    import hotcoco

    by_id = [{"id": one["id"], "name": str(one["id"])} for one in truth["categories"]]  # half a surrogate in a name is more than it takes
    with contextlib.redirect_stdout(io.StringIO()):
        coco = hotcoco.COCO(truth | {"categories": by_id})
        results = coco.load_res(numbers if rows and iou_type == "bbox" else [_as_dict(row) for row in rows])
        evaluation = hotcoco.COCOeval(coco, results, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    curves = evaluation.eval
    assert curves is not None, "accumulate() was called"
    return list(evaluation.stats), np.asarray(curves["precision"])


_ENGINES: dict[str, Callable[[dict[str, Any], list[CocoRow], np.ndarray, IouType], tuple[list[float], np.ndarray]]] = {
    "pycocotools": _pycocotools,
    "hotcoco": _hotcoco,
}


def _as_dict(row: CocoRow) -> dict[str, Any]:
    common = {"image_id": row.image_id, "category_id": row.category_id, "score": row.score}
    if isinstance(row, BoxRow):
        return common | {"bbox": list(row.bbox)}
    if isinstance(row, MaskRow):
        return common | {"segmentation": segmentation_of(row.segmentation)}
    assert isinstance(row, KeypointRow)
    return common | {"keypoints": row.keypoints}


def class_names(truth: dict[str, Any]) -> list[str]:
    """One name a category, in the order of their ids; of two categories with one name each is followed by its id."""
    times = Counter(one["name"] for one in truth["categories"])
    return [one["name"] if times[one["name"]] == 1 else f"{one['name']} ({one['id']})" for one in truth["categories"]]


def _per_class(truth: dict[str, Any], precision: np.ndarray) -> dict[str, float]:
    """AP of each class: precision is [IoU, recall, class, area, detections], its classes in the order of their ids, area 0 is all."""
    means = {}
    for number, name in enumerate(class_names(truth)):
        values = precision[:, :, number, 0, -1]
        values = values[values > -1]
        means[f"AP/{name}"] = float(values.mean()) if values.size else -1.0
    return means
