"""Our backbones in torchvision's detectors and segmenters, against torchvision's own with the same weights."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from host_checks import batch_of, losses_of_training, photos, randomise, relative
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor, resnet_fpn_backbone
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from resbackbone import create_backbone
from resbackbone.errors import InputError
from resbackbone.integrations.torchvision import FPNBackbone, anchor_generator, fpn_backbone, normalization
from resbackbone.layers import FrozenBatchNorm2d

SMALL = {"min_size": 64, "max_size": 96}
FEW = {  # regions to run the heads on; a full training set of 512 would take minutes
    "rpn_post_nms_top_n_train": 64,
    "rpn_post_nms_top_n_test": 32,
    "box_batch_size_per_image": 16,
    "box_detections_per_img": 10,
}
FROZEN = {"norm": "frozen", "allow_random_frozen": True}
VARIANTS = [
    *(("resnet18", variant) for variant in ("v1", "v1.5", "v2")),
    *(("resnet50", variant) for variant in ("v1", "v1.5", "v2")),
    *(("resnet101", variant) for variant in ("v1", "v1.5", "v2")),
]


def targets(count: int = 1) -> list[dict[str, Tensor]]:
    boxes = torch.tensor([[8.0, 8.0, 40.0, 50.0], [30.0, 20.0, 76.0, 60.0]])
    masks = torch.zeros(2, 64, 80, dtype=torch.uint8)
    masks[0, 8:50, 8:40] = masks[1, 20:60, 30:76] = 1
    keypoints = torch.tensor([[[12.0, 12.0, 1.0]], [[40.0, 30.0, 1.0]]])
    return [{"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks, "keypoints": keypoints}] * count


def with_frozen_norms(kind: str) -> nn.Module:
    """torchvision's detector as it builds it when weights are given: fixed norms, three trainable layers, here without a download."""
    if kind == "retinanet":
        net = torchvision.models.resnet50(norm_layer=TorchvisionFrozenBatchNorm2d)
        return detection.RetinaNet(_resnet_fpn_extractor(net, 3, [2, 3, 4], LastLevelP6P7(256, 256)), 3, score_thresh=0.005, **SMALL)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3)
    return getattr(detection, kind)(backbone, 3, **SMALL, **FEW)


def as_users_get_it(kind: str) -> nn.Module:
    builder = {"FasterRCNN": "fasterrcnn_resnet50_fpn", "MaskRCNN": "maskrcnn_resnet50_fpn", "retinanet": "retinanet_resnet50_fpn"}[kind]
    few = {"score_thresh": 0.005} if kind == "retinanet" else FEW
    return getattr(detection, builder)(weights=None, weights_backbone=None, num_classes=3, **SMALL, **few)


def ours_like(kind: str, **options: object) -> nn.Module:
    if kind == "retinanet":
        return detection.RetinaNet(
            fpn_backbone(returned=("conv3_x", "conv4_x", "conv5_x"), extra="p6p7", **options), 3, score_thresh=0.005, **SMALL
        )
    return getattr(detection, kind)(fpn_backbone(**options), 3, **SMALL, **FEW)


