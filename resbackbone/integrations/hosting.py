"""What every host needs of a backbone: freezing it can't lose, channels in its order, and our modules under names it knows."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from resbackbone.backbone import Backbone, Preprocessing
from resbackbone.layers import EvalBatchNorm2d, FrozenBatchNorm2d
from resbackbone.resnet import TABLE_1, Bottleneck

PREFIX = "rb_"  # where we register: a name of the host's own would replace its network
BATCH_NORMS = (nn.BatchNorm2d, EvalBatchNorm2d, nn.SyncBatchNorm)  # these very types: a subclass of others may do more


class HostedBackbone(nn.Module):
    """A backbone behind a host's interface, its children flat in the state dict: `conv1.weight`, not `backbone.conv1.weight`.

    `network` is the backbone. It isn't a child; both share one table of children, so that what a host replaces in one is replaced in
    the other, also in copies.
    """

    network: Backbone

    def __init__(self, network: Backbone) -> None:
        super().__init__()
        self._modules = network._modules
        object.__setattr__(self, "network", network)

    def train(self, mode: bool = True) -> HostedBackbone:
        """Set the mode of everything that isn't frozen."""
        super().train(mode)
        self.network.train(mode)
        return self


def prepare(network: Backbone) -> Backbone:
    """Make a backbone ready for any host, in place: RGB, and the norms of frozen stages without anything that could learn."""
    _take_rgb(network)
    _fix_frozen_norms(network)
    return network


def fill(network: Backbone, filled: Backbone) -> None:
    """Move the weights of `filled`, the same network made with weights and prepared, into one that a host has built and perhaps changed.

    The norms' epsilons and what images must be like come with them.
    """
    network.load_state_dict(filled.state_dict(), strict=True)
    for path, norm in network.named_modules():
        if hasattr(norm, "running_var") and hasattr(norm, "eps"):
            norm.eps = filled.get_submodule(path).eps
    network.preprocessing, network.weights, network.load_report = filled.preprocessing, filled.weights, filled.load_report


def unit_statistics(preprocessing: Preprocessing) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of images whose white is 1, which is how hosts count."""
    white = preprocessing.input_range
    return [mean / white for mean in preprocessing.mean], [std / white for std in preprocessing.std]


def warn_if_normalised_twice(images: Tensor, preprocessing: Preprocessing) -> None:
    """Warn where a batch has values that normalising once cannot give: darker than black or brighter than white by half their distance.

    Photographs have dark pixels, which end far below when they are normalised again. Hosts call this with their first batch only, since
    looking at values makes a GPU wait.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or images.device.type == "meta" or not images.numel():
        return
    bounds = [((value - mean) / std) for mean, std in zip(*unit_statistics(preprocessing), strict=True) for value in (0.0, 1.0)]
    slack = (max(bounds) - min(bounds)) / 2
    low, high = (float(value) for value in images.detach().aminmax())
    if low < min(bounds) - slack or high > max(bounds) + slack:
        warnings.warn(
            f"images have values from {low:.3g} to {high:.3g}; normalised once, they lie between {min(bounds):.3g} and {max(bounds):.3g}. "
            "They were normalised twice, or are not from 0 to 1: torchvision's detectors normalise themselves, so leave your own out",
            stacklevel=3,
        )


def variants_of(name: str) -> dict[str, str]:
    """What a variant adds to a registered name -> the variant, for those that differ.

    v1 and v1.5 do in bottlenecks alone, and a plain network has no v2.
    """
    bottlenecks = name in TABLE_1 and TABLE_1[name].block is Bottleneck
    return {"": "v1.5"} | ({"_v1": "v1"} if bottlenecks else {}) | ({} if name.startswith("plain") else {"_v2": "v2"})


def _take_rgb(network: Backbone) -> None:
    """Hosts give RGB: for weights that want BGR, turn the first convolution's input round, which computes the same."""
    wanted = network.preprocessing
    if wanted.color_order != "BGR":
        return
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    first.weight.data = first.weight.data.flip(1)
    network.preprocessing = replace(wanted, color_order="RGB", mean=wanted.mean[::-1], std=wanted.std[::-1])


def _fix_frozen_norms(network: Backbone) -> None:
    """A batch norm kept in eval by our `train()` would learn again in a host that takes the modules out; a FrozenBatchNorm2d can't."""
    stages = list(network.feature_info)[: network.frozen_stages]
    frozen = {child for stage in stages for module in network.stage_modules(stage) for child in module.modules()}
    for path, norm in list(network.named_modules()):
        if norm in frozen and type(norm) in BATCH_NORMS:
            fixed = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
            fixed.load_state_dict(norm.state_dict())
            network.set_submodule(path, fixed.eval())
