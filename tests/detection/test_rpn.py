"""The proposal network against torchvision's, and its sampled loss against the dense one."""

from __future__ import annotations

import copy

import peers
import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from detection import rpn as rpn_module
from detection.anchors import AnchorGrid
from detection.rpn import Limits, ProposalNetwork, patches_at

CHANNELS = 6
PADDED = (128, 160)
GRIDS = [(32, 40), (16, 20), (8, 10)]
SIZES = [(120, 150), (128, 130)]


def _network(samples: int = 32, *, levels: int = 3) -> ProposalNetwork:
    torch.manual_seed(0)
    network = ProposalNetwork(
        CHANNELS,
        AnchorGrid([(16,), (32,), (64,)][:levels]),
        train_limits=Limits(candidates=100, proposals=60),
        test_limits=Limits(candidates=50, proposals=20),
        samples=samples,
    )
    for layer in (network.conv, network.cls_logits, network.bbox_pred):
        torch.nn.init.normal_(layer.weight, std=0.3)
        torch.nn.init.normal_(layer.bias, std=0.3)
    return network


def _features(images: int = 2, *, grids: list[tuple[int, int]] = GRIDS, channels_last: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn((images, CHANNELS, *grid), generator=generator) for grid in grids]
    if channels_last:
        maps = [level.contiguous(memory_format=torch.channels_last) for level in maps]
    return {f"p{number}": level.requires_grad_() for number, level in enumerate(maps)}


def _targets(counts: tuple[int, ...] = (5, 3)) -> list:
    return [peers.target(peers.random_boxes(count, size=PADDED, seed=number, min_side=12)) for number, count in enumerate(counts)]


def _theirs(network: ProposalNetwork) -> RegionProposalNetwork:
    head = RPNHead(CHANNELS, 3)
    state = network.state_dict()
    head.load_state_dict({name: state[name.replace("conv.0.0.", "conv.")] for name in head.state_dict()})
    limits = {"training": 100, "testing": 50}, {"training": 60, "testing": 20}
    anchors = AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
    return RegionProposalNetwork(anchors, head, 0.7, 0.3, network.samples, 0.5, *limits, 0.7)


def _step(network: ProposalNetwork, features: dict, targets: list) -> dict[str, torch.Tensor]:
    """Losses and, backward, every gradient."""
    predictions = network(features, PADDED)
    generators = [torch.Generator().manual_seed(number) for number in range(len(targets))]
    losses = network.losses(features, predictions, targets, generators=generators)
    sum(losses.values()).backward()
    return losses


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_proposals_equal_torchvision_which_decodes_everything_first(training, channels_last):
    network, features = _network(), _features(channels_last=channels_last)
    peer = _theirs(network).train(training)
    images = ImageList(torch.zeros((2, 3, *PADDED)), SIZES)
    wanted, _ = peer(images, features, [{"boxes": one.boxes} for one in _targets()] if training else None)
    found = network.propose(network(features, PADDED), SIZES, network.train_limits if training else network.test_limits)
    for ours, theirs in zip(found, wanted, strict=True):
        assert 0 < len(ours) <= (60 if training else 20)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        assert not ours.requires_grad


@pytest.mark.parametrize("counts", [(5, 3), (0, 3), (0, 0)])
def test_losses_equal_torchvision(counts, monkeypatch):
    peers.same_permutations(monkeypatch)
    network, features, targets = _network(), _features(), _targets(counts)
    images = ImageList(torch.zeros((2, 3, *PADDED)), SIZES)
    _, wanted = _theirs(network).train()(images, features, [{"boxes": one.boxes} for one in targets])
    losses = network.losses(features, network(features, PADDED), targets, generators=[None, None])
    torch.testing.assert_close(losses["rpn_objectness"], wanted["loss_objectness"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(losses["rpn_box"], wanted["loss_rpn_box_reg"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("counts", [(5, 3), (0, 0)])
def test_sampled_loss_has_the_dense_gradients(channels_last, counts, monkeypatch):
    sampled, features = _network(), _features(channels_last=channels_last)
    dense, dense_features = copy.deepcopy(sampled), _features(channels_last=channels_last)
    losses = _step(sampled, features, _targets(counts))
    monkeypatch.setattr(rpn_module, "DENSE_UP_TO", 1e9)  # the plain version: one pass, all of it kept for backward
    wanted = _step(dense, dense_features, _targets(counts))
    for name in wanted:
        torch.testing.assert_close(losses[name], wanted[name], atol=1e-6, rtol=1e-5)
    pairs = [(p.grad, q.grad) for p, q in zip(sampled.parameters(), dense.parameters(), strict=True)]
    pairs += [(features[name].grad, dense_features[name].grad) for name in features]
    assert pairs[0][0].abs().max() > 0
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_dense_maps_carry_gradients_only_where_the_loss_reads_them():
    features = _features()
    assert not _network(samples=32)(features, PADDED).objectness[0].requires_grad
    assert _network(samples=2000)(features, PADDED).objectness[0].requires_grad


def test_autocast_gives_every_weight_a_gradient():
    # Autocast remembers the weights it has cast; remembered from the pass without gradients, they would have none.
    network, features = _network(), _features()
    with torch.autocast("cpu", torch.bfloat16):
        losses = _step(network, features, _targets())
    assert all(value.dtype == torch.float32 for value in losses.values())
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    exact = _network()
    wanted = _step(exact, _features(), _targets())
    assert losses["rpn_objectness"].item() == pytest.approx(wanted["rpn_objectness"].item(), rel=0.02)


@pytest.mark.parametrize("grids", [[(1, 1)], [(2, 3), (1, 1)], [(5, 4), (3, 2), (1, 2)]])
def test_patches_are_what_the_convolution_reads(grids):
    maps = list(_features(3, grids=grids).values())
    weight = torch.randn((4, CHANNELS, 3, 3), generator=torch.Generator().manual_seed(2))
    dense = torch.cat([F.conv2d(level, weight, padding=1).permute(0, 2, 3, 1).flatten(1, 2) for level in maps], dim=1)
    images, positions = dense.shape[:2]
    image, position = torch.arange(images).repeat_interleave(positions), torch.arange(positions).repeat(images)
    found = patches_at(maps, image, position) @ weight.permute(0, 2, 3, 1).flatten(1).t()
    torch.testing.assert_close(found, dense.flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert patches_at(maps, image[:0], position[:0]).shape == (0, 9 * CHANNELS)


def test_sampling_follows_the_seeds():
    network, features, targets = _network(), _features(), _targets()
    predictions = network(features, PADDED)

    def value(first: int, second: int) -> float:
        generators = [torch.Generator().manual_seed(first), torch.Generator().manual_seed(second)]
        return network.losses(features, predictions, targets, generators=generators)["rpn_objectness"].item()

    assert value(1, 2) == value(1, 2) != value(3, 4)


def test_ignored_regions_are_not_sampled():
    network, features = _network(samples=500), _features(1)
    everywhere = torch.tensor([[-100.0, -100.0, 500.0, 500.0]])
    ignoring = [peers.target(torch.zeros((0, 4)), ignored=everywhere)]
    losses = network.losses(features, network(features, PADDED), ignoring, generators=[None])
    assert losses["rpn_objectness"].item() == 0
    sum(losses.values()).backward()  # zero gradients, not missing ones
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in network.parameters())
