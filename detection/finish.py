"""What a run leaves behind beside its checkpoints: resolved config, environment, final weights, detections, figures, drawn samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from detection.config import RunConfig
from detection.data.source import Source, readable
from detection.draw import draw_detections, save_image
from detection.evaluation.report.report import report_records, run_name
from detection.evaluation.results import Record, metrics_text, write_metrics, write_results
from detection.train_state import TrainState
from detection.validate import Validator
from resbackbone.backbone import Backbone
from resbackbone.runtime import distributed
from resbackbone.runtime.checkpoint import save_weights
from resbackbone.runtime.config import save_config
from resbackbone.runtime.log import RunLog, write_environment
from resbackbone.runtime.timing import Window, peak_memory_mb

_SPLIT_NAMES = {"data": "data_wait", "forward": "forward", "backward": "backward", "optimizer": "optimizer"}  # shares of the time


def write_start_files(output: Path, config: RunConfig) -> None:
    """config.yaml (everything resolved) and environment.json: known before the first step, so that even a failed run explains itself."""
    save_config(config, output / "config.yaml")
    write_environment(output, seed=config.train.seed)


def announce(
    log: RunLog,
    config: RunConfig,
    state: TrainState,
    train: Source,
    val: Source,
    *,
    base_lr: float,
    checkpoint: Path | None,
    taken_over: Sequence[str] = (),
) -> None:
    """Say what is about to happen: data, learning rate as it becomes, trainable parameters, where it starts; and of what weights."""
    settings = config.train
    trainable = sum(parameter.numel() for parameter in state.model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in state.model.parameters())
    log.message(f"train: {describe_split(train)}")
    log.message(f"val: {describe_split(val)}")
    log.message(f"{config.model.backbone.name} {config.model.head}: {total / 1e6:.1f} M parameters, {trainable / 1e6:.1f} M learn")
    report = next((module.load_report for module in state.model.modules() if isinstance(module, Backbone)), "")
    if report:
        log.message(f"backbone weights {config.model.backbone.weights}: {report}")
    for line in taken_over:
        log.message(line)
    images = settings.batch_size * settings.accumulate
    log.message(f"learning rate {settings.lr:g} for {settings.reference_batch} images a step → {base_lr:g} for {images}")
    if checkpoint is not None:
        log.message(f"resumed at step {state.step} from {checkpoint}")
        for change in state.changed_settings:
            log.message(f"changed since that checkpoint: {change}")


def describe_split(source: Source) -> str:
    """How many images, objects and classes a split has, and how many objects are set aside as crowd or difficult."""
    annotations = source.annotations
    ignored = int(annotations.ignore.sum())
    empty = int((annotations.num_objects() == 0).sum())
    return (
        f"{len(annotations)} images ({empty} without objects), {len(annotations.labels) - ignored} objects "
        f"(+ {ignored} crowd or difficult) of {len(annotations.classes)} classes"
    )


def log_step(log: RunLog, state: TrainState, losses: dict[str, Tensor], *, lr: float, window: Window, device: torch.device) -> None:
    """One line of progress for people, one of metrics.jsonl for programs; loss terms are means over processes."""
    names, values = list(losses), torch.stack([value.detach().float() for value in losses.values()])
    terms = dict(zip(names, distributed.mean_across_processes(values).tolist(), strict=True))
    memory_mb, left = peak_memory_mb(device), state.config.train.steps - state.step
    images_a_step = state.config.train.batch_size * state.config.train.accumulate
    log.metrics(
        state.step,
        **terms,
        loss=sum(terms.values()),
        lr=lr,
        images_per_s=round(window.images_per_s, 3),
        **{_SPLIT_NAMES[name]: round(share, 4) for name, share in window.split.items()},
        memory_mb=round(memory_mb, 1),
    )
    eta_s = left * images_a_step / max(window.images_per_s, 1e-9)
    log.progress(state.step, losses=terms, images_per_s=window.images_per_s, split=window.split, memory_mb=memory_mb, eta_s=eta_s)


def finish(state: TrainState, validator: Validator, output: Path, log: RunLog, *, samples: int, report: bool) -> Path:
    """Write the last checkpoint, model_final.safetensors, eval/, samples/ and, where asked for, report/; returns the weights' path.

    A run that died after its last evaluation, before these were written, has lost its detections: it evaluates again.
    """
    is_lost = distributed.is_main() and not validator.records and not is_written(output, state.metrics, report=report)
    if distributed.any_process(is_lost):
        log.message(f"eval/ lacks the evaluation of step {state.step}; evaluating again")
        state.metrics = validator.evaluate(state.evaluated_model)
    state.save()
    weights = output / "model_final.safetensors"
    if distributed.is_main():
        save_weights(weights, state.evaluated_model.state_dict(), state.metadata)
        if validator.records:  # empty where a finished run was resumed: its files are there already
            draw_samples(output / "samples", validator.source, validator.records, count=samples)
            write_evaluation(output, validator.source, validator.records, state.metrics)
            if report:
                options = {"figures": state.metrics, "engine": validator.engine}
                page = report_records(output / "report", validator.source, validator.records, name=run_name(output), **options)
                log.message(f"report: {page}")
        log.message(f"weights: {weights}")
    distributed.barrier()
    return weights


def is_written(output: Path, metrics: dict[str, float], *, report: bool) -> bool:
    """Whether the files of the evaluation with these figures are there: metrics.json, written after samples/, holds them."""
    figures, others = output / "eval" / "metrics.json", ["eval/detections.json", *(["report/index.html"] if report else [])]
    is_ours = figures.is_file() and figures.read_text() == metrics_text(metrics)
    return is_ours and all((output / name).is_file() for name in others)


def write_evaluation(output: Path, source: Source, records: list[Record], metrics: dict[str, float]) -> Path:
    """eval/detections.json in the benchmark's own format and eval/metrics.json, whose path is returned."""
    write_results(output / "eval" / "detections.json", source, records)
    return write_metrics(output, metrics)


def draw_samples(folder: Path, source: Source, records: list[Record], *, count: int, threshold: float = 0.5) -> None:
    """Draw detections above `threshold` and the truth into the first `count` validation images that have objects and can be read."""
    folder.mkdir(parents=True, exist_ok=True)
    annotations = source.annotations
    by_index = {record.index: record for record in records}
    with_objects = [index for index in sorted(by_index) if annotations.num_objects()[index]]
    for index, image in islice(readable(source, with_objects), count):
        record, truth = by_index[index], annotations.boxes[annotations.of_image(index)]
        picture = draw_detections(image, record.detections, annotations.classes, threshold=threshold, truth=truth)
        save_image(folder / f"{record.image_id}.jpg", picture)
