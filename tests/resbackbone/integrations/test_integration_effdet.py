"""A detector that takes a timm name, EfficientDet of the package effdet, on our networks: nothing of it knows us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from host_checks import losses_of_training
from torch import nn

effdet = pytest.importorskip("effdet")
pytest.importorskip("timm")

from resbackbone.integrations import timm as integration  # noqa: E402

PIXELS = 128


def build(name: str, **backbone_args: Any) -> nn.Module:
    integration.register()
    torch.manual_seed(0)
    config = effdet.get_efficientdet_config("tf_efficientdet_d0")
    config.backbone_name, config.backbone_args = name, backbone_args
    config.image_size, config.num_classes, config.fpn_channels, config.fpn_cell_repeats = (PIXELS, PIXELS), 2, 16, 1
    config.box_class_repeats = 1
    return effdet.EfficientDet(config, pretrained_backbone=False)


def images() -> torch.Tensor:
    return torch.rand((2, 3, PIXELS, PIXELS), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "freeze_at"), [("rb_resnet18", 2), ("rb_resnet18_v2", 0), ("rb_resnet50_v1", 1)])
def test_trains_freezes_saves_and_reloads(name: str, freeze_at: int, tmp_path: Path) -> None:
    model = build(name, freeze_at=freeze_at)
    assert [info["reduction"] for info in model.backbone.feature_info.get_dicts()] == [8, 16, 32]
    fixed = {key.split(".")[2] for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert fixed == [set(), {"conv1"}, {"conv1", "layer1"}][freeze_at]
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    boxes = torch.tensor([[[10.0, 10.0, 60.0, 70.0]]]).expand(2, 1, 4)  # y1, x1, y2, x2
    target = {"bbox": boxes, "cls": torch.tensor([[1.0], [2.0]])}
    bench = effdet.DetBenchTrain(model).train()
    losses = losses_of_training(bench, lambda net: net(images(), target)["loss"], rate=1e-4)
    assert losses[-1] < losses[0]
    moved = {key.split(".")[1] for key, value in model.backbone.state_dict().items() if not torch.equal(value, before[key])}
    assert {"layer2", "layer3", "layer4"} <= moved
    assert not moved & fixed
    torch.save(model.state_dict(), tmp_path / "model.pth")
    again = build(name, freeze_at=freeze_at)
    again.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    with torch.no_grad():
        for found, expected in zip(again.eval()(images()), model.eval()(images()), strict=True):
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
