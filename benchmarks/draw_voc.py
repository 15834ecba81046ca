"""The VOC comparison as two figures without photographs: the training losses, and the detections as boxes beside the truth.

    python benchmarks/draw_voc.py --ours runs/voc --torchvision runs/voc_torchvision.log --devkit VOC --output docs/images

--ours is an output folder of tools/train_det.py; --torchvision what benchmarks/torchvision_voc.py printed. The boxes are of the first test
images that hold at least two objects, drawn in their own pixels; grey: the truth, colours: our detections above a score of 0.5.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from defusedxml import ElementTree
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

PANELS = 8
LEAST_SCORE = 0.5
SIDES = ("xmin", "ymin", "xmax", "ymax")


def draw_losses(ours: Path, theirs: Path, output: Path) -> None:
    """Total training loss; each point is the loss of one step, hence the running mean."""
    rows = [json.loads(line) for line in (ours / "metrics.jsonl").read_text().splitlines()]
    steps, losses = zip(*((row["step"], row["loss"]) for row in rows if "loss" in row), strict=True)
    pairs = [tuple(map(float, match)) for match in re.findall(r"step (\d+) loss ([\d.]+)", theirs.read_text())]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for label, x, y in (("ours", steps, losses), ("torchvision, bare loop", *zip(*pairs, strict=True))):
        window = np.ones(5) / 5
        smooth = np.convolve(np.pad(y, 2, mode="edge"), window, mode="valid")
        (line,) = axes.plot(x, smooth, label=label)
        axes.plot(x, y, color=line.get_color(), alpha=0.25, linewidth=0.8)
    axes.set(xlabel="step (4 images each)", ylabel="training loss", ylim=(0, 1.6), title="thin: single steps as logged; thick: mean of 5")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output / "voc_losses.png", dpi=90)


def draw_boxes(ours: Path, devkit: Path, split: str, output: Path) -> None:
    """Truth and detections of a few test images."""
    found = defaultdict(list)
    for detection in json.loads((ours / "eval" / "detections.json").read_text()):
        found[str(detection["image_id"])].append(detection)
    folder = devkit / "VOCdevkit" / split.split("/")[0]
    names = (folder / "ImageSets" / "Main" / f"{split.split('/')[1]}.txt").read_text().split()
    figure = Figure(figsize=(12, 6), layout="constrained")
    panels, shown = list(figure.subplots(2, PANELS // 2).flat), 0
    for name in names:
        tree = ElementTree.parse(folder / "Annotations" / f"{name}.xml")
        if len(tree.findall("object")) < 2 or shown == PANELS:
            continue
        _draw_image(panels[shown], name, tree, found[name])
        shown += 1
    figure.savefig(output / "voc_boxes.png", dpi=70)


def _draw_image(panel: Axes, name: str, tree: ElementTree.ElementTree, detections: list[dict]) -> None:
    width, height = (int(tree.findtext(f"size/{side}")) for side in ("width", "height"))
    for thing in tree.findall("object"):
        x1, y1, x2, y2 = (float(thing.findtext(f"bndbox/{side}")) for side in SIDES)
        panel.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, facecolor="0.85", edgecolor="0.4"))
        panel.text(x1 + 3, y2 - 4, thing.findtext("name"), color="0.3", fontsize=7)
    for number, detection in enumerate(d for d in detections if d["score"] >= LEAST_SCORE):
        x, y, w, h = _box(detection)
        panel.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=f"C{number % 10}", linewidth=1.8))
        panel.text(x + 3, y + 11, f"{detection['category']} {detection['score']:.2f}", color=f"C{number % 10}", fontsize=8)
    panel.set(xlim=(0, width), ylim=(height, 0), aspect="equal", xticks=[], yticks=[], title=name)


def _box(detection: dict) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = detection["bbox"]
    return x1, y1, x2 - x1, y2 - y1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--ours", "--torchvision", "--devkit", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--split", default="VOC2012/test")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    draw_losses(args.ours, args.torchvision, args.output)
    draw_boxes(args.ours, args.devkit, args.split, args.output)


if __name__ == "__main__":
    main()
