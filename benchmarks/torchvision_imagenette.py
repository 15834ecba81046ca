"""The peer: a bare loop around torchvision's resnet18 on Imagenette, as a user would write it.

    python benchmarks/torchvision_imagenette.py --root DATA/imagenette --output OUT [--size 64] [--steps 800] [--lr 0.05] [--seed 0]

Same recipe and budget as configs/imagenette/resnet18.yaml: random resized crops (area 0.35 to 1) and flips, batch 64, SGD with momentum
0.9 and weight decay 5e-4, warm-up and cosine, label smoothing 0.1, bf16 autocast, channels_last; tested
on the centre of that size, of a shorter side of 9/8 of it. It has no colour noise, and batch norm's statistics stay running averages.
Nothing of this project is imported. OUT/summary.json has the top-1 on the val photos and the seconds of training and testing.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH, WARMUP = 64, 100


def loader(root: Path, split: str, size: int, train: bool) -> DataLoader:
    crop = (
        [transforms.RandomResizedCrop(size, scale=(0.35, 1.0)), transforms.RandomHorizontalFlip()]
        if train
        else [transforms.Resize(size * 9 // 8), transforms.CenterCrop(size)]
    )
    pipeline = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    return DataLoader(ImageFolder(root / split, pipeline), batch_size=BATCH, shuffle=train, drop_last=train, num_workers=1)


def rate(step: int, steps: int, peak: float) -> float:
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    return peak * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", type=int, default=64, help="pixels of a training crop")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = resnet18(num_classes=10).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    began, step = time.perf_counter(), 0
    while step < args.steps:
        for images, labels in loader(args.root, "train", args.size, train=True):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, args.steps, args.lr)
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(model(images.to(device, memory_format=torch.channels_last)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 50 == 0 or step == args.steps:
                print(f"step {step}: loss {loss.item():.4f}, {time.perf_counter() - began:.0f} s", flush=True)
            if step == args.steps:
                break
    trained, right, total = time.perf_counter(), 0, 0
    model.eval()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        for images, labels in loader(args.root, "val", args.size, train=False):
            right += (model(images.to(device)).argmax(1).cpu() == labels).sum().item()
            total += len(labels)
    summary = {"top1": right / total, "train_s": trained - began, "test_s": time.perf_counter() - trained}
    summary |= {"steps": args.steps, "size": args.size}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "summary.json").write_text(json.dumps(summary | {"seed": args.seed}))
    print(summary)


if __name__ == "__main__":
    main()
