"""The losses of Faster R-CNN and its mask branch: pure functions that return named terms, summed by whoever trains.

Each term is a sum over samples divided by `count`, the number of sampled anchors or regions. `shared_count` averages that number
over processes, so that the mean of the processes' gradients, which is what DDP makes, is the gradient of one process that saw
every image. S samples, of which P are positive; K foreground classes. Everything here is float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resbackbone.runtime.distributed import mean_across_processes

BETA = 1 / 9  # where smooth L1 turns from square to straight: sigma = 3 in Ren et al.'s code, torchvision's and ours


def shared_count(count: int, *, like: Tensor, across_processes: bool) -> Tensor:
    """The divisor of a loss: `count`, averaged over processes where they train together; never 0."""
    divisor = torch.tensor(float(count), device=like.device)
    return (mean_across_processes(divisor) if across_processes else divisor).clamp(min=1e-6)


def rpn_losses(logits: Tensor, is_object: Tensor, deltas: Tensor, target_deltas: Tensor, *, count: Tensor) -> dict[str, Tensor]:
    """Ren et al. 2015, eq. 1. logits: (S,); is_object: (S,) bool; deltas, target_deltas: (P, 4), of the positive anchors."""
    objectness = F.binary_cross_entropy_with_logits(logits.float(), is_object.float(), reduction="sum")
    return {"rpn_objectness": objectness / count, "rpn_box": _box_loss(deltas, target_deltas) / count}


def roi_losses(
    logits: Tensor, labels: Tensor, deltas: Tensor, target_deltas: Tensor, *, positive: Tensor, count: Tensor
) -> dict[str, Tensor]:
    """Girshick 2015 (Fast R-CNN), eq. 1-3. logits: (S, K + 1); labels: (S,) 0 … K; deltas: (S, 4 · (K + 1)).

    positive: (P,) which samples have a label above 0; target_deltas: (P, 4), theirs.
    """
    classes = F.cross_entropy(logits.float(), labels, reduction="sum")
    of_class = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
    return {"roi_class": classes / count, "roi_box": _box_loss(of_class, target_deltas) / count}


def mask_loss(logits: Tensor, labels: Tensor, targets: Tensor, *, count: Tensor) -> dict[str, Tensor]:
    """He et al. 2017 (Mask R-CNN), §3. logits: (P, K + 1, M, M); labels: (P,) 1 … K; targets: (P, M, M) in 0..1; count: regions."""
    of_class = logits[torch.arange(len(labels), device=labels.device), labels].float()
    pixels = targets.shape[-2] * targets.shape[-1]
    return {"mask": F.binary_cross_entropy_with_logits(of_class, targets, reduction="sum") / (count * pixels)}


def _box_loss(deltas: Tensor, targets: Tensor) -> Tensor:
    return F.smooth_l1_loss(deltas.float(), targets, beta=BETA, reduction="sum")
