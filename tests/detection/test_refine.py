"""Box voting and the regressed regions, each alone, against the literal ones."""

from __future__ import annotations

import peers
import pytest
import torch
from literal_steps import literal_decode, literal_nms, literal_vote

from detection.refine import regressed, suppress_and_vote, vote
from detection.structures import Detections


def _candidates(count: int, seed: int = 0) -> Detections:
    generator = torch.Generator().manual_seed(seed)
    return Detections(
        boxes=peers.random_boxes(count, seed=seed, min_side=30),
        scores=torch.rand(count, generator=generator),
        labels=torch.randint(1, 3, (count,), generator=generator),
    )


def _rows(found: Detections) -> list:
    return list(zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True))


@pytest.mark.parametrize(("count", "most"), [(60, 100), (60, 4), (1, 10), (0, 10)])
def test_suppressing_and_voting_equal_the_literal_ones(count: int, most: int) -> None:
    candidates = _candidates(count)
    kept = literal_nms(_rows(candidates), 0.3)[:most]
    wanted = literal_vote(kept, _rows(candidates))
    found = suppress_and_vote(candidates, most=most)
    assert found.boxes.shape == (len(wanted), 4)
    assert found.labels.tolist() == [label for _, _, label in wanted]
    assert found.scores.tolist() == [score for _, score, _ in wanted]
    torch.testing.assert_close(found.boxes, torch.tensor([box for box, _, _ in wanted]).reshape(-1, 4), atol=1e-4, rtol=0)
    if count > most:
        assert (found.boxes - torch.tensor([box for box, _, _ in kept])).abs().max() > 1  # voting moved something


def test_votes_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 5], [0, 0, 10, 8], [50, 50, 60, 60]])
    candidates = Detections(boxes=boxes, scores=torch.tensor([0.9, 0.3, 0.6, 0.5, 0.4]), labels=torch.tensor([1, 1, 1, 2, 1]))
    # The second votes (IoU 0.8); the third has exactly one half, the fourth is of another class, the fifth is elsewhere.
    (box,) = vote(candidates[torch.tensor([0])], candidates).boxes.tolist()
    assert box == pytest.approx([0, 0, 10, (0.9 * 10 + 0.3 * 8) / 1.2])


def test_voting_is_exact_under_autocast() -> None:
    candidates = _candidates(40)
    wanted = suppress_and_vote(candidates, most=20)
    with torch.autocast("cpu", torch.bfloat16):
        found = suppress_and_vote(candidates, most=20)
    assert torch.equal(found.boxes, wanted.boxes)


@pytest.mark.parametrize("count", [0, 1, 9])
def test_regions_move_to_the_box_of_their_likeliest_class(count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    regions = peers.random_boxes(count, seed=2)
    scores = torch.rand((count, 4), generator=generator)
    scores[:, 0] += 1  # the background is no class to move to
    deltas = torch.randn((count, 16), generator=generator)
    found = regressed((scores, deltas), regions, peers.SIZE)
    assert found.shape == (count, 4)
    for box, score, delta, region in zip(found, scores, deltas, regions, strict=True):
        best = max((1, 2, 3), key=lambda label: score[label].item())
        wanted = literal_decode(delta.reshape(4, 4)[best].tolist(), region.tolist(), peers.SIZE)
        torch.testing.assert_close(box, torch.tensor(wanted), atol=1e-3, rtol=1e-4)
