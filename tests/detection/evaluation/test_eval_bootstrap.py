"""Counting an image twice is the same as having it twice: the bootstrap against one that copies images, rows and objects by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_cases import copied_voc, random_case

from detection.evaluation.bootstrap import (
    LEAST_DRAWS,
    WORK,
    ClassVerdicts,
    Verdicts,
    affordable_draws,
    class_aps,
    coco_verdicts,
    compare_aps,
    draws,
    interval_of,
    mean_ap,
    mean_aps,
    paired_bootstrap,
    voc_verdicts,
)
from detection.evaluation.coco import evaluate_coco
from detection.evaluation.evaluate import voc_truth
from detection.evaluation.voc import evaluate_voc
from detection.evaluation.voc_files import annotated_images
from resbackbone.errors import InputError

Rows = list[dict[str, Any]]


def untied(truth: dict[str, Any], rows: Rows, seed: int) -> tuple[dict[str, Any], Rows]:
    """Different scores, as the order among equals depends on where copies stand; images in the order of their ids."""
    scores = np.random.default_rng(seed).permutation(len(rows)) / max(len(rows), 1)
    images = sorted(truth["images"], key=lambda one: one["id"])
    return truth | {"images": images}, [row | {"score": float(score)} for row, score in zip(rows, scores, strict=True)]


def copied(truth: dict[str, Any], rows: Rows, times: np.ndarray) -> tuple[dict[str, Any], Rows]:
    """The data set with image i there times[i] times, each copy an image of its own."""
    images, objects, found = [], [], []
    for image, count in zip(truth["images"], times.tolist(), strict=True):
        for copy in range(count):
            number = image["id"] + 1000 * copy
            images.append(image | {"id": number})
            mine = [one for one in truth["annotations"] if one["image_id"] == image["id"]]
            objects += [one | {"image_id": number, "id": len(objects) + n} for n, one in enumerate(mine, 1)]
            found += [row | {"image_id": number} for row in rows if row["image_id"] == image["id"]]
    return truth | {"images": images, "annotations": objects}, found


def test_a_coco_image_counted_twice_is_an_image_copied() -> None:
    compared = 0
    for seed in range(40):
        truth, rows = untied(*random_case(seed, "bbox"), seed)
        times = np.random.default_rng(seed).integers(0, 4, len(truth["images"]))
        expected = evaluate_coco(*copied(truth, rows, times)) if times.any() else {"AP": -1.0}
        if expected["AP"] >= 0:
            for name, ious in (("AP", np.linspace(0.5, 0.95, 10).tolist()), ("AP50", [0.5])):
                assert mean_ap(coco_verdicts(truth, rows, ious=ious), times) == pytest.approx(expected[name], abs=1e-12), seed
            compared += expected["AP"] > 0
    assert compared > 20


@pytest.mark.parametrize("metric", ["area", "11-point"])
def test_a_voc_image_counted_twice_is_an_image_copied(shared_data: Path, metric: Any) -> None:
    folder = shared_data / "voc_known_answer"
    source = annotated_images(folder, "test")
    truth = voc_truth(source)
    rows = [row | {"score": 1.0 / (2 + n)} for n, row in enumerate(_voc_rows(folder))]
    times = np.random.default_rng(0).integers(0, 3, len(truth.image_ids))
    result = evaluate_voc(*copied_voc(truth, rows, times))
    expected = result.map_area if metric == "area" else result.map_11_point
    assert 0.2 < expected < 0.9
    assert mean_ap(voc_verdicts(truth, rows, metric=metric), times) == pytest.approx(expected, abs=1e-12)
    whole = evaluate_voc(truth, rows)
    once = mean_ap(voc_verdicts(truth, rows, metric=metric), np.ones_like(times))
    assert once == pytest.approx(whole.map_area if metric == "area" else whole.map_11_point, abs=1e-12)


def _voc_rows(folder: Path) -> Rows:
    return json.loads((folder / "detections.json").read_text())


def known_answer(shared_data: Path) -> tuple[Path, Path]:
    folder = shared_data / "known_answers" / "coco_val2014_100"
    return folder / "instances_val2014_100.json", folder / "instances_val2014_fakebbox100_results.json"


def test_intervals_are_those_of_resampling_by_hand(shared_data: Path) -> None:
    truth, rows = known_answer(shared_data)
    first = coco_verdicts(truth, rows, ious=[0.5])
    second = coco_verdicts(truth, rows, ious=[0.75])  # another figure of the same images stands for another detector
    found = paired_bootstrap(first, second, resamples=50, seed=3, level=0.8)
    draw = np.random.default_rng(3)
    gains = []
    for _ in range(50):
        times = np.bincount(draw.integers(0, 100, 100), minlength=100)
        gains.append(mean_ap(second, times) - mean_ap(first, times))
    shift = np.mean(gains) - found.difference.value
    assert found.difference.low == pytest.approx(np.quantile(gains, 0.1) - shift)
    assert found.difference.high == pytest.approx(np.quantile(gains, 0.9) - shift)
    assert found.difference.value == pytest.approx(0.573 - 0.697, abs=1e-3)
    assert found.share_better == 0.0
    assert found.first.low < found.first.value < found.first.high


def test_pairing_matters(shared_data: Path) -> None:
    """The same detector beside itself differs by nothing at all, however wide each interval is."""
    run = coco_verdicts(*known_answer(shared_data), ious=[0.5])
    same = paired_bootstrap(run, run, resamples=20)
    assert (same.difference.value, same.difference.low, same.difference.high, same.share_better) == (0.0, 0.0, 0.0, 0.5)
    assert same.first.high - same.first.low > 0.03


def test_a_real_gain_is_told_from_none() -> None:
    """All true boxes against two thirds of them, and these against another two thirds."""
    draw = np.random.default_rng(0)
    images = [{"id": n + 1} for n in range(80)]
    objects = [
        {"id": n + 1, "image_id": n % 80 + 1, "category_id": 1, "bbox": [10.0 * (n // 80), 5.0, 9.0, 9.0], "area": 81.0, "iscrowd": 0}
        for n in range(240)
    ]
    truth = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "a"}]}
    rows = [{"image_id": one["image_id"], "category_id": 1, "bbox": one["bbox"], "score": float(draw.random())} for one in objects]
    fewer, other = ([rows[n] for n in draw.permutation(240)[:160]] for _ in range(2))
    runs = [coco_verdicts(truth, some, ious=[0.5]) for some in (fewer, rows, other)]
    assert paired_bootstrap(runs[0], runs[1], resamples=200).difference.low > 0.1
    between = paired_bootstrap(runs[0], runs[2], resamples=200).difference
    assert between.low < 0 < between.high


def simulated(draw: np.random.Generator, images: int) -> Verdicts:
    """A poor detector's verdicts on new images: 8 classes, some rare; right boxes score higher than wrong ones."""
    entries = []
    for label in range(8):
        objects = draw.poisson(0.03 * (1 + label), images)
        is_found = [draw.random(count) < 0.5 for count in objects]
        right = np.repeat(np.arange(images), [int(found.sum()) for found in is_found])
        wrong = draw.integers(0, images, images // 4)
        score = np.concatenate((draw.normal(0.7, 1.0, len(right)), draw.normal(0.0, 1.0, len(wrong))))
        order = np.argsort(-score)
        is_true = np.arange(len(score)) < len(right)
        entries.append(ClassVerdicts(image=np.concatenate((right, wrong))[order], is_true=is_true[order], objects=objects))
    return Verdicts(metric="coco", entries=tuple(entries))


def test_intervals_of_one_run_hold_what_other_test_sets_give_on_average() -> None:
    draw, images, sets = np.random.default_rng(0), 300, 60
    found = []
    for _ in range(sets):
        run = simulated(draw, images)
        found.append(paired_bootstrap(run, run, resamples=120, seed=int(draw.integers(1 << 30))).first)
    truth = np.mean([mean_ap(simulated(draw, images), np.ones(images, dtype=np.int16)) for _ in range(400)])
    held = sum(one.low <= truth <= one.high for one in found)
    assert held >= 0.88 * sets, held


def one_class(images: int, found: dict[int, list[bool]], objects: dict[int, int]) -> Verdicts:
    """A class with `objects` in some of the images, and detections in this order of score, right or wrong."""
    places = np.array([place for place, verdicts in found.items() for _ in verdicts], dtype=np.int64)
    is_true = np.array([one for verdicts in found.values() for one in verdicts], dtype=bool)
    counts = np.zeros(images, dtype=np.int64)
    counts[list(objects)] = list(objects.values())
    return Verdicts(metric="coco", entries=(ClassVerdicts(image=places, is_true=is_true, objects=counts),))


def test_draws_without_an_object_of_the_class_tell_nothing() -> None:
    """Six of 20 images have the class; the other run finds it in each, the first in none: every draw that has it says 1."""
    objects = dict.fromkeys(range(0, 18, 3), 1)
    nothing, everything = one_class(20, {}, objects), one_class(20, {n: [True] for n in objects}, objects)
    times = draws(20, resamples=4000)
    lacking = (times[:, list(objects)].sum(axis=1) == 0).sum()
    assert lacking >= 2
    gain = compare_aps(class_aps(nothing, times), class_aps(everything, times), level=1.0).difference
    assert (gain.value, gain.low, gain.high) == pytest.approx((1.0, 1.0, 1.0), abs=1e-12)
    assert np.isnan(class_aps(nothing, times)).sum() == lacking
    assert (mean_aps(everything, times) == 0).sum() == lacking
    alone = compare_aps(*[class_aps(everything, times)] * 2)
    assert (alone.first.low, alone.share_better) == pytest.approx((1.0, 0.5), abs=1e-12)


def test_draws_without_a_figure_are_left_out_literally() -> None:
    draw = np.random.default_rng(4)
    values = draw.normal(0.1, 0.02, 200)
    values[draw.permutation(np.arange(1, 200))[:50]] = np.nan
    kept = [one for one in values[1:].tolist() if one == one]
    shift = sum(kept) / len(kept) - values[0]
    found, share = interval_of(values, 0.9)
    assert len(kept) == 149
    assert (found.low, found.high) == pytest.approx((np.quantile(kept, 0.05) - shift, np.quantile(kept, 0.95) - shift), abs=1e-12)
    assert share == 1.0


def test_ends_stay_where_figures_can_be() -> None:
    """Of draws that, moved to the figure, lie below 0 and above 1 in part."""
    draw = np.random.default_rng(0)
    poor, good = (np.append(value, draw.choice(aps, 300))[None] for value, aps in ((0.1, [0.0, 0.2, 0.4]), (0.95, [0.5, 0.9, 1.0])))
    found = compare_aps(poor, good)
    ends = {}
    for name, values in (("poor", poor[0]), ("good", good[0]), ("gain", good[0] - poor[0])):
        moved = values[1:] - values[1:].mean() + values[0]
        ends[name] = (np.quantile(moved, 0.025), np.quantile(moved, 0.975))
    assert ends["poor"][0] < -0.05
    assert min(ends["good"][1], ends["gain"][1]) > 1.05
    assert (found.first.low, found.first.high) == pytest.approx((0.0, ends["poor"][1]), abs=1e-12)
    assert (found.second.low, found.second.high) == pytest.approx((ends["good"][0], 1.0), abs=1e-12)
    assert (found.difference.low, found.difference.high) == pytest.approx((ends["gain"][0], 1.0), abs=1e-12)
    loss = compare_aps(good, poor).difference
    assert (loss.low, loss.high) == pytest.approx((-1.0, -ends["gain"][0]), abs=1e-12)


def test_draws_are_fewer_where_many_would_take_minutes() -> None:
    run = simulated(np.random.default_rng(1), 300)
    rows = sum(len(entry.image) for entry in run.entries)
    assert affordable_draws(run) == 1000
    many = Verdicts(metric="coco", entries=run.entries * (WORK // (500 * rows)))
    assert 480 < affordable_draws(many) < 520
    assert affordable_draws(Verdicts(metric="coco", entries=many.entries * 50)) == LEAST_DRAWS
    assert affordable_draws(many, most=30) == 30


def test_runs_on_other_images_are_refused(shared_data: Path) -> None:
    run = coco_verdicts(*known_answer(shared_data), ious=[0.5])
    truth, rows = random_case(2, "bbox")
    with pytest.raises(InputError, match="on 100 images by the metric coco"):
        paired_bootstrap(run, coco_verdicts(truth, rows))
    nothing = coco_verdicts({"images": [], "annotations": [], "categories": []}, [])
    with pytest.raises(InputError, match="on the same images, at least two"):
        paired_bootstrap(nothing, nothing)
    single = one_class(1, {0: [True]}, {0: 1})
    with pytest.raises(InputError, match=r"runs on 1 images .* at least two"):
        paired_bootstrap(single, single)
