"""The input of detection training, per core: ours beside torchvision's references path, one thread, by turns in one process.

    python benchmarks/bench_det_input.py [--images DIR] [--min-size 320 600 800] [--count 24] [--rounds 5]

The peer does what torchvision/references/detection does by default: PIL decode, PILToTensor, random flip, float, then its model's own
transform, which resizes, normalises and pads. Ours ends in the same: a padded, normalised float batch of two images ("like for like").
"uint8" leaves the normalisation out on our side, since the device does it. Each ratio is the peer's processor time over ours in the same
round; printed are the median, the smallest and the largest. DIR holds JPEGs; without it pictures of 500 × 375 are drawn, which are
lighter to decode than photographs. Equal: sizes, flips in distribution, and pixels, whose mean difference is printed (resizing differs:
uint8 here, float there; to shrink, ours is antialiased).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from detection.data.annotations import assemble
from detection.data.dataset import DetectionDataset
from detection.data.images import image_size
from detection.data.source import FolderSource
from detection.preprocess import Preprocess
from resbackbone.backbone import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

BATCH = 2


def draw_pictures(folder: Path, count: int) -> None:
    draw = np.random.default_rng(0)
    for number in range(count):
        coarse, fine = (draw.integers(0, 256, (375 // cell, 500 // cell, 3), dtype=np.uint8) for cell in (25, 3))
        layers = [cv2.resize(layer, (500, 375), interpolation=cv2.INTER_CUBIC).astype(float) for layer in (coarse, fine)]
        pixels = (0.8 * layers[0] + 0.2 * layers[1]).astype(np.uint8)
        cv2.imwrite(str(folder / f"{number:03d}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])


def source_of(paths: list[Path]) -> FolderSource:
    """These images with one box each."""
    sizes = np.array([image_size(path) for path in paths])
    boxes = np.array([[10, 10, 100, 100]] * len(paths), dtype=np.float64)
    annotations = assemble(
        classes=("thing",),
        category_ids=(1,),
        image_ids=range(1, len(paths) + 1),
        file_names=[path.name for path in paths],
        sizes=sizes,
        image_of_box=np.arange(len(paths)),
        boxes=boxes,
        labels=np.ones(len(paths), dtype=np.int64),
        ignore=np.zeros(len(paths), dtype=bool),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
    )
    return FolderSource(annotations=annotations, folder=paths[0].parent)


def peer(paths: list[Path], min_size: int, *, flip: float = 0.5) -> list[Tensor]:
    to_float = v2.Compose([v2.RandomHorizontalFlip(flip), v2.ToDtype(torch.float, scale=True)])
    transform = GeneralizedRCNNTransform(min_size, 1333, list(IMAGENET_MEAN), list(IMAGENET_STD))
    batches = []
    for first in range(0, len(paths), BATCH):
        images = [to_float(v2.functional.pil_to_tensor(Image.open(path).convert("RGB"))) for path in paths[first : first + BATCH]]
        targets = [{"boxes": torch.tensor([[10.0, 10.0, 100.0, 100.0]]), "labels": torch.ones(1, dtype=torch.int64)} for _ in images]
        batches.append(transform(images, targets)[0].tensors)
    return batches


def ours(source: FolderSource, min_size: int, *, flip: bool = True, normalize: bool = True) -> list[Tensor]:
    dataset = DetectionDataset(source, min_size=min_size, max_size=1333, flip=flip, train=True)
    preprocess = Preprocess(Preprocessing())
    batches = []
    for first in range(0, len(dataset), BATCH):
        images = [dataset[0, number].image for number in range(first, min(first + BATCH, len(dataset)))]
        batches.append(preprocess(images)[0] if normalize else images[0])
    return batches


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def report(paths: list[Path], min_size: int, rounds: int) -> None:
    source = source_of(paths)
    ways: dict[str, Callable[[], object]] = {
        "torchvision": lambda: peer(paths, min_size),
        "like for like": lambda: ours(source, min_size),
        "uint8": lambda: ours(source, min_size, normalize=False),
    }
    for way in ways.values():
        way()
    times = [{name: seconds(way) for name, way in ways.items()} for _ in range(rounds)]
    print(
        f"shorter side {min_size}: torchvision {1000 * statistics.median(one['torchvision'] for one in times) / len(paths):.1f} ms an image"
    )
    for name in list(ways)[1:]:
        ratios = sorted(one["torchvision"] / one[name] for one in times)
        milliseconds = 1000 * statistics.median(one[name] for one in times) / len(paths)
        print(
            f"  {name:13} {milliseconds:5.1f} ms, ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True
        )
    pairs = list(zip(peer(paths, min_size, flip=0.0), ours(source, min_size, flip=False), strict=True))
    assert all(theirs.shape == mine.shape for theirs, mine in pairs)
    difference = statistics.mean(float((theirs - mine).abs().mean()) for theirs, mine in pairs)
    print(f"  mean difference of the normalised pixels {difference:.4f} (one grey level is about 0.017)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, metavar="DIR")
    parser.add_argument("--min-size", type=int, nargs="+", default=[320, 600, 800])
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        if options.images is None:
            draw_pictures(Path(folder), options.count)
        paths = sorted((options.images or Path(folder)).glob("*.jp*g"))[: options.count]
        print(f"{len(paths)} images, {options.rounds} rounds, one thread")
        for min_size in options.min_size:
            report(paths, min_size, options.rounds)


if __name__ == "__main__":
    main()
