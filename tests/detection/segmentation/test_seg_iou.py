"""IoU and its companions against an independent, literal count, pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch

from detection.segmentation.data import IGNORED
from detection.segmentation.iou import confusion_matrix, figures, format_figures
from resbackbone.errors import InputError

NAMES = ("background", "cat", "dog", "bird")


def literal_figures(truth: list[list[int]], found: list[list[int]]) -> dict[str, float]:
    """From the definitions: sets of pixels, one class at a time."""
    pixels = [(row, column) for row in range(len(truth)) for column in range(len(truth[0])) if truth[row][column] != 255]
    each, recalls = {}, []
    for number, name in enumerate(NAMES):
        wanted = {(r, c) for r, c in pixels if truth[r][c] == number}
        given = {(r, c) for r, c in pixels if found[r][c] == number}
        if wanted | given:
            each[name] = len(wanted & given) / len(wanted | given)
        if wanted:
            recalls.append(len(wanted & given) / len(wanted))
    right = sum(truth[r][c] == found[r][c] for r, c in pixels)
    means = {
        "mean_iou": sum(each.values()) / len(each),
        "pixel_accuracy": right / len(pixels),
        "mean_accuracy": sum(recalls) / len(recalls),
    }
    return means | {f"iou/{name}": value for name, value in each.items()}


@pytest.mark.parametrize(
    ("in_truth", "in_found"),
    [
        ((0, 1, 2, 3), (0, 1, 2, 3)),
        ((0, 1, 2, 255), (0, 1, 2, 3)),  # ignored pixels; bird only where it is wrong
        ((0, 1, 255), (0, 1)),  # dog and bird nowhere
        ((1, 255), (1, 0)),  # no background in the truth
        ((0, 2), (3,)),  # all wrong
    ],
)
def test_figures_are_the_literal_ones(in_truth: tuple[int, ...], in_found: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(len(in_truth))
    truth = torch.tensor(in_truth)[torch.randint(len(in_truth), (13, 11), generator=draw)].to(torch.uint8)
    found = torch.tensor(in_found)[torch.randint(len(in_found), (13, 11), generator=draw)]
    halves = [confusion_matrix(truth[part], found[part], 4) for part in (slice(0, 5), slice(5, 13))]  # a split is the sum of its images
    got, wanted = figures(sum(halves), NAMES), literal_figures(truth.tolist(), found.tolist())
    assert got.keys() == wanted.keys()
    assert all(math.isclose(got[name], wanted[name], rel_tol=1e-12) for name in wanted)


def test_rows_are_the_truth() -> None:
    matrix = confusion_matrix(torch.tensor([[1, 1, 1, IGNORED]]), torch.tensor([[1, 2, 2, 0]]), 3)
    assert matrix.tolist() == [[0, 0, 0], [0, 1, 2], [0, 0, 0]]


def test_an_ignored_class_in_the_prediction_changes_nothing() -> None:
    truth = torch.tensor([0, 1, IGNORED, IGNORED])
    assert torch.equal(confusion_matrix(truth, torch.tensor([0, 1, 3, 2]), 4), confusion_matrix(truth, torch.tensor([0, 1, 0, 0]), 4))


def test_nothing_to_judge_is_explained() -> None:
    with pytest.raises(InputError, match="no pixel to judge"):
        figures(confusion_matrix(torch.full((2, 2), IGNORED), torch.zeros(2, 2, dtype=torch.int64), 4), NAMES)


def test_the_means_come_last() -> None:
    lines = format_figures(figures(confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 1]), 4), NAMES)).splitlines()
    assert [line.split()[0] for line in lines] == ["iou/background", "iou/cat", "mean_iou", "pixel_accuracy", "mean_accuracy"]
    assert lines[2].split()[1] == "1.0000"
