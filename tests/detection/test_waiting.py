"""A training step on a GPU asks for nothing, so the host need not wait: run here on tensors that only say they are on a GPU.

And what is computed in its place, tensors of fixed size with marked places, gives what the sizes of a CPU give.
"""

from __future__ import annotations

import math
from typing import Any

import peers
import pytest
import torch
from as_if_on_a_gpu import as_if_on_a_gpu
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import MultiScaleRoIAlign, RoIAlign

from detection import batch_detections, faster_rcnn, mask_head, matching, pooling, roi_head, rpn, waiting
from detection.build import build_detector
from detection.config import load_detection_config
from detection.faster_rcnn import FasterRCNN
from detection.mask_head import cut_masks
from detection.matching import BELOW, BETWEEN, balanced_sample, match
from detection.pooling import RegionPooler
from detection.segmentation.build import build_segmenter
from detection.segmentation.config import load_segmentation_config
from detection.structures import Target
from resbackbone.backbone import FeatureInfo

SMALL = ["model.backbone.name=resnet20_cifar", "model.backbone.weights=null", "model.backbone.norm=group", "model.backbone.freeze_at=0"]
HEADS = {
    "fpn": ["model.head=fpn", "model.roi.head_width=16"],
    "c4": ["model.head=c4"],
    "context": ["model.head=c4", "model.test.context=true"],
    "mask": ["model.head=fpn", "model.roi.head_width=16", "model.mask=true"],
    "pyramid of four levels": ["model.head=fpn", "model.backbone.name=resnet18", "model.roi.head_width=16", "model.mask=true"],
    "mask on c4": ["model.head=c4", "model.mask=true"],
}
ASKING = (matching, rpn, pooling, mask_head, faster_rcnn)


