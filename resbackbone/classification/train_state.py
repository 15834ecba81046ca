"""What a classifier's run adds to the moving parts of any run: the plateau, the warm-up that waits for an error, the training error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resbackbone.backbone import Backbone
from resbackbone.classification.config import ClassificationConfig
from resbackbone.classification.recipe import Plateau, rate_factor
from resbackbone.runtime import distributed, train_state
from resbackbone.runtime.precision import Precision


class TrainState(train_state.TrainState[Backbone]):
    """The moving parts of a run, as in resbackbone.runtime.train_state."""

    def __init__(
        self,
        config: ClassificationConfig,
        net: Backbone,
        *,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        sampler: train_state.Sampler,
        folder: Path,
        classes: tuple[str, ...],
    ) -> None:
        super().__init__(
            config, net, optimizer=optimizer, precision=precision, sampler=sampler, folder=folder, classes=classes, tool="train_cls"
        )
        self.plateau = Plateau(patience=config.train.plateau_patience, threshold=config.train.plateau_threshold)
        self.is_rate_divided = False  # by the last evaluation
        self.warmup_ended_at: int | None = None
        # Training images seen and wrong since the last line of the log, in this process; a tensor, so that a GPU isn't waited for.
        self.window = torch.zeros(2, dtype=torch.int64, device=precision.device)

    @property
    def rate_factor(self) -> float:
        """What the learning rate is multiplied by in the step to come."""
        return rate_factor(self.config.train, self.step, plateau=self.plateau, warmup_ended_at=self.warmup_ended_at)

    def count(self, logits: Tensor, labels: Tensor) -> None:
        """Count training images and those answered wrong; of mixed labels, the stronger one is right."""
        answers = labels if labels.ndim == 1 else labels.argmax(1)
        wrong = (logits.detach().argmax(1) != answers).sum()
        self.window[0] += len(answers)
        self.window[1] += wrong

    def take_training_error(self) -> float:
        """The share of wrong answers over all processes since the last call; ends a warm-up that waits for it."""
        seen, wrong = self._window_everywhere()
        self.window.zero_()
        error, limit = wrong / max(1, seen), self.config.train.warmup_until_error
        if limit is not None and self.warmup_ended_at is None and error < limit:
            self.warmup_ended_at = self.step
        return error

    def _window_everywhere(self) -> tuple[int, int]:
        seen, wrong = (sum(column) for column in zip(*distributed.gather_objects(self.window.tolist()), strict=True))
        return seen, wrong

    def record(self, metrics: dict[str, float], primary: str) -> bool:
        """Remember an evaluation of the current step; an error that has stopped falling divides the rate by 10 (§3.4)."""
        self.is_rate_divided = self.config.train.schedule == "plateau" and self.plateau.observe(metrics["error"])
        return super().record(metrics, primary)

    def own_state(self) -> dict[str, Any]:
        """See the base."""
        window = list(self._window_everywhere())
        return {"plateau": self.plateau.state_dict(), "warmup_ended_at": self.warmup_ended_at, "window": window}

    def restore_own_state(self, saved: dict[str, Any]) -> None:
        """See the base."""
        self.plateau.load_state_dict(saved["plateau"])
        self.warmup_ended_at = saved["warmup_ended_at"]
        if distributed.is_main():  # the window is everybody's, summed
            self.window += torch.tensor(saved["window"], device=self.window.device)
