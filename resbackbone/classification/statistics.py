"""Batch norm's statistics computed anew over the training images, as they are before appendix A fixes them for detection."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resbackbone.classification.config import TrainConfig
from resbackbone.runtime import distributed


@torch.no_grad()
def recompute_statistics(net: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set each batch norm's running mean and variance to those of its input over all of `batches` and all processes.

    batches: what the network takes, float [N, 3, S, S]. The layers normalise by the batch at hand, as in training. The variance is of
    all values about their common mean (the running average that training leaves is one of batch variances, and remembers the last
    few batches only). Returns how many images were seen; a network without batch norms is left as it is.
    """
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    sums = [_Sums(norm) for norm in norms]
    was_training, images = net.training, 0
    try:
        net.train()
        for batch in batches if norms else ():
            net(batch)
            images += len(batch)
    finally:
        for total in sums:
            total.handle.remove()
        net.train(was_training)
    for total in sums:
        total.apply()
    return sum(distributed.gather_objects(images))


def training_images(
    loader: Any, sampler: Any, settings: TrainConfig, normalize: Callable[[Tensor], Tensor], device: torch.device
) -> Iterator[Tensor]:
    """This process's share of `bn_images` training images, in whole batches and within one epoch, as the network takes them; -1: of all."""
    wanted, count = settings.bn_images, sampler.batches_per_epoch
    if wanted >= 0:
        count = min(count, -(-wanted // settings.batch_size))
    with contextlib.closing(iter(loader)) as batches:
        for _ in range(count):
            yield normalize(next(batches).to(device).images)


class _Sums:
    """Per channel, the count, sum and sum of squares of everything that goes into one norm, in float64."""

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm
        self.values: Tensor | None = None
        self.handle = norm.register_forward_pre_hook(self._add)

    def _add(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        features = inputs[0].double()
        count = features.new_full((features.shape[1],), features.numel() / features.shape[1])
        found = torch.stack([count, features.sum((0, 2, 3)), features.square().sum((0, 2, 3))])
        self.values = found if self.values is None else self.values + found

    def apply(self) -> None:
        here = None if self.values is None else self.values.cpu()
        everywhere = [values for values in distributed.gather_objects(here) if values is not None]
        if not everywhere or self.norm.running_mean is None or self.norm.running_var is None:
            return
        count, total, squares = torch.stack(everywhere).sum(0)
        mean = total / count
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_((squares / count - mean.square()).clamp(min=0) * count / (count - 1).clamp(min=1))
