"""Batch normalisation over several processes on CPUs; torch's SyncBatchNorm has kernels for GPUs alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverProcesses(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of theirs, since each process's loss depends on all of them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def _sum_over_processes(values: Tensor) -> Tensor:
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    return values if alone else _SumOverProcesses.apply(values)


class CpuSyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose mean and variance are those of all processes' [N, C, H, W] together; each pixel counts once, N may differ.

    Not an nn.SyncBatchNorm, which DistributedDataParallel refuses on a CPU. It computes in float64, also in a single process, so that
    what differs between numbers of processes is the order of sums at that precision.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        features = input.double()
        here = torch.cat([features.sum((0, 2, 3)), features.new_tensor([features.numel() / features.shape[1]])])
        sums = _sum_over_processes(here)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = features - mean.view(1, -1, 1, 1)
        variance = _sum_over_processes(centred.square().sum((0, 2, 3))) / count
        self._update_statistics(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is None:
            return (centred * scale.view(1, -1, 1, 1)).to(input.dtype)
        return (centred * (scale * self.weight).view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(input.dtype)

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


def synchronize_on_cpu(net: nn.Module) -> None:
    """Replace each nn.SyncBatchNorm inside `net` by one that computes on CPUs, with the same parameters, buffers and name."""
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.SyncBatchNorm):
                norm = CpuSyncBatchNorm2d(child.num_features, eps=child.eps, momentum=child.momentum, affine=child.affine)
                norm._parameters, norm._buffers, norm.training = child._parameters, child._buffers, child.training
                setattr(parent, name, norm)
