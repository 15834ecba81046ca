"""timm's state dicts in our networks and back: the same outputs, then the same tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resbackbone import create_backbone, create_classifier
from resbackbone.errors import InputError
from resbackbone.weights.timm import from_timm, looks_like_timm, to_timm

timm = pytest.importorskip("timm")

V1_NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2", "vgg16", "vgg16_bn")
V2_NAMES = ("resnet50", "resnet101", "resnet152")


def timm_name(name: str, variant: str) -> str:
    return name.replace("resnet", "resnetv2_") if variant == "v2" else name


def empty(make: str, **options: object) -> nn.Module:
    """timm's network without its own initial values, which take long."""
    with torch.device("meta"):
        net = timm.create_model(make, **options)
    return net.to_empty(device="cpu").eval()


def randomise(net: nn.Module, seed: int = 0) -> None:
    """Norms as training leaves them, and weights that keep activations of their size."""
    generator = torch.Generator().manual_seed(seed)
    ranges = {"running_mean": (-0.3, 0.3), "running_var": (0.5, 1.0), "bias": (-0.3, 0.3)}
    for name, tensor in net.state_dict().items():
        kind = name.rpartition(".")[2]
        if tensor.dim() > 1:
            bound = (3 / tensor[0].numel()) ** 0.5
            tensor.uniform_(-bound, bound, generator=generator)
        elif tensor.dim() == 1:
            tensor.uniform_(*ranges.get(kind, (0.5, 1.0)), generator=generator)
        else:
            tensor.fill_(7)


def image(size: int = 64) -> Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_equal_to(expected: Tensor, ours: Tensor, name: str) -> None:
    assert ours.shape == expected.shape
    difference = (ours - expected).abs().max() / expected.abs().max()
    assert difference <= 1e-5, f"{name}: {difference}"


