"""What every host needs of a backbone: freezing it can't lose, channels in its order, and our modules under names it knows."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

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


def unit_statistics(preprocessing: Preprocessing) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of images whose white is 1, which is how hosts count."""
    white = preprocessing.input_range
    return [mean / white for mean in preprocessing.mean], [std / white for std in preprocessing.std]


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
