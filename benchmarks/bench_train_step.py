"""A training step of ours beside torchvision's, by turns in one process: FPN, frozen batch norm, SGD.

    python benchmarks/bench_train_step.py [--case r18 r50] [--rounds 6] [--threads 2] [--clock cpu|wall] [--deterministic]

Cases: r18 is 240×320, batch 4, 20 classes; r50 is 256×384, batch 2, 90 classes; r50_large is 480×720. Contestants: torchvision in plain
fp32, torchvision in bf16 autocast with channels_last, ours in fp32, ours in bf16 with channels_last; with --deterministic also the last
under `train.deterministic`. Ratios are of the times of one round,
the peer's over ours. What is equal: backbone, head, anchors, 2000 proposals, 512 regions an image, frozen layers, optimiser, images and
boxes. Losses are equal in distribution only, since each draws its own samples (tests/detection compares losses and gradients exactly).

With one thread the clock is the processor's, which other work hardly disturbs. With more it is the wall's, which is worth reading only on a
machine with nothing else to do: printed are the load beside this run (near 0, then) and the processors that each contestant kept busy,
which other work lowers.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d

from detection.build import build_detector
from detection.config import load_detection_config
from detection.structures import Target
from resbackbone.layers import FrozenBatchNorm2d as OurFrozenBatchNorm2d
from resbackbone.runtime.random_state import deterministic

Step = Callable[[], None]
SHRINK = 0.5  # what frozen batch norms multiply by: with 1, random weights would double the signal from block to block


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What both sides are built for. size: (height, width); classes: without background."""

    backbone: str
    size: tuple[int, int]
    classes: int
    precision: str = "fp32"
    channels_last: bool = False


CASES = {
    "r18": (Setting(backbone="resnet18", size=(240, 320), classes=20), 4),
    "r50": (Setting(backbone="resnet50", size=(256, 384), classes=90), 2),
    "r50_large": (Setting(backbone="resnet50", size=(480, 720), classes=90), 2),
}
DETERMINISTIC = "ours bf16, deterministic"
PAIRS = (("torchvision fp32", "ours fp32"), ("torchvision fp32", "ours bf16"), ("torchvision bf16", "ours bf16"))


def boxes_of(count: int, size: tuple[int, int]) -> Tensor:
    sides = torch.tensor([size[1], size[0]], dtype=torch.float32)
    corner = torch.rand(count, 2) * sides * 0.6
    return torch.cat((corner, corner + sides * (0.06 + 0.3 * torch.rand(count, 2))), dim=1)


def stepper(model: nn.Module, losses: Callable[[], dict[str, Tensor]], precision: str, *, device: str = "cpu") -> Step:
    """A function that takes one optimiser step."""
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d | OurFrozenBatchNorm2d):
            module.weight.fill_(SHRINK)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3, momentum=0.9)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = torch.stack(list(losses().values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def build_ours(setting: Setting, images: list[Tensor], boxes: list[Tensor], labels: list[Tensor]) -> Step:
    overrides = ["model.head=fpn", f"model.backbone.name={setting.backbone}", "model.roi.proposals_test=1000"]
    detector = build_detector(load_detection_config(None, overrides), setting.classes, initial_weights=False)
    if setting.channels_last:
        detector = detector.to(memory_format=torch.channels_last)
    none = torch.zeros(0, 4)
    targets = [
        Target(boxes=box, labels=label, ignore_boxes=none, image_id=i, index=i, original_size=setting.size)
        for i, (box, label) in enumerate(zip(boxes, labels, strict=True))
    ]
    return stepper(detector, lambda: detector(images, targets), setting.precision)


def build_theirs(setting: Setting, images: list[Tensor], boxes: list[Tensor], labels: list[Tensor]) -> Step:
    body = _resnet_fpn_extractor(getattr(models, setting.backbone)(norm_layer=FrozenBatchNorm2d), 3)
    model = FasterRCNN(body, setting.classes + 1, min_size=min(setting.size), max_size=max(setting.size))
    if setting.channels_last:
        model = model.to(memory_format=torch.channels_last)
    floats = [image / 255 for image in images]
    targets = [{"boxes": box, "labels": label} for box, label in zip(boxes, labels, strict=True)]
    return stepper(model, lambda: model(floats, [dict(target) for target in targets]), setting.precision)


def contestants(setting: Setting, batch: int) -> dict[str, Step]:
    images = [torch.randint(0, 256, (3, *setting.size), dtype=torch.uint8) for _ in range(batch)]
    boxes = [boxes_of(3, setting.size) for _ in range(batch)]
    labels = [torch.randint(1, setting.classes + 1, (3,)) for _ in range(batch)]
    steps = {}
    for precision in ("fp32", "bf16"):
        one = Setting(
            backbone=setting.backbone,
            size=setting.size,
            classes=setting.classes,
            precision=precision,
            channels_last=precision == "bf16",
        )
        steps[f"torchvision {precision}"] = build_theirs(one, images, boxes, labels)
        steps[f"ours {precision}"] = build_ours(one, images, boxes, labels)
    return steps


def repeatable(step: Step) -> Step:
    """The same step as train.deterministic=true takes it."""

    def run() -> None:
        with deterministic(True):
            step()

    return run


def timed(step: Step) -> dict[str, float]:
    """Seconds by clock."""
    wall, processor = time.perf_counter(), time.process_time()
    step()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - processor}


def report(case: str, rounds: int, clock: str, *, with_deterministic: bool) -> None:
    setting, batch = CASES[case]
    steps = contestants(setting, batch)
    if with_deterministic:
        steps[DETERMINISTIC] = repeatable(steps["ours bf16"])
    for step in steps.values():
        step()  # the first step allocates
    both = [{name: timed(step) for name, step in steps.items()} for _ in range(rounds)]
    times = [{name: seconds[clock] for name, seconds in one.items()} for one in both]
    busy = {name: statistics.median(one[name]["cpu"] / one[name]["wall"] for one in both) for name in steps}
    print(f"{case}: {setting.backbone} FPN, {setting.size[0]}×{setting.size[1]}, batch {batch}, {rounds} rounds")
    for name in steps:
        print(f"  {name}: {statistics.median(one[name] for one in times):.2f} s a step, {busy[name]:.1f} processors busy")
    for theirs, ours in (*PAIRS, *([("ours bf16", DETERMINISTIC)] if with_deterministic else [])):
        ratios = sorted(one[theirs] / one[ours] for one in times)
        print(f"  {ours} against {theirs}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["r18", "r50"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("cpu", "wall"), help="default: cpu with one thread, wall with more")
    parser.add_argument("--deterministic", action="store_true", help="also what train.deterministic costs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kind = options.clock or ("cpu" if options.threads == 1 else "wall")
    print(f"torch {torch.__version__}, {options.threads} thread(s), {kind} clock; a ratio above 1: ours is faster")
    print(f"load average before: {os.getloadavg()[0]:.1f}", flush=True)
    for case in options.case:
        report(case, options.rounds, kind, with_deterministic=options.deterministic)


if __name__ == "__main__":
    main()