def ours_with(tensors: dict[str, Tensor], name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        net = create_classifier(name, **options)
    net.load_state_dict(tensors, strict=True, assign=True)
    return net.eval()


def maps_of(classifier: nn.Module, name: str, size: int = 64, **options: object) -> dict[str, Tensor]:
    with torch.device("meta"):
        backbone = create_backbone(name, **options)
    wanted = backbone.state_dict().keys()
    backbone.load_state_dict({key: value for key, value in classifier.state_dict().items() if key in wanted}, assign=True)
    return backbone.eval()(image(size))


@pytest.mark.parametrize(
    ("name", "variant"), [*((name, "v1.5") for name in V1_NAMES), *((name, "v2") for name in V2_NAMES), ("resnet18", "v1"), ("vgg16", "")]
)
def test_every_name_and_shape_has_its_counterpart(name: str, variant: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(timm_name(name, variant)).state_dict()
        ours = create_classifier(name, **({"variant": variant} if variant else {})).state_dict()
    assert {key: value.shape for key, value in from_timm(theirs).items()} == {key: value.shape for key, value in ours.items()}
    assert {key: value.shape for key, value in to_timm(ours, name, variant).items()} == {key: value.shape for key, value in theirs.items()}
    assert looks_like_timm(theirs) == (variant == "v2" or name.startswith("vgg"))
    assert not looks_like_timm(ours)


@torch.no_grad()
@pytest.mark.parametrize("name", V1_NAMES[:7])
def test_every_stage_of_a_resnet_is_timms(name: str) -> None:
    theirs = empty(name, num_classes=11)
    randomise(theirs)
    net = ours_with(from_timm(theirs.state_dict()), name, num_classes=11)
    assert_equal_to(theirs(image()), net(image()), "logits")
    stages = theirs.forward_intermediates(image(), intermediates_only=True)
    for (stage, ours), expected in zip(maps_of(net, name).items(), stages, strict=True):
        assert_equal_to(expected, ours, stage)
    assert_same_tensors(to_timm(net.state_dict(), name), theirs)


@torch.no_grad()
@pytest.mark.parametrize(("name", "size"), [("resnet50", 64), ("resnet101", 32)])
def test_every_stage_of_a_preactivation_resnet_is_timms(name: str, size: int) -> None:
    theirs = empty(timm_name(name, "v2"), num_classes=11)
    randomise(theirs)
    net = ours_with(from_timm(theirs.state_dict()), name, variant="v2", num_classes=11)
    assert_equal_to(theirs(image(size)), net(image(size)), "logits")
    expected, maps = theirs.stem.conv(image(size)), maps_of(net, name, size, variant="v2")
    assert_equal_to(expected, maps["conv1"], "conv1")
    expected = theirs.stem.pool(expected)
    for number, stage in enumerate(theirs.stages, 2):
        expected = stage(expected)
        assert_equal_to(theirs.norm(expected) if number == 5 else expected, maps[f"conv{number}_x"], f"conv{number}_x")
    assert_same_tensors(to_timm(net.state_dict(), name, "v2"), theirs)


def assert_same_tensors(tensors: dict[str, Tensor], theirs: nn.Module) -> None:
    theirs.load_state_dict(tensors, strict=True)
    assert tensors.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in tensors.items())


@torch.no_grad()
def test_vgg16s_logits_are_timms() -> None:
    name = "vgg16"
    theirs = empty(name, num_classes=11)
    randomise(theirs)
    net = ours_with(from_timm(theirs.state_dict()), name, num_classes=11)
    assert_equal_to(theirs(image(32)), net(image(32)), "logits")
    seven = torch.rand(1, 512, 7, 7, generator=torch.Generator().manual_seed(2))
    assert_equal_to(theirs.pre_logits.fc1(seven).flatten(1), net.classifier[0](seven.flatten(1)), "fc6")
    assert_same_tensors(to_timm(net.state_dict(), name), theirs)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
def test_every_stage_of_a_vgg_is_timms(name: str) -> None:
    theirs = empty(name)
    randomise(theirs.features)
    with torch.device("meta"):
        backbone = create_backbone(name)
    backbone.load_state_dict(from_timm(theirs.features.state_dict(prefix="features.")), strict=True, assign=True)
    expected, stages = image(), iter(backbone.eval()(image()).items())
    for layer in theirs.features:
        if isinstance(layer, nn.MaxPool2d):  # a stage is what a pooling layer receives
            stage, ours = next(stages)
            assert_equal_to(expected, ours, stage)
        expected = layer(expected)
    assert next(stages, None) is None


def test_heads_can_be_absent() -> None:
    with torch.device("meta"):
        pairs = [
            (timm.create_model("resnetv2_50", num_classes=0), create_backbone("resnet50", variant="v2")),
            (timm.create_model("resnet18", num_classes=0), create_backbone("resnet18")),
        ]
    for theirs, ours in pairs:
        assert from_timm(theirs.state_dict()).keys() == ours.state_dict().keys()
    with torch.device("meta"):
        convolutions = create_backbone("vgg16").state_dict()
    assert to_timm(convolutions, "vgg16").keys() == from_timm(convolutions).keys() == convolutions.keys()


@pytest.mark.parametrize(
    "theirs", ["resnetv2_50x1_bit", "resnetv2_18", "resnetv2_50d", "resnet50d", "seresnet50", "regnetx_002", "mobilenetv2_100"]
)
def test_networks_of_timms_that_are_not_ours_are_refused(theirs: str) -> None:
    with torch.device("meta"):
        tensors = timm.create_model(theirs).state_dict()
    with pytest.raises(InputError, match=r"not among ours|first shortcut|this is another network|both have"):
        from_timm(tensors)


@pytest.mark.parametrize(
    ("name", "variant", "message"),
    [
        ("resnet52", "v1.5", "did you mean 'resnet152'|did you mean 'resnet50'"),
        ("plain18", "v1.5", "timm has no plain18"),
        ("resnet20_cifar", "v1.5", "timm has no resnet20_cifar"),
        ("resnext50_32x4d", "v2", "no resnext50_32x4d of variant v2"),
        ("resnet34", "v2", "timm's first shortcut starts before the activation"),
        ("resnet50", "v1", r"stride in the 3x3 convolution \(v1\.5\)"),
    ],
)
def test_networks_of_ours_that_timm_has_not_are_refused(name: str, variant: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_timm({"conv1.weight": torch.zeros(1)}, name, variant)


def test_tensors_of_another_network_are_refused() -> None:
    with pytest.raises(InputError, match=r"our resnet50 v1\.5 has no tensors named bn_last\.weight, layer5"):
        to_timm({"conv1.weight": torch.zeros(1), "bn_last.weight": torch.zeros(1), "layer5.0.bn1.bias": torch.zeros(1)}, "resnet50")
    with pytest.raises(InputError, match=r"classifier\.0\.weight has the shape \[4, 12\]"):
        to_timm({"classifier.0.weight": torch.zeros(4, 12)}, "vgg16")
    one = torch.ones(1)
    with pytest.raises(InputError, match=r"head\.fc\.weight has the shape \[\]"):
        from_timm({"stem.conv.weight": one, "stages.0.blocks.0.conv3.weight": one, "head.fc.weight": torch.tensor(1.0)})
    with pytest.raises(InputError, match="tensors named w are of no network"):
        from_timm({"w": torch.zeros(1)})
