"""Regions to features of one size: RoIAlign (He et al. 2017, Mask R-CNN, §3) or RoIPool (Girshick 2015, §2.1), over one map or a pyramid.

R regions over all images, C channels, P the output's side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align, roi_pool

from detection.bag_align import WeightedRows, bag_rows
from resbackbone.backbone import FeatureInfo
from resbackbone.errors import InputError, nearest

CANONICAL_SIDE, CANONICAL_STRIDE = 224, 16  # Lin et al. 2017, FPN, eq. 1: a box of ImageNet's size belongs where ResNet-C4 has it
OPS = ("align", "pool")


class RegionPooler(nn.Module):
    """Pools each box from the level its size calls for."""

    def __init__(
        self, feature_info: Mapping[str, FeatureInfo], *, op: str = "align", output_size: int = 7, samples: int = 2, use_bags: bool = True
    ) -> None:
        """feature_info: the levels to pool from, finest first. samples: a bin and side, for align. use_bags: False takes torchvision's
        operator on the CPU too."""
        super().__init__()
        if op not in OPS:
            raise InputError(f"roi op {op!r} is not known;{nearest(op, OPS)} choose from {', '.join(OPS)}")
        self.names, self.strides = tuple(feature_info), tuple(info.stride for info in feature_info.values())
        self.op, self.output_size, self.samples, self.use_bags = op, output_size, samples, use_bags

    def forward(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """features: level → (N, C, h, w); boxes: an (R_i, 4) an image, xyxy in its pixels. Returns (R, C, P, P)."""
        maps = [features[name] for name in self.names]
        together = torch.cat(list(boxes)).float()
        counts = torch.tensor([len(part) for part in boxes])
        image = torch.repeat_interleave(torch.arange(len(boxes)), counts).to(together.device)
        level = self.levels_of(together)
        if self.op == "align" and self.use_bags and maps[0].device.type == "cpu":
            return self._bags(maps, together, image, level)
        return self._operator(maps, together, image, level)

    def levels_of(self, boxes: Tensor) -> Tensor:
        """(R,) which level, by position in `names`, each box is pooled from (FPN, eq. 1, with torchvision's rounding)."""
        if len(self.names) == 1:
            return torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        finest, coarsest = int(math.log2(self.strides[0])), int(math.log2(self.strides[-1]))
        exponent = torch.floor(math.log2(CANONICAL_STRIDE) + torch.log2(side / CANONICAL_SIDE) + 1e-6)
        return exponent.clamp(finest, coarsest).long() - finest

    def _bags(self, maps: Sequence[Tensor], boxes: Tensor, image: Tensor, level: Tensor) -> Tensor:
        """One table of all levels' cells, one gather for all boxes."""
        channels = maps[0].shape[1]
        table = torch.cat([features.permute(0, 2, 3, 1).reshape(-1, channels) for features in maps]).float()
        heights, widths = (torch.tensor([features.shape[axis] for features in maps]) for axis in (2, 3))
        cells = torch.tensor([len(features) * features.shape[2] * features.shape[3] for features in maps])
        starts = cells.cumsum(0) - cells
        first_row = starts[level] + image * (heights * widths)[level]
        scaled = boxes / torch.tensor(self.strides, dtype=boxes.dtype)[level, None]
        side = self.output_size
        rows, weights = bag_rows(scaled, first_row, (heights[level], widths[level]), bins=side, samples=self.samples)
        return WeightedRows.apply(table, rows, weights).view(-1, side, side, channels).permute(0, 3, 1, 2)

    def _operator(self, maps: Sequence[Tensor], boxes: Tensor, image: Tensor, level: Tensor) -> Tensor:
        rois = torch.cat((image[:, None].to(boxes.dtype), boxes), dim=1)
        pooled = boxes.new_zeros((len(boxes), maps[0].shape[1], self.output_size, self.output_size))
        for number, (features, stride) in enumerate(zip(maps, self.strides, strict=True)):
            chosen = torch.nonzero(level == number).flatten()
            pooled = pooled.index_copy(0, chosen, self._pool(features.float(), rois[chosen], 1 / stride))
        return pooled

    def _pool(self, features: Tensor, rois: Tensor, scale: float) -> Tensor:
        if self.op == "pool":
            return roi_pool(features, rois, self.output_size, scale)
        return roi_align(features, rois, self.output_size, scale, self.samples)
