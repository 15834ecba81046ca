"""Our networks in timm's registry, against timm's own with the same weights."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from host_checks import losses_of_training, randomise
from safetensors.torch import save_file
from torch import Tensor, nn

from resbackbone import create_backbone, create_classifier
from resbackbone.errors import InputError
from resbackbone.layers import FrozenBatchNorm2d

timm = pytest.importorskip("timm")

from resbackbone.integrations import timm as integration  # noqa: E402

NAMES = ["rb_resnet18", "rb_resnet18_v2", "rb_resnet50", "rb_resnet50_v1", "rb_resnet50_v2"]
DEEP = [f"rb_resnet101{suffix}" for suffix in ("", "_v1", "_v2")]


@pytest.fixture(scope="module", autouse=True)
def names() -> list[str]:
    return integration.register()


def create(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **options)


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A ResNet-18 classifier of 5 classes with random norms, as a file."""
    path = tmp_path / "resnet18.safetensors"
    torch.manual_seed(2)
    save_file(randomise(create_classifier("resnet18", num_classes=5)).state_dict(), path, {"variant": "", "architecture": "resnet18"})
    return path


def test_registered_once_under_names_of_our_own(names: list[str]) -> None:
    assert {
        *NAMES,
        "rb_resnet101",
        "rb_resnet152_v2",
        "rb_plain34",
        "rb_resnext50_32x4d",
        "rb_resnet20_cifar",
        "rb_resnet20_cifar_v2",
    } <= set(names)
    assert "rb_resnet18_v1" not in names  # the same as rb_resnet18
    assert "rb_plain18_v2" not in names
    assert integration.register() == names
    assert set(timm.list_models("rb_*")) == set(names)
    assert timm.model_entrypoint("resnet50").__module__ == "timm.models.resnet"


@pytest.mark.parametrize("stride", [32, 8])
def test_maps_and_logits_are_timms(stride: int) -> None:
    theirs = randomise(create("resnet50", output_stride=stride)).eval()
    ours = create("rb_resnet50", output_stride=stride).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = images(1, 3, 33, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
        last, maps = ours.forward_intermediates(x)
        expected_last, expected = theirs.forward_intermediates(x)
        assert torch.equal(last, expected_last)
        assert all(torch.equal(*pair) for pair in zip(maps, expected, strict=True))
        assert torch.equal(ours.forward_head(last, pre_logits=True), theirs.forward_head(expected_last, pre_logits=True))
    described = [{key: info[key] for key in ("num_chs", "reduction")} for info in ours.feature_info]
    with torch.device("meta"):
        extractor = timm.create_model("resnet50", features_only=True, output_stride=stride)
    assert described == [
        {"num_chs": c, "reduction": r} for c, r in zip(extractor.feature_info.channels(), extractor.feature_info.reduction(), strict=True)
    ]
    assert [info["module"] for info in ours.feature_info] == ["relu", "layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize("name", [*NAMES, *DEEP])
def test_trains_freezes_saves_and_reloads(name: str, tmp_path: Path) -> None:
    options = {"num_classes": 7, "in_chans": 1, "freeze_at": 2, "drop_path_rate": 0.1, "drop_rate": 0.1}
    model = create(name, **options).train()
    frozen = {"conv1.weight", "bn1.weight", "bn1.bias"} | {key for key, _ in model.named_parameters() if key.startswith("layer1.")}
    assert {key for key, parameter in model.named_parameters() if not parameter.requires_grad} == frozen & dict(
        model.named_parameters()
    ).keys()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x, labels = images(4, 1, 32, 32), torch.tensor([0, 1, 2, 3])
    losses = losses_of_training(model, lambda net: nn.functional.cross_entropy(net(x), labels), rate=3e-4)
    assert losses[-1] < losses[0]
    changed = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"layer2", "layer3", "layer4", "fc"} | ({"bn_last"} if name.endswith("v2") else set())
    torch.save(model.state_dict(), tmp_path / "model.pth")
    again = create(name, **options, checkpoint_path=tmp_path / "model.pth")
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))


def test_resnet101_by_shapes() -> None:
    with torch.device("meta"):
        for name in ("rb_resnet101", "rb_resnet101_v1", "rb_resnet101_v2"):
            maps = create(name, features_only=True, output_stride=16)(torch.empty(1, 3, 64, 64))
            assert [list(each.shape[1:]) for each in maps] == [[64, 32, 32], [256, 16, 16], [512, 8, 8], [1024, 4, 4], [2048, 4, 4]]


