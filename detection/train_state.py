"""What a detector's or segmenter's run adds to the moving parts of any run: the weights' companions, and the patience of early stopping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from detection.config import RunConfig
from resbackbone.runtime import train_state
from resbackbone.runtime.precision import Precision
from resbackbone.runtime.sampler import ResumableBatchSampler


class TrainState(train_state.TrainState[nn.Module]):
    """The moving parts of a run. The learning rate is a function of `step` alone, so the schedule holds no state of its own."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        *,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        sampler: ResumableBatchSampler,
        folder: Path,
        classes: tuple[str, ...],
        metadata: dict[str, str],
        tool: str,
    ) -> None:
        """metadata: what travels with the weights; the rest as in resbackbone.runtime.train_state."""
        super().__init__(
            config, model, optimizer=optimizer, precision=precision, sampler=sampler, folder=folder, classes=classes, tool=tool
        )
        self.metadata = metadata
        self.evaluations_without_gain = 0

    @property
    def is_finished(self) -> bool:
        """True after the last step, or when early stopping has lost its patience."""
        patience = self.config.train.early_stop
        return super().is_finished or (patience is not None and self.evaluations_without_gain >= patience)

    def record(self, metrics: dict[str, float], primary: str) -> bool:
        """Remember an evaluation of the current step, and how many there were since the best."""
        is_best = self.best is None or metrics[primary] > self.best
        self.evaluations_without_gain = 0 if is_best else self.evaluations_without_gain + 1  # before it goes into the checkpoint
        return super().record(metrics, primary)

    def own_state(self) -> dict[str, Any]:
        """See the base."""
        return {"evaluations_without_gain": self.evaluations_without_gain, "metadata": self.metadata}

    def restore_own_state(self, saved: dict[str, Any]) -> None:
        """See the base."""
        self.evaluations_without_gain = saved["evaluations_without_gain"]
