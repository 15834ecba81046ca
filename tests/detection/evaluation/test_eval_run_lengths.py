"""Only codes of the right size pass; the oracle is pycocotools, which made them."""

from __future__ import annotations

import numpy as np
import pytest
from coco_cases import encoded

from detection.evaluation.run_lengths import broken_masks


def masks_of_all_kinds() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = [(1, 1), (3, 5), (40, 70), (200, 300), (1, 5000)]
    masks = [draw.random(shape) < density for shape in shapes for density in (0.0, 0.02, 0.5, 0.98, 1.0)]
    return [*masks, np.tri(100, 80, dtype=bool)]


def test_pycocotools_own_codes_pass() -> None:
    masks = masks_of_all_kinds()
    pixels = np.array([mask.size for mask in masks])
    counts = [encoded(mask)["counts"] for mask in masks]
    assert broken_masks(counts, pixels).tolist() == []
    assert broken_masks(counts, pixels + 1).tolist() == list(range(len(masks)))


def test_large_masks_pass() -> None:
    mask = np.zeros((3000, 4000), dtype=bool)
    mask[1000:2000, 5:3990] = True
    assert broken_masks([encoded(mask)["counts"]], np.array([mask.size])).tolist() == []


@pytest.mark.parametrize("counts", ["zzzz", "é", "", "0000", "P", "ooooooooooooooooo0", "\x00", "9 9", "VQi31m>0O2N", "OO"])
def test_broken_codes_are_found_among_good_ones(counts: str) -> None:
    good = encoded(np.eye(6, dtype=bool))["counts"]
    assert broken_masks([good, counts, good], np.array([36, 36, 36])).tolist() == [1]


def test_nothing_is_fine() -> None:
    assert broken_masks([], np.zeros(0, np.int64)).tolist() == []


def test_cut_codes_are_found() -> None:
    draw = np.random.default_rng(1)
    codes = [encoded(draw.random((30, 40)) < 0.3)["counts"] for _ in range(50)]
    cut = [code[: len(code) - draw.integers(1, 4)] for code in codes]
    assert len(broken_masks(cut, np.full(50, 1200))) == 50
