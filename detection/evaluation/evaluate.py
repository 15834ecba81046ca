"""The one function behind every figure: training, the tools and the JSON-only path all come here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detection.data.source import Source
from detection.evaluation.coco import Engine, evaluate_coco
from detection.evaluation.results import Record, coco_image_ids, coco_results, voc_results
from detection.evaluation.rows import VocRow, read_rows
from detection.evaluation.voc import VocTruth, evaluate_voc


def primary_metric(source: Source) -> str:
    """The figure that decides which checkpoint is best: COCO's AP, or VOC's area mAP at IoU 0.5."""
    return "mAP" if source.metric == "voc" else "AP"


def evaluate_source(source: Source, records: Sequence[Record], *, engine: Engine = "auto") -> dict[str, float]:
    """The figures of a whole split by name, -1 where there is nothing to judge.

    COCO: the 12 of boxes and `AP/<class>`; `segm/…` for masks. VOC: see `voc_figures`.
    """
    if source.metric == "voc":
        return voc_figures(source, voc_results(records, source), engine=engine)
    rows, ids = coco_results(records, source), coco_image_ids(source)
    # COCO's own file where there is one, so that areas and crowds are its own.
    truth: Path | dict[str, Any] = source.annotation_file or source.annotations.to_coco()
    figures = evaluate_coco(truth, rows, engine=engine, image_ids=ids)
    if any(record.segmentations is not None for record in records):
        masks = evaluate_coco(truth, rows, iou_type="segm", engine=engine, image_ids=ids)
        figures |= {f"segm/{name}": value for name, value in masks.items()}
    return figures


def voc_figures(
    source: Source, detections: Path | Sequence[dict[str, Any]], *, iou: float = 0.5, engine: Engine = "auto"
) -> dict[str, float]:
    """VOC's means `mAP` (area) and `mAP_11_point`; each class's AP as `VOC/<class>` and `VOC_11_point/<class>`; COCO's figures beside them.

    iou: VOC's threshold. COCO's figures take difficult objects as crowds. Raises InputError for rows that are wrong.
    """
    result = evaluate_voc(voc_truth(source), detections, iou=iou)
    figures = {"mAP": result.map_area, "mAP_11_point": result.map_11_point}
    for name, one in result.classes.items():
        figures |= {f"VOC/{name}": one.ap_area, f"VOC_11_point/{name}": one.ap_11_point}
    return figures | evaluate_coco(source.annotations.to_coco(), voc_rows_as_coco(read_rows(detections, VocRow), source), engine=engine)


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


def voc_rows_as_coco(rows: Sequence[VocRow], source: Source) -> list[dict[str, Any]]:
    """VOC's rows as COCO's: corners in whole pixels, both inside, become [x, y, width, height]."""
    annotations = source.annotations
    images = dict(zip(map(str, annotations.image_ids.tolist()), coco_image_ids(source), strict=True))
    categories = dict(zip(annotations.classes, annotations.category_ids.tolist(), strict=True))
    return [
        {
            "image_id": images[str(row.image_id)],
            "category_id": categories[row.category],
            "score": row.score,
            "bbox": [row.bbox[0] - 1, row.bbox[1] - 1, row.bbox[2] - row.bbox[0] + 1, row.bbox[3] - row.bbox[1] + 1],
        }
        for row in rows
    ]
