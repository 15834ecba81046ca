"""A training step of ours beside torchvision's: ResNet-18 FPN, 240x320, batch 4, frozen batch norm, bf16, channels_last, SGD.

    python benchmarks/bench_train_step.py [--rounds 6] [--threads 2]

Both are built without pretrained weights, are given the same images and boxes, and take turns in one process; the ratio is of each
round's two times, torchvision's over ours. What is equal: backbone, head, anchors, 2000 proposals, 512 regions an image, 20 classes,
precision, optimiser. Losses are equal in distribution only, since each draws its own samples (tests/detection compares them exactly).
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d

from detection.build import build_detector
from detection.config import load_detection_config
from detection.structures import Target

SIZE, BATCH, CLASSES = (240, 320), 4, 20


def boxes_of(count: int) -> torch.Tensor:
    corner = torch.rand(count, 2) * torch.tensor([200.0, 140.0])
    return torch.cat((corner, corner + 20 + torch.rand(count, 2) * 90), dim=1)


def stepper(model: torch.nn.Module, losses: Callable[[], dict[str, torch.Tensor]]) -> Callable[[], float]:
    """A function that takes one optimiser step and returns its seconds."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3, momentum=0.9)

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.stack(list(losses().values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def build_ours(images: list[torch.Tensor], boxes: list[torch.Tensor], labels: list[torch.Tensor]) -> Callable[[], float]:
    overrides = ["model.head=fpn", "model.backbone.name=resnet18", "model.roi.proposals_test=1000"]
    detector = build_detector(load_detection_config(None, overrides), CLASSES, initial_weights=False)
    detector = detector.to(memory_format=torch.channels_last)
    none = torch.zeros(0, 4)
    targets = [
        Target(boxes=box, labels=label, ignore_boxes=none, image_id=i, index=i, original_size=SIZE)
        for i, (box, label) in enumerate(zip(boxes, labels, strict=True))
    ]
    return stepper(detector, lambda: detector(images, targets))


def build_theirs(images: list[torch.Tensor], boxes: list[torch.Tensor], labels: list[torch.Tensor]) -> Callable[[], float]:
    body = _resnet_fpn_extractor(resnet18(norm_layer=FrozenBatchNorm2d), 3)
    model = FasterRCNN(body, CLASSES + 1, min_size=SIZE[0], max_size=SIZE[1]).to(memory_format=torch.channels_last)
    floats = [image / 255 for image in images]
    targets = [{"boxes": box, "labels": label} for box, label in zip(boxes, labels, strict=True)]
    return stepper(model, lambda: model(floats, [dict(target) for target in targets]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = [torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8) for _ in range(BATCH)]
    boxes = [boxes_of(3) for _ in range(BATCH)]
    labels = [torch.randint(1, CLASSES + 1, (3,)) for _ in range(BATCH)]
    ours, theirs = build_ours(images, boxes, labels), build_theirs(images, boxes, labels)
    ours(), theirs()  # the first step allocates
    rounds = [(theirs(), ours()) for _ in range(args.rounds)]
    ratios = sorted(their_s / our_s for their_s, our_s in rounds)
    print(f"threads {args.threads}, {args.rounds} rounds: torchvision {statistics.median(r[0] for r in rounds):.2f} s a step,")
    print(
        f"ours {statistics.median(r[1] for r in rounds):.2f} s; ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    main()
