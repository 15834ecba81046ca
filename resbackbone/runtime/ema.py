"""An exponential moving average of the weights, which often evaluates better than the last step's."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resbackbone.errors import InputError


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """torch's AveragedModel of `model`; call `.update_parameters(model)` after each step, `.module` is the averaged network.

    Buffers such as running statistics are averaged too. Raises InputError for a decay outside 0 … 1.
    """
    if not 0.0 < decay < 1.0:
        raise InputError(f"train.ema={decay} should be between 0 and 1, such as 0.999; or null for none")
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
