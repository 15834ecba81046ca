"""The peer: a bare loop around torchvision's own Faster R-CNN (ResNet-18 FPN) on VOC, as a user would write it.

    python benchmarks/torchvision_voc.py --root DATA/voc12 --weights resnet18_imagenet1k_fp16.safetensors --output OUT

Same weights, frozen batch norm, image size, batch, steps, learning rate and precision as configs/frcnn_r18_fpn_voc.yaml;
nothing of this project is imported. It writes OUT/detections.json (score it with tools/eval_voc.py, the evaluator that
scores ours) and OUT/summary.json (seconds of training and of testing).
"""

import argparse
import json
import random
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms.functional import to_tensor

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse"),
    *("motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class VOC(Dataset):
    def __init__(self, root: Path, split: str, train: bool):
        self.folder, self.train = root / "VOCdevkit" / "VOC2012", train
        self.ids = (self.folder / "ImageSets/Main" / f"{split}.txt").read_text().split()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        name = self.ids[index]
        image = to_tensor(Image.open(self.folder / "JPEGImages" / f"{name}.jpg").convert("RGB"))
        boxes, labels = [], []
        for thing in ElementTree.parse(self.folder / "Annotations" / f"{name}.xml").iter("object"):
            if self.train and thing.findtext("difficult") == "1":
                continue
            corners = [float(thing.find("bndbox").findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")]
            boxes.append([corners[0] - 1, corners[1] - 1, corners[2], corners[3]])  # VOC counts pixels from 1, both ends included
            labels.append(1 + CLASSES.index(thing.findtext("name")))
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        if self.train and random.random() < 0.5:
            image = image.flip(-1)
            boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
        return image, {"boxes": boxes, "labels": torch.tensor(labels), "name": name}


def build(weights: Path) -> FasterRCNN:
    body = resnet18(norm_layer=FrozenBatchNorm2d)
    state = {key: value.float() for key, value in load_file(weights).items()}
    body.load_state_dict(state, strict=True)
    return FasterRCNN(_resnet_fpn_extractor(body, 3), num_classes=21, min_size=240, max_size=320)


def loader(dataset: Dataset, batch: int, shuffle: bool) -> DataLoader:
    return DataLoader(
        dataset, batch, shuffle=shuffle, num_workers=1, collate_fn=lambda items: tuple(zip(*items, strict=True)), drop_last=shuffle
    )


def train(model: FasterRCNN, root: Path, steps: int, batch: int, lr: float) -> float:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr, momentum=0.9, weight_decay=1e-4)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 100) * (0.1 if s >= 0.75 * steps else 1.0))
    data, step, start = loader(VOC(root, "trainval", True), batch, True), 0, time.perf_counter()
    model.train()
    while step < steps:
        for images, targets in data:
            targets = [{"boxes": t["boxes"], "labels": t["labels"]} for t in targets]
            with torch.autocast("cpu", torch.bfloat16):
                loss = sum(model(list(images), targets).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            step += 1
            if step % 25 == 0:
                print(f"step {step} loss {loss.item():.3f} {(time.perf_counter() - start):.0f} s", flush=True)
            if step == steps:
                break
    return time.perf_counter() - start


@torch.inference_mode()
def test(model: FasterRCNN, root: Path, split: str) -> tuple[list[dict], float]:
    model.eval()
    found, start = [], time.perf_counter()
    for images, targets in loader(VOC(root, split, False), 4, False):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(list(images))
        for output, target in zip(outputs, targets, strict=True):
            for box, label, score in zip(output["boxes"].tolist(), output["labels"].tolist(), output["scores"].tolist(), strict=True):
                corners = [box[0] + 1, box[1] + 1, box[2], box[3]]  # VOC's pixels: from 1, both ends inside
                found.append({"image_id": target["name"], "category": CLASSES[label - 1], "bbox": corners, "score": score})
    return found, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=750)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test")
    args = parser.parse_args()
    random.seed(args.seed), np.random.seed(args.seed), torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    model = build(args.weights).to(memory_format=torch.channels_last)
    train_s = train(model, args.root, args.steps, args.batch, args.lr)
    torch.save(model.state_dict(), args.output / "model.pt")
    found, test_s = test(model, args.root, args.split)
    (args.output / "detections.json").write_text(json.dumps(found))
    (args.output / "summary.json").write_text(json.dumps({"train_s": train_s, "test_s": test_s, "steps": args.steps, "seed": args.seed}))
    print(f"trained in {train_s:.0f} s, tested in {test_s:.0f} s; {args.output / 'detections.json'}")


if __name__ == "__main__":
    main()
