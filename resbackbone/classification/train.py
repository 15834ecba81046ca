"""Training a classifier: `train(config, output)` and the loop in it, all of it visible."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resbackbone.classification.config import ClassificationConfig
from resbackbone.classification.device_decode import encoded_preparation
from resbackbone.classification.evaluate import Evaluator, Split, load_split
from resbackbone.classification.finish import announce, draw_curves, finish, log_step, report_unreadable, write_start_files
from resbackbone.classification.loader import Batch, train_loader
from resbackbone.classification.networks import build_classifier, normalizer_of
from resbackbone.classification.nonfinite import stop_unless_finite
from resbackbone.classification.recipe import BatchMixer, classification_loss, parameter_groups
from resbackbone.classification.samples import draw_samples
from resbackbone.classification.shards import ShardIndex
from resbackbone.classification.sources import check_same_classes
from resbackbone.classification.statistics import recompute_statistics, training_images
from resbackbone.classification.stream import train_stream
from resbackbone.classification.train_state import TrainState
from resbackbone.runtime import distributed
from resbackbone.runtime.checkpoint import load_checkpoint
from resbackbone.runtime.log import RunLog
from resbackbone.runtime.nonfinite import ask_if_finite
from resbackbone.runtime.optimizer import build_optimizer
from resbackbone.runtime.output import prepare_output
from resbackbone.runtime.precision import Precision
from resbackbone.runtime.random_state import deterministic, seed_everything, seed_process
from resbackbone.runtime.resume import resolve_resume
from resbackbone.runtime.schedule import scaled_lr, set_lr
from resbackbone.runtime.signals import Interrupted, SignalGuard
from resbackbone.runtime.timing import StepTimer, bottleneck_sentence
from resbackbone.sync_norm import synchronize_on_cpu


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run leaves: the figures of its last evaluation, and where things lie."""

    metrics: dict[str, float]
    weights: Path
    output: Path


def train(config: ClassificationConfig, output: Path, *, resume: str | None = None) -> TrainResult:
    """Train as `config` says, evaluating on the way; every file of the run goes into `output`.

    resume: None, "auto" (the newest checkpoint that is whole, if any) or the path of a checkpoint. Raises InputError for wrong
    input before the first step, NonFiniteLoss when a loss is nan or infinite, Interrupted after SIGTERM, SIGUSR1 or SIGINT.
    """
    with SignalGuard() as signals, deterministic(config.train.deterministic):
        process = distributed.setup(None if config.train.device == "auto" else config.train.device)
        try:
            distributed.on_main(lambda: prepare_output(output, resume=resume))
            return _run(config, output, resume, process, signals)
        finally:
            distributed.shutdown()


