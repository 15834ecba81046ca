"""torchvision's networks with random weights and statistics: here and back, every stage's output the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from resbackbone import create_backbone, create_classifier, load_weights

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2")


def peer(name: str) -> nn.Module:
    """torchvision's network without its own initial values, which take long: uniform weights, norms as training leaves them."""
    with torch.device("meta"):
        net = torchvision.models.get_model(name, num_classes=11)
    net = net.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    ranges = {"running_mean": (-0.3, 0.3), "running_var": (0.5, 1.0), "bias": (-0.3, 0.3)}
    for key, tensor in net.state_dict().items():
        bound = (3 / tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 0
        low, high = (-bound, bound) if bound else ranges.get(key.rpartition(".")[2], (0.5, 1.0))
        if tensor.dim():
            tensor.uniform_(low, high, generator=generator)
        else:
            tensor.fill_(7)
    return net


def image() -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def equal(ours: Tensor, expected: Tensor) -> bool:
    return ours.shape == expected.shape and bool((ours - expected).abs().max() <= 1e-5 * expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", RESNETS)
def test_every_stage_of_a_resnet(name: str) -> None:
    theirs = peer(name)
    net, backbone = create_classifier(name, num_classes=11).eval(), create_backbone(name).eval()
    load_weights(net, theirs.state_dict())
    load_weights(backbone, theirs.state_dict())
    assert equal(net(image()), theirs(image()))
    maps = backbone(image())
    expected = theirs.relu(theirs.bn1(theirs.conv1(image())))
    assert equal(maps["conv1"], expected)
    expected = theirs.maxpool(expected)
    for key, layer in zip(("conv2_x", "conv3_x", "conv4_x", "conv5_x"), ("layer1", "layer2", "layer3", "layer4"), strict=True):
        expected = getattr(theirs, layer)(expected)
        assert equal(maps[key], expected), key
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    theirs.load_state_dict(net.state_dict(), strict=True)
    assert all(torch.equal(value, before[key]) for key, value in theirs.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
def test_every_stage_of_vgg(name: str) -> None:
    theirs = peer(name)
    with torch.device("meta"):
        net = create_classifier(name, num_classes=11)
    net.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    assert equal(net.eval()(image()), theirs(image()))
    backbone = create_backbone(name).eval()
    load_weights(backbone, theirs.state_dict())
    expected, stage = image(), iter(backbone(image()).items())
    for layer in theirs.features:
        if isinstance(layer, nn.MaxPool2d):  # a stage is what a pooling layer receives
            key, ours = next(stage)
            assert equal(ours, expected), key
        expected = layer(expected)
    assert next(stage, None) is None
    theirs.load_state_dict(net.state_dict(), strict=True)


def test_genuine_fragments_have_our_keys_shapes_and_types(shared_data: Path) -> None:
    """Real tensors of three torchvision files, and the keys, shapes and types of all of theirs."""
    headers = json.loads((shared_data / "weights" / "torchvision_resnet18_original_header.json").read_text())
    for file, header in headers.items():
        name = file.partition("-")[0]
        with torch.device("meta"):
            ours = {key: list(value.shape) for key, value in create_classifier(name).state_dict().items() if value.dim()}
        assert {key: facts["shape"] for key, facts in header["keys"].items()} == ours
        assert {facts["type"] for facts in header["keys"].values()} <= {"FloatTensor", "FloatStorage"}
    fragments = load_file(shared_data / "weights" / "torchvision_fragments.safetensors")
    assert len(fragments) == 25
    for key, tensor in fragments.items():
        network, _, name = key.partition("/")
        with torch.device("meta"):
            wanted = create_classifier(network.partition("_")[0]).state_dict()[name]
        assert (wanted.shape, wanted.dtype) == (tensor.shape, tensor.dtype), key
