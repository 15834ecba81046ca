"""What every backbone is: images in, ordered feature maps out, with channels and strides known before any forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from resbackbone.errors import InputError, nearest

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class FeatureInfo:
    """One feature map: its channels, and how many image pixels one of its cells spans."""

    channels: int
    stride: int


@dataclass(frozen=True)
class Preprocessing:
    """What the weights expect of an image: `(image * input_range / white - mean) / std`, channels in `color_order`."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    color_order: str = "RGB"
    input_range: float = 1.0  # the value of white before mean and std: 1 for torchvision's weights, 255 for Caffe's


def imagenet_preprocessing(in_channels: int = 3) -> Preprocessing:
    """ImageNet's statistics; for other than three channels, their average for each channel."""
    if in_channels == len(IMAGENET_MEAN):
        return Preprocessing()
    return Preprocessing(mean=(sum(IMAGENET_MEAN) / 3,) * in_channels, std=(sum(IMAGENET_STD) / 3,) * in_channels)


class RegionHead(nn.Module):
    """The top of a classifier, run on each pooled region: [R, C, P, P] -> [R, out_channels] or [R, out_channels, h, w].

    `in_feature` names the map to pool from, `pool_size` is P, `out_channels` what comes out.
    """

    in_feature: str
    pool_size: int
    out_channels: int


