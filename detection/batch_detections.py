"""The detections of all images of a batch at once, for a GPU: it is asked four times, however many images and classes there are (unless
there are so many candidates that one NMS for all would be too much).

Step by step what RoIHead.candidates and RoIHead.best do for one image; there each image, and in NMS often each class, would be waited for.

N images, R regions over all of them, K foreground classes, D candidates, then detections.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from detection.boxes import REGION_WEIGHTS, decode, is_large, moved_apart
from detection.structures import Detections
from detection.waiting import constant

# torchvision's operator takes D² / 8 bytes: with 20,000 candidates 50 MB, with a low threshold's 640,000 more than a GPU has.
AT_ONCE = 20_000


def best_of_batch(
    scored: Sequence[tuple[Tensor, Tensor]],
    regions: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    *,
    score_threshold: float,
    min_side: float,
    nms_iou: float,
    most: int,
) -> list[Detections]:
    """Each image's best `most` detections, best first.

    scored: an image's probabilities (R_i, K + 1) and deltas (R_i, 4 · (K + 1)) for its regions (R_i, 4); sizes: (height, width) in pixels.
    """
    scores, deltas = (torch.cat(parts) for parts in zip(*scored, strict=True))
    image = torch.cat([torch.full_like(part[:, 0], number, dtype=torch.int64) for number, part in enumerate(regions)])
    limits = constant([(width, height, width, height) for height, width in sizes], like=regions[0])
    row, label = torch.nonzero(scores[:, 1:] > score_threshold).unbind(1)
    label, image = label + 1, image[row]
    boxes = decode(deltas.unflatten(1, (-1, 4))[row, label], torch.cat(list(regions))[row], REGION_WEIGHTS)
    boxes = torch.minimum(boxes.clamp(min=0), limits[image])
    large = torch.nonzero(is_large(boxes, min_side)).flatten()
    found, image = Detections(boxes=boxes, scores=scores[row, label], labels=label)[large], image[large]
    kept = _nms(found, image, images=len(sizes), classes=scores.shape[1], iou=nms_iou)
    of_image = image[kept]
    counts = (of_image[:, None] == torch.arange(len(sizes), device=of_image.device)).sum(dim=0).tolist()
    by_image = kept[of_image.argsort(stable=True)].split(counts)
    return [found[part[:most]] for part in by_image]


def _nms(found: Detections, image: Tensor, *, images: int, classes: int, iou: float) -> Tensor:
    """Indices of what stays of all images' candidates; of one image best first. image: (D,), whose each is."""
    if len(found) <= AT_ONCE:
        apart = moved_apart(found.boxes, image * classes + found.labels)
        return nms(apart, found.scores.to(apart.dtype), iou)
    kept = []
    for number in range(images):
        rows = torch.nonzero(image == number).flatten()
        kept.append(rows[batched_nms(found.boxes[rows], found.scores[rows], found.labels[rows], iou)])
    return torch.cat(kept)
