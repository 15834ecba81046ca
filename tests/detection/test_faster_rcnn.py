"""The whole detector against torchvision's, and what holds for any images and targets."""

from __future__ import annotations

import re

import peers
import pytest
import torch

from detection import losses as losses_module
from detection.torchvision_weights import from_torchvision
from resbackbone.errors import InputError

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
    gradients = from_torchvision({name: p.grad for name, p in peer.named_parameters() if p.grad is not None})
    for name, parameter in mine.named_parameters():
        if name in gradients:
            wanted_norm = gradients[name].norm()
            assert wanted_norm > 0, name
            error = (parameter.grad - gradients[name]).norm() / wanted_norm
            assert error < 1e-4, f"{name}: {error}"


@pytest.fixture(scope="module")
def small():
    """A detector with scores worth looking at, cheap enough to run often."""
    torch.manual_seed(0)
    detector = peers.ours(backbone="resnet18", samples=16)
    torch.nn.init.normal_(detector.rpn.cls_logits.weight, std=0.2)
    torch.nn.init.normal_(detector.roi_head.cls_score.weight, std=0.3)
    torch.nn.init.normal_(detector.roi_head.bbox_pred.weight, std=0.1)
    return detector.eval()


def _targets(*counts: int) -> list:
    return [peers.target(peers.random_boxes(count, seed=number, min_side=16), seed=number) for number, count in enumerate(counts)]


def _assert_same(found, wanted, *, tolerance: float = 1e-3) -> None:
    assert torch.equal(found.labels, wanted.labels)
    torch.testing.assert_close(found.boxes, wanted.boxes, atol=tolerance, rtol=1e-4)
    torch.testing.assert_close(found.scores, wanted.scores, atol=1e-5, rtol=1e-4)


def test_detections_do_not_depend_on_the_batch(small):
    sizes = [(96, 128), (128, 96), (90, 120), (50, 60), (96, 128)]
    images = [peers.random_images(1, size=size, seed=number)[0] for number, size in enumerate(sizes)]
    together = small.detect(images)
    assert all(map(len, together))
    for image, found in zip(images, together, strict=True):
        (alone,) = small.detect([image])
        _assert_same(found, alone)
        assert found.boxes[:, 2].max() <= image.shape[2]
        assert found.boxes[:, 3].max() <= image.shape[1]


def test_bytes_and_floats_are_the_same_image(small):
    (image,) = peers.random_images(1)
    _assert_same(small.detect([image / 255])[0], small.detect([image])[0])


def test_validate_gives_the_detections_and_losses_of_one_pass(small):
    images, targets = [*peers.random_images(2), *peers.random_images(1, size=(64, 64))], _targets(3, 2, 0)
    losses, found = small.validate(images, targets)
    for one, other in zip(found, small.detect(images), strict=True):
        _assert_same(one, other)
    assert set(losses) == {"rpn_objectness", "rpn_box", "roi_class", "roi_box"}
    assert all(torch.isfinite(value) and not value.requires_grad for value in losses.values())
    again, _ = small.validate(images, targets)
    assert {name: value.item() for name, value in again.items()} == {name: value.item() for name, value in losses.items()}
    first, _ = small.validate(images[:2], targets[:2])
    last, _ = small.validate(images[2:], targets[2:])
    for name, value in losses.items():
        torch.testing.assert_close(value, (2 * first[name] + last[name]) / 3, atol=1e-5, rtol=1e-4)


def test_sampling_is_the_seeds_and_nothing_elses(small):
    images, targets = peers.random_images(2), _targets(3, 2)
    state = torch.get_rng_state()
    first = {name: value.item() for name, value in small(images, targets).items()}
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert {name: value.item() for name, value in small(images, targets).items()} == first
    for one in targets:
        one.seed += 1
    assert {name: value.item() for name, value in small(images, targets).items()} != first


def _gradients(detector, images, targets) -> dict[str, torch.Tensor]:
    detector.zero_grad()
    sum(detector(images, targets).values()).backward()
    return {name: parameter.grad.clone() for name, parameter in detector.named_parameters()}


def test_two_processes_have_the_gradients_of_one(small, monkeypatch):
    images, targets = peers.random_images(2), _targets(3, 0)
    counts = []
    monkeypatch.setattr(losses_module, "mean_across_processes", lambda count: counts.append(count.item()) or count)
    wanted = _gradients(small, images, targets)

    def half(index: int) -> dict[str, torch.Tensor]:
        means = iter([torch.tensor(count / 2) for count in counts])
        monkeypatch.setattr(losses_module, "mean_across_processes", lambda count: next(means))
        return _gradients(small, images[index : index + 1], targets[index : index + 1])

    first, second = half(0), half(1)
    for name, gradient in wanted.items():  # DDP averages
        error = ((first[name] + second[name]) / 2 - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-4, name


@pytest.mark.parametrize("counts", [(0, 0), (0, 2)])
@pytest.mark.parametrize("build", [lambda: peers.ours(backbone="resnet18", samples=8), peers.ours_c4])
def test_images_without_objects_give_every_weight_a_gradient(build, counts):
    detector = peers.trained(build())
    gradients = _gradients(detector, peers.random_images(2), _targets(*counts))
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("build", [lambda: peers.ours(backbone="resnet18", samples=32), peers.ours_c4])
def test_it_learns_one_image(build):
    torch.manual_seed(0)
    detector = peers.trained(build())
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.01)
    images = [peers.random_images(1)[0]]
    target = peers.target(torch.tensor([[20.0, 20.0, 70.0, 80.0]]), torch.tensor([3]), seed=0)
    values = []
    for _ in range(8):
        loss = sum(detector(images, [target]).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.75 * values[0], values


@pytest.mark.parametrize("build", [lambda: peers.ours(backbone="resnet18", samples=32), peers.ours_c4])
def test_bfloat16_autocast(build):
    torch.manual_seed(0)
    detector = build().eval().to(memory_format=torch.channels_last)
    images, targets = peers.random_images(2), _targets(2, 3)
    exact = detector(images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = detector(images, targets)
        found = detector.detect(images)
    sum(rounded.values()).backward()
    assert all(parameter.grad is not None for parameter in detector.parameters())
    assert all(one.boxes.dtype == one.scores.dtype == torch.float32 for one in found)
    for name, value in exact.items():
        assert rounded[name].dtype == torch.float32
        assert rounded[name].item() == pytest.approx(value.item(), rel=0.2, abs=0.02), name  # other proposals, so other samples


def test_a_box_without_area_is_named(small):
    bad = peers.target(torch.tensor([[1.0, 2.0, 30.0, 40.0], [10.0, 20.0, 10.0, 40.0]]))
    with pytest.raises(InputError, match=r"image 1: box 1 \[10.0, 20.0, 10.0, 40.0\]"):
        small(peers.random_images(1), [bad])


def test_the_published_names_of_torchvision_are_understood(plain):
    peer, mine = plain
    published = {}
    for name, value in peer.state_dict().items():
        old = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        published[re.sub(r"(inner|layer)_blocks\.(\d)\.0\.", r"\1_blocks.\2.", old)] = value
    assert published.keys() != peer.state_dict().keys()
    mine.load_state_dict(from_torchvision(published), strict=True)
    with pytest.raises(InputError, match="box_head"):
        from_torchvision({"roi_heads.box_head.0.0.weight": torch.zeros(1)})
