"""The detector on a GPU beside the same one on the CPU: what it finds, a step in bf16, and that two runs repeat where that is asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from literal_steps import tiny_detector, tiny_images
from torch import Tensor

from detection.faster_rcnn import FasterRCNN
from detection.structures import Target
from resbackbone.runtime.random_state import deterministic

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # its 10 bits would hide or make differences


def images() -> list[Tensor]:
    return [tiny_images()[number].to(DEVICE) for number in (0, 2)]


def targets() -> list[Target]:
    boxes, none = torch.tensor([[8.0, 8.0, 40.0, 40.0]], device=DEVICE), torch.zeros((0, 4), device=DEVICE)
    facts = {"boxes": boxes, "labels": torch.tensor([1], device=DEVICE), "ignore_boxes": none, "original_size": (64, 80)}
    return [Target(image_id=number, index=number, seed=number, **facts) for number in range(2)]


def step(detector: FasterRCNN, *, dtype: torch.dtype | None = None) -> Tensor:
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.01)
    with torch.autocast(DEVICE, dtype=dtype, enabled=dtype is not None):
        loss = torch.stack(list(detector(images(), targets()).values())).sum()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("head", ["fpn", "c4"])
def test_detections_are_those_of_the_cpu(head: str) -> None:
    detector = tiny_detector(head)
    expected = detector.detect([image.cpu() for image in images()])
    found = detector.to(DEVICE).detect(images())
    assert sum(map(len, expected)) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.labels.cpu(), theirs.labels)
        torch.testing.assert_close(ours.scores.cpu(), theirs.scores, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ours.boxes.cpu(), theirs.boxes, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("head", ["fpn", "c4"])
def test_a_step_in_bf16_reaches_every_weight(head: str) -> None:
    detector = tiny_detector(head).to(DEVICE, memory_format=torch.channels_last).train()
    assert torch.isfinite(step(detector, dtype=torch.bfloat16))
    learning = {name: one.grad for name, one in detector.named_parameters() if one.requires_grad}
    assert [name for name, grad in learning.items() if grad is None or not grad.isfinite().all()] == []


@pytest.mark.parametrize("head", ["fpn", "c4"])
def test_two_runs_repeat_where_that_is_asked_for(head: str) -> None:
    first = tiny_detector(head).to(DEVICE).train()
    second = copy.deepcopy(first)
    with deterministic(True):
        losses = [[step(detector).item() for _ in range(2)] for detector in (first, second)]
    assert losses[0] == losses[1]
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
