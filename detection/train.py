"""Training a detector: `train(config, output)` and the loop in it, all of it visible.

To the loss from here: config.py builds the detector, faster_rcnn.py tells its story, rpn.py and roi_head.py sample, losses.py sums.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from detection.build import build_detector, resolved_config
from detection.config import DetectionConfig, chosen_device, load_split, train_loader
from detection.data.loader import BatchLoader
from detection.data.source import check_same_classes
from detection.faster_rcnn import FasterRCNN, check_boxes
from detection.fine_tune import detector_from
from detection.finish import announce, finish, log_step, write_start_files
from detection.nonfinite import stop_unless_finite
from detection.out_of_memory import explain_out_of_memory
from detection.predict import detector_metadata
from detection.train_state import TrainState
from detection.validate import Validator
from resbackbone.runtime import distributed
from resbackbone.runtime.checkpoint import load_checkpoint
from resbackbone.runtime.log import RunLog
from resbackbone.runtime.nonfinite import ask_if_finite
from resbackbone.runtime.optimizer import build_optimizer
from resbackbone.runtime.output import prepare_output
from resbackbone.runtime.precision import Precision
from resbackbone.runtime.random_state import deterministic, seed_everything, seed_process
from resbackbone.runtime.resume import resolve_resume
from resbackbone.runtime.schedule import lr_factor, scaled_lr, set_lr
from resbackbone.runtime.signals import Interrupted, SignalGuard
from resbackbone.runtime.timing import StepTimer, bottleneck_sentence


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run leaves: the figures of its last evaluation, the one that counts, and where things lie."""

    metrics: dict[str, float]
    primary: str
    weights: Path
    output: Path


class Judge(Protocol):
    """What evaluates a model while it is trained; `primary` names the figure that counts."""

    primary: str

    def evaluate(self, model: nn.Module, /) -> dict[str, float]: ...


def train(
    config: DetectionConfig, output: Path, *, resume: str | None = None, prepare: Callable[[FasterRCNN], FasterRCNN] | None = None
) -> TrainResult:
    """Train as `config` says, evaluating on the way; every file of the run goes into `output`.

    resume: None, "auto" (the newest checkpoint that is whole, if any) or the path of a checkpoint. prepare: what becomes of the new
    detector before it learns (alternating.py); None: nothing, all of it learns jointly. Raises InputError for wrong
    input before the first step, NonFiniteLoss when a loss is nan or infinite, Interrupted after SIGTERM, SIGUSR1 or SIGINT.
    """
    with SignalGuard() as signals, deterministic(config.train.deterministic):
        process = distributed.setup(chosen_device(config))
        try:
            distributed.on_main(lambda: prepare_output(output, resume=resume))
            return _run(config, output, resume, prepare or (lambda detector: detector), process, signals)
        finally:
            distributed.shutdown()


def _run(
    config: DetectionConfig,
    output: Path,
    resume: str | None,
    prepare: Callable[[FasterRCNN], FasterRCNN],
    process: distributed.Process,
    signals: SignalGuard,
) -> TrainResult:
    settings = config.train
    seed_everything(settings.seed)
    train_source, val_source = load_split(config, "train"), load_split(config, "val")
    check_same_classes(train_source, val_source)
    classes, checkpoint = train_source.annotations.classes, resolve_resume(resume, output / "checkpoints")
    detector, taken_over = _start(config, classes, checkpoint)
    detector = prepare(detector.to(process.device))
    config = resolved_config(config, detector)
    if settings.channels_last:
        detector = detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    base_lr = scaled_lr(settings.lr, batch=settings.batch_size * settings.accumulate, reference_batch=settings.reference_batch)
    loader, sampler = train_loader(config, train_source, process)
    state = TrainState(
        config,
        detector,
        optimizer=build_optimizer(detector, settings, lr=base_lr),
        precision=Precision(settings.precision, process.device),
        sampler=sampler,
        folder=output / "checkpoints",
        classes=classes,
        metadata=detector_metadata(config, classes, detector),
        tool="train_det",
    )
    seed_process(settings.seed, process.rank)
    if checkpoint is not None:
        state.restore(load_checkpoint(checkpoint), checkpoint)
    validator = Validator(config, val_source, process=process, precision=state.precision, signals=signals)
    log = RunLog(output, total_steps=settings.steps, main=process.is_main, resume_step=state.step, evaluated_step=state.evaluated_step)
    with contextlib.closing(log):
        if process.is_main:
            write_start_files(output, config)
        announce(log, config, state, train_source, val_source, base_lr=base_lr, checkpoint=checkpoint, taken_over=taken_over)
        try:
            timer = run_loop(state, loader, validator, log, signals, process, base_lr=base_lr, output=output)
        except Interrupted:
            state.save()
            log.message(f"stopped by a signal at step {state.step}; `--resume auto` goes on from its checkpoint")
            raise
        if unreadable := loader.unreadable_images():
            log.message(f"{len(unreadable)} training images could not be read and others took their place; tools/check_data.py names them")
        device, workers = process.device.type, config.data.workers
        log.message(bottleneck_sentence(timer.total(), workers=workers, device=device, size_setting="data.min_size"))
        weights = finish(state, validator, output, log, samples=config.eval.samples, report=config.eval.report)
        return TrainResult(metrics=state.metrics, primary=validator.primary, weights=weights, output=output)


