"""ResNets against torchvision's and timm's, with the same weights, and against the paper."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from resbackbone import create_backbone, create_classifier
from resbackbone.backbone import Backbone
from resbackbone.errors import InputError
from resbackbone.layers import FrozenBatchNorm2d
from resbackbone.resnet import TABLE_1, Bottleneck

PARAMETERS = {  # torchvision's documentation
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "wide_resnet50_2": 68_883_240,
}


def randomise_norms(net: nn.Module, seed: int = 0, smallest_variance: float = 0.5) -> None:
    """Norms as training leaves them: a fresh network's are the identity and hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.weight, 0.5, 1.0),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, smallest_variance, 1.0),
            ):
                values.data.uniform_(low, high, generator=generator)


def torchvision_pair(name: str, **options: object) -> tuple[nn.Module, Backbone]:
    theirs = torchvision.models.get_model(name, **options)
    randomise_norms(theirs)
    ours = create_classifier(name)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameters_and_keys_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = create_classifier(name), torchvision.models.get_model(name)
    assert sum(p.numel() for p in ours.parameters()) == PARAMETERS[name]
    assert [(key, value.shape) for key, value in ours.state_dict().items()] == [(k, v.shape) for k, v in theirs.state_dict().items()]


@pytest.mark.parametrize(("name", "size"), [("resnet18", (65, 48)), ("resnet50", (33, 64))])
def test_logits_are_torchvisions(name: str, size: tuple[int, int]) -> None:
    theirs, ours = torchvision_pair(name)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images(2, 3, *size)), theirs.eval()(images(2, 3, *size)), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_training_gradients_and_statistics_are_torchvisions(name: str) -> None:
    theirs, ours = torchvision_pair(name)
    for net in (theirs.train(), ours.train()):
        net(images(2, 3, 40, 40)).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key].grad, msg=key)
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], msg=key)


def test_maps_are_torchvisions_layers() -> None:
    theirs, ours = torchvision_pair("resnet18")
    x = theirs.eval().relu(theirs.bn1(theirs.conv1(images(1, 3, 47, 33))))
    expected = [x, x := theirs.layer1(theirs.maxpool(x)), x := theirs.layer2(x), x := theirs.layer3(x), theirs.layer4(x)]
    backbone = create_backbone("resnet18").eval()
    backbone.load_state_dict({key: value for key, value in ours.state_dict().items() if not key.startswith("fc.")})
    assert all(torch.equal(a, b) for a, b in zip(backbone(images(1, 3, 47, 33)).values(), expected, strict=True))


@pytest.mark.parametrize("output_stride", [16, 8])
def test_dilation_is_torchvisions(output_stride: int) -> None:
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, output_stride == 8, True])
    randomise_norms(theirs)
    ours = create_backbone("resnet50", output_stride=output_stride, out_features=("conv5_x",)).eval()
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")})
    theirs.fc, theirs.avgpool = nn.Identity(), nn.Identity()
    output = ours(images(1, 3, 48, 33))["conv5_x"]
    assert torch.equal(output.flatten(1), theirs.eval()(images(1, 3, 48, 33)))
    assert ours.feature_info["conv5_x"].stride == output_stride
    assert output.shape[-2:] == (48 // output_stride, -(-33 // output_stride))


@pytest.mark.parametrize("output_stride", [16, 8])
def test_basic_blocks_dilate_as_timms(output_stride: int) -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("resnet18", features_only=True, output_stride=output_stride).eval()
    randomise_norms(theirs)
    ours = create_backbone("resnet18", output_stride=output_stride).eval()
    ours.load_state_dict(theirs.state_dict())
    for (name, output), expected in zip(ours(images(1, 3, 64, 33)).items(), theirs(images(1, 3, 64, 33)), strict=True):
        torch.testing.assert_close(output, expected, msg=name)


def dilations(net: Backbone) -> list[int]:
    return [conv.dilation[0] for name, conv in net.named_modules() if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)]


def test_the_two_dilation_rules() -> None:
    with torch.device("meta"):
        torchvisions, detectron2s = (create_backbone("resnet50", output_stride=8, dilation_rule=r) for r in ("torchvision", "detectron2"))
    assert dilations(torchvisions)[7:] == [1, 2, 2, 2, 2, 2, 2, 4, 4]
    assert dilations(detectron2s)[7:] == [2, 2, 2, 2, 2, 2, 4, 4, 4]


def test_dilated_basic_blocks_keep_the_sampling_grid() -> None:
    """Dilation computes what striding skips: every second cell of the dilated map is the strided one, away from the border."""
    strided, dilated = (create_backbone("resnet18", output_stride=s, dilation_rule="detectron2").double().eval() for s in (32, 16))
    dilated.load_state_dict(strided.state_dict())
    for net in (strided, dilated):  # detectron2's rule dilates the first convolution too, which then has to look like a strided 3x3
        net.layer4[0].conv1.dilation = net.layer4[0].conv1.padding = (1, 1)
    x = images(1, 3, 320, 320).double()
    coarse, fine = strided(x)["conv5_x"], dilated(x)["conv5_x"]
    torch.testing.assert_close(fine[..., ::2, ::2], coarse)


