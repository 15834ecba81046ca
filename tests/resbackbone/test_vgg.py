"""VGG-16 against torchvision's, and as Faster R-CNN's baseline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from resbackbone import create_backbone, create_classifier
from resbackbone.errors import InputError


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
def test_classifier_keys_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = create_classifier(name), torchvision.models.get_model(name)
    assert [(key, value.shape) for key, value in ours.state_dict().items()] == [(k, v.shape) for k, v in theirs.state_dict().items()]


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
def test_maps_are_torchvisions_features(name: str) -> None:
    theirs = torchvision.models.get_model(name).features.eval()
    ours = create_backbone(name).eval()
    ours.features.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        x, maps = torch.rand(1, 3, 32, 64), []
        ours_maps = ours(x)
        for layer in theirs:
            if isinstance(layer, torch.nn.MaxPool2d):
                maps.append(x.clone())
            x = layer(x)
    assert all(torch.equal(a, b) for a, b in zip(ours_maps.values(), maps, strict=True))


def test_frozen_norms_are_folded_to_the_same_maps() -> None:
    batch = create_backbone("vgg16_bn", out_features=("conv2",)).eval()
    frozen = create_backbone("vgg16_bn", norm="frozen", allow_random_frozen=True, out_features=("conv2",))
    for norm in (m for m in batch.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_var.uniform_(0.1, 1)
        norm.running_mean.uniform_(-1, 1)
    frozen.load_state_dict(batch.state_dict())
    x = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(frozen(x)["conv2"], batch(x)["conv2"], rtol=1e-4, atol=1e-5)


def test_region_head_is_fc6_and_fc7_of_the_weights(tmp_path: Path) -> None:
    with torch.device("meta"):
        state = torchvision.models.vgg16().state_dict()
    state = {key: torch.full(value.shape, 1e-3) for key, value in state.items()}
    state["classifier.3.bias"] = torch.arange(4096.0)
    save_file(state, tmp_path / "vgg.safetensors")
    net = create_backbone("vgg16", weights=tmp_path / "vgg.safetensors", freeze_at=2)
    assert "head left: classifier.0.bias" in net.load_report
    head = net.split_region_head().eval()
    assert (head.in_feature, head.pool_size, head.out_channels, net.out_features) == ("conv5", 7, 4096, ("conv5",))
    assert torch.equal(head.fc7.bias, torch.arange(4096.0))
    expected = torch.arange(4096.0) + 4096 * 1e-3 * (512 * 49 * 1e-3 + 1e-3)
    torch.testing.assert_close(head(torch.ones(2, 512, 7, 7)), expected.expand(2, -1), rtol=1e-3, atol=0.01)


def test_weights_without_a_classifier_leave_the_region_head_random(tmp_path: Path) -> None:
    save_file({f"features.{k}": v for k, v in torchvision.models.vgg16().features.state_dict().items()}, tmp_path / "features.safetensors")
    net = create_backbone("vgg16", weights=tmp_path / "features.safetensors")
    with pytest.warns(UserWarning, match="random weights"):
        net.split_region_head()
    state = {f"features.{k}": v for k, v in net.features.state_dict().items()} | {"classifier.0.weight": torch.zeros(3, 3)}
    save_file(state, tmp_path / "wrong.safetensors")
    with pytest.raises(InputError, match=r"classifier\.0\.weight"):
        create_backbone("vgg16", weights=tmp_path / "wrong.safetensors").split_region_head()


def test_dropout_acts_in_training_only() -> None:
    head = create_backbone("vgg16").split_region_head()
    x = torch.rand(1, 512, 7, 7)
    assert not torch.equal(head(x), head(x))
    head.eval()
    assert torch.equal(head(x), head(x))


def test_no_region_head_without_conv5() -> None:
    net = create_backbone("vgg16", out_features=("conv4",))
    net.trim()
    assert not net.region_head_available()
    with pytest.raises(InputError, match="conv5"):
        net.split_region_head()


def test_logits_on_odd_sizes() -> None:
    with torch.no_grad():
        assert create_classifier("vgg16", num_classes=5).eval()(torch.rand(1, 3, 33, 47)).shape == (1, 5)
