"""Every combination of the paper's steps against the literal ones, on C4, FPN and VGG; switched off, the plain detector to the bit."""

from __future__ import annotations

import literal_steps
import pytest
import torch
from literal_steps import SCALES, Settings, detect, tiny_detector, tiny_images

from detection import multiscale
from detection.faster_rcnn import FasterRCNN
from detection.steps import SteppedRCNN, Steps
from detection.structures import Detections, Target

COMBINATIONS = {
    "refinement": Settings(refine=True),
    "two scales": Settings(scales=SCALES),
    "every scale": Settings(scales=(40, 72), merge="nms"),
    "mirror image": Settings(flip=True),
    "the paper's three": Settings(refine=True, context=True, scales=SCALES),
    "all": Settings(refine=True, context=True, scales=(40, 64), merge="nms", flip=True),
}


@pytest.fixture(autouse=True)
def _small_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """On images this small every region would take the two largest scales; aimed at 30 × 30 pixels, they differ."""
    monkeypatch.setattr(multiscale, "REGION_PIXELS", 30**2)
    monkeypatch.setattr(literal_steps, "REGION_PX", 30)


def assert_same(found: Detections, wanted: list, *, least: int = 2) -> None:
    assert len(found) == len(wanted) >= least
    torch.testing.assert_close(found.scores, torch.tensor([score for _, score, _ in wanted]), atol=2e-4, rtol=1e-3)
    assert found.labels.tolist() == [label for _, _, label in wanted]
    torch.testing.assert_close(found.boxes, torch.tensor([box for box, _, _ in wanted]), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("head", ["fpn", "c4"])
@pytest.mark.parametrize("name", COMBINATIONS)
@torch.no_grad()
def test_each_step_is_the_literal_one(name: str, head: str) -> None:
    settings = COMBINATIONS[name]
    detector, plain = tiny_detector(head, *settings.overrides()), tiny_detector(head)
    images = tiny_images()[:1] if head == "fpn" else tiny_images()[1:2]
    for image, found, usual in zip(images, detector.detect(images), plain.detect(images), strict=True):
        assert_same(found, detect([detector], image, settings))
        assert len(found) != len(usual) or not torch.equal(found.boxes, usual.boxes)  # the step did something


@torch.no_grad()
def test_the_literal_detector_is_the_plain_one_where_no_step_is_on() -> None:
    detector, image = tiny_detector("fpn"), tiny_images()[1]
    assert_same(detector.detect([image])[0], detect([detector], image, Settings()))


@pytest.mark.parametrize("head", ["fpn", "c4"])
def test_switched_off_is_the_plain_detector_to_the_bit(head: str) -> None:
    plain = tiny_detector(head)
    off = tiny_detector(head, *Settings().overrides())
    assert type(off) is type(plain) is FasterRCNN
    none = SteppedRCNN(plain.backbone, plain.rpn, plain.roi_head, plain.preprocess, steps=Steps()).eval()
    images = tiny_images()
    wanted = [plain.detect([image])[0] for image in images]
    for other in (off.detect(images[:1]), none.detect(images)):
        for found, one in zip(other, wanted, strict=False):
            assert len(one) > 3
            assert torch.equal(found.boxes, one.boxes)
            assert torch.equal(found.scores, one.scores)
            assert torch.equal(found.labels, one.labels)


def test_steps_leave_weights_and_losses_as_they_are() -> None:
    settings = Settings(refine=True, scales=(40, 64), flip=True)
    plain, stepped = tiny_detector("fpn"), tiny_detector("fpn", *settings.overrides())
    assert plain.state_dict().keys() == stepped.state_dict().keys()
    images, targets = tiny_images(), [_target(number) for number in range(3)]
    wanted, _ = plain.validate(images, targets)
    losses, found = stepped.validate(images, targets)
    assert {name: value.item() for name, value in losses.items()} == {name: value.item() for name, value in wanted.items()}
    assert {name: value.item() for name, value in stepped(images, targets).items()} == {
        name: value.item() for name, value in plain(images, targets).items()
    }
    for one, other in zip(found, stepped.detect(images), strict=True):
        assert torch.equal(one.boxes, other.boxes)


def test_every_view_is_encoded_once_and_the_plain_detection_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    stepped = tiny_detector("fpn", *COMBINATIONS["all"].overrides())
    masked = tiny_detector("fpn", "model.mask=true", *COMBINATIONS["all"].overrides())
    encoded: list[int] = []
    encode = FasterRCNN.encode
    monkeypatch.setattr(FasterRCNN, "encode", lambda self, images: (encoded.append(len(images)), encode(self, images))[1])
    stepped.detect(tiny_images()[:1])
    assert len(encoded) == 4  # two scales and their mirror images
    masked.detect(tiny_images()[:1])
    assert len(encoded) == 4 + 5  # and the image as it is given, which masks are made from
    monkeypatch.setattr(stepped.roi_head, "detect", lambda *args: pytest.fail("the plain detection is thrown away"))
    stepped.validate(tiny_images()[:1], [_target(0)])


def _target(seed: int) -> Target:
    return Target(
        boxes=torch.tensor([[5.0, 5.0, 40.0, 45.0]]),
        labels=torch.tensor([1]),
        ignore_boxes=torch.zeros(0, 4),
        image_id=seed,
        index=seed,
        original_size=(64, 80),
        seed=seed,
    )


def test_images_of_different_sizes_share_a_call() -> None:
    detector, images = tiny_detector("fpn", *COMBINATIONS["all"].overrides()), tiny_images()
    for image, found in zip(images, detector.detect(images), strict=True):
        (alone,) = detector.detect([image])
        assert torch.equal(found.boxes, alone.boxes)
        assert found.boxes[:, 2].max() <= image.shape[2] + 1e-3
        assert found.boxes[:, 3].max() <= image.shape[1] + 1e-3


@pytest.mark.parametrize(("name", "head"), [("the paper's three", "c4"), ("all", "fpn")])
def test_no_detections_and_no_proposals(name: str, head: str) -> None:
    detector = tiny_detector(head, *COMBINATIONS[name].overrides())
    detector.roi_head.score_threshold = 1.0
    assert [len(found) for found in detector.detect(tiny_images()[:1])] == [0]
    detector.rpn.propose = lambda predictions, sizes, limits: [torch.zeros((0, 4)) for _ in sizes]  # type: ignore[method-assign]
    (found,) = detector.detect(tiny_images()[:1])
    assert found.boxes.shape == (0, 4)


def test_bytes_bfloat16_and_masks() -> None:
    settings = ["model.mask=true", *COMBINATIONS["all"].overrides()]
    detector = tiny_detector("fpn", *settings)
    image = (tiny_images()[0] * 255).to(torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = detector.detect([image])
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert found.masks is not None
    assert found.masks.shape == (len(found), 28, 28)
    (exact,) = detector.detect([image / 255])
    (again,) = detector.mask_head.detect(detector.encode([image / 255]).features, [exact], [(64, 80)])
    assert torch.equal(exact.masks, again.masks)
