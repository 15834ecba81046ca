"""Non-maximum suppression by marks, beside torchvision's, and how far that holds."""

from __future__ import annotations

from typing import Any

import peers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import batched_nms, nms

from detection import nms as module
from detection.nms import kept_by_nms


@pytest.mark.parametrize("block", [1, 7, 64, 512])
@pytest.mark.parametrize("iou", [0.3, 0.5, 0.7])
def test_marked_nms_equals_torchvision(iou: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    boxes = torch.stack([peers.random_boxes(150, seed=seed, min_side=20) for seed in range(4)])  # crowded: most overlap some
    alive = torch.rand(boxes.shape[:2], generator=torch.Generator().manual_seed(0)) > 0.1
    kept = kept_by_nms(boxes, alive, iou)
    scores = torch.linspace(1, 0, 150)
    for mine, group, are_there in zip(kept, boxes, alive, strict=True):
        left = torch.nonzero(are_there).flatten()
        assert torch.nonzero(mine).flatten().tolist() == left[nms(group[left], scores[left], iou)].tolist()


def test_marked_nms_of_many_boxes_equals_torchvision() -> None:
    boxes = peers.random_boxes(3 * module.BLOCK // 2, seed=3, min_side=10)
    kept = kept_by_nms(boxes[None], torch.ones((1, len(boxes)), dtype=torch.bool), 0.7)[0]
    assert torch.nonzero(kept).flatten().tolist() == nms(boxes, torch.linspace(1, 0, len(boxes)), 0.7).tolist()
    assert 0.05 < kept.float().mean() < 0.95


@pytest.mark.parametrize(("length", "is_right"), [(module.ROUNDS, True), (2 * module.ROUNDS, False)])
def test_marked_nms_is_right_to_chains_of_so_many_boxes(length: int, is_right: bool) -> None:
    """Each box overlaps only the next by more than the limit, so that every second one stays; the docstring says how far that is right."""
    left = torch.arange(length) * 2.0
    boxes = torch.stack((left, torch.zeros(length), left + 10, torch.full((length,), 10.0)), dim=1)
    kept = kept_by_nms(boxes[None], torch.ones((1, length), dtype=torch.bool), 0.6)[0]
    wanted = torch.zeros(length, dtype=torch.bool).index_fill(0, nms(boxes, torch.linspace(1, 0, length), 0.6), True)
    assert wanted.tolist() == [number % 2 == 0 for number in range(length)]
    assert torch.equal(kept, wanted) == is_right
    assert torch.equal(kept[: module.ROUNDS], wanted[: module.ROUNDS])
    assert (kept | ~wanted).all(), "what is wrong within a block is kept, not lost"


def test_groups_do_not_meet() -> None:
    boxes = peers.random_boxes(40, seed=1, min_side=30)
    groups = torch.arange(40) % 2
    wanted = batched_nms(boxes, torch.linspace(1, 0, 40), groups, 0.3)
    kept = kept_by_nms(torch.stack((boxes[::2], boxes[1::2])), torch.ones((2, 20), dtype=torch.bool), 0.3)
    assert torch.nonzero(kept.t().flatten()).flatten().tolist() == wanted.sort().values.tolist()


class Dtypes(TorchDispatchMode):
    """Those of every result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        self.seen |= {one.dtype for one in (result if isinstance(result, tuple | list) else [result]) if isinstance(one, torch.Tensor)}
        return result


def test_autocast_casts_nothing() -> None:
    """It would cast every matrix in every round, for the same result."""
    boxes = peers.random_boxes(200, seed=4, min_side=20)[None]
    alive = torch.ones(boxes.shape[:2], dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16), Dtypes() as dtypes:
        kept = kept_by_nms(boxes, alive, 0.5)
    assert torch.equal(kept, kept_by_nms(boxes, alive, 0.5))
    assert torch.half in dtypes.seen
    assert torch.bfloat16 not in dtypes.seen
