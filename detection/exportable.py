"""A detector as one graph of tensors, for torch.export and ONNX: `FasterRCNN.detect` without a loop over images.

N images, P proposals an image, K foreground classes, D detections an image, M × M masks inside their box. The same arithmetic as rpn.py,
roi_head.py, context.py and mask_head.py; but where those drop what is not wanted, here it stays in its place with the score NOTHING, so
that every shape follows from the input's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from detection.boxes import APART, REGION_WEIGHTS, decode, moved_apart
from detection.context import ContextRoIHead
from detection.faster_rcnn import FasterRCNN
from detection.mask_head import RegionTop
from detection.pooling import RegionPooler
from detection.roi_head import MIN_SIDE_PX as LEAST_DETECTION
from detection.roi_head import RoIHead
from detection.rpn import MIN_SIDE_PX as LEAST_PROPOSAL

NOTHING = -1.0  # the score of a place that holds no box; scores of boxes are probabilities
Suppress = Callable[[Tensor, Tensor, float], Tensor]


def suppress(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """NMS inside each of S sets. boxes: (S, M, 4); scores: (S, M), NOTHING where there is no box. Returns (S, M) bool: which stay.

    One call of torchvision's operator, with the sets moved apart.
    """
    places, best = scores.numel(), scores.flatten()
    number = torch.nonzero(best > NOTHING).flatten()
    moved = moved_apart(boxes.flatten(0, 1)[number], number // scores.shape[1])
    # Two boxes of their own, since torchvision tells torch.export that at least two stay, and the program checks that.
    lone = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64, device=boxes.device) - torch.tensor(
        [[APART], [2 * APART]], device=boxes.device
    )
    order = torch.cat((best[number].double(), lone.new_zeros(2)))
    number = torch.cat((number, torch.arange(2, device=boxes.device) + places))
    kept = number[nms(torch.cat((moved, lone)), order, iou)]
    mask = torch.zeros(places + 2, dtype=torch.bool, device=boxes.device).index_fill(0, kept, True)
    return mask[:places].view(scores.shape)


class ExportableDetector(nn.Module):
    """Images, their sizes → boxes (N, D, 4), scores (N, D), labels (N, D), best first; where a score is 0 there is no detection.

    A detector with a mask branch gives masks (N, D, M, M) as well, probabilities inside each box.
    """

    def __init__(self, detector: FasterRCNN, *, suppress: Suppress = suppress) -> None:
        super().__init__()
        self.detector, self.suppress = detector, suppress

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """images: (N, 3, H, W) uint8 RGB, H and W multiples of 32, each image in the upper left corner.

        sizes: (N, 2) int64, height and width of each.
        """
        features = self.detector.backbone(self._normalized(images, sizes))
        proposals = self._propose(features, (images.shape[-2], images.shape[-1]), sizes)
        boxes, scores, labels = self._detect(features, proposals, sizes)
        if self.detector.mask_head is None:
            return boxes, scores, labels
        return boxes, scores, labels, self._masks(features, boxes, labels)

    def _normalized(self, images: Tensor, sizes: Tensor) -> Tensor:
        preprocess = self.detector.preprocess
        if preprocess.preprocessing.color_order == "BGR":
            images = images.flip(1)
        rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
        inside = (rows[:, None] < sizes[:, 0, None, None]) & (columns < sizes[:, 1, None, None])
        return (images * (preprocess.factor / 255) + preprocess.offset) * inside[:, None]

    def _propose(self, features: Mapping[str, Tensor], image_size: tuple[int, int], sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (N, P, 4) and which of them are proposals (N, P), best first."""
        rpn = self.detector.rpn
        boxes, scores = [], []
        for objectness, deltas, anchors in zip(*rpn(features, image_size), strict=True):
            best, index = _top(objectness.float(), rpn.test_limits.candidates, fill=float("-inf"))
            chosen = _clip(decode(_take(deltas, index), _take(anchors.expand_as(deltas), index)), sizes)
            score = torch.where(_is_large(chosen, LEAST_PROPOSAL), best.sigmoid(), NOTHING)
            kept = self.suppress(chosen, score, rpn.nms_iou)
            boxes.append(chosen)
            scores.append(torch.where(kept, score, NOTHING))
        score, index = _top(torch.cat(scores, dim=1), rpn.test_limits.proposals, fill=NOTHING)
        return _take(torch.cat(boxes, dim=1), index), score > NOTHING

    def _detect(self, features: Mapping[str, Tensor], proposals: tuple[Tensor, Tensor], sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        head, (regions, is_proposal) = self.detector.roi_head, proposals
        hidden = self._describe(features, regions, sizes)
        scores = head.cls_score(hidden).float().softmax(dim=1).unflatten(0, regions.shape[:2])[:, :, 1:]
        deltas = head.bbox_pred(hidden).unflatten(1, (-1, 4)).unflatten(0, regions.shape[:2])[:, :, 1:]
        boxes = _clip(decode(deltas, regions[:, :, None], REGION_WEIGHTS).flatten(1, 2), sizes).unflatten(1, scores.shape[1:])
        is_candidate = (scores > head.score_threshold) & _is_large(boxes, LEAST_DETECTION) & is_proposal[:, :, None]
        scores, boxes = torch.where(is_candidate, scores, NOTHING).transpose(1, 2), boxes.transpose(1, 2)  # (N, K, P), (N, K, P, 4)
        kept = self.suppress(boxes.flatten(0, 1), scores.flatten(0, 1), head.nms_iou).view(scores.shape)
        score, index = _top(torch.where(kept, scores, NOTHING).flatten(1), head.detections, fill=NOTHING)
        found = score > NOTHING
        label = torch.where(found, index // scores.shape[2] + 1, 0)
        return _take(boxes.flatten(1, 2), index) * found[:, :, None], score.clamp(min=0), label

    def _describe(self, features: Mapping[str, Tensor], regions: Tensor, sizes: Tensor) -> Tensor:
        """What the region head's last layers read of regions (N, P, 4): (N · P, C)."""
        hidden = self._of_regions(features, regions)
        if not isinstance(self.detector.roi_head, ContextRoIHead):
            return hidden
        whole = torch.cat((torch.zeros_like(sizes), sizes.flip(1)), dim=1).to(regions.dtype)
        context = self._of_regions(features, whole[:, None])
        return torch.cat((hidden, context[:, None].expand(-1, regions.shape[1], -1).flatten(0, 1)), dim=1)

    def _of_regions(self, features: Mapping[str, Tensor], regions: Tensor) -> Tensor:
        """(N · P, D): regions (N, P, 4), pooled and run through the region head, each by itself."""
        head = self.detector.roi_head
        pooler = cast(RegionPooler, head.pooler)
        return RoIHead.describe(head, lambda boxes: pooler.pool(features, boxes[0], _image_of(regions)), [regions.flatten(0, 1)], [])

    def _masks(self, features: Mapping[str, Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """(N, D, M, M): of each box (N, D, 4) the mask of its class, labels (N, D); zeros where there is no detection."""
        branch = self.detector.mask_head
        assert branch is not None
        pooler = cast(RegionPooler | RegionTop, branch.pooler)
        logits = branch.predict(pooler.pool(features, boxes.flatten(0, 1), _image_of(boxes)))
        chosen = labels.flatten()[:, None, None, None].expand(-1, 1, *logits.shape[2:])
        masks = logits.float().gather(1, chosen).sigmoid().view(*labels.shape, *logits.shape[2:])
        return masks * (labels > 0)[:, :, None, None]


def _image_of(boxes: Tensor) -> Tensor:
    """(N · P,) int64: whose each of the boxes (N, P, 4) is."""
    return torch.arange(boxes.shape[0], device=boxes.device)[:, None].expand(-1, boxes.shape[1]).flatten()


def _top(scores: Tensor, count: int, *, fill: float) -> tuple[Tensor, Tensor]:
    """The best `count` of each row of (N, M) and their indices; to a row that has fewer, `count` places are added first."""
    return nn.functional.pad(scores, (0, count), value=fill).topk(count, dim=1)


def _take(boxes: Tensor, index: Tensor) -> Tensor:
    """The boxes (N, count, 4) that indices (N, count) from `_top` name; of the places it added, boxes of zeros. boxes: (N, M, 4)."""
    return nn.functional.pad(boxes, (0, 0, 0, index.shape[1])).gather(1, index[:, :, None].expand(-1, -1, 4))


def _clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """(N, M, 4) boxes cut at the borders of their images; sizes: (N, 2)."""
    limit = sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limit)


def _is_large(boxes: Tensor, least: float) -> Tensor:
    return ((boxes[..., 2:] - boxes[..., :2]) >= least).all(dim=-1)
