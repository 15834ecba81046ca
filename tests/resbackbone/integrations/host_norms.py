"""Norms of any host's kind as training leaves them: fresh ones hide mistakes, and so do variances near 1."""

from __future__ import annotations

import torch
from torch import nn

SMALL_VARIANCES = (1e-5, 2e-2)  # as in trained networks, where an epsilon of 1e-5 counts


def randomise_norms(model: nn.Module, *, variance: tuple[float, float] = (0.5, 1.0)) -> nn.Module:
    """Weights follow the deviations, so that maps keep their size however small the variances are."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(getattr(module, "running_var", None), torch.Tensor):
            module.running_var.data.uniform_(*variance, generator=generator)
            module.running_mean.data.uniform_(-0.3, 0.3, generator=generator)
            module.bias.data.uniform_(-0.3, 0.3, generator=generator)
            module.weight.data.uniform_(0.3, 0.6, generator=generator).mul_(module.running_var.sqrt())
    return model
