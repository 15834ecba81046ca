"""Layer responses and gradient norms against a literal computation."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from resbackbone import create_backbone, create_classifier
from resbackbone.backbone import Preprocessing
from resbackbone.errors import InputError
from resbackbone.images import load_images
from resbackbone.responses import gradient_norms, layer_responses
from tests.resbackbone.test_resnet import images, randomise_norms


@pytest.fixture
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    net = create_classifier("resnet20_cifar")
    randomise_norms(net)
    return net


def test_responses_are_taken_after_the_norm_and_before_the_rest(net: torch.nn.Module) -> None:
    x = images(4, 3, 32, 32)
    found = layer_responses(net, x)
    assert len(found) == 19  # every layer but the last, which is linear
    net.eval()
    with torch.no_grad():
        first = net.bn1(net.conv1(x))
        block = net.layer1[0]
        second = block.bn1(block.conv1(first.relu()))
        third = block.bn2(block.conv2(second.relu()))
    literal = [features.double().std(correction=0).item() for features in (first, second, third)]
    assert [signal.strength for signal in found[:3]] == pytest.approx(literal, rel=1e-5)
    assert [signal.name for signal in found[:3]] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]


def test_bottlenecks_count_their_3x3_and_vgg_its_convolutions() -> None:
    bottleneck = create_backbone("resnet50")
    assert [signal.name for signal in layer_responses(bottleneck, images(1, 3, 64, 64))] == [
        f"layer{stage}.{block}.conv2" for stage, depth in enumerate((3, 4, 6, 3), 1) for block in range(depth)
    ]
    vgg, x = create_backbone("vgg16").eval(), images(1, 3, 32, 32)
    found = layer_responses(vgg, x)
    assert len(found) == 13
    assert found[0].strength == pytest.approx(vgg.features[0](x).std(correction=0).item(), rel=1e-5)


def test_the_network_is_left_as_it_was(net: torch.nn.Module) -> None:
    before = {key: value.clone() for key, value in net.state_dict().items()}
    layer_responses(net.train(), images(2, 3, 32, 32))
    gradient_norms(net, images(2, 3, 32, 32), torch.tensor([1, 2]))
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_gradient_norms_are_those_of_backward(net: torch.nn.Module) -> None:
    x, labels = images(4, 3, 32, 32), torch.tensor([0, 3, 5, 9])
    found = gradient_norms(net, x, labels)
    F.cross_entropy(net.eval()(x), labels).backward()
    literal = [torch.cat([p.grad.flatten() for p in block.parameters()]).norm().item() for block in (*net.layer1, *net.layer2, *net.layer3)]
    assert [signal.strength for signal in found] == pytest.approx(literal, rel=1e-4)


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(InputError, match="norm='batch'"):
        layer_responses(create_backbone("resnet18", norm="frozen", allow_random_frozen=True), images(1, 3, 32, 32))
    with pytest.raises(InputError, match="create_classifier"):
        gradient_norms(create_backbone("resnet18"), images(1, 3, 32, 32), torch.tensor([0]))
    with pytest.raises(InputError, match="no blocks"):
        gradient_norms(create_backbone("vgg16"), images(1, 3, 32, 32), torch.tensor([0]))


def test_images_from_a_folder_and_from_arrays(tmp_path: Path) -> None:
    pixels = np.full((32, 32, 3), (10, 20, 30), np.uint8)  # RGB
    cv2.imwrite(str(tmp_path / "a.png"), pixels[..., ::-1])
    np.savez(tmp_path / "set.npz", images=pixels[None], labels=np.array([7]))
    plain = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), color_order="BGR", input_range=255)
    for source, expected in ((tmp_path, None), (tmp_path / "set.npz", [7])):
        loaded, labels = load_images(source, size=32, preprocessing=plain, limit=5)
        assert loaded.shape == (1, 3, 32, 32)
        assert loaded[0, :, 0, 0].tolist() == [30, 20, 10]
        assert (None if labels is None else labels.tolist()) == expected
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.npz").write_bytes(b"no")
    np.savez(tmp_path / "wrong.npz", images=np.zeros((1, 3, 8, 8), np.float32))
    for source, message in (("empty", "holds no images"), ("bad.npz", "not an .npz"), ("wrong.npz", "must be uint8"), ("none", "neither")):
        with pytest.raises(InputError, match=message):
            load_images(tmp_path / source, size=32, preprocessing=plain, limit=5)


def test_the_tool_prints_and_draws_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tools.describe import main

    np.savez(tmp_path / "set.npz", images=np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), np.uint8), labels=np.arange(8))
    arguments = ["resnet20_cifar", "--images", str(tmp_path / "set.npz"), "--plot", str(tmp_path / "plot.png")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "million parameters, 0.04 x 10^9" in said
    assert "layer3.2.conv2" in said
    assert "gradient" in said
    assert cv2.imread(str(tmp_path / "plot.png")).std() > 1
