"""One pass over the validation images: predictions, validation loss and figures. Training and the tools share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from detection.config import DetectionConfig, eval_loader
from detection.data.loader import BatchLoader
from detection.data.source import Source
from detection.ensemble import Ensemble
from detection.evaluation.evaluate import evaluate_source, primary_metric
from detection.evaluation.results import Record, encode_masks, merge_records
from detection.faster_rcnn import FasterRCNN
from detection.mask_head import paste_masks
from detection.structures import Detections, Target
from resbackbone.runtime import distributed
from resbackbone.runtime.distributed import Process
from resbackbone.runtime.precision import Precision
from resbackbone.runtime.signals import Interrupted, SignalGuard


class Validator:
    """Runs a detector over a validation split and scores it; every process takes its share, each image counts once."""

    def __init__(
        self, config: DetectionConfig, source: Source, *, process: Process, precision: Precision, signals: SignalGuard | None = None
    ) -> None:
        self.source, self.process, self.precision, self.signals = source, process, precision, signals
        self.engine, self.primary = config.eval.engine, primary_metric(source)
        self._make_loader: Callable[[], BatchLoader] = lambda: eval_loader(config, source, process)
        self.records: list[Record] = []

    def evaluate(self, detector: nn.Module, *, with_loss: bool = True) -> dict[str, float]:
        """The figures of the split, on every rank; `self.records` keeps the detections, `loss…` entries the validation loss."""
        records, losses = self._run(detector, with_loss)
        everyone = distributed.gather_objects((records, losses))
        self.records = merge_records([part for part, _ in everyone], expected=len(self.source.annotations.image_ids))
        figures = evaluate_source(self.source, self.records, engine=self.engine)
        return figures | _mean_losses([loss for _, part in everyone for loss in part])

    @torch.no_grad()
    def _run(self, detector: nn.Module, with_loss: bool) -> tuple[list[Record], list[dict[str, float]]]:
        assert isinstance(detector, FasterRCNN) or (isinstance(detector, Ensemble) and not with_loss)
        was_training = detector.training
        detector.eval()
        records: list[Record] = []
        losses: list[dict[str, float]] = []
        loader = self._make_loader()
        rounds, batches = max(distributed.gather_objects(len(loader))), iter(loader)  # every rank makes as many turns, to agree on signals
        try:
            for _ in range(rounds):
                self._leave_if_asked()
                batch = next(batches, None)
                if batch is None:
                    continue
                batch = batch.to(self.process.device)
                with self.precision.autocast():
                    if with_loss and isinstance(detector, FasterRCNN):
                        batch_losses, found = detector.validate(batch.images, batch.targets)
                        losses.append({name: value.item() for name, value in batch_losses.items()} | {"images": float(len(batch))})
                    else:
                        found = detector.detect(batch.images)
                for image, target, detections in zip(batch.images, batch.targets, found, strict=True):
                    seen_size = (image.shape[-2], image.shape[-1])
                    records.append(_record(target, detections.scaled(seen_size, target.original_size).to("cpu")))
        finally:
            detector.train(was_training)
        return records, losses

    def _leave_if_asked(self) -> None:
        if self.signals is not None and distributed.any_process(self.signals.requested is not None):
            raise Interrupted(self.signals.requested or 143)


def _record(target: Target, found: Detections) -> Record:
    """Masks are run-length coded at once: a hundred of 28 × 28 probabilities an image would fill memory over a whole split."""
    codes = None
    if found.masks is not None:
        codes = encode_masks(mask.numpy() for mask in paste_masks(found, target.original_size))
        found = dataclasses.replace(found, masks=None)
    return Record(image_id=target.image_id, index=target.index, size=target.original_size, detections=found, segmentations=codes)


def _mean_losses(losses: list[dict[str, float]]) -> dict[str, float]:
    """Each loss term averaged over images, and their sum as `loss`."""
    images = sum(loss["images"] for loss in losses)
    names = [name for name in losses[0] if name != "images"] if losses else []
    means = {f"loss_{name}": sum(loss[name] * loss["images"] for loss in losses) / images for name in names}
    return means | ({"loss": sum(means.values())} if means else {})
