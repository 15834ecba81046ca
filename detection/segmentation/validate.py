"""One pass over the validation images: a confusion matrix and the loss. Training and the tools share it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detection.data.source import Source
from detection.segmentation.config import SegmentationConfig
from detection.segmentation.data import eval_loader
from detection.segmentation.iou import PRIMARY, confusion_matrix, figures
from detection.segmentation.segmenter import Segmenter, pixel_loss
from resbackbone.runtime import distributed
from resbackbone.runtime.distributed import Process
from resbackbone.runtime.precision import Precision
from resbackbone.runtime.signals import Interrupted, SignalGuard


class SegmentationValidator:
    """Runs a segmenter over a validation split and scores it at each image's own size; every process takes its share of the images."""

    primary = PRIMARY

    def __init__(
        self, config: SegmentationConfig, source: Source, *, process: Process, precision: Precision, signals: SignalGuard | None = None
    ) -> None:
        self.config, self.source, self.process, self.precision, self.signals = config, source, process, precision, signals
        self.names = ("background", *source.annotations.classes)
        self.matrix: Tensor | None = None  # of the last evaluation, all processes together

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The figures of the split and the `loss`, on every rank; `self.matrix` keeps the confusion matrix."""
        matrix, losses = self._run(model)
        everyone = distributed.gather_objects((matrix, losses))
        self.matrix = torch.stack([part for part, _ in everyone]).sum(0)
        of_images = [loss for _, part in everyone for loss in part]
        return figures(self.matrix, self.names) | {"loss": sum(of_images) / len(of_images)}

    @torch.no_grad()
    def _run(self, model: nn.Module) -> tuple[Tensor, list[float]]:
        assert isinstance(model, Segmenter)
        was_training = model.training
        model.eval()
        matrix, losses = torch.zeros(len(self.names), len(self.names), dtype=torch.int64), list[float]()
        loader = eval_loader(self.config, self.source, self.process)
        rounds, batches = max(distributed.gather_objects(len(loader))), iter(loader)  # every rank makes as many turns, to agree on signals
        try:
            for _ in range(rounds):
                self._leave_if_asked()
                batch = next(batches, None)
                if batch is None:
                    continue
                batch = batch.to(self.process.device)
                with self.precision.autocast():
                    found = model.scores(batch.images, [target.original_size for target in batch.targets])
                for scores, target in zip(found, batch.targets, strict=True):
                    assert target.label_map is not None
                    matrix += confusion_matrix(target.label_map, scores.argmax(0), len(self.names)).cpu()
                    losses.append(pixel_loss(scores[None], target.label_map[None].long()).item())
        finally:
            model.train(was_training)
        return matrix, losses

    def _leave_if_asked(self) -> None:
        if self.signals is not None and distributed.any_process(self.signals.requested is not None):
            raise Interrupted(self.signals.requested or 143)
