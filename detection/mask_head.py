"""The mask branch (He et al. 2017, Mask R-CNN, §3 and figure 4): on a pyramid four convolutions and a deconvolution on each region
(right; torchvision's layout and arithmetic); on C4 a deconvolution on what conv5_x makes of each region (left).

P regions that hold an object (in the loss: that may hold one), K foreground classes, M × M masks inside their box: 28 × 28 on a pyramid,
14 × 14 on C4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from detection.losses import mask_loss, shared_count
from detection.roi_head import Regions
from detection.structures import Detections, Target
from detection.waiting import is_asking_free
from resbackbone.errors import InputError

# RoIAlign wants floats: 32 masks of 800×1333 px are 137 MB of them, a crowd's 500 would be 2.1 GB.
MASKS_AT_ONCE = 32


class RegionTop(nn.Module):
    """Regions pooled and run through the conv5_x that the region head has: where C4's mask branch starts."""

    def __init__(self, pooler: nn.Module, box_head: nn.Module) -> None:
        """pooler: gives what box_head wants; box_head: (P, C, p, p) → (P, D, h, w)."""
        super().__init__()
        self.pooler = pooler
        self._shared = (box_head,)  # in a tuple, since the region head owns it: its weights are saved and counted once

    def forward(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        """(sum P, D, h, w) of each image's boxes (P, 4)."""
        return self._shared[0](self.pooler(features, boxes, sizes))

    def pool(self, features: Mapping[str, Tensor], boxes: Tensor, image: Tensor) -> Tensor:
        """The same for the boxes (P, 4) of all images, image (P,) int64 saying whose each is."""
        return self._shared[0](self.pooler.pool(features, boxes, image))  # type: ignore[operator]


class MaskHead(nn.Module):
    """Predicts, for every class, a mask inside a region."""

    def __init__(self, pooler: nn.Module, in_channels: int, *, num_classes: int, width: int = 256, depth: int = 4) -> None:
        """pooler: gives (P, in_channels, M / 2, M / 2). num_classes: K, without background. depth: convolutions before the last two."""
        super().__init__()
        self.pooler = pooler
        channels = [in_channels] + [width] * depth
        self.convs = nn.ModuleList(nn.Conv2d(c_in, c_out, 3, padding=1) for c_in, c_out in pairwise(channels))
        self.conv5_mask = nn.ConvTranspose2d(channels[-1], width, 2, 2)
        self.mask_fcn_logits = nn.Conv2d(width, num_classes + 1, 1)
        for layer in (*self.convs, self.conv5_mask, self.mask_fcn_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        for layer in self.convs:
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Mask logits (sum P, K + 1, M, M) of each image's boxes (P, 4)."""
        return self.predict(self.pooler(features, boxes, sizes))

    def predict(self, hidden: Tensor) -> Tensor:
        """Mask logits (P, K + 1, M, M) of pooled regions (P, C, M / 2, M / 2)."""
        for layer in self.convs:
            hidden = F.relu(layer(hidden))
        return self.mask_fcn_logits(F.relu(self.conv5_mask(hidden)))

    def losses(
        self,
        features: Mapping[str, Tensor],
        regions: Sequence[Regions],
        sizes: Sequence[tuple[int, int]],
        *,
        targets: Sequence[Target],
        across_processes: bool = True,
    ) -> dict[str, Tensor]:
        """The mask term over the positive regions of all images; 0, with gradients of 0, where there are none."""
        boxes = [region.boxes[: region.reserved] for region in regions]
        labels = torch.cat([region.labels[: region.reserved] for region in regions])
        logits = self(features, boxes, sizes)
        wanted = [
            cut_masks(target, region.matches[: region.reserved], box, side=logits.shape[-1])
            for target, region, box in zip(targets, regions, boxes, strict=True)
        ]
        count = shared_count(labels > 0, across_processes=across_processes)
        return mask_loss(logits, labels, torch.cat(wanted), count=count)

    @torch.no_grad()
    def detect(self, features: Mapping[str, Tensor], found: Sequence[Detections], sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """The same detections with `masks`, the probabilities (D, M, M) of the class each was given."""
        logits = self(features, [one.boxes for one in found], sizes)
        labels = torch.cat([one.labels for one in found])
        masks = logits[torch.arange(len(labels), device=labels.device), labels].float().sigmoid()
        per_image = zip(found, masks.split([len(one) for one in found]), strict=True)
        return [Detections(boxes=one.boxes, scores=one.scores, labels=one.labels, masks=mask) for one, mask in per_image]


def cut_masks(target: Target, matches: Tensor, boxes: Tensor, *, side: int) -> Tensor:
    """(P, side, side) float: for each box (P, 4) the mask of its object, `target.masks[matches]`, cut out and resized by RoIAlign.

    Where there is none, the match being below 0, any numbers.
    """
    if target.masks is None:
        raise InputError(f"image {target.image_id} has no masks to train the mask branch on; set model.mask=false or annotate them")
    matches = matches.clamp(min=0)
    if 0 < len(target.masks) <= MASKS_AT_ONCE:
        return _cut(target.masks, matches, boxes, side)
    masks = boxes.new_zeros((len(boxes), side, side))
    if not is_asking_free(matches):
        for first in range(0, len(target.masks), MASKS_AT_ONCE):
            part = target.masks[first : first + MASKS_AT_ONCE]
            place = matches - first
            of_part = _cut(part, place.clamp(0, len(part) - 1), boxes, side)
            masks = torch.where(((place >= 0) & (place < len(part)))[:, None, None], of_part, masks)
        return masks
    for part in matches.unique().split(MASKS_AT_ONCE):
        rows = torch.nonzero(torch.isin(matches, part)).flatten()
        masks[rows] = _cut(target.masks[part], torch.searchsorted(part, matches[rows]), boxes[rows], side)
    return masks


def _cut(masks: Tensor, matches: Tensor, boxes: Tensor, side: int) -> Tensor:
    rois = torch.cat((matches[:, None].to(boxes.dtype), boxes), dim=1)
    return roi_align(masks[:, None].to(boxes.dtype), rois, (side, side), 1.0)[:, 0]


def paste_masks(detections: Detections, size: tuple[int, int], *, threshold: float = 0.5) -> Iterator[Tensor]:
    """Each detection's mask (height, width) uint8 in an image of `size`: 1 where the probability is above `threshold`.

    One at a time, since a hundred masks of a large photo fill gigabytes. torchvision's arithmetic: a border of zeros around the
    mask, the box grown to match and rounded down to whole pixels, bilinear resizing.
    """
    assert detections.masks is not None, "these detections have no masks"
    side = detections.masks.shape[-1]
    centre = (detections.boxes[:, 2:] + detections.boxes[:, :2]) * 0.5
    half = (detections.boxes[:, 2:] - detections.boxes[:, :2]) * 0.5 * ((side + 2) / side)
    grown = torch.cat((centre - half, centre + half), dim=1).to(torch.int64).tolist()
    for mask, box in zip(F.pad(detections.masks.float(), (1, 1, 1, 1)), grown, strict=True):
        yield _paste(mask, box, size, threshold)


def _paste(mask: Tensor, box: list[int], size: tuple[int, int], threshold: float) -> Tensor:
    left, top, right, bottom = box[0], box[1], box[2] + 1, box[3] + 1
    shape = [max(bottom - top, 1), max(right - left, 1)]
    resized = F.interpolate(mask[None, None], size=shape, mode="bilinear", align_corners=False)[0, 0] > threshold
    image = torch.zeros(size, dtype=torch.uint8, device=mask.device)
    y0, y1, x0, x1 = max(top, 0), min(bottom, size[0]), max(left, 0), min(right, size[1])
    image[y0:y1, x0:x1] = resized[y0 - top : y1 - top, x0 - left : x1 - left]
    return image
