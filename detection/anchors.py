"""Anchors: boxes of a few sizes and shapes, centred on every position of every feature map (Ren et al. 2015, §3.1.1).

N images, L levels, A anchors of an image over all levels, in the order (level, row, column, ratio, size).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from resbackbone.errors import InputError

if TYPE_CHECKING:
    from resbackbone.backbone import FeatureInfo

RATIOS = (0.5, 1.0, 2.0)  # height / width (Ren et al. 2015, §3.3)


class AnchorGrid(nn.Module):
    """The anchors of an image, given the sizes of its feature maps."""

    def __init__(self, sizes: Sequence[Sequence[float]], ratios: Sequence[float] = RATIOS) -> None:
        """sizes: for each level the square roots of the anchors' areas, in pixels; as many on every level, since levels share a head."""
        super().__init__()
        if len({len(level) for level in sizes}) != 1:
            raise InputError(f"every level needs as many anchor sizes as the others: they share a head; got {list(map(list, sizes))}")
        self.per_position = len(sizes[0]) * len(ratios)
        self.num_levels = len(sizes)
        for level, level_sizes in enumerate(sizes):
            self.register_buffer(f"shapes{level}", _shapes(level_sizes, ratios), persistent=False)

    def forward(self, image_size: tuple[int, int], grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Per level the anchors (rows · columns · per_position, 4) of a padded image of `image_size`, maps of `grids` (rows, columns).

        The step between positions is image size // grid size, as in torchvision: where padding makes a map a little larger than
        the image over its stride (p6 of 96 px: 2 positions), anchors keep their distance even inside the image.
        """
        assert len(grids) == self.num_levels, f"{len(grids)} feature maps for anchors of {self.num_levels} levels"
        return [self._level(level, image_size, grid) for level, grid in enumerate(grids)]

    def _level(self, level: int, image_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        shapes: Tensor = getattr(self, f"shapes{level}")
        y = torch.arange(grid[0], dtype=torch.float32, device=shapes.device) * (image_size[0] // max(grid[0], 1))
        x = torch.arange(grid[1], dtype=torch.float32, device=shapes.device) * (image_size[1] // max(grid[1], 1))
        corners = torch.stack((x.expand(grid), y[:, None].expand(grid)), dim=-1).repeat(1, 1, 2)
        return (corners[:, :, None, :] + shapes).reshape(-1, 4)


def anchor_grid(
    feature_info: Mapping[str, FeatureInfo], *, sizes: Sequence[float] | None = None, ratios: Sequence[float] = RATIOS
) -> AnchorGrid:
    """The usual anchors for these feature maps: on a pyramid one size a level (8 × stride: 32 … 512), on one map all five.

    sizes: other sizes; on a pyramid as many as there are levels, smallest first.
    """
    strides = [info.stride for info in feature_info.values()]
    if len(strides) == 1:
        return AnchorGrid([tuple(sizes or (32, 64, 128, 256, 512))], ratios)
    chosen = tuple(sizes or [8 * stride for stride in strides])
    if len(chosen) != len(strides):
        raise InputError(f"{len(chosen)} anchor sizes {list(chosen)} for {len(strides)} levels {list(feature_info)}; give one size a level")
    return AnchorGrid([(size,) for size in chosen], ratios)


def _shapes(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """(ratios · sizes, 4) boxes centred on 0, rounded to whole pixels as Ren et al.'s code did and every peer has done since."""
    root = torch.sqrt(torch.tensor(ratios, dtype=torch.float32))
    size = torch.tensor(sizes, dtype=torch.float32)
    heights, widths = (root[:, None] * size).flatten(), ((1 / root)[:, None] * size).flatten()
    return (torch.stack((-widths, -heights, widths, heights), dim=1) / 2).round()
