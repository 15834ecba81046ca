"""The input of ImageNet training, per core: ours beside torchvision's references path, one thread, runs alternated in one process.

    python benchmarks/bench_cls_input.py [--images DIR] [--rounds 5] [--count 64]

The peer does what torchvision/references/classification does by default: PIL decode, RandomResizedCrop(224), flip, PILToTensor, float,
Normalize. Ours draws from the same distribution of crops and leaves uint8 (the device normalises); "+ normalised" adds our normalisation of
the whole batch on the CPU. Shards: the same images with a short side of 256, read through webdataset; other pixels, so not like for like.
Each ratio is the peer's processor time over ours in the same round; printed are the median, the smallest and the largest. DIR holds
JPEGs; without it, 64 pictures of 500 x 375 are drawn, which compress better than photographs. The last lines are about reduced-scale
decoding: where it applies, and how far its pixels are from those of the same crops decoded whole.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resbackbone.classification.config import DataConfig
from resbackbone.classification.dataset import TrainTransform
from resbackbone.classification.files import jpeg_size, largest_reduction
from resbackbone.classification.loader import collate
from resbackbone.classification.recipe import Normalizer
from resbackbone.classification.shards import read_shard, write_shards
from resbackbone.classification.sources import FileSource
from resbackbone.classification.transforms import area_crop, cut, scale_crop

MEAN, STD, SIZE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224
PEER = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIZE),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float),
        transforms.Normalize(MEAN, STD),
    ]
)


def draw_pictures(folder: Path, count: int) -> None:
    draw = np.random.default_rng(0)
    for number in range(count):
        coarse, fine = (draw.integers(0, 256, (375 // cell, 500 // cell, 3), dtype=np.uint8) for cell in (25, 3))
        layers = [cv2.resize(layer, (500, 375), interpolation=cv2.INTER_CUBIC).astype(float) for layer in (coarse, fine)]
        pixels = (0.8 * layers[0] + 0.2 * layers[1]).astype(np.uint8)
        cv2.imwrite(str(folder / f"{number:03d}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])


def peer(source: FileSource) -> torch.Tensor:
    return torch.stack([PEER(Image.open(source.name(number)).convert("RGB")) for number in range(len(source.labels))])


def contestants(source: FileSource, shards: Path) -> dict[str, Callable[[int], object]]:
    """Name -> one epoch over the images; each takes the epoch, which its crops depend on."""
    settings = {"crop": "area", "size": SIZE, "pca_noise": 0.0}
    whole, reduced = (TrainTransform(data=DataConfig(**settings, reduced_decoding=flag), seed=0) for flag in (False, True))
    index = write_shards(source, shards, short_side=256)
    normalize = Normalizer(mean=MEAN, std=STD, input_range=1.0)

    def from_files(transform: TrainTransform, epoch: int) -> torch.Tensor:
        numbers = range(len(source.labels))
        return collate((transform(source.read(number), 0, epoch=epoch, index=number, name="") for number in numbers), len(numbers)).images

    def from_shards(epoch: int) -> torch.Tensor:
        samples = (reduced(data, label, epoch=epoch, index=number, name="") for number, data, label in read_shard(index, 0))
        return collate(samples, int(index.counts[0])).images

    return {
        "originals": lambda epoch: from_files(reduced, epoch),
        "originals, decoded whole": lambda epoch: from_files(whole, epoch),
        "originals + normalised": lambda epoch: normalize(from_files(reduced, epoch)),
        "shards of short side 256": from_shards,
        "shards + normalised": lambda epoch: normalize(from_shards(epoch)),
    }


def measure(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def reduction_report(source: FileSource) -> list[str]:
    """For each kind of crop: how often a smaller decode applies, and how its pixels differ from the whole decode's, in levels of 255."""
    lines = []
    for kind in ("area", "scale"):
        rng, applied, means, largest = np.random.default_rng(0), 0, [], 0
        for number in range(len(source.labels)):
            data = source.read(number)
            height, width = jpeg_size(data) or (0, 0)
            if kind == "area":
                crop = area_crop(height, width, area=(0.08, 1.0), rng=rng)
            else:
                crop = scale_crop(height, width, size=SIZE, shorter_side=(256, 480), rng=rng)
            if largest_reduction(crop.height, crop.width, size=SIZE) == 1:
                continue
            applied += 1
            pixels = [cut(data, crop, size=SIZE, name="", reduced=flag).astype(int) for flag in (False, True)]
            difference = np.abs(pixels[0] - pixels[1])
            means.append(difference.mean())
            largest = max(largest, int(difference.max()))
        far = f"; mean difference {np.mean(means):.2f} levels (worst image {np.max(means):.2f}), largest {largest}" if applied else ""
        lines.append(f"reduced decoding, {kind} crops: {applied} of {len(source.labels)}{far}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.images or Path(scratch)
        if args.images is None:
            draw_pictures(folder, args.count)
        files = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))[: args.count]
        source = FileSource(folder, files, [0] * len(files), ("any",))
        sides = [jpeg_size(source.read(number)) or (0, 0) for number in range(len(files))]
        kilobytes = sum(len(source.read(number)) for number in range(len(files))) / len(files) / 1e3
        print(f"{len(files)} JPEGs, median {np.median(sides, axis=0)[1]:.0f} x {np.median(sides, axis=0)[0]:.0f}, {kilobytes:.0f} KB each")
        runs = contestants(source, Path(scratch) / "shards")
        for run in (lambda epoch: peer(source), *runs.values()):
            run(0)  # caches, imports
        ratios: dict[str, list[float]] = {name: [] for name in runs}
        for epoch in range(1, args.rounds + 1):
            for name, run in runs.items():
                base = measure(lambda: peer(source))
                ratios[name].append(base / measure(lambda run=run, epoch=epoch: run(epoch)))
        for name, values in ratios.items():
            print(f"{name:28s} {statistics.median(values):5.2f}x  ({min(values):.2f} … {max(values):.2f})")
        print("\n".join(reduction_report(source)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
