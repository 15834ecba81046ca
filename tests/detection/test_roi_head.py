"""The second stage against torchvision's RoIHeads, and what only ours does: ignored regions, passes, any region head."""

from __future__ import annotations

import peers
import pytest
import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign

from detection.roi_head import Regions, RoIHead, TwoFCHead, _passes

CHANNELS, SIDE, WIDTH = 4, 3, 16
SIZES = [(90, 120), (96, 100)]
LEVELS = ("p2", "p3")
EMPTY = torch.zeros((0, 4))


def _head(**settings) -> RoIHead:
    torch.manual_seed(0)
    settings = {"samples": 32, "detections": 15} | settings
    head = RoIHead(peers.PlainPooler(SIDE, LEVELS), TwoFCHead(CHANNELS, SIDE, width=WIDTH), num_classes=peers.CLASSES, **settings)
    nn.init.normal_(head.cls_score.weight, std=2.0)
    nn.init.normal_(head.bbox_pred.weight, std=2.0)
    return head


def _theirs(head: RoIHead) -> RoIHeads:
    box_head, predictor = TwoMLPHead(CHANNELS * SIDE**2, WIDTH), FastRCNNPredictor(WIDTH, peers.CLASSES + 1)
    box_head.load_state_dict(head.box_head.state_dict())
    predictor.load_state_dict({name: value for name, value in head.state_dict().items() if name in predictor.state_dict()})
    pooler = MultiScaleRoIAlign(list(LEVELS), SIDE, sampling_ratio=2)
    return RoIHeads(pooler, box_head, predictor, 0.5, 0.5, head.samples, 0.25, None, head.score_threshold, head.nms_iou, head.detections)


def _features(images: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"p2": (24, 32), "p3": (12, 16)}
    return {name: torch.randn((images, CHANNELS, *shape), generator=generator).requires_grad_() for name, shape in shapes.items()}


def _proposals(counts: tuple[int, ...] = (40, 25)) -> list[torch.Tensor]:
    return [peers.random_boxes(count, seed=number) for number, count in enumerate(counts)]


