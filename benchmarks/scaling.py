"""How time and memory grow: against image area, boxes an image, proposals, classes and the size of the data set; one plot each.

    python benchmarks/scaling.py [--output docs/images/scaling.png] [--only area boxes proposals classes data] [--rounds 2]

A training step is a ResNet-18 FPN in bf16, one image; proposals and classes are of detecting in one image, without a score threshold, so
that every class of every proposal reaches NMS (at 0.05, at most 19 classes of a proposal can); data-set size is the loading of simulated
COCO annotations. Every point runs in a process of its own on one thread: processor time (the best of `--rounds`, since other work on the
machine only adds), and the peak memory above what the process had before. A share that doesn't grow (the backbone, where boxes grow)
flattens a plot, so two exponents are printed that it doesn't hide behind: k of the fit a + b·x^k with a, b ≥ 0, and that of the last
interval alone. 1 is linear growth, less is better.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

HERE = Path(__file__).resolve().parent
STEPS = {
    "area": ("image area, pixels (training step)", (128, 192, 288, 432, 648, 972)),
    "boxes": ("boxes an image (training step, 256×384)", (1, 10, 50, 200, 800)),
    "proposals": ("proposals (detecting, C4, 192×256)", (25, 50, 100, 200, 400)),
    "classes": ("classes (detecting, FPN, 256×384)", (1, 20, 80, 320, 1200)),
    "data": ("images in the data set (annotations)", (1000, 5000, 20000, 60000, 118000)),
}
EXPONENTS = np.arange(0.2, 3.01, 0.02)  # below, a power and a constant are one and the same
FLAT = 0.1  # a growing part below this share of the last point is noise
Job = Callable[[], object]


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def training(side: int, boxes: int) -> Job:
    import torch
    from bench_train_step import Setting, boxes_of, build_ours

    setting = Setting(backbone="resnet18", size=(side, side * 3 // 2), classes=20, precision="bf16", channels_last=True)
    image = torch.randint(0, 256, (3, *setting.size), dtype=torch.uint8)
    return build_ours(setting, [image], [boxes_of(boxes, setting.size)], [torch.randint(1, 21, (boxes,))])


def detecting(head: str, size: tuple[int, int], proposals: int, classes: int) -> Job:
    import torch

    from detection.build import build_detector
    from detection.config import load_detection_config

    overrides = [
        f"model.head={head}",
        "model.backbone.name=resnet18",
        f"model.roi.proposals_test={proposals}",
        "model.test.score_threshold=0",
    ]
    detector = build_detector(load_detection_config(None, overrides), classes, initial_weights=False).eval()
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)

    def job() -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return detector.detect([image])

    return job


def loading(images: int, folder: str) -> Job:
    from detection.data import load_source

    # Written by a process of its own: what that takes is not to be counted.
    code = f"from bench_annotations import *; write_file(Path({folder!r}), {images})"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)
    return lambda: load_source("coco", folder, "train")


def job_of(what: str, value: int, folder: str) -> Job:
    if what == "area":
        return training(value, 7)
    if what == "boxes":
        return training(256, value)
    if what == "proposals":
        return detecting("c4", (192, 256), value, 20)
    if what == "classes":
        return detecting("fpn", (256, 384), 300, value)
    return loading(value, folder)


def measure(what: str, value: int, rounds: int) -> None:
    """In the child: seconds and megabytes on standard output."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        job = job_of(what, value, folder)
        before, times = peak_mb(), []
        for _ in range(rounds + (what != "data")):  # a first step allocates
            start = time.process_time()
            job()
            times.append(time.process_time() - start)
    print(json.dumps({"seconds": min(times), "megabytes": peak_mb() - before}))


def points(what: str, steps: tuple[int, ...], rounds: int) -> list[tuple[float, float, float]]:
    """(x, seconds, MB) of every step."""
    found = []
    for value in steps:
        command = [sys.executable, __file__, "--measure", what, str(value), "--rounds", str(rounds)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE)
        result = json.loads(run.stdout)
        x = value * (value * 3 // 2) if what == "area" else value
        found.append((float(x), result["seconds"], result["megabytes"]))
        print(f"{STEPS[what][0]}: {x} → {result['seconds']:.3f} s, {result['megabytes']:.0f} MB", flush=True)
    return found


@dataclass(frozen=True, kw_only=True)
class Growth:
    """constant + factor · x^exponent, and the exponent of the last interval alone; share: the growing part of the last point."""

    constant: float
    factor: float
    exponent: float
    share: float
    last: float

    def __str__(self) -> str:
        if self.share < FLAT:
            return f"no growth (last interval: exponent {self.last:.2f})"
        return f"growing part {self.share:.0%} of the last point, exponent {self.exponent:.2f} (last interval: {self.last:.2f})"


def growth(xs: list[float], ys: list[float]) -> Growth:
    """The fit with the least relative error: for each exponent of a grid, the best constant and factor that aren't negative."""
    x, y = np.array(xs), np.array(ys)
    fits = []
    for exponent in EXPONENTS:
        columns = np.stack((np.ones_like(x), (x / x[-1]) ** exponent), axis=1) / y[:, None]
        shares, error = nnls(columns, np.ones_like(y))
        fits.append((error, exponent, *shares))
    _, exponent, constant, grown = min(fits)
    last = math.log(ys[-1] / ys[-2]) / math.log(xs[-1] / xs[-2])
    return Growth(constant=constant, factor=grown / xs[-1] ** exponent, exponent=exponent, share=grown / (constant + grown), last=last)


def draw(results: dict[str, list[tuple[float, float, float]]], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(2, len(results), figsize=(3.6 * len(results), 6), squeeze=False)
    for column, (what, found) in enumerate(results.items()):
        xs = [x for x, _, _ in found]
        for row, (unit, index) in enumerate((("processor seconds", 1), ("megabytes added", 2))):
            ys = [max(one[index], 1e-3) for one in found]
            axis = axes[row][column]
            axis.loglog(xs, ys, "o-", label="measured")
            fit = growth(xs, ys)
            if fit.share >= FLAT:
                axis.loglog(xs, [fit.constant + fit.factor * x**fit.exponent for x in xs], "-", alpha=0.5, label="a + b·x^k")
            axis.loglog(xs, [ys[-1] * x / xs[-1] for x in xs], ":", color="grey", label="linear")
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
            axis.set_title(f"k = {fit.exponent:.2f}, last interval {fit.last:.2f}" if fit.share >= FLAT else "no growth", fontsize=9)
            axis.set_xlabel(STEPS[what][0], fontsize=8)
            axis.set_ylabel(unit, fontsize=8)
            axis.legend(fontsize=7)
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs" / "images" / "scaling.png")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--steps", nargs="+", type=int, help="with one plot in --only: its values along x")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "VALUE"), help="measure one point, in this process")
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure[0], int(options.measure[1]), options.rounds)
    results = {what: points(what, tuple(options.steps or STEPS[what][1]), options.rounds) for what in options.only}
    for what, found in results.items():
        xs, seconds, megabytes = (list(column) for column in zip(*found, strict=True))
        print(f"{STEPS[what][0]}: time: {growth(xs, seconds)}; memory: {growth(xs, [max(one, 1e-3) for one in megabytes])}")
    draw(results, options.output)
    print(options.output)


if __name__ == "__main__":
    main()
