"""Our networks in detectron2, against its own ResNets with the same weights. Runs where detectron2 is installed; no registry has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from resbackbone import create_classifier
from resbackbone.errors import InputError
from resbackbone.integrations.hosting import prepare
from resbackbone.layers import FrozenBatchNorm2d
from resbackbone.weights import WeightsInfo
from resbackbone.weights.detectron2 import to_detectron2
from tests.resbackbone.integrations.host_checks import losses_of_training, relative
from tests.resbackbone.integrations.host_norms import SMALL_VARIANCES
from tests.resbackbone.integrations.host_norms import randomise_norms as randomise

detectron2 = pytest.importorskip("detectron2", reason="detectron2 is not installed, and no package registry has it")

from detectron2.config import LazyCall, get_cfg, instantiate  # noqa: E402
from detectron2.modeling import FPN, build_model  # noqa: E402
from detectron2.modeling.backbone.fpn import LastLevelMaxPool  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402

from resbackbone.integrations import detectron2 as integration  # noqa: E402
from resbackbone.integrations.detectron2 import Resbackbone, patch_config  # noqa: E402

RCNN = {"MODEL.META_ARCHITECTURE": "GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES": 3, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16}
PYRAMID = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
}
DILATED = {
    "MODEL.RESNETS.OUT_FEATURES": ["res5"],
    "MODEL.RESNETS.RES5_DILATION": 2,
    "MODEL.RPN.IN_FEATURES": ["res5"],
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["res5"],
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
}
RETINA = {
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.RETINANET.NUM_CLASSES": 3,
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
}
KINDS: dict[str, dict[str, Any]] = {"C4": RCNN, "FPN": RCNN | PYRAMID, "DC5": RCNN | DILATED, "RetinaNet": RETINA}


def config(kind: str, **more: Any) -> Any:
    cfg = get_cfg()
    few = {"MODEL.RPN.POST_NMS_TOPK_TRAIN": 32, "MODEL.RPN.POST_NMS_TOPK_TEST": 32, "TEST.DETECTIONS_PER_IMAGE": 10}
    settings = {"MODEL.DEVICE": "cpu", "MODEL.WEIGHTS": "", "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0, **few, **KINDS[kind], **more}
    cfg.merge_from_list([item for pair in settings.items() for item in pair])
    return cfg


def build(cfg: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(cfg)


def as_theirs(cfg: Any) -> Any:
    """`cfg` with our backbone and nothing else changed: its images, and in a C4 model its own res5."""
    cfg.MODEL.BACKBONE.NAME = integration.BUILDERS[cfg.MODEL.BACKBONE.NAME]
    return cfg


def renamed(ours: nn.Module, prefix: str) -> dict[str, str]:
    """Our key -> theirs, in the backbone at `prefix` of a detector."""
    state = ours.get_submodule(prefix).state_dict()
    keys = {id(tensor): key for key, tensor in state.items()}
    return {f"{prefix}.{keys[id(tensor)]}": f"{prefix}.{name}" for name, tensor in to_detectron2(state).items()}


def moved_weights(ours: nn.Module, theirs: nn.Module) -> dict[str, str]:
    """Load theirs into ours, strictly; our key -> theirs."""
    prefix = "backbone.bottom_up" if hasattr(ours.backbone, "bottom_up") else "backbone"
    names = renamed(ours, prefix)
    state = theirs.state_dict()
    assert set(names.values()) == {key for key in state if key.startswith((f"{prefix}.stem.", f"{prefix}.res"))}
    keys = {key: names.get(key, key) for key in ours.state_dict() if not key.endswith("num_batches_tracked")}
    ours.load_state_dict({key: state[name] for key, name in keys.items()}, strict=True)
    return keys


def batch() -> list[dict[str, Any]]:
    pixels = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 50.0], [30.0, 20.0, 76.0, 60.0]]))
    return [{"image": pixels, "instances": Instances((64, 96), gt_boxes=boxes, gt_classes=torch.tensor([0, 2]))}]


def loss(model: nn.Module) -> Tensor:
    torch.manual_seed(3)  # sampled anchors and regions
    if hasattr(model, "loss_normalizer"):
        model.loss_normalizer = 100  # as at first: RetinaNet's is a running mean, which would scale each step's loss in another way
    with EventStorage():
        return sum(model(batch()).values())


def detections(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        found = model.eval()(batch())[0]["instances"]
    return {"boxes": found.pred_boxes.tensor, "scores": found.scores, "classes": found.pred_classes}


@pytest.mark.parametrize("kind", KINDS)
def test_detectors_are_theirs_with_their_weights(kind: str) -> None:
    """Images, losses, gradients, boxes and what learns; the stride is in the 1x1 on both sides, dilation by the same rule."""
    theirs = randomise(build(config(kind)))
    ours = build(as_theirs(config(kind)))
    keys = moved_weights(ours, theirs)
    expected, found = detections(theirs), detections(ours)
    assert len(expected["scores"]) >= 5
    assert torch.equal(found["classes"], expected["classes"])
    for name in ("boxes", "scores"):
        assert relative(found[name], expected[name]) < 1e-5, name
    gradients = []
    for each in (ours, theirs):
        loss(each.train()).backward()
        gradients.append({name: parameter.grad for name, parameter in each.named_parameters() if parameter.requires_grad})
    assert {keys[name] for name in gradients[0]} == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert relative(gradient, gradients[1][keys[name]]) < 1e-4, name


def test_the_stride_and_the_rule_of_dilation_are_silent_traps() -> None:
    """Same names, no error, other outputs."""
    theirs = randomise(build(config("DC5")), variance=SMALL_VARIANCES)
    for options, equal in (({}, True), ({"STYLE": "v1.5"}, False), ({"RULE": "torchvision"}, False)):
        cfg = as_theirs(config("DC5"))
        chosen = {"VARIANT": options.get("STYLE", "v1"), "DILATION_RULE": options.get("RULE", "detectron2")}
        cfg.MODEL[integration.OPTIONS] = type(cfg)(chosen)
        ours = build(cfg)
        moved_weights(ours, theirs)
        x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            difference = relative(ours.eval().backbone(x)["res5"], theirs.eval().backbone(x)["res5"])
        assert (difference < 1e-5) if equal else (difference > 1e-2)


@pytest.mark.parametrize(
    ("kind", "name", "variant"),
    [
        ("C4", "resnet18", "v1.5"),
        ("RetinaNet", "resnet18", "v2"),  # no regions are drawn in it, whose number would move the loss
        ("C4", "resnet50", "v1"),
        ("FPN", "resnet50", "v1.5"),
        ("DC5", "resnet18", "v1.5"),
        ("RetinaNet", "resnet50", "v2"),
        pytest.param("C4", "resnet101", "v1", marks=pytest.mark.slow),
        pytest.param("FPN", "resnet101", "v1.5", marks=pytest.mark.slow),
        pytest.param("RetinaNet", "resnet101", "v2", marks=pytest.mark.slow),
    ],
)
def test_networks_train_freeze_save_and_reload(kind: str, name: str, variant: str, tmp_path: Path) -> None:
    cfg = patch_config(config(kind), name, variant=variant, norm="batch")  # fixed norms of no data would not train
    model = build(cfg).train()
    body = getattr(model.backbone, "bottom_up", model.backbone)
    assert isinstance(body, Resbackbone)
    fixed = {key for key, parameter in body.named_parameters() if not parameter.requires_grad}
    assert fixed == {key for key, _ in body.named_parameters() if key.startswith(("conv1", "layer1."))}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    losses = losses_of_training(model, loss)
    assert losses[-1] < losses[0]
    prefix = "backbone.bottom_up." if body is not model.backbone else "backbone."
    moved = {key.removeprefix(prefix).split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {"layer2", "layer3"} < moved
    assert not {"conv1", "bn1", "layer1"} & moved
    if kind == "C4":
        assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items() if "roi_heads.res5.layer4" in key)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    again = build(cfg)
    again.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True), strict=True)
    assert all(torch.equal(*pair) for pair in zip(detections(again).values(), detections(model).values(), strict=True))


def test_patch_sets_what_the_weights_want(tmp_path: Path) -> None:
    path = tmp_path / "bgr.safetensors"
    facts = {"color_order": "BGR", "mean": (10.0, 20.0, 30.0), "std": (1.0, 2.0, 4.0), "input_range": 255.0}
    whole = randomise(create_classifier("resnet50", num_classes=5, variant="v1"))
    save_file(whole.state_dict(), path, WeightsInfo(architecture="resnet50", variant="v1", **facts).to_metadata())
    cfg = patch_config(config("C4"), variant="v1", weights=path)
    assert (cfg.INPUT.FORMAT, cfg.MODEL.WEIGHTS, cfg.MODEL.RESNETS.STRIDE_IN_1X1) == ("RGB", "", True)
    assert pytest.approx([30.0, 20.0, 10.0]) == cfg.MODEL.PIXEL_MEAN
    assert pytest.approx([4.0, 2.0, 1.0]) == cfg.MODEL.PIXEL_STD
    model = build(cfg)
    assert torch.equal(model.roi_heads.res5.layer4[0].conv1.weight, whole.layer4[0].conv1.weight)
    assert torch.equal(model.backbone.conv1.weight, whole.conv1.weight.flip(1))
    plain = patch_config(config("FPN"), "resnet18")
    assert pytest.approx([58.395, 57.12, 57.375]) == plain.MODEL.PIXEL_STD
    assert (plain.MODEL.RESNETS.STRIDE_IN_1X1, plain.MODEL.RESNETS.RES2_OUT_CHANNELS) == (False, 64)
    assert patch_config(patch_config(config("FPN"))).MODEL.BACKBONE.NAME == "build_resbackbone_fpn"


def test_lazy_configuration_and_freeze() -> None:
    """The pyramid's in_features interpolates bottom_up.out_features."""
    lazy = LazyCall(FPN)(
        bottom_up=LazyCall(Resbackbone)(name="resnet18", out_features=["res4", "res5"], freeze_at=0, norm="batch"),
        in_features="${.bottom_up.out_features}",
        out_channels=8,
        top_block=LazyCall(LastLevelMaxPool)(),
    )
    pyramid = instantiate(lazy)
    assert pyramid.size_divisibility == 32
    assert {name: each.stride for name, each in pyramid.output_shape().items()} == {"p4": 16, "p5": 32, "p6": 64}
    body = pyramid.bottom_up
    assert body.freeze(2) is body
    assert isinstance(body.train().layer1[0].bn1, FrozenBatchNorm2d)
    assert list(body(torch.rand(1, 3, 64, 64))) == ["res4", "res5"]
    assert prepare(body.network) is body.network


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MODEL.BACKBONE.NAME": "build_mnasnet"}, "no counterpart"),
        ({"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, True, True]}, "deformable"),
        ({"MODEL.RESNETS.NORM": "FrozenBn"}, "did you mean 'FrozenBN'"),
    ],
)
def test_wrong_configurations_are_explained(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        patch_config(config("C4", **settings))


def test_wrong_names_are_explained() -> None:
    with pytest.raises(InputError, match="did you mean 'res5'"):
        Resbackbone("resnet18", out_features=["res6"])
    with pytest.raises(InputError, match="no option 'freeze'"):
        patch_config(config("C4"), freeze=2)
