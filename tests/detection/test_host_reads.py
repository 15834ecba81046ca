"""What a training step reads back from the device: each read makes a GPU wait for the CPU, so a new one must be meant.

Counted are operators whose result's size or value the host must know: they synchronise on a GPU, and the dispatcher shows them anywhere.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from detection import rpn
from detection.build import build_detector
from detection.config import load_detection_config
from detection.structures import Target

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::equal"}
PER_IMAGE = 6  # NMS and what is large enough for it; of anchors and of regions the positives and the negatives
PER_STEP = 1  # boxes without area


class HostReads(TorchDispatchMode):
    """Counts them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator._schema.name
        by_mask = name in ("aten::index", "aten::index_put_") and any(one is not None and one.dtype == torch.bool for one in args[1])
        if name in READS or by_mask:
            self.seen[name] += 1
        return operator(*args, **(kwargs or {}))


def one_nms(boxes: Tensor, scores: Tensor, level: Tensor, iou: float) -> Tensor:
    """In the place of batched_nms, which takes another way on a CPU: one result whose size the host must know."""
    return torch.nonzero(scores >= scores.min()).flatten()


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("head", ["fpn", "c4"])
def test_no_read_is_added(head: str, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpn, "batched_nms", one_nms)
    torch.manual_seed(0)
    options = [
        "model.backbone.name=resnet20_cifar",
        "model.backbone.weights=null",
        "model.backbone.norm=group",
        "model.backbone.freeze_at=0",
    ]
    options += ["model.roi.samples=16", "model.roi.head_width=16", "model.roi.proposals_train=50"]
    detector = build_detector(load_detection_config(None, [f"model.head={head}", *options]), 3)
    pictures = [torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8) for _ in range(images)]
    boxes, labels = torch.tensor([[10.0, 10, 60, 70], [30, 20, 90, 90]]), torch.tensor([1, 2])
    facts = {"boxes": boxes, "labels": labels, "ignore_boxes": torch.zeros(0, 4), "original_size": (96, 128)}
    targets = [Target(image_id=number, index=number, seed=number, **facts) for number in range(images)]
    with HostReads() as reads:
        torch.stack(list(detector(pictures, targets).values())).sum().backward()
    assert sum(reads.seen.values()) <= PER_IMAGE * images + PER_STEP, reads.seen
    assert set(reads.seen) == {"aten::nonzero", "aten::_local_scalar_dense"}