def _start(config: DetectionConfig, classes: Sequence[str], checkpoint: Path | None) -> tuple[FasterRCNN, list[str]]:
    """The detector a run begins with, from a backbone's weights or a whole detector's, and what to say of the latter."""
    if config.model.weights is None:
        return build_detector(config, len(classes)), []
    return detector_from(config, classes, checkpoint=checkpoint)


def run_loop(
    state: TrainState,
    loader: BatchLoader,
    validator: Judge,
    log: RunLog,
    signals: SignalGuard,
    process: distributed.Process,
    *,
    base_lr: float,
    output: Path,
) -> StepTimer:
    """One optimiser step a turn: data, forward, backward, optimiser; then log, evaluate, save, as the step number says.

    A segmenter is trained by the same loop: a model is called with images and targets and gives its losses by name.
    """
    settings, device, precision = state.config.train, process.device, state.precision
    model = distributed.parallel(state.model, process)
    if settings.compile:
        state.model.get_submodule("backbone").compile()
    timer, batches = StepTimer(device), iter(loader)
    explained = functools.partial(explain_out_of_memory, config=state.config, model=state.model)
    while True:
        if state.is_evaluation_due:
            log.message(f"evaluating step {state.step}")
            metrics = validator.evaluate(state.evaluated_model)
            log.metrics(state.step, **{f"eval/{name}": value for name, value in metrics.items()})
            log.message(f"step {state.step}: {validator.primary} {metrics[validator.primary]:.4f}")
            state.record(metrics, validator.primary)
            timer.restart()
        if state.is_finished:
            return timer
        factor = lr_factor(
            state.step, steps=settings.steps, warmup_steps=settings.warmup_steps, schedule=settings.schedule, milestones=settings.milestones
        )
        set_lr(state.optimizer, base_lr * factor)
        for turn in range(settings.accumulate):
            is_last = turn + 1 == settings.accumulate
            with timer.part("data"):
                batch = next(batches)
                check_boxes(batch.targets)  # while they are on the host
                with explained(batch):
                    batch = batch.to(device)
            with contextlib.nullcontext() if is_last else distributed.without_sync(model), explained(batch):
                with timer.part("forward"), precision.autocast():
                    losses: dict[str, Tensor] = model(batch.images, batch.targets)
                    loss = torch.stack(list(losses.values())).sum() / settings.accumulate
                is_finite = ask_if_finite(losses.values())
                with timer.part("backward"):
                    precision.scaler.scale(loss).backward()
            stop_unless_finite(is_finite, losses, batch, state, output)
        with timer.part("optimizer"), explained(batch):  # the first step makes the optimiser's state
            state.update()
        timer.count(settings.batch_size * settings.accumulate)
        if state.step % settings.log_every == 0 or state.step == 1:
            log_step(log, state, losses, lr=base_lr * factor, window=timer.window(), device=device)
        if state.step % settings.save_every == 0:
            state.save()  # before the evaluation, which a kill may cut short; it is made up for on resuming
        if distributed.any_process(signals.requested is not None):
            raise Interrupted(signals.requested or 143)