class Reads(TorchDispatchMode):
    """Counts operators whose result's size or value the host must know."""

    NAMES = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal", "torchvision::nms")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator._schema.name
        by_mask = name in ("aten::index", "aten::index_put_") and any(one is not None and one.dtype == torch.bool for one in args[1])
        if name in self.NAMES or by_mask:
            self.seen.append(name)
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is computed as on a GPU."""
    for module in ASKING:
        monkeypatch.setattr(module, "is_asking_free", lambda tensor: False)


def detector_of(head: str, *more: str) -> FasterRCNN:
    torch.manual_seed(0)
    few = ["model.roi.samples=16", "model.roi.proposals_train=50", "model.roi.candidates_train=300"]
    return build_detector(load_detection_config(None, [*SMALL, *HEADS[head], *few, *more]), peers.CLASSES).train()


def images_and_targets(counts: tuple[int, ...] = (2, 0, 3), *, device: str = "cpu") -> tuple[list[Tensor], list[Target]]:
    images = [image.to(device, non_blocking=True) for image in peers.random_images(len(counts))]
    targets = []
    for number, count in enumerate(counts):
        boxes = peers.random_boxes(count, seed=number, min_side=16)
        one = peers.target(boxes, masks=torch.ones((count, *peers.SIZE), dtype=torch.uint8))
        targets.append(one.to(device, non_blocking=True))
    return images, targets


@pytest.mark.parametrize("head", HEADS)
def test_a_step_asks_a_gpu_for_nothing(head: str) -> None:
    with as_if_on_a_gpu(detector_of(head)) as detector:
        losses = detector(*images_and_targets(device="cuda"))
        assert all(loss.device.type == "cuda" and loss.shape == () for loss in losses.values())
        assert len(losses) == (4 if detector.mask_head is None else 5)


def test_a_crowd_asks_a_gpu_for_nothing() -> None:
    with as_if_on_a_gpu(detector_of("mask")) as detector:
        assert len(detector(*images_and_targets((mask_head.MASKS_AT_ONCE + 5, 1), device="cuda"))) == 5


def test_a_segmenter_asks_a_gpu_for_nothing() -> None:
    config = load_segmentation_config(None, ["model.backbone.name=resnet18", "model.backbone.weights=null"])
    with as_if_on_a_gpu(build_segmenter(config, 3).train()) as segmenter:
        images, targets = images_and_targets(device="cuda")
        for target in targets:
            target.label_map = torch.zeros(peers.SIZE, dtype=torch.uint8, device="cuda")
        assert segmenter(images, targets)["pixel"].device.type == "cuda"


def test_what_waits_is_seen() -> None:
    """The tests above can fail: each way of waiting is refused."""
    with as_if_on_a_gpu(nn.Linear(2, 2)) as layer:
        weight = layer.weight
        with pytest.raises(DataDependentOutputException):
            weight.sum().item()
        with pytest.raises(DataDependentOutputException):
            (weight > 0).tolist()
        with pytest.raises(DynamicOutputShapeException):
            weight[weight > 0]
        with pytest.raises(AssertionError, match="waits"):
            weight.new_tensor([1.0, 2.0])
        with pytest.raises(AssertionError, match="waits"):
            torch.zeros(3).to("cuda")
        assert waiting.constant([1.0, 2.0], like=weight).device == weight.device


@pytest.mark.parametrize("head", HEADS)
def test_nor_does_its_backward_pass(head: str, marked: None) -> None:
    detector, (images, targets) = detector_of(head), images_and_targets()
    with Reads() as reads:
        torch.stack(list(detector(images, targets).values())).sum().backward()
    assert reads.seen == []
    assert [name for name, one in detector.named_parameters() if one.grad is None] == []


@pytest.mark.parametrize("counts", [(2, 0, 3), (1,), (0, 0)])
@pytest.mark.parametrize("head", HEADS)
def test_losses_and_gradients_are_those_of_the_cpu(head: str, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every candidate is sampled, so that it doesn't matter how they are drawn."""
    detector, (images, targets) = detector_of(head), images_and_targets(counts)
    detector.rpn.samples = detector.roi_head.samples = 10**6
    detector.rpn.positive_fraction = detector.roi_head.positive_fraction = 1.0
    wanted = detector(images, targets)
    torch.stack(list(wanted.values())).sum().backward()
    gradients = {name: one.grad for name, one in detector.named_parameters()}
    detector.zero_grad(set_to_none=True)
    for module in ASKING:
        monkeypatch.setattr(module, "is_asking_free", lambda tensor: False)
    found = detector(images, targets)
    torch.stack(list(found.values())).sum().backward()
    assert found.keys() == wanted.keys()
    for name, loss in found.items():
        torch.testing.assert_close(loss, wanted[name], rtol=1e-5, atol=1e-6, msg=name)
    for name, one in detector.named_parameters():
        torch.testing.assert_close(one.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("head", ["fpn", "c4"])
def test_proposals_are_those_of_the_cpu(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    detector, (images, _) = detector_of(head), images_and_targets()
    encoded = detector.encode(images)
    for limits in (detector.rpn.train_limits, rpn.Limits(candidates=5000, proposals=5000)):
        wanted = detector.rpn.propose(encoded.predictions, encoded.sizes, limits)
        monkeypatch.setattr(rpn, "is_asking_free", lambda tensor: False)
        found = detector.rpn.propose(encoded.predictions, encoded.sizes, limits)
        monkeypatch.undo()
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours[: len(theirs)], theirs)
            assert not ours[len(theirs) :].any()


@pytest.mark.parametrize("head", HEADS)
def test_detections_are_those_of_the_cpu(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is asked for doesn't grow with the number of images; the last one has no detection."""
    detector, images = detector_of(head).eval(), peers.random_images(4)
    detector.roi_head.score_threshold, detector.roi_head.detections = 0.18, 12
    nn.init.normal_(detector.roi_head.cls_score.weight, std=0.05)
    detector.rpn.test_limits = rpn.Limits(candidates=200, proposals=100)
    encoded = detector.encode(images)
    proposals = detector.rpn.propose(encoded.predictions, encoded.sizes, detector.rpn.test_limits)
    proposals[3] = torch.zeros_like(proposals[3])
    wanted = detector._detections(encoded, proposals)
    assert [len(one) for one in wanted[:3]] == [12, 12, 12]
    assert len(wanted[3]) == 0
    for module in (*ASKING, roi_head):
        monkeypatch.setattr(module, "is_asking_free", lambda tensor: False)
    with Reads() as reads:
        found = detector._detections(encoded, proposals)
    assert sorted(reads.seen) == ["aten::nonzero", "aten::nonzero", "torchvision::nms"], "and one list of numbers, which a CPU doesn't show"
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        torch.testing.assert_close(ours.scores, theirs.scores)
        torch.testing.assert_close(ours.boxes, theirs.boxes)
        assert (ours.masks is None) == (theirs.masks is None) == (detector.mask_head is None)
        if ours.masks is not None:
            torch.testing.assert_close(ours.masks, theirs.masks)


def test_too_many_candidates_for_one_nms(marked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    detector, images = detector_of("fpn").eval(), peers.random_images(3)
    monkeypatch.setattr(roi_head, "is_asking_free", lambda tensor: False)
    detector.roi_head.score_threshold = 0.1
    at_once = detector.detect(images)
    monkeypatch.setattr(batch_detections, "AT_ONCE", 0)
    for one, other in zip(detector.detect(images), at_once, strict=True):
        assert len(one) > 5
        assert torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.boxes, other.boxes)


@pytest.mark.parametrize(
    ("positives", "negatives", "wanted"),
    [(100, 100, (8, 8)), (3, 100, (3, 13)), (100, 5, (8, 5)), (0, 40, (0, 16)), (0, 4, (0, 4)), (1, 0, (1, 0)), (0, 0, (0, 0))],
)
def test_marked_sample_counts(positives: int, negatives: int, wanted: tuple[int, int], marked: None) -> None:
    matches = torch.cat((torch.arange(positives), torch.full((negatives,), BELOW), torch.full((9,), BETWEEN)))
    matches = matches[torch.randperm(len(matches), generator=torch.Generator().manual_seed(0))]
    sample = balanced_sample(matches, count=16, positive_fraction=0.5)
    positive, negative = sample.index[sample.positive], sample.index[sample.negative]
    assert len(sample.index) == min(16, len(matches))
    assert (len(positive), len(negative)) == wanted
    assert (matches[positive] >= 0).all()
    assert (matches[negative] == BELOW).all()
    assert len(torch.cat((positive, negative)).unique()) == sum(wanted)
    assert sample.positive.tolist() == sorted(sample.positive.tolist(), reverse=True), "positives come first"
    assert not sample.positive[sample.reserved :].any()


def test_marked_sample_is_uniform(marked: None) -> None:
    matches = torch.full((60,), BELOW)
    matches[::3] = 7
    generator, times, draws = torch.Generator().manual_seed(0), torch.zeros(60), 2000
    for _ in range(draws):
        sample = balanced_sample(matches, count=20, positive_fraction=0.5, generator=generator)
        times[sample.index[sample.positive | sample.negative]] += 1
    for of_kind, share in ((matches >= 0, 10 / 20), (matches < 0, 10 / 40)):
        assert (times[of_kind] - share * draws).abs().max() < 5 * math.sqrt(draws * share * (1 - share)), "five standard deviations"


def test_marked_sample_follows_its_generator(marked: None) -> None:
    matches = torch.randint(-2, 5, (500,), generator=torch.Generator().manual_seed(0))

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return balanced_sample(matches, count=32, positive_fraction=0.5, generator=generator).index.tolist()

    state = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_matches_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, boxes in enumerate((0, 1, 12)):
        candidates, truth = peers.random_boxes(300, seed=seed).round(), peers.random_boxes(boxes, seed=100 + seed)
        wanted = match(candidates, truth, high=0.7, low=0.3, allow_low_quality=True, chunk=64)
        monkeypatch.setattr(matching, "is_asking_free", lambda tensor: False)
        assert torch.equal(match(candidates, truth, high=0.7, low=0.3, allow_low_quality=True, chunk=64), wanted)
        monkeypatch.undo()


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("levels", [1, 4])
def test_regions_are_pooled_as_torchvision_does(levels: int, sampling_ratio: int, aligned: bool, marked: None) -> None:
    """Among them boxes at the borders, thinner than a cell of any level: RoIAlign makes them a cell long, beyond the map."""
    generator = torch.Generator().manual_seed(0)
    names = [f"p{number}" for number in range(2, 2 + levels)]
    info = {name: FeatureInfo(channels=3, stride=4 * 2**number) for number, name in enumerate(names)}
    size = (512, 640)
    maps = {
        name: torch.randn((2, 3, size[0] // one.stride, size[1] // one.stride), generator=generator, requires_grad=True)
        for name, one in info.items()
    }
    at_borders = [[0.0, 0.0, 640.0, 512.0], [630.0, 500.0, 640.0, 512.0], [0.0, 0.0, 3.0, 2.0], [0.0, 300.0, 640.0, 512.0]]
    at_borders += [[100.0, 511.0, 140.0, 512.0], [639.0, 100.0, 640.0, 140.0], [0.0, 511.5, 640.0, 512.0], [0.0, 0.0, 0.5, 400.0]]
    boxes = [torch.cat((torch.tensor(at_borders), peers.random_boxes(30, size=size, seed=seed))) for seed in range(2)]
    pooler = RegionPooler(info, sampling_ratio=sampling_ratio, aligned=aligned)
    pooler._takes_bags = lambda features: False  # type: ignore[method-assign]
    found = pooler(maps, boxes, [size] * 2)
    image = torch.arange(2).repeat_interleave(len(boxes[0]))
    rois, level = torch.cat((image[:, None].float(), torch.cat(boxes)), dim=1), pooler.levels_of(torch.cat(boxes))
    wanted = torch.zeros_like(found)
    for number, one in enumerate(info.values()):
        rows = torch.nonzero(level == number).flatten()
        align = RoIAlign(7, 1 / one.stride, sampling_ratio, aligned=aligned)
        wanted = wanted.index_copy(0, rows, align(maps[names[number]], rois[rows]))
    assert len(level.unique()) == levels
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    weight = torch.randn(found.shape, generator=generator)
    ours, theirs = (torch.autograd.grad((one * weight).sum(), list(maps.values()), allow_unused=True) for one in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["align", "pool"])
def test_a_pyramids_regions_are_pooled_level_by_level(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info = {name: FeatureInfo(channels=3, stride=stride) for name, stride in (("p2", 4), ("p3", 8), ("p4", 16))}
    maps = {name: torch.randn((1, 3, 96 // one.stride, 128 // one.stride)) for name, one in info.items()}
    boxes = [peers.random_boxes(20, seed=5)]
    pooler = RegionPooler(info, op=op)
    pooler._takes_bags = lambda features: False  # type: ignore[method-assign]
    wanted = pooler(maps, boxes, [(96, 128)])
    monkeypatch.setattr(pooling, "is_asking_free", lambda tensor: False)
    found = pooler(maps, boxes, [(96, 128)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    if op == "align":
        peer = MultiScaleRoIAlign(list(info), output_size=7, sampling_ratio=2)
        torch.testing.assert_close(found, peer(maps, boxes, [(96, 128)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objects", [1, mask_head.MASKS_AT_ONCE, 2 * mask_head.MASKS_AT_ONCE + 3])
def test_masks_are_cut_as_on_the_cpu(objects: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 2, (objects, *peers.SIZE), dtype=torch.uint8, generator=generator)
    target = peers.target(peers.random_boxes(objects, min_side=8), masks=masks)
    matches, boxes = torch.randint(-2, objects, (25,), generator=generator), peers.random_boxes(25, seed=9, min_side=8)
    wanted = cut_masks(target, matches, boxes, side=14)
    monkeypatch.setattr(mask_head, "is_asking_free", lambda tensor: False)
    found = cut_masks(target, matches, boxes, side=14)
    assert torch.equal(found[matches >= 0], wanted[matches >= 0])
