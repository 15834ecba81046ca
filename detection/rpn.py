"""The region proposal network (Ren et al. 2015, §3.1): objectness and deltas at every anchor, proposals, and their loss.

N images, L levels, A anchors an image over all levels, P proposals, S sampled anchors. torchvision's arithmetic and module
layout, with two savings that change no result: only the anchors that survive the top-k are decoded, and the loss, which looks at
256 anchors an image, runs the head again on the 3×3 patches of those instead of keeping the dense one for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from detection.anchors import AnchorGrid
from detection.boxes import clip_to_image, decode, encode, is_large
from detection.losses import rpn_losses, shared_count
from detection.matching import Sample, assign, balanced_sample
from detection.nms import kept_by_nms
from detection.structures import Target
from detection.waiting import constant, is_asking_free

MIN_SIDE_PX = 1e-3  # proposals thinner than this can't be pooled
DENSE_UP_TO = 1.5  # positions a sample: below it the dense head costs less than running it twice


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many proposals an image gives: `candidates` by score on each level before NMS, `proposals` over all levels after it."""

    candidates: int
    proposals: int


class Predictions(NamedTuple):
    """What the head says of every anchor. objectness: per level (N, A_l) logits; deltas: per level (N, A_l, 4)."""

    objectness: list[Tensor]
    deltas: list[Tensor]
    anchors: list[Tensor]  # per level (A_l, 4), the same for all images of the batch


