"""Table 1 of any network: what each stage puts out, its parameters and multiply-adds (He et al. 2015, Table 1).

Multiply-adds are counted operator by operator, those of convolutions and linear layers; norms, biases, ReLU and pooling are left out.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resbackbone.backbone import Backbone, FeatureInfo
from resbackbone.errors import InputError
from resbackbone.registry import FOREIGN, create_backbone, create_classifier, designed_for
from resbackbone.weights import read_weights

# Table 1's last row, in 10^9; ours are exact, and 18 to 50 layers come out as 1.81, 3.66 and 3.86, which the paper seems to cut, not round.
PAPER_MULTIPLY_ADDS = {
    "plain18": 1.8,
    "plain34": 3.6,
    "resnet18": 1.8,
    "resnet34": 3.6,
    "resnet50": 3.8,
    "resnet101": 7.6,
    "resnet152": 11.3,
}
# Table 6, in 10^6, with option A
PAPER_PARAMETERS = {
    "resnet20_cifar": 0.27,
    "resnet32_cifar": 0.46,
    "resnet44_cifar": 0.66,
    "resnet56_cifar": 0.85,
    "resnet110_cifar": 1.7,
    "resnet1202_cifar": 19.4,
}


@dataclass(frozen=True)
class StageRow:
    """One row of the table; `output` is [C, H, W] or [classes]."""

    name: str
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class NetworkTable:
    """The rows, bottom first, and what else there is to say of a network."""

    rows: tuple[StageRow, ...]
    feature_info: dict[str, FeatureInfo]

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def multiply_adds(self) -> int:
        return sum(row.multiply_adds for row in self.rows)


def describe_network(net: Backbone, input_size: tuple[int, int]) -> NetworkTable:
    """Measure `net`, a backbone or classifier of ours, for one image of `input_size` = (height, width).

    Nothing is computed: the network is copied to the meta device, where tensors have shapes alone.
    """
    shadow = copy.deepcopy(net).to("meta").eval()
    features = torch.empty(1, len(net.preprocessing.mean), *input_size, device="meta")
    rows = _foreign_rows(shadow, features) if net.architecture.startswith(FOREIGN) else _stage_rows(shadow, features)
    return NetworkTable(tuple(rows), dict(net.feature_info))


def _stage_rows(net: Backbone, images: Tensor) -> list[StageRow]:
    rows, features = [], images
    for name in net.feature_info:
        features, count = _counted(lambda x, name=name: net.run_stage(name, x), features)
        rows.append(StageRow(name, tuple(features.shape[1:]), sum(_parameters(module) for module in net.stage_modules(name)), count))
    total, outputs = _total(net, images)
    if isinstance(outputs, Tensor):  # a classifier: what is left is its head
        left = _parameters(net) - sum(row.parameters for row in rows)
        rows.append(StageRow("classifier", tuple(outputs.shape[1:]), left, total - sum(row.multiply_adds for row in rows)))
    return rows


def _foreign_rows(net: Backbone, images: Tensor) -> list[StageRow]:
    """Another library's network runs as a whole, so that its rows say what comes out, and the last one what it all costs."""
    total, maps = _total(net, images)
    rows = [StageRow(name, tuple(features.shape[1:]), 0, 0) for name, features in maps.items()]
    return [*rows, StageRow("total", (), _parameters(net), total)]


def _total(net: Backbone, images: Tensor) -> tuple[int, Any]:
    outputs, count = _counted(net, images)
    return count, outputs


def _counted(function: Any, features: Tensor) -> tuple[Any, int]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = function(features)
    return outputs, counter.get_total_flops() // 2  # it counts a multiplication and an addition as two


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def format_table(table: NetworkTable) -> str:
    """The table as text, totals last, then the feature maps."""
    heads = ("layer", "output", "parameters", "multiply-adds")
    rows = list(table.rows)
    if rows[-1].name != "total":
        rows.append(StageRow("total", (), table.parameters, table.multiply_adds))
    lines = [
        (row.name, " x ".join(map(str, row.output)), *(f"{n:,}" if n else "" for n in (row.parameters, row.multiply_adds))) for row in rows
    ]
    widths = [max(len(line[column]) for line in (heads, *lines)) for column in range(len(heads))]
    text = [_aligned(line, widths) for line in (heads, *lines)]
    text.insert(1, "-" * len(text[0]))
    text.append(f"{table.parameters / 1e6:.2f} million parameters, {table.multiply_adds / 1e9:.2f} x 10^9 multiply-adds")
    maps = ", ".join(f"{name} ({info.channels} channels, stride {info.stride})" for name, info in table.feature_info.items())
    return "\n".join([*text, f"feature maps: {maps}"])


def _aligned(line: tuple[str, ...], widths: list[int]) -> str:
    name, output, *numbers = line
    cells = [
        name.ljust(widths[0]),
        output.ljust(widths[1]),
        *(number.rjust(width) for number, width in zip(numbers, widths[2:], strict=True)),
    ]
    return "  ".join(cells).rstrip()


def describe(
    name: str, *, input_size: int | None = None, variant: str = "v1", shortcut: str | None = None, weights: str | Path | None = None
) -> str:
    """Table 1 of a network by name, as text; with `weights`, a line on how they fit. InputError as `create_backbone` raises it.

    input_size: pixels; None: the size it was designed for.
    """
    size = designed_for(name).input_size if input_size is None else input_size
    if size < 1:
        raise InputError(f"--input-size {size} is not possible; it must be at least 1, usually 224")
    # Ours have their shapes without their numbers, which saves most of the time.
    with torch.device("meta") if weights is None and ":" not in name else nullcontext():
        net = whole_network(name, variant, shortcut, weights)
    table = describe_network(net, (size, size))
    facts = "".join(f", {fact}" for fact in (net.variant, net.shortcut and f"shortcut {net.shortcut}") if fact)
    lines = [f"{name}{facts}, one image of {size} x {size}", format_table(table), *_the_paper_says(net, size)]
    return "\n".join([*lines, *([net.load_report] if net.load_report else [])])


def _the_paper_says(net: Backbone, size: int) -> list[str]:
    """The paper's own figure for this very network, where it has one."""
    name = net.architecture
    if name in PAPER_MULTIPLY_ADDS and size == 224 and net.variant in ("", "v1"):
        return [f"the paper's Table 1 says {PAPER_MULTIPLY_ADDS[name]} x 10^9 multiply-adds"]
    if name in PAPER_PARAMETERS and net.variant == "" and net.shortcut == "A":
        return [f"the paper's Table 6 says {PAPER_PARAMETERS[name]} million parameters"]
    return []


def whole_network(name: str, variant: str, shortcut: str | None, weights: str | Path | None) -> Backbone:
    """The classifier where there is one; with weights from a file, only if they include its head."""
    if name.startswith(FOREIGN):
        return create_backbone(name, weights=weights)
    options: dict[str, Any] = {} if shortcut is None else {"shortcut": shortcut}
    net = create_backbone(name, variant=variant, **options)
    if weights is None or str(weights) == "torchvision":
        return create_classifier(name, variant=variant, weights=weights, **options) if net.head_prefixes else net
    head = [tensor for key, tensor in read_weights(weights)[0].items() if net.head_prefixes and key.startswith(net.head_prefixes)]
    matrices = [tensor for tensor in head if tensor.ndim == 2]
    if matrices:
        return create_classifier(name, variant=variant, weights=weights, num_classes=matrices[-1].shape[0], **options)
    return create_backbone(name, variant=variant, weights=weights, **options)
