"""What a run leaves behind beside its checkpoints: resolved config, environment, final weights, figures and the error curves."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resbackbone.classification.config import ClassificationConfig
from resbackbone.classification.networks import classifier_metadata
from resbackbone.classification.train_state import TrainState
from resbackbone.runtime import distributed
from resbackbone.runtime.atomic import write_atomically
from resbackbone.runtime.checkpoint import save_weights
from resbackbone.runtime.config import save_config
from resbackbone.runtime.log import METRICS_FILE, RunLog, to_json, write_environment
from resbackbone.runtime.timing import Window, peak_memory_mb

_SPLIT_NAMES = {"data": "data_wait", "forward": "forward", "backward": "backward", "optimizer": "optimizer"}  # shares of the time


def write_start_files(output: Path, config: ClassificationConfig) -> None:
    """config.yaml (everything resolved) and environment.json: known before the first step, so that even a failed run explains itself."""
    save_config(config, output / "config.yaml")
    write_environment(output, seed=config.train.seed)


def announce(log: RunLog, state: TrainState, *, train_images: int, val_images: int, base_lr: float, checkpoint: Path | None) -> None:
    """Say what is about to happen: data, parameters, learning rate as it becomes, where it starts."""
    config, settings = state.config, state.config.train
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    images = settings.batch_size * settings.accumulate
    log.message(f"train: {train_images} images, val: {val_images} images, {len(state.classes)} classes")
    log.message(f"{config.model.name}: {parameters / 1e6:.2f} M parameters")
    if state.model.load_report:
        log.message(f"weights {config.model.weights}: {state.model.load_report}")
    log.message(f"learning rate {settings.lr:g} for {settings.reference_batch} images a step → {base_lr:g} for {images}")
    log.message(f"{settings.steps} steps are {settings.steps * images / max(1, train_images):.1f} epochs")
    if checkpoint is not None:
        log.message(f"resumed at step {state.step} (epoch {state.sampler.epoch:.2f}) from {checkpoint}")
        for change in state.changed_settings:
            log.message(f"changed since that checkpoint: {change}")


def log_step(log: RunLog, state: TrainState, loss: Tensor, *, lr: float, window: Window, device: torch.device) -> None:
    """One line of progress for people, one of metrics.jsonl for programs; the loss is the mean over processes."""
    mean_loss = float(distributed.mean_across_processes(loss.detach().float()))
    error, memory_mb = state.take_training_error(), peak_memory_mb(device)
    log.metrics(
        state.step,
        loss=mean_loss,
        train_error=error,
        lr=lr,
        epoch=round(state.sampler.epoch, 4),
        images_per_s=round(window.images_per_s, 3),
        **{_SPLIT_NAMES[name]: round(share, 4) for name, share in window.split.items()},
        memory_mb=round(memory_mb, 1),
    )
    images = (state.config.train.steps - state.step) * state.config.train.batch_size * state.config.train.accumulate
    eta_s = images / max(window.images_per_s, 1e-9)
    losses = {"cross_entropy": mean_loss}
    log.progress(state.step, losses=losses, images_per_s=window.images_per_s, split=window.split, memory_mb=memory_mb, eta_s=eta_s)


def report_unreadable(log: RunLog, loader: Any) -> None:
    """Say how many training images could not be read, if any, over all processes: every one must call this."""
    counts = distributed.gather_objects(loader.unreadable())
    if sum(counts):
        summed = f" (each of {len(counts)} processes counts those it met)" if len(counts) > 1 else ""
        log.message(f"{sum(counts)} training images could not be read; others took their place{summed}")


def finish(state: TrainState, output: Path, log: RunLog) -> Path:
    """Write the last checkpoint, model_final.safetensors, eval/metrics.json and curves.png; returns the weights' path."""
    state.save()
    weights = output / "model_final.safetensors"
    if distributed.is_main():
        net = state.evaluated_model
        save_weights(weights, net.state_dict(), classifier_metadata(state.config, state.model, state.classes))
        write_atomically(output / "eval" / "metrics.json", to_json(state.metrics, indent=2).encode())
        draw_curves(output)
        log.message(f"weights: {weights}")
    distributed.barrier()
    return weights


def draw_curves(output: Path) -> Path:
    """curves.png as in the paper's Figure 4: training error thin and dashed, validation error bold, in %, over iterations.

    Drawn from metrics.jsonl as far as the run has come, in a fraction of a second.
    """
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (output / METRICS_FILE).read_text().splitlines()]
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for key, style, width, label in (("train_error", "--", 0.8, "training"), ("eval/error", "-", 2.0, "validation")):
        points = [(row["step"], 100 * row[key]) for row in rows if isinstance(row.get(key), float)]
        if points:
            steps, errors = zip(*points, strict=True)
            marker = "." if len(points) == 1 else ""
            axes.plot(steps, errors, linestyle=style, linewidth=width, marker=marker, label=label, color="tab:red")
    axes.set(xlabel="iteration", ylabel="error (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()
    picture, path = io.BytesIO(), output / "curves.png"
    figure.savefig(picture, format="png", dpi=100)
    write_atomically(path, picture.getvalue())  # somebody may be looking at it
    return path
