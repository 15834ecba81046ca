"""What every backbone promises: maps, freezing, checkpointing, copying, trimming."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from resbackbone import FeatureInfo, create_backbone
from resbackbone.backbone import Backbone, StagedBackbone, imagenet_preprocessing
from resbackbone.errors import InputError
from resbackbone.layers import FrozenBatchNorm2d

OURS = ("resnet18", "resnet50", "vgg16", "vgg16_bn")


def gradients(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("size", [(33, 50), (64, 31), (1, 7)])
def test_maps_are_what_feature_info_says(name: str, size: tuple[int, int]) -> None:
    net = create_backbone(name).eval()
    with torch.no_grad():
        maps = net(torch.rand(2, 3, *size))
    assert list(maps) == list(net.feature_info) == list(net.out_features)
    for key, (channels, stride) in ((key, (info.channels, info.stride)) for key, info in net.feature_info.items()):
        assert maps[key].shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride)), key


def test_feature_info_of_the_papers_networks() -> None:
    assert create_backbone("resnet101").feature_info["conv4_x"] == FeatureInfo(channels=1024, stride=16)
    strides = {name: info.stride for name, info in create_backbone("resnet18").feature_info.items()}
    assert strides == {"conv1": 2, "conv2_x": 4, "conv3_x": 8, "conv4_x": 16, "conv5_x": 32}
    assert create_backbone("vgg16").feature_info["conv5"] == FeatureInfo(channels=512, stride=16)


def test_out_features_are_in_order_and_nothing_above_is_computed() -> None:
    net = create_backbone("resnet18", out_features=("conv4_x", "conv2_x"))
    calls: list[str] = []
    for name in ("layer3", "layer4"):
        for block in getattr(net, name):
            block.register_forward_hook(lambda *_, name=name: calls.append(name))
    assert list(net(torch.rand(1, 3, 32, 32))) == ["conv2_x", "conv4_x"]
    assert calls == ["layer3", "layer3"]


def test_an_unknown_map_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'conv4_x'"):
        create_backbone("resnet18", out_features=("conv4x",))
    with pytest.raises(InputError, match="empty"):
        create_backbone("resnet18", out_features=())


@pytest.mark.parametrize(("name", "at"), [("resnet18", 0), ("resnet18", 1), ("resnet18", 5), ("vgg16_bn", 2)])
def test_freezing_survives_train_and_a_training_step(name: str, at: int) -> None:
    net = create_backbone(name, freeze_at=at).train()
    net.eval()
    net.train()
    frozen = list(net.feature_info)[:at]
    before = copy.deepcopy(net.state_dict())
    loss = sum(features.mean() for features in net(torch.rand(2, 3, 32, 32)).values())
    if at < 5:
        loss.backward()
        torch.optim.SGD([p for p in net.parameters() if p.grad is not None], lr=1.0).step()
    for stage in net.feature_info:
        for module in net.stage_modules(stage):
            assert all(p.requires_grad is (stage not in frozen) for p in module.parameters())
            assert all(child.training is (stage not in frozen) for child in module.modules())
    frozen_ids = {id(value) for stage in frozen for m in net.stage_modules(stage) for value in m.state_dict(keep_vars=True).values()}
    for key, value in net.state_dict(keep_vars=True).items():
        if id(value) in frozen_ids:
            assert torch.equal(value, before[key]), key
        elif at < 5 and key.endswith("running_mean"):
            assert not torch.equal(value, before[key]), key


def test_freezing_less_lets_stages_learn_again() -> None:
    net = create_backbone("resnet18", freeze_at=3)
    net.layer4.requires_grad_(False)  # the user's own choice stays
    net.freeze(1)
    assert all(p.requires_grad for p in net.layer2.parameters())
    assert net.layer2[0].bn1.training
    assert not net.conv1.weight.requires_grad
    assert not any(p.requires_grad for p in net.layer4.parameters())


def test_freezing_too_much_is_refused() -> None:
    for at in (-1, 6):
        with pytest.raises(InputError, match="0 to 5"):
            create_backbone("resnet18", freeze_at=at)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg16_bn"])
def test_checkpointing_changes_neither_outputs_nor_gradients_nor_statistics(name: str) -> None:
    torch.manual_seed(0)
    plain = create_backbone(name, freeze_at=1).train()
    saving = create_backbone(name, freeze_at=1, checkpointing=True).train()
    saving.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 24, 24)
    for net in (plain, saving):
        net.out_features = tuple(net.feature_info)[:3]
        net.trim()
        for _ in range(2):
            sum(features.square().mean() for features in net(images).values()).backward()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(saving.state_dict()[key], value, msg=key)
    ours, theirs = gradients(saving), gradients(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-6) for key in theirs)
    assert all(m.momentum == 0.1 for m in saving.modules() if isinstance(m, nn.BatchNorm2d))


def test_checkpointing_stores_less() -> None:
    def stored(checkpointing: bool) -> int:
        net = create_backbone("resnet18", norm="frozen", allow_random_frozen=True, checkpointing=checkpointing)
        own, total = {p.untyped_storage().data_ptr() for p in net.parameters()}, [0]

        def count(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                total[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            net(torch.rand(1, 3, 64, 64))
        return total[0]

    assert stored(True) < stored(False) / 2


@pytest.mark.parametrize("name", ["resnet18", "vgg16_bn"])
def test_copies_and_pickles_are_the_same_network(name: str) -> None:
    net = create_backbone(name, out_features=None, freeze_at=2).eval()
    images = torch.rand(1, 3, 16, 16)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert isinstance(twin, Backbone)
        assert twin.out_features == net.out_features
        assert twin.feature_info == net.feature_info
        for key, value in net(images).items():
            assert torch.equal(twin(images)[key], value)
        twin.train()
        assert not any(p.requires_grad for p in twin.stage_modules("conv1")[0].parameters())
    other = create_backbone(name).eval()
    other.load_state_dict(net.state_dict())
    assert all(torch.equal(other(images)[key], value) for key, value in net(images).items())


def test_trim_removes_what_is_never_used() -> None:
    net = create_backbone("resnet18", out_features=("conv3_x",), freeze_at=2)
    before = net(torch.rand(1, 3, 32, 32).fill_(0.5))["conv3_x"]
    net.trim()
    assert list(net.feature_info) == ["conv1", "conv2_x", "conv3_x"]
    assert not any(key.startswith(("layer3", "layer4")) for key in net.state_dict())
    assert net.train()(torch.full((1, 3, 32, 32), 0.5))["conv3_x"].shape == before.shape
    vgg = create_backbone("vgg16", out_features=("conv2",))
    vgg.trim()
    assert [key for key in vgg.state_dict() if key.endswith("weight")] == [f"features.{n}.weight" for n in (0, 2, 5, 7)]
    assert list(vgg(torch.rand(1, 3, 8, 8))) == ["conv2"]


def test_every_parameter_gets_a_gradient_after_trim() -> None:
    net = create_backbone("resnet50", out_features=("conv4_x",))
    net.trim()
    net(torch.rand(1, 3, 32, 32))["conv4_x"].mean().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_staged_backbone_does_freezing_and_maps() -> None:
    stages = {"conv1": (nn.Conv2d(3, 4, 3, 2, 1), FeatureInfo(4, 2)), "conv2_x": (nn.Conv2d(4, 6, 3, 2, 1), FeatureInfo(6, 4))}
    net = StagedBackbone(stages, checkpointing=True)
    net.freeze(1)
    maps = net(torch.rand(1, 3, 9, 9))
    assert [tuple(m.shape) for m in maps.values()] == [(1, 4, 5, 5), (1, 6, 3, 3)]
    maps["conv2_x"].sum().backward()
    assert net.conv1.weight.grad is None
    assert net.conv2_x.weight.grad is not None
    assert not net.region_head_available()
    with pytest.raises(InputError, match="fpn"):
        net.split_region_head()


def test_preprocessing_travels_along() -> None:
    assert create_backbone("resnet18").preprocessing.mean == (0.485, 0.456, 0.406)
    assert len(imagenet_preprocessing(1).mean) == 1
    assert create_backbone("resnet18", in_channels=1).eval()(torch.rand(1, 1, 32, 32))["conv1"].shape == (1, 64, 16, 16)


def test_frozen_norm_has_nothing_to_train() -> None:
    net = create_backbone("resnet18", norm="frozen", allow_random_frozen=True)
    assert not [name for name, _ in net.named_parameters() if "bn" in name]
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in net.modules()) == 20


def test_importing_it_loads_torch_and_nothing_heavy(repository: Path) -> None:
    code = (
        "import sys, resbackbone, resbackbone.fpn, resbackbone.analysis\n"
        "resbackbone.create_backbone('resnet18')\n"
        "print([m for m in ('torchvision', 'timm', 'yaml', 'cv2', 'safetensors', 'numpy.testing') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
