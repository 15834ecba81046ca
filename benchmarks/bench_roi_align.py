"""RoIAlign on the CPU: ours (embedding bags) beside torchvision.ops.roi_align, one thread, runs alternated in one process.

    python benchmarks/bench_roi_align.py [--case fpn c4 c4_wide fpn_test] [--precision fp32 bf16] [--rounds 5] [--threads 1]

Each ratio is torchvision's processor time over ours in the same round, forward and backward together (fpn_test: forward only);
printed are the median, the smallest and the largest, and how far outputs and gradients were from torchvision's float32. A round
includes what the layers behind need: a contiguous tensor for the fully connected head, the gradient in the layout they hand back.
In bf16 torchvision does what it does under autocast: float32 inside, cast before and after.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detection.pooling import RegionPooler
from resbackbone.backbone import FeatureInfo

SIZE, IMAGES = (256, 384), 2  # height and width of the images
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Case:
    """levels: what is pooled from; boxes: an image; side: of the output; flatten: a fully connected head reads it, not a convolution."""

    levels: dict[str, FeatureInfo]
    boxes: int
    side: int
    flatten: bool
    train: bool = True


PYRAMID = {f"p{level}": FeatureInfo(256, 2**level) for level in (2, 3, 4, 5)}
CASES = {
    "fpn": Case(levels=PYRAMID, boxes=512, side=7, flatten=True),
    "c4": Case(levels={"conv4_x": FeatureInfo(256, 16)}, boxes=128, side=14, flatten=False),
    "c4_wide": Case(levels={"conv4_x": FeatureInfo(1024, 16)}, boxes=128, side=14, flatten=False),
    "fpn_test": Case(levels=PYRAMID, boxes=1000, side=7, flatten=True, train=False),
}


@dataclass(frozen=True)
class Run:
    """What one round of one contestant gave."""

    seconds: float
    pooled: Tensor
    gradients: list[Tensor]


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    """(count, 4) boxes inside the image, small ones more often than large, as proposals are."""
    sides = torch.tensor([SIZE[1], SIZE[0]], dtype=torch.float32)
    extent = 8 + torch.rand((count, 2), generator=generator) ** 2 * (sides - 8)
    corner = torch.rand((count, 2), generator=generator) * (sides - extent)
    return torch.cat((corner, corner + extent), dim=1)


def measure(pool: Callable[[dict[str, Tensor]], Tensor], features: dict[str, Tensor], grad: Tensor, case: Case) -> Run:
    leaves = {name: value.detach().requires_grad_(case.train) for name, value in features.items()}
    start = time.process_time()
    pooled = pool(leaves)
    if case.flatten:
        pooled = pooled.flatten(1)
    if case.train:
        pooled.backward(grad.flatten(1) if case.flatten else grad)
    seconds = time.process_time() - start
    gradients = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    return Run(seconds, pooled.detach().reshape(grad.shape).float(), gradients)


def relative(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-12))


def compare(case: Case, dtype: torch.dtype, rounds: int) -> tuple[list[float], list[Run], Run]:
    """The ratios, the last round's two runs (torchvision's, ours), and torchvision's in float32, which is the truth."""
    generator = torch.Generator().manual_seed(0)
    channels = next(iter(case.levels.values())).channels
    shapes = {name: (IMAGES, channels, SIZE[0] // info.stride, SIZE[1] // info.stride) for name, info in case.levels.items()}
    exact = {name: torch.randn(shape, generator=generator).to(dtype).float() for name, shape in shapes.items()}
    features = {name: value.to(dtype=dtype, memory_format=torch.channels_last) for name, value in exact.items()}
    boxes = [random_boxes(case.boxes, generator) for _ in range(IMAGES)]
    grad = torch.randn((IMAGES * case.boxes, channels, case.side, case.side), generator=generator).to(dtype)
    if not case.flatten:
        grad = grad.contiguous(memory_format=torch.channels_last)  # as a convolution hands it back
    peer = MultiScaleRoIAlign(list(case.levels), case.side, sampling_ratio=2)
    pooler = RegionPooler(case.levels, output_size=case.side, channels_last=not case.flatten)

    def theirs(maps: dict[str, Tensor]) -> Tensor:
        pooled = peer({name: value.float() for name, value in maps.items()}, boxes, [SIZE] * IMAGES)
        return pooled.to(dtype=dtype, memory_format=torch.preserve_format if case.flatten else torch.channels_last)

    def ours(maps: dict[str, Tensor]) -> Tensor:
        return pooler(maps, boxes, [SIZE] * IMAGES)

    measure(ours, features, grad, case)  # the first call pays for code generation
    runs, ratios = [], []
    for _ in range(rounds):
        runs = [measure(theirs, features, grad, case), measure(ours, features, grad, case)]
        ratios.append(runs[0].seconds / runs[1].seconds)
    truth = measure(lambda maps: peer(maps, boxes, [SIZE] * IMAGES), exact, grad.float(), case)
    return ratios, runs, truth


def report(name: str, precision: str, rounds: int) -> None:
    ratios, (theirs, ours), truth = compare(CASES[name], PRECISIONS[precision], rounds)
    line = f"{name:9} {precision}  x{statistics.median(ratios):5.1f}  ({min(ratios):.1f}-{max(ratios):.1f})"
    line += f"  ours {1000 * ours.seconds:.0f} ms, torchvision {1000 * theirs.seconds:.0f} ms"
    for who, run in (("ours", ours), ("torchvision", theirs)):
        line += f" | {who}: output {float((run.pooled - truth.pooled).abs().max()):.1e} abs."
        if run.gradients:
            line += f", gradient {max(map(relative, run.gradients, truth.gradients)):.1e} rel."
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.rounds} rounds; >1: ours is faster; distances from fp32")
    for name in options.case:
        for precision in options.precision:
            report(name, precision, options.rounds)


if __name__ == "__main__":
    main()
