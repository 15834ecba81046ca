"""A trained segmenter judged on its validation split: what tools/eval_seg.py runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from detection.config import chosen_device
from detection.segmentation.config import SegmentationConfig
from detection.segmentation.data import load_split
from detection.segmentation.finish import write_evaluation
from detection.segmentation.predict import load_segmenter
from detection.segmentation.validate import SegmentationValidator
from resbackbone.errors import InputError
from resbackbone.runtime import distributed
from resbackbone.runtime.precision import Precision


def evaluate_weights(
    config: SegmentationConfig, weights: Path, *, output: Path | None = None, log: Callable[[str], None] = print
) -> dict[str, float]:
    """Run a trained segmenter over the validation split of `config` and score it; under torchrun each process takes its share.

    Writes eval/metrics.json and eval/confusion.json below `output` where one is given.
    """
    process = distributed.setup(chosen_device(config))
    try:
        source = load_split(config, "val")
        segmenter, classes = load_segmenter(config, weights, device=process.device)
        if tuple(source.annotations.classes) != classes:
            raise InputError(f"{weights} knows the classes {list(classes)[:4]} …, the data has {list(source.annotations.classes)[:4]} …")
        if process.is_main:
            log(f"{weights}: {config.model.backbone.name} {config.model.head} on {len(source.annotations)} images")
        validator = SegmentationValidator(config, source, process=process, precision=Precision(config.train.precision, process.device))
        metrics = validator.evaluate(segmenter)
        if output is not None and process.is_main:
            write_evaluation(output, validator, metrics)
        return metrics
    finally:
        distributed.shutdown()
