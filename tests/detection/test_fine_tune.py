"""Starting from a trained detector: which rows go where, that nothing else changes, and whose facts hold."""

from __future__ import annotations

import json
from pathlib import Path

import peers
import pytest
import torch
import yaml
from literal_steps import tiny_images
from safetensors.torch import load_file
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d

from detection.build import build_detector
from detection.config import DetectionConfig, load_detection_config
from detection.faster_rcnn import FasterRCNN
from detection.fine_tune import detector_from, same_classes
from detection.paper_tables import VOC_CLASSES
from detection.predict import config_from_weights, detector_metadata, load_detector, read_detector_file
from detection.torchvision_weights import torchvision_detector
from resbackbone.backbone import Preprocessing
from resbackbone.errors import InputError
from resbackbone.registry import create_backbone
from resbackbone.runtime.checkpoint import save_weights
from tools import train_det

TINY = [
    *("data.kind=coco", "data.min_size=48", "data.max_size=64", "data.workers=0", "model.head=fpn", "model.backbone.name=resnet20_cifar"),
    *("model.backbone.weights=null", "model.backbone.norm=batch", "model.backbone.freeze_at=0", "model.roi.samples=8"),
    *("model.roi.head_width=16", "model.roi.proposals_train=50", "model.roi.proposals_test=50", "model.test.score_threshold=0.0"),
    *("train.batch_size=2", "train.reference_batch=2", "train.warmup_steps=0", "train.schedule=constant", "train.precision=fp32"),
    *("train.eval_every=0", "eval.samples=0", "eval.report=false", "train.device=cpu"),
]
COCO = [name for name in FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:] if name != "N/A"]
CAFFE = Preprocessing(mean=(102.98, 115.95, 122.77), std=(1.0, 1.0, 1.0), color_order="BGR", input_range=255.0)
KNOWN = ("red", "sofa", "green", "zebra")  # of the file that most tests start from


def settings(*more: str) -> DetectionConfig:
    return load_detection_config(None, [*TINY, *more])


def save(path: Path, classes: tuple[str, ...] = KNOWN, *more: str, preprocessing: Preprocessing | None = None) -> Path:
    """A detector that was never trained, with scores and boxes worth looking at."""
    torch.manual_seed(1)
    config = settings(*more)
    detector = build_detector(config, len(classes), initial_weights=False, preprocessing=preprocessing)
    with torch.no_grad():
        for name, value in detector.state_dict().items():
            if name.startswith(("rpn.cls", "rpn.bbox", "roi_head.cls", "roi_head.bbox")):
                value.normal_(0, 0.1)
    save_weights(path, detector.state_dict(), detector_metadata(config, classes, detector))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("trained") / "model_final.safetensors")


def start(path: Path, classes: tuple[str, ...], *more: str, seed: int = 2) -> tuple[FasterRCNN, list[str]]:
    torch.manual_seed(seed)
    detector, lines = detector_from(settings(f"model.weights={path}", *more), classes)
    return detector.eval(), lines


def test_cocos_and_vocs_names_are_the_same_classes() -> None:
    renamed = {"aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle"}
    renamed |= {"pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv"}
    wanted = {label: COCO.index(renamed.get(name, name)) + 1 for label, name in enumerate(VOC_CLASSES, 1)}
    assert same_classes(VOC_CLASSES, COCO) == wanted
    assert same_classes(COCO, VOC_CLASSES) == {theirs: ours for ours, theirs in wanted.items()}


@pytest.mark.parametrize(
    ("classes", "known", "found"),
    [
        (("couch", "sofa"), ("sofa", "couch"), {1: 2, 2: 1}),  # a name of its own comes before an alias
        (("Potted_Plant", "unknown"), ("cat", "pottedplant"), {1: 2}),
        (("a", "b"), (), {}),
        ((), ("a",), {}),
    ],
)
def test_classes_are_found_by_name(classes: tuple[str, ...], known: tuple[str, ...], found: dict[int, int]) -> None:
    assert same_classes(classes, known) == found