class ProposalNetwork(nn.Module):
    """A 3×3 convolution and two 1×1 ones, shared by all levels."""

    def __init__(
        self,
        in_channels: int,
        anchors: AnchorGrid,
        *,
        train_limits: Limits = Limits(candidates=2000, proposals=2000),
        test_limits: Limits = Limits(candidates=1000, proposals=1000),
        nms_iou: float = 0.7,
        samples: int = 256,
        positive_fraction: float = 0.5,
        match_iou: tuple[float, float] = (0.7, 0.3),
    ) -> None:
        """Defaults: torchvision's for pyramids, where limits count per level; the rest is Ren et al. 2015, §3.1.2 and §3.3.

        match_iou: from the first an anchor is positive, below the second it is negative.
        """
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.cls_logits = nn.Conv2d(in_channels, anchors.per_position, 1)
        self.bbox_pred = nn.Conv2d(in_channels, 4 * anchors.per_position, 1)
        for layer in (self.conv, self.cls_logits, self.bbox_pred):
            nn.init.normal_(layer.weight, std=0.01)  # Ren et al. 2015, §3.1.3
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.anchors = anchors
        self.train_limits, self.test_limits, self.nms_iou = train_limits, test_limits, nms_iou
        self.samples, self.positive_fraction, self.match_iou = samples, positive_fraction, match_iou

    def forward(self, features: Mapping[str, Tensor], image_size: tuple[int, int]) -> Predictions:
        """Every anchor of a padded batch of `image_size`; with gradients only where `losses` reads them from here."""
        maps = list(features.values())
        grids = [(level.shape[-2], level.shape[-1]) for level in maps]
        if self._is_detached(maps):
            with torch.no_grad(), _uncached_autocast(maps[0].device):
                objectness, deltas = self._dense(maps)
        else:
            objectness, deltas = self._dense(maps)
        return Predictions(objectness, deltas, self.anchors(image_size, grids))

    def _dense(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        hidden = [F.relu(self.conv(level)) for level in maps]
        objectness = [_channels_last(self.cls_logits(level)).flatten(1) for level in hidden]
        return objectness, [_channels_last(self.bbox_pred(level)).flatten(1).unflatten(1, (-1, 4)) for level in hidden]

    def _is_detached(self, maps: Sequence[Tensor]) -> bool:
        """Whether the dense maps carry no gradients, so that the loss runs the head again where it looks."""
        return torch.is_grad_enabled() and sum(level.shape[-2:].numel() for level in maps) > DENSE_UP_TO * self.samples

    @torch.no_grad()
    def propose(self, predictions: Predictions, sizes: Sequence[tuple[int, int]], limits: Limits) -> list[Tensor]:
        """Each image's best boxes (P, 4), best first: top-k of each level, decode, clip, drop slivers, NMS inside each level.

        On a CPU P is the number there is; elsewhere it is the most there can be, and boxes of zeros stand at the end.
        """
        boxes, logits, levels = [], [], []
        for number, (objectness, deltas, anchors) in enumerate(zip(*predictions, strict=True)):
            best, index = objectness.float().topk(min(limits.candidates, objectness.shape[1]), dim=1)
            chosen = deltas.gather(1, index[:, :, None].expand(-1, -1, 4))
            boxes.append(decode(chosen, anchors[index]))
            logits.append(best)
            levels.append(torch.full((best.shape[1],), number, device=best.device))
        if not is_asking_free(boxes[0]):
            return self._suppress_marked(boxes, logits, sizes, limits.proposals)
        scores, level = torch.cat(logits, dim=1).sigmoid(), torch.cat(levels)
        per_image = zip(torch.cat(boxes, dim=1), scores, sizes, strict=True)
        return [self._suppress(clip_to_image(box, size), score, level)[: limits.proposals] for box, score, size in per_image]

    def _suppress_marked(
        self, levels: Sequence[Tensor], logits: Sequence[Tensor], sizes: Sequence[tuple[int, int]], most: int
    ) -> list[Tensor]:
        """As `_suppress`, for the boxes of all images at once, one (N, A_l, 4) a level, best first."""
        most_of_level = max(boxes.shape[1] for boxes in levels)
        filled = [F.pad(boxes, (0, 0, 0, most_of_level - boxes.shape[1])) for boxes in levels]
        boxes = torch.stack([clip_to_image(box, size) for box, size in zip(torch.stack(filled, dim=1).flatten(1, 2), sizes, strict=True)])
        groups = boxes.view(-1, most_of_level, 4)
        kept = kept_by_nms(groups, is_large(groups, MIN_SIDE_PX), self.nms_iou).view(boxes.shape[:2])
        scores = torch.cat([F.pad(level, (0, most_of_level - level.shape[1])) for level in logits], dim=1).masked_fill(~kept, -math.inf)
        best, index = scores.topk(min(most, scores.shape[1]), dim=1)
        chosen = boxes.gather(1, index[:, :, None].expand(-1, -1, 4))
        return list(chosen.masked_fill((best == -math.inf)[:, :, None], 0))

    def _suppress(self, boxes: Tensor, scores: Tensor, level: Tensor) -> Tensor:
        large = torch.nonzero(is_large(boxes, MIN_SIDE_PX)).flatten()
        boxes = boxes[large]
        return boxes[batched_nms(boxes, scores[large], level[large], self.nms_iou)]

    def losses(
        self,
        features: Mapping[str, Tensor],
        predictions: Predictions,
        targets: Sequence[Target],
        *,
        generators: Sequence[torch.Generator | None],
        across_processes: bool = True,
    ) -> dict[str, Tensor]:
        """rpn_objectness and rpn_box over the sampled anchors of all images; `generators` draw them, one an image."""
        anchors = torch.cat(predictions.anchors)
        drawn = [self._sample(anchors, target, generator) for target, generator in zip(targets, generators, strict=True)]
        samples, boxes = zip(*drawn, strict=True)
        sampled, image = _reserved_first([one.index for one in samples], samples), _image_numbers(samples, like=anchors)
        is_object = _reserved_first([one.positive for one in samples], samples)
        is_used = is_object | _reserved_first([one.negative for one in samples], samples)
        logits, deltas = self._at(features, predictions, image, sampled)
        reserved = sum(one.reserved for one in samples)
        wanted = encode(torch.cat(boxes), anchors[sampled[:reserved]])
        count = shared_count(is_used, across_processes=across_processes)
        return rpn_losses(logits, is_object, deltas[:reserved], wanted, is_used=is_used, count=count)

    def _sample(self, anchors: Tensor, target: Target, generator: torch.Generator | None) -> tuple[Sample, Tensor]:
        """One image's anchors, and the box (reserved, 4) of each that is positive."""
        high, low = self.match_iou
        matches = assign(anchors, target.boxes, target.ignore_boxes, high=high, low=low, allow_low_quality=True)
        sample = balanced_sample(matches, count=self.samples, positive_fraction=self.positive_fraction, generator=generator)
        return sample, target.boxes_at(matches[sample.index[: sample.reserved]])

    def _at(self, features: Mapping[str, Tensor], predictions: Predictions, image: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (S,) and deltas (S, 4) of the anchors that (S,) image numbers and (S,) anchor indices name."""
        maps = list(features.values())
        if not self._is_detached(maps):
            return torch.cat(predictions.objectness, dim=1)[image, anchor], torch.cat(predictions.deltas, dim=1)[image, anchor]
        patches = patches_at(maps, image, anchor // self.anchors.per_position)
        hidden = F.relu(F.linear(patches, _channels_last(self.conv.weight).flatten(1), self.conv.bias))
        logits = F.linear(hidden, self.cls_logits.weight.flatten(1), self.cls_logits.bias)
        deltas = F.linear(hidden, self.bbox_pred.weight.flatten(1), self.bbox_pred.bias).unflatten(1, (-1, 4))
        sample, shape = torch.arange(len(anchor), device=anchor.device), anchor % self.anchors.per_position
        return logits[sample, shape], deltas[sample, shape]


def patches_at(maps: Sequence[Tensor], image: Tensor, position: Tensor) -> Tensor:
    """The 3×3 neighbourhoods (S, 9 · C) of positions, zero outside their map, as rows (row, column, channel).

    maps: per level (N, C, H, W); image: (S,); position: (S,) index of a position among all levels' of its image.
    """
    device, images = position.device, len(maps[0])
    rows = torch.cat([_channels_last(level).flatten(0, 2) for level in maps])
    height, width = constant([level.shape[-2:] for level in maps], like=position).unbind(1)
    end = torch.cumsum(height * width, dim=0)
    level = torch.bucketize(position, end, right=True)
    height, width, start = height[level], width[level], (end - height * width)[level]
    step = torch.arange(-1, 2, device=device)
    y = ((position - start) // width)[:, None, None] + step[:, None]
    x = ((position - start) % width)[:, None, None] + step
    inside = (y >= 0) & (x >= 0) & (y < height[:, None, None]) & (x < width[:, None, None])
    first = images * start + image * height * width
    index = (first[:, None, None] + y * width[:, None, None] + x).where(inside, 0)
    patches = rows.index_select(0, index.flatten()).view(len(position), 9, rows.shape[1])
    return patches.masked_fill(~inside.flatten(1)[:, :, None], 0).flatten(1)


def _reserved_first(parts: Sequence[Tensor], samples: Sequence[Sample]) -> Tensor:
    """`parts`, an (S_i,) for each image's sample, as one (S,): the places reserved for positives, of all images, then the rest."""
    ends = [one.reserved for one in samples]
    return torch.cat(
        [part[:end] for part, end in zip(parts, ends, strict=True)] + [part[end:] for part, end in zip(parts, ends, strict=True)]
    )


def _image_numbers(samples: Sequence[Sample], *, like: Tensor) -> Tensor:
    """The number of each sample's image, (S,) int64 in the order of `_reserved_first`."""
    numbers = [torch.full((len(one.index),), number, device=like.device) for number, one in enumerate(samples)]
    return _reserved_first(numbers, samples)


def _channels_last(tensor: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H, W, C): a view, and no copy follows where the memory is channels_last."""
    return tensor.permute(0, 2, 3, 1)


def _uncached_autocast(device: torch.device) -> torch.autocast:
    """The autocast in force, but remembering no cast weights: those cast without gradients would be used where gradients are wanted."""
    kind = device.type
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False)
