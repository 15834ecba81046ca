"""Everything a checkpoint holds, and how it is put back: the reason why a killed run ends with the same weights as one left alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from resbackbone.errors import InputError
from resbackbone.runtime import distributed
from resbackbone.runtime.checkpoint import checkpoint_name, mark_best, save_checkpoint
from resbackbone.runtime.config import changed_settings, dump_config, load_config_text
from resbackbone.runtime.ema import build_ema
from resbackbone.runtime.precision import Precision
from resbackbone.runtime.random_state import capture_random_states, restore_random_states

ModelT = TypeVar("ModelT", bound=nn.Module)
_logger = logging.getLogger(__name__)


class Sampler(Protocol):
    """What a checkpoint wants of a sampler: a position in the run."""

    batches_done: int

    @property
    def epoch(self) -> float: ...

    def advance(self, batches: int = 1) -> None: ...

    def state_dict(self) -> dict[str, int]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainState(Generic[ModelT]):
    """The moving parts of a run. Every image's augmentation is a function of its (seed, epoch, index), so workers hold no state of their
    own. What a task adds, it gives in `own_state` and takes back in `restore_own_state`.
    """

    def __init__(
        self,
        config: Any,
        model: ModelT,
        *,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        sampler: Sampler,
        folder: Path,
        classes: tuple[str, ...],
        tool: str,
    ) -> None:
        """config: a schema whose `train` has the settings read here; folder: the checkpoints'; tool: the one that trains, for messages."""
        self.config, self.model, self.optimizer, self.precision, self.sampler = config, model, optimizer, precision, sampler
        self.folder, self.classes, self.tool = folder, classes, tool
        self.ema = build_ema(model, config.train.ema) if config.train.ema else None
        self.step = 0
        self.evaluated_step = 0  # so that an evaluation a signal cut short is made up for
        self.best: float | None = None
        self.metrics: dict[str, float] = {}
        self.changed_settings: list[str] = []  # what a resumed run does otherwise than the one it goes on with

    @property
    def evaluated_model(self) -> ModelT:
        """The weights that are judged and delivered: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module  # type: ignore[return-value]

    @property
    def is_evaluation_due(self) -> bool:
        """True after every `eval_every` steps and after the last, until the evaluation has been made."""
        if self.step == 0 or self.evaluated_step == self.step:
            return False
        every = self.config.train.eval_every
        return self.step >= self.config.train.steps or (every > 0 and self.step % every == 0)

    @property
    def is_finished(self) -> bool:
        """True after the last step."""
        return self.step >= self.config.train.steps

    def update(self) -> None:
        """One optimiser step from the gradients at hand; counts it, and the batches it consumed."""
        scaler, settings = self.precision.scaler, self.config.train
        if settings.clip_norm is not None:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.step += 1
        self.sampler.advance(settings.accumulate)

    def record(self, metrics: dict[str, float], primary: str) -> bool:
        """Remember an evaluation of the current step; True where `metrics[primary]` is the best yet, which is kept as a checkpoint."""
        self.evaluated_step, self.metrics = self.step, metrics
        is_best = self.best is None or metrics[primary] > self.best
        if is_best:
            self.best = metrics[primary]
            self.save(best=True)
        return is_best

    def save(self, *, best: bool = False) -> bool:
        """Write a checkpoint of the current step: rank 0 writes, every rank gives its random state.

        False, and nothing is written, where a weight or a running statistic is not finite: going on from it would be of no use, and it
        might take the place of one that is good.
        """
        if distributed.any_process(not all(bool(torch.isfinite(tensor).all()) for tensor in self.model.state_dict().values())):
            _logger.warning("step %d: weights or statistics are not finite; no checkpoint was written", self.step)
            return False
        random_states, own = distributed.gather_objects(capture_random_states()), self.own_state()
        if not distributed.is_main():
            return True
        state = self._state_dict(random_states) | own
        save_checkpoint(self.folder, self.step, state, keep=self.config.train.keep_checkpoints, best=best)
        if best:
            mark_best(self.folder, self.step)
        return True

    def save_last_good(self) -> str:
        """After a forward pass that went wrong, before its update: keep the current step, unless its checkpoint stands already.

        Batch norm's statistics have seen that pass, so they may have gone wrong too. Returns what there is to go on from, in words.
        """
        stands = distributed.any_process(distributed.is_main() and (self.folder / checkpoint_name(self.step)).is_dir())
        if stands or self.save():
            return f"the checkpoint of step {self.step} is intact"
        return "the checkpoint before it is the newest that is good"

    def own_state(self) -> dict[str, Any]:
        """What a task adds to a checkpoint. Called by every process at once, so it may exchange with the others."""
        return {}

    def restore_own_state(self, saved: dict[str, Any]) -> None:
        """Take back what `own_state` gave."""

    def _state_dict(self, random_states: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "tool": self.tool,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "sampler": self.sampler.state_dict(),
            "random": random_states,
            "evaluated_step": self.evaluated_step,
            "best": self.best,
            "metrics": self.metrics,
            "classes": list(self.classes),
            "config": dump_config(self.config),
        }

    def restore(self, saved: dict[str, Any], source: Path) -> None:
        """Put a checkpoint back.

        1. tool and classes must be the same; 2. weights, strictly; 3. optimiser, scaler, moving average; 4. counters, best figure and
        what the task adds; 5. the sampler's position; 6. the random generators last, since everything before may draw from them.
        """
        self._check_origin(saved, source)
        try:
            self.model.load_state_dict(saved["model"], strict=True)
        except RuntimeError as error:
            first = " ".join(str(error).splitlines()[:4])
            raise InputError(f"{source} belongs to another model than this config describes: {first}") from error
        self.changed_settings = changed_settings(load_config_text(type(self.config), saved["config"], source=str(source)), self.config)
        self._restore_optimizer(saved["optimizer"], source)
        if saved["scaler"]:  # empty unless it was fp16
            self.precision.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None and saved["ema"] is not None:
            self.ema.load_state_dict(saved["ema"])
        elif self.ema is not None:  # switched on now: it starts here, not from the weights before they were restored
            self.ema.module.load_state_dict(self.model.state_dict())
        self.step, self.evaluated_step = saved["step"], saved["evaluated_step"]
        self.best, self.metrics = saved["best"], saved["metrics"]
        self.restore_own_state(saved)
        self.sampler.load_state_dict(saved["sampler"])
        states = saved["random"]
        if distributed.rank() < len(states):  # on more processes than before, the new ones keep streams of their own
            restore_random_states(states[distributed.rank()])

    def _restore_optimizer(self, saved: dict[str, Any], source: Path) -> None:
        """Momentum comes from the checkpoint, settings such as weight decay from the config, which may have changed."""
        groups = self.optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        if ("betas" in saved["param_groups"][0]) != ("betas" in groups[0]):  # AdamW has them, SGD doesn't
            needed = f"train.optimizer={self.config.train.optimizer}"
            raise InputError(
                f"{source} holds the state of another optimiser than {needed} needs; set it back, or start a new run from these weights"
            )
        if [len(group["params"]) for group in saved["param_groups"]] != [len(group["params"]) for group in groups]:
            raise InputError(
                f"{source}: other parameters learn, or other ones decay, than in this config ({'; '.join(self.changed_settings)}); set it "
                "back, or start a new run from these weights"
            )
        self.optimizer.load_state_dict(saved)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)

    def _check_origin(self, saved: dict[str, Any], source: Path) -> None:
        if saved.get("tool") != self.tool:
            writer = saved.get("tool", "another program or an earlier version")
            raise InputError(f"{source} is no checkpoint of tools/{self.tool}.py; it was written by {writer}")
        if tuple(saved["classes"]) != self.classes:
            raise InputError(f"{source} was trained on other classes ({_few(saved['classes'])}) than this data has ({_few(self.classes)})")


def _few(names: Sequence[str]) -> str:
    return ", ".join(list(names)[:4]) + (f" … {len(names)} in all" if len(names) > 4 else "")
