"""What a detector's or segmenter's run keeps of a batch whose loss is not finite, and how it is run again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from detection.config import RunConfig
from detection.structures import Batch, Target
from detection.train_state import TrainState
from resbackbone.errors import InputError
from resbackbone.runtime import nonfinite
from resbackbone.runtime.precision import Precision


def stop_unless_finite(is_finite: nonfinite.Answer, losses: dict[str, Tensor], batch: Batch, state: TrainState, output: Path) -> None:
    """As resbackbone.runtime.nonfinite has it; the report names each image, its boxes and its seed."""

    def gather() -> nonfinite.Evidence:
        return nonfinite.Evidence(
            tensors=_tensors(batch),
            records=[_describe(target) for target in batch.targets],
            metadata=state.metadata,
            run=lambda: state.model(batch.images, batch.targets),
        )

    nonfinite.stop_unless_finite(is_finite, losses, state, output, gather)


def replay(folder: Path, *, load: Callable[[Path], tuple[RunConfig, nn.Module]] | None = None) -> str:
    """Run the batch of a `nonfinite/` folder again and report each loss and the first module whose output is not finite.

    load: a weights file -> the config in it and the model on the CPU; None: a detector's.
    """
    if not (folder / "batch.safetensors").is_file():
        raise InputError(f"{folder} is no nonfinite/ folder of a run: batch.safetensors is not in it")
    weights = folder / "model.safetensors"
    config, model = (load or _load_detector)(weights)
    model.train()
    report = json.loads((folder / "report.json").read_text())
    batch = _restore(load_file(folder / "batch.safetensors"), report["images"])
    precision = Precision("fp32" if config.train.precision == "fp16" else config.train.precision, torch.device("cpu"))
    with precision.autocast():
        losses = model(batch.images, batch.targets)
        bad = nonfinite.first_nonfinite_module(model, lambda: model(batch.images, batch.targets))
    return f"{_terms(losses)}; first module with an output that is not finite: {bad or 'none (the loss itself)'}"


def _load_detector(weights: Path) -> tuple[RunConfig, nn.Module]:
    from detection.predict import config_from_weights, load_detector

    config = config_from_weights(weights)
    return config, load_detector(config, weights, device=torch.device("cpu"))[0]


def _tensors(batch: Batch) -> dict[str, Tensor]:
    tensors = {f"image.{i}": image for i, image in enumerate(batch.images)}
    for i, target in enumerate(batch.targets):
        tensors |= {f"boxes.{i}": target.boxes, f"labels.{i}": target.labels, f"ignore_boxes.{i}": target.ignore_boxes}
        optional = {"masks": target.masks, "label_map": target.label_map}
        tensors |= {f"{name}.{i}": value for name, value in optional.items() if value is not None}
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def _describe(target: Target) -> dict:
    return {
        "image_id": target.image_id,
        "index": target.index,
        "seed": target.seed,
        "original_size": list(target.original_size),
        "boxes": target.boxes.tolist(),
        "labels": target.labels.tolist(),
    }


def _restore(tensors: dict[str, Tensor], records: list[dict]) -> Batch:
    targets = [
        Target(
            boxes=tensors[f"boxes.{i}"],
            labels=tensors[f"labels.{i}"],
            ignore_boxes=tensors[f"ignore_boxes.{i}"],
            masks=tensors.get(f"masks.{i}"),
            label_map=tensors.get(f"label_map.{i}"),
            image_id=record["image_id"],
            index=record["index"],
            seed=record["seed"],
            original_size=tuple(record["original_size"]),
        )
        for i, record in enumerate(records)
    ]
    return Batch(images=[tensors[f"image.{i}"] for i in range(len(records))], targets=targets)


def _terms(losses: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {float(value.detach()):g}" for name, value in losses.items())
