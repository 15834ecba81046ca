"""Global context (He et al. 2015, appendix B): what the whole image says stands beside what each region says.

The whole image is pooled as one region and runs through the region head's own layers (conv5_x, or the fully connected ones); the result
is concatenated with each region's, before the class and box layers. It is part of the network and trained with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detection.roi_head import Pool, RoIHead
from detection.waiting import constant


class ContextRoIHead(RoIHead):
    """A region head whose class and box layers read 2 · D features: a region's own, and those of the whole image as one region."""

    def __init__(self, pooler: nn.Module, box_head: nn.Module, **options: Any) -> None:
        """As RoIHead. The layers before the class and box layers are the region's own, so that context adds no others."""
        super().__init__(pooler, box_head, **options)
        self.cls_score = nn.Linear(2 * self.cls_score.in_features, self.cls_score.out_features)
        self.bbox_pred = nn.Linear(2 * self.bbox_pred.in_features, self.bbox_pred.out_features)

    def describe(self, pool: Pool, boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        """(sum R, 2 · D): each region's features, then its image's."""
        whole = [constant([[0.0, 0.0, width, height]], like=part) for part, (height, width) in zip(boxes, sizes, strict=True)]
        context = super().describe(pool, whole, sizes)
        counts = [len(part) for part in boxes]
        times = torch.tensor(counts).to(context.device, non_blocking=True)
        of_regions = context.repeat_interleave(times, dim=0, output_size=sum(counts))
        return torch.cat((super().describe(pool, boxes, sizes), of_regions), dim=1)
