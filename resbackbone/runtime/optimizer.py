"""The optimiser a config names: SGD with momentum, the paper's, or AdamW."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from resbackbone.errors import InputError

ADAMW_SECOND_DECAY = 0.999  # beta2, torch's own


class OptimizerSettings(Protocol):
    """What `build_optimizer` reads of a config's `train` section."""

    @property
    def optimizer(self) -> str: ...

    @property
    def momentum(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...


def build_optimizer(
    model: nn.Module, settings: OptimizerSettings, *, lr: float, groups: list[dict[str, Any]] | None = None
) -> torch.optim.Optimizer:
    """The optimiser of `settings` over `groups`, or else over every parameter of `model` that isn't frozen, all of them decayed (§3.4).

    "sgd": with `momentum`. "adamw" (Loshchilov & Hutter 2019): `momentum` is its first decay rate; it scales each parameter's step by the
    size of its gradients, so that one rate suits more kinds of networks than of SGD. Raises InputError if everything is frozen.
    """
    groups = groups or [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    if not any(group["params"] for group in groups):
        raise InputError("every parameter is frozen, so there is nothing to train; lower model.backbone.freeze_at")
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(settings.momentum, ADAMW_SECOND_DECAY), weight_decay=settings.weight_decay)
    return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
