"""Do the savings of the training step cost accuracy? The same short run with them and without, every other thing equal.

    python benchmarks/savings_voc.py --output OUT [--plain] --config configs/frcnn_r18_fpn_voc.yaml train.seed=0 [key=value ...]

Without --plain it is tools/train_det.py. With it, each saving is undone where it stands, so that what runs is the textbook's detector:
float32 with channels first, torchvision's RoIAlign, the RPN's gradient at every position, every anchor decoded before the top-k, the whole
matrix of overlaps, every class's boxes decoded before the threshold, the frozen batch norm as a layer of its own. Prints mAP and seconds.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from detection import matching, rpn
from detection.boxes import REGION_WEIGHTS, clip_to_image, decode, is_large
from detection.config import load_detection_config
from detection.pooling import RegionPooler
from detection.roi_head import MIN_SIDE_PX, RoIHead
from detection.structures import Detections
from detection.train import train
from resbackbone import blocks, layers, resnet, vgg

PLAIN = ("train.precision=fp32", "train.channels_last=false")


def match_whole(
    candidates: Tensor, boxes: Tensor, *, high: float, low: float, allow_low_quality: bool = False, chunk: int | None = None
) -> Tensor:
    """matching.match by torchvision's Matcher, over all overlaps at once."""
    if len(boxes) == 0 or len(candidates) == 0:
        return torch.full((len(candidates),), matching.BELOW, dtype=torch.int64, device=candidates.device)
    return Matcher(high, low, allow_low_quality_matches=allow_low_quality)(box_iou(boxes.float(), candidates.float()))


def propose_from_all(
    self: rpn.ProposalNetwork, predictions: rpn.Predictions, sizes: Sequence[tuple[int, int]], limits: rpn.Limits
) -> list[Tensor]:
    """ProposalNetwork.propose, every anchor decoded first."""
    boxes, logits, levels = [], [], []
    for number, (objectness, deltas, anchors) in enumerate(zip(*predictions, strict=True)):
        every = decode(deltas.detach(), anchors.expand(len(deltas), -1, 4))
        best, index = objectness.detach().float().topk(min(limits.candidates, objectness.shape[1]), dim=1)
        boxes.append(every.gather(1, index[:, :, None].expand(-1, -1, 4)))
        logits.append(best)
        levels.append(torch.full((best.shape[1],), number, device=best.device))
    scores, level = torch.cat(logits, dim=1).sigmoid(), torch.cat(levels)
    per_image = zip(torch.cat(boxes, dim=1), scores, sizes, strict=True)
    return [self._suppress(clip_to_image(box, size), score, level)[: limits.proposals] for box, score, size in per_image]


def candidates_of_all(self: RoIHead, scored: tuple[Tensor, Tensor], regions: Tensor, size: tuple[int, int]) -> Detections:
    """RoIHead.candidates, every class's box of every region decoded first."""
    scores, deltas = scored
    classes = scores.shape[1]
    every = decode(deltas.unflatten(1, (-1, 4)).flatten(0, 1), regions.repeat_interleave(classes, dim=0), REGION_WEIGHTS)
    every = clip_to_image(every, size).unflatten(0, (-1, classes))
    region, label = torch.nonzero(scores[:, 1:] > self.score_threshold).unbind(1)
    found = Detections(boxes=every[region, label + 1], scores=scores[region, label + 1], labels=label + 1)
    return found[torch.nonzero(is_large(found.boxes, MIN_SIDE_PX)).flatten()]


def convolve_then_norm(conv: nn.Conv2d, norm: nn.Module, features: Tensor) -> Tensor:
    """layers.conv_norm, nothing folded."""
    return norm(conv(features))


def undo_savings() -> None:
    """Replace each by its plain version, in this process."""
    matching.match = match_whole
    rpn.DENSE_UP_TO = float("inf")
    rpn.ProposalNetwork.propose = torch.no_grad()(propose_from_all)  # type: ignore[method-assign]
    RoIHead.candidates = torch.no_grad()(candidates_of_all)  # type: ignore[method-assign]
    RegionPooler._takes_bags = lambda self, features: False  # type: ignore[method-assign]
    for module in (layers, blocks, resnet, vgg):
        module.conv_norm = convolve_then_norm  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plain", action="store_true", help="undo every saving")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_intermixed_args()
    if args.plain:
        undo_savings()
    began, processor = time.perf_counter(), time.process_time()
    train(load_detection_config(args.config, [*args.overrides, *(PLAIN if args.plain else ())]), args.output, resume="auto")
    seconds = {"wall_s": time.perf_counter() - began, "processor_s": time.process_time() - processor}
    metrics = json.loads((args.output / "eval" / "metrics.json").read_text())
    print(json.dumps({"plain": args.plain, "mAP": metrics["mAP"], "mAP_11_point": metrics["mAP_11_point"], **seconds}))


if __name__ == "__main__":
    main()
