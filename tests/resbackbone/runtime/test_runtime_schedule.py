"""Learning rates worked by hand and against torch's own schedulers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from resbackbone.errors import InputError
from resbackbone.runtime.schedule import lr_factor, scaled_lr


@pytest.mark.parametrize(
    ("step", "settings", "expected"),
    [
        (0, {"warmup_steps": 10}, 0.001),
        (5, {"warmup_steps": 10}, 0.5005),
        (10, {"warmup_steps": 10}, 1.0),
        (0, {"warmup_steps": 0}, 1.0),
        (59, {"milestones": (60, 80)}, 1.0),
        (60, {"milestones": (60, 80)}, 0.1),
        (80, {"milestones": (60, 80)}, 0.01),
        (80, {"milestones": (60, 80), "gamma": 0.5}, 0.25),
        (5, {"milestones": (3,), "warmup_steps": 10}, 0.05005),
        (99, {"milestones": ()}, 1.0),
        (0, {"schedule": "cosine"}, 1.0),
        (50, {"schedule": "cosine"}, 0.5),
        (25, {"schedule": "cosine"}, 0.5 + math.sqrt(0.125)),
        (100, {"schedule": "cosine"}, 0.0),
        (130, {"schedule": "cosine"}, 0.0),
        (60, {"schedule": "cosine", "warmup_steps": 20}, 0.5),
        (99, {"schedule": "constant"}, 1.0),
        (100, {"schedule": "cosine", "warmup_steps": 100}, 1.0),
    ],
)
def test_factor_by_hand(step: int, settings: dict[str, Any], expected: float) -> None:
    assert lr_factor(step, steps=100, **settings) == pytest.approx(expected, abs=1e-12)


def test_factor_equals_torch_warmup_and_milestones() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-3, total_iters=7)
    decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [12, 15])
    for step in range(20):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr_factor(step, steps=20, warmup_steps=7, milestones=(12, 15)), rel=1e-9)
        optimizer.step()
        warmup.step()
        decay.step()


def test_an_unknown_schedule() -> None:
    with pytest.raises(InputError, match=r"train\.schedule=cosin is not one of step, cosine, constant; did you mean 'cosine'"):
        lr_factor(0, steps=1, schedule="cosin")


def test_scaling_rule() -> None:
    assert scaled_lr(0.02, batch=4, reference_batch=16) == 0.005
    with pytest.raises(InputError, match=r"train\.reference_batch=0"):
        scaled_lr(0.02, batch=4, reference_batch=0)
