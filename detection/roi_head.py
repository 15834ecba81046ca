"""The second stage (Girshick 2015, Fast R-CNN): pooled regions → classes and box deltas → losses | detections.

N images, R regions, K foreground classes (label 0 is the background), P positive regions. torchvision's arithmetic, except that
only what is used is computed: deltas are encoded for positives, decoded for the class scores that pass the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from detection.batch_detections import best_of_batch
from detection.boxes import REGION_WEIGHTS, clip_to_image, decode, encode, is_large
from detection.losses import NO_LABEL, roi_losses, shared_count
from detection.matching import BETWEEN, assign, balanced_sample
from detection.structures import Detections, Target
from detection.waiting import is_asking_free

MIN_SIDE_PX = 1e-2  # detections thinner than this are nothing

Pool = Callable[[Sequence[Tensor]], Tensor]  # an (R, 4) an image → (sum R, C, P, P), from features it knows of
Scored = tuple[Tensor, Tensor]  # of the regions of one image: probabilities (R, K + 1) and deltas (R, 4 · (K + 1))


class Pooler(Protocol):
    """What turns boxes into features: see pooling.RegionPooler."""

    def __call__(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """[sum R, C, P, P]"""
        ...


@dataclass(kw_only=True)
class Regions:
    """The sampled regions of one image, those that hold an object first: among the first `reserved` (matching.Sample).

    boxes: (R, 4); labels: (R,) 0 … K, or NO_LABEL where the place is empty; matches: (R,) index of the object, below 0 where there is none.
    """

    boxes: Tensor
    labels: Tensor
    matches: Tensor
    reserved: int


class TwoFCHead(nn.Module):
    """Two fully connected layers, for pyramids and DC5 (Lin et al. 2017, FPN, §4.2)."""

    def __init__(self, in_channels: int, pool_size: int, *, width: int = 1024) -> None:
        super().__init__()
        self.fc6 = nn.Linear(in_channels * pool_size**2, width)
        self.fc7 = nn.Linear(width, width)
        self.out_channels = width

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled: (R, C, P, P). Returns (R, width)."""
        weight, rows = self.fc6.weight, pooled.permute(0, 2, 3, 1)
        if rows.is_contiguous() and len(rows) > len(weight):
            # Regions come with their channels last in memory; here turning the weight round moves less than turning each of them.
            weight = weight.unflatten(1, pooled.shape[1:]).permute(0, 2, 3, 1).flatten(1)
            hidden = F.relu(F.linear(rows.flatten(1), weight, self.fc6.bias))
        else:
            hidden = F.relu(self.fc6(pooled.flatten(1)))
        return F.relu(self.fc7(hidden))


