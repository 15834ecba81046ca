"""What a classifier's run keeps of a batch whose loss is not finite, and how it is run again."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from resbackbone.classification.loader import Batch
from resbackbone.classification.networks import classifier_metadata, load_trained
from resbackbone.classification.train_state import TrainState
from resbackbone.errors import InputError
from resbackbone.runtime import nonfinite
from resbackbone.runtime.precision import Precision


def stop_unless_finite(is_finite: nonfinite.Answer, loss: Tensor, images: Tensor, batch: Batch, state: TrainState, output: Path) -> None:
    """As resbackbone.runtime.nonfinite has it. images: what the network saw, normalised and mixed."""

    def gather() -> nonfinite.Evidence:
        numbers = zip(batch.indices.tolist(), batch.labels.tolist(), strict=True)
        return nonfinite.Evidence(
            tensors={"images": images, "labels": batch.labels, "indices": batch.indices},
            records=[{"index": index, "label": label} for index, label in numbers],
            metadata=classifier_metadata(state.config, state.model, state.classes),
            run=lambda: state.model(images),
        )

    nonfinite.stop_unless_finite(is_finite, {"cross_entropy": loss}, state, output, gather)


def replay(folder: Path) -> str:
    """Run the batch of a `nonfinite/` folder again, in training mode; names the first module whose output is not finite."""
    if not (folder / "batch.safetensors").is_file():
        raise InputError(f"{folder} is no nonfinite/ folder of a run: batch.safetensors is not in it")
    trained, images = load_trained(folder / "model.safetensors", None, ()), load_file(folder / "batch.safetensors")["images"]
    step, net = json.loads((folder / "report.json").read_text())["step"], trained.net.train()
    precision = Precision("fp32" if trained.config.train.precision == "fp16" else trained.config.train.precision, "cpu")
    with torch.no_grad(), precision.autocast():
        bad = nonfinite.first_nonfinite_module(net, lambda: net(images))
    return f"step {step}: first module with an output that is not finite: {bad or 'none (the loss itself)'}"
