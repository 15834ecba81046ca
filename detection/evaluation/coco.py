"""COCO's figures for boxes, masks and keypoints: pycocotools is the reference, hotcoco the fast engine with the same figures."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from detection.evaluation.results import read_json, read_rows
from resbackbone.errors import InputError, nearest

IOU_TYPES = ("bbox", "segm", "keypoints")
ENGINES = ("auto", "pycocotools", "hotcoco")
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KEYPOINT_NAMES = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")


def evaluate_coco(
    ground_truth: Path | dict[str, Any], detections: Path | list[dict[str, Any]], *, iou_type: str = "bbox", engine: str = "auto"
) -> dict[str, float]:
    """The figures COCO prints, by name, -1 where there is nothing to judge, and `AP/<class>` for each class (boxes and masks).

    ground_truth: COCO JSON; every image in it counts. detections: COCO's results format. Raises InputError for what is malformed.
    """
    if iou_type not in IOU_TYPES or engine not in ENGINES:
        raise InputError(f"iou_type={iou_type} and engine={engine}: choose from {', '.join(IOU_TYPES)} and {', '.join(ENGINES)}")
    truth = _checked_truth(ground_truth)
    needed = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[iou_type]
    rows = read_rows(detections, ("image_id", "category_id", "score", needed)) if isinstance(detections, Path) else detections
    _check_ids(truth, rows)
    names = KEYPOINT_NAMES if iou_type == "keypoints" else NAMES
    if not rows:
        return _nothing_found(truth, names)
    stats, precision = _ENGINES[_chosen(engine)](truth, rows, iou_type)
    figures = {name: float(value) for name, value in zip(names, stats, strict=True)}
    return figures if iou_type == "keypoints" else figures | _per_class(truth, precision)


def format_coco(figures: dict[str, float], *, iou_type: str = "bbox") -> str:
    """The lines COCO's own tool prints."""
    if iou_type == "keypoints":
        rows = [(name, iou, area, 20) for name, iou, area in zip(KEYPOINT_NAMES, _KEYPOINT_IOUS, _KEYPOINT_AREAS, strict=True)]
    else:
        rows = list(zip(NAMES, _IOUS, _AREAS, _MAX_DETECTIONS, strict=True))
    lines = []
    for name, iou, area, most in rows:
        title, kind = ("Average Precision", "(AP)") if name.startswith("AP") else ("Average Recall", "(AR)")
        lines.append(f" {title:<18} {kind} @[ IoU={iou:<9} | area={area:>6s} | maxDets={most:>3d} ] = {figures[name]:0.3f}")
    return "\n".join(lines)


_IOUS = ("0.50:0.95", "0.50", "0.75") + ("0.50:0.95",) * 9
_AREAS = ("all",) * 3 + ("small", "medium", "large") + ("all",) * 3 + ("small", "medium", "large")
_MAX_DETECTIONS = (100,) * 6 + (1, 10) + (100,) * 4
_KEYPOINT_IOUS = ("0.50:0.95", "0.50", "0.75", "0.50:0.95", "0.50:0.95") * 2
_KEYPOINT_AREAS = ("all", "all", "all", "medium", "large") * 2


def _chosen(engine: str) -> str:
    if engine == "auto":
        return "hotcoco" if importlib.util.find_spec("hotcoco") is not None else "pycocotools"
    if importlib.util.find_spec(engine) is None:
        raise InputError(f"eval.engine={engine} is not installed: pip install {engine}, or take eval.engine=auto")
    return engine


def _pycocotools(truth: dict[str, Any], rows: list[dict[str, Any]], iou_type: str) -> tuple[list[float], np.ndarray]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)  # it writes run-length codes and flags into what it is given
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(rows)), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.eval is not None
    return list(evaluation.stats), evaluation.eval["precision"]


def _hotcoco(truth: dict[str, Any], rows: list[dict[str, Any]], iou_type: str) -> tuple[list[float], np.ndarray]:
    import hotcoco

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        truth_file, rows_file = Path(folder) / "truth.json", Path(folder) / "detections.json"
        truth_file.write_text(json.dumps(truth))
        rows_file.write_text(json.dumps(rows))
        coco = hotcoco.COCO(str(truth_file))
        evaluation = hotcoco.COCOeval(coco, coco.loadRes(str(rows_file)), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return list(evaluation.stats), np.asarray(evaluation.eval["precision"])


_ENGINES = {"pycocotools": _pycocotools, "hotcoco": _hotcoco}


def _checked_truth(ground_truth: Path | dict[str, Any]) -> dict[str, Any]:
    truth = read_json(ground_truth, "annotations") if isinstance(ground_truth, Path) else ground_truth
    for key in ("images", "annotations", "categories"):
        if not isinstance(truth, dict) or not isinstance(truth.get(key), list):
            name = ground_truth if isinstance(ground_truth, Path) else ""
            raise InputError(f"annotations {name}: no list {key!r}; a COCO file has images, annotations and categories")
    return truth


def _check_ids(truth: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    for key, known in (
        ("image_id", {image["id"] for image in truth["images"]}),
        ("category_id", {one["id"] for one in truth["categories"]}),
    ):
        unknown = sorted({str(row[key]) for row in rows if row[key] not in known})
        if unknown:
            raise InputError(
                f"detections name {len(unknown)} {key}s that the annotations do not have, such as {', '.join(unknown[:3])};"
                f"{nearest(unknown[0], map(str, known))} are the two files of the same split?"
            )


def _nothing_found(truth: dict[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    """What COCO's tool would say of no detection at all, where it fails instead: 0 wherever there is an object, else -1."""
    areas = [one["area"] for one in truth["annotations"] if not one.get("iscrowd")]
    present = {"s": any(a <= 32**2 for a in areas), "m": any(32**2 <= a <= 96**2 for a in areas), "l": any(a >= 96**2 for a in areas)}
    return {name: 0.0 if present.get(name[-1], bool(areas)) else -1.0 for name in names}


def _per_class(truth: dict[str, Any], precision: np.ndarray) -> dict[str, float]:
    """AP of each class: precision is [IoU, recall, class, area, detections]; classes in the order of their ids."""
    names = [one["name"] for one in sorted(truth["categories"], key=lambda one: one["id"])]
    of_class = precision[:, :, :, 0, -1]
    means = {}
    for number, name in enumerate(names):
        values = of_class[:, :, number][of_class[:, :, number] > -1]
        means[f"AP/{name}"] = float(values.mean()) if values.size else -1.0
    return means