def test_rows_go_where_their_class_is_and_all_else_is_as_it_was(tmp_path: Path) -> None:
    path = save(tmp_path / "masks.safetensors", KNOWN, "model.mask=true")
    classes = ("green", "new", "couch", "red", "newer")
    detector, lines = start(path, classes, "model.mask=true")
    torch.manual_seed(2)
    fresh = build_detector(settings("model.mask=true"), len(classes), initial_weights=False).state_dict()
    given, found = load_file(path), detector.state_dict()
    each_of = {"roi_head.cls_score": 1, "roi_head.bbox_pred": 4, "mask_head.mask_fcn_logits": 1}
    origin = {0: 0, 1: 3, 3: 2, 4: 1}  # ours → theirs, by hand; 2 and 5 are new
    for name, value in found.items():
        layer = name.rpartition(".")[0]
        if layer not in each_of:
            assert name.endswith("num_batches_tracked") or torch.equal(value, given[name]), name
            continue
        each = each_of[layer]
        assert len(value) == 6 * each
        for label in range(6):
            for row in range(each):
                wanted = given[name][each * origin[label] + row] if label in origin else fresh[name][each * label + row]
                assert torch.equal(value[each * label + row], wanted), (name, label, row)
    assert lines[1] == "rows taken over: roi_head.cls_score 4 of 6, roi_head.bbox_pred 16 of 24, mask_head.mask_fcn_logits 4 of 6"
    assert lines[2:] == [
        "classes taken over: background, green, couch ← sofa, red",
        "classes new, untrained: new, newer",
        "classes left out: zebra",
    ]


def test_it_detects_as_before(trained: Path) -> None:
    """The same classes in another order: the same boxes and scores. Some of them: the same scores beside one another's."""
    before, _ = load_detector(config_from_weights(trained), trained, device=torch.device("cpu"))
    order = ("zebra", "green", "red", "sofa")
    again, _ = start(trained, order)
    fewer, _ = start(trained, ("green", "red"))
    for image in tiny_images():
        (wanted,), (found,) = before.detect([image]), again.detect([image])
        assert len(wanted) > 10
        for label, name in enumerate(KNOWN, 1):
            mine, theirs = (
                one[torch.nonzero(one.labels == number).flatten()] for one, number in ((found, order.index(name) + 1), (wanted, label))
            )
            torch.testing.assert_close(mine.scores, theirs.scores, atol=1e-5, rtol=0)
            torch.testing.assert_close(mine.boxes, theirs.boxes, atol=1e-2, rtol=0)
        encoded = before.encode([image])
        (proposals,) = before.rpn.propose(encoded.predictions, encoded.sizes, before.rpn.test_limits)
        (all_logits, all_deltas), (logits, deltas) = (one.roi_head(encoded.features, [proposals], encoded.sizes) for one in (before, fewer))
        torch.testing.assert_close(logits, all_logits[:, [0, 3, 1]])
        torch.testing.assert_close(deltas.unflatten(1, (-1, 4)), all_deltas.unflatten(1, (-1, 4))[:, [0, 3, 1]])


@pytest.mark.parametrize(
    ("has", "wants", "told"), [(True, False, "the file's mask branch is left out"), (False, True, "the mask branch is new")]
)
def test_a_mask_branch_can_come_or_go(has: bool, wants: bool, told: str, tmp_path: Path) -> None:
    path = save(tmp_path / "one.safetensors", KNOWN, f"model.mask={str(has).lower()}")
    detector, lines = start(path, KNOWN, f"model.mask={str(wants).lower()}")
    assert told in lines[-1]
    assert (detector.mask_head is not None) == wants
    assert torch.equal(detector.roi_head.cls_score.weight, load_file(path)["roi_head.cls_score.weight"])


