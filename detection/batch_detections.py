"""The detections of all images of a batch at once, for a GPU: it is asked four times, however many images and classes there are.

Step by step what RoIHead.candidates and RoIHead.best do for one image; there each image, and in NMS often each class, would be waited for.

N images, R regions over all of them, K foreground classes, D candidates, then detections.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import nms

from detection.boxes import REGION_WEIGHTS, decode, is_large, moved_apart
from detection.structures import Detections
from detection.waiting import constant


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
    apart = moved_apart(found.boxes, image * scores.shape[1] + found.labels)
    kept = nms(apart, found.scores.to(apart.dtype), nms_iou)
    of_image = image[kept]
    counts = (of_image[:, None] == torch.arange(len(sizes), device=of_image.device)).sum(dim=0).tolist()
    by_image = kept[of_image.argsort(stable=True)].split(counts)
    return [found[part[:most]] for part in by_image]
