"""An exponential moving average of the weights, which often evaluates better than the last step's."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resbackbone.errors import InputError


class _Average(AveragedModel):
    """torch's, but its counter isn't copied to a GPU in every step, which the host would wait for."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        average = get_ema_multi_avg_fn(decay)
        super().__init__(model, multi_avg_fn=average, use_buffers=True)
        self._average = average

    def update_parameters(self, model: nn.Module) -> None:
        """As torch's: the first call copies, the others average."""
        averaged, current = ([tensor.detach() for tensor in (*net.parameters(), *net.buffers())] for net in (self.module, model))
        if self.n_averaged == 0:
            torch._foreach_copy_(averaged, current)
        else:
            pairs = list(zip(averaged, current, strict=True))
            for of_floats in (True, False):
                if chosen := [pair for pair in pairs if pair[0].is_floating_point() == of_floats]:
                    self._average([ours for ours, _ in chosen], [theirs for _, theirs in chosen], self.n_averaged)
        self.n_averaged += 1


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """An AveragedModel of `model`; call `.update_parameters(model)` after each step, `.module` is the averaged network.

    Buffers such as running statistics are averaged too. Raises InputError for a decay outside 0 … 1.
    """
    if not 0.0 < decay < 1.0:
        raise InputError(f"train.ema={decay} should be between 0 and 1, such as 0.999; or null for none")
    return _Average(model, decay)
