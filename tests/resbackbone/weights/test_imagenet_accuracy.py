"""The ImageNet weights reach exactly their known accuracies on the Imagenette photos. Minutes: `make test-slow`."""

from __future__ import annotations

import io
import json
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from resbackbone import create_classifier

CLASSES = {  # folder -> ImageNet's index
    "n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497,
    "n03394916": 566, "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701,
}  # fmt: skip


def photos(archive: Path, per_class: int) -> tuple[Tensor, Tensor]:
    """The first photos of each class, in the archive's order: shorter side 256, centre crop 224, uint8 [N, 3, 224, 224]; and labels."""
    taken: dict[str, list[np.ndarray]] = defaultdict(list)
    with tarfile.open(archive) as file:
        for member in file:
            split, folder, *_ = Path(member.name).parts[-3:] if member.isfile() else ("", "")
            if split != "val" or len(taken[folder]) == per_class:
                continue
            image = Image.open(io.BytesIO(file.extractfile(member).read())).convert("RGB")  # type: ignore[union-attr]
            scale = 256 / min(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
            left, top = (image.width - 224) // 2, (image.height - 224) // 2
            taken[folder].append(np.asarray(image.crop((left, top, left + 224, top + 224))))
    images = [image for folder in CLASSES for image in taken[folder]]
    labels = [CLASSES[folder] for folder in CLASSES for _ in taken[folder]]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_accuracies_are_the_known_ones(name: str, shared_data: Path, unpacked_data: Path) -> None:
    file = f"{name}_imagenet1k_fp16.safetensors"
    known = json.loads((shared_data / "weights" / "expected_imagenet.json").read_text())[file]["fp32"]
    images, labels = photos(shared_data / "imagenette" / "imagenette160.tar", known["n"] // 10)
    assert len(images) == known["n"]
    net = create_classifier(name, weights=unpacked_data / "weights" / file).eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (net.preprocessing.mean, net.preprocessing.std))
    logits = torch.cat([net((part / 255 - mean) / std) for part in images.split(20)])
    best = logits.topk(5).indices == labels[:, None]
    ten = torch.tensor(list(CLASSES.values()))
    found = {
        "top1": best[:, 0].float().mean().item(),
        "top5": best.any(1).float().mean().item(),
        "ten_way": (ten[logits[:, ten].argmax(1)] == labels).float().mean().item(),
    }
    assert found == pytest.approx({key: known[key] for key in found}, abs=6e-5)  # they are given to four decimals
