"""A detector of low scores: the page's slider reaches its working point, so that captions find what the confusion matrix counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_cases import noisy_records, shapes

from detection.evaluation.report import images
from detection.evaluation.report.images import slider_of
from detection.evaluation.report.report import evaluate_coco_files
from detection.evaluation.results import coco_results


def data_of(folder: Path) -> dict[str, Any]:
    text = (folder / "index.html").read_text(encoding="utf-8")
    return json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])


def reported(folder: Path, *factors: float, strays: int = 0) -> dict[str, Any]:
    """The page's data of runs whose scores were multiplied; strays: wrong claims in the first image, scored
    0.2 and hardly more.
    """
    source = shapes(8)
    truth, rows = source.annotations.to_coco(), coco_results(noisy_records(source), source)
    (folder / "truth.json").write_text(json.dumps(truth))
    image = truth["images"][0]["id"]
    more = [{"image_id": image, "category_id": 1, "bbox": [0.0, 0.0, 3.0, 3.0], "score": 0.2 + 1e-5 * n} for n in range(strays)]
    files = []
    for number, factor in enumerate(factors):
        files.append(folder / f"{number}.json")
        files[-1].write_text(json.dumps([row | {"score": factor * row["score"]} for row in [*rows, *more]]))
    evaluate_coco_files(folder / "truth.json", files[0], report=folder, compare=files[1] if len(files) > 1 else None)
    return data_of(folder)


def captions(data: dict[str, Any], run: int, score: float) -> list[int]:
    """How many are right and wrong at a score, over the images, as the page's script counts them."""
    found = [box for image in data["images"] for box in image["runs"][run]["found"] if box[5] >= score]
    cut = sum(times for image in data["images"] for one, times in image["runs"][run]["cut"] if one >= score)
    right = sum(box[6] == -1 for box in found)
    return [right, len(found) - right + cut]


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [
        ([0.5], (0.05, 2)),
        ([0.05], (0.05, 2)),
        ([0.0499], (0.049, 3)),
        ([0.6, 0.0131], (0.013, 3)),
        ([0.01, 0.6], (0.01, 3)),
        ([0.00437], (0.0043, 4)),
        ([0.00003], (0.0, 4)),
    ],
)
def test_the_slider_begins_at_the_lowest_working_point(thresholds: list[float], expected: tuple[float, int]) -> None:
    assert slider_of(thresholds) == expected


@pytest.mark.parametrize("factor", [1.0, 0.06, 0.01])
def test_captions_at_the_slider_begin_with_what_the_confusion_matrix_counts(factor: float, tmp_path: Path) -> None:
    data = reported(tmp_path, factor)
    (run,) = data["runs"]
    scale = 10 ** data["digits"]
    start = max(data["leastScore"], np.floor(run["threshold"] * scale) / scale)
    assert data["leastScore"] <= start <= run["threshold"]
    assert (run["threshold"] < 0.05) == (factor < 1)
    right = sum(times for there, called, times in run["confusion"] if there == called)
    assert right == sum(run["right"]) > 10
    assert captions(data, 0, start)[0] == right
    assert sum(image["runs"][0]["counts"][0] for image in data["images"]) == right


def test_of_two_runs_the_lower_one_counts(tmp_path: Path) -> None:
    data = reported(tmp_path, 1.0, 0.06)
    assert data["runs"][0]["threshold"] > 0.1
    assert data["leastScore"] == np.floor(data["runs"][1]["threshold"] * 1000) / 1000 < 0.05


def test_what_is_left_out_of_an_image_is_counted_by_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """90 claims within a thousandth are one entry or two, not 90, and count as 90."""
    monkeypatch.setattr(images, "MOST_WRONG", 5)
    data = reported(tmp_path, 1.0, 0.06, strays=90)
    rows = json.loads((tmp_path / "0.json").read_text())
    for run, factor in enumerate((1.0, 0.06)):
        assert all(len(image["runs"][run]["cut"]) < 30 for image in data["images"])
        for score in (data["leastScore"], 0.1, 0.5):
            sure = sum(factor * row["score"] >= score for row in rows)
            assert sum(captions(data, run, score)) == sure
    assert captions(data, 0, 0.1)[1] > 90
