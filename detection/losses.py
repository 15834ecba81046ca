"""The losses of Faster R-CNN and its mask branch: pure functions that return named terms, summed by whoever trains.

Each term is a sum over samples divided by `count`, the number of sampled anchors or regions. `shared_count` averages that number
over processes, so that the mean of the processes' gradients, which is what DDP makes, is the gradient of one process that saw
every image. S samples, the positive ones among the P places reserved for them; K foreground classes. Places that hold no sample take
no part. Everything here is float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resbackbone.runtime.distributed import mean_across_processes

NO_LABEL = -100  # of a place that holds no sample
BETA = 1 / 9  # where smooth L1 turns from square to straight: sigma = 3 in Ren et al.'s code, torchvision's and ours


def shared_count(used: Tensor, *, across_processes: bool) -> Tensor:
    """The divisor of a loss: how many of `used` (S,) bool are, averaged over processes where they train together; never 0."""
    divisor = used.sum().float()
    return (mean_across_processes(divisor) if across_processes else divisor).clamp(min=1e-6)


def rpn_losses(
    logits: Tensor, is_object: Tensor, deltas: Tensor, target_deltas: Tensor, *, is_used: Tensor, count: Tensor
) -> dict[str, Tensor]:
    """Ren et al. 2015, eq. 1. logits: (S,); is_object, is_used: (S,) bool; deltas, target_deltas: (P, 4), of the first P samples."""
    logits = torch.where(is_used, logits.float(), 0)  # 0 times infinity would be no number
    objectness = F.binary_cross_entropy_with_logits(logits, is_object.float(), weight=is_used.float(), reduction="sum")
    box = _box_loss(deltas, target_deltas, is_object[: len(deltas)])
    return {"rpn_objectness": objectness / count, "rpn_box": box / count}


def roi_losses(
    logits: Tensor, labels: Tensor, deltas: Tensor, target_deltas: Tensor, *, reserved: Tensor, count: Tensor
) -> dict[str, Tensor]:
    """Girshick 2015 (Fast R-CNN), eq. 1-3. logits: (S, K + 1); labels: (S,) 0 … K or NO_LABEL; deltas: (S, 4 · (K + 1)).

    reserved: (P,) the samples among which those with a label above 0 are; target_deltas: (P, 4), of these.
    """
    logits = torch.where((labels != NO_LABEL)[:, None], logits.float(), 0)
    classes = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum")
    of_class = deltas.unflatten(1, (-1, 4))[reserved, labels[reserved].clamp(min=0)]
    box = _box_loss(of_class, target_deltas, labels[reserved] > 0)
    return {"roi_class": classes / count, "roi_box": box / count}


def mask_loss(logits: Tensor, labels: Tensor, targets: Tensor, *, count: Tensor) -> dict[str, Tensor]:
    """He et al. 2017 (Mask R-CNN), §3. logits: (P, K + 1, M, M); labels: (P,); targets: (P, M, M) in 0..1.

    Regions with a label above 0 count; count: how many these are.
    """
    of_class = logits[torch.arange(len(labels), device=labels.device), labels.clamp(min=0)].float()
    counts, pixels = (labels > 0)[:, None, None], targets.shape[-2] * targets.shape[-1]
    of_class, weight = torch.where(counts, of_class, 0), counts.float()
    return {"mask": F.binary_cross_entropy_with_logits(of_class, targets, weight=weight, reduction="sum") / (count * pixels)}


def _box_loss(deltas: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """deltas, targets: (P, 4); counts: (P,) bool, which of them do; the others may be no numbers."""
    deltas, targets = (torch.where(counts[:, None], values, 0) for values in (deltas.float(), targets))
    return F.smooth_l1_loss(deltas, targets, beta=BETA, reduction="sum")
