"""Which images a report shows, what they look like in it, and what becomes of those that can't be read."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from report_cases import noisy_records, shapes, write_images

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from coco_cases import random_case

from detection.data.voc import scan_images
from detection.evaluation.coco import evaluate_coco_fully
from detection.evaluation.coco_matching import coco_arrays
from detection.evaluation.report import images as report_images
from detection.evaluation.report.errors import MISSED, find_errors
from detection.evaluation.report.images import choose_images, tally
from detection.evaluation.report.report import evaluate_coco_files, report_records
from detection.evaluation.results import coco_results
from resbackbone.errors import InputError


def data_of(folder: Path) -> dict[str, Any]:
    text = (folder / "index.html").read_text(encoding="utf-8")
    return json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_many_large_images_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """800 images of noise, the worst that JPEG can meet; what goes beyond the allowance is drawn without a picture."""
    source, draw = shapes(800, size=32), np.random.default_rng(0)
    noise = draw.integers(0, 256, (375, 500, 3), dtype=np.uint8)
    source.annotations.sizes[:] = (375, 500)
    monkeypatch.setattr(type(source), "read_image", lambda self, index: noise)
    path = report_records(tmp_path, source, noisy_records(source), name="run")
    assert 5e6 < path.stat().st_size < 15e6
    images = data_of(tmp_path)["images"]
    assert len(images) == report_images.MOST_IMAGES
    assert {one["note"] for one in images if not one["source"]} == {"left out to keep the page small"}
    assert sum(len(one["source"]) for one in images) < report_images.MOST_BYTES + 200_000


def test_thumbnails_are_the_images(tmp_path: Path) -> None:
    source = shapes(2, size=512)
    report_records(tmp_path, source, noisy_records(source), name="run")
    for one in data_of(tmp_path)["images"]:
        data = base64.b64decode(one["source"].partition(",")[2])
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert picture.shape == (report_images.SIDE_PX, report_images.SIDE_PX, 3)
        index = [source.annotations.file_name(number) for number in range(2)].index(one["name"])
        small = cv2.resize(source.read_image(index), (360, 360), interpolation=cv2.INTER_AREA)
        assert np.abs(picture.astype(int) - small).mean() < 8


def test_images_from_a_folder_and_images_that_are_not_there(tmp_path: Path) -> None:
    source = shapes(5)
    write_images(source, tmp_path / "images")
    (tmp_path / "images" / source.annotations.file_name(1)).unlink()
    (tmp_path / "images" / source.annotations.file_name(2)).write_bytes(b"\x89PNG broken")
    truth = source.annotations.to_coco()
    truth["images"][3]["file_name"] = "../found.json"
    del truth["images"][4]["height"], truth["images"][4]["width"]
    found = write_json(tmp_path / "found.json", coco_results(noisy_records(source), source))
    evaluate_coco_files(write_json(tmp_path / "t.json", truth), found, report=tmp_path, images=tmp_path / "images")
    images = {one["name"]: one for one in data_of(tmp_path)["images"]}
    assert len(images) == 5
    assert images["val_000001"]["source"]
    assert "no such image file" in images["val_000002"]["note"]
    assert "not a readable image" in images["val_000003"]["note"]
    assert "is not inside the image folder" in images["../found.json"]["note"]
    assert min(images["val_000005"]["size"]) > 20  # as far as its boxes reach
    with pytest.raises(InputError, match="there is no such folder; leave it out"):
        evaluate_coco_files(tmp_path / "t.json", found, report=tmp_path, images=tmp_path / "nosuch")


def test_a_voc_devkit_without_images(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "voc_known_answer"
    source, _ = scan_images([(folder, path.stem) for path in sorted((folder / "Annotations").glob("*.xml"))[:3]], need_images=False)
    report_records(tmp_path, source, noisy_records(source), name="run")
    assert all("no such image file" in one["note"] for one in data_of(tmp_path)["images"])


def test_the_images_shown_are_the_worst_and_the_best() -> None:
    source = shapes(120)
    records = noisy_records(source, noise=0.12, mistaken=0.3)
    evaluation = evaluate_coco_fully(source.annotations.to_coco(), coco_results(records, source))
    arrays = coco_arrays(evaluation.truth, evaluation.numbers)
    errors = find_errors(arrays)
    counts = tally(arrays, errors, threshold=0.5)
    chosen = choose_images(arrays, errors, counts, most=60)
    assert len(chosen) == len(set(chosen.tolist())) == 60
    assert (np.diff(counts.quality[chosen]) >= 0).all()
    order = np.argsort(counts.quality, kind="stable")
    assert counts.quality[chosen].min() == counts.quality[order[0]]
    assert (counts.quality[chosen] < counts.quality[order[30]]).sum() == (counts.quality < counts.quality[order[30]]).sum()
    assert counts.quality[chosen].max() == counts.quality.max()
    assert len(choose_images(arrays, errors, counts, most=500)) == 120


def test_of_two_runs_the_images_that_tell_them_apart_are_shown() -> None:
    """The first finds everything in all but the first 10 images; the second misses 30 of the others."""
    source = shapes(200)
    truth = source.annotations.to_coco()
    rows = [{key: one[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for one in truth["annotations"]]
    counts = []
    for missing in (range(1, 11), range(101, 131)):
        evaluation = evaluate_coco_fully(truth, [row for row in rows if row["image_id"] not in missing])
        arrays = coco_arrays(evaluation.truth, evaluation.numbers)
        errors = find_errors(arrays)
        counts.append((arrays, errors, tally(arrays, errors, threshold=0.5)))
    (arrays, errors, first), second = counts[0], counts[1][2]
    differ = set(np.flatnonzero(first.quality != second.quality).tolist())
    alone = set(choose_images(arrays, errors, first, most=80).tolist())
    both = set(choose_images(arrays, errors, first, other=second, most=80).tolist())
    assert len(alone) == len(both) == 80
    assert differ <= both
    assert not differ <= alone


def test_a_rare_error_is_shown_though_its_image_is_middling() -> None:
    """Half of the images find nothing, the others everything, and one of these claims one thing too much."""
    source = shapes(60)
    truth = source.annotations.to_coco()
    rows = [{key: one[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for one in truth["annotations"]]
    rows = [row for row in rows if row["image_id"] > 30]
    stray = {"image_id": 47, "category_id": 2, "bbox": [0.0, 0.0, 2.0, 2.0], "score": 0.6}
    evaluation = evaluate_coco_fully(truth, [*rows, stray])
    arrays = coco_arrays(evaluation.truth, evaluation.numbers)
    errors = find_errors(arrays)
    chosen = choose_images(arrays, errors, tally(arrays, errors, threshold=0.5), most=12)
    assert len(chosen) == 12
    assert (arrays.image_ids[chosen] == 47).sum() == 1


def test_image_counts_add_up() -> None:
    for seed in range(20):
        truth, rows = random_case(seed, "bbox")
        evaluation = evaluate_coco_fully(truth, rows)
        arrays = coco_arrays(evaluation.truth, evaluation.numbers)
        counts = tally(arrays, find_errors(arrays), threshold=0.4)
        objects = [sum(one["image_id"] == number and not one["iscrowd"] for one in truth["annotations"]) for number in arrays.image_ids]
        assert (counts.right + counts.unfound).tolist() == objects
        assert ((counts.quality == 1) == ((counts.wrong == 0) & (counts.unfound == 0))).all()


def test_right_detections_are_never_left_out_and_wrong_ones_still_count(tmp_path: Path) -> None:
    """90 surer claims on nothing stand before the two that find the objects."""
    boxes = [[10.0, 10.0, 20.0, 20.0], [50.0, 50.0, 20.0, 20.0]]
    truth = {
        "images": [{"id": 1, "file_name": "a", "width": 400, "height": 400}],
        "annotations": [
            {"id": n + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 400, "iscrowd": 0} for n, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    strays = [{"bbox": [100.0 + 3 * n, 300.0, 5.0, 5.0], "score": 0.99 - 0.005 * n} for n in range(90)]
    found = [*strays, *({"bbox": box, "score": 0.3 - 0.2 * n} for n, box in enumerate(boxes))]
    rows = [row | {"image_id": 1, "category_id": 1} for row in found]
    evaluate_coco_files(write_json(tmp_path / "t.json", truth), write_json(tmp_path / "d.json", rows), report=tmp_path)
    (image,) = data_of(tmp_path)["images"]
    run = image["runs"][0]
    kinds = [box[6] for box in run["found"]]
    assert (kinds.count(-1), len(kinds)) == (2, report_images.MOST_WRONG + 2)
    assert sum(times for _, times in run["cut"]) == 90 - report_images.MOST_WRONG
    assert {box[7] for box in run["found"] if box[6] == -1} == {0, 1}
    assert run["missed"] == []
    assert min(box[5] for box in run["found"] if box[6] != -1) > max(score for score, _ in run["cut"])


@pytest.mark.parametrize("seed", range(6))
def test_missed_objects_of_the_images_are_those_counted(seed: int, tmp_path: Path) -> None:
    truth, rows = random_case(seed, "bbox")
    evaluate_coco_files(write_json(tmp_path / "t.json", truth), write_json(tmp_path / "d.json", rows), report=tmp_path)
    data = data_of(tmp_path)
    labels = [image["objects"][place][4] for image in data["images"] for place in image["runs"][0]["missed"]]
    assert [labels.count(number) for number in range(len(data["classes"]))] == data["runs"][0]["count"][MISSED]
