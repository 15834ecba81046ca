"""What a checkpoint puts back, and which checkpoints a run refuses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resbackbone.errors import InputError
from resbackbone.runtime.checkpoint import best_step, find_checkpoint, load_checkpoint
from resbackbone.runtime.optimizer import build_optimizer
from resbackbone.runtime.precision import Precision
from resbackbone.runtime.sampler import ResumableBatchSampler
from resbackbone.runtime.train_state import TrainState


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the state reads of any trainer's settings."""

    steps: int = 6
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    eval_every: int = 2
    accumulate: int = 1
    clip_norm: float | None = 1.0
    ema: float | None = 0.5
    keep_checkpoints: int = 2


@dataclass(frozen=True, kw_only=True)
class Config:
    train: Settings = field(default_factory=Settings)


class Counting(TrainState[nn.Linear]):
    """A task that adds one number."""

    counted = 0

    def own_state(self) -> dict[str, Any]:
        return {"counted": self.counted}

    def restore_own_state(self, saved: dict[str, Any]) -> None:
        self.counted = saved["counted"]


def state_in(
    folder: Path, *, config: Config | None = None, tool: str = "count", classes: tuple[str, ...] = ("a", "b"), outputs: int = 2
) -> Counting:
    torch.manual_seed(0)
    model = nn.Linear(3, outputs)
    return Counting(
        config or Config(),
        model,
        optimizer=build_optimizer(model, (config or Config()).train, lr=0.1),
        precision=Precision("fp32", "cpu"),
        sampler=ResumableBatchSampler(8, batch_size=2, seed=0),
        folder=folder,
        classes=classes,
        tool=tool,
    )


def take_step(state: Counting, batch: torch.Tensor | None = None) -> None:
    state.model(torch.rand(4, 3) if batch is None else batch).square().sum().backward()
    state.update()
    state.counted += 3


def weights_of(state: Counting) -> list[torch.Tensor]:
    return [*state.model.state_dict().values(), *state.evaluated_model.state_dict().values()]


def test_a_restored_run_ends_as_the_one_left_alone(tmp_path: Path) -> None:
    alone = state_in(tmp_path)
    for _ in range(2):
        take_step(alone)
    alone.save()
    saved = load_checkpoint(tmp_path / "step_00000002")
    for _ in range(2):
        take_step(alone)  # draws from the random state that the checkpoint holds

    restored = state_in(tmp_path / "other")
    restored.restore(saved, tmp_path)
    assert (restored.step, restored.counted, restored.sampler.batches_done, restored.changed_settings) == (2, 6, 2, [])
    for _ in range(2):
        take_step(restored)
    assert all(torch.equal(one, other) for one, other in zip(weights_of(alone), weights_of(restored), strict=True))


def test_evaluations_fall_due_and_the_best_is_kept(tmp_path: Path) -> None:
    state, verdicts = state_in(tmp_path), {2: 0.5, 4: 0.75, 6: 0.25}
    evaluated = []
    while True:
        if state.is_evaluation_due:
            evaluated.append(state.step)
            assert state.record({"top1": verdicts[state.step]}, "top1") is (state.step < 6)
            assert not state.is_evaluation_due
        if state.is_finished:
            break
        take_step(state)
        state.save()
    assert evaluated == [2, 4, 6]
    assert (state.best, state.metrics) == (0.75, {"top1": 0.25})
    assert best_step(tmp_path) == 4
    assert load_checkpoint(tmp_path / "step_00000004")["best"] == 0.75
    assert find_checkpoint(tmp_path) == tmp_path / "step_00000006"


def test_an_evaluation_cut_short_is_made_up_for(tmp_path: Path) -> None:
    state = state_in(tmp_path)
    for _ in range(2):
        take_step(state)
    state.save()
    restored = state_in(tmp_path)
    restored.restore(load_checkpoint(tmp_path / "step_00000002"), tmp_path)
    assert restored.is_evaluation_due


def test_what_changed_since_is_named(tmp_path: Path) -> None:
    state = state_in(tmp_path)
    take_step(state)
    state.save()
    config = Config(train=replace(Settings(), steps=9, clip_norm=None))
    restored = state_in(tmp_path, config=config)
    restored.restore(load_checkpoint(tmp_path / "step_00000001"), tmp_path)
    assert restored.changed_settings == ["train.steps: 6 → 9", "train.clip_norm: 1.0 → None"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"tool": "train_seg"}, r"no checkpoint of tools/train_seg\.py; it was written by count"),
        ({"classes": ("a", "c")}, r"trained on other classes \(a, b\) than this data has \(a, c\)"),
        ({"classes": tuple("abcdefg")}, r"than this data has \(a, b, c, d … 7 in all\)"),
        ({"outputs": 5}, r"belongs to another model than this config describes: .*size mismatch"),
    ],
)
def test_another_run_s_checkpoint_is_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    state = state_in(tmp_path)
    take_step(state)
    state.save()
    with pytest.raises(InputError, match=message):
        state_in(tmp_path, **other).restore(load_checkpoint(tmp_path / "step_00000001"), tmp_path)


