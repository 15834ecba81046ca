"""Training a segmenter: `train(config, output)`. The loop is detection's own, and all of it visible there (`run_loop`).

To the loss from here: build.py builds the segmenter, segmenter.py tells its story and has the loss.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from detection.config import chosen_device
from detection.data.source import check_same_classes
from detection.finish import announce, write_start_files
from detection.segmentation.build import build_segmenter, resolved_config
from detection.segmentation.config import SegmentationConfig, check_share
from detection.segmentation.data import load_split, train_loader
from detection.segmentation.finish import finish
from detection.segmentation.predict import segmenter_metadata
from detection.segmentation.validate import SegmentationValidator
from detection.train import TrainResult, run_loop
from detection.train_state import TrainState
from resbackbone.runtime import distributed
from resbackbone.runtime.checkpoint import load_checkpoint
from resbackbone.runtime.log import RunLog
from resbackbone.runtime.optimizer import build_optimizer
from resbackbone.runtime.output import prepare_output
from resbackbone.runtime.precision import Precision
from resbackbone.runtime.random_state import deterministic, seed_everything, seed_process
from resbackbone.runtime.resume import resolve_resume
from resbackbone.runtime.schedule import scaled_lr
from resbackbone.runtime.signals import Interrupted, SignalGuard
from resbackbone.runtime.timing import bottleneck_sentence


def train(config: SegmentationConfig, output: Path, *, resume: str | None = None) -> TrainResult:
    """Train as `config` says, evaluating on the way; every file of the run goes into `output`.

    resume: None, "auto" (the newest checkpoint that is whole, if any) or the path of a checkpoint. Raises InputError for wrong
    input before the first step, NonFiniteLoss when a loss is nan or infinite, Interrupted after SIGTERM, SIGUSR1 or SIGINT.
    """
    with SignalGuard() as signals, deterministic(config.train.deterministic):
        process = distributed.setup(chosen_device(config))
        try:
            if config.model.head == "deeplabv3":
                check_share(config.train.batch_size, process.world_size)
            distributed.on_main(lambda: prepare_output(output, resume=resume))
            return _run(config, output, resume, process, signals)
        finally:
            distributed.shutdown()


def _run(config: SegmentationConfig, output: Path, resume: str | None, process: distributed.Process, signals: SignalGuard) -> TrainResult:
    settings = config.train
    seed_everything(settings.seed)
    train_source, val_source = load_split(config, "train"), load_split(config, "val")
    check_same_classes(train_source, val_source)
    classes = train_source.annotations.classes
    segmenter = build_segmenter(config, len(classes)).to(process.device)
    config = resolved_config(config, segmenter)
    if settings.channels_last:
        segmenter = segmenter.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    base_lr = scaled_lr(settings.lr, batch=settings.batch_size * settings.accumulate, reference_batch=settings.reference_batch)
    loader, sampler = train_loader(config, train_source, process)
    state = TrainState(
        config,
        segmenter,
        optimizer=build_optimizer(segmenter, settings, lr=base_lr),
        precision=Precision(settings.precision, process.device),
        sampler=sampler,
        folder=output / "checkpoints",
        classes=classes,
        metadata=segmenter_metadata(config, classes, segmenter),
        tool="train_seg",
    )
    seed_process(settings.seed, process.rank)
    checkpoint = resolve_resume(resume, output / "checkpoints")
    if checkpoint is not None:
        state.restore(load_checkpoint(checkpoint), checkpoint)
    validator = SegmentationValidator(config, val_source, process=process, precision=state.precision, signals=signals)
    log = RunLog(output, total_steps=settings.steps, main=process.is_main, resume_step=state.step, evaluated_step=state.evaluated_step)
    with contextlib.closing(log):
        if process.is_main:
            write_start_files(output, config)
        announce(log, config, state, train_source, val_source, base_lr=base_lr, checkpoint=checkpoint)
        try:
            timer = run_loop(state, loader, validator, log, signals, process, base_lr=base_lr, output=output)
        except Interrupted:
            state.save()
            log.message(f"stopped by a signal at step {state.step}; `--resume auto` goes on from its checkpoint")
            raise
        device, workers = process.device.type, config.data.workers
        log.message(bottleneck_sentence(timer.total(), workers=workers, device=device, size_setting="data.min_size"))
        weights = finish(state, validator, output, log)
        return TrainResult(metrics=state.metrics, primary=validator.primary, weights=weights, output=output)