def detections(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        (found,) = model.eval()(photos())
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(3)  # sampled anchors and regions
    sum(model.train()(photos(1), targets(1)).values()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("kind", "frozen"), [("FasterRCNN", True), ("MaskRCNN", False), ("retinanet", False)])
def test_detectors_are_torchvisions_with_its_weights(kind: str, frozen: bool) -> None:
    torch.manual_seed(0)
    theirs = randomise(with_frozen_norms(kind) if frozen else as_users_get_it(kind))
    ours = ours_like(kind, freeze_at=2, **FROZEN) if frozen else ours_like(kind)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    expected, found = detections(theirs), detections(ours)
    assert len(expected["boxes"]) >= 10
    assert torch.equal(found["labels"], expected["labels"])
    for key in expected.keys() - {"labels"}:
        assert relative(found[key], expected[key]) < 1e-5, key
    wanted, given = gradients(theirs), gradients(ours)
    assert given.keys() == wanted.keys()
    assert (min(name for name in given if name.startswith("backbone.body")) == "backbone.body.layer2.0.conv1.weight") is frozen
    for name in wanted:
        assert relative(given[name], wanted[name]) < 1e-4, name
    copied = copy.deepcopy(theirs).train()
    copied.load_state_dict(ours.state_dict(), strict=True)  # and back


def test_a_wrong_epsilon_shows_where_variances_are_small() -> None:
    torch.manual_seed(0)
    theirs = randomise(resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)).eval()
    for norm in theirs.modules():
        if isinstance(norm, TorchvisionFrozenBatchNorm2d):
            norm.eps = 0.0  # torchvision's overwrite_eps, for its COCO_V1 weights
    theirs.body.bn1.running_var.uniform_(1e-6, 1e-5)
    results = {}
    for eps in (0.0, 1e-5):
        ours = fpn_backbone("resnet18", norm_eps=eps, **FROZEN).eval()
        ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            found, expected = ours(photos()[0][None]), theirs(photos()[0][None])
        assert list(found) == list(expected) == list(ours.feature_info)
        results[eps] = max(relative(found[name], expected[name]) for name in expected)
    assert results[0.0] < 1e-5 < 1e-3 < results[1e-5]


def build(kind: str, name: str, **options: object) -> nn.Module:
    if kind in ("RetinaNet", "FCOS"):
        levels = fpn_backbone(name, returned=("conv3_x", "conv4_x", "conv5_x"), extra="p6p7", out_channels=64, **options)
        return getattr(detection, kind)(levels, 3, **SMALL)
    heads = {
        "KeypointRCNN": {"keypoint_head": KeypointRCNNHeads(32, (32,)), "keypoint_predictor": KeypointRCNNPredictor(32, 1)},
        "MaskRCNN": {"mask_head": MaskRCNNHeads(32, (256,), 1)},
    }
    few = FEW | ({"box_batch_size_per_image": 64} if name == "resnet101" else {})  # all: drawing a few makes a deep network's loss jump
    return getattr(detection, kind)(fpn_backbone(name, out_channels=32, **options), 3, **SMALL, **few, **heads.get(kind, {}))


def detection_step(model: nn.Module) -> Tensor:
    return sum(model(photos(1), targets(1)).values())


