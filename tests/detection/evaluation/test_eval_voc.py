"""VOC's rules against a literal version that walks through the devkit's steps, and where a devkit's parts may lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detection.evaluation.voc import VocTruth, ap_11_point, ap_area, evaluate_voc, format_voc
from detection.evaluation.voc_files import annotated_images, evaluate_voc_file
from resbackbone.errors import InputError

CLASSES = ("cat", "dog", "cow")


def random_case(seed: int) -> tuple[VocTruth, list[dict[str, Any]]]:
    draw = np.random.default_rng(seed)
    images, objects = int(draw.integers(1, 6)), int(draw.integers(0, 25))
    corners = draw.integers(1, 40, (objects, 2)).astype(float)
    truth = VocTruth(
        classes=CLASSES,
        image_ids=tuple(f"im{number}" for number in range(images)),
        image_of=np.sort(draw.integers(0, images, objects)),
        labels=draw.integers(0, 2, objects),  # no cow
        boxes=np.concatenate((corners, corners + draw.integers(0, 30, (objects, 2))), axis=1),
        difficult=draw.random(objects) < 0.25,
    )
    rows = []
    for _ in range(int(draw.integers(0, 60))):
        near = int(draw.integers(0, objects)) if objects and draw.random() < 0.8 else None
        box = truth.boxes[near] + draw.integers(-3, 4, 4) if near is not None else np.sort(draw.integers(1, 60, (2, 2)), axis=0).flatten()
        image = truth.image_of[near] if near is not None else draw.integers(0, images)
        label = truth.labels[near] if near is not None and draw.random() < 0.9 else draw.integers(0, 3)
        score = float(draw.choice([0.2, 0.7])) if seed % 2 else float(draw.random())
        rows.append({"image_id": f"im{image}", "category": CLASSES[label], "score": score, "bbox": [float(side) for side in box]})
    return truth, rows


def literal(truth: VocTruth, rows: list[dict[str, Any]], name: str, iou: float) -> tuple[float, float, int, int]:
    """(11-point, area, right, wrong) as VOCevaldet.m has it: one detection after the other."""
    label, taken, outcomes = CLASSES.index(name), set(), []
    for row in sorted((row for row in rows if row["category"] == name), key=lambda row: -row["score"]):
        best, found = -np.inf, None
        for number in range(len(truth.labels)):
            if truth.labels[number] != label or truth.image_ids[truth.image_of[number]] != row["image_id"]:
                continue
            a, b = row["bbox"], truth.boxes[number]
            width, height = min(a[2], b[2]) - max(a[0], b[0]) + 1, min(a[3], b[3]) - max(a[1], b[1]) + 1
            if width > 0 and height > 0:
                union = (a[2] - a[0] + 1) * (a[3] - a[1] + 1) + (b[2] - b[0] + 1) * (b[3] - b[1] + 1) - width * height
                if width * height / union > best:
                    best, found = width * height / union, number
        if found is None or best < iou:
            outcomes.append(False)
        elif not truth.difficult[found]:
            outcomes.append(found not in taken)
            taken.add(found)
    objects = sum(1 for number in range(len(truth.labels)) if truth.labels[number] == label and not truth.difficult[number])
    right, curve = 0, []
    for place, outcome in enumerate(outcomes, start=1):
        right += outcome
        curve.append((right, right / place))
    if not objects:
        return -1.0, -1.0, right, len(outcomes) - right
    eleven = sum(max((p for t, p in curve if 10 * t >= step * objects), default=0.0) for step in range(11)) / 11
    area = sum(max((p for t, p in curve if t >= step), default=0.0) for step in range(1, objects + 1)) / objects
    return eleven, area, right, len(outcomes) - right


@pytest.mark.parametrize("iou", [0.3, 0.5, 0.75])
def test_random_cases_equal_the_literal_version(iou: float) -> None:
    for seed in range(120):
        truth, rows = random_case(seed)
        result = evaluate_voc(truth, rows, iou=iou)
        for name, one in result.classes.items():
            eleven, area, right, wrong = literal(truth, rows, name, iou)
            assert (one.true_positives, one.false_positives) == (right, wrong), (seed, name)
            assert one.ap_11_point == pytest.approx(eleven, abs=1e-12), (seed, name)
            assert one.ap_area == pytest.approx(area, abs=1e-12), (seed, name)
            assert one.detections == right + wrong + one.ignored == sum(row["category"] == name for row in rows)


@pytest.mark.parametrize(
    ("right", "objects", "eleven", "area"),
    [
        ([], 4, 0.0, 0.0),
        ([True], 1, 1.0, 1.0),
        ([True, False], 2, 6 / 11, 0.5),  # recall 0.5 reaches 0 … 0.5
        ([False, True], 1, 0.5, 0.5),
        ([True, True, True], 10, 4 / 11, 0.3),  # recall 0.3 reaches 0 … 0.3, though 3 / 10 < 3 * 0.1 in floats
    ],
)
def test_worked_by_hand(right: list[bool], objects: int, eleven: float, area: float) -> None:
    true_sum = np.cumsum(np.array(right, dtype=bool))
    precision = true_sum / np.arange(1, len(right) + 1)
    assert ap_11_point(true_sum, precision, objects=objects) == pytest.approx(eleven)
    assert ap_area(true_sum / objects, precision) == pytest.approx(area)


def test_nothing_to_judge() -> None:
    nothing = np.zeros(0, np.int64)
    truth = VocTruth(
        classes=CLASSES, image_ids=("a",), image_of=nothing, labels=nothing, boxes=np.zeros((0, 4)), difficult=np.zeros(0, dtype=bool)
    )
    result = evaluate_voc(truth, [{"image_id": "a", "category": "cat", "score": 1, "bbox": [1, 1, 5, 5]}])
    assert result.map_area == result.map_11_point == -1.0
    assert result.classes["cat"].false_positives == 1
    assert evaluate_voc(truth, []).classes["dog"].ap_area == -1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": "2008_00464"}, r"no image '2008_00464' \(row \[1\] is the first of 1\); did you mean '2008_004646'\?.* --image-set"),
        ({"category": "sheeep"}, "there is no class 'sheeep' .*did you mean 'sheep'"),
        ({"category": "shee"}, "there is no class 'shee' .*did you mean 'sheep'"),
        ({"image_id": "2008_0046"}, r"no image '2008_0046' \(row \[1\] is the first of 1\)"),
        ({"bbox": [1, 2, 3]}, r"row \[1\], bbox: expected list of length 4"),
        ({"score": None}, r"row \[1\], score: expected a number, got nothing"),
        ({"category": 3}, r"row \[1\], category: expected text, got a whole number"),
    ],
)
def test_bad_rows(change: dict[str, Any], words: str, shared_data: Path, tmp_path: Path) -> None:
    row = {"image_id": "2008_004646", "category": "bus", "score": 0.3, "bbox": [1, 2, 3, 4]}
    (tmp_path / "found.json").write_text(json.dumps([row, row | change]))
    with pytest.raises(InputError, match=words):
        evaluate_voc_file(shared_data / "voc_known_answer", "test", tmp_path / "found.json")


@pytest.fixture
def devkit(shared_data: Path, tmp_path: Path) -> Path:
    """A root with two years: VOC2012/test has four images, VOC2007/train one."""
    xml = sorted((shared_data / "voc_known_answer" / "Annotations").glob("*.xml"))[:5]
    for year, name, files in (("VOC2012", "test", xml[:4]), ("VOC2007", "train", xml[4:])):
        place = tmp_path / "VOCdevkit" / year
        (place / "Annotations").mkdir(parents=True)
        (place / "ImageSets" / "Main").mkdir(parents=True)
        for path in files:
            shutil.copy(path, place / "Annotations")
        (place / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{path.stem}\n" for path in files))
    return tmp_path


@pytest.mark.parametrize(
    ("folder", "image_set", "images"),
    [
        (".", "VOC2012/test", 4),
        (".", "test", 4),
        ("VOCdevkit", "VOC2012/test.txt", 4),
        ("VOCdevkit", "VOC2007/train", 1),
        ("VOCdevkit/VOC2012", "test", 4),
        ("VOCdevkit/VOC2012", "VOC2012/test", 4),
        (".", None, 5),
    ],
)
def test_where_a_devkit_may_lie(devkit: Path, folder: str, image_set: str | None, images: int) -> None:
    assert len(annotated_images(devkit / folder, image_set).annotations) == images


def test_a_text_file_of_ids(devkit: Path, tmp_path: Path) -> None:
    first = next(iter((devkit / "VOCdevkit" / "VOC2007" / "Annotations").iterdir())).stem
    (tmp_path / "mine.txt").write_text(f"{first} 1\n\n")
    assert annotated_images(devkit, str(tmp_path / "mine.txt")).annotations.image_ids.tolist() == [first]
    assert annotated_images(devkit, "mine").annotations.image_ids.tolist() == [first]


@pytest.mark.parametrize(
    ("folder", "image_set", "words"),
    [
        ("VOCdevkit", "VOC2012/tset", "did you mean 'VOC2012/test'"),
        ("VOCdevkit", "VOC2010/test", "not one image set of this name"),
        ("nowhere", "test", "there is no Annotations/ here"),
        (".", "empty", "lists no image"),
        (".", "ghost", "annotation of image ghost_1 is not there"),
        (".", "both", "more than one image set"),
    ],
)
def test_wrong_image_sets(devkit: Path, folder: str, image_set: str, words: str) -> None:
    (devkit / "empty.txt").write_text("\n")
    (devkit / "ghost.txt").write_text("ghost_1\n")
    for year in ("VOC2012", "VOC2007"):
        (devkit / "VOCdevkit" / year / "ImageSets" / "Main" / "both.txt").write_text("a\n")
    with pytest.raises(InputError, match=words):
        annotated_images(devkit / folder, image_set)


def test_table(shared_data: Path) -> None:
    folder = shared_data / "voc_known_answer"
    lines = format_voc(evaluate_voc_file(folder, "test", folder / "detections.json")).splitlines()
    assert lines[1].split()[:3] == ["aeroplane", "0.687546", "0.692026"]
    assert lines[21].split()[:3] == ["mean", "0.577850", "0.578884"]
    none = {"VOC/cat": -1.0, "VOC_11_point/cat": -1.0, "AP/cat": -1.0, "mAP": 0.5, "mAP_11_point": 0.5, "AP": 0.5}
    assert format_voc(none).splitlines()[1].split() == ["cat", "-", "-", "-"]
