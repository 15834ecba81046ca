"""Our backbones in torchvision's segmenters, against torchvision's own with the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from host_checks import batch_of, losses_of_training, randomise, relative
from torch import nn
from torchvision.models import segmentation

from resbackbone.errors import InputError
from resbackbone.integrations.torchvision import segmentation_model


def test_deeplab_is_torchvisions_with_its_weights() -> None:
    torch.manual_seed(0)
    theirs = randomise(segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=4, aux_loss=True))
    ours = segmentation_model("deeplabv3", num_classes=4, auxiliary=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    batch = batch_of()
    with torch.no_grad():
        found, expected = ours.eval()(batch), theirs.eval()(batch)
    assert list(found) == list(expected)
    for name in expected:
        assert relative(found[name], expected[name]) < 1e-5
    grads = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(0)  # dropout
        sum(each.square().mean() for each in model(batch).values()).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, wanted in grads[1].items():
        assert relative(grads[0][name], wanted) < 1e-4, name


def test_fcn_is_torchvisions_with_its_weights() -> None:
    theirs = randomise(segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=4)).eval()
    ours = segmentation_model("fcn", num_classes=4).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        assert relative(ours(batch_of(1))["out"], theirs(batch_of(1))["out"]) < 1e-5


def test_output_stride_sets_the_atrous_rates() -> None:
    with torch.device("meta"):
        for stride, rates in ((8, [1, 12, 24, 36]), (16, [1, 6, 12, 18])):
            model = segmentation_model("deeplabv3", "resnet101", output_stride=stride, auxiliary=True)
            branches = [branch[0] for branch in model.classifier[0].convs][:4]
            assert [branch.dilation[0] for branch in branches] == rates
            maps = model.backbone(torch.empty(1, 3, 64, 64))
            assert {name: list(each.shape[1:]) for name, each in maps.items()} == {
                "out": [2048, 64 // stride, 64 // stride],
                "aux": [1024, 64 // min(stride, 16), 64 // min(stride, 16)],
            }


@pytest.mark.parametrize(
    ("head", "name", "variant", "stride"),
    [("fcn", "resnet18", "v2", 8), ("deeplabv3", "resnet18", "v1.5", 16), ("fcn", "resnet50", "v1", 16)],
)
def test_segmenters_train_freeze_save_and_reload(head: str, name: str, variant: str, stride: int) -> None:
    torch.manual_seed(0)
    options = {"num_classes": 3, "output_stride": stride, "variant": variant, "freeze_at": 2, "auxiliary": True}
    model = segmentation_model(head, name, **options).train()
    batch, truth = batch_of(), torch.randint(0, 3, (2, 32, 48))
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    losses = losses_of_training(model, lambda net: sum(nn.functional.cross_entropy(each, truth) for each in net(batch).values()))
    assert losses[-1] < losses[0]
    changed = {key.split(".")[0] for key, value in model.backbone.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"layer2", "layer3", "layer4"} | ({"bn_last"} if variant == "v2" else set())
    again = segmentation_model(head, name, **options)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(batch)["out"], model.eval()(batch)["out"])


def test_a_copy_and_a_replaced_norm_stay_whole() -> None:
    model = segmentation_model("fcn", "resnet18", num_classes=2).eval()
    other = copy.deepcopy(model)
    batch = batch_of(1)
    with torch.no_grad():
        expected = model(batch)["out"]
        other.backbone.conv1.weight.zero_()
        assert torch.equal(model(batch)["out"], expected)
        assert not torch.equal(other(batch)["out"], expected)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert synced.backbone.network.bn1 is synced.backbone.bn1
    assert isinstance(synced.backbone.bn1, nn.SyncBatchNorm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "deeplab"}, "did you mean 'deeplabv3'"),
        ({"output_stride": 4}, "takes 8, 16 or 32"),
        ({"name": "vgg16", "output_stride": 8}, "VGG-16 takes 16 or 32"),
        ({"out_features": ("conv5_x",)}, "topmost"),
    ],
)
def test_wrong_segmentation_is_explained(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        segmentation_model(**{"head": "fcn", "name": "resnet18", **options})


def test_vgg_has_no_stride_of_8_but_rates_for_its_16() -> None:
    with torch.device("meta"):
        assert segmentation_model("deeplabv3", "vgg16", output_stride=16).classifier[0].convs[1][0].dilation == (6, 6)