@pytest.mark.parametrize("kind", ["MaskRCNN", "KeypointRCNN", "RetinaNet", "FCOS"])
def test_the_other_detectors_train(kind: str) -> None:
    torch.manual_seed(0)
    model = build(kind, "resnet18", freeze_at=1).train()
    losses = losses_of_training(model, detection_step)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_variants_train_freeze_save_and_reload(name: str, variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build("FasterRCNN", name, variant=variant, freeze_at=2).train()
    body = model.backbone.body
    frozen = {id(p) for stage in ("conv1", "conv2_x") for module in body.stage_modules(stage) for p in module.parameters()}
    assert frozen
    assert all(parameter.requires_grad != (id(parameter) in frozen) for parameter in model.parameters())
    before = {key: value.clone() for key, value in body.state_dict().items()}
    losses = losses_of_training(model, detection_step, rate=1e-5 if name == "resnet101" else 2e-5)
    assert sum(losses[-2:]) / 2 < losses[0]
    changed = {key.split(".")[0] for key, value in body.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"layer2", "layer3", "layer4"} | ({"bn_last"} if variant == "v2" else set())
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = build("FasterRCNN", name, variant=variant, freeze_at=2)
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    expected, found = detections(model), detections(again)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_freezing_survives_hosts_that_take_the_children_out() -> None:
    """torchvision's extractor walks over the children and drops our train(): what is frozen must be so by itself."""
    net = fpn_backbone("resnet50", freeze_at=2).body
    extracted = _resnet_fpn_extractor(net, 5).train()  # 5: torchvision freezes nothing
    assert isinstance(extracted.body.bn1, FrozenBatchNorm2d)
    before = {key: value.clone() for key, value in extracted.body.state_dict().items()}
    extracted(batch_of())
    moved = {key.split(".")[0] for key, value in extracted.body.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"layer2", "layer3", "layer4"}
    assert not any(p.requires_grad for p in (*extracted.body.conv1.parameters(), *extracted.body.layer1.parameters()))


def test_anchors_are_torchvisions_for_five_levels_and_fit_any_other_number() -> None:
    rcnn = fpn_backbone("resnet18", out_channels=8)
    pyramid = fpn_backbone("resnet18", returned=("conv3_x", "conv4_x", "conv5_x"), extra="p6p7", out_channels=32)
    for ours, theirs in (
        (anchor_generator(rcnn), detection.FasterRCNN(rcnn, 2).rpn.anchor_generator),
        (anchor_generator(pyramid, size_per_stride=4, octaves=3), detection.RetinaNet(pyramid, 2).anchor_generator),
        (anchor_generator(pyramid, size_per_stride=1, aspect_ratios=(1.0,)), detection.FCOS(pyramid, 2).anchor_generator),
    ):
        assert isinstance(ours, AnchorGenerator)
        assert (ours.sizes, ours.aspect_ratios) == (theirs.sizes, theirs.aspect_ratios)
    short = fpn_backbone("resnet18", returned=("conv4_x",), extra=None, out_channels=8)
    model = detection.FasterRCNN(short, 2, rpn_anchor_generator=anchor_generator(short), **SMALL).eval()
    assert list(short.feature_info) == ["0"]
    with torch.no_grad():
        model(photos())


def test_levels_are_what_feature_info_says() -> None:
    with torch.device("meta"):
        backbone = fpn_backbone("resnet101", extra="p6p7", out_channels=64)
        levels = backbone(torch.empty(1, 3, 128, 128))
    assert {name: (info.channels, 128 // info.stride) for name, info in backbone.feature_info.items()} == {
        name: (level.shape[1], level.shape[2]) for name, level in levels.items()
    }
    assert list(levels) == ["0", "1", "2", "3", "p6", "p7"]


def test_images_in_the_order_and_range_the_weights_want() -> None:
    plain = create_backbone("resnet18")
    swapped = copy.deepcopy(plain)
    swapped.preprocessing = replace(plain.preprocessing, color_order="BGR", input_range=255.0, mean=(10.0, 20.0, 30.0), std=(1.0, 2.0, 3.0))
    backbone = FPNBackbone(swapped, out_channels=8)
    assert normalization(backbone) == {"image_mean": [30 / 255, 20 / 255, 10 / 255], "image_std": [3 / 255, 2 / 255, 1 / 255]}
    image = photos()[0][None]
    with torch.no_grad():
        expected, found = plain.eval()(image.flip(1))["conv5_x"], backbone.body.eval()(image)["conv5_x"]
    assert relative(found, expected) < 1e-5  # float addition in another order


def test_one_channel() -> None:
    backbone = fpn_backbone("resnet18", in_channels=1, out_channels=8)
    model = detection.FasterRCNN(backbone, 2, **normalization(backbone), **SMALL).eval()
    with torch.no_grad():
        model(photos(channels=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"returned": ("conv2_x", "layer4")}, "no feature map 'layer4'"),
        ({"returned": ("conv3_x", "conv6_x")}, "did you mean 'conv5_x'|did you mean 'conv"),
        ({"returned": ()}, "out_features is empty"),
        ({"returned": ("conv4_x", "conv5_x"), "output_stride": 16}, r"strides \[16, 16\]"),
        ({"extra": "p6_p7"}, "did you mean 'p6p7'"),
        ({"output_stride": 4}, "takes 8, 16 or 32"),
        ({"name": "resnet51"}, "did you mean 'resnet"),
        ({"norm": "frozen"}, "needs weights"),
        ({"freeze_at": 7}, "0 to 5"),
        ({"out_features": ("conv2_x",)}, "returned="),
        ({"trainable_layers": 3}, "no option 'trainable_layers'"),
    ],
)
def test_wrong_use_is_explained(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fpn_backbone(**{"name": "resnet18", **options})


def test_other_networks_serve_as_well() -> None:
    with torch.device("meta"):
        assert [info.stride for info in fpn_backbone("vgg16").feature_info.values()] == [4, 8, 16, 32]


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torchvision.models")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "resbackbone.integrations.torchvision")
    with pytest.raises(InputError, match="pip install torchvision"):
        import resbackbone.integrations.torchvision  # noqa: F401
