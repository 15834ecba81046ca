"""C4 inference: a detector as `detect.py` runs it in bf16 beside plain fp32, one thread, by turns in one process.

    python benchmarks/bench_c4_inference.py [--backbone resnet50] [--size 480 720] [--proposals 300] [--rounds 3] [--threads 1]

Both are the same detector with the same weights on the same image: plain is float32 with channels first in memory and its frozen batch
norms as layers of their own, the other folds them, keeps channels last and computes in bf16. The class layer has random weights, and the
score threshold is 1, so that what is measured is the network: no more than `proposals` regions through conv5_x. Processor time; the ratio
is plain's over bf16's. Printed beside it: how far the class logits of the same regions are apart, as a part of their length.
"""

import argparse
import statistics
import sys
import time

import torch
from torch import Tensor, nn

from detection.build import build_detector
from detection.config import load_detection_config
from detection.faster_rcnn import FasterRCNN
from resbackbone.layers import FrozenBatchNorm2d, conv_norm


def build(backbone: str, proposals: int) -> FasterRCNN:
    overrides = [f"model.backbone.name={backbone}", f"model.roi.proposals_test={proposals}", "model.test.score_threshold=1"]
    detector = build_detector(load_detection_config(None, overrides), 20, initial_weights=False)
    for module in detector.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.fill_(0.5)  # random convolutions would otherwise grow from block to block
    nn.init.normal_(detector.rpn.cls_logits.weight, std=0.1)
    return detector.eval()


def unfolded(conv: nn.Conv2d, norm: nn.Module, features: Tensor) -> Tensor:
    """What the plain version does."""
    return norm(conv(features))


class Contestant:
    """One way to run the detector. folded: batch norms are part of the convolutions."""

    def __init__(self, detector: FasterRCNN, *, fast: bool) -> None:
        self.detector, self.fast = detector, fast
        self.folding = [module for name, module in sys.modules.items() if name.startswith("resbackbone.") and hasattr(module, "conv_norm")]

    def run(self, image: Tensor) -> float:
        """Seconds of processor time to detect in one image."""
        self.detector.to(memory_format=torch.channels_last if self.fast else torch.contiguous_format)
        for module in self.folding:
            module.conv_norm = conv_norm if self.fast else unfolded
        start = time.process_time()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self.fast):
            self.detector.detect([image])
        seconds = time.process_time() - start
        for module in self.folding:
            module.conv_norm = conv_norm
        return seconds


@torch.inference_mode()
def logit_difference(detector: FasterRCNN, image: Tensor) -> float:
    """How far the class logits of fp32's proposals in bf16 are from those in fp32, relative."""
    encoded = detector.encode([image])
    proposals = detector.rpn.propose(encoded.predictions, encoded.sizes, detector.rpn.test_limits)
    plain, _ = detector.roi_head(encoded.features, proposals, encoded.sizes)
    with torch.autocast("cpu", torch.bfloat16):
        fast, _ = detector.roi_head(detector.encode([image]).features, proposals, encoded.sizes)
    return float((fast.float() - plain).norm() / plain.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 720), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--proposals", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    detector = build(options.backbone, options.proposals)
    image = torch.randint(0, 256, (3, *options.size), dtype=torch.uint8)
    plain, fast = Contestant(detector, fast=False), Contestant(detector, fast=True)
    fast.run(image)  # the first call pays for code generation
    times = [(plain.run(image), fast.run(image)) for _ in range(options.rounds)]
    ratios = sorted(slow / quick for slow, quick in times)
    slow, quick = (statistics.median(column) for column in zip(*times, strict=True))
    height, width = options.size
    print(f"{options.backbone} C4, {height}×{width}, {options.proposals} proposals, {options.threads} thread(s), {options.rounds} rounds")
    print(f"plain fp32 {slow:.2f} s, folded bf16 channels last {quick:.2f} s an image")
    print(f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    print(f"class logits of the same regions differ by {logit_difference(detector, image):.1e}, relative")


if __name__ == "__main__":
    main()