class RoIHead(nn.Module):
    """Pools regions, runs `box_head` on each, and predicts a class and, per class, a box."""

    def __init__(
        self,
        pooler: nn.Module,
        box_head: nn.Module,
        *,
        num_classes: int,
        samples: int = 512,
        score_threshold: float = 0.05,
        nms_iou: float = 0.5,
        detections: int = 100,
        regions_per_pass: int | None = None,
    ) -> None:
        """box_head: (R, C, P, P) → (R, D) or a map (R, D, h, w), which is averaged; it has `out_channels` D.

        num_classes: K, without background. samples: regions an image trains on. regions_per_pass: how many run through the head
        at a time when detecting; None: all, which conv5_x on 300 regions of several images has no memory for.
        """
        super().__init__()
        channels: int = box_head.out_channels  # type: ignore[assignment]
        self.pooler, self.box_head = pooler, box_head
        self.cls_score = nn.Linear(channels, num_classes + 1)
        self.bbox_pred = nn.Linear(channels, 4 * (num_classes + 1))
        self.samples, self.positive_fraction, self.positive_iou = samples, 0.25, 0.5  # Girshick 2015, §2.3
        self.score_threshold, self.nms_iou, self.detections = score_threshold, nms_iou, detections
        self.regions_per_pass = regions_per_pass

    def forward(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Class logits (sum R, K + 1) and deltas (sum R, 4 · (K + 1)) of each image's boxes (R, 4)."""
        return self._predict(self.pool_from(features, sizes), boxes, sizes)

    def _predict(self, pool: Pool, boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        hidden = self.describe(pool, boxes, sizes)
        return self.cls_score(hidden), self.bbox_pred(hidden)

    def describe(self, pool: Pool, boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        """(sum R, D): what the class and box layers see of each region. context.py adds what the whole image says."""
        hidden = self.box_head(pool(boxes))
        return hidden.mean(dim=(2, 3)) if hidden.dim() == 4 else hidden  # He et al. 2015: global average pooling after conv5_x

    def pool_from(self, features: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]]) -> Pool:
        """The pooler, given these features."""
        return lambda boxes: self.pooler(features, boxes, sizes)

    @torch.no_grad()
    def sample(self, proposals: Sequence[Tensor], targets: Sequence[Target], generators: Sequence[torch.Generator | None]) -> list[Regions]:
        """The regions each image trains on, drawn from its proposals and its true boxes by its generator."""
        return [self._sample(*one) for one in zip(proposals, targets, generators, strict=True)]

    def _sample(self, proposals: Tensor, target: Target, generator: torch.Generator | None) -> Regions:
        candidates = torch.cat((proposals, target.boxes))  # the truth is a proposal too, so that there are positives from the start
        matches = assign(candidates, target.boxes, target.ignore_boxes, high=self.positive_iou, low=self.positive_iou)
        has_area = (candidates[:, 2:] > candidates[:, :2]).all(dim=1)  # a place that no proposal filled has none
        matches = torch.where(has_area, matches, BETWEEN)
        drawn = balanced_sample(matches, count=self.samples, positive_fraction=self.positive_fraction, generator=generator)
        chosen = matches[drawn.index]
        objects = target.labels[chosen.clamp(min=0)] if len(target.labels) else torch.zeros_like(chosen)
        labels = objects.where(drawn.positive, torch.where(drawn.negative, 0, NO_LABEL))
        return Regions(boxes=candidates[drawn.index], labels=labels, matches=chosen, reserved=drawn.reserved)

    def losses(
        self,
        features: Mapping[str, Tensor],
        regions: Sequence[Regions],
        sizes: Sequence[tuple[int, int]],
        *,
        targets: Sequence[Target],
        across_processes: bool = True,
    ) -> dict[str, Tensor]:
        """roi_class and roi_box over the sampled regions of all images."""
        logits, deltas = self(features, [region.boxes for region in regions], sizes)
        labels = torch.cat([region.labels for region in regions])
        wanted = torch.cat([_wanted_deltas(region, target) for region, target in zip(regions, targets, strict=True)])
        count = shared_count(labels != NO_LABEL, across_processes=across_processes)
        return roi_losses(logits, labels, deltas, wanted, reserved=_reserved_rows(regions, like=labels), count=count)

    @torch.no_grad()
    def detect(self, features: Mapping[str, Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Each image's detections, best first: threshold, decode, clip, drop slivers, NMS inside each class, the best `detections`."""
        scored = self.score(self.pool_from(features, sizes), proposals, sizes)
        if not is_asking_free(proposals[0]):
            threshold, iou, most = self.score_threshold, self.nms_iou, self.detections
            return best_of_batch(scored, proposals, sizes, score_threshold=threshold, min_side=MIN_SIDE_PX, nms_iou=iou, most=most)
        return [self.best(self.candidates(*one)) for one in zip(scored, proposals, sizes, strict=True)]

    @torch.no_grad()
    def score(self, pool: Pool, regions: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Scored]:
        """What the head says of each image's regions (R, 4), a limited number at a time."""
        passes = [self._predict(pool, part, sizes) for part in _passes(regions, self.regions_per_pass)]
        counts = [len(boxes) for boxes in regions]
        scores = torch.cat([logits for logits, _ in passes]).float().softmax(dim=1).split(counts)
        deltas = torch.cat([deltas for _, deltas in passes]).split(counts)
        return list(zip(scores, deltas, strict=True))

    def candidates(self, scored: Scored, regions: Tensor, size: tuple[int, int]) -> Detections:
        """Every box of one image that scores above the threshold for its class, before NMS, clipped to the image of `size`."""
        scores, deltas = scored
        region, label = torch.nonzero(scores[:, 1:] > self.score_threshold).unbind(1)
        label = label + 1
        chosen = deltas.unflatten(1, (-1, 4))[region, label]
        boxes = clip_to_image(decode(chosen, regions[region], REGION_WEIGHTS), size)
        found = Detections(boxes=boxes, scores=scores[region, label], labels=label)
        return found[torch.nonzero(is_large(boxes, MIN_SIDE_PX)).flatten()]

    def best(self, candidates: Detections) -> Detections:
        """The best `detections` of them, after NMS inside each class."""
        keep = batched_nms(candidates.boxes, candidates.scores, candidates.labels, self.nms_iou)
        return candidates[keep[: self.detections]]


def _wanted_deltas(regions: Regions, target: Target) -> Tensor:
    """(reserved, 4): what the box regressor should say of the positive regions."""
    return encode(target.boxes_at(regions.matches[: regions.reserved]), regions.boxes[: regions.reserved], REGION_WEIGHTS)


def _reserved_rows(regions: Sequence[Regions], *, like: Tensor) -> Tensor:
    """(P,): which of all images' regions (sum R) may hold an object, found without asking the device."""
    rows = torch.arange(len(like), device=like.device).split([len(region.labels) for region in regions])
    return torch.cat([part[: region.reserved] for part, region in zip(rows, regions, strict=True)])


def _passes(boxes: Sequence[Tensor], limit: int | None) -> Iterator[list[Tensor]]:
    """`boxes`, an (R, 4) an image, cut into lists of the same form with at most `limit` boxes over all images; at least one list."""
    counts = [len(part) for part in boxes]
    total = sum(counts)
    for first in range(0, max(total, 1), limit or max(total, 1)):
        last, start, part = first + (limit or total), 0, []
        for count, box in zip(counts, boxes, strict=True):
            part.append(box[max(first - start, 0) : max(last - start, 0)])
            start += count
        yield part
