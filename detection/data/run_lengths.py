"""Whether compressed run-length masks are what they say. COCO's C code believes them: a bad one makes it loop or write beyond its memory.

The code (the COCO API's maskApi.c): runs of 0 and 1 in turn, down the columns. A run is a signed number in digits of 5 bits, least
first, each a character from "0" on, with 32 added where more follow; from the fourth run on it is the difference to the last but one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arrays import offsets_of

AT_ONCE = 20_000  # masks checked together; all of a large split would take gigabytes
MOST_DIGITS = 6  # 30 bits: runs of 536 million pixels, more than images.MAX_PIXELS; with a seventh, C's shifts of 32-bit numbers overflow


def broken_masks(counts: Sequence[str], pixels: np.ndarray) -> np.ndarray:
    """Positions of codes that are no sequence of runs ≥ 0 adding up to `pixels` (N,) int64, the height × width of each mask."""
    # A character beyond ASCII is two bytes or more here, none of which is a digit; "replace" would make it "?", which is one.
    codes = [text.encode("utf-8", "surrogatepass") for text in counts]
    return broken_codes(np.frombuffer(b"".join(codes), np.uint8), offsets_of([len(code) for code in codes]), pixels)


def broken_codes(characters: np.ndarray, offsets: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The same for codes that are packed: code i is characters[offsets[i] : offsets[i + 1]], uint8."""
    bad = []
    for start in range(0, len(pixels), AT_ONCE):
        ends = offsets[start : start + AT_ONCE + 1]
        bad.append(start + _broken(characters[ends[0] : ends[-1]].astype(np.int64) - 48, np.diff(ends), pixels[start : start + AT_ONCE]))
    return np.concatenate(bad) if bad else np.zeros(0, np.int64)


def _broken(characters: np.ndarray, lengths: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    mask_of = np.repeat(np.arange(len(lengths)), lengths)
    is_last = (characters & 32) == 0
    is_bad = np.bincount(mask_of[(characters < 0) | (characters > 63)], minlength=len(lengths)) > 0
    full = np.flatnonzero(lengths > 0)
    is_bad[full] |= ~is_last[np.cumsum(lengths)[full] - 1]
    keep = ~is_bad[mask_of]
    runs, run_of, digits = _runs(characters[keep], mask_of[keep], is_last[keep])
    is_bad[run_of[digits > MOST_DIGITS]] = True
    lengths_of_runs = _undo_differences(runs, run_of)
    is_bad[run_of[lengths_of_runs < 0]] = True
    totals = np.bincount(run_of, weights=lengths_of_runs, minlength=len(lengths))
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
    is_first = np.diff(run_of, prepend=-1) != 0
    first = np.flatnonzero(is_first)
    times = np.diff(first, append=len(runs))
    # Two runs a line, each mask from a line of its own: 1, 3, 5 … are sums down one column, 2, 4, 6 … down the other, 0 is in neither.
    lines = (times + 1) // 2
    first_line = np.cumsum(lines) - lines
    place = np.arange(len(runs)) + np.repeat(2 * first_line - first, times)
    table = np.zeros((int(lines.sum()) + 1, 2), np.int64)  # a line of zeros above the first mask
    table.reshape(-1)[place + 2] = np.where(is_first, 0, runs)
    sums = table.cumsum(axis=0)
    lengths = (sums[1:] - np.repeat(sums[first_line], lines, axis=0)).reshape(-1)[place]
    return np.where(is_first, runs, lengths)
