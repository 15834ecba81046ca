"""Networks of torch.nn alone with our keys: what converters are held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, channels: Sequence[int], sizes: Sequence[int], stride: int, *, shortcut: str, bias: bool) -> None:
        super().__init__()
        self.count = len(sizes)
        for k, size in enumerate(sizes, 1):
            conv = nn.Conv2d(channels[k - 1], channels[k], size, stride=stride if k == 1 else 1, padding=size // 2, bias=bias)
            self.add_module(f"conv{k}", conv)
            self.add_module(f"bn{k}", nn.BatchNorm2d(channels[k]))
        self.shortcut = shortcut
        if shortcut == "projection":
            conv = nn.Conv2d(channels[0], channels[-1], 1, stride=stride, bias=bias)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(channels[-1]))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for k in range(1, self.count + 1):
            out = getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(out))
            out = out.relu() if k < self.count else out
        if self.shortcut != "none":
            out = out + (self.downsample(x) if self.shortcut == "projection" else x)
        return out.relu()


class Reference(nn.Module):
    """A ResNet of any size: `kind` is imagenet (bottlenecks, stride in the first 1x1), cifar, or plain."""

    def __init__(self, kind: str, depths: Sequence[int], width: int, *, bias: bool) -> None:
        super().__init__()
        self.imagenet = kind == "imagenet"
        size = 7 if self.imagenet else 3
        self.conv1 = nn.Conv2d(3, width, size, stride=2 if self.imagenet else 1, padding=size // 2, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage, depth in enumerate(depths):
            inner = width * 2**stage
            blocks = []
            for number_ in range(depth):
                stride = 2 if stage and number_ == 0 else 1
                sizes, inside = ((1, 3, 1), [inner, inner, 4 * inner]) if self.imagenet else ((3, 3), [inner, inner])
                shortcut = "projection" if channels != inside[-1] or stride == 2 else "identity"
                blocks.append(
                    Block([channels, *inside], sizes, stride, shortcut="none" if kind == "plain" else shortcut, bias=bias),
                )
                channels = inside[-1]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, 10)

    def stages(self) -> list[nn.Sequential]:
        return [child for name, child in self.named_children() if name.startswith("layer")]  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = nn.functional.max_pool2d(x, 3, 2, 1) if self.imagenet else x
        for stage in self.stages():
            x = stage(x)
        return self.fc(x.mean((2, 3)))


def randomise(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in ((module.weight, 0.5, 1), (module.bias, -0.3, 0.3), (module.running_mean, -0.3, 0.3)):
                values.data.uniform_(low, high, generator=generator)
            module.running_var.uniform_(0.5, 1, generator=generator)
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            module.bias.data.uniform_(-0.5, 0.5, generator=generator)
    return net.eval()
