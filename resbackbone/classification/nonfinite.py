"""When a loss is nan or infinite: stop before the weights are touched, and leave what it takes to see why."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from resbackbone.classification.loader import Batch
from resbackbone.classification.networks import classifier_metadata, load_trained, normalizer_of
from resbackbone.classification.train_state import TrainState
from resbackbone.errors import InputError
from resbackbone.runtime import distributed
from resbackbone.runtime.checkpoint import save_weights
from resbackbone.runtime.nonfinite import NonFiniteLoss, first_nonfinite_module, write_nonfinite_report
from resbackbone.runtime.precision import Precision


def stop_unless_finite(loss: Tensor, batch: Batch, state: TrainState, output: Path) -> None:
    """Raise NonFiniteLoss on every rank when the loss of any rank is not finite.

    The last good state (no update has happened yet) is written as a checkpoint, and `nonfinite/` gets the batch, the weights, the
    images' numbers and the name of the first module whose output was not finite.
    """
    loss = loss.detach()
    finite = bool(torch.isfinite(loss))
    if not distributed.any_process(not finite):
        return
    state.save()
    folder = output / "nonfinite"
    if not finite:
        save_weights(folder / "model.safetensors", state.net.state_dict(), classifier_metadata(state.config, state.net, state.classes))
        inputs = normalizer_of(state.net).to(batch.images.device)(batch.images, batch.shifts)
        with torch.no_grad(), state.precision.autocast():
            module = first_nonfinite_module(state.net, lambda: state.net(inputs))
        write_nonfinite_report(
            output,
            step=state.step + 1,
            losses={"cross_entropy": float(loss)},
            batch={name: tensor.detach().cpu().contiguous() for name, tensor in batch._asdict().items()},
            records=[{"index": index, "label": label} for index, label in zip(batch.indices.tolist(), batch.labels.tolist(), strict=True)],
            module=module,
            command=f"python tools/train_cls.py --replay {folder}",
        )
    raise NonFiniteLoss(
        f"step {state.step + 1}: the loss is not finite ({float(loss):g}). {folder / 'report.json'} has the details, the checkpoint "
        f"of step {state.step} is intact; a lower train.lr, some train.warmup_steps or train.clip_norm often helps"
    )


def replay(folder: Path) -> str:
    """Run the batch of a `nonfinite/` folder again, in training mode; names the first module whose output is not finite."""
    if not (folder / "batch.safetensors").is_file():
        raise InputError(f"{folder} is no nonfinite/ folder of a run: batch.safetensors is not in it")
    trained, batch = load_trained(folder / "model.safetensors", None, ()), load_file(folder / "batch.safetensors")
    step, net = json.loads((folder / "report.json").read_text())["step"], trained.net.train()
    inputs = normalizer_of(net)(batch["images"], batch["shifts"])
    precision = Precision("fp32" if trained.config.train.precision == "fp16" else trained.config.train.precision, "cpu")
    with torch.no_grad(), precision.autocast():
        bad = first_nonfinite_module(net, lambda: net(inputs))
    return f"step {step}: first module with an output that is not finite: {bad or 'none (the loss itself)'}"
