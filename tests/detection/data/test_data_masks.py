"""Segmentations that COCO's C code could not draw are found before it sees them, each by its annotation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from detection.data import coco, load_source
from detection.data.masks import compress_counts
from detection.data.problems import ProblemLog
from resbackbone.errors import InputError


def masks_of(root: Path, segmentations: list) -> ProblemLog:
    """What is found where object i of split `train` has the i-th of these (as JSON text where it is bytes), and the source, which draws."""
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    for number, one in enumerate(content["annotations"]):
        one["segmentation"] = f"mask {number}"
    text = json.dumps(content).encode()
    for number, one in enumerate(segmentations):
        text = text.replace(b'"mask %d"' % number, one if isinstance(one, bytes) else json.dumps(one).encode())
    path.write_bytes(text)
    source, log = coco.scan(root, "train", masks=True)
    assert source is not None
    for box in range(len(source.annotations.labels)):
        assert source.annotations.mask(box, 228, 320).max() <= 1
    return log


SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
SIZE = {"size": [228, 320]}
# segmentation -> words, for what COCO's C code would loop at, end the process with, or make garbage of
BAD_MASKS: list[tuple[object, str]] = [
    (SIZE | {"counts": "zzzzzzzzzzzz"}, "counts are no run-length code of 228 × 320 pixels"),
    (SIZE | {"counts": "5"}, "counts are no run-length code"),
    (SIZE | {"counts": "o"}, "counts are no run-length code"),
    (SIZE | {"counts": ""}, "nothing in counts"),
    (SIZE | {"counts": "é"}, "other than ASCII characters in counts"),
    (b'{"size": [228, 320], "counts": "\\ud800"}', "write polygons .* or {size: \\[height, width\\], counts}"),
    (SIZE | {"counts": [-5, 72965]}, "-5 is among its run lengths; they are whole numbers of pixels from 0 on"),
    (SIZE | {"counts": [0.5, 72959.5]}, "0.5 is among its run lengths"),
    (SIZE | {"counts": [10**30]}, "run lengths sum to 1e\\+30, not to the image's 72960 pixels"),
    (SIZE | {"counts": [72960, "a"]}, "expected `float`, got `str` at `.counts\\[1\\]`; write polygons"),
    (SIZE | {"counts": None}, "got `null` \\(or NaN\\) at `.counts`"),
    (SIZE, "missing required field `counts`"),
    ({"size": [228], "counts": "5"}, "of length 2 at `.size`"),
    ({"size": [320, 228], "counts": "5"}, "for size \\[320, 228\\], the image has \\[228, 320\\]"),
    ([["a", *SQUARE[1:]]], "expected `float`, got `str` at `\\[0\\]\\[0\\]`; write polygons"),
    ([[float("nan"), *SQUARE[1:]]], "got `null` \\(or NaN\\)"),
    ([[float("inf"), *SQUARE[1:]]], "got `null` \\(or NaN\\)"),
    (b"[[1e400, 1, 2, 3, 4, 5]]", "out of range|got `null`"),
    (b"[[1" + b"0" * 400 + b", 1, 2, 3, 4, 5]]", "out of range"),
    (SQUARE, "expected `array`, got `int`"),
    ("polygon", "got `str`"),
    ([SQUARE, [1e9, 0, 2e9, 1e9, 5, 5]], "a coordinate of its polygons is beyond ±1,000,000 pixels"),
    ([[0, 0, 10, 0, 10, -1000001]], "beyond ±1,000,000"),
    ([SQUARE[:7], SQUARE[:4]], "no polygon of three corners"),
    (b"[" * 500 + b"]" * 500, "expected `float`, got `array`"),
]


def test_each_mask_that_cannot_be_drawn_is_named(coco_with: Callable[..., Path]) -> None:
    good: list[object] = [[SQUARE], SIZE | {"counts": [72960.0]}, [[-1e6, -1e6, 1e6, -1e6, 1e6, 1e6], SQUARE[:4]]]
    good.append(SIZE | {"counts": compress_counts([5, 10, 72945], 228, 320)})
    segmentations = [*good[:2], *(one for one, _ in BAD_MASKS), *good[2:]]
    log = masks_of(coco_with(*[None] * len(segmentations)), segmentations)
    found = {int(str(problem.annotation)): problem for problem in log}
    assert sorted(found) == list(range(3, 3 + len(BAD_MASKS)))
    assert len(log) == len(BAD_MASKS)
    for number, (_, words) in enumerate(BAD_MASKS, start=3):
        assert found[number].kind == "bad_mask"
        assert found[number].image == number
        assert re.search(words, str(found[number])), found[number]


@pytest.mark.parametrize("row", range(len(BAD_MASKS)))
def test_each_of_them_alone_ends_loading_in_words(coco_with: Callable[..., Path], row: int) -> None:
    """In a file without NaN the records are read another way."""
    root = coco_with(None, None)
    assert [(one.kind, one.annotation) for one in masks_of(root, [[SQUARE], BAD_MASKS[row][0]])] == [("bad_mask", 2)]
    with pytest.raises(InputError, match="annotation 2: its segmentation cannot be used"):
        load_source("coco", root, "train", masks=True)


def test_a_drawn_mask_is_left_as_it_is_beside_a_bad_one(coco_with: Callable[..., Path]) -> None:
    root = coco_with(None, None, None, None, None)
    code = {"size": [228, 320], "counts": compress_counts([5, 10, 72945], 228, 320)}
    masks_of(root, [[SQUARE], SIZE | {"counts": "5"}, code, [[1e9, *SQUARE[1:]]], [SQUARE, SQUARE]])
    source, _ = coco.scan(root, "train", masks=True)
    assert source is not None
    assert source.annotations.masks is not None
    drawn = [source.annotations.masks.segmentation(box, 228, 320) for box in range(5)]
    assert drawn == [[SQUARE], [], code, [], [SQUARE, SQUARE]]
