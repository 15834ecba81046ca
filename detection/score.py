"""A trained detector judged on its validation split: what eval_coco and eval_voc run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from detection.config import DetectionConfig, chosen_device, load_split
from detection.evaluation.report.report import report_folder, report_records, run_name
from detection.finish import write_evaluation
from detection.predict import load_detectors
from detection.validate import Validator
from resbackbone.errors import InputError
from resbackbone.runtime import distributed
from resbackbone.runtime.precision import Precision


def evaluate_weights(
    configs: DetectionConfig | Sequence[DetectionConfig],
    weights: Path | Sequence[Path],
    *,
    output: Path | None = None,
    report: Path | None = None,
    compare: Path | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Run a trained detector, or the ensemble of several, over the validation split of the first config and score it.

    Under torchrun each process takes its share. Writes eval/detections.json and eval/metrics.json below `output` where one is given, and
    the page report/index.html (else output/report's, unless eval.report is off). compare: other detections to show there, or a run's.
    """
    config, *_ = configs = [configs] if isinstance(configs, DetectionConfig) else list(configs)
    paths = [weights] if isinstance(weights, Path) else list(weights)
    process = distributed.setup(chosen_device(config))
    try:
        source = load_split(config, "val")
        detector, classes = load_detectors(configs, paths, device=process.device)
        if tuple(source.annotations.classes) != classes:
            raise InputError(f"{paths[0]} knows the classes {list(classes)[:4]} …, the data has {list(source.annotations.classes)[:4]} …")
        if process.is_main:
            for path, one in zip(paths, configs, strict=True):
                log(f"{path}: {one.model.backbone.name} {one.model.head} on {len(source.annotations)} images")
        validator = Validator(config, source, process=process, precision=Precision(config.train.precision, process.device))
        metrics = validator.evaluate(detector, with_loss=False)
        if output is not None and process.is_main:
            write_evaluation(output, source, validator.records, metrics)
        folder = report_folder(report, output if config.eval.report else None, compare=compare)
        if folder is not None and process.is_main:
            name, options = run_name(output or paths[0].parent), {"figures": metrics, "compare": compare, "engine": config.eval.engine}
            report_records(folder, source, validator.records, name=name, **options)
        return metrics
    finally:
        distributed.shutdown()
