"""COCO splits joined: every image and object of each part, and nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from detection.data import load_source, scan_source
from resbackbone.errors import InputError

POLYGON, RUN_LENGTHS = [[1.0, 1.0, 9.0, 1.0, 9.0, 7.0]], {"size": [12, 16], "counts": [20, 5, 167]}
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


def record(number: int, image: int, segmentation: Any) -> dict[str, Any]:
    box = [1.0 + number % 3, 1.0, 8.0, 6.0]
    return {"id": number, "image_id": image, "category_id": 3 + 4 * (number % 2), "bbox": box, "area": 40.0 + number, "iscrowd": 0,
            "segmentation": segmentation}  # fmt: skip


def write(root: Path, split: str, images: list[int], annotations: list[dict[str, Any]], **changes: Any) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    (root / split).mkdir()
    for number in images:
        cv2.imwrite(str(root / split / f"{number}.png"), np.full((12, 16, 3), number, np.uint8))
    listed = [{"id": number, "file_name": f"{number}.png", "height": 12, "width": 16} for number in images]
    content = {"images": listed, "annotations": annotations, "categories": copy.deepcopy(CATEGORIES)} | changes
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "one", [5, 2, 9], [record(1, 9, POLYGON), record(2, 5, RUN_LENGTHS), record(3, 9, RUN_LENGTHS)])
    write(tmp_path, "two", [1, 4], [record(1, 4, POLYGON), record(2, 1, POLYGON)])
    return tmp_path


def test_every_image_has_its_objects_masks_and_pixels(root: Path) -> None:
    joined = load_source("coco", root, ["one", "two"], masks=True)
    assert joined.annotations.image_ids.tolist() == [5, 2, 9, 1, 4]
    assert joined.annotation_file is None
    index = 0
    for split in ("one", "two"):
        part = load_source("coco", root, split, masks=True)
        for of_part in range(len(part.annotations)):
            ours, theirs = joined.annotations.of_image(index), part.annotations.of_image(of_part)
            for field in ("boxes", "labels", "areas", "ignore"):
                assert np.array_equal(getattr(joined.annotations, field)[ours], getattr(part.annotations, field)[theirs])
            for one, other in zip(range(ours.start, ours.stop), range(theirs.start, theirs.stop), strict=True):
                assert np.array_equal(joined.annotations.mask(one, 12, 16), part.annotations.mask(other, 12, 16))
            assert np.array_equal(joined.read_image(index), part.read_image(of_part))
            index += 1
    assert index == len(joined.annotations)


def test_an_image_in_two_of_them_is_refused(root: Path) -> None:
    write(root, "three", [9, 8], [])
    source, log = scan_source("coco", root, ("one", "three"))
    assert source is not None
    assert source.annotations.image_ids.tolist() == [5, 2, 9, 8]
    assert [(problem.kind, problem.image, problem.file.endswith("instances_three.json")) for problem in log.found] == [
        ("duplicate_id", 9, True)
    ]
    with pytest.raises(InputError, match="two of the splits"):
        load_source("coco", root, ("one", "three"))


def test_other_categories_are_refused(root: Path) -> None:
    write(root, "three", [8], [], categories=[{"id": 3, "name": "cat"}, {"id": 7, "name": "cow"}])
    with pytest.raises(InputError, match=r"only in the first \['dog'\], only in the second \['cow'\]"):
        load_source("coco", root, ("one", "three"))


def test_every_parts_problems_are_named(root: Path) -> None:
    write(root, "three", [8], [record(1, 77, POLYGON)])
    (root / "annotations" / "instances_four.json").write_text("{")
    (root / "four").mkdir()
    _, log = scan_source("coco", root, ("one", "three"))
    assert [problem.kind for problem in log.found] == ["unknown_image"]
    source, log = scan_source("coco", root, ("one", "three", "four"))
    assert source is None
    assert [problem.kind for problem in log.found] == ["unknown_image", "not_json"]
