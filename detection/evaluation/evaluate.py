"""The one function behind every figure: training, the tools and the JSON-only path all come here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from detection.data.source import Source
from detection.evaluation.coco import evaluate_coco
from detection.evaluation.results import Record, coco_results, read_json, voc_results
from detection.evaluation.voc import VocTruth, evaluate_voc


def primary_metric(source: Source) -> str:
    """The figure that decides which checkpoint is best: COCO's AP, or VOC's area mAP at IoU 0.5."""
    return "mAP" if source.metric == "voc" else "AP"


def evaluate_source(source: Source, records: Sequence[Record], *, engine: str = "auto") -> dict[str, float]:
    """The figures of a whole split by name.

    COCO: the 12 of boxes, `segm/…` for masks. VOC: `mAP` (area), `mAP_11_point`, both at IoU 0.5, and COCO's twelve beside them.
    """
    truth = coco_truth(source)
    figures = evaluate_coco(truth, coco_results(records, source), engine=engine)
    if any(record.segmentations is not None for record in records):
        masks = evaluate_coco(truth, coco_results(records, source), iou_type="segm", engine=engine)
        figures |= {f"segm/{name}": value for name, value in masks.items()}
    return (voc_figures(source, voc_results(records, source)) | figures) if source.metric == "voc" else figures


def coco_truth(source: Source) -> dict[str, Any]:
    """COCO's own file where there is one, so that areas and crowds are its own; else the same made from the annotations."""
    return source.annotations.to_coco() if source.annotation_file is None else read_json(source.annotation_file, "annotations")


def voc_figures(source: Source, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """VOC's means, and each class's AP as `VOC/<class>` (area) and `VOC_11_point/<class>`; classes without an object are left out."""
    result = evaluate_voc(voc_truth(source), rows)
    figures = {"mAP": result.map_area, "mAP_11_point": result.map_11_point}
    for name, one in result.classes.items():
        if one.objects:
            figures |= {f"VOC/{name}": one.ap_area, f"VOC_11_point/{name}": one.ap_11_point}
    return figures


def voc_truth(source: Source) -> VocTruth:
    """The objects of a source in VOC's own pixels."""
    annotations = source.annotations
    return VocTruth(
        classes=tuple(annotations.classes),
        image_ids=tuple(str(name) for name in annotations.image_ids.tolist()),
        image_of=np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets)),
        labels=annotations.labels - 1,
        boxes=annotations.boxes.astype(np.float64) + np.array([1.0, 1.0, 0.0, 0.0]),
        difficult=annotations.ignore,
    )
