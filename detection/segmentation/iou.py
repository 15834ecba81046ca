"""Figures of a segmentation: a confusion matrix of pixels, and what follows from it.

Intersection over union as PASCAL VOC has it (Everingham et al. 2015): true positives / (true + false positives + false negatives), over all
pixels of the split at once, not averaged over images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detection.segmentation.data import IGNORED
from resbackbone.errors import InputError

PRIMARY = "mean_iou"


def confusion_matrix(truth: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Label maps of equal shape, any integer type -> int64 [num_classes, num_classes] pixel counts: rows the truth, columns the prediction.

    Pixels whose truth is IGNORED are left out.
    """
    counts = truth != IGNORED
    pairs = truth[counts].long() * num_classes + predicted[counts].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def figures(matrix: Tensor, names: Sequence[str]) -> dict[str, float]:
    """`mean_iou`, `pixel_accuracy`, `mean_accuracy` (recall averaged over the classes of the truth), and `iou/<name>` of each class.

    A class in neither truth nor prediction has no IoU and no part in the mean; one that is only predicted has 0. InputError without pixels.
    """
    if not matrix.sum():
        raise InputError("there is no pixel to judge by: every one is ignored. Check data.val and its masks")
    right, in_truth, predicted = matrix.diagonal().double(), matrix.sum(1).double(), matrix.sum(0).double()
    union = in_truth + predicted - right
    each = {name: float(right[c] / union[c]) for c, name in enumerate(names) if union[c]}
    recalls = (right / in_truth)[in_truth > 0]
    means = {
        PRIMARY: sum(each.values()) / len(each),
        "pixel_accuracy": float(right.sum() / matrix.sum()),
        "mean_accuracy": float(recalls.mean()),
    }
    return means | {f"iou/{name}": value for name, value in each.items()}


def format_figures(values: dict[str, float]) -> str:
    """One line a figure, classes first, the means last."""
    width = max(len(name) for name in values)
    order = [name for name in values if name.startswith("iou/")] + [name for name in values if not name.startswith("iou/")]
    return "\n".join(f"{name:<{width}}  {values[name]:.4f}" for name in order)
