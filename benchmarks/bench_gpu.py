"""Training steps on a GPU, by turns in one process: ours, torchvision's loops, and for classification timm's.

    python benchmarks/bench_gpu.py [--case r50_fpn r101_c4 cls] [--batch N] [--rounds 10] [--steps 5] [--compile]
        [--deterministic] [--device cuda]

Cases: r50_fpn at 800×1333, r101_c4 at 600×1000 (torchvision's parts put together as C4), cls is ResNet-50 at 224×224. Contestants: the peer
in float32 with TF32, the peer in bf16 autocast with channels_last, ours in bf16 with channels_last; with --compile and --deterministic also
ours with `train.compile` and `train.deterministic`. A round times `--steps` steps of each, from an idle GPU to an idle GPU; ratios are the
peer's time over ours in one round. Beside it: the most memory a step takes beyond weights and optimiser, and the share of the arithmetic
limit, which is what a large bf16 matrix product reaches in the same process; counted are convolutions and matrix products of forward and
backward. What is equal: network, frozen layers, anchors, proposals, regions an image, optimiser, images and boxes. How long a training
waits for data is in its own log (`train_det.py`: "data").

Without a GPU nothing is measured; `--device cpu --size 64 96` shows that it runs. It has not been run on one yet.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench_train_step import boxes_of, repeatable, stepper
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from detection.build import build_detector
from detection.config import load_detection_config
from detection.structures import Target
from resbackbone import create_backbone

Step = Callable[[], None]
CASES = {"r50_fpn": ("resnet50", (800, 1333), 4), "r101_c4": ("resnet101", (600, 1000), 2), "cls": ("resnet50", (224, 224), 256)}
CLASSES = 80
SIDE = 8192  # of the matrices that give the limit: 1.1e12 operations, large enough for any GPU of today


class Data:
    """One batch on the device, in the form that each side takes."""

    def __init__(self, size: tuple[int, int], batch: int, device: str) -> None:
        self.size, self.device = size, device
        self.images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8).to(device) for _ in range(batch)]
        self.boxes = [boxes_of(8, size).to(device) for _ in range(batch)]
        self.labels = [torch.randint(1, CLASSES + 1, (8,)).to(device) for _ in range(batch)]
        self.answers = torch.randint(0, 1000, (batch,)).to(device)

    def targets(self) -> list[Target]:
        """Ours."""
        none = torch.zeros((0, 4), device=self.device)
        return [
            Target(boxes=box, labels=label, ignore_boxes=none, image_id=i, index=i, original_size=self.size)
            for i, (box, label) in enumerate(zip(self.boxes, self.labels, strict=True))
        ]


def ours(case: str, backbone: str, data: Data, *, compiled: bool) -> Step:
    """bf16 and channels_last, as the configs have them on a GPU."""
    if case == "cls":
        return classifier(create_backbone(backbone, num_classes=1000), data, "bf16", compiled=compiled)
    overrides = [f"model.head={case.partition('_')[2]}", f"model.backbone.name={backbone}", "model.roi.proposals_test=1000"]
    detector = build_detector(load_detection_config(None, overrides), CLASSES, initial_weights=False)
    detector = detector.to(data.device, memory_format=torch.channels_last)
    if compiled:
        detector.backbone.compile()
    targets = data.targets()
    return stepper(detector, lambda: detector(data.images, targets), "bf16", device=data.device)


def theirs(case: str, backbone: str, data: Data, precision: str) -> Step:
    """torchvision's detector or timm's network; in bf16 with channels_last too."""
    if case == "cls":
        import timm

        return classifier(timm.create_model(backbone, num_classes=1000), data, precision)
    net = getattr(models, backbone)(norm_layer=FrozenBatchNorm2d)
    sides = {"min_size": min(data.size), "max_size": max(data.size)}
    model = FasterRCNN(_resnet_fpn_extractor(net, 3), CLASSES + 1, **sides) if case == "r50_fpn" else c4_of(net, sides)
    model = model.to(data.device)
    if precision == "bf16":
        model = model.to(memory_format=torch.channels_last)
    targets = [{"boxes": box, "labels": label} for box, label in zip(data.boxes, data.labels, strict=True)]
    floats = [image / 255 for image in data.images]
    return stepper(model, lambda: model(floats, [dict(one) for one in targets]), precision, device=data.device)


def c4_of(net: nn.Module, sides: dict[str, int]) -> FasterRCNN:
    """torchvision's detector with conv5_x on each region, as He et al. 2015, appendix A, has it."""
    body = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3)
    for part in (net.conv1, net.layer1):
        part.requires_grad_(False)
    body.out_channels = 1024
    return FasterRCNN(
        body,
        rpn_anchor_generator=AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
        rpn_pre_nms_top_n_train=12000,
        box_batch_size_per_image=128,  # ours on C4, where conv5_x runs on each region
        box_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
        box_head=nn.Sequential(net.layer4, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        box_predictor=FastRCNNPredictor(2048, CLASSES + 1),
        **sides,
    )


def classifier(net: nn.Module, data: Data, precision: str, *, compiled: bool = False) -> Step:
    """The loop around a network of either side: uint8 images, normalised on the device."""
    layout = torch.channels_last if precision == "bf16" else torch.contiguous_format
    net = net.to(data.device, memory_format=layout)
    if compiled:
        net.compile()
    images = torch.stack(data.images).contiguous(memory_format=layout)

    def losses() -> dict[str, Tensor]:
        return {"cross_entropy": F.cross_entropy(net(images.float().sub_(120).div_(58)).float(), data.answers)}

    return stepper(net, losses, precision, device=data.device)


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Wall time from an idle device to an idle device."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def time_of_step(step: Step, count: int, device: str) -> float:
    """Seconds a step takes, of `count` in a row."""

    def several() -> None:
        for _ in range(count):
            step()

    return seconds_of(several, device) / count


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(step: Step, device: str) -> str:
    """The most memory during a step beyond what was taken before it."""
    if device != "cuda":
        return "memory not measured"
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return f"{(torch.cuda.max_memory_allocated() - before) / 1e6:.0f} MB"


def limit_of(device: str, side: int) -> float:
    """Operations a second of a large bf16 matrix product, the best of ten."""
    a, b = (torch.randn((side, side), device=device, dtype=torch.bfloat16) for _ in range(2))
    torch.mm(a, b)
    return 2 * side**3 / min(seconds_of(lambda: torch.mm(a, b), device) for _ in range(10))


def report(case: str, options: argparse.Namespace, limit: float) -> None:
    """One case, measured and printed."""
    backbone, usual_size, usual_batch = CASES[case]
    size, batch = tuple(options.size or usual_size), options.batch or usual_batch
    data = Data(size, batch, options.device)
    peer = "timm" if case == "cls" else "torchvision"
    steps = {f"{peer} TF32": theirs(case, backbone, data, "fp32"), f"{peer} bf16": theirs(case, backbone, data, "bf16")}
    steps |= {"ours": ours(case, backbone, data, compiled=False)}
    if options.compile:
        steps["ours compiled"] = ours(case, backbone, data, compiled=True)
    if options.deterministic:
        steps["ours deterministic"] = repeatable(steps["ours"])
    operations = {}
    for name, step in steps.items():
        step()  # asks for memory, chooses algorithms, compiles
        step()
        with FlopCounterMode(display=False) as counter:
            step()
        operations[name] = counter.get_total_flops()

    rounds = [{name: time_of_step(step, options.steps, options.device) for name, step in steps.items()} for _ in range(options.rounds)]
    print(f"{case}: {size[0]}×{size[1]}, batch {batch}, {options.rounds} rounds of {options.steps} steps")
    for name, step in steps.items():
        time_s = statistics.median(one[name] for one in rounds)
        share = operations[name] / time_s / limit
        print(f"  {name}: {batch / time_s:.1f} images/s, {peak_memory(step, options.device)}, {share:.0%} of the limit")
    for mine in [name for name in steps if name.startswith("ours")]:
        for other in [name for name in steps if not name.startswith("ours")]:
            ratios = sorted(one[other] / one[mine] for one in rounds)
            print(f"  {mine} against {other}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--batch", type=int, help="images a step, instead of the cases' own: 4, 2 and 256")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--size", type=int, nargs=2, help="height and width, instead of the cases' own")
    parser.add_argument("--compile", action="store_true", help="also ours with train.compile")
    parser.add_argument("--deterministic", action="store_true", help="also ours with train.deterministic")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU: nothing was measured")
        return
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    limit = limit_of(options.device, SIDE if options.device == "cuda" else 512)
    print(f"{where}, torch {torch.__version__}; the limit is {limit / 1e12:.3g} TFLOP/s; a ratio above 1: ours is faster")
    for case in options.case:
        report(case, options, limit)


if __name__ == "__main__":
    main()
