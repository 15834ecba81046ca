"""Everything a checkpoint holds, and how it is put back: the reason why a killed run ends with the same weights as one left alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detection.config import RunConfig, changed_settings
from resbackbone.errors import InputError
from resbackbone.runtime import distributed
from resbackbone.runtime.checkpoint import mark_best, save_checkpoint
from resbackbone.runtime.config import dump_config, load_config_text
from resbackbone.runtime.ema import build_ema
from resbackbone.runtime.precision import Precision
from resbackbone.runtime.random_state import capture_random_states, restore_random_states
from resbackbone.runtime.sampler import ResumableBatchSampler

logger = logging.getLogger(__name__)


class TrainState:
    """The moving parts of a run. The learning rate is a function of `step` and every image's augmentation and sampling of its
    (seed, epoch, index), so neither schedule nor workers hold state of their own."""

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
        """metadata: what travels with the weights; tool: the one that trains, for the messages that name it."""
        self.config, self.model, self.optimizer, self.precision, self.sampler = config, model, optimizer, precision, sampler
        self.folder, self.classes, self.metadata, self.tool = folder, classes, metadata, tool
        self.ema = build_ema(model, config.train.ema) if config.train.ema else None
        self.step = 0
        self.evaluated_step = 0  # so that an evaluation a signal cut short is made up for
        self.best: float | None = None
        self.evaluations_without_gain = 0
        self.metrics: dict[str, float] = {}
        self.changed_settings: list[str] = []  # what a resumed run does otherwise than the one it goes on with

    @property
    def evaluated_model(self) -> nn.Module:
        """The weights that are judged and delivered: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def is_evaluation_due(self) -> bool:
        """True after every `eval_every` steps and after the last, until the evaluation has been made."""
        if self.step == 0 or self.evaluated_step == self.step:
            return False
        every = self.config.train.eval_every
        return self.step >= self.config.train.steps or (every > 0 and self.step % every == 0)

    @property
    def is_finished(self) -> bool:
        """True after the last step, or when early stopping has lost its patience."""
        patience = self.config.train.early_stop
        return self.step >= self.config.train.steps or (patience is not None and self.evaluations_without_gain >= patience)

    def update(self) -> None:
        """One optimiser step from the gradients at hand; counts it, and the batches it consumed."""
        scaler, settings = self.precision.scaler, self.config.train
        if settings.clip_norm is not None:
            scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.step += 1
        self.sampler.advance(settings.accumulate)

    def record(self, metrics: dict[str, float], primary: str) -> None:
        """Remember an evaluation of the current step; a new best figure is kept as a checkpoint."""
        figure = metrics[primary]
        self.evaluated_step, self.metrics = self.step, metrics
        self.evaluations_without_gain += 1
        if self.best is None or figure > self.best:
            self.best, self.evaluations_without_gain = figure, 0
            self.save(best=True)

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint of the current step: rank 0 writes, every rank gives its random state."""
        random_states = distributed.gather_objects(capture_random_states())
        if not distributed.is_main():
            return
        save_checkpoint(self.folder, self.step, self._state_dict(random_states), keep=self.config.train.keep_checkpoints, best=best)
        if best:
            mark_best(self.folder, self.step)

    def _state_dict(self, random_states: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "sampler": self.sampler.state_dict(),
            "random": random_states,
            "evaluated_step": self.evaluated_step,
            "best": self.best,
            "evaluations_without_gain": self.evaluations_without_gain,
            "metrics": self.metrics,
            "classes": list(self.classes),
            "config": dump_config(self.config),
            "metadata": self.metadata,
        }

    def restore(self, saved: dict[str, Any], source: Path) -> None:
        """Put a checkpoint back.

        1. the classes must be the same; 2. weights, strictly; 3. optimiser, scaler, moving average; 4. counters and best figure;
        5. the sampler's position; 6. the random generators last, since everything before may draw from them.
        """
        if tuple(saved["classes"]) != self.classes:
            raise InputError(f"{source} was trained on other classes ({_few(saved['classes'])}) than this data has ({_few(self.classes)})")
        try:
            self.model.load_state_dict(saved["model"], strict=True)
        except RuntimeError as error:
            first = str(error).splitlines()[:4]
            raise InputError(f"{source} belongs to another model than this config describes: {' '.join(first)}") from error
        self.changed_settings = changed_settings(load_config_text(type(self.config), saved["config"], source=str(source)), self.config)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.precision.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None and saved["ema"] is not None:
            self.ema.load_state_dict(saved["ema"])
        self.step, self.evaluated_step, self.best = saved["step"], saved["evaluated_step"], saved["best"]
        self.evaluations_without_gain, self.metrics = saved["evaluations_without_gain"], saved["metrics"]
        self.sampler.load_state_dict(saved["sampler"])
        states = saved["random"]
        restore_random_states(states[distributed.rank() % len(states)])


def _few(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(list(names)[:4]) + (f" … {len(names)} in all" if len(names) > 4 else "")
