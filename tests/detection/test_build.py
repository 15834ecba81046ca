"""Every kind of backbone carries a detector: losses that reach all that learns, and detections."""

from __future__ import annotations

import pytest
import torch

from detection.build import build_detector
from detection.config import parse_detection_config
from detection.structures import Target
from resbackbone.runtime.config import changed_settings

KINDS = [
    ("plain18", "v1.5", "fpn", "{}"),
    ("plain18", "v1.5", "c4", "{}"),
    ("resnet18", "v2", "c4", "{}"),
    ("resnet50", "v2", "fpn", "{}"),
    ("resnet18", "v2", "dc5", "{}"),
    ("resnet18", "v1", "fpn", "{shortcut: A, stochastic_depth: 0.2}"),
    ("resnet18", "v1", "c4", "{shortcut: C, shortcut_gate: true}"),
    ("resnet20_cifar", "v1.5", "fpn", "{}"),
    ("resnet20_cifar", "v2", "c4", "{}"),
]


@pytest.mark.parametrize(("name", "variant", "head", "options"), KINDS)
def test_it_learns_and_detects(name: str, variant: str, head: str, options: str) -> None:
    torch.manual_seed(0)
    text = f"""
    model:
      head: {head}
      backbone: {{name: {name}, variant: {variant}, weights: null, norm: group, freeze_at: 0, options: {options}}}
      roi: {{proposals_train: 20, proposals_test: 10, samples: 8}}
    """
    detector = build_detector(parse_detection_config(text, source="here"), 2)
    image = torch.randint(0, 255, (3, 64, 80), dtype=torch.uint8)
    target = Target(
        boxes=torch.tensor([[8.0, 8.0, 50.0, 50.0]]),
        labels=torch.tensor([1]),
        ignore_boxes=torch.zeros(0, 4),
        image_id=1,
        index=0,
        original_size=(64, 80),
    )
    losses = detector([image], [target])
    sum(losses.values()).backward()  # type: ignore[union-attr]
    learning = [(key, p) for key, p in detector.named_parameters() if p.requires_grad]
    assert len(learning) > 40
    assert [key for key, p in learning if p.grad is None] == []
    (found,) = detector.eval().detect([image])
    assert found.boxes.shape[1] == 4


def test_settings_that_come_and_go_are_changes_too() -> None:
    """A network's options are no fixed keys: one that only one of the configs has is told like any other."""
    plain = parse_detection_config("train: {lr: 0.01}", source="here")
    other = parse_detection_config("{train: {lr: 0.02}, model: {backbone: {options: {shortcut: A}}}}", source="here")
    assert changed_settings(plain, other) == ["train.lr: 0.01 → 0.02", "model.backbone.options.shortcut: None → A"]
    assert changed_settings(other, plain) == ["model.backbone.options.shortcut: A → None", "train.lr: 0.02 → 0.01"]
