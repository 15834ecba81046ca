"""int8 on the CPU: torch's own static quantisation of a ResNet beside bf16 and fp32, all channels last, by turns in one process.

    python benchmarks/bench_int8.py [--weights resnet50.safetensors] [--backbone resnet50] [--images DIR] [--size 240 320 --size 480 720]
        [--engines x86 onednn fbgemm] [--calibration 8] [--rounds 5] [--threads 1]

The question is whether it is worth offering. fp32 and bf16 are our backbone as the detector runs it. int8 is torchvision's network with the
same weights, batch norms folded, quantised by torch.ao.quantization (FX graph mode: weights by channel, activations by tensor, observed on
`calibration` images), which is what torch has of its own for it; its float output has been compared with ours to be the same network.
Processor time of one image; the ratios are the other's over int8's, so above 1 int8 is the faster. Printed beside them: how much of conv4_x
and conv5_x is lost, as 1 − cosine to the fp32 maps, on images not calibrated on. Without --weights they are random and that figure means
little; without --images, images are smooth noise.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from resbackbone import create_backbone
from resbackbone.backbone import IMAGENET_MEAN, IMAGENET_STD

MAPS = ("conv4_x", "conv5_x")


class Maps(nn.Module):
    """torchvision's network up to its last two maps."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2)
        self.layer3, self.layer4 = net.layer3, net.layer4

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        conv4_x = self.layer3(self.stem(images))
        return conv4_x, self.layer4(conv4_x)


def read_images(folder: Path | None, count: int, size: tuple[int, int]) -> list[Tensor]:
    """Normalised (1, 3, H, W), channels last."""
    draw, images = np.random.default_rng(0), []
    paths = sorted(folder.rglob("*.[jJ]*[gG]"))[:count] if folder else []
    for number in range(count):
        pixels = cv2.imread(str(paths[number]), cv2.IMREAD_COLOR_RGB) if folder else draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        resized = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA if folder else cv2.INTER_CUBIC)
        normalised = (resized / np.float32(255) - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
        images.append(torch.from_numpy(normalised.transpose(2, 0, 1)[None].copy()).to(memory_format=torch.channels_last))
    return images


def quantised(net: nn.Module, engine: str, images: list[Tensor]) -> nn.Module:
    torch.backends.quantized.engine = engine
    prepared = prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping(engine), (images[0],))
    with torch.inference_mode():
        for image in images:
            prepared(image)
    return convert_fx(prepared)


def seconds(run: Callable[[Tensor], object], image: Tensor) -> float:
    start = time.process_time()
    run(image)
    return time.process_time() - start


def lost(run: Callable[[Tensor], tuple[Tensor, ...]], truth: list[tuple[Tensor, ...]], images: list[Tensor]) -> list[float]:
    """1 − cosine of each map, the mean over images."""
    found = [
        [
            1 - float(nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))
            for a, b in zip(run(image), maps, strict=True)
        ]
        for image, maps in zip(images, truth, strict=True)
    ]
    return [statistics.mean(column) for column in zip(*found, strict=True)]


def report(options: argparse.Namespace, size: tuple[int, int]) -> None:
    images = read_images(options.images, options.calibration + 2, size)
    tested = images[options.calibration :]
    ours = create_backbone(options.backbone, weights=options.weights, norm="frozen", out_features=MAPS, allow_random_frozen=True).eval()
    theirs = torchvision.models.get_model(options.backbone)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    net = Maps(theirs).eval().to(memory_format=torch.channels_last)
    ours = ours.to(memory_format=torch.channels_last)

    def bf16(image: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            return tuple(ours(image).values())

    ways: dict[str, Callable] = {"fp32": lambda image: tuple(ours(image).values()), "bf16": bf16}
    for engine in options.engines:
        ways[f"int8 {engine}"] = quantised(net, engine, images[: options.calibration])
    truth = [ways["fp32"](image) for image in tested]
    assert lost(net, truth, tested)[-1] < 1e-6, "torchvision's network is not ours"
    for way in ways.values():
        way(images[0])
    times = [{name: seconds(way, images[0]) for name, way in ways.items()} for _ in range(options.rounds)]
    print(f"{options.backbone}, {size[0]}×{size[1]}, {options.threads} thread(s), {options.rounds} rounds")
    for name, way in ways.items():
        print(f"  {name:12} {1000 * statistics.median(one[name] for one in times):7.0f} ms", end="")
        if name != "fp32":
            print(", lost " + ", ".join(f"{part:.1e} of {of}" for of, part in zip(MAPS, lost(way, truth, tested), strict=True)), end="")
        for other in ("fp32", "bf16") if name.startswith("int8") else ():
            ratios = sorted(one[other] / one[name] for one in times)
            print(f", {other} / int8 {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", end="")
        print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--images", type=Path, metavar="DIR")
    parser.add_argument("--size", type=int, nargs=2, action="append", metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--engines", nargs="+", default=["x86", "onednn", "fbgemm"], choices=torch.backends.quantized.supported_engines)
    parser.add_argument("--calibration", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # torch announces that this quantisation will move to another package
    with torch.inference_mode():
        for size in options.size or [(240, 320), (480, 720)]:
            report(options, tuple(size))


if __name__ == "__main__":
    main()
