"""How strong a network's signals are: each 3x3 layer's response (He et al. 2015, Figure 7) and the gradient that reaches each block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resbackbone.backbone import Backbone
from resbackbone.blocks import Block
from resbackbone.errors import InputError
from resbackbone.images import load_images
from resbackbone.layers import FrozenBatchNorm2d
from resbackbone.registry import designed_for

NORM_TYPES = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Signal:
    """One layer or block by its module name, and how strong its signal is."""

    name: str
    strength: float


@torch.no_grad()
def layer_responses(net: Backbone, images: Tensor) -> list[Signal]:
    """The standard deviation of each 3x3 layer's output, after its norm and before ReLU or addition; in eval, in the order of the layers.

    A convolution that no norm follows (VGG-16; the last one of a v2 block) counts as it is.

    Args:
        net: a backbone or classifier.
        images: [N, C, H, W], normalised as `net.preprocessing` says.

    Raises InputError for frozen norms, which are folded into the convolutions and so have no output of their own.
    """
    if any(isinstance(module, FrozenBatchNorm2d) for module in net.modules()):
        raise InputError(
            "norm 'frozen' is computed inside the convolution before it; build the network with norm='batch' for its responses"
        )
    found: dict[str, float] = {}
    with _evaluating(net), _listening(net, found):
        net(images)
    return [Signal(name, strength) for name, strength in found.items()]


@contextmanager
def _listening(net: nn.Module, found: dict[str, float]) -> Iterator[None]:
    """Note each 3x3 convolution's response in `found`, and replace it by that of the norm which takes this very tensor."""
    latest: dict[str, Tensor] = {}

    def after_convolution(name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            latest.clear()  # a norm follows its convolution at once
            latest[name] = output
            found[name] = output.std(correction=0).item()

        return note

    def after_norm(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for name, convolved in latest.items():
            if inputs[0] is convolved:
                found[name] = output.std(correction=0).item()

    handles = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            handles.append(module.register_forward_hook(after_convolution(name)))
        elif isinstance(module, NORM_TYPES):
            handles.append(module.register_forward_hook(after_norm))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradient_norms(net: Backbone, images: Tensor, labels: Tensor) -> list[Signal]:
    """The L2 norm of the cross-entropy's gradient with respect to each block's parameters; in eval, bottom first.

    Args:
        net: a classifier.
        images: [N, C, H, W], normalised as `net.preprocessing` says.
        labels: [N] integers.

    Raises InputError for a network that has no blocks or puts out no logits.
    """
    blocks = {name: module for name, module in net.named_modules() if isinstance(module, Block)}
    if not blocks:
        raise InputError(
            f"{net.architecture or type(net).__name__} has no blocks; gradient norms are measured on residual and plain networks"
        )
    with _evaluating(net):
        logits: Any = net(images)
        if not isinstance(logits, Tensor):
            raise InputError("gradient norms need a classifier; build it with create_classifier")
        names, parameters = zip(*((name, p) for name, block in blocks.items() for p in block.parameters() if p.requires_grad), strict=True)
        gradients = torch.autograd.grad(F.cross_entropy(logits, labels), parameters)
    squares = dict.fromkeys(names, 0.0)
    for name, gradient in zip(names, gradients, strict=True):
        squares[name] += gradient.double().square().sum().item()
    return [Signal(name, square**0.5) for name, square in squares.items()]


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    was_training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(was_training)


def describe_responses(net: Backbone, source: str | Path, *, input_size: int | None, limit: int, plot: str | Path | None) -> str:
    """Layer responses to the images of `source` (see images.py) and, where they have labels, gradient norms; as text, and as a plot."""
    size = designed_for(net.architecture).input_size if input_size is None else input_size
    images, labels = load_images(source, size=size, preprocessing=net.preprocessing, limit=limit)
    responses = layer_responses(net, images)
    text = [format_signals(responses, f"standard deviation of each 3x3 layer's response to {len(images)} images")]
    if labels is not None:
        text.append(format_signals(gradient_norms(net, images, labels), "norm of the loss's gradient in each block"))
    if plot is not None:
        plot_signals({net.architecture: responses}, plot, ylabel="standard deviation of the response")
        text.append(f"drawn: {plot}")
    return "\n".join(text)


def plot_signals(curves: Mapping[str, Sequence[Signal]], path: str | Path, *, ylabel: str) -> None:
    """Two panels as in Figure 7: every curve in the order of its layers, and sorted from strong to weak. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("a plot needs matplotlib; pip install matplotlib") from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for label, signals in curves.items():
        strengths = [signal.strength for signal in signals]
        axes[0].plot(strengths, marker=".", label=label)
        axes[1].plot(sorted(strengths, reverse=True), marker=".", label=label)
    for panel, xlabel in zip(axes, ("in order, from the input", "sorted by size"), strict=True):
        panel.set(xlabel=xlabel)
        panel.grid(alpha=0.3)
        panel.legend()
    axes[0].set(ylabel=ylabel)
    figure.savefig(path, dpi=100)


def format_signals(signals: Sequence[Signal], heading: str) -> str:
    """One line a layer: name and strength."""
    width = max(len(signal.name) for signal in signals)
    return "\n".join([heading, *(f"{signal.name.ljust(width)}  {signal.strength:.4g}" for signal in signals)])
