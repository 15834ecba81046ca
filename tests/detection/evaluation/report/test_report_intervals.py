"""Where the page gives no interval: a class in a few images, a set of one image; and VOC's threshold, said and refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[4]
sys.path.insert(0, str(REPOSITORY))

from detection.evaluation.bootstrap import LEAST_IMAGES  # noqa: E402
from detection.evaluation.report.report import evaluate_coco_files  # noqa: E402
from detection.evaluation.voc import evaluate_voc  # noqa: E402
from resbackbone.errors import InputError  # noqa: E402
from tools import eval_voc  # noqa: E402


def data_of(folder: Path) -> dict[str, Any]:
    text = (folder / "index.html").read_text(encoding="utf-8")
    return json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])


def reported(folder: Path, images: int, places: dict[str, list[int]], *, lost: list[str] | None = None) -> dict[str, Any]:
    """The page's data: in each image of a class's `places` an object that run b finds; run a (None: no such run) has not those `lost`."""
    names = list(places)
    objects = [
        {"image_id": image, "category_id": number, "bbox": [20.0 * number, 0.0, 10.0, 10.0]}
        for number, name in enumerate(names, 1)
        for image in places[name]
    ]
    truth = {
        "images": [{"id": n, "file_name": str(n), "width": 99, "height": 20} for n in range(1, images + 1)],
        "annotations": [one | {"id": n} for n, one in enumerate(objects, 1)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
    }
    rows = [one | {"score": 0.9 - 0.01 * n} for n, one in enumerate(objects)]
    fewer = [row for row in rows if names[row["category_id"] - 1] not in (lost or [])]
    for name, content in (("truth", truth), ("b", rows), ("a", fewer)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    first, second = ("b", None) if lost is None else ("a", folder / "b.json")
    evaluate_coco_files(folder / "truth.json", folder / f"{first}.json", report=folder, compare=second)
    return data_of(folder)


def test_a_class_in_a_few_images_has_no_interval(tmp_path: Path) -> None:
    """Found by one run alone in one image, in four, in five; and a class that is nowhere."""
    places = {"common": list(range(1, 21)), "rare": [7], "scarce": [1, 5, 9, 13], "enough": [2, 4, 6, 8, 10], "nowhere": []}
    data = reported(tmp_path, 20, places, lost=["rare", "scarce", "enough"])
    assert data["comparison"]["classes"] == [[0, 0, 0], [1, None, None], [1, None, None], [1, 1, 1], None]
    assert data["leastImages"] == LEAST_IMAGES == 5
    gain, low, high = data["comparison"]["overall"]["AP50"]
    assert (gain, high) == (0.75, pytest.approx(0.8, abs=0.05))
    assert 0 < low <= gain


def test_ends_on_the_page_are_figures_that_can_be(tmp_path: Path) -> None:
    """A detector that finds next to nothing: its draws, moved to the figure, would reach below 0."""
    draw = np.random.default_rng(0)
    truth = {
        "images": [{"id": n} for n in range(1, 11)],
        "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": [0.0, 0.0, 9.0, 9.0]} for n in range(1, 11)],
        "categories": [{"id": 1, "name": "thing"}],
    }
    strays = [{"image_id": n, "bbox": [40.0, 0.0, 9.0, 9.0], "score": 0.5 + 0.4 * float(draw.random())} for n in (1, 1, 2)]
    rows = [row | {"category_id": 1} for row in [*strays, {"image_id": 3, "bbox": [0.0, 0.0, 9.0, 9.0], "score": 0.4}]]
    for name, content in (("truth", truth), ("found", rows)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    evaluate_coco_files(tmp_path / "truth.json", tmp_path / "found.json", report=tmp_path)
    value, low, high = data_of(tmp_path)["runs"][0]["intervals"]["AP50"]
    assert (value, low) == (pytest.approx(11 / 101 / 4), 0.0)
    assert value < high < 1


@pytest.mark.parametrize("images", [1, 3])
def test_one_image_with_objects_has_no_interval(images: int, tmp_path: Path) -> None:
    one = reported(tmp_path, images, {"thing": [1]})
    assert one["runs"][0]["figures"]["AP"] == pytest.approx(1.0)
    assert (one["runs"][0]["intervals"], one["resamples"]) == ({}, 0)
    two = reported(tmp_path, images, {"thing": [1], "other": [1]}, lost=["other"])
    assert two["comparison"] == {"overall": {}, "classes": [[0, None, None], [1, None, None]]}


def test_two_images_with_objects_have_intervals(tmp_path: Path) -> None:
    data = reported(tmp_path, 2, {"thing": [1, 2]})
    assert data["runs"][0]["intervals"].keys() == {"AP", "AP50"}
    assert data["resamples"] == 1000


def test_vocs_threshold_is_on_the_page(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "voc_known_answer"
    files = ["--devkit", str(folder), "--detections", str(folder / "detections.json"), "--report", str(tmp_path)]
    assert eval_voc.main([*files, "--iou", "0.01", "--compare", str(folder / "detections.json")]) == 0
    assert [run["iou"] for run in data_of(tmp_path)["runs"]] == [0.01, 0.01]
    assert eval_voc.main(files) == 0
    assert data_of(tmp_path)["runs"][0]["iou"] == 0.5


@pytest.mark.parametrize(
    ("iou", "words"),
    [
        ("50", "--iou 50: a threshold of IoU lies above 0 and is at most 1; did you mean 0.5?"),
        ("1000", "at most 1; give one of these, such as 0.5"),
        ("1.01", "did you mean 0.0101?"),
        ("0", "--iou 0: "),
        ("-0.5", "--iou -0.5: "),
        ("nan", "--iou nan: "),
    ],
)
def test_thresholds_that_are_none_are_refused(
    iou: str, words: str, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared_data / "voc_known_answer"
    files = ["--devkit", str(folder), "--detections", str(folder / "detections.json"), "--output", str(tmp_path / "out")]
    assert eval_voc.main([*files, f"--iou={iou}"]) == 1
    output = capsys.readouterr()
    assert words in output.err
    assert output.out == ""
    assert not (tmp_path / "out").exists()


def test_a_threshold_of_one_is_one() -> None:
    from detection.evaluation.voc import VocTruth

    truth = VocTruth(
        classes=("a",),
        image_ids=("1",),
        image_of=np.zeros(1, dtype=np.int64),
        labels=np.zeros(1, dtype=np.int64),
        boxes=np.array([[1.0, 1.0, 9.0, 9.0]]),
        difficult=np.zeros(1, dtype=bool),
    )
    row = {"image_id": "1", "category": "a", "score": 0.5, "bbox": [1.0, 1.0, 9.0, 9.0]}
    assert evaluate_voc(truth, [row], iou=1.0).map_area == 1.0
    assert evaluate_voc(truth, [row | {"bbox": [1.0, 1.0, 9.0, 8.0]}], iou=1.0).map_area == 0.0
    with pytest.raises(InputError, match="at most 1"):
        evaluate_voc(truth, [row], iou=1.0001)
