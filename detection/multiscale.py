"""Testing on an image at several sizes, and on its mirror image.

The paper's way (He et al. 2015, appendix B; Ren et al. 2015, Object Detection Networks on Convolutional Feature Maps): regions are
proposed at the usual size; each is pooled from two adjacent scales of an image pyramid, and the larger of the two values goes on (maxout).
The plain way: each scale is a detector of its own, and NMS merges what they find. The mirror image is always merged so.

R regions of one image, S scales, C channels, P the side of what is pooled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.data.images import resized_size
from detection.preprocess import Size
from detection.structures import Detections

PAPER_SCALES = (200, 400, 600, 800, 1000)  # shorter sides, pixels
REGION_PIXELS = 224**2  # what a region should measure where it is pooled (He et al. 2014, SPP-net, §4.1): ImageNet's images
LONGEST_PX = 2000  # no scale makes an image longer (Girshick 2015, Fast R-CNN, §5.2)


@dataclass(frozen=True)
class ScaledFeatures:
    """One image at one size: its feature maps by level (1, C, h, w), and that size."""

    features: Mapping[str, Tensor]
    size: Size


def resize_to(image: Tensor, scale: int) -> Tensor:
    """`image` (3, h, w), uint8 or float in 0..1, with its shorter side at `scale` pixels: float in 0..1, bilinear, antialiased."""
    return interpolated(image, resized_size(image.shape[-2], image.shape[-1], min_size=scale, max_size=max(scale, LONGEST_PX)))


def interpolated(image: Tensor, size: Size) -> Tensor:
    """`image` (3, h, w) at `size`, as `resize_to` does it."""
    pixels = image if image.is_floating_point() else image / 255
    if tuple(size) == tuple(image.shape[-2:]):
        return pixels
    return F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0]


def choose_scales(regions: Tensor, size: Size, scaled_sizes: Sequence[Size]) -> Tensor:
    """(R,) the lower index of each region's two adjacent scales.

    They are the one at which the region comes nearest to 224 × 224 pixels in area, and the nearer of its neighbours. regions: (R, 4) in
    an image of `size`; scaled_sizes: two or more, rising.
    """
    area = (regions[:, 2:] - regions[:, :2]).prod(dim=1)
    growth = [height * width / (size[0] * size[1]) for height, width in scaled_sizes]
    miss = (area[:, None] * area.new_tensor(growth) - REGION_PIXELS).abs()
    nearest = miss.argmin(dim=1)
    beyond = F.pad(miss, (1, 1), value=torch.inf)
    row = torch.arange(len(regions), device=regions.device)
    is_lower_nearer = beyond[row, nearest] <= beyond[row, nearest + 2]
    return torch.where(is_lower_nearer, nearest - 1, nearest)


@torch.no_grad()
def pool_two_scales(pooler: nn.Module, pyramid: Sequence[ScaledFeatures], regions: Tensor, size: Size) -> Tensor:
    """(R, C, P, P): each region (R, 4) of an image of `size` pooled from its two scales, merged by maxout.

    pyramid: the image at two or more sizes, rising.
    """
    lower = choose_scales(regions, size, [one.size for one in pyramid])
    empty = pooler(pyramid[0].features, [regions[:0]], [pyramid[0].size])
    pooled = empty.new_full((len(regions), *empty.shape[1:]), -torch.inf)
    for number, one in enumerate(pyramid):
        chosen = torch.nonzero((lower == number) | (lower == number - 1)).flatten()
        growth = regions.new_tensor([one.size[1] / size[1], one.size[0] / size[0]]).repeat(2)
        here = pooler(one.features, [regions[chosen] * growth], [one.size])
        pooled[chosen] = torch.maximum(pooled[chosen], here)
    return pooled


@dataclass(frozen=True)
class View:
    """The image as one detection sees it, and the way back to the image of `size` that was given. detail: it with all the pixels there
    are, which the sizes of a pyramid are made from.
    """

    image: Tensor
    size: Size
    mirrored: bool
    detail: Tensor

    def restored(self, found: Detections) -> Detections:
        """Detections in this view, in pixels of the given image."""
        height, width = self.image.shape[-2:]
        back = found.scaled((height, width), self.size)
        return mirror(back, self.size[1]) if self.mirrored else back


def views_of(image: Tensor, *, scales: Sequence[int] | None, flip: bool, detail: Tensor | None = None) -> Iterator[View]:
    """The image at each of `scales` (None: as it is), and then its mirror image at each. detail: a larger copy to make the scales from."""
    size, detail = (image.shape[-2], image.shape[-1]), image if detail is None else detail
    scaled = [image] if scales is None else [resize_to(detail, scale) for scale in scales]
    for mirrored in (False, True)[: 1 + flip]:
        for one in scaled:
            yield View(one.flip(-1), size, True, detail.flip(-1)) if mirrored else View(one, size, False, detail)


def mirror(found: Detections, width: int) -> Detections:
    """Detections of an image `width` pixels wide as they are in its mirror image; masks, which lie in their boxes, are mirrored too."""
    left, top, right, bottom = found.boxes.unbind(1)
    boxes = torch.stack((width - right, top, width - left, bottom), dim=1)
    return replace(found, boxes=boxes, masks=None if found.masks is None else found.masks.flip(-1))