def test_v1_strides_in_the_first_1x1_and_v15_in_the_3x3() -> None:
    for variant, strided in (("v1", "conv1"), ("v1.5", "conv2")):
        with torch.device("meta"):
            block = create_backbone("resnet50", variant=variant).layer2[0]
        assert isinstance(block, Bottleneck)
        assert [name for name in ("conv1", "conv2", "conv3") if getattr(block, name).stride == (2, 2)] == [strided]


def test_v1_and_v15_differ_only_in_what_they_compute() -> None:
    v1, v15 = (create_backbone("resnet50", variant=variant).eval() for variant in ("v1", "v1.5"))
    v15.load_state_dict(v1.state_dict())
    a, b = v1(images(1, 3, 33, 33)), v15(images(1, 3, 33, 33))
    assert torch.equal(a["conv2_x"], b["conv2_x"])
    assert not torch.allclose(a["conv3_x"], b["conv3_x"], rtol=1e-2)
    small = [create_backbone("resnet18", variant=variant).state_dict().keys() for variant in ("v1", "v1.5")]
    assert small[0] == small[1]


@pytest.mark.parametrize("smallest_variance", [0.5, 1e-5])
def test_frozen_equals_torchvisions_frozen(smallest_variance: float) -> None:
    theirs = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    source = torchvision.models.resnet18()
    randomise_norms(source, smallest_variance=smallest_variance)
    theirs.load_state_dict(source.state_dict())
    ours = create_backbone("resnet18", norm="frozen", allow_random_frozen=True)
    state = {key: value for key, value in source.state_dict().items() if not key.startswith("fc.")}
    ours.load_state_dict(state)
    theirs.fc, theirs.avgpool = nn.Identity(), nn.Identity()
    for net in (ours.double().train(), theirs.double().train()):
        output = net(images(1, 3, 40, 40).double())
        output = output["conv5_x"].flatten(1) if isinstance(output, dict) else output
        (output / output.detach().norm()).square().sum().backward()
    expected = dict(theirs.named_parameters())
    assert {key for key, _ in ours.named_parameters()} == expected.keys()
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-6, atol=1e-9, msg=key)


@pytest.mark.parametrize("norm", ["batch", "eval", "sync", "group", "none"])
def test_every_norm_trains(norm: str) -> None:
    net = create_backbone("resnet18", norm=norm, out_features=("conv3_x",)) if norm != "eval" else None
    net = net or create_backbone("resnet18", norm=norm, out_features=("conv3_x",), allow_random_frozen=True)
    net.trim()
    net.train()(images(2, 3, 32, 32))["conv3_x"].mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert any(name.startswith("bn1") for name, _ in net.named_parameters()) is (norm != "none")
    assert ("conv1.bias" in net.state_dict()) is (norm == "none")


def test_norm_eps_reaches_every_norm() -> None:
    net = create_backbone("resnet18", norm="frozen", norm_eps=0.0, allow_random_frozen=True)
    assert {m.eps for m in net.modules() if isinstance(m, FrozenBatchNorm2d)} == {0.0}


def test_region_head_is_conv5_on_each_region() -> None:
    whole = create_backbone("resnet50", norm="frozen", allow_random_frozen=True, freeze_at=2)
    split = create_backbone("resnet50", norm="frozen", allow_random_frozen=True, freeze_at=2)
    split.load_state_dict(whole.state_dict())
    assert split.region_head_available()
    head = split.split_region_head()
    assert (head.in_feature, head.pool_size, head.out_channels) == ("conv4_x", 14, 2048)
    assert split.out_features == ("conv4_x",)
    assert not any(key.startswith("layer4") for key in split.state_dict())
    assert head(torch.rand(3, 1024, 14, 14)).shape == (3, 2048, 7, 7)
    x = images(1, 3, 64, 64)
    assert torch.equal(head(split(x)["conv4_x"]), whole(x)["conv5_x"])
    assert not split.region_head_available()
    with pytest.raises(InputError, match="any more"):
        split.split_region_head()


def test_region_head_of_a_dilated_or_frozen_network() -> None:
    dilated = create_backbone("resnet18", output_stride=16).split_region_head()
    assert dilated.pool_size == 7
    frozen = create_backbone("resnet18", freeze_at=5).split_region_head().train()
    assert not any(module.training for module in frozen.modules())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(m.training for m in create_backbone("resnet18", freeze_at=4).split_region_head().train().modules())


def test_table_1_is_the_papers() -> None:
    layers = {name: 2 + sum(layout.depths) * (3 if layout.block is Bottleneck else 2) for name, layout in TABLE_1.items()}
    assert {name: count for name, count in layers.items() if name.startswith("resnet")} == {f"resnet{n}": n for n in (18, 34, 50, 101, 152)}
