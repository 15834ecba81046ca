"""A trained detector judged on its validation split: what eval_coco and eval_voc run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from detection.config import DetectionConfig, chosen_device, load_split
from detection.finish import write_evaluation
from detection.predict import load_detector
from detection.validate import Validator
from resbackbone.errors import InputError
from resbackbone.runtime import distributed
from resbackbone.runtime.precision import Precision


def evaluate_weights(
    config: DetectionConfig, weights: Path, *, output: Path | None = None, log: Callable[[str], None] = print
) -> dict[str, float]:
    """Run a trained detector over the validation split of `config` and score it; under torchrun each process takes its share.

    Writes eval/detections.json and eval/metrics.json below `output` where one is given.
    """
    process = distributed.setup(chosen_device(config))
    try:
        source = load_split(config, "val")
        detector, classes = load_detector(config, weights, device=process.device)
        if tuple(source.annotations.classes) != classes:
            raise InputError(f"{weights} knows the classes {list(classes)[:4]} …, the data has {list(source.annotations.classes)[:4]} …")
        if process.is_main:
            log(f"{weights}: {config.model.backbone.name} {config.model.head} on {len(source.annotations)} images")
        validator = Validator(config, source, process=process, precision=Precision(config.train.precision, process.device))
        metrics = validator.evaluate(detector, with_loss=False)
        if output is not None and process.is_main:
            write_evaluation(output, source, validator.records, metrics)
        return metrics
    finally:
        distributed.shutdown()
