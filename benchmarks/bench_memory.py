"""Activation memory of a training step: ours in bf16 beside ours and torchvision's in fp32, each in a process of its own.

    python benchmarks/bench_memory.py [--size 800 1333] [--batch 2] [--backbone resnet50] [--only WAY ...]

Printed is the peak resident memory of one forward and backward pass over what the process had before it (gradients included: the first
backward makes them), and each as a part of those before it. The same images, boxes and settings; 91 classes, frozen
batch norm, conv1 and conv2_x frozen.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

WAYS = ("torchvision fp32", "torchvision bf16", "ours fp32", "ours bf16")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(way: str, options: argparse.Namespace) -> None:
    """In the child: one step, and its memory on standard output."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from bench_train_step import Setting, boxes_of, build_ours, build_theirs

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    who, precision = way.split()
    height, width = options.size
    setting = Setting(backbone=options.backbone, size=(height, width), classes=90, precision=precision, channels_last=precision == "bf16")
    images = [torch.randint(0, 256, (3, height, width), dtype=torch.uint8) for _ in range(options.batch)]
    boxes = [boxes_of(7, setting.size) for _ in images]
    labels = [torch.randint(1, 91, (7,)) for _ in images]
    step = (build_ours if who == "ours" else build_theirs)(setting, images, boxes, labels)
    before = peak_mb()
    step()
    print(json.dumps({"before": before, "peak": peak_mb()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--way", choices=WAYS, help="measure this one, in this process")
    options = parser.parse_args()
    if options.way:
        return measure(options.way, options)
    print(f"{options.backbone} FPN, {options.batch} images of {options.size[0]}×{options.size[1]}")
    added: dict[str, float] = {}
    for way in options.only:
        run = subprocess.run([sys.executable, *sys.argv, "--way", way], capture_output=True, text=True, check=True)
        memory = json.loads(run.stdout)
        added[way] = memory["peak"] - memory["before"]
        print(f"{way:16} {memory['before']:6.0f} MB before, {added[way]:6.0f} MB added", end="")
        print("".join(f", {added[way] / added[other]:.2f} of {other}" for other in added if other != way), flush=True)


if __name__ == "__main__":
    main()
