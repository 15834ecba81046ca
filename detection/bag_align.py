"""RoIAlign on the CPU as embedding bags: the same result as torchvision's operator, an order of magnitude faster to train through.

Every output bin is a weighted sum of a few pixels. With features as rows of a table, one `embedding_bag` gathers them for all bins,
vectorised over channels; the gradient is the transposed bag: for each pixel, the weighted sum of the bins that read it. Sorting
makes that a gather too, so it is parallel, deterministic and writes each row once.

R boxes, P bins a side, n samples a bin and side, T rows of the table, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class WeightedRows(torch.autograd.Function):
    """out[b] = sum over k of weights[b, k] · table[rows[b, k]]; differentiable in `table` only, since boxes carry no gradient here."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """table: (T, C); rows: (B, K) int64; weights: (B, K). Returns (B, C)."""
        ctx.save_for_backward(rows, weights)
        ctx.table_rows = len(table)
        return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """The transposed bag: entries sorted by the row they read."""
        rows, weights = ctx.saved_tensors
        flat = rows.flatten()
        order = flat.to(torch.int32).argsort(stable=True)  # half the bytes to sort; stable, so that sums have one order
        counts = torch.bincount(flat, minlength=ctx.table_rows)
        starts = counts.cumsum(0) - counts
        bins = order // rows.shape[1]
        table_grad = F.embedding_bag(bins, grad.contiguous(), starts, mode="sum", per_sample_weights=weights.flatten()[order])
        return table_grad, None, None


def bag_rows(boxes: Tensor, first_row: Tensor, grid: tuple[Tensor, Tensor], *, bins: int, samples: int) -> tuple[Tensor, Tensor]:
    """Which rows each bin reads, and with what weights: (R · P · P, 4 n²) int64 and float32.

    boxes: (R, 4) in cells of each box's own feature map; first_row: (R,) where that map of that image begins in the table; grid: its
    (heights, widths), each (R,) int64.
    """
    heights, widths = grid
    y_cells, y_weights = _along_axis(boxes[:, 1], boxes[:, 3], heights, bins, samples)
    x_cells, x_weights = _along_axis(boxes[:, 0], boxes[:, 2], widths, bins, samples)
    count, taps = len(boxes), 2 * samples
    y_rows = y_cells * widths[:, None, None] + first_row[:, None, None]
    rows = y_rows.view(count, bins, 1, taps, 1) + x_cells.view(count, 1, bins, 1, taps)
    weights = y_weights.view(count, bins, 1, taps, 1) * x_weights.view(count, 1, bins, 1, taps)
    return rows.reshape(-1, taps * taps), weights.reshape(-1, taps * taps)


def _along_axis(low: Tensor, high: Tensor, size: Tensor, bins: int, samples: int) -> tuple[Tensor, Tensor]:
    """Bilinear taps along one axis: cells (R, P, 2 n) int64 and their weights, the average over the bin's samples included.

    As in torchvision (aligned=False): boxes are at least one cell long, samples farther than one cell outside count as zero.
    """
    step = (high - low).clamp(min=1.0) / bins
    offsets = (torch.arange(bins * samples, dtype=low.dtype, device=low.device) + 0.5) / samples
    position = low[:, None] + offsets * step[:, None]
    size = size[:, None]
    inside = (position >= -1.0) & (position <= size)
    position = position.clamp(min=0.0)
    first = torch.minimum(position.long(), size - 1)
    second = torch.minimum(first + 1, size - 1)
    fraction = torch.where(first >= size - 1, torch.zeros_like(position), position - first)
    weight = torch.stack((1 - fraction, fraction), dim=-1) * inside[..., None] / samples
    shape = (len(low), bins, 2 * samples)
    return torch.stack((first, second), dim=-1).view(shape), weight.view(shape)
