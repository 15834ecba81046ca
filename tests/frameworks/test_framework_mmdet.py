"""Our networks in MMDetection, against its own ResNets with the same weights. Runs where mmdet is installed: `make test-frameworks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from resbackbone import create_backbone, create_classifier
from resbackbone.errors import InputError
from resbackbone.layers import EvalBatchNorm2d, FrozenBatchNorm2d
from resbackbone.weights import WeightsInfo
from tests.frameworks import mmcv_operations
from tests.resbackbone.integrations.host_checks import losses_of_training, relative
from tests.resbackbone.integrations.host_norms import SMALL_VARIANCES
from tests.resbackbone.integrations.host_norms import randomise_norms as randomise

mmdet = pytest.importorskip("mmdet", reason="MMDetection is not installed; make test-frameworks has an environment with it")
mmcv_operations.provide()

from mmdet.models import ResNet  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.utils import register_all_modules  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

from resbackbone.integrations import mmdet as integration  # noqa: E402
from resbackbone.integrations.mmdet import Resbackbone  # noqa: E402

register_all_modules()
SHIPPED = Path(mmdet.__file__).parent / ".mim" / "configs" / "_base_" / "models"
DETECTORS = {"C4": "faster-rcnn_r50-caffe-c4.py", "FPN": "faster-rcnn_r50_fpn.py", "RetinaNet": "retinanet_r50_fpn.py"}


def shipped(kind: str) -> Any:
    """A configuration as MMDetection has it, but for few regions and no downloads."""
    model = Config.fromfile(SHIPPED / DETECTORS[kind]).model
    model.backbone.init_cfg = None
    if kind != "RetinaNet":
        model.train_cfg.rcnn.sampler.num = 16
        model.train_cfg.rpn_proposal.max_per_img = 32
        model.test_cfg.rpn.max_per_img = 32
        model.test_cfg.rcnn.update(max_per_img=10, score_thr=0.0)
        model.roi_head.bbox_head.num_classes = 3
    if kind == "C4":
        model.roi_head.shared_head.init_cfg = None
    if kind == "FPN":
        model.roi_head.bbox_head.fc_out_channels = 32
    return model


def build(model: Any, **backbone: Any) -> nn.Module:
    torch.manual_seed(0)
    model = model.copy()
    model.backbone = {**model.backbone, **backbone}
    return MODELS.build(model)


def images(size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))


def batch(model: nn.Module, *, training: bool) -> dict[str, Any]:
    pixels = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    sample = DetDataSample(metainfo={"img_shape": (64, 96), "ori_shape": (64, 96), "scale_factor": (1.0, 1.0)})
    boxes = torch.tensor([[8.0, 8.0, 40.0, 50.0], [30.0, 20.0, 76.0, 60.0]])
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 2]))
    return model.data_preprocessor({"inputs": [pixels], "data_samples": [sample]}, training)


def loss(model: nn.Module) -> Tensor:
    torch.manual_seed(3)  # sampled anchors and regions
    np.random.seed(3)
    terms = model(**batch(model, training=True), mode="loss")
    return model.parse_losses(terms)[0]


def detections(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        (found,) = model.eval()(**batch(model, training=False), mode="predict")
    return {name: getattr(found.pred_instances, name) for name in ("bboxes", "scores", "labels")}


@pytest.mark.parametrize("style", ["pytorch", "caffe"])
@pytest.mark.parametrize(
    ("strides", "dilations"), [((1, 2, 2, 2), (1, 1, 1, 1)), ((1, 2, 2, 1), (1, 1, 1, 2)), ((1, 2, 1, 1), (1, 1, 2, 4))]
)
@pytest.mark.parametrize("variance", [(0.5, 1.0), SMALL_VARIANCES])
def test_maps_are_bit_equal(style: str, strides: tuple, dilations: tuple, variance: tuple[float, float]) -> None:
    options = {"depth": 50, "style": style, "strides": strides, "dilations": dilations}
    theirs = randomise(ResNet(**options), variance=variance)
    theirs.eval()
    ours = Resbackbone(**options).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    other = Resbackbone(**options, dilation_rule="torchvision").eval()
    other.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        found, expected = ours(images()), theirs(images())
        assert isinstance(found, tuple)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert torch.equal(other(images())[-1], expected[-1]) is (dilations[3] == 1)


@pytest.mark.parametrize("kind", DETECTORS)
def test_detectors_are_theirs_with_their_weights(kind: str, tmp_path: Path) -> None:
    """One word of a shipped configuration changes. Losses, gradients, boxes, what learns, and five steps of training."""
    model = shipped(kind)
    theirs = randomise(build(model))
    ours = build(model, type="Resbackbone")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    expected, found = detections(theirs), detections(ours)
    assert len(expected["scores"]) >= 5
    assert torch.equal(found["labels"], expected["labels"])
    for name in ("bboxes", "scores"):
        assert relative(found[name], expected[name]) < 1e-5, name
    gradients = []
    for each in (ours, theirs):
        each.train()
        loss(each).backward()
        gradients.append({name: parameter.grad for name, parameter in each.named_parameters() if parameter.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[1].items():
        assert relative(gradients[0][name], wanted) < 1e-4, name
    learns = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert learns == {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    ours.zero_grad()
    losses = losses_of_training(ours.train(), loss, rate=1e-4)
    assert losses[-1] < losses[0]
    torch.save(ours.state_dict(), tmp_path / "model.pth")
    again = build(model, type="Resbackbone")
    again.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True), strict=True)
    assert all(torch.equal(*pair) for pair in zip(detections(again).values(), detections(ours).values(), strict=True))


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("resnet18", "v1.5"),
        ("resnet18", "v2"),
        ("resnet50", "v2"),
        *(("resnet101", variant) for variant in ("v1", "v1.5", "v2")),
    ],
)
def test_other_networks_train_and_stay_frozen(name: str, variant: str) -> None:
    model = shipped("RetinaNet")
    if name == "resnet18":
        model.neck.in_channels = [64, 128, 256, 512]
    detector = build(model, type="Resbackbone", name=name, variant=variant).train()
    backbone = detector.backbone
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    losses = losses_of_training(detector, loss, rate=1e-4)
    assert losses[-1] < losses[0]
    moved = {key.split(".")[0] for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"layer2", "layer3", "layer4"} | ({"bn_last"} if variant == "v2" else set())
    statistics = [key for key, value in backbone.state_dict().items() if "running" in key and not torch.equal(value, before[key])]
    assert statistics == []  # norm_eval


@pytest.mark.parametrize(
    ("norm_cfg", "norm_eval", "kind", "learns"),
    [
        ({"type": "BN", "requires_grad": True}, True, EvalBatchNorm2d, True),
        ({"type": "BN", "requires_grad": False}, True, FrozenBatchNorm2d, None),
        ({"type": "BN", "requires_grad": False}, False, nn.BatchNorm2d, False),
        ({"type": "SyncBN"}, False, nn.SyncBatchNorm, True),
        ({"type": "SyncBN"}, True, EvalBatchNorm2d, True),
        ({"type": "GN", "num_groups": 32}, True, nn.GroupNorm, True),
        (None, False, nn.BatchNorm2d, True),
    ],
)
def test_norms(norm_cfg: dict | None, norm_eval: bool, kind: type, learns: bool | None) -> None:
    norm = Resbackbone(depth=18, norm_cfg=norm_cfg, norm_eval=norm_eval).train().layer2[0].bn1
    assert isinstance(norm, kind)
    assert next((parameter.requires_grad for parameter in norm.parameters()), None) is learns
    if kind in (nn.BatchNorm2d, nn.SyncBatchNorm):
        assert norm.training
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(Resbackbone(depth=18, norm_eval=True)).train()
    assert not synced.layer2[0].bn1.training


def write(path: Path, **facts: Any) -> Path:
    torch.manual_seed(2)
    save_file(
        randomise(create_classifier("resnet18", num_classes=5)).state_dict(),
        path,
        WeightsInfo(architecture="resnet18", **facts).to_metadata(),
    )
    return path


def test_init_weights_loads_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "bgr.safetensors", color_order="BGR", mean=(10.0, 20.0, 30.0), std=(1.0, 2.0, 4.0), input_range=255.0)
    model = shipped("RetinaNet")
    model.neck.in_channels = [64, 128, 256, 512]
    detector = build(model, type="Resbackbone", depth=18, init_cfg={"type": "Pretrained", "checkpoint": str(path)})
    detector.init_weights()
    whole = create_backbone("resnet18", weights=path).eval()
    with torch.no_grad():
        assert relative(detector.backbone.eval()(images())[3], whole(images().flip(1))["conv5_x"]) < 1e-5
    assert integration.normalization(detector) == {
        "mean": pytest.approx([30.0, 20.0, 10.0]),
        "std": pytest.approx([4.0, 2.0, 1.0]),
        "bgr_to_rgb": True,
    }


def test_init_weights_without_a_file_zeroes_what_theirs_does() -> None:
    for options in ({"depth": 50}, {"depth": 18}):
        theirs, ours = ResNet(**options), Resbackbone(**options)
        theirs.init_weights()
        ours.init_weights()
        zeros = [{name for name, value in net.named_parameters() if not value.any() and "weight" in name} for net in (ours, theirs)]
        assert zeros[0] == zeros[1] != set()


def test_a_configuration_imports_it(tmp_path: Path) -> None:
    text = 'custom_imports = dict(imports=["resbackbone.integrations.mmdet"], allow_failed_imports=False)\n'
    (tmp_path / "mine.py").write_text(text + 'backbone = dict(type="Resbackbone", depth=18, out_indices=("conv3_x", "conv5_x"))\n')
    backbone = MODELS.build(Config.fromfile(tmp_path / "mine.py").backbone)
    assert [list(each.shape[1:]) for each in backbone(images())] == [[128, 8, 8], [512, 2, 2]]
    assert "layer4.1.bn2.weight" in backbone.state_dict()
    assert "layer4.0.conv1.weight" not in Resbackbone(depth=18, out_indices=(0, 2)).state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_indices": (0, 4)}, "3 or 'conv5_x'"),
        ({"num_stages": 3, "strides": (1, 2, 2), "dilations": (1, 1, 1), "out_indices": (3,)}, "with 3 stages has"),
        ({"out_indices": ()}, "is not possible"),
        ({"strides": (2, 2, 2, 2)}, "choose from"),
        ({"style": "cafe"}, "did you mean 'caffe'"),
        ({"deep_stem": True}, "only MMDetection's own ResNet"),
        ({"plugins": [{}]}, "leave it at None"),
        ({"norm_cfg": {"type": "LN"}}, "choose type 'BN'"),
        ({"depth": 51}, "no backbone 'resnet51'"),
        ({"frozen": 1}, "no option 'frozen'"),
        ({"pretrained": "a", "init_cfg": {"type": "Pretrained", "checkpoint": "b"}}, "give init_cfg alone"),
    ],
)
def test_wrong_use_is_explained(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Resbackbone(**{"depth": 18, **options})


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("torchvision://resnet50", "another network than resnet18"),
        ("open-mmlab://detectron2/resnet50_caffe", "download it"),
        ("missing.pth", "missing.pth"),
    ],
)
def test_wrong_checkpoints_are_explained(checkpoint: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Resbackbone(depth=18, pretrained=checkpoint).init_weights()
    with pytest.raises(InputError, match="holds 0 backbones"):
        integration.normalization(nn.Identity())


def test_settings_of_theirs_that_change_nothing() -> None:
    Resbackbone(depth=18, stem_channels=None, stage_with_dcn=[False] * 4, with_cp=True, groups=1, base_width=64)
