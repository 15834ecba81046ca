"""The learning rate at each step as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from resbackbone.errors import InputError, nearest

SCHEDULES = ("step", "cosine", "constant")
WARMUP_START = 1.0e-3  # of the full rate at step 0, as torchvision's and detectron2's detection training begin


def scaled_lr(lr: float, *, batch: int, reference_batch: int) -> float:
    """The linear scaling rule (Goyal et al. 2017, §2.1): `lr` was stated for `reference_batch` images a step, `batch` are used."""
    if reference_batch < 1:
        raise InputError(f"train.reference_batch={reference_batch} should be the batch size that train.lr was stated for, 1 or more")
    return lr * batch / reference_batch


def lr_factor(
    step: int,
    *,
    steps: int,
    warmup_steps: int = 0,
    schedule: str = "step",
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
) -> float:
    """What the learning rate is multiplied by in step number `step` (from 0) of `steps`.

    Warm-up rises linearly from 0.001 to 1 over `warmup_steps`. "step": times `gamma` from each milestone on; "cosine": from 1 after
    warm-up down to 0 at `steps`; "constant": 1. Raises InputError for another schedule.
    """
    warmup = 1.0 if step >= warmup_steps else WARMUP_START + (1.0 - WARMUP_START) * step / warmup_steps
    if schedule == "step":
        return warmup * gamma ** sum(milestone <= step for milestone in milestones)
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return warmup * 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, progress))))
    if schedule == "constant":
        return warmup
    raise InputError(f"train.schedule={schedule} is not one of {', '.join(SCHEDULES)};{nearest(schedule, SCHEDULES)}")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
