"""Files from outside: each mistake is one message that names the file, the row and the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detection.evaluation.coco import ENGINES, evaluate_coco
from detection.evaluation.rows import BoxRow, read_rows
from resbackbone.errors import InputError

TRUTH: dict[str, Any] = {
    "images": [{"id": 42, "height": 20, "width": 30, "file_name": "a.jpg"}, {"id": 43, "height": 20, "width": 30, "file_name": "b.jpg"}],
    "annotations": [{"id": 1, "image_id": 42, "category_id": 3, "bbox": [1, 2, 10, 10], "area": 100, "iscrowd": 0}],
    "categories": [{"id": 3, "name": "car"}, {"id": 17, "name": "cat"}],
}
ROW: dict[str, Any] = {"image_id": 42, "category_id": 3, "score": 0.5, "bbox": [1, 2, 10, 10]}
MASK_TRUTH = TRUTH | {"annotations": [TRUTH["annotations"][0] | {"segmentation": [[1, 2, 11, 2, 11, 12]]}]}
MASK_ROW = ROW | {"segmentation": {"size": [20, 30], "counts": [600]}}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write


def without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (b'[{"image_id": 42, "score"', "not valid JSON at line 1, column 26 .*cut off"),
        (b"", "not valid JSON at line 1"),
        (b"\xff\xfe\x00", "not UTF-8|not valid JSON"),
        (b"<html>", "not valid JSON"),
        (b"[" * 100_000, "row \\[0\\]|nested too deeply"),
        ({"detections": [ROW]}, "expected list, got object; COCO's results format is a bare list"),
        ([ROW, 7], r"row \[1\]: expected object, got a whole number"),
        ([ROW, without(ROW, "score")], r"row \[1\]: object missing required field score"),
        ([without(ROW, "bbox")], r"row \[0\]: object missing required field bbox"),
        ([ROW | {"score": "high"}], r"row \[0\], score: expected a number, got text"),
        ([ROW | {"bbox": [1, 2, 3]}], r"row \[0\], bbox: expected list of length 4"),
        ([ROW | {"bbox": []}], r"row \[0\], bbox: expected list of length 4"),
        ([ROW | {"image_id": "42"}], r"row \[0\], image_id: expected a whole number, got text"),
        ([ROW | {"image_id": 2**70}], r"row \[0\], image_id"),
        ([ROW, ROW, ROW | {"score": float("nan")}], r"row \[2\], score: nan is not finite"),
        ([ROW, ROW | {"bbox": [1, float("inf"), 3, 4]}], r"row \[1\], bbox: .*inf.* is not finite"),
        ([ROW, ROW | {"image_id": 999}, ROW | {"image_id": 7}], r"has the id 999, 7 \(row \[1\] is the first of 2\).* there are 2: 42, 43"),
        ([ROW | {"category_id": 1}], r"no category has the id 1 .*3 is car, 17 is cat"),
    ],
)
def test_bad_detections(rows: Any, words: str, write: Callable[[str, Any], Path]) -> None:
    path = write("found.json", rows)
    with pytest.raises(InputError, match=words) as caught:
        evaluate_coco(write("truth.json", TRUTH), path)
    assert str(path) in str(caught.value)


def test_missing_file_names_its_neighbour(write: Callable[[str, Any], Path]) -> None:
    path = write("detections.json", [ROW])
    with pytest.raises(InputError, match=r"there is no such file; did you mean '.*detections.json'"):
        evaluate_coco(TRUTH, path.with_name("detection.json"))
    with pytest.raises(InputError, match="cannot be read"):
        evaluate_coco(TRUTH, path.parent)


def test_rows_in_memory_get_the_same_complaint() -> None:
    with pytest.raises(InputError, match=r"^detections, row \[1\], score: expected a number, got text"):
        evaluate_coco(TRUTH, [ROW, ROW | {"score": "high"}])
    with pytest.raises(InputError, match="Path is in it"):
        evaluate_coco(TRUTH, [ROW | {"image_id": Path("x")}])


def annotation(**change: Any) -> dict[str, Any]:
    return TRUTH | {"annotations": [*TRUTH["annotations"], TRUTH["annotations"][0] | {"id": 2} | change]}


@pytest.mark.parametrize(
    ("truth", "words"),
    [
        (b'{"images": [', "not valid JSON at line 1, column 13"),
        ([], "expected object, got list; it has images, annotations, categories"),
        (without(TRUTH, "images"), "missing required field images"),
        (without(TRUTH, "categories"), "missing required field categories"),
        (annotation(id=1), "2 annotations have the id 1"),
        (TRUTH | {"images": TRUTH["images"] * 2}, "2 images have the id"),
        (TRUTH | {"categories": TRUTH["categories"] * 2}, "2 categories have the id"),
        (annotation(image_id=5), r"image_id what `images` lacks: 5 \(row \[1\]"),
        (annotation(category_id=5), r"category_id what `categories` lacks: 5"),
        (annotation(bbox=[1, float("nan"), 3, 4]), r"annotations\[1\] \(id 2\): bbox .* not finite"),
        (annotation(bbox=[1, 2, 3]), r"annotations\[1\].bbox: expected list of length 4"),
        (annotation(image_id="42"), r"annotations\[1\].image_id: expected a whole number, got text"),
    ],
)
def test_bad_annotations(truth: Any, words: str, write: Callable[[str, Any], Path]) -> None:
    path = write("truth.json", truth)
    with pytest.raises(InputError, match=words) as caught:
        evaluate_coco(path, write("found.json", [ROW]))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"segmentation": {"size": [20, 30], "counts": "zzzz"}}, r"row \[1\]: the mask's counts are no run-length code"),
        ({"segmentation": {"size": [20, 30], "counts": [5, 5]}}, r"row \[1\]: the mask's run lengths do not add up to its 20 × 30"),
        ({"segmentation": {"size": [30, 20], "counts": [600]}}, r"row \[1\]: the mask is of size \[30, 20\], image 42 of \[20, 30\]"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6]]}, r"row \[1\], segmentation: expected object, got list"),
        ({"segmentation": {"size": [20, 30]}}, r"row \[1\], segmentation: object missing required field counts"),
    ],
)
def test_bad_masks(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        evaluate_coco(MASK_TRUTH, [MASK_ROW, MASK_ROW | change], iou_type="segm")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"segmentation": []}, r"annotations\[0\] \(id 1\): no polygon of three corners"),
        ({"segmentation": [[1, 2, 3, 4]]}, "no polygon of three corners"),
        ({"segmentation": {"size": [20, 30], "counts": "9"}}, r"annotations\[0\]: the mask's counts are no run-length code"),
        (  # pycocotools ends the process with these
            {"segmentation": [[1, 2, 11, 2, 11, 12], [1e9, 0, 2e9, 1e9, 5, 5]]},
            r"annotations\[0\] \(id 1\), segmentation: 1000000000.0 is no coordinate; write finite pixels within ±1,000,000",
        ),
        ({"segmentation": [[1, 2, 11, float("nan"), 11, 12]]}, "segmentation: nan is no coordinate|nothing \\(null or NaN\\)"),  # loops
        ({"segmentation": [[1, 2, 11, float("-inf"), 11, 12]]}, "segmentation: -inf is no coordinate|nothing \\(null or NaN\\)"),
    ],
)
def test_bad_true_masks(change: dict[str, Any], words: str) -> None:
    truth = MASK_TRUTH | {"annotations": [MASK_TRUTH["annotations"][0] | change]}
    with pytest.raises(InputError, match=words):
        evaluate_coco(truth, [MASK_ROW], iou_type="segm")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_farthest_coordinates_that_pass_are_fine_for_the_engines(engine: Any) -> None:
    pytest.importorskip("hotcoco" if engine == "hotcoco" else "pycocotools")
    whole = [[-1e6, -1e6, 1e6, -1e6, 1e6, 1e6, -1e6, 1e6]]
    truth = MASK_TRUTH | {"annotations": [MASK_TRUTH["annotations"][0] | {"segmentation": whole}]}
    row = ROW | {"segmentation": {"size": [20, 30], "counts": [0, 600]}}
    assert evaluate_coco(truth, [row], iou_type="segm", engine=engine)["AP"] == pytest.approx(1.0)


def test_a_polygon_without_area_is_left_out_as_in_training() -> None:
    (one,) = MASK_TRUTH["annotations"]
    more = MASK_TRUTH | {"annotations": [one | {"segmentation": [[1, 2, 3, 4], *one["segmentation"]]}]}
    assert evaluate_coco(more, [MASK_ROW], iou_type="segm") == evaluate_coco(MASK_TRUTH, [MASK_ROW], iou_type="segm")


def test_masks_need_image_sizes_and_segmentations() -> None:
    with pytest.raises(InputError, match="image 42: no height and width"):
        evaluate_coco(MASK_TRUTH | {"images": [{"id": 42}, {"id": 43}]}, [MASK_ROW], iou_type="segm")
    with pytest.raises(InputError, match=r"annotations\[0\]: object missing required field segmentation"):
        evaluate_coco(TRUTH, [MASK_ROW], iou_type="segm")


def test_bad_keypoints() -> None:
    points = [1.0] * 51
    truth = TRUTH | {"annotations": [TRUTH["annotations"][0] | {"keypoints": points}]}
    row = without(ROW, "bbox") | {"keypoints": points}
    assert evaluate_coco(truth, [row], iou_type="keypoints")["AP"] == pytest.approx(1.0)  # num_keypoints is counted
    with pytest.raises(InputError, match=r"row \[1\]: 6 numbers in keypoints"):
        evaluate_coco(truth, [row, row | {"keypoints": points[:6]}], iou_type="keypoints")
    with pytest.raises(InputError, match="6 numbers in keypoints"):
        evaluate_coco(TRUTH | {"annotations": [TRUTH["annotations"][0] | {"keypoints": points[:6]}]}, [row], iou_type="keypoints")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1e7])
def test_keypoints_that_are_no_points(number: float, write: Callable[[str, Any], Path]) -> None:
    row = without(ROW, "bbox") | {"keypoints": [1.0] * 51}
    truth = TRUTH | {"annotations": [TRUTH["annotations"][0] | {"keypoints": [1.0] * 50 + [number]}]}
    path = write("truth.json", truth)
    with pytest.raises(InputError, match=rf"annotations\[0\] \(id 1\), keypoints: {number} is no coordinate") as caught:
        evaluate_coco(path, [row], iou_type="keypoints")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("choice", "words"), [({"iou_type": "box"}, "did you mean 'bbox'"), ({"engine": "hotcocoa"}, "did you mean 'hotcoco'")]
)
def test_unknown_choices(choice: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        evaluate_coco(TRUTH, [ROW], **choice)


def test_classes_of_one_name_are_told_apart() -> None:
    truth = TRUTH | {"categories": [{"id": 3, "name": "car"}, {"id": 17, "name": "car"}]}
    assert {"AP/car (3)", "AP/car (17)"} <= set(evaluate_coco(truth, [ROW]))


def test_extra_keys_are_nobodys_business(write: Callable[[str, Any], Path]) -> None:
    (row,) = read_rows(write("found.json", [ROW | {"id": "x", "area": None, "iscrowd": "no"}]), BoxRow)
    assert (row.image_id, row.category_id, row.score, row.bbox) == (42, 3, 0.5, (1.0, 2.0, 10.0, 10.0))
