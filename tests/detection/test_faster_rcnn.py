"""The whole detector against torchvision's, and what holds for any images and targets."""

from __future__ import annotations

import peers
import pytest
import torch

THEIR_LOSSES = {
    "loss_objectness": "rpn_objectness",
    "loss_rpn_box_reg": "rpn_box",
    "loss_classifier": "roi_class",
    "loss_box_reg": "roi_box",
    "loss_mask": "mask",
}


@pytest.fixture(scope="module")
def plain():
    return peers.pair()


def test_detections_equal_torchvision(plain):
    peer, mine = plain
    images = peers.random_images(2)
    wanted = peer.eval()([image / 255 for image in images])
    found = mine.eval().detect(images)
    assert sum(map(len, found)) > 20
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.labels, theirs["labels"])
        torch.testing.assert_close(ours.scores, theirs["scores"], atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.boxes, theirs["boxes"], atol=1e-4, rtol=1e-5)


def test_losses_and_gradients_equal_torchvision(plain, monkeypatch):
    peer, mine = plain
    images = peers.random_images(2)
    targets = [peers.target(peers.random_boxes(3)), peers.target(peers.random_boxes(4, seed=1))]
    peers.same_permutations(monkeypatch)
    wanted = peers.trained(peer)([image / 255 for image in images], [peers.their_target(one) for one in targets])
    losses = peers.trained(mine)(images, targets)
    assert set(losses) == {"rpn_objectness", "rpn_box", "roi_class", "roi_box"}
    for name, value in wanted.items():
        torch.testing.assert_close(losses[THEIR_LOSSES[name]], value, atol=1e-4, rtol=1e-5)
    sum(wanted.values()).backward()
    sum(losses.values()).backward()
    gradients = peers.from_torchvision({name: p.grad for name, p in peer.named_parameters() if p.grad is not None})
    for name, parameter in mine.named_parameters():
        if name in gradients:
            wanted_norm = gradients[name].norm()
            assert wanted_norm > 0, name
            error = (parameter.grad - gradients[name]).norm() / wanted_norm
            assert error < 1e-4, f"{name}: {error}"
