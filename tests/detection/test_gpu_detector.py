"""The detector on a GPU beside the same one on the CPU: what it finds, a step, for which nobody waits, and that two runs
repeat where that is asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from literal_steps import tiny_detector, tiny_images
from torch import Tensor

from detection.faster_rcnn import FasterRCNN
from detection.structures import Batch, Target
from resbackbone.runtime.ema import build_ema
from resbackbone.runtime.nonfinite import ask_if_finite
from resbackbone.runtime.random_state import deterministic

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


HEADS = {
    "fpn": ["fpn"],
    "pyramid of four levels": ["fpn", "model.backbone.name=resnet18", "model.roi.head_width=16"],
    "c4": ["c4"],
    "mask": ["fpn", "model.mask=true"],
    "context": ["c4", "model.test.context=true"],
}


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # its 10 bits would hide or make differences


def images() -> list[Tensor]:
    return [tiny_images()[number].to(DEVICE) for number in (0, 2)]


def targets() -> list[Target]:
    boxes, none = torch.tensor([[8.0, 8.0, 40.0, 40.0]], device=DEVICE), torch.zeros((0, 4), device=DEVICE)
    facts = {"boxes": boxes, "labels": torch.tensor([1], device=DEVICE), "ignore_boxes": none, "original_size": (64, 80)}
    masks = [torch.ones((1, *image.shape[-2:]), dtype=torch.uint8, device=DEVICE) for image in images()]
    return [Target(image_id=number, index=number, seed=number, masks=masks[number], **facts) for number in range(2)]


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


@pytest.mark.parametrize("head", HEADS)
def test_a_step_never_waits_for_the_gpu(head: str) -> None:
    """From the copies of the batch to the optimiser and the moving average; torch refuses what it knows to make the host wait."""
    detector = tiny_detector(*HEADS[head]).to(DEVICE, memory_format=torch.channels_last).train()
    optimizer, average = torch.optim.SGD(detector.parameters(), lr=0.01, momentum=0.9), build_ema(detector, 0.9)
    pictures = [(image.cpu() * 255).byte() for image in images()]  # of floats the range is checked, which means asking
    batch = Batch(images=pictures, targets=[target.to("cpu") for target in targets()]).pin_memory()
    answers = []

    def whole_step() -> None:
        here = batch.to(DEVICE)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            losses = detector(here.images, here.targets)
        answers.append(ask_if_finite(losses.values()))
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_parameters(detector)

    whole_step()  # the first one asks for memory, and chooses algorithms
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole_step()
        whole_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(answer() for answer in answers)


@pytest.mark.parametrize("head", HEADS)
def test_losses_and_gradients_are_those_of_the_cpu(head: str) -> None:
    """Where every candidate is sampled, so that it doesn't matter how they are drawn; a GPU's tensors have fixed sizes, a CPU's haven't.

    Gradients as a whole: single ones of an untrained network hang on the last digit.
    """
    here, there = tiny_detector(*HEADS[head]).train(), tiny_detector(*HEADS[head]).to(DEVICE).train()
    for detector in (here, there):
        detector.rpn.samples = detector.roi_head.samples = 10**6
        detector.rpn.positive_fraction = detector.roi_head.positive_fraction = 1.0
    wanted = here([image.cpu() for image in images()], [target.to("cpu") for target in targets()])
    found = there(images(), targets())
    for losses in (wanted, found):
        torch.stack(list(losses.values())).sum().backward()
    for name, loss in found.items():
        torch.testing.assert_close(loss.cpu(), wanted[name], rtol=1e-3, atol=1e-4)
    for (name, ours), theirs in zip(there.named_parameters(), here.parameters(), strict=True):
        if ours.requires_grad:
            assert (ours.grad.cpu() - theirs.grad).norm() < 0.05 * theirs.grad.norm() + 1e-4, name


@pytest.mark.parametrize("head", ["fpn", "c4"])
def test_two_runs_repeat_where_that_is_asked_for(head: str) -> None:
    first = tiny_detector(head).to(DEVICE).train()
    second = copy.deepcopy(first)
    with deterministic(True):
        losses = [[step(detector).item() for _ in range(2)] for detector in (first, second)]
    assert losses[0] == losses[1]
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