class Backbone(nn.Module):
    """Ordered stages; each ends in a named feature map. A subclass says what a stage computes and which modules it owns.

    Args:
        feature_info: every map the network has, bottom first.
        preprocessing: what the input must look like.
        checkpointing: recompute activations in the backward pass instead of storing them.
    """

    head_prefixes: tuple[str, ...] = ()  # keys of the classifier's head, which a backbone leaves in a weights file
    architecture: str = ""  # the name it was registered under
    variant: str = ""  # of a network that has several
    shortcut: str = ""  # of a residual network: A, B or C
    weights: str | Path | None = None  # what it was created with, and what loading said of it
    load_report: str = ""
    weights_eps: float | None = None  # the norms' epsilon, where the weights brought one

    def __init__(
        self, feature_info: dict[str, FeatureInfo], *, preprocessing: Preprocessing | None = None, checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.feature_info = dict(feature_info)
        self.preprocessing = preprocessing or Preprocessing()
        self.checkpointing = checkpointing
        self.frozen_stages = 0
        self._out_features = tuple(feature_info)

    @property
    def out_features(self) -> tuple[str, ...]:
        """The maps `forward` returns, bottom first. Assigning an unknown name raises InputError."""
        return self._out_features

    @out_features.setter
    def out_features(self, names: Sequence[str]) -> None:
        wanted = (names,) if isinstance(names, str) else tuple(names)
        for name in wanted:
            if name not in self.feature_info:
                raise InputError(
                    f"{self.architecture or type(self).__name__} has no feature map {name!r};{nearest(name, self.feature_info)} "
                    f"it has {', '.join(self.feature_info)}"
                )
        if not wanted:
            raise InputError(f"out_features is empty; choose from {', '.join(self.feature_info)}")
        self._out_features = tuple(name for name in self.feature_info if name in wanted)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[N, 3, H, W] normalised images -> name -> [N, C, ceil(H / s), ceil(W / s)]; nothing above the last map asked for is computed."""
        maps: dict[str, Tensor] = {}
        features = images
        for name in self.feature_info:
            features = self.run_stage(name, features)
            if name in self._out_features:
                maps[name] = features
            if name == self._out_features[-1]:
                break
        return maps

    def run_stage(self, name: str, features: Tensor) -> Tensor:
        """The map `name` from the map below it (the images for the first)."""
        raise TypeError(f"{type(self).__name__} must define run_stage")

    def stage_modules(self, name: str) -> tuple[nn.Module, ...]:
        """The modules that stage `name` owns, for freezing and counting."""
        raise TypeError(f"{type(self).__name__} must define stage_modules")

    def freeze(self, at: int) -> None:
        """Freeze the lowest `at` stages (1 = conv1, 2 = conv1 and conv2_x …): no gradients, norms in eval, also after .train()."""
        if not 0 <= at <= len(self.feature_info):
            raise InputError(f"freeze_at={at} is not possible; {self.architecture} takes 0 to {len(self.feature_info)}")
        for number, name in enumerate(self.feature_info, 1):
            if number <= max(at, self.frozen_stages):  # the stages frozen before and not now learn again
                for module in self.stage_modules(name):
                    module.requires_grad_(number > at)
        self.frozen_stages = at
        self.train(self.training)

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode of everything that isn't frozen."""
        super().train(mode)
        for name in list(self.feature_info)[: self.frozen_stages]:
            for module in self.stage_modules(name):
                module.eval()
        return self

    def trim(self) -> None:
        """Remove the stages above the last of `out_features`, which would otherwise be parameters that never get a gradient."""
        names = list(self.feature_info)
        for name in names[names.index(self._out_features[-1]) + 1 :]:
            self.remove_stage(name)
            del self.feature_info[name]
        self.frozen_stages = min(self.frozen_stages, len(self.feature_info))

    def remove_stage(self, name: str) -> None:
        """Drop the modules of the topmost stage."""
        owned = set(self.stage_modules(name))
        for child_name, child in list(self.named_children()):
            if child in owned:
                delattr(self, child_name)

    def region_head_available(self) -> bool:
        """Whether `split_region_head` can take the top off for a C4 detector."""
        return False

    def split_region_head(self) -> RegionHead:
        """Take the top off: what a C4 detector runs on each region leaves this backbone. InputError where there is none to take."""
        raise InputError(
            f"{self.architecture or type(self).__name__} has no top that can run on each region; use model.head=fpn or model.head=dc5"
        )


class StagedBackbone(Backbone):
    """A backbone from a chain of modules: `{"conv1": (module, FeatureInfo(64, 2)), …}`, bottom first. Enough for most new ones."""

    def __init__(
        self,
        stages: dict[str, tuple[nn.Module, FeatureInfo]],
        *,
        preprocessing: Preprocessing | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__({name: info for name, (_, info) in stages.items()}, preprocessing=preprocessing, checkpointing=checkpointing)
        for name, (module, _) in stages.items():
            self.add_module(name, module)

    def run_stage(self, name: str, features: Tensor) -> Tensor:
        return run_blocks([self.get_submodule(name)], features, checkpointing=self.checkpointing)

    def stage_modules(self, name: str) -> tuple[nn.Module, ...]:
        return (self.get_submodule(name),)


def run_blocks(blocks: Iterable[nn.Module], features: Tensor, *, checkpointing: bool) -> Tensor:
    """Run blocks one after the other; with `checkpointing`, keep only their inputs for the backward pass."""
    for block in blocks:
        features = recompute(block, (block,), features, checkpointing=checkpointing)
    return features


def recompute(function: Callable[[Tensor], Tensor], owned: Iterable[nn.Module], features: Tensor, *, checkpointing: bool) -> Tensor:
    """function(features); with `checkpointing`, its activations are computed again in the backward pass. `owned` are its modules."""
    modules = [module for child in owned for module in child.modules()]
    if not (checkpointing and torch.is_grad_enabled() and any(p.requires_grad for m in modules for p in m.parameters(recurse=False))):
        return function(features)
    norms = [module for module in modules if isinstance(module, _BatchNorm) and module.training]
    if not norms:
        return checkpoint(function, features, use_reentrant=False)
    return checkpoint(function, features, use_reentrant=False, context_fn=partial(_checkpoint_contexts, norms))


def _checkpoint_contexts(norms: list[_BatchNorm]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_untouched(norms)


@contextmanager
def _statistics_untouched(norms: list[_BatchNorm]) -> Iterator[None]:
    """The second forward of a checkpointed block must not move the running statistics again: it mixes in nothing of the batch."""
    momenta = [norm.momentum for norm in norms]
    counters = [(norm.num_batches_tracked, norm.num_batches_tracked.clone()) for norm in norms if norm.num_batches_tracked is not None]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for counter, value in counters:
            counter.copy_(value)
