"""The paper's steps once more, slowly: one region, one class, one box at a time, in the words of appendix B and of the papers it names."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.build import build_detector
from detection.config import load_detection_config
from detection.faster_rcnn import Encoded, FasterRCNN
from detection.steps import SteppedRCNN

CLASSES = 3
SIZES = ((64, 80), (60, 45), (64, 80))
SCALES = (24, 40, 56, 72)
REGION_PX = 224
TINY = [
    "model.backbone.weights=null",
    "model.backbone.norm=group",
    "model.backbone.freeze_at=0",
    "model.roi.proposals_test=8",
    "model.roi.proposals_train=20",
    "model.roi.samples=8",
    "model.roi.head_width=32",
    "model.test.score_threshold=0.05",
]
Row = tuple[list[float], float, int]  # box, score, label


def tiny_detector(head: str, *settings: str, seed: int = 0, backbone: str = "resnet20_cifar") -> FasterRCNN:
    """An untrained detector with scores and boxes worth looking at; the same weights for the same seed, whatever is switched on."""
    torch.manual_seed(seed)
    config = load_detection_config(None, [f"model.head={head}", f"model.backbone.name={backbone}", *TINY, *settings])
    detector = build_detector(config, CLASSES)
    if isinstance(detector, SteppedRCNN):
        detector.steps = replace(detector.steps, base=None)  # images come as small as they are looked at
    generator = torch.Generator().manual_seed(seed)
    for layer, std in ((detector.rpn.cls_logits, 0.2), (detector.rpn.bbox_pred, 0.05)):
        layer.weight.data.normal_(0, std, generator=generator)
    detector.eval()
    _spread(detector, generator)
    return detector


@torch.no_grad()
def _spread(detector: FasterRCNN, generator: torch.Generator) -> None:
    """Class and box layers that tell regions apart: untrained features differ little from one region to the next."""
    parts = []
    for image in tiny_images():
        encoded = detector.encode([image])
        proposals = detector.rpn.propose(encoded.predictions, encoded.sizes, detector.rpn.test_limits)
        parts.append(detector.roi_head.describe(detector.roi_head.pool_from(encoded.features, encoded.sizes), proposals, encoded.sizes))
    hidden = torch.cat(parts)
    mean, std = hidden.mean(dim=0), hidden.std(dim=0)
    std = std.clamp(min=0.3 * float(std.mean()))
    for layer in (detector.roi_head.cls_score, detector.roi_head.bbox_pred):
        layer.weight.normal_(0, 2 / len(mean) ** 0.5, generator=generator).div_(std)
        layer.bias.copy_(-layer.weight @ mean)


def tiny_images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [F.interpolate(torch.rand((1, 3, 7, 9), generator=generator), size=size)[0] for size in SIZES]


@dataclass
class Settings:
    refine: bool = False
    context: bool = False
    scales: tuple[int, ...] | None = None
    merge: str = "maxout"
    flip: bool = False

    def overrides(self) -> list[str]:
        scales = "null" if self.scales is None else str(list(self.scales)).replace(" ", "")
        given: dict[str, Any] = {
            "refine": self.refine,
            "context": self.context,
            "scales": scales,
            "scale_merge": self.merge,
            "flip": self.flip,
        }
        return [f"model.test.{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in given.items()]


def detect(detectors: list[FasterRCNN], image: Tensor, settings: Settings) -> list[Row]:
    """What the detectors together find in `image`, best first."""
    head, (height, width) = detectors[0].roi_head, image.shape[-2:]
    views = [image] if settings.scales is None or settings.merge == "maxout" else [_at_scale(image, scale) for scale in settings.scales]
    rows: list[Row] = []
    for mirrored in (False, True) if settings.flip else (False,):
        for view in views:
            view = torch.flip(view, dims=(2,)) if mirrored else view
            for box, score, label in _rows_of_view(detectors, view, settings):
                x1, y1, x2, y2 = box
                if mirrored:
                    x1, x2 = view.shape[2] - x2, view.shape[2] - x1
                factor_x, factor_y = width / view.shape[2], height / view.shape[1]
                rows.append(([x1 * factor_x, y1 * factor_y, x2 * factor_x, y2 * factor_y], score, label))
    kept = literal_nms(rows, 0.3 if settings.refine else head.nms_iou)[: head.detections]
    return literal_vote(kept, rows) if settings.refine else kept


def _rows_of_view(detectors: list[FasterRCNN], view: Tensor, settings: Settings) -> list[Row]:
    size = (view.shape[1], view.shape[2])
    regions: list[Tensor] = []
    for detector in detectors:
        encoded = _encoded(detector, view)
        regions += list(detector.rpn.propose(encoded.predictions, encoded.sizes, detector.rpn.test_limits)[0])
    rows: list[Row] = []
    again: list[Tensor] = []
    for region in regions:
        scores, deltas = _judge(detectors, view, region, settings)
        rows += _thresholded(detectors[0], scores, deltas, region, size)
        likeliest = max(range(1, CLASSES + 1), key=lambda label: scores[label])
        again.append(torch.tensor(literal_decode(deltas[likeliest], region.tolist(), size)))
    for region in again if settings.refine else []:
        rows += _thresholded(detectors[0], *_judge(detectors, view, region, settings), region, size)
    return rows


def _judge(detectors: list[FasterRCNN], view: Tensor, region: Tensor, settings: Settings) -> tuple[list[float], list[list[float]]]:
    """Probabilities of K + 1 classes and four deltas for each, averaged over the detectors."""
    all_scores, all_deltas = [], []
    for detector in detectors:
        head = detector.roi_head
        hidden = _region_feature(detector, view, region, settings)
        if settings.context:
            whole = torch.tensor([0.0, 0.0, view.shape[2], view.shape[1]])
            hidden = torch.cat([hidden, _region_feature(detector, view, whole, settings)])
        all_scores.append(torch.softmax(head.cls_score(hidden), dim=0))
        all_deltas.append(head.bbox_pred(hidden).reshape(-1, 4))
    return (sum(all_scores) / len(detectors)).tolist(), (sum(all_deltas) / len(detectors)).tolist()


def _region_feature(detector: FasterRCNN, view: Tensor, region: Tensor, settings: Settings) -> Tensor:
    if settings.scales is None or settings.merge == "nms":
        pooled = _pooled(detector, view, region)
    else:
        scaled = [_at_scale(view, scale) for scale in settings.scales]
        first = literal_scales(region.tolist(), view, scaled)
        pooled = torch.maximum(*(_pooled(detector, one, _moved(region, view, one)) for one in scaled[first : first + 2]))
    hidden = detector.roi_head.box_head(pooled)[0]
    return hidden.flatten(1).mean(dim=1) if hidden.dim() == 3 else hidden


def _pooled(detector: FasterRCNN, view: Tensor, region: Tensor) -> Tensor:
    encoded = _encoded(detector, view)
    return detector.roi_head.pooler(encoded.features, [region[None]], encoded.sizes)


@cache
def _encoded(detector: FasterRCNN, view: Tensor) -> Encoded:
    """A tensor is its own key: the same view is encoded once."""
    return detector.encode([view])


def _moved(region: Tensor, view: Tensor, to: Tensor) -> Tensor:
    return torch.stack([side * to.shape[2 - number % 2] / view.shape[2 - number % 2] for number, side in enumerate(region)])


@cache
def _at_scale(image: Tensor, scale: int) -> Tensor:
    height, width = image.shape[-2:]
    factor = min(scale / min(height, width), 2000 / max(height, width))
    size = (math.floor(height * factor), math.floor(width * factor))
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def literal_scales(region: list[float], view: Tensor, scaled: list[Tensor]) -> int:
    """The lower of the two neighbours: the scale where the region is nearest to 224 x 224 pixels, with whichever neighbour is nearer."""
    area = (region[2] - region[0]) * (region[3] - region[1]) / (view.shape[1] * view.shape[2])
    misses = [abs(area * one.shape[1] * one.shape[2] - REGION_PX**2) for one in scaled]
    best = misses.index(min(misses))
    if best == 0:
        return 0
    if best == len(scaled) - 1:
        return best - 1
    return best - 1 if misses[best - 1] <= misses[best + 1] else best


def _thresholded(detector: FasterRCNN, scores: list[float], deltas: list[list[float]], region: Tensor, size: tuple[int, int]) -> list[Row]:
    rows = []
    for label in range(1, CLASSES + 1):
        box = literal_decode(deltas[label], region.tolist(), size)
        if scores[label] > detector.roi_head.score_threshold and box[2] - box[0] >= 0.01 and box[3] - box[1] >= 0.01:
            rows.append((box, scores[label], label))
    return rows


def literal_decode(deltas: list[float], region: list[float], size: tuple[int, int]) -> list[float]:
    width, height = region[2] - region[0], region[3] - region[1]
    centre_x = region[0] + width / 2 + deltas[0] / 10 * width
    centre_y = region[1] + height / 2 + deltas[1] / 10 * height
    width *= math.exp(min(deltas[2] / 5, math.log(1000 / 16)))
    height *= math.exp(min(deltas[3] / 5, math.log(1000 / 16)))
    box = [centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2]
    return [min(max(side, 0), size[1 - number % 2]) for number, side in enumerate(box)]


def literal_iou(one: list[float], other: list[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def literal_nms(rows: list[Row], iou: float) -> list[Row]:
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: -row[1]):
        if all(row[2] != other[2] or literal_iou(row[0], other[0]) <= iou for other in kept):
            kept.append(row)
    return kept


def literal_vote(kept: list[Row], rows: list[Row]) -> list[Row]:
    """Gidaris & Komodakis 2015: B' = sum of w B over sum of w, over the boxes of the class with an IoU above one half; w their scores."""
    voted = []
    for box, score, label in kept:
        voters = [row for row in rows if row[2] == label and literal_iou(row[0], box) > 0.5]
        total = sum(row[1] for row in voters)
        voted.append(([sum(row[1] * row[0][side] for row in voters) / total for side in range(4)], score, label))
    return voted
