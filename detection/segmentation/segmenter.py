"""A segmenter: images → features → scores of each pixel → a loss | label maps. Its state dict is torchvision's FCN's or DeepLabV3's.

N images, K foreground classes; class 0 is the background.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation import FCN, DeepLabV3

from detection.preprocess import Preprocess, Size
from detection.segmentation.data import IGNORED
from detection.structures import Target


class Segmenter(nn.Module):
    """Two verbs: `forward` always returns named losses, `segment` always label maps.

    Args:
        network: torchvision's model on a network of ours; its parts become this module's own.
        preprocess: normalises and pads, as for a detector.
        auxiliary_weight: of the auxiliary head's loss, where the network has one.
    """

    def __init__(self, network: FCN | DeepLabV3, preprocess: Preprocess, *, auxiliary_weight: float = 0.0) -> None:
        super().__init__()
        self.backbone, self.classifier, self.aux_classifier = network.backbone, network.classifier, network.aux_classifier
        self.preprocess, self.auxiliary_weight = preprocess, auxiliary_weight

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """images: uint8 or float in 0..1, RGB (3, h, w) each; the targets' label maps are (h, w). Returns {"pixel": …, "auxiliary": …}."""
        batch, _ = self.preprocess(images)
        maps = self.backbone(batch)
        size = (batch.shape[-2], batch.shape[-1])
        truth = padded([_label_map(target) for target in targets], size)
        losses = {"pixel": pixel_loss(enlarged(self.classifier(maps["out"]), size), truth)}
        if self.aux_classifier is not None:
            losses["auxiliary"] = self.auxiliary_weight * pixel_loss(enlarged(self.aux_classifier(maps["aux"]), size), truth)
        return losses

    def scores(self, images: Sequence[Tensor], sizes: Sequence[Size]) -> list[Tensor]:
        """Each image's scores (K + 1, H, W), float32, at the size asked for it."""
        batch, inner_sizes = self.preprocess(images)
        logits = enlarged(self.classifier(self.backbone(batch)["out"]), (batch.shape[-2], batch.shape[-1]))
        cut = [each[None, :, :h, :w] for each, (h, w) in zip(logits, inner_sizes, strict=True)]
        return [enlarged(each, size)[0] for each, size in zip(cut, sizes, strict=True)]

    def segment(self, images: Sequence[Tensor], sizes: Sequence[Size]) -> list[Tensor]:
        """Each image's label map, uint8 (H, W), at the size asked for it."""
        return [scores.argmax(0).to(torch.uint8) for scores in self.scores(images, sizes)]


def enlarged(scores: Tensor, size: Size) -> Tensor:
    """(N, C, h, w) -> float32 (N, C, H, W), bilinear, pixel centres in place, as torchvision's segmenters do."""
    return F.interpolate(scores.float(), size=list(size), mode="bilinear", align_corners=False)


def padded(label_maps: Sequence[Tensor], size: Size) -> Tensor:
    """Label maps (h, w) of different sizes -> int64 (N, H, W); what is added is ignored."""
    truth = label_maps[0].new_full((len(label_maps), *size), IGNORED, dtype=torch.int64)
    for row, one in zip(truth, label_maps, strict=True):
        row[: one.shape[0], : one.shape[1]] = one
    return truth


def pixel_loss(scores: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of (N, K + 1, H, W) with (N, H, W), averaged over the pixels that count; 0 where none does."""
    total = F.cross_entropy(scores.float(), truth, ignore_index=IGNORED, reduction="sum")
    return total / (truth != IGNORED).sum().clamp_min(1)


def _label_map(target: Target) -> Tensor:
    assert target.label_map is not None, "a segmenter's targets have label maps"
    return target.label_map
