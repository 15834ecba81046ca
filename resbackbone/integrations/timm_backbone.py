"""A network of ours with the methods of timm's classes; `resbackbone.integrations.timm` registers it there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from timm.layers import create_classifier
from torch import Tensor, nn

from resbackbone.backbone import Backbone
from resbackbone.errors import InputError
from resbackbone.integrations.hosting import HostedBackbone, prepare
from resbackbone.registry import create_backbone
from resbackbone.resnet import LAYERS
from resbackbone.weights import load_weights


class TimmBackbone(HostedBackbone):
    """A network of ours as timm's classes are: features, head, intermediates. Names in its state dict are those of timm's ResNets.

    Args:
        name: of our network; `options` are those of `create_backbone`.
        variant: v1 | v1.5 | v2.
        num_classes: 0: no classifier, only the pooled features.
        in_chans: of the images.
        output_stride: 32, or 16 / 8 with dilation.
        global_pool: as timm knows it: avg, max, avgmax, catavgmax, or "" for none.
        drop_rate: dropout in front of the classifier.
        drop_path_rate: stochastic depth of the last block.
        weights: a file in any format we read, or "torchvision"; it fits itself to in_chans, and its classifier is left where
            num_classes is another.
    """

    def __init__(
        self,
        name: str,
        *,
        variant: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weights: str | Path | None = None,
        **options: Any,
    ) -> None:
        if drop_path_rate:
            options["stochastic_depth"] = drop_path_rate
        options |= {"variant": variant, "in_channels": in_chans, "output_stride": output_stride, "weights": weights}
        network = create_backbone(name, **options)
        super().__init__(network)
        self.feature_info = _timm_feature_info(network)
        self.num_features = self.head_hidden_size = self.feature_info[-1]["num_chs"]
        self.drop_rate, self.in_chans = drop_rate, in_chans
        self.reset_classifier(num_classes, global_pool)
        if weights is not None and num_classes:  # all but the classifier has been loaded, strictly
            load_weights(network, weights, strict=False, drop_prefixes=())
        prepare(network)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the last map."""
        return self.forward_intermediates(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits, or with `pre_logits` what the classifier would get."""
        pooled = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return pooled if pre_logits else self.fc(pooled)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int | str] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """(the last map computed, the maps of `indices`), or with `intermediates_only` the maps alone.

        indices: from 0 (conv1, stride 2), negative from the end, names such as "conv4_x", or one number for that many last maps.
        norm: has no effect, for there is none that would do for every map.
        """
        if output_fmt != "NCHW":
            raise InputError(f"output_fmt={output_fmt!r} is not possible; the maps are NCHW")
        taken = self._indices(indices)
        maps: dict[int, Tensor] = {}
        for number, name in enumerate(self.network.feature_info):
            if number > max(taken) and (stop_early or intermediates_only):
                break
            x = maps[number] = self.network.run_stage(name, x)
        intermediates = [maps[number] for number in taken]
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int | str] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what lies above the last of `indices`, and the head."""
        taken = self._indices(indices)
        names = list(self.network.feature_info)
        self.network.out_features = [names[number] for number in taken]
        self.network.trim()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, random classifier; 0 classes: none."""
        self.num_classes = num_classes
        pool: Any = self.get_submodule("global_pool").pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of storing them."""
        self.network.checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Which parameters belong together, for a learning rate per layer."""
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def _indices(self, indices: int | Sequence[int | str] | None) -> list[int]:
        names = list(self.network.feature_info)
        asked = range(len(names)) if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
        known: dict[int | str, int] = {name: number for number, name in enumerate(names)}
        known |= {number: number % len(names) for number in range(-len(names), len(names))}
        if not asked or any(index not in known for index in asked):
            offered = ", ".join(f"{number} or '{name}'" for number, name in enumerate(names))
            raise InputError(f"out_indices={indices!r} is not possible; {self.network.architecture} has {offered}")
        return [known[index] for index in asked]


def _timm_feature_info(network: Backbone) -> list[dict[str, Any]]:
    """Every map with timm's numbers, and the module that ends it."""
    stem = "conv1" if network.variant == "v2" else "relu"
    return [
        {"num_chs": info.channels, "reduction": info.stride, "module": LAYERS.get(name, stem)}
        for name, info in network.feature_info.items()
    ]
