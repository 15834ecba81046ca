"""Detections as the benchmarks write them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detection.data.source import Source
from detection.structures import Detections
from resbackbone.runtime.atomic import write_atomically


@dataclass(frozen=True, kw_only=True)
class Record:
    """The detections of one image, in pixels of the upright image on disk.

    size: its (height, width); segmentations: one COCO run-length mask a detection, or None where the detector has no masks.
    """

    image_id: int | str
    index: int
    size: tuple[int, int]
    detections: Detections
    segmentations: list[dict[str, Any]] | None = None


def merge_records(parts: Iterable[Sequence[Record]], *, expected: int) -> list[Record]:
    """The records of several processes as one list in the order of the data set; every image exactly once."""
    records = sorted((record for part in parts for record in part), key=lambda record: record.index)
    times = Counter(record.index for record in records)
    twice, missing = [index for index, count in times.items() if count > 1], sorted(set(range(expected)) - set(times))
    assert not twice, f"images {twice[:5]} (by position) were evaluated more than once; the processes' shares overlap"
    assert not missing, f"images {missing[:5]} (by position) of {expected} were not evaluated"
    assert len(records) == expected, f"{len(records)} records for {expected} images"
    return records


def coco_results(records: Iterable[Record], source: Source) -> list[dict[str, Any]]:
    """Rows of COCO's results format; image ids as in the source's COCO ground truth (1..I where the source's own are text)."""
    ids, category_ids = coco_image_ids(source), source.annotations.category_ids
    rows = []
    for record in records:
        found = record.detections
        boxes = found.boxes.double().numpy().copy()
        boxes[:, 2:] -= boxes[:, :2]
        for number, (box, score, label) in enumerate(zip(boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)):
            row = {"image_id": ids[record.index], "category_id": int(category_ids[label - 1]), "score": score, "bbox": box}
            rows.append(row if record.segmentations is None else row | {"segmentation": record.segmentations[number]})
    return rows


def voc_results(records: Iterable[Record], source: Source) -> list[dict[str, Any]]:
    """Rows {image_id, category, score, bbox}: bbox is [xmin, ymin, xmax, ymax] in VOC's pixels, 1-based with both ends inside."""
    classes = source.annotations.classes
    rows = []
    for record in records:
        found = record.detections
        boxes = (found.boxes.double().numpy() + np.array([1.0, 1.0, 0.0, 0.0])).tolist()
        for box, score, label in zip(boxes, found.scores.tolist(), found.labels.tolist(), strict=True):
            rows.append({"image_id": record.image_id, "category": classes[label - 1], "score": score, "bbox": box})
    return rows


def coco_image_ids(source: Source) -> list[int]:
    """The image ids of the source's COCO ground truth, by index."""
    ids = source.annotations.image_ids
    return ids.tolist() if ids.dtype.kind == "i" else list(range(1, len(ids) + 1))


def write_results(path: Path, source: Source, records: Iterable[Record]) -> None:
    """Write detections in the format of the source's own benchmark."""
    rows = voc_results(records, source) if source.metric == "voc" else coco_results(records, source)
    write_atomically(path, json.dumps(rows).encode())


def write_metrics(output: Path, metrics: dict[str, float]) -> Path:
    """Write `output`/eval/metrics.json; returns its path."""
    path = output / "eval" / "metrics.json"
    write_atomically(path, metrics_text(metrics).encode())
    return path


def metrics_text(metrics: dict[str, float]) -> str:
    """What eval/metrics.json holds of these figures."""
    return json.dumps(metrics, indent=2) + "\n"


def encode_masks(masks: Iterable[np.ndarray]) -> list[dict[str, Any]]:
    """COCO's run-length code, JSON-ready, of uint8 (height, width) masks of 0 and 1."""
    from pycocotools import mask as coco_mask

    codes = [coco_mask.encode(np.asfortranarray(mask)) for mask in masks]
    return [{"size": list(code["size"]), "counts": code["counts"].decode("ascii")} for code in codes]
