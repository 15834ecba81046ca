"""Whether compressed run-length masks are what they say. COCO's C code believes them: a bad one makes it loop or write beyond its memory.

The code (the COCO API's maskApi.c): runs of 0 and 1 in turn, down the columns. A run is a signed number in digits of 5 bits, least
first, each a character from "0" on, with 32 added where more follow; from the fourth run on it is the difference to the last but one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

AT_ONCE = 20_000  # masks checked together; all of a large split would take gigabytes
MOST_DIGITS = 7  # 35 bits: more pixels than any image


def broken_masks(counts: Sequence[str], pixels: np.ndarray) -> np.ndarray:
    """Positions of codes that are no sequence of runs ≥ 0 adding up to `pixels` (N,) int64, the height × width of each mask."""
    bad = [start + _broken(counts[start : start + AT_ONCE], pixels[start : start + AT_ONCE]) for start in range(0, len(counts), AT_ONCE)]
    return np.concatenate(bad) if bad else np.zeros(0, np.int64)


def _broken(counts: Sequence[str], pixels: np.ndarray) -> np.ndarray:
    lengths = np.array([len(text) for text in counts])
    characters = np.frombuffer("".join(counts).encode("ascii", "replace"), np.uint8).astype(np.int64) - 48
    mask_of = np.repeat(np.arange(len(counts)), lengths)
    is_last = (characters & 32) == 0
    is_bad = np.bincount(mask_of[(characters < 0) | (characters > 63)], minlength=len(counts)) > 0
    full = np.flatnonzero(lengths > 0)
    is_bad[full] |= ~is_last[np.cumsum(lengths)[full] - 1]
    keep = ~is_bad[mask_of]
    runs, run_of, digits = _runs(characters[keep], mask_of[keep], is_last[keep])
    is_bad[run_of[digits > MOST_DIGITS]] = True
    lengths_of_runs = _undo_differences(runs, run_of)
    is_bad[run_of[lengths_of_runs < 0]] = True
    totals = np.bincount(run_of, weights=lengths_of_runs, minlength=len(counts))
    return np.flatnonzero(is_bad | (totals != pixels))


def _runs(characters: np.ndarray, mask_of: np.ndarray, is_last: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(signed number, its mask, how many digits) of each run; every mask's characters end a number."""
    ends = np.flatnonzero(is_last)
    starts = np.concatenate(([0], ends[:-1] + 1)) if len(ends) else ends
    digits = ends - starts + 1
    place = np.minimum(np.arange(len(characters)) - np.repeat(starts, digits), MOST_DIGITS)
    if not len(ends):
        return ends, ends, ends
    values = np.add.reduceat((characters & 31) << (5 * place), starts)
    negative = (characters[ends] & 16) != 0
    return values - (negative.astype(np.int64) << (5 * np.minimum(digits, MOST_DIGITS + 1))), mask_of[ends], digits


def _undo_differences(runs: np.ndarray, run_of: np.ndarray) -> np.ndarray:
    """Each run's length: from its mask's fourth run on, what it says added to the last but one."""
    if not len(runs):
        return runs
    first = np.searchsorted(run_of, run_of, side="left")
    number = np.arange(len(runs)) - first
    # Sums along three chains a mask: run 0 alone; 1, 3, 5 …; 2, 4, 6 …
    chain = 3 * run_of + np.where(number == 0, 0, 2 - number % 2)
    order = np.argsort(chain, kind="stable")
    sums = np.cumsum(runs[order])
    begins = np.searchsorted(chain[order], chain[order], side="left")
    lengths = np.empty_like(runs)
    lengths[order] = sums - np.where(begins > 0, sums[begins - 1], 0)
    return lengths
