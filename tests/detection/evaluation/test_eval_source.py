"""One function behind every figure: a source's records, the file they are written to and the tools all give the same."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from detection.data import load_source
from detection.data.source import Source
from detection.evaluation.coco import NAMES, evaluate_coco
from detection.evaluation.evaluate import evaluate_source, primary_metric
from detection.evaluation.results import Record, encode_masks, merge_records, write_metrics, write_results
from detection.evaluation.voc_files import evaluate_voc_file
from detection.structures import Detections


def noisy_records(source: Source, *, masks: bool = False) -> list[Record]:
    """The truth, moved about, with strays and two classes mixed up; float32 as a network gives it."""
    annotations, draw = source.annotations, np.random.default_rng(0)
    records = []
    for index in range(len(annotations)):
        rows = annotations.of_image(index)
        count = rows.stop - rows.start
        boxes = annotations.boxes[rows] + draw.normal(0, 2, (count, 4))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        labels = np.where(draw.random(count) < 0.1, 1, annotations.labels[rows])
        height, width = annotations.sizes[index].tolist()
        shapes = [
            np.roll(annotations.mask(box, height, width), int(draw.integers(0, 3)), 0) for box in range(rows.start, rows.stop) if masks
        ]
        found = Detections(
            boxes=torch.from_numpy(boxes).float(),
            scores=torch.from_numpy(draw.random(count)).float().round(decimals=1),
            labels=torch.from_numpy(labels),
        )
        codes = encode_masks(shapes) if masks else None
        records.append(
            Record(image_id=annotations.image_id(index), index=index, size=(height, width), detections=found, segmentations=codes)
        )
    return records


def test_coco_boxes_and_masks(shared_data: Path, tmp_path: Path) -> None:
    source = load_source("coco", shared_data / "coco_mini", "val2017", masks=True)
    assert source.annotation_file is not None
    records = noisy_records(source, masks=True)
    figures = evaluate_source(source, records)
    assert primary_metric(source) == "AP"
    assert 0.2 < figures["AP"] < 0.9
    assert 0.2 < figures["segm/AP"] < 0.98
    write_results(tmp_path / "found.json", source, records)
    for iou_type, prefix in (("bbox", ""), ("segm", "segm/")):
        from_file = evaluate_coco(source.annotation_file, tmp_path / "found.json", iou_type=iou_type)  # type: ignore[arg-type]
        assert from_file == {name: figures[prefix + name] for name in from_file}
        assert len(from_file) == len(NAMES) + 80
    assert evaluate_source(source, records, engine="pycocotools") == figures


def test_without_its_file_a_source_judges_alike(shared_data: Path) -> None:
    source = load_source("coco", shared_data / "coco_mini", "val2017", masks=True)
    records = noisy_records(source, masks=True)
    from_file = evaluate_source(source, records)
    source.annotation_file = None
    assert evaluate_source(source, records) == pytest.approx(from_file, abs=1e-6)


def test_a_part_of_a_split_is_judged_on_that_part(shared_data: Path) -> None:
    source = load_source("coco", shared_data / "coco_mini", "val2017")
    source.annotations = source.annotations.select(range(10))
    figures = evaluate_source(source, noisy_records(source))
    source.annotation_file = None
    assert evaluate_source(source, noisy_records(source)) == pytest.approx(figures, abs=1e-6)


def test_voc(shared_data: Path, tmp_path: Path) -> None:
    from detection.data.voc import VOC_CLASSES, scan_images

    folder = shared_data / "voc_known_answer"
    source, _ = scan_images([(folder, path.stem) for path in sorted((folder / "Annotations").glob("*.xml"))], need_images=False)
    records = noisy_records(source)
    figures = evaluate_source(source, records)
    assert primary_metric(source) == "mAP"
    assert 0.3 < figures["mAP"] < 0.99
    assert figures["AP50"] == pytest.approx(figures["mAP"], abs=0.05)
    assert [name for name in figures if name.startswith("VOC/")] == [f"VOC/{name}" for name in VOC_CLASSES]
    write_results(tmp_path / "found.json", source, records)
    assert evaluate_voc_file(folder, None, tmp_path / "found.json") == pytest.approx(figures, abs=1e-9)
    first = json.loads((tmp_path / "found.json").read_text())[0]
    assert first["bbox"] == pytest.approx((records[0].detections.boxes[0] + torch.tensor([1, 1, 0, 0])).tolist())


def test_shapes_have_ids_made_for_them() -> None:
    source = load_source("shapes", None, "val", images=4)
    figures = evaluate_source(source, noisy_records(source))
    assert figures["AP50"] > 0.3


def empty(index: int) -> Record:
    nothing = torch.zeros(0)
    return Record(
        image_id=index, index=index, size=(8, 8), detections=Detections(boxes=nothing.reshape(0, 4), scores=nothing, labels=nothing.long())
    )


def test_merging_processes_keeps_each_image_once() -> None:
    shuffled = random.Random(0).sample(range(10), 10)
    parts = [[empty(index) for index in shuffled[start::3]] for start in range(3)]
    assert [record.index for record in merge_records(parts, expected=10)] == list(range(10))
    assert merge_records([[], []], expected=0) == []
    with pytest.raises(AssertionError, match=r"\[4\] .* more than once"):
        merge_records([*parts, [empty(4)]], expected=10)
    with pytest.raises(AssertionError, match=r"\[9\] .* were not evaluated"):
        merge_records([[empty(index) for index in range(9)]], expected=10)
    with pytest.raises(AssertionError, match="11 records"):
        merge_records([*parts, [empty(10)]], expected=10)


def test_a_detector_that_finds_nothing(shared_data: Path, tmp_path: Path) -> None:
    source = load_source("coco", shared_data / "coco_mini", "val2017")
    records = [empty(index) for index in range(len(source.annotations))]
    assert evaluate_source(source, records)["AP"] == 0.0
    write_results(tmp_path / "found.json", source, records)
    assert json.loads((tmp_path / "found.json").read_text()) == []


def test_metrics_file(tmp_path: Path) -> None:
    path = write_metrics(tmp_path, {"AP": 0.25, "AP/cat": -1.0})
    assert path == tmp_path / "eval" / "metrics.json"
    assert json.loads(path.read_text()) == {"AP": 0.25, "AP/cat": -1.0}
