"""Anchor matching: ours (in chunks that stay in the cache) beside torchvision's Matcher on the whole IoU matrix, one thread.

    python benchmarks/bench_matching.py [--boxes 8 50 200] [--grid fpn c4] [--rounds 7] [--threads 1]

The anchors of an 800×1333 image: 267,069 on a pyramid, 63,000 on one map of stride 16. Both are given the same anchors and boxes,
take turns in one process, and must return the same index for every anchor. Processor time; the ratio is torchvision's over ours.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from detection.anchors import anchor_grid
from detection.matching import match
from resbackbone.backbone import FeatureInfo

SIZE, HIGH, LOW = (800, 1333), 0.7, 0.3  # Ren et al. 2015, §3.1.2
GRIDS = {"fpn": (4, 8, 16, 32, 64), "c4": (16,)}  # strides of the maps


def anchors_of(grid: str) -> Tensor:
    """(A, 4), as the proposal network lays them."""
    levels = {f"p{stride}": FeatureInfo(256, stride) for stride in GRIDS[grid]}
    maps = [(-(-SIZE[0] // stride), -(-SIZE[1] // stride)) for stride in GRIDS[grid]]
    return torch.cat(anchor_grid(levels)(SIZE, maps))


def boxes_of(count: int) -> Tensor:
    """(count, 4), small ones more often than large."""
    sides = torch.tensor([SIZE[1], SIZE[0]], dtype=torch.float32)
    extent = 8 + torch.rand((count, 2)) ** 2 * (sides - 8)
    corner = torch.rand((count, 2)) * (sides - extent)
    return torch.cat((corner, corner + extent), dim=1)


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def report(grid: str, count: int, rounds: int) -> None:
    anchors, boxes = anchors_of(grid), boxes_of(count)
    matcher = Matcher(HIGH, LOW, allow_low_quality_matches=True)
    contestants: list[Callable[[], Tensor]] = [
        lambda: matcher(box_iou(boxes, anchors)),
        lambda: match(anchors, boxes, high=HIGH, low=LOW, allow_low_quality=True),
    ]
    results = [[timed(run) for run in contestants] for _ in range(rounds + 1)][1:]
    different = sum(int((theirs[1] != ours[1]).sum()) for theirs, ours in results)
    ratios = sorted(theirs[0] / ours[0] for theirs, ours in results)
    times = [statistics.median(1000 * result[side][0] for result in results) for side in (0, 1)]
    print(
        f"{grid:4} {len(anchors):7} × {count:4}: ratio {statistics.median(ratios):5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), "
        f"torchvision {times[0]:.1f} ms, ours {times[1]:.1f} ms, {different} matches differ",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, nargs="+", default=[8, 50, 200])
    parser.add_argument("--grid", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for grid in options.grid:
        for count in options.boxes:
            report(grid, count, options.rounds)


if __name__ == "__main__":
    main()
