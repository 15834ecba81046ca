"""What travels between data, detector and evaluation: targets, detections and batches of both.

N images, G ground-truth boxes, I ignored boxes, D detections, K foreground classes. Boxes are xyxy float32 in pixels, where a
pixel covers [x, x + 1), so that width = x2 - x1. Labels run from 1 to K; 0 is the background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.waiting import constant

TENSORS = ("boxes", "labels", "ignore_boxes", "masks", "label_map")  # of a target


@dataclass(kw_only=True)
class Target:
    """The truth about one image, in pixels of the image as the network sees it.

    boxes: (G, 4); labels: (G,) int64 in 1..K; ignore_boxes: (I, 4), crowd or difficult regions, neither object nor background;
    masks: (G, h, w) uint8 or None; original_size: (height, width) of the upright image on disk; seed drives the sampling of this
    image's anchors and regions (None: torch's global generator); label_map: (H, W) uint8, each pixel's class, for segmentation, or None.
    """

    boxes: Tensor
    labels: Tensor
    ignore_boxes: Tensor
    image_id: int | str
    index: int
    original_size: tuple[int, int]
    seed: int | None = None
    masks: Tensor | None = None
    label_map: Tensor | None = None

    def boxes_at(self, matches: Tensor) -> Tensor:
        """(P, 4): the box each of `matches` (P,) names; where that is none, below 0, any numbers."""
        return self.boxes[matches.clamp(min=0)] if len(self.boxes) else self.boxes.new_zeros((len(matches), 4))

    def scaled(self, from_size: tuple[int, int], to_size: tuple[int, int]) -> Target:
        """The truth about the same image at another size (height, width); masks take the nearest pixel."""
        if tuple(from_size) == tuple(to_size):
            return self
        factors = constant([to_size[1] / from_size[1], to_size[0] / from_size[0]], like=self.boxes).repeat(2)
        masks = None if self.masks is None else F.interpolate(self.masks[:, None], size=to_size, mode="nearest")[:, 0]
        return replace(self, boxes=self.boxes * factors, ignore_boxes=self.ignore_boxes * factors, masks=masks)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        """The same target with its tensors on `device`."""
        tensors = {name: value for name in TENSORS if (value := getattr(self, name)) is not None}
        return replace(self, **{name: value.to(device, non_blocking=non_blocking) for name, value in tensors.items()})

    def pin_memory(self) -> Target:
        """The same target in page-locked memory; torch's DataLoader calls this by name."""
        return replace(self, **{name: value.pin_memory() for name in TENSORS if (value := getattr(self, name)) is not None})


@dataclass(kw_only=True)
class Detections:
    """What the detector found in one image, best score first.

    boxes: (D, 4); scores: (D,) in 0..1; labels: (D,) int64 in 1..K; masks: (D, M, M) probabilities inside each box, or None.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, keep: Tensor) -> Detections:
        masks = None if self.masks is None else self.masks[keep]
        return Detections(boxes=self.boxes[keep], scores=self.scores[keep], labels=self.labels[keep], masks=masks)

    def scaled(self, from_size: tuple[int, int], to_size: tuple[int, int]) -> Detections:
        """The boxes moved from an image of `from_size` (height, width) to one of `to_size`; masks live inside their box and stay."""
        factor_y, factor_x = to_size[0] / from_size[0], to_size[1] / from_size[1]
        return replace(self, boxes=self.boxes * constant([factor_x, factor_y, factor_x, factor_y], like=self.boxes))

    def to(self, device: torch.device | str) -> Detections:
        """The same detections with their tensors on `device`."""
        masks = None if self.masks is None else self.masks.to(device)
        return Detections(boxes=self.boxes.to(device), scores=self.scores.to(device), labels=self.labels.to(device), masks=masks)


def together(parts: Sequence[Detections]) -> Detections:
    """The detections (without masks) of one or more lists about one image as one list, in no order."""
    return Detections(
        boxes=torch.cat([part.boxes for part in parts]),
        scores=torch.cat([part.scores for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
    )


@dataclass(kw_only=True)
class Batch:
    """What a loader yields: images uint8 (3, h, w) RGB, already at the network's size but not padded, and their targets."""

    images: list[Tensor]
    targets: list[Target]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; copies are asynchronous where the memory is page-locked."""
        images = [image.to(device, non_blocking=True) for image in self.images]
        return Batch(images=images, targets=[target.to(device, non_blocking=True) for target in self.targets])

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; torch's DataLoader calls this by name."""
        return Batch(images=[image.pin_memory() for image in self.images], targets=[target.pin_memory() for target in self.targets])

    def __len__(self) -> int:
        return len(self.images)
