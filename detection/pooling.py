"""Regions to features of one size: RoIAlign (He et al. 2017, Mask R-CNN, §3) or RoIPool (Girshick 2015, §2.1), over one map or a pyramid.

N images, R regions over all of them, C channels, P the output's side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align, roi_pool

from detection.bag_align import bag_align
from detection.waiting import is_asking_free
from resbackbone.backbone import FeatureInfo
from resbackbone.errors import InputError, nearest

CANONICAL_SIDE, CANONICAL_STRIDE = 224, 16  # Lin et al. 2017, FPN, eq. 1: a box of ImageNet's size belongs where ResNet-C4 has it
OPS = ("align", "pool")
FAR_AWAY = -1e5  # pixels: left of and above any image


class RegionPooler(nn.Module):
    """Pools each box from the level its size calls for."""

    def __init__(
        self,
        feature_info: Mapping[str, FeatureInfo],
        *,
        op: str = "align",
        output_size: int = 7,
        sampling_ratio: int = 2,
        aligned: bool = False,
        channels_last: bool = True,
        compiled_op: bool = False,
    ) -> None:
        """feature_info: the levels to pool from, finest first, each of twice the stride before it.

        sampling_ratio: samples a bin and side for align; 0: as many as a bin has cells. aligned: half a cell's shift, as Detectron2
        has it; torchvision's weights were trained without. channels_last: how the bags lay out their result in memory, as convolutions
        read it; False as fully connected layers do. compiled_op: torchvision's operator on the CPU too, as export wants it.
        """
        super().__init__()
        if op not in OPS:
            raise InputError(f"roi op {op!r} is not known;{nearest(op, OPS)} choose from {', '.join(OPS)}")
        strides = {name: info.stride for name, info in feature_info.items()}
        if not strides or any(2 * fine != coarse for fine, coarse in pairwise(strides.values())):
            raise InputError(f"regions are pooled from levels whose strides double, finest first; these have {strides}: choose others")
        self.names, self.strides = tuple(strides), tuple(strides.values())
        self.op, self.output_size = op, output_size
        self.sampling_ratio, self.aligned = sampling_ratio, aligned
        self.channels_last, self.compiled_op = channels_last, compiled_op

    def forward(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """features: level → (N, C, h, w); boxes: an (R_i, 4) an image, xyxy in its pixels. Returns (R, C, P, P) in the dtype of features.

        image_sizes is not needed: strides are known. It is there for poolers that are given only maps.
        """
        image = torch.cat([torch.full_like(part[:, 0], number, dtype=torch.int64) for number, part in enumerate(boxes)])
        return self.pool(features, torch.cat(list(boxes)), image)

    def pool(self, features: Mapping[str, Tensor], boxes: Tensor, image: Tensor) -> Tensor:
        """The same for the boxes (R, 4) of all images, image (R,) int64 saying whose each is."""
        maps = [features[name] for name in self.names]
        boxes = boxes.to(torch.promote_types(maps[0].dtype, torch.float32))  # bfloat16 has whole pixels to 256 only
        level = self.levels_of(boxes)
        if self._takes_bags(maps[0]):
            return self._bags(maps, boxes, image, level)
        return self._operator(maps, torch.cat((image[:, None].to(boxes.dtype), boxes), dim=1), level)

    def levels_of(self, boxes: Tensor) -> Tensor:
        """(R,) which level, by position in `names`, each box is pooled from (FPN, eq. 1, with torchvision's rounding)."""
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        exponent = torch.floor(math.log2(CANONICAL_STRIDE) + torch.log2(side / CANONICAL_SIDE) + 1e-6)
        position = exponent - math.floor(math.log2(self.strides[0]))
        return position.nan_to_num().clamp(0, len(self.strides) - 1).long()

    def _takes_bags(self, features: Tensor) -> bool:
        """On a GPU the compiled operator is the fast one, and only it has adaptive sampling and RoIPool."""
        return self.op == "align" and self.sampling_ratio > 0 and features.device.type == "cpu" and not self.compiled_op

    def _bags(self, maps: Sequence[Tensor], boxes: Tensor, image: Tensor, level: Tensor) -> Tensor:
        return bag_align(
            maps,
            boxes,
            image=image,
            level=level,
            scales=[1 / stride for stride in self.strides],
            bins=self.output_size,
            samples=self.sampling_ratio,
            aligned=self.aligned,
            channels_last=self.channels_last,
        )

    def _operator(self, maps: Sequence[Tensor], rois: Tensor, level: Tensor) -> Tensor:
        """rois: (R, 5), the image's number before each box. torchvision's operators, in float32 as under its autocast."""
        if len(maps) == 1:
            return self._pool(maps[0].to(rois.dtype), rois, 1 / self.strides[0]).to(maps[0].dtype)
        if not (self.compiled_op or is_asking_free(rois)):
            return self._pool_everywhere(maps, rois, level)
        pooled = rois.new_zeros((rois.shape[0], maps[0].shape[1], self.output_size, self.output_size))
        for number, (features, stride) in enumerate(zip(maps, self.strides, strict=True)):
            chosen = torch.nonzero(level == number).flatten()
            pooled = pooled.index_copy(0, chosen, self._pool(features.to(rois.dtype), rois[chosen], 1 / stride))
        return pooled.to(maps[0].dtype)

    def _pool_everywhere(self, maps: Sequence[Tensor], rois: Tensor, level: Tensor) -> Tensor:
        """The same without asking how many regions a level has: on the others a region is moved far away, where the operators find nothing.

        They neither read nor write there, so what a region costs on the others is little more than a row of zeros.
        """
        pooled = torch.zeros((), dtype=rois.dtype, device=rois.device)
        for number, (features, stride) in enumerate(zip(maps, self.strides, strict=True)):
            of_level = torch.cat((rois[:, :1], rois[:, 1:].where((level == number)[:, None], FAR_AWAY)), dim=1)
            pooled = pooled + self._pool(features.to(rois.dtype), of_level, 1 / stride)
        return pooled.to(maps[0].dtype)

    def _pool(self, features: Tensor, rois: Tensor, scale: float) -> Tensor:
        if self.op == "pool":
            return roi_pool(features, rois, self.output_size, scale)
        return roi_align(features, rois, self.output_size, scale, self.sampling_ratio, self.aligned)
