"""What the tests of all hosts share: networks as training leaves them, images, and a few steps of training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d


def randomise(model: nn.Module) -> nn.Module:
    """Norms as training leaves them, and predictors that find something: fresh ones hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            module.weight.data.uniform_(0.3, 0.6, generator=generator)
            module.bias.data.uniform_(-0.3, 0.3, generator=generator)
            module.running_mean.data.uniform_(-0.3, 0.3, generator=generator)
            module.running_var.data.uniform_(0.5, 1.0, generator=generator)
    return model


def photos(count: int = 1, channels: int = 3, size: tuple[int, int] = (64, 80)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(channels, *size, generator=generator) for _ in range(count)]


def batch_of(count: int = 2) -> Tensor:
    return torch.stack(photos(count, size=(32, 48)))


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return 0.0 if theirs.numel() == 0 else float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))


def losses_of_training(model: nn.Module, step: Callable[[nn.Module], Tensor], *, rate: float = 2e-5, count: int = 5) -> list[float]:
    """A few steps on what may learn."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=rate)
    losses = []
    for _ in range(count):
        torch.manual_seed(0)  # the same sampled anchors and regions, so that the losses can be compared
        loss = step(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
