"""What the charts are drawn from, against COCO's own figures and against slow versions."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from coco_cases import random_case

from detection.evaluation.coco import evaluate_coco_fully
from detection.evaluation.coco_matching import CocoArrays, coco_arrays
from detection.evaluation.report.curves import best_threshold, confusions, precision_recall, size_curve
from detection.evaluation.report.errors import IGNORED, RIGHT, Errors, find_errors


def analysed(seed: int) -> tuple[CocoArrays, Errors]:
    truth, rows = random_case(seed, "bbox")
    draw, categories = np.random.default_rng(seed), [one["id"] for one in truth["categories"]]
    mixed = [row | ({"category_id": int(draw.choice(categories))} if draw.random() < 0.5 else {}) for row in rows]
    evaluation = evaluate_coco_fully(truth, mixed)
    arrays = coco_arrays(evaluation.truth, evaluation.numbers)
    return arrays, find_errors(arrays)


def test_between_cocos_borders_the_size_curve_is_cocos() -> None:
    compared = 0
    for seed in range(60):
        evaluation = evaluate_coco_fully(*random_case(seed, "bbox"), engine="pycocotools")
        aps, counts = size_curve(coco_arrays(evaluation.truth, evaluation.numbers), (0, 32, 96, 100_000))
        theirs = evaluation.precision[0, :, :, 1:, -1].mean(axis=0).T  # (sizes, classes); -1 without objects
        assert ((counts == 0) == (theirs == -1)).all()
        assert np.nan_to_num(aps, nan=-1.0) == pytest.approx(theirs, abs=1e-12)
        compared += (aps > 0).sum()
    assert compared > 50


def test_curves_average_to_the_figures(shared_data: Path) -> None:
    folder = shared_data / "known_answers" / "coco_val2014_100"
    evaluation = evaluate_coco_fully(folder / "instances_val2014_100.json", folder / "instances_val2014_fakebbox100_results.json")
    curves = precision_recall(evaluation.precision)
    assert curves.shape == (3, 101, 80)
    means = np.nanmean(curves, axis=(1, 2))
    assert means == pytest.approx([evaluation.figures[name] for name in ("AP50", "AP75", "AP")], abs=1e-12)
    assert [round(float(mean), 3) for mean in means] == [0.697, 0.573, 0.505]


def test_the_threshold_is_that_of_the_best_f1() -> None:
    for seed in range(40):
        arrays, errors = analysed(seed)
        best, objects = (0.0, 0.5), int((~arrays.object_crowd).sum())
        for score in sorted(set(arrays.score.tolist()), reverse=True):
            shown = errors.kind[(arrays.score >= score) & (errors.kind != IGNORED)]
            right = int((shown == RIGHT).sum())
            f1 = 2 * right / (len(shown) + objects) if len(shown) else 0.0
            if f1 > best[0] + 1e-12:
                best = (f1, score)
        assert best_threshold(arrays, errors) == best[1], seed


def literal_confusions(arrays: CocoArrays, errors: Errors, threshold: float) -> Counter[tuple[int, int]]:
    nothing, table, taken = len(arrays.category_ids), Counter[tuple[int, int]](), set[int]()
    sure = [one for one in range(len(arrays.score)) if arrays.score[one] >= threshold and errors.kind[one] != IGNORED]
    for one in sure:
        if errors.kind[one] == RIGHT:
            taken.add(int(errors.target[one]))
            table[int(arrays.label[one]), int(arrays.label[one])] += 1
    for one in sure:
        if errors.kind[one] == RIGHT:
            continue
        best, best_iou = None, 0.5
        for wanted, iou in zip(
            arrays.pair_object[arrays.pair_detection == one].tolist(), arrays.pair_iou[arrays.pair_detection == one].tolist(), strict=True
        ):
            if wanted not in taken and not arrays.object_crowd[wanted] and (iou > best_iou or (best is None and iou == best_iou)):
                best, best_iou = wanted, iou
        table[nothing if best is None else int(arrays.object_label[best]), int(arrays.label[one])] += 1
        taken |= set() if best is None else {best}
    for wanted in range(len(arrays.object_label)):
        if wanted not in taken and not arrays.object_crowd[wanted]:
            table[int(arrays.object_label[wanted]), nothing] += 1
    return table


def test_the_confusion_matrix() -> None:
    mixed = 0
    for seed in range(60):
        arrays, errors = analysed(seed)
        for threshold in (0.0, 0.5):
            ours = confusions(arrays, errors, threshold=threshold)
            assert ours == dict(literal_confusions(arrays, errors, threshold)), (seed, threshold)
            rows = Counter[int]()
            for (there, _), times in ours.items():
                rows[there] += times
            counted = np.bincount(arrays.object_label[~arrays.object_crowd], minlength=len(arrays.category_ids))
            assert [rows[label] for label in range(len(counted))] == counted.tolist()
            mixed += sum(times for (there, called), times in ours.items() if there != called and max(there, called) < len(counted))
    assert mixed > 50
