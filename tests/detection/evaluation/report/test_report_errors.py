"""Error kinds and their costs against TIDE's definitions written out slowly, against a peer, and by hand."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from coco_cases import random_case

from detection.evaluation.coco import CocoEvaluation, evaluate_coco_fully
from detection.evaluation.coco_matching import IOUS, CocoArrays, coco_arrays, match, precision_at_recalls
from detection.evaluation.report.errors import IGNORED, KINDS, RIGHT, Errors, find_errors

Row = dict[str, Any]
PEER_NAMES = dict(zip(KINDS, ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), strict=True))


def known_answer(shared_data: Path) -> tuple[Row, list[Row]]:
    folder = shared_data / "known_answers" / "coco_val2014_100"
    names = ("instances_val2014_100.json", "instances_val2014_fakebbox100_results.json")
    truth, rows = (json.loads((folder / name).read_text()) for name in names)
    return truth, rows


def analysed(truth: Row, rows: list[Row]) -> tuple[CocoEvaluation, CocoArrays, Errors]:
    evaluation = evaluate_coco_fully(truth, rows, engine="pycocotools")
    arrays = coco_arrays(evaluation.truth, evaluation.numbers)
    return evaluation, arrays, find_errors(arrays)


# ---- slow and literal


def iou(a: list[float], b: list[float], *, b_is_crowd: bool = False) -> float:
    wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    tall = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if wide <= 0 or tall <= 0:
        return 0.0
    both = wide * tall
    return both / (a[2] * a[3] if b_is_crowd else a[2] * a[3] + b[2] * b[3] - both)


def literal_kinds(truth: Row, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """(detections that count, with "kind" and "after"; objects, with "missed"), image by image, class by class."""
    detections: list[Row] = []
    objects = [one | {"by": None, "wanted": False} for one in truth["annotations"]]
    for image in truth["images"]:
        here = [one for one in objects if one["image_id"] == image["id"]]
        real = [one for one in here if not one["iscrowd"]]
        found: list[Row] = []
        for category in truth["categories"]:
            own = [dict(row) for row in rows if (row["image_id"], row["category_id"]) == (image["id"], category["id"])]
            found += sorted(own, key=lambda row: -row["score"])[:100]
        found.sort(key=lambda row: -row["score"])
        for row in found:
            row["kind"] = literal_match(row, here)
        for row in found:
            if row["kind"] is None:
                literal_kind(row, real)
        detections += found
    for one in objects:
        one["missed"] = not one["iscrowd"] and one["by"] is None and not one["wanted"]
    return detections, objects


def literal_match(row: Row, here: list[Row]) -> str | None:
    best, best_iou = None, 0.5
    for one in here:
        overlap = iou(row["bbox"], one["bbox"])
        if not one["iscrowd"] and one["category_id"] == row["category_id"] and one["by"] is None and overlap >= best_iou:
            best, best_iou = one, overlap
    if best is not None:
        best["by"] = row
        return "right"
    crowds = [one for one in here if one["iscrowd"] and one["category_id"] == row["category_id"]]
    return "ignored" if any(iou(row["bbox"], one["bbox"], b_is_crowd=True) >= 0.5 for one in crowds) else None


def literal_kind(row: Row, real: list[Row]) -> None:
    own = [(iou(row["bbox"], one["bbox"]), one) for one in real if one["category_id"] == row["category_id"]]
    other = [(iou(row["bbox"], one["bbox"]), one) for one in real if one["category_id"] != row["category_id"]]
    own_iou, own_object = max(own, key=lambda pair: pair[0], default=(0.0, None))
    other_iou, other_object = max(other, key=lambda pair: pair[0], default=(0.0, None))
    if 0.1 <= own_iou < 0.5:
        row["kind"], row["after"] = "localisation", own_object
    elif other_iou >= 0.5:
        row["kind"], row["after"] = "classification", other_object
    elif own_iou >= 0.5:
        row["kind"] = "duplicate"
    elif max(own_iou, other_iou) < 0.1:
        row["kind"] = "background"
    else:
        row["kind"] = "both"
    if row["kind"] in ("localisation", "classification"):
        after = row["after"]
        if after["by"] is None:
            row["mends"] = not after["wanted"]  # the surest comes first
            after["wanted"] = True


def literal_ap(points: list[tuple[float, bool]], objects: int) -> float | None:
    if not objects:
        return None
    precisions, recalls, right = [], [], 0
    for n, (_, is_right) in enumerate(points, 1):
        right += is_right
        precisions.append(right / n)
        recalls.append(right / objects)
    total = 0.0
    for step in np.linspace(0.0, 1.0, 101):  # COCO's own floats: 0.7 is not among them
        total += max((p for p, r in zip(precisions, recalls, strict=True) if r >= step), default=0.0)
    return total / 101


def literal_aps(truth: Row, detections: list[Row], objects: list[Row], mended: str | None) -> list[float | None]:
    aps = []
    for category in truth["categories"]:
        points = []
        for row in detections:
            is_mended = row["kind"] == mended and row.get("mends", False)
            label = row["after"]["category_id"] if is_mended else row["category_id"]
            if label == category["id"] and row["kind"] != "ignored" and (is_mended or row["kind"] != mended):
                points.append((row["score"], row["kind"] == "right" or is_mended))
        own = [one for one in objects if one["category_id"] == category["id"] and not one["iscrowd"]]
        left = [one for one in own if not (mended == "missed" and one["missed"])]
        points.sort(key=lambda point: -point[0])
        aps.append(None if not own else literal_ap(points, len(left)) or 0.0)
    return aps


def by_id(truth: Row) -> Row:
    """Images and categories in the order of their ids, the order among equal scores."""
    return truth | {key: sorted(truth[key], key=lambda one: one["id"]) for key in ("images", "categories")}


def assert_same(truth: Row, rows: list[Row]) -> np.ndarray:
    """Compare with the literal version; returns the counts of each kind."""
    truth = by_id(truth)
    _, arrays, errors = analysed(truth, rows)
    detections, objects = literal_kinds(truth, rows)
    names = {RIGHT: "right", IGNORED: "ignored"} | dict(enumerate(KINDS))
    columns = (arrays.image, arrays.label, arrays.score, arrays.box)
    keys = zip(*(column.tolist() for column in columns), (names[kind] for kind in errors.kind.tolist()), strict=True)
    ours = sorted((arrays.image_ids[i], arrays.category_ids[label], score, box, kind) for i, label, score, box, kind in keys)
    theirs = sorted((row["image_id"], row["category_id"], row["score"], row["bbox"], row["kind"]) for row in detections)
    assert ours == theirs
    assert errors.missed.tolist() == [one["missed"] for one in objects]
    base = literal_aps(truth, detections, objects, None)
    assert_close(errors.ap, base)
    for number, kind in enumerate(KINDS):
        mended = literal_aps(truth, detections, objects, kind)
        gains = [None if one is None or before is None else one - before for one, before in zip(mended, base, strict=True)]
        assert_close(errors.cost[number], gains)
    return errors.counts(arrays.label, arrays.object_label, len(arrays.category_ids)).sum(axis=1)


def assert_close(ours: np.ndarray, theirs: list[float | None]) -> None:
    assert ours == pytest.approx(np.array([np.nan if one is None else one for one in theirs]), abs=1e-9, nan_ok=True)


def untied(truth: Row, rows: list[Row], seed: int) -> tuple[Row, list[Row]]:
    """All scores different: TIDE leaves open which of two equal ones is mended first."""
    scores = (np.random.default_rng(seed).permutation(len(rows)) + 1.0) / (len(rows) + 1)
    return truth, [row | {"score": float(score)} for row, score in zip(rows, scores, strict=True)]


def test_random_cases_are_those_of_the_definitions() -> None:
    total = np.zeros(6)
    for seed in range(60):
        truth, rows = untied(*random_case(seed, "bbox"), seed)
        if len(rows) <= 150:  # the literal version is slow
            total += assert_same(truth, rows)
    assert total.min() > 15, dict(zip(KINDS, total, strict=True))


def test_the_coco_known_answer(shared_data: Path) -> None:
    truth, rows = known_answer(shared_data)
    counts = assert_same(truth, rows)
    assert dict(zip(KINDS, counts.tolist(), strict=True)) == {
        "classification": 83,
        "localisation": 1,
        "both": 0,
        "duplicate": 1,
        "background": 0,
        "missed": 97,
    }


def peer_errors(evaluation: CocoEvaluation) -> Row:
    hotcoco = pytest.importorskip("hotcoco")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = hotcoco.COCO(evaluation.truth)
        judged = hotcoco.COCOeval(coco, coco.load_res(evaluation.numbers), "bbox")
        judged.evaluate()
        return judged.tide_errors()


def assert_is_the_peers(truth: Row, rows: list[Row]) -> None:
    evaluation, arrays, errors = analysed(truth, rows)
    theirs = peer_errors(evaluation)
    counts = errors.counts(arrays.label, arrays.object_label, len(arrays.category_ids)).sum(axis=1)
    for number, kind in enumerate(KINDS):
        assert counts[number] == theirs["counts"][PEER_NAMES[kind]], kind
        if not np.isnan(errors.ap).all():
            assert max(np.nanmean(errors.cost[number]), 0.0) == pytest.approx(theirs["delta_ap"][PEER_NAMES[kind]], abs=1e-12), kind


def test_hotcocos_figures_are_ours(shared_data: Path) -> None:
    """Where its conventions and ours are one: without crowds, and without an IoU of just 0.5 or 0.1."""
    assert_is_the_peers(*known_answer(shared_data))
    for seed in range(60):
        truth, rows = untied(*random_case(seed, "bbox"), seed)
        draw = np.random.default_rng(seed)
        moved = [
            one | {"iscrowd": 0, "bbox": (np.array(one["bbox"]) + 0.01 + 0.3 * draw.random(4)).tolist()} for one in truth["annotations"]
        ]
        found = [row | {"bbox": (np.array(row["bbox"]) + 0.01 + 0.3 * draw.random(4)).tolist()} for row in rows]
        if rows:
            assert_is_the_peers(truth | {"annotations": moved}, found)


def test_the_matching_is_cocos() -> None:
    """Every precision of every class at every IoU, to the last bit."""
    compared = 0
    for seed in range(40):
        truth, rows = random_case(seed, "bbox")
        evaluation, arrays, _ = analysed(truth, rows)
        for number, threshold in enumerate(IOUS.tolist()):
            found = match(arrays, iou=threshold)
            is_ignored = np.append(arrays.object_crowd, False)[found]
            for label in range(len(arrays.category_ids)):
                objects = int((~arrays.object_crowd[arrays.object_label == label]).sum())
                theirs = evaluation.precision[number, :, label, 0, -1]
                if objects:
                    ours = precision_at_recalls(found[(arrays.label == label) & ~is_ignored] >= 0, objects=objects)
                    assert (ours == theirs).all(), (seed, threshold, label)
                    compared += 1
                else:
                    assert (theirs == -1).all()
    assert compared > 500


def test_one_error_of_each_kind_by_hand() -> None:
    """One image, cats (1) and dogs (2), squares of 10 pixels side by side, 20 apart."""

    def square(number: int, shift: float = 0.0) -> list[float]:
        return [20.0 * number + shift, 0.0, 10.0, 10.0]

    objects = [(1, 0), (1, 1), (1, 2), (2, 3), (1, 4), (2, 5)]
    truth = {
        "images": [{"id": 7}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": n, "image_id": 7, "category_id": category, "bbox": square(place), "area": 100.0, "iscrowd": 0}
            for n, (category, place) in enumerate(objects, 1)
        ],
    }
    wanted = [
        (1, square(0), "right"),
        (1, square(0, 1.0), "duplicate"),
        (1, square(1, 5.0), "localisation"),  # IoU 1/3
        (2, square(2), "classification"),
        (1, square(3, 5.0), "both"),
        (1, square(9), "background"),
        (2, square(9), "background"),
    ]
    rows = [{"image_id": 7, "category_id": label, "bbox": box, "score": 0.9 - 0.1 * n} for n, (label, box, _) in enumerate(wanted)]
    _, arrays, errors = analysed(truth, rows)
    assert [KINDS[kind] if kind >= 0 else "right" for kind in errors.kind.tolist()] == [kind for _, _, kind in wanted]
    assert errors.missed.tolist() == [False, False, False, True, True, True]
    assert errors.target.tolist() == [0, 0, 1, 2, 3, -1, -1]
    # Cats: 4 objects, found right, duplicate, localisation, both, background. AP50 = 26/101: recall 0.25 at precision 1.
    assert errors.ap[0] == pytest.approx(26 / 101)
    # With the place mended, recall 0.5 at precision 2/3; with the class, a right one more at rank 4 of 6: precision 1/2.
    assert errors.cost[KINDS.index("localisation"), 0] == pytest.approx(25 * (2 / 3) / 101)
    assert errors.cost[KINDS.index("classification"), 0] == pytest.approx(25 * 0.5 / 101)
    assert errors.cost[KINDS.index("missed"), 0] == pytest.approx((34 - 26) / 101)  # one cat of four is missed: recall 1/3
    assert errors.cost[KINDS.index("duplicate"), 0] == 0.0
    assert errors.counts(arrays.label, arrays.object_label, 2).tolist() == [[0, 1], [1, 0], [1, 0], [1, 0], [1, 1], [1, 2]]


def test_nothing_found_and_nothing_there() -> None:
    truth, _ = random_case(0, "bbox")
    _, arrays, errors = analysed(truth, [])
    assert errors.missed.tolist() == (~arrays.object_crowd).tolist()
    assert np.nan_to_num(errors.ap).tolist() == [0.0] * len(errors.ap)
    _, _, nothing = analysed(truth | {"annotations": []}, [])
    assert np.isnan(nothing.ap).all()
    assert np.isnan(nothing.cost).all()
