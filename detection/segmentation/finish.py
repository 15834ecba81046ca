"""What a segmentation run leaves behind beside its checkpoints: final weights, figures, the confusion matrix, drawn samples."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
from torch import nn

from detection.data.source import Source, readable
from detection.draw import save_image
from detection.evaluation.results import metrics_text, write_metrics
from detection.segmentation.config import SegmentationConfig
from detection.segmentation.data import label_map
from detection.segmentation.draw import draw_segmentation
from detection.segmentation.predict import segment_image
from detection.segmentation.segmenter import Segmenter
from detection.segmentation.validate import SegmentationValidator
from detection.train_state import TrainState
from resbackbone.runtime import distributed
from resbackbone.runtime.atomic import write_atomically
from resbackbone.runtime.checkpoint import save_weights
from resbackbone.runtime.log import RunLog, to_json
from resbackbone.runtime.precision import Precision


def finish(state: TrainState, validator: SegmentationValidator, output: Path, log: RunLog) -> Path:
    """Write the last checkpoint, model_final.safetensors, eval/ and samples/; returns the weights' path.

    A run that died after its last evaluation, before these were written, has lost its confusion matrix: it evaluates again.
    """
    figures = output / "eval" / "metrics.json"
    is_written = figures.is_file() and figures.read_text() == metrics_text(state.metrics)
    if distributed.any_process(distributed.is_main() and validator.matrix is None and not is_written):
        log.message(f"eval/ lacks the evaluation of step {state.step}; evaluating again")
        state.metrics = validator.evaluate(state.evaluated_model)
    state.save()
    weights = output / "model_final.safetensors"
    if distributed.is_main():
        save_weights(weights, state.evaluated_model.state_dict(), state.metadata)
        if validator.matrix is not None:  # None where a finished run was resumed: its files are there already
            draw_samples(output / "samples", validator.source, state.evaluated_model, validator.config, state.precision)
            write_evaluation(output, validator, state.metrics)
        log.message(f"weights: {weights}")
    distributed.barrier()
    return weights


def write_evaluation(output: Path, validator: SegmentationValidator, metrics: dict[str, float]) -> None:
    """eval/metrics.json, and eval/confusion.json: pixels by true class (rows) and predicted class."""
    assert validator.matrix is not None
    confusion = {"classes": list(validator.names), "pixels": validator.matrix.tolist()}
    write_atomically(output / "eval" / "confusion.json", to_json(confusion).encode())
    write_metrics(output, metrics)


def draw_samples(folder: Path, source: Source, segmenter: nn.Module, config: SegmentationConfig, precision: Precision) -> None:
    """Draw the label maps found, and the truth's outlines, into the first validation images that have objects and can be read."""
    assert isinstance(segmenter, Segmenter)
    folder.mkdir(parents=True, exist_ok=True)
    segmenter.eval()
    annotations = source.annotations
    with_objects = np.flatnonzero(annotations.num_objects()).tolist()
    for index, image in islice(readable(source, with_objects), config.eval.samples):
        truth = label_map(annotations, annotations.of_image(index), image.shape[0], image.shape[1])
        found = segment_image(segmenter, image, config, precision).numpy()
        save_image(folder / f"{annotations.image_id(index)}.jpg", draw_segmentation(image, found, annotations.classes, truth=truth))