@pytest.mark.parametrize("counts", [(40, 25), (0, 25), (0, 0)])
@pytest.mark.parametrize("threshold", [0.05, 0.3, 1.0])
def test_detections_equal_torchvision_which_decodes_everything_first(counts, threshold):
    head = _head(score_threshold=threshold)
    proposals = _proposals(counts)
    wanted, _ = _theirs(head).eval()(_features(), proposals, SIZES)
    found = head.detect(_features(), proposals, SIZES)
    assert any(map(len, found)) == (threshold < 1 and any(counts))
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.labels, theirs["labels"])
        torch.testing.assert_close(ours.scores, theirs["scores"], atol=1e-6, rtol=0)
        torch.testing.assert_close(ours.boxes, theirs["boxes"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("counts", [(4, 6), (0, 6), (0, 0)])
def test_losses_equal_torchvision(counts, monkeypatch):
    peers.same_permutations(monkeypatch)
    head, targets = _head(), [peers.target(peers.random_boxes(count, seed=number)) for number, count in enumerate(counts)]
    proposals = _proposals()
    peer = _theirs(head).train()
    _, wanted = peer(_features(), proposals, SIZES, [peers.their_target(one) for one in targets])
    features = _features()
    losses = head.losses(features, head.sample(proposals, targets, [None, None]), SIZES, targets=targets)
    torch.testing.assert_close(losses["roi_class"], wanted["loss_classifier"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses["roi_box"], wanted["loss_box_reg"], atol=1e-5, rtol=1e-5)
    sum(losses.values()).backward()
    sum(wanted.values()).backward()
    theirs = {**dict(peer.box_head.named_parameters("box_head")), **dict(peer.box_predictor.named_parameters())}
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4)


def test_true_boxes_are_proposals_and_labels_follow_their_objects():
    boxes, labels = peers.random_boxes(3, min_side=20), torch.tensor([2, 5, 1])
    (regions,) = _head().sample([EMPTY], [peers.target(boxes, labels)], [None])
    assert sorted(regions.labels.tolist()) == [1, 2, 5]
    assert torch.equal(regions.boxes, boxes[regions.matches])
    assert torch.equal(regions.labels, labels[regions.matches])


def test_ignored_regions_are_not_background():
    proposals = torch.tensor([[0.0, 0.0, 20.0, 20.0], [50.0, 50.0, 90.0, 90.0]])
    ignoring = peers.target(EMPTY, ignored=torch.tensor([[0.0, 0.0, 30.0, 30.0]]))
    (regions,) = _head().sample([proposals], [ignoring], [None])
    assert torch.equal(regions.boxes, proposals[1:])
    assert regions.labels.tolist() == [0]


def test_nothing_sampled_gives_zero_gradients_not_missing_ones():
    head, features = _head(), _features(1)
    targets = [peers.target(EMPTY)]
    losses = head.losses(features, head.sample([EMPTY], targets, [None]), SIZES[:1], targets=targets)
    assert [value.item() for value in losses.values()] == [0, 0]
    sum(losses.values()).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


def test_sampling_follows_the_generator():
    head, proposals = _head(samples=8), _proposals((200,))
    targets = [peers.target(peers.random_boxes(4))]

    def draw(seed: int) -> Regions:
        return head.sample(proposals, targets, [torch.Generator().manual_seed(seed)])[0]

    assert torch.equal(draw(1).boxes, draw(1).boxes)
    assert not torch.equal(draw(1).boxes, draw(2).boxes)


@pytest.mark.parametrize("objects", [0, 1, 4])
def test_regions_with_an_object_come_first(objects):
    target = peers.target(peers.random_boxes(objects))
    (regions,) = _head(samples=8).sample(_proposals((200,)), [target], [torch.Generator().manual_seed(1)])
    assert regions.reserved == int((regions.labels > 0).sum()) <= 2
    assert (regions.reserved > 0) == (objects > 0)
    assert (regions.labels[: regions.reserved] > 0).all()
    assert not regions.labels[regions.reserved :].any()


@pytest.mark.parametrize("counts", [(5, 0, 7), (0, 0, 0), (3, 3, 3), (1, 20, 1)])
@pytest.mark.parametrize("limit", [None, 1, 4, 6, 100])
def test_passes_cut_without_losing_a_region(counts, limit):
    boxes = [peers.random_boxes(count, seed=number) for number, count in enumerate(counts)]
    passes = list(_passes(boxes, limit))
    assert all(len(part) == 3 and (limit is None or sum(map(len, part)) <= limit) for part in passes)
    assert torch.equal(torch.cat([box for part in passes for box in part]), torch.cat(boxes))
    assert len(passes) == max(1, -(-sum(counts) // (limit or 10**6)))


def test_passes_change_no_detection():
    at_once, in_passes = _head(), _head(regions_per_pass=7)
    for one, other in zip(
        at_once.detect(_features(), _proposals(), SIZES), in_passes.detect(_features(), _proposals(), SIZES), strict=True
    ):
        assert torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.boxes, other.boxes, atol=1e-4, rtol=0)


@pytest.mark.parametrize("regions", [0, 3, WIDTH + 1])
def test_two_fc_head_reads_regions_in_either_layout(regions):
    torch.manual_seed(0)
    head, pooled = TwoFCHead(CHANNELS, SIDE, width=WIDTH), torch.randn((regions, CHANNELS, SIDE, SIDE))
    wanted = head.fc7(head.fc6(pooled.flatten(1)).relu()).relu()
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(head(pooled.contiguous(memory_format=layout)), wanted)


def test_a_region_head_may_return_a_map():
    class Map(nn.Module):
        out_channels = CHANNELS

        def forward(self, pooled: torch.Tensor) -> torch.Tensor:
            return pooled

    head = RoIHead(peers.PlainPooler(SIDE, LEVELS), Map(), num_classes=2)
    features, proposals = _features(), _proposals()
    logits, deltas = head(features, proposals, SIZES)
    assert logits.shape == (65, 3)
    assert deltas.shape == (65, 12)
    torch.testing.assert_close(logits, head.cls_score(head.pooler(features, proposals, SIZES).mean((2, 3))))
