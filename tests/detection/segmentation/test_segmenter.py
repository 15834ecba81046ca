"""The segmenter against torchvision's models with the same weights, and against literal losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import segmentation

from detection.segmentation.build import build_segmenter
from detection.segmentation.config import load_segmentation_config
from detection.segmentation.data import IGNORED
from detection.segmentation.segmenter import Segmenter, padded, pixel_loss
from detection.structures import Target
from resbackbone.errors import InputError

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def build(*overrides: str, classes: int = 3) -> Segmenter:
    torch.manual_seed(0)
    return build_segmenter(load_segmentation_config(None, ["model.backbone.weights=null", *overrides]), classes)


def image(height: int = 64, width: int = 96, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def target(label_map: Tensor) -> Target:
    empty = torch.zeros(0, 4)
    size = (label_map.shape[0], label_map.shape[1])
    return Target(boxes=empty, labels=torch.zeros(0), ignore_boxes=empty, image_id=1, index=0, original_size=size, label_map=label_map)


def labels(height: int, width: int, seed: int = 1) -> Tensor:
    drawn = torch.randint(0, 5, (height, width), generator=torch.Generator().manual_seed(seed))
    return torch.where(drawn == 4, IGNORED, drawn).to(torch.uint8)


@pytest.mark.parametrize(("head", "name"), [("deeplabv3", "deeplabv3_resnet50"), ("fcn", "fcn_resnet50")])
def test_scores_losses_and_names_are_torchvisions(head: str, name: str) -> None:
    ours = build(f"model.head={head}", "model.backbone.name=resnet50", "model.auxiliary=0.5")
    theirs = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=4, aux_loss=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    normalised = ((image() / 255 - MEAN) / STD)[None]
    with torch.no_grad():
        expected = theirs.eval()(normalised)
        (scores,) = ours.eval().scores([image()], [(64, 96)])
        (found,) = ours.segment([image()], [(64, 96)])
        torch.testing.assert_close(scores, expected["out"][0], rtol=1e-4, atol=1e-5)
        assert torch.equal(found, scores.argmax(0).to(torch.uint8))
        truth = labels(64, 96)
        losses = ours([image()], [target(truth)])
        for term, key, weight in (("pixel", "out", 1.0), ("auxiliary", "aux", 0.5)):
            wanted = weight * F.cross_entropy(expected[key], truth[None].long(), ignore_index=255)
            torch.testing.assert_close(losses[term], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [8, 16])
def test_output_stride_and_rates(stride: int) -> None:
    model = build("model.backbone.name=resnet18", f"model.output_stride={stride}")
    assert model.backbone(torch.zeros(1, 3, 64, 64))["out"].shape[-1] == 64 // stride
    assert model.classifier[0].convs[1][0].dilation == (96 // stride,) * 2  # type: ignore[index, union-attr]


def test_padding_counts_for_nothing() -> None:
    """Two images of different sizes give the scores they have alone; what padding adds is in no loss."""
    model = build("model.backbone.name=resnet18", "model.head=fcn", "model.backbone.norm=group").eval()
    sizes = [(64, 96), (64, 64)]
    images = [image(*size, seed=number) for number, size in enumerate(sizes)]
    maps = padded([labels(*size) for size in sizes], (64, 96))
    assert maps[1, :, 64:].unique().tolist() == [IGNORED]
    with torch.no_grad():
        together = model.scores(images, sizes)
        losses = model(images, [target(labels(*size)) for size in sizes])
        logits = F.interpolate(model.classifier(model.backbone(model.preprocess(images)[0])["out"]), (64, 96), mode="bilinear")
    assert [each.shape[1:] for each in together] == sizes
    torch.testing.assert_close(together[1], logits[1, :, :, :64])
    rows = logits.permute(0, 2, 3, 1)[maps != IGNORED]
    literal = -torch.stack([row.log_softmax(0)[label] for row, label in zip(rows, maps[maps != IGNORED], strict=True)]).mean()
    torch.testing.assert_close(losses["pixel"], literal)


def test_a_batch_of_ignored_pixels_has_no_loss() -> None:
    scores = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = pixel_loss(scores, torch.full((1, 4, 4), IGNORED))
    loss.backward()
    assert loss == 0
    assert not scores.grad.any()  # type: ignore[union-attr]


def test_it_learns() -> None:
    model = build("model.backbone.name=resnet18", "model.head=fcn", classes=1).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    truth = torch.zeros(64, 96, dtype=torch.uint8)
    truth[16:48, 32:64] = 1
    images = [image(seed=number) for number in range(2)]
    losses = []
    for _ in range(5):
        loss = model(images, [target(truth)] * 2)["pixel"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.batch_size=1"], "too small for model.head=deeplabv3"),
        (["model.head=deeplab"], "did you mean 'deeplabv3'"),
        (["model.output_stride=4"], "is not one of 8, 16, 32"),
        (["model.backbone.name=vgg16", "model.output_stride=8"], "VGG-16 takes 16 or 32"),
        (["model.backbone.norm=frozen"], "needs weights"),
    ],
)
def test_wrong_settings_are_explained(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(*overrides)


def test_too_many_classes_are_explained() -> None:
    with pytest.raises(InputError, match="254"):
        build(classes=255)


def test_frozen_stages_do_not_learn(tmp_path: Path) -> None:
    model = build("model.backbone.name=resnet18", "model.backbone.freeze_at=2").train()
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert fixed == {name for name, _ in model.named_parameters() if name.startswith(("backbone.conv1", "backbone.layer1"))}
    assert not isinstance(model.backbone.bn1, nn.BatchNorm2d)  # type: ignore[union-attr]
