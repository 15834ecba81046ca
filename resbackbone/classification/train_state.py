"""Everything a checkpoint holds, and how it is put back: the reason why a killed run ends with the same weights as one left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from resbackbone.backbone import Backbone
from resbackbone.classification.config import ClassificationConfig
from resbackbone.classification.recipe import Plateau, rate_factor
from resbackbone.errors import InputError
from resbackbone.runtime import distributed
from resbackbone.runtime.checkpoint import mark_best, save_checkpoint
from resbackbone.runtime.config import dump_config
from resbackbone.runtime.ema import build_ema
from resbackbone.runtime.precision import Precision
from resbackbone.runtime.random_state import capture_random_states, restore_random_states


class Sampler(Protocol):
    """What a checkpoint wants of either sampler: a position."""

    batches_done: int

    @property
    def epoch(self) -> float: ...

    def advance(self, batches: int = 1) -> None: ...

    def state_dict(self) -> dict[str, int]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainState:
    """The moving parts of a run. Each image's augmentation is a function of (seed, epoch, index), so workers hold no state of their own."""

    def __init__(
        self,
        config: ClassificationConfig,
        net: Backbone,
        *,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        sampler: Sampler,
        folder: Path,
        classes: tuple[str, ...],
    ) -> None:
        self.config, self.net, self.optimizer, self.precision, self.sampler = config, net, optimizer, precision, sampler
        self.folder, self.classes = folder, classes
        self.ema = build_ema(net, config.train.ema) if config.train.ema else None
        self.plateau = Plateau(patience=config.train.plateau_patience, threshold=config.train.plateau_threshold)
        self.step = 0
        self.evaluated_step = 0  # so that an evaluation a signal cut short is made up for
        self.best_error: float | None = None
        self.metrics: dict[str, float] = {}
        self.warmup_ended_at: int | None = None
        # Training images seen and wrong since the last line of the log, in this process; a tensor, so that a GPU isn't waited for.
        self.window = torch.zeros(2, dtype=torch.int64, device=precision.device)

    @property
    def evaluated_net(self) -> Backbone:
        """The weights that are judged and delivered: the moving average where there is one."""
        return self.net if self.ema is None else self.ema.module  # type: ignore[return-value]

    @property
    def rate_factor(self) -> float:
        """What the learning rate is multiplied by in the step to come."""
        return rate_factor(self.config.train, self.step, plateau=self.plateau, warmup_ended_at=self.warmup_ended_at)

    @property
    def is_evaluation_due(self) -> bool:
        """True after every `eval_every` steps and after the last, until the evaluation has been made."""
        if self.step == 0 or self.evaluated_step == self.step:
            return False
        every = self.config.train.eval_every
        return self.is_finished or (every > 0 and self.step % every == 0)

    @property
    def is_finished(self) -> bool:
        """True after the last step."""
        return self.step >= self.config.train.steps

    def update(self) -> None:
        """One optimiser step from the gradients at hand; counts it, and the batches it consumed."""
        scaler, settings = self.precision.scaler, self.config.train
        if settings.clip_norm is not None:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.net.parameters(), settings.clip_norm)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.net)
        self.step += 1
        self.sampler.advance(settings.accumulate)

    def count(self, logits: Tensor, labels: Tensor) -> None:
        """Count training images and those answered wrong; of mixed labels, the stronger one is right."""
        answers = labels if labels.ndim == 1 else labels.argmax(1)
        wrong = (logits.detach().argmax(1) != answers).sum()
        self.window += torch.stack([wrong.new_tensor(len(answers)), wrong])

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

    def record(self, metrics: dict[str, float]) -> bool:
        """Remember an evaluation of the current step; the best is kept as a checkpoint. True where the rate was divided by 10."""
        self.evaluated_step, self.metrics = self.step, metrics
        error = metrics["error"]
        divided = self.config.train.schedule == "plateau" and self.plateau.observe(error)
        if self.best_error is None or error < self.best_error:
            self.best_error = error
            self.save(best=True)
        return divided

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint of the current step: rank 0 writes, every rank gives its random state."""
        random_states = distributed.gather_objects(capture_random_states())
        window = list(self._window_everywhere())
        if not distributed.is_main():
            return
        keep = self.config.train.keep_checkpoints
        save_checkpoint(self.folder, self.step, self._state_dict(random_states, window), keep=keep, best=best)
        if best:
            mark_best(self.folder, self.step)

    def _state_dict(self, random_states: list[dict[str, Any]], window: list[int]) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "sampler": self.sampler.state_dict(),
            "random": random_states,
            "plateau": self.plateau.state_dict(),
            "warmup_ended_at": self.warmup_ended_at,
            "window": window,
            "evaluated_step": self.evaluated_step,
            "best_error": self.best_error,
            "metrics": self.metrics,
            "classes": list(self.classes),
            "config": dump_config(self.config),
        }

    def restore(self, saved: dict[str, Any], source: Path) -> None:
        """Put a checkpoint back.

        1. the classes must be the same; 2. weights, strictly; 3. optimiser, scaler, moving average; 4. plateau, warm-up, counters;
        5. the sampler's position; 6. the random generators last, since everything before may draw from them.
        """
        if "window" not in saved:
            raise InputError(f"{source} is no checkpoint of tools/train_cls.py; give one that it wrote")
        if tuple(saved["classes"]) != self.classes:
            raise InputError(f"{source} was trained on {len(saved['classes'])} classes, this data has {len(self.classes)}, or other names")
        try:
            self.net.load_state_dict(saved["model"], strict=True)
        except RuntimeError as error:
            first = " ".join(str(error).splitlines()[:4])
            raise InputError(f"{source} belongs to another network than this config describes: {first}") from error
        self.optimizer.load_state_dict(saved["optimizer"])
        self.precision.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None and saved["ema"] is not None:
            self.ema.load_state_dict(saved["ema"])
        self.plateau.load_state_dict(saved["plateau"])
        self.step, self.evaluated_step, self.warmup_ended_at = saved["step"], saved["evaluated_step"], saved["warmup_ended_at"]
        self.best_error, self.metrics = saved["best_error"], saved["metrics"]
        if distributed.is_main():
            self.window += torch.tensor(saved["window"], device=self.window.device)
        self.sampler.load_state_dict(saved["sampler"])
        states = saved["random"]
        restore_random_states(states[distributed.rank() % len(states)])