def test_settings_come_from_the_config_and_momentum_from_the_checkpoint(tmp_path: Path) -> None:
    state = state_in(tmp_path)
    take_step(state)
    state.save()
    restored = state_in(tmp_path)
    restored.optimizer.param_groups[0]["weight_decay"] = 0.5
    restored.restore(load_checkpoint(tmp_path / "step_00000001"), tmp_path)
    assert restored.optimizer.param_groups[0]["weight_decay"] == 0.5
    ours, theirs = (one.optimizer.state[one.model.weight]["momentum_buffer"] for one in (restored, state))
    assert torch.equal(ours, theirs)


def test_adamw_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = Config(train=replace(Settings(), optimizer="adamw"))
    whole, first = state_in(tmp_path, config=config), state_in(tmp_path, config=config)
    batches = [torch.rand(4, 3) for _ in range(4)]
    for batch in batches:
        take_step(whole, batch)
    for batch in batches[:2]:
        take_step(first, batch)
    first.save()
    second = state_in(tmp_path, config=config)
    second.restore(load_checkpoint(tmp_path / "step_00000002"), tmp_path)
    for batch in batches[2:]:
        take_step(second, batch)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights_of(second), weights_of(whole), strict=True))
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(weights_of(second), weights_of(first), strict=True))


@pytest.mark.parametrize(("before", "after"), [("sgd", "adamw"), ("adamw", "sgd")])
def test_another_optimizer_s_state_is_refused(tmp_path: Path, before: str, after: str) -> None:
    state = state_in(tmp_path, config=Config(train=replace(Settings(), optimizer=before)))
    take_step(state)
    state.save()
    other = state_in(tmp_path, config=Config(train=replace(Settings(), optimizer=after)))
    with pytest.raises(InputError, match=f"another optimiser than train.optimizer={after} needs"):
        other.restore(load_checkpoint(tmp_path / "step_00000001"), tmp_path)


def test_other_parameters_that_learn_are_refused(tmp_path: Path) -> None:
    state = state_in(tmp_path)
    take_step(state)
    state.save()
    restored = state_in(tmp_path)
    restored.optimizer = torch.optim.SGD([{"params": [restored.model.weight]}, {"params": [restored.model.bias]}], lr=0.1)
    with pytest.raises(InputError, match="other parameters learn, or other ones decay"):
        restored.restore(load_checkpoint(tmp_path / "step_00000001"), tmp_path)


def test_an_average_that_is_switched_on_starts_from_the_restored_weights(tmp_path: Path) -> None:
    state = state_in(tmp_path, config=Config(train=replace(Settings(), ema=None)))
    take_step(state)
    state.save()
    restored = state_in(tmp_path)
    restored.restore(load_checkpoint(tmp_path / "step_00000001"), tmp_path)
    assert torch.equal(restored.evaluated_model.weight, state.model.weight)
    assert restored.evaluated_model is not restored.model


@pytest.mark.parametrize("scales", [(False, True), (True, False), (True, True)])
def test_the_precision_may_change(tmp_path: Path, scales: tuple[bool, bool]) -> None:
    """Only fp16 has a scaler with a state."""
    state, restored = state_in(tmp_path), state_in(tmp_path)
    for one, enabled in zip((state, restored), scales, strict=True):
        one.precision.scaler = torch.amp.GradScaler("cpu", init_scale=8.0 if one is state else 16.0, enabled=enabled)
    state.precision.scaler.scale(state.model(torch.rand(4, 3)).sum()).backward()
    state.update()
    state.save()
    restored.restore(load_checkpoint(tmp_path / "step_00000001"), tmp_path)
    assert restored.precision.scaler.get_scale() == {(False, True): 16.0, (True, False): 1.0, (True, True): 8.0}[scales]


def test_what_is_not_finite_never_becomes_a_checkpoint(tmp_path: Path) -> None:
    state = state_in(tmp_path)
    take_step(state)
    assert state.save()
    assert state.save_last_good() == "the checkpoint of step 1 is intact"
    with torch.no_grad():
        state.model.weight[0, 0] = float("nan")
    assert not state.save()
    assert state.save_last_good() == "the checkpoint of step 1 is intact"
    assert torch.isfinite(load_checkpoint(tmp_path / "step_00000001")["model"]["weight"]).all()
    state.step = 2
    assert state.save_last_good() == "the checkpoint before it is the newest that is good"
    assert find_checkpoint(tmp_path) == tmp_path / "step_00000001"
