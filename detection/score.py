"""A trained detector judged on its validation split: what eval_coco and eval_voc run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from detection.config import DetectionConfig, chosen_device, load_detection_config, load_split
from detection.data.source import Source
from detection.evaluation.report.report import Show, Wrote, judge_other, report_folder, report_records, run_name
from detection.finish import write_evaluation
from detection.predict import load_detectors
from detection.validate import Validator
from resbackbone.errors import InputError
from resbackbone.runtime import distributed
from resbackbone.runtime.config import changed_settings
from resbackbone.runtime.output import prepare_output
from resbackbone.runtime.precision import Precision

FIGURES_HANG_ON = ("model.test.", "model.head:", "model.backbone.name:", "data.val:", "data.min_size:", "data.max_size:", "train.seed:")


def evaluate_weights(
    configs: DetectionConfig | Sequence[DetectionConfig],
    weights: Path | Sequence[Path],
    *,
    output: Path | None = None,
    report: Path | None = None,
    compare: Path | None = None,
    metric: Literal["coco", "voc"] | None = None,
    log: Callable[[str], None] = print,
    show: Show = lambda figures: None,
    wrote: Wrote = lambda what, path: None,
) -> dict[str, float]:
    """Run a trained detector, or the ensemble of several, over the validation split of the first config and score it.

    Under torchrun each process takes its share. Writes eval/detections.json and eval/metrics.json below `output` where one is given, and
    the page report/index.html (else output/report's, unless eval.report is off). compare: other detections to show there, or a run's.
    metric: "voc" where the data must be VOC's. show: is given the figures on the main process before anything is written;
    wrote: each file after. What is wrong with any of them, or with where they are to go, raises InputError before the detector runs.
    """
    config, *_ = configs = [configs] if isinstance(configs, DetectionConfig) else list(configs)
    paths = [weights] if isinstance(weights, Path) else list(weights)
    process = distributed.setup(chosen_device(config))
    try:
        page = report_folder(report, output if config.eval.report else None, compare=compare)
        source, other = load_split(config, "val"), None
        if metric is not None and source.metric != metric:
            raise InputError(f"data.kind={config.data.kind} has none of {metric.upper()}'s figures; tools/eval_coco.py prints COCO's")
        detector, classes = load_detectors(configs, paths, device=process.device)
        _check_classes(paths[0], classes, source)
        if process.is_main:
            for folder in (output, page):
                if folder is not None:
                    prepare_output(folder, resume="auto")  # a run may be in it
            if output is not None:
                _check_own_run(output, configs)
            other = None if compare is None else judge_other(source, compare, engine=config.eval.engine)
        if process.is_main:
            for path, one in zip(paths, configs, strict=True):
                log(f"{path}: {one.model.backbone.name} {one.model.head} on {len(source.annotations)} images")
        validator = Validator(config, source, process=process, precision=Precision(config.train.precision, process.device))
        metrics = validator.evaluate(detector, with_loss=False)
        if process.is_main:
            show(metrics)
            if output is not None:
                wrote("figures", write_evaluation(output, source, validator.records, metrics))
            if page is not None:
                name, options = run_name(output or paths[0].parent), {"figures": metrics, "compare": other, "engine": config.eval.engine}
                wrote("report", report_records(page, source, validator.records, name=name, **options))
        return metrics
    finally:
        distributed.shutdown()


def _check_own_run(output: Path, configs: Sequence[DetectionConfig]) -> None:
    """Raises InputError where `output` holds a run whose own figures these aren't: compare_backbones would take them for such."""
    if not (output / "config.yaml").is_file():
        return
    changes = [f"{len(configs)} detectors together"] if len(configs) > 1 else []
    changed = changed_settings(load_detection_config(output / "config.yaml"), configs[0])
    changes += [change for change in changed if change.startswith(FIGURES_HANG_ON)]
    if changes:
        raise InputError(
            f"--output {output} holds a training whose figures would be replaced by those of another test ({'; '.join(changes[:4])}); "
            "give a folder of its own"
        )


def _check_classes(weights: Path, known: Sequence[str], source: Source) -> None:
    """Raises InputError with the first class in which weights and data differ."""
    given = source.annotations.classes
    for number, (ours, theirs) in enumerate(zip_longest(known, given), 1):
        if ours != theirs:
            raise InputError(
                f"{weights} knows {len(known)} classes, the data has {len(given)}; the first that differs is number {number}: "
                f"{_quoted(ours)} in the weights, {_quoted(theirs)} in the data. Give the data it was trained for, or train from it "
                "by model.weights"
            )


def _quoted(name: str | None) -> str:
    return "none" if name is None else f"'{name}'"
