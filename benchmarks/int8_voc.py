"""What int8 costs in mAP: a trained VOC detector whose ResNet is quantised, beside the same in bf16 and fp32.

    python benchmarks/int8_voc.py WEIGHTS data.root=VOC [--engine onednn] [--calibration 32] [key=value ...]

WEIGHTS is a feature-pyramid detector of tools/train_det.py on a ResNet that torchvision has. Quantised is the backbone alone, as in
bench_int8.py, observed on training images; the pyramid and the heads stay in bf16. Prints mAP, COCO's AP and the processor time of each.
"""

import argparse
import time
import warnings
from itertools import islice
from pathlib import Path

import torch
import torchvision
from bench_int8 import quantised
from torch import Tensor, nn

from detection.config import load_split, train_loader
from detection.faster_rcnn import FasterRCNN
from detection.predict import load_detector, resolve_config
from detection.validate import Validator
from resbackbone.fpn import FeaturePyramid
from resbackbone.runtime import distributed
from resbackbone.runtime.precision import Precision

MAPS = ("conv2_x", "conv3_x", "conv4_x", "conv5_x")


class FourMaps(nn.Module):
    """torchvision's network up to each map that a pyramid stands on."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.conv2_x = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1)
        self.conv3_x, self.conv4_x, self.conv5_x = net.layer2, net.layer3, net.layer4

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = {"conv2_x": self.conv2_x(images)}
        maps["conv3_x"] = self.conv3_x(maps["conv2_x"])
        maps["conv4_x"] = self.conv4_x(maps["conv3_x"])
        return maps | {"conv5_x": self.conv5_x(maps["conv4_x"])}


def pyramid_of(detector: FasterRCNN) -> FeaturePyramid:
    pyramid = next(module for module in detector.modules() if isinstance(module, FeaturePyramid))
    assert tuple(pyramid.backbone.out_features) == MAPS, "the pyramid of a ResNet is asked for"
    return pyramid


def plain_twin(pyramid: FeaturePyramid, name: str) -> nn.Module:
    """torchvision's network with the backbone's weights; fx can fold and quantise it."""
    net = torchvision.models.get_model(name)
    net.load_state_dict(pyramid.backbone.state_dict(), strict=False)  # its classifier and batch counts have no counterpart
    twin = FourMaps(net).eval().to(memory_format=torch.channels_last)
    image = torch.randn(1, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip(pyramid.backbone(image).values(), twin(image).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(ours.abs().max()))
    return twin


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--engine", default="onednn", choices=torch.backends.quantized.supported_engines)
    parser.add_argument("--calibration", type=int, default=32, help="training images to observe")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_intermixed_args()
    warnings.simplefilter("ignore")  # torch announces that this quantisation will move to another package
    config = resolve_config(None, args.weights, [*args.overrides, "train.device=cpu"])
    detector, _ = load_detector(config, args.weights, device=torch.device("cpu"))
    process, pyramid = distributed.setup("cpu"), pyramid_of(detector)
    batches, _ = train_loader(config, load_split(config, "train"), process)
    few = islice(batches, -(-args.calibration // config.train.batch_size))
    seen = [detector.preprocess(batch.images)[0] for batch in few]
    plain = pyramid.backbone
    int8 = quantised(plain_twin(pyramid, config.model.backbone.name), args.engine, seen)
    source = load_split(config, "val")
    for name, precision, backbone in (("fp32", "fp32", plain), ("bf16", "bf16", plain), (f"int8 {args.engine}", "bf16", int8)):
        pyramid.backbone = backbone  # type: ignore[assignment]
        start = time.process_time()
        figures = Validator(config, source, process=process, precision=Precision(precision, "cpu")).evaluate(detector, with_loss=False)
        kept = ", ".join(f"{key} {value:.4f}" for key, value in figures.items() if key in ("mAP", "mAP_11_point", "AP", "AP50"))
        print(f"{name:12} {kept}, {time.process_time() - start:.0f} s of processor time", flush=True)


if __name__ == "__main__":
    main()
