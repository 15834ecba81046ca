"""What a run says and draws at its end, and before it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from resbackbone.classification.finish import draw_curves, report_unreadable
from resbackbone.runtime import distributed


def test_curves_are_drawn_from_what_there_is(tmp_path: Path) -> None:
    rows = [{"step": 1, "train_error": 0.9}, {"step": 2, "eval/error": 0.8}, {"step": 2, "train_error": 0.7}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    first = draw_curves(tmp_path).read_bytes()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert draw_curves(tmp_path).read_bytes() != first
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "curves.png"}


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ([0], []),
        ([3], ["3 training images could not be read; others took their place"]),
        ([0, 2], ["2 training images could not be read; others took their place (each of 2 processes counts those it met)"]),
    ],
)
def test_unreadable_images_of_all_processes_are_told(counts: list[int], said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(distributed, "gather_objects", lambda item: counts)
    report_unreadable(SimpleNamespace(message=lines.append), SimpleNamespace(unreadable=lambda: counts[0]))  # type: ignore[arg-type]
    assert lines == said