def test_the_files_facts_hold(tmp_path: Path) -> None:
    path = save(tmp_path / "one.safetensors", KNOWN, "model.backbone.norm_eps=1e-3", preprocessing=CAFFE)
    detector, _ = start(path, ("red",))
    assert detector.preprocess.preprocessing == CAFFE
    assert {module.eps for module in detector.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {1e-3}
    with pytest.raises(InputError, match=r"it has model\.backbone\.norm_eps=0\.001 \(here 1e-05\)"):
        start(path, ("red",), "model.backbone.norm_eps=1e-5")


@pytest.fixture(scope="module")
def run(tiny_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of two steps that learns nothing, and the file it started from."""
    folder = tmp_path_factory.mktemp("fine_tune")
    path = save(folder / "start.safetensors", KNOWN, "model.backbone.norm_eps=1e-3", preprocessing=CAFFE)
    (folder / "recipe.yaml").write_text(f"data: {{root: {tiny_coco}}}\nmodel: {{weights: {path}}}\n")
    # Statistics would move even so, were the norms not frozen: another norm with the same tensors.
    given = [*TINY, "model.backbone.norm=frozen", "train.lr=0", "train.steps=2", "train.save_every=1"]
    assert train_det.main(["--config", str(folder / "recipe.yaml"), "--output", str(folder / "run"), *given]) == 0
    return folder / "run", path


def test_a_run_says_what_it_took_and_needs_no_second_file(run: tuple[Path, Path], tiny_coco: Path) -> None:
    output, path = run
    log = (output / "log.txt").read_text()
    assert f"detector weights {path}: " in log
    assert "rows taken over: roi_head.cls_score 3 of 3, roi_head.bbox_pred 12 of 12" in log
    assert "classes left out: sofa, zebra" in log
    kept, final = load_file(path), load_file(output / "model_final.safetensors")
    assert torch.equal(final["roi_head.cls_score.weight"], kept["roi_head.cls_score.weight"][[0, 3, 1]])  # green, red
    assert all(torch.equal(final[name], kept[name]) for name in final if name.startswith(("backbone.", "rpn.")))
    moved = path.rename(path.with_suffix(".moved"))
    try:
        file = read_detector_file(output / "model_final.safetensors")
        config = config_from_weights(file.path)
        detector, classes = load_detector(config, file.path, device=torch.device("cpu"))
        assert (classes, detector.preprocess.preprocessing, config.model.backbone.norm_eps) == (("green", "red"), CAFFE, 1e-3)
        assert yaml.safe_load((output / "config.yaml").read_text())["model"]["weights"] == str(path)
        checkpoint = read_detector_file(output / "checkpoints/step_00000001")
        assert checkpoint.preprocessing == CAFFE
        config_path = str(output / "config.yaml")
        assert train_det.main(["--config", config_path, "--output", str(output), "--resume", "auto", "train.steps=3", "train.lr=0.01"]) == 0
        assert not torch.equal(load_file(file.path)["rpn.conv.weight"], final["rpn.conv.weight"])
        assert "resumed at step 2" in (output / "log.txt").read_text()
        resumed, _ = load_detector(config, file.path, device=torch.device("cpu"))
        assert resumed.preprocess.preprocessing == CAFFE
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert max(row["step"] for row in rows) == 3
    finally:
        moved.rename(path)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["model.backbone.name=resnet32_cifar"], r"model\.backbone\.name=resnet20_cifar \(here resnet32_cifar\)"),
        (["model.head=c4"], r"model\.head=fpn \(here c4\)"),
        (["model.test.context=true", "model.roi.op=pool"], r"model\.roi\.op=align \(here pool\), model\.test\.context=false \(here true\)"),
        (["model.backbone.variant=v1"], r"model\.backbone\.variant=v1\.5 \(here v1\)"),
        (["model.backbone.norm=group"], r"model\.backbone\.norm=batch \(here group\)"),
        (["model.anchor_sizes=[8,16,32,64,128]"], r"model\.anchor_sizes=null \(here \(8, 16, 32, 64, 128\)\)"),
    ],
)
def test_another_architecture_is_refused_by_its_settings(more: list[str], named: str, trained: Path) -> None:
    with pytest.raises(InputError, match=named + r"\. Set these as the file has them, or leave model\.weights out"):
        start(trained, KNOWN, *more)


def test_tensors_that_do_not_fit_are_named(trained: Path, tmp_path: Path) -> None:
    tensors = load_file(trained)
    tensors["rpn.more"] = tensors.pop("rpn.conv.bias")
    tensors["rpn.conv.weight"] = tensors["rpn.conv.weight"][:, :8].clone()
    file = read_detector_file(trained)
    detector = build_detector(settings(), len(KNOWN))
    save_weights(tmp_path / "odd.safetensors", tensors, detector_metadata(settings(), file.classes, detector))
    with pytest.raises(
        InputError, match=r"1 tensors missing \['rpn\.conv\.bias'\], 1 unexpected \['rpn\.more'\], 1 of another shape \['rpn\.conv\.w"
    ):
        start(tmp_path / "odd.safetensors", KNOWN)


def test_what_is_no_detector_is_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "net.safetensors", create_backbone("resnet20_cifar").state_dict(), {})
    with pytest.raises(InputError, match=r"holds no detector of ours.*Backbone weights belong into model\.backbone\.weights"):
        start(tmp_path / "net.safetensors", KNOWN)
    with pytest.raises(InputError, match=r"torchvision does not exist"):
        start(Path("torchvision"), KNOWN)


def torchvisions(rows: int, *, eps: float) -> torch.nn.Module:
    """torchvision's Mask R-CNN on ResNet-18, with scores worth looking at and norms such that their epsilon is seen."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=lambda channels: FrozenBatchNorm2d(channels, eps=eps))
    layers = {
        "box_head": TwoMLPHead(256 * 49, 32),
        "box_predictor": FastRCNNPredictor(32, rows),
        "mask_predictor": MaskRCNNPredictor(256, 256, rows),
    }
    model = MaskRCNN(backbone, min_size=min(peers.SIZE), max_size=max(peers.SIZE), **layers)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_var.uniform_(1e-5, 1e-4)
            module.weight.uniform_(2e-3, 4e-3)
    torch.nn.init.normal_(model.rpn.head.cls_logits.weight, std=0.2)
    torch.nn.init.normal_(layers["box_predictor"].cls_score.weight, std=10)
    torch.nn.init.normal_(layers["box_predictor"].bbox_pred.weight, std=0.1)
    return model.eval()


def test_torchvisions_coco_detector_detects_as_it_does_there(tmp_path: Path) -> None:
    """Through a file alone: names, settings, epsilon 0, and COCO's 80 classes of 91 rows."""
    peer = torchvisions(91, eps=0.0)
    gaps = [label for label, name in enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]) if name == "N/A"]
    peer.roi_heads.box_predictor.cls_score.bias.data[gaps] = -1e4  # trained, they are as good as never said
    torch.save(peer.state_dict(), tmp_path / "maskrcnn.pth")
    config = config_from_weights(tmp_path / "maskrcnn.pth")
    detector, classes = load_detector(config, tmp_path / "maskrcnn.pth", device=torch.device("cpu"))
    assert (config.model.backbone.name, config.model.mask, classes) == ("resnet18", True, tuple(COCO))
    (image,) = peers.random_images(1)
    with torch.no_grad():
        (wanted,), (found,) = peer([image / 255]), detector.detect([image])
    assert len(found) > 5
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert [classes[label - 1] for label in found.labels.tolist()] == [names[label] for label in wanted["labels"].tolist()]
    torch.testing.assert_close(found.scores, wanted["scores"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.boxes, wanted["boxes"], atol=1e-2, rtol=1e-4)

    given = ["model.head=fpn", "model.mask=true", "model.backbone.name=resnet18", "model.roi.head_width=32"]
    config = load_detection_config(None, [*given, f"model.weights={tmp_path / 'maskrcnn.pth'}"])
    started, lines = detector_from(config, VOC_CLASSES)
    assert lines[1] == "rows taken over: roi_head.cls_score 21 of 21, roi_head.bbox_pred 84 of 84, mask_head.mask_fcn_logits 21 of 21"
    assert torch.equal(started.mask_head.mask_fcn_logits.weight[20], peer.roi_heads.mask_predictor.mask_fcn_logits.weight[72])  # tv


def test_torchvisions_detector_of_unknown_classes_gives_all_but_their_rows(tmp_path: Path) -> None:
    torch.save(torchvisions(4, eps=1e-5).state_dict(), tmp_path / "own.pth")
    assert read_detector_file(tmp_path / "own.pth").classes == ("class 1", "class 2", "class 3")
    given = ["model.head=fpn", "model.backbone.name=resnet18", "model.roi.head_width=32", f"model.weights={tmp_path / 'own.pth'}"]
    _, lines = detector_from(load_detection_config(None, given), ("cat",))
    assert lines[1:3] == ["rows taken over: roi_head.cls_score 1 of 2, roi_head.bbox_pred 4 of 8", "classes taken over: background"]


def test_other_detectors_of_torchvision_are_refused() -> None:
    state = {"backbone.body.layer1.0.conv1.weight": torch.zeros(1), "roi_heads.box_predictor.cls_score.weight": torch.zeros(3, 8)}
    with pytest.raises(InputError, match=r"file\.pth is no fasterrcnn_resnet.*\(1, 0, 0, 0\) residual blocks"):
        torchvision_detector(state, "file.pth")