def _run(config: ClassificationConfig, output: Path, resume: str | None, process: distributed.Process, signals: SignalGuard) -> TrainResult:
    settings = config.train
    seed_everything(settings.seed)
    train_split, val_split = load_split(config, config.data.train), load_split(config, config.data.val)
    check_same_classes(train_split.classes, val_split.classes)
    net = build_classifier(config, len(train_split.classes))
    if process.device.type == "cpu":
        synchronize_on_cpu(net)
    net = net.to(process.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # what images come in
    base_lr = scaled_lr(settings.lr, batch=settings.batch_size * settings.accumulate, reference_batch=settings.reference_batch)
    groups = parameter_groups(net, weight_decay=settings.weight_decay, decay_norms_and_biases=settings.decay_norms_and_biases)
    loader, sampler = open_training_data(config, train_split, process)
    state = TrainState(
        config,
        net,
        optimizer=build_optimizer(net, settings, lr=base_lr, groups=groups),
        precision=Precision(settings.precision, process.device),
        sampler=sampler,
        folder=output / "checkpoints",
        classes=train_split.classes,
    )
    seed_process(settings.seed, process.rank)
    checkpoint = resolve_resume(resume, output / "checkpoints")
    if checkpoint is not None:
        state.restore(load_checkpoint(checkpoint), checkpoint)
    evaluator = Evaluator(config, val_split, process=process, precision=state.precision, signals=signals)
    log = RunLog(output, total_steps=settings.steps, main=process.is_main, resume_step=state.step, evaluated_step=state.evaluated_step)
    with contextlib.closing(log):
        if process.is_main:
            write_start_files(output, config)
        announce(log, state, train_images=train_split.size, val_images=val_split.size, base_lr=base_lr, checkpoint=checkpoint)
        try:
            timer = _loop(state, loader, train_split, evaluator, log, signals, process, base_lr=base_lr, output=output)
        except Interrupted:
            state.save()
            log.message(f"stopped by a signal at step {state.step}; `--resume auto` goes on from its checkpoint")
            raise
        report_unreadable(log, loader)
        device, workers = process.device.type, config.data.workers
        log.message(bottleneck_sentence(timer.total(), workers=workers, device=device, size_setting="data.size"))
        return TrainResult(metrics=state.metrics, weights=finish(state, output, log), output=output)


def _loop(
    state: TrainState,
    loader: Any,
    train_split: Split,
    evaluator: Evaluator,
    log: RunLog,
    signals: SignalGuard,
    process: distributed.Process,
    *,
    base_lr: float,
    output: Path,
) -> StepTimer:
    """One optimiser step a turn: data, forward, backward, optimiser; then log, evaluate, save, as the step number says."""
    settings, device, precision = state.config.train, process.device, state.precision
    model, normalize = distributed.parallel(state.model, process), normalizer_of(state.model).to(device)
    mix = BatchMixer(settings, len(state.classes))
    if settings.compile:
        state.model.compile()
    timer = StepTimer(device)
    state.model.train()
    with contextlib.closing(iter(loader)) as batches:
        while True:
            if state.is_evaluation_due:
                _evaluate(state, evaluator, train_split, log, process, base_lr=base_lr)
                timer.restart()
            if state.is_finished:
                return timer
            lr = base_lr * state.rate_factor
            set_lr(state.optimizer, lr)
            mean_loss = torch.zeros((), device=device)
            for turn in range(settings.accumulate):
                with timer.part("data"):
                    batch: Batch = next(batches).to(device)
                is_last = turn + 1 == settings.accumulate
                with contextlib.nullcontext() if is_last else distributed.without_sync(model):
                    with timer.part("forward"), precision.autocast():
                        images, labels = mix(normalize(batch.images, batch.shifts), batch.labels, number=state.sampler.batches_done + turn)
                        if state.step == turn == 0 and process.is_main:
                            draw_samples(output / "samples", images, labels, state.classes, normalize, count=settings.samples)
                        logits = model(images)
                        loss = classification_loss(logits, labels, label_smoothing=settings.label_smoothing)
                    is_finite = ask_if_finite([loss])
                    with timer.part("backward"):
                        precision.scaler.scale(loss / settings.accumulate).backward()
                stop_unless_finite(is_finite, loss, images, batch, state, output)
                state.count(logits, labels)
                mean_loss += loss.detach() / settings.accumulate
            with timer.part("optimizer"):
                state.update()
            timer.count(settings.batch_size * settings.accumulate)
            if state.step % settings.log_every == 0 or state.step == 1:
                log_step(log, state, mean_loss, lr=lr, window=timer.window(), device=device)
            if state.step % settings.save_every == 0:
                state.save()  # before the evaluation, which a kill may cut short; it is made up for on resuming
            if distributed.any_process(signals.requested is not None):
                raise Interrupted(signals.requested or 143)


def open_training_data(config: ClassificationConfig, split: Split, process: distributed.Process) -> tuple[Any, Any]:
    """(loader, sampler) of a training split: at random access, or streamed from shards."""
    preparation = encoded_preparation(config, process.device) if config.data.decode == "gpu" else None
    if isinstance(split.data, ShardIndex):
        return train_stream(config, split.data, process, preparation=preparation)
    return train_loader(config, split.data, process, preparation=preparation)


def _evaluate(
    state: TrainState, evaluator: Evaluator, train_split: Split, log: RunLog, process: distributed.Process, *, base_lr: float
) -> None:
    if state.is_finished:
        _recompute_statistics(state, train_split, log, process)
    log.message(f"evaluating step {state.step}")
    distributed.copy_from_main(state.evaluated_model.buffers())  # each process's running statistics are its own
    metrics = evaluator.evaluate([state.evaluated_model])
    state.model.train()
    log.metrics(state.step, **{f"eval/{name}": value for name, value in metrics.items()})
    log.message(f"step {state.step}: top-1 {metrics['top1']:.4f}, top-5 {metrics['top5']:.4f}")
    state.record(metrics, "top1")
    if process.is_main:
        draw_curves(state.folder.parent)  # a run of days is looked at on the way
    if state.is_rate_divided:
        log.message(f"the error has stopped falling: learning rate divided by 10, now {base_lr * state.rate_factor:g}")


def _recompute_statistics(state: TrainState, split: Split, log: RunLog, process: distributed.Process) -> None:
    """Appendix A: batch norm's statistics over the training set, with the final weights."""
    if state.config.train.bn_images == 0:
        return
    loader, sampler = open_training_data(state.config, split, process)
    normalize = normalizer_of(state.model).to(process.device)
    seen = training_images(loader, sampler, state.config.train, normalize, process.device)
    with state.precision.autocast():
        images = recompute_statistics(state.evaluated_model, seen)
    log.message(f"batch norm's statistics computed anew over {images} training images")
