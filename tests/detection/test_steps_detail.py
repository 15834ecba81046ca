"""Several scales are made from the photograph, not from what data.min_size left of it; regions are proposed at that size as ever."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from literal_steps import CLASSES, Settings, tiny_detector

from detection.build import build_detector, chosen_steps
from detection.config import load_detection_config, load_split, read_size
from detection.data.dataset import DetectionDataset
from detection.data.images import resized_size
from detection.faster_rcnn import FasterRCNN
from detection.multiscale import LONGEST_PX
from detection.predict import Predictor, detector_metadata
from detection.rpn import ProposalNetwork
from detection.steps import SteppedRCNN
from detection.structures import Target
from detection.validate import Validator
from resbackbone.runtime import distributed
from resbackbone.runtime.checkpoint import save_weights
from resbackbone.runtime.precision import Precision

SCALES = (40, 128)
BASE = (64, 80)  # of an image of 128 × 160


def stepped(**settings) -> SteppedRCNN:
    detector = tiny_detector("fpn", *Settings(scales=SCALES, **settings).overrides())
    assert isinstance(detector, SteppedRCNN)
    detector.steps = replace(detector.steps, base=BASE)
    return detector


def photograph() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    coarse = F.interpolate(torch.rand((1, 3, 7, 9), generator=generator), size=(128, 160))[0]
    return (coarse + 0.2 * (torch.rand((3, 128, 160), generator=generator) - 0.5)).clamp(0, 1)


@pytest.mark.parametrize("merge", ["maxout", "nms"])
def test_the_largest_scale_is_the_photograph_itself(merge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    detector, image, seen = stepped(merge=merge, flip=True), photograph(), []
    extract, look, looked = FasterRCNN.extract, ProposalNetwork.forward, []
    monkeypatch.setattr(FasterRCNN, "extract", lambda self, images: (seen.extend(images), extract(self, images))[1])
    monkeypatch.setattr(ProposalNetwork, "forward", lambda self, *given: (looked.append(given[1]), look(self, *given))[1])
    (found,) = detector.detect([image])
    sizes = [tuple(one.shape[-2:]) for one in seen]
    each = [(64, 80), (40, 50), (128, 160)] if merge == "maxout" else [(40, 50), (128, 160)]
    assert sorted(sizes) == sorted(2 * each)
    assert len(looked) == (2 if merge == "maxout" else len(sizes)), "regions are proposed once a view, not at every scale"
    largest = [one for one in seen if one.shape[-1] == 160]
    assert torch.equal(largest[0], image)
    assert torch.equal(largest[1], image.flip(-1))
    assert found.boxes[:, 2].max() > 80  # in pixels of the photograph
    assert (found.boxes[:, 2:] <= torch.tensor([160.0, 128.0]) + 1e-3).all()


def test_an_image_that_comes_at_that_size_is_as_before() -> None:
    detector, image = stepped(), photograph()
    small = F.interpolate(image[None], size=(64, 80), mode="bilinear", antialias=True)[0]
    (found,) = detector.detect([small])
    detector.steps = replace(detector.steps, base=None)
    (wanted,) = detector.detect([small])
    assert len(found) > 1
    assert torch.equal(found.boxes, wanted.boxes)
    assert torch.equal(found.scores, wanted.scores)


def test_losses_are_those_of_the_usual_size() -> None:
    image = photograph()
    small = F.interpolate(image[None], size=(64, 80), mode="bilinear", antialias=True)[0]
    masks = torch.zeros((1, 128, 160), dtype=torch.uint8)
    masks[:, 20:100, 10:90] = 1
    none = torch.zeros(0, 4)
    facts = {"labels": torch.tensor([1]), "ignore_boxes": none, "image_id": 1, "index": 1, "original_size": (128, 160), "seed": 3}
    large = Target(boxes=torch.tensor([[10.0, 20.0, 90.0, 100.0]]), masks=masks, **facts)
    target = Target(boxes=torch.tensor([[5.0, 10.0, 45.0, 50.0]]), masks=masks[:, ::2, ::2], **facts)
    halved = large.scaled((128, 160), (64, 80))
    assert torch.equal(halved.boxes, target.boxes)
    assert torch.equal(halved.masks, target.masks)
    assert large.scaled((128, 160), (128, 160)) is large
    losses, _ = stepped().validate([image], [large])
    wanted, _ = tiny_detector("fpn").validate([small], [target])
    assert {name: value.item() for name, value in losses.items()} == {name: value.item() for name, value in wanted.items()}


def test_what_is_read(tiny_coco: Path) -> None:
    plain = load_detection_config(None, ["data.min_size=[48,64]", "data.max_size=100"])
    scaled = load_detection_config(None, ["data.min_size=[48,64]", "data.max_size=100", "model.test.scales=[40,128]"])
    smaller = load_detection_config(None, ["data.min_size=[64]", "data.max_size=100", "model.test.scales=[20,40]"])
    assert read_size(plain) == {"min_size": 64, "max_size": 100, "enlarge": True}
    assert read_size(scaled) == {"min_size": 128, "max_size": LONGEST_PX, "enlarge": False}
    assert read_size(smaller)["min_size"] == 64
    wide = load_detection_config(None, ["data.min_size=[1500]", "data.max_size=3000", "model.test.scales=[1000,1500]"])
    assert read_size(wide)["max_size"] == 3000, "the plain detector's size, from which proposals come, is not made by enlarging"
    assert chosen_steps(plain).base is None
    assert chosen_steps(scaled).base == (64, 100)
    assert resized_size(300, 400, **read_size(scaled)) == (128, 170)
    assert resized_size(100, 90, **read_size(scaled)) == (100, 90)
    source = load_split(load_detection_config(None, ["data.kind=coco", f"data.root={tiny_coco}", "data.train=train2017"]), "train")
    dataset = DetectionDataset(source, train=False, **read_size(scaled))
    sizes = source.annotations.sizes[dataset.keep]
    assert np.array_equal(dataset.resized_sizes(), [resized_size(h, w, **read_size(scaled)) for h, w in sizes.tolist()])
    assert tuple(dataset[(0, 0)].image.shape[1:]) == tuple(dataset.resized_sizes()[0])


def test_evaluation_and_single_images_agree(tiny_coco: Path, tmp_path: Path) -> None:
    overrides = ["model.test.scales=[24,60]", f"data.root={tiny_coco}", "data.train=train2017", "data.val=val2017", "train.precision=fp32"]
    overrides += ["data.kind=coco", "data.min_size=40", "data.max_size=60", "data.workers=0", "train.device=cpu"]
    literal = ["model.head=fpn", "model.backbone.name=resnet20_cifar", "model.backbone.norm=group", "model.backbone.freeze_at=0"]
    literal += ["model.backbone.weights=null", "model.roi.head_width=16", "model.roi.proposals_test=8"]
    config = load_detection_config(None, [*literal, *overrides])
    source = load_split(config, "val")
    classes = source.annotations.classes
    assert len(classes) <= CLASSES
    torch.manual_seed(0)
    detector = build_detector(config, len(classes)).eval()
    weights = tmp_path / "w.safetensors"
    save_weights(weights, detector.state_dict(), detector_metadata(config, classes, detector))
    validator = Validator(config, source, process=distributed.setup("cpu"), precision=Precision("fp32", "cpu"))
    validator.evaluate(detector, with_loss=True)
    predict = Predictor(config, weights)
    for record in validator.records:
        number = list(source.annotations.image_ids).index(record.image_id)
        found = predict(source.read_image(number))
        assert len(found) == len(record.detections) > 0
        torch.testing.assert_close(record.detections.boxes, found.boxes, atol=1e-2, rtol=0)