@pytest.mark.parametrize(
    ("indices", "expected"),
    [((1, 3), (1, 3)), (("conv2_x", "conv4_x"), (1, 3)), ((-1,), (4,)), (2, (3, 4)), ((-3, "conv1"), (2, 0)), (None, range(5))],
)
def test_features_by_index_and_by_name(indices: Any, expected: Any) -> None:
    model = create("rb_resnet18", features_only=True, out_indices=indices).eval()
    whole = create_backbone("resnet18").eval()
    whole.load_state_dict({key.removeprefix("model."): value for key, value in model.state_dict().items()}, strict=False)
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        maps, reference = model(x), list(whole(x).values())
    assert [list(each.shape) for each in maps] == [list(reference[number].shape) for number in expected]
    assert all(torch.equal(each, reference[number]) for each, number in zip(maps, expected, strict=True))
    assert model.feature_info.channels() == [each.shape[1] for each in maps]
    assert model.feature_info.reduction() == [64 // each.shape[2] for each in maps]
    top = f"model.layer{max(expected) + 1}."  # no parameters that would never get a gradient
    assert not any(key.startswith((top, "model.fc")) for key in model.state_dict())


def test_freezing_survives_the_extractor() -> None:
    model = create("rb_resnet50", features_only=True, freeze_at=2, out_indices=("conv3_x", "conv5_x")).train()
    assert isinstance(model.model.bn1, FrozenBatchNorm2d)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sum(each.mean() for each in model(images(2, 3, 32, 32))).backward()
    assert {key.split(".")[1] for key, parameter in model.named_parameters() if parameter.grad is not None} == {
        "layer2",
        "layer3",
        "layer4",
    }
    moved = {key.split(".")[1] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"layer2", "layer3", "layer4"}


def test_head_surface() -> None:
    model = create("rb_resnet18", num_classes=3).eval()
    assert (model.num_classes, model.num_features, model.head_hidden_size) == (3, 512, 512)
    assert model.get_classifier() is model.fc
    x = images(2, 3, 32, 32)
    features = model.forward_features(x)
    assert features.shape == (2, 512, 1, 1)
    assert torch.equal(model.forward_head(features), model(x))
    model.reset_classifier(6)
    assert model(x).shape == (2, 6)
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_head(features, pre_logits=True))
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 512, 1, 1)
    model.reset_classifier(4, "catavgmax")
    assert model(x).shape == (2, 4)
    assert model.pretrained_cfg["first_conv"] == "conv1"
    assert model.pretrained_cfg["classifier"] == "fc"
    config = timm.data.resolve_model_data_config(model)
    assert (config["mean"], config["std"], config["input_size"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (3, 224, 224))
    assert model.pretrained_cfg["pool_size"] == (7, 7)  # 224 / 32
    small = create("rb_resnet20_cifar")
    assert small.pretrained_cfg["pool_size"] == tuple(small.forward_features(images(1, 3, 32, 32)).shape[2:])
    assert (small.num_classes, small.pretrained_cfg["input_size"], small.feature_info[-1]["reduction"]) == (10, (3, 32, 32), 4)


def test_checkpointing_changes_nothing_computed() -> None:
    model = create("rb_resnet18", num_classes=2).train()
    gradients = []
    for enable in (False, True):
        other = copy.deepcopy(model)
        other.set_grad_checkpointing(enable)
        assert other.network.checkpointing is enable
        other(images(2, 3, 32, 32)).sum().backward()
        gradients.append([parameter.grad for parameter in other.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())  # the copies were whole


def test_weights_of_a_file(weights: Path) -> None:
    reference = create_classifier("resnet18", num_classes=5, weights=weights).eval()
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        for options in (
            {"weights": weights},
            {"checkpoint_path": weights},
            {"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights), "num_classes": 5}},
        ):
            assert torch.equal(create("rb_resnet18", num_classes=5, **options).eval()(x), reference(x)), options
        other = create("rb_resnet18", num_classes=9, weights=weights).eval()
        assert torch.equal(other.layer4[1].conv2.weight, reference.layer4[1].conv2.weight)
        assert other(x).shape == (1, 9)
        grey = create("rb_resnet18", num_classes=5, in_chans=1, weights=weights).eval()
        torch.testing.assert_close(grey(x[:, :1]), reference(x[:, :1].expand(-1, 3, -1, -1)))
        maps = create("rb_resnet18", features_only=True, weights=weights, norm="frozen").eval()(x)
        backbone = create_backbone("resnet18", weights=weights).eval()
        torch.testing.assert_close(maps, list(backbone(x).values()))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rb_resnet18", {"features_only": True, "out_indices": (1, 7)}, "out_indices=.1, 7. is not possible"),
        ("rb_resnet18", {"features_only": True, "out_indices": ("layer1",)}, "0 or 'conv1', 1 or 'conv2_x'"),
        ("rb_resnet18", {"features_only": True, "out_indices": ()}, "is not possible"),
        ("rb_resnet18", {"features_only": True, "feature_cls": "list"}, "leave it out"),
        ("rb_resnet18", {"output_stride": 4}, "takes 8, 16 or 32"),
        ("rb_resnet18", {"pretrained": True}, "weights=FILE"),
        ("rb_resnet18", {"weights": "no_such_file.safetensors"}, "no_such_file"),
        ("rb_resnet18", {"freeze": 2}, "no option 'freeze'"),
        ("rb_resnet18", {"norm": "frozen"}, "needs weights"),
    ],
)
def test_wrong_use_is_explained(name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        create(name, **options)


def test_weights_of_another_network_or_number_of_channels_are_explained(weights: Path) -> None:
    with pytest.raises(InputError, match="says it is for architecture resnet18"):
        create("rb_resnet34", weights=weights)
    five = weights.with_name("five.safetensors")
    save_file(create_backbone("resnet18", in_channels=5).state_dict(), five)
    with pytest.raises(InputError, match=r"conv1.weight \[64, 5, 7, 7\] where \[64, 3, 7, 7\] belongs"):
        create("rb_resnet18", weights=five)


def test_a_name_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm.model_entrypoint("rb_resnet18"), "__module__", "elsewhere")
    with pytest.raises(InputError, match="rb_resnet18' already, registered by elsewhere"):
        integration.register()


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "resbackbone.integrations.timm")
    with pytest.raises(InputError, match=r"pip install 'resbackbone\[timm\]'"):
        import resbackbone.integrations.timm  # noqa: F401
