"""The one error a user's input can cause, and the hint that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave is wrong: the message says what, where, the nearest valid value and what to do.

    The tools print it without a traceback and exit with 1.
    """


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return " did you mean 'x'?" for the candidate closest to `word`, or "" when none is close."""
    close = difflib.get_close_matches(str(word), [str(candidate) for candidate in candidates], n=1, cutoff=0.5)
    return f" did you mean '{close[0]}'?" if close else ""
