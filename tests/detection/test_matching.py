"""Matching against torchvision's Matcher on the full matrix; sampling against its own promises."""

from __future__ import annotations

import peers
import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from detection import matching
from detection.matching import BELOW, BETWEEN, assign, balanced_sample, match

EMPTY = torch.zeros((0, 4))
RULES = [
    {"high": 0.7, "low": 0.3, "allow_low_quality": True},
    {"high": 0.5, "low": 0.5, "allow_low_quality": False},
    {"high": 0.4, "low": 0.1, "allow_low_quality": False},
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("chunk", [None, 7, 64])
@pytest.mark.parametrize(("candidates", "boxes"), [(300, 1), (300, 12), (5, 40), (1, 1)])
def test_equals_torchvision(candidates, boxes, chunk, rule):
    for seed in range(5):
        anchors, truth = peers.random_boxes(candidates, seed=seed), peers.random_boxes(boxes, seed=100 + seed)
        anchors = anchors.round()  # whole pixels and copies: ties, which the rules treat in their own way
        anchors[: candidates // 3] = anchors[candidates // 3 : 2 * (candidates // 3)]
        wanted = Matcher(rule["high"], rule["low"], rule["allow_low_quality"])(box_iou(truth, anchors))
        assert torch.equal(match(anchors, truth, **rule, chunk=chunk), wanted)


def test_nothing_to_match():
    anchors = peers.random_boxes(10)
    assert match(anchors, EMPTY, high=0.7, low=0.3, allow_low_quality=True).tolist() == [BELOW] * 10
    assert match(EMPTY, anchors, high=0.7, low=0.3).shape == (0,)


def test_ignored_regions():
    truth = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    candidates = torch.tensor(
        [
            [0.0, 0.0, 10.0, 10.0],  # the object itself, inside the ignored region: still positive
            [20.0, 0.0, 30.0, 10.0],  # background, wholly inside: ignored
            [35.0, 0.0, 45.0, 10.0],  # half inside: ignored
            [36.0, 0.0, 46.0, 10.0],  # less than half: background
            [60.0, 0.0, 70.0, 10.0],
        ]
    )
    ignored = torch.tensor([[0.0, 0.0, 40.0, 10.0], [90.0, 90.0, 99.0, 99.0]])
    matches = assign(candidates, truth, ignored, high=0.5, low=0.5)
    assert matches.tolist() == [0, BETWEEN, BETWEEN, BELOW, BELOW]
    assert assign(candidates, EMPTY, ignored, high=0.5, low=0.5).tolist() == [BETWEEN] * 3 + [BELOW] * 2
    assert assign(EMPTY, truth, ignored, high=0.5, low=0.5).shape == (0,)


@pytest.mark.parametrize(
    ("positives", "negatives", "wanted"),
    [(100, 100, (8, 8)), (3, 100, (3, 13)), (100, 5, (8, 5)), (0, 4, (0, 4)), (0, 0, (0, 0))],
)
def test_sample_counts(positives, negatives, wanted):
    matches = torch.cat((torch.arange(positives), torch.full((negatives,), BELOW), torch.full((9,), BETWEEN)))
    matches = matches[torch.randperm(len(matches), generator=torch.Generator().manual_seed(0))]
    sample = balanced_sample(matches, count=16, positive_fraction=0.5)
    positive, negative = sample.index[sample.positive], sample.index[sample.negative]
    assert (len(positive), len(negative)) == wanted
    assert (matches[positive] >= 0).all()
    assert (matches[negative] == BELOW).all()
    assert len(torch.cat((positive, negative)).unique()) == sum(wanted)
    assert not sample.positive[sample.reserved :].any()


def test_sample_follows_its_generator():
    matches = torch.randint(-2, 5, (500,), generator=torch.Generator().manual_seed(0))

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return balanced_sample(matches, count=32, positive_fraction=0.5, generator=generator).index.tolist()

    assert draw(1) == draw(1) != draw(2)
    state = torch.get_rng_state()
    draw(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_sample_is_uniform():
    matches = torch.full((50,), BELOW)
    generator = torch.Generator().manual_seed(0)
    times = torch.zeros(50)
    for _ in range(2000):
        times[balanced_sample(matches, count=10, positive_fraction=0.5, generator=generator).index] += 1
    assert (times - 400).abs().max() < 5 * (2000 * 0.2 * 0.8) ** 0.5  # five standard deviations of a binomial


@pytest.mark.parametrize(("boxes", "most_mb"), [(1, 0.53), (64, 0.53), (400, 3.3)])
def test_as_shipped_a_crowded_image_takes_little_more_memory(monkeypatch, boxes, most_mb):
    """The most overlaps at a time, in MB (10^6 bytes) of float32; all 60,000 anchors against 400 boxes would be 96."""
    most, plain = [0], matching._iou

    def counted(one, other):
        overlaps = plain(one, other)
        most[0] = max(most[0], overlaps.numel() * overlaps.element_size())
        return overlaps

    monkeypatch.setattr(matching, "_iou", counted)
    candidates, truth = peers.random_boxes(60_000), peers.random_boxes(boxes, seed=1)
    match(candidates, truth, high=0.7, low=0.3, allow_low_quality=True)
    assert 0 < most[0] <= most_mb * 1e6


@pytest.mark.parametrize("boxes", [1, 50, 400])
def test_overlaps_at_a_time_do_not_grow_with_the_boxes(monkeypatch, boxes):
    """A crowded image is matched in smaller chunks, so that memory doesn't follow anchors times boxes."""
    most, plain = [0], matching._iou
    monkeypatch.setattr(matching, "CELLS", {"cpu": 4000, "cuda": 4000})
    monkeypatch.setattr(matching, "LEAST", 10)

    def counted(one, other):
        most[0] = max(most[0], len(one) * other.shape[1])
        return plain(one, other)

    monkeypatch.setattr(matching, "_iou", counted)
    anchors, truth = peers.random_boxes(5000), peers.random_boxes(boxes, seed=1)
    found = match(anchors, truth, high=0.7, low=0.3, allow_low_quality=True)
    assert 0 < most[0] <= 4000
    assert torch.equal(found, Matcher(0.7, 0.3, True)(box_iou(truth, anchors)))
