"""Only codes of the right size pass; the oracle is pycocotools, which made them."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from detection.data.run_lengths import AT_ONCE, broken_masks


def encoded(mask: np.ndarray) -> dict:
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


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


def test_what_is_not_ascii_never_passes_for_a_digit() -> None:
    """A reader that puts "?" for it would read 15: just the size of a mask of 3 × 5."""
    assert broken_masks(["?", "é", "中", "\ud800"], np.full(4, 15)).tolist() == [1, 2, 3]


def digits(number: int, places: int) -> str:
    return "".join(chr(48 + (number >> 5 * place & 31) + (32 if place < places - 1 else 0)) for place in range(places))


def test_codes_that_pycocotools_cannot_decode_are_found() -> None:
    """-50 in seven digits: its C code shifts 32-bit numbers by 35 bits."""
    start, end = "".join(digits(run, 2) for run in (10, 100, 10)), digits(30, 2)  # the 4th run is 100 - 50, the 5th 10 + 30
    codes = [start + digits(-50, places) + end for places in (6, 7)]
    assert broken_masks(codes, np.full(2, 10 + 100 + 10 + 50 + 40)).tolist() == [1]
    assert coco_mask.decode({"size": [210, 1], "counts": codes[0]}).sum() == 100 + 50


def test_more_masks_than_are_checked_at_once() -> None:
    codes = ["?"] * (AT_ONCE + 7)
    codes[3] = codes[AT_ONCE - 1] = codes[AT_ONCE + 5] = "1"
    assert broken_masks(codes, np.full(len(codes), 15)).tolist() == [3, AT_ONCE - 1, AT_ONCE + 5]
