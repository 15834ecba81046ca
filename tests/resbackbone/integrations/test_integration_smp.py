"""Our networks as encoders of segmentation_models_pytorch, against its own with the same weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from host_checks import losses_of_training, randomise
from safetensors.torch import save_file
from torch import Tensor, nn

from resbackbone import create_backbone
from resbackbone.errors import InputError

smp = pytest.importorskip("segmentation_models_pytorch")

from resbackbone.integrations import smp as integration  # noqa: E402
from resbackbone.integrations import timm as timm_integration  # noqa: E402

CASES = [
    ("Unet", "rb_resnet18"),
    ("FPN", "rb_resnet18_v2"),
    ("DeepLabV3Plus", "rb_resnet18"),
    ("Unet", "rb_resnet50_v1"),
    ("FPN", "rb_resnet50"),
    ("DeepLabV3Plus", "rb_resnet50_v2"),
    *(("FPN", f"rb_resnet101{suffix}") for suffix in ("", "_v1", "_v2")),
]


@pytest.fixture(autouse=True)
def names() -> list[str]:
    """Register, and forget what a test registered."""
    for name in [name for name in smp.encoders.encoders if name.startswith("rb_")]:
        del smp.encoders.encoders[name]
    return integration.register()


def create(architecture: str, name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(smp, architecture)(name, encoder_weights=None, classes=2, **options)


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "resnet18.safetensors"
    torch.manual_seed(2)
    save_file(randomise(create_backbone("resnet18")).state_dict(), path, {"architecture": "resnet18"})
    return path


def test_registered_once(names: list[str]) -> None:
    assert {"rb_resnet18", "rb_resnet50", "rb_resnet50_v1", "rb_resnet101_v2", "rb_plain34"} <= set(names)
    assert integration.register() == names
    assert set(names) <= set(smp.encoders.get_encoder_names())


@pytest.mark.parametrize(("architecture", "stride", "rule"), [("Unet", 32, "torchvision"), ("DeepLabV3", 8, "detectron2")])
def test_the_hosts_own_resnet_with_the_same_weights(architecture: str, stride: int, rule: str) -> None:
    integration.register_encoder("rb_same", "resnet18", dilation_rule=rule)
    options = {} if stride == 32 else {"encoder_output_stride": stride}
    theirs = randomise(create(architecture, "resnet18", **options)).eval()
    ours = create(architecture, "rb_same", **options).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
        if stride != 32:  # its dilation is detectron2's rule; torchvision's, which ImageNet's weights are used with, is another
            other = create(architecture, "rb_resnet18", **options).eval()
            other.load_state_dict(theirs.state_dict(), strict=True)
            assert not torch.allclose(other(x), theirs(x), rtol=1e-2)


@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_trains_freezes_saves_and_reloads(architecture: str, name: str, tmp_path: Path) -> None:
    network, _, variant = name.removeprefix("rb_").partition("_")
    integration.register_encoder("rb_frozen", network, variant=variant or "v1.5", freeze_at=2)
    options = {"decoder_channels": (32, 16, 16, 8, 8)} if architecture == "Unet" else {}
    model = create(architecture, "rb_frozen", **options).train()
    encoder = dict(model.encoder.named_parameters())
    assert {key for key, parameter in encoder.items() if not parameter.requires_grad} == {
        key for key in encoder if key.startswith(("conv1", "bn1", "layer1."))
    }
    before = {key: value.clone() for key, value in model.encoder.state_dict().items()}
    x, truth = images(4, 3, 32, 32), torch.randint(0, 2, (4, 32, 32))
    losses = losses_of_training(model, lambda net: nn.functional.cross_entropy(net(x), truth))
    assert losses[-1] < losses[0]
    changed = {key.split(".")[0] for key, value in model.encoder.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"layer2", "layer3", "layer4"} | ({"bn_last"} if variant == "v2" else set())
    model.save_pretrained(tmp_path / "saved")
    again = smp.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    "architecture", ["Unet", "UnetPlusPlus", "FPN", "PSPNet", "DeepLabV3", "PAN", "Linknet", "MAnet", "UPerNet", "Segformer"]
)
def test_every_architecture_takes_them(architecture: str) -> None:
    with torch.device("meta"):
        model = create(architecture, "rb_resnet101").eval()
        assert model(torch.empty(1, 3, 128, 128)).shape == (1, 2, 128, 128)


def test_maps_channels_and_depth() -> None:
    with torch.device("meta"):
        for depth in (3, 5):
            model = create("Unet", "rb_resnet50", encoder_depth=depth, decoder_channels=(256, 128, 64, 32, 16)[:depth])
            maps = model.encoder(torch.empty(1, 3, 64, 64))
            assert [each.shape[1] for each in maps] == model.encoder.out_channels == [3, 64, 256, 512, 1024, 2048][: depth + 1]
            assert [64 // each.shape[2] for each in maps] == [1, 2, 4, 8, 16, 32][: depth + 1]
        assert not any(
            key.startswith("layer4")
            for key in create("Unet", "rb_resnet50", encoder_depth=4, decoder_channels=(8,) * 4).encoder.state_dict()
        )


def test_weights_of_a_file_and_channels(weights: Path) -> None:
    integration.register_encoder("rb_mine", "resnet18", weights=weights, norm="frozen", freeze_at=1)
    reference = create_backbone("resnet18", weights=weights, norm="frozen").eval()
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        expected = list(reference(x).values())
        found = create("Unet", "rb_mine").encoder(x)
        assert all(torch.equal(*pair) for pair in zip(found[1:], expected, strict=True))
        grey = create("Unet", "rb_mine", in_channels=1)
        torch.testing.assert_close(grey.encoder(x[:, :1])[5], reference(x[:, :1].expand(-1, 3, -1, -1))["conv5_x"])
    assert grey.encoder.out_channels[0] == 1
    assert len(grey.encoder.preprocessing.mean) == 1
    assert not grey.train().encoder.conv1.weight.requires_grad
    assert create("Unet", "rb_resnet18", in_channels=4)(images(2, 4, 64, 64)).shape == (2, 2, 64, 64)


def test_the_hosts_own_freezing() -> None:
    model = create("Unet", "rb_resnet18")
    model.freeze_encoder()
    model.train()
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    assert not any(norm.training for norm in model.encoder.modules() if isinstance(norm, nn.BatchNorm2d))


def test_through_timm() -> None:
    timm_integration.register()
    with torch.device("meta"):
        model = create("DeepLabV3Plus", "tu-rb_resnet50")
        assert model.encoder.out_channels == [3, 64, 256, 512, 1024, 2048]
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 2, 64, 64)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("rb_x", "resnet19"), {}, "did you mean 'resnet"),
        (("rb_x", "vgg16"), {}, "decoders need maps of strides"),
        (("rb_x", "resnet18"), {"frozen": True}, "no option 'frozen'"),
        (("rb_x", "resnet18"), {"output_stride": 16}, "encoder_output_stride"),
        (("rb_x", "resnet18"), {"in_channels": 1}, "give the model in_channels"),
        (("resnet18", "resnet18"), {}, "choose another name"),
        (("rb_resnet18", "resnet18"), {"freeze_at": 2}, "choose another name"),
    ],
)
def test_wrong_registration_is_explained(arguments: tuple[str, str], options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        integration.register_encoder(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "encoder_weights='imagenet' names no weights of ours"),
        ({"encoder_weights": None, "encoder_depth": 6, "decoder_channels": (8,) * 6}, "encoder_depth=6"),
    ],
)
def test_wrong_use_is_explained(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        smp.Unet("rb_resnet18", **options)


def test_missing_weights_are_explained() -> None:
    integration.register_encoder("rb_mine", "resnet18", weights="no_such_file.safetensors")
    with pytest.raises(InputError, match="no_such_file"):
        create("Unet", "rb_mine")


def test_without_smp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch.encoders", None)
    monkeypatch.delitem(sys.modules, "resbackbone.integrations.smp")
    with pytest.raises(InputError, match=r"pip install 'resbackbone\[smp\]'"):
        import resbackbone.integrations.smp  # noqa: F401
