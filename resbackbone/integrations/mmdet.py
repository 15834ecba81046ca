"""Our networks as backbones of MMDetection: `type="Resbackbone"` where a configuration says `type="ResNet"`, and this module imported.

>>> custom_imports = dict(imports=["resbackbone.integrations.mmdet"], allow_failed_imports=False)
>>> model = dict(backbone=dict(type="Resbackbone", name="resnet50", init_cfg=dict(type="Pretrained", checkpoint="resnet50.safetensors")))

The arguments of its ResNet mean what they mean there, so that nothing has to be deleted from a configuration that is inherited.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resbackbone.backbone import Backbone
from resbackbone.errors import InputError, nearest
from resbackbone.integrations.hosting import HostedBackbone, fill, prepare, unit_statistics
from resbackbone.registry import create_backbone

try:
    from mmdet.registry import MODELS
    from mmengine.model import initialize
except ImportError as error:
    raise InputError("resbackbone.integrations.mmdet needs MMDetection; pip install mmengine mmcv mmdet, or their onedl- forks") from error

logger = logging.getLogger(__name__)
STYLES = {"pytorch": "v1.5", "caffe": "v1"}  # the stride in the 3x3 or in the first 1x1
STRIDES = {  # output stride -> what a configuration has as `strides` and `dilations`
    32: ((1, 2, 2, 2), (1, 1, 1, 1)),
    16: ((1, 2, 2, 1), (1, 1, 1, 2)),
    8: ((1, 2, 1, 1), (1, 1, 2, 4)),
}
# What its ResNet can do and ours can't, with the values that change nothing.
ABSENT = {
    "stem_channels": (None, 64),
    "base_channels": (64,),
    "deep_stem": (False,),
    "avg_down": (False,),
    "conv_cfg": (None,),
    "dcn": (None,),
    "stage_with_dcn": ((False,) * 4,),
    "plugins": (None,),
}
TORCHVISION = "torchvision://"
WHITE = 255.0
GROUPS = 32


@MODELS.register_module()
class Resbackbone(HostedBackbone):
    """Images -> a tuple of maps. Names in its state dict are those of MMDetection's ResNets.

    Args:
        name: of our network; None: the ResNet of `depth`. `options` are those of `create_backbone`, and of its ResNet those that
            change nothing.
        out_indices: 0 is conv2_x, or our names; what lies above the last is removed.
        strides, dilations: of the stages; with the default rule a dilated stage is dilated from its first block, as there.
        frozen_stages: -1: none, 0: conv1, 1: conv1 and conv2_x …; their norms become fixed ones, which can't learn again.
        norm_cfg, norm_eval: with `norm_eval` batch norms keep their statistics in training, and with requires_grad=False in `norm_cfg`
            their affine part as well.
        style: where bottlenecks stride; `variant` has precedence.
        init_cfg: dict(type="Pretrained", checkpoint=…) names weights in any format we read, or "torchvision://resnet50"; they are loaded,
            strictly, by `init_weights()`, which the runner calls. `pretrained` is its old name.
        zero_init_residual: without weights, `init_weights()` starts the last norm of each block at 0.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        depth: int = 50,
        variant: str | None = None,
        in_channels: int = 3,
        num_stages: int = 4,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        dilation_rule: str = "detectron2",
        out_indices: Sequence[int | str] = (0, 1, 2, 3),
        style: str = "pytorch",
        frozen_stages: int = -1,
        norm_cfg: Mapping[str, Any] | None = None,
        norm_eval: bool = True,
        with_cp: bool = False,
        groups: int | None = None,
        base_width: int | None = None,
        zero_init_residual: bool = True,
        pretrained: str | None = None,
        init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        _refuse_absent(options)
        norm = dict(norm_cfg or {"type": "BN"})
        output_stride = _output_stride(num_stages, strides, dilations)
        self_options: dict[str, Any] = {
            "name": name or f"resnet{depth}",
            "variant": variant or _variant(style),
            "norm": _norm(norm, norm_eval),
            "norm_eps": norm.get("eps"),
            "in_channels": in_channels,
            "output_stride": output_stride,
            "freeze_at": frozen_stages + 1,
            "checkpointing": with_cp,
        }
        if output_stride != 32:
            self_options["dilation_rule"] = dilation_rule
        self_options |= {key: value for key, value in (("groups", groups), ("width_per_group", base_width)) if value is not None}
        self_options |= {key: value for key, value in options.items() if key not in ABSENT}
        network = create_backbone(**self_options, allow_random_frozen=True)
        network.out_features = _features(network, out_indices, num_stages)
        network.trim()
        super().__init__(prepare(network))
        self.options, self.norm_eval, self.zero_init_residual = self_options, norm_eval, zero_init_residual
        self.init_cfg = _init_cfgs(init_cfg, pretrained)
        if not norm.get("requires_grad", True):
            for module in self.modules():
                if isinstance(module, _BatchNorm | nn.GroupNorm):
                    module.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network(images).values())

    def train(self, mode: bool = True) -> Resbackbone:
        """Set the mode of everything that isn't frozen; with `norm_eval`, of no batch norm, whatever a host has put in as one."""
        super().train(mode)
        for module in self.modules():
            if self.norm_eval and isinstance(module, _BatchNorm):
                module.eval()
        return self

    def init_weights(self) -> None:
        """Load the weights of `init_cfg`, or without them start as MMDetection's ResNets do."""
        files = [each["checkpoint"] for each in self.init_cfg if each["type"] == "Pretrained"]
        initialize(self, [dict(each) for each in self.init_cfg if each["type"] != "Pretrained"])
        if files:
            self.load(_source(files[-1], self.options["name"]))
        elif self.zero_init_residual and self.network.variant != "v2":
            _zero_last_norms(self.network)

    def load(self, weights: str | Path) -> str:
        """Load a file of any format we read, or "torchvision", strictly; returns the report."""
        filled = create_backbone(**{**self.options, "weights": weights})
        filled.out_features = self.network.out_features
        filled.trim()
        fill(self.network, prepare(filled))
        logger.info("%s; it wants data_preprocessor=dict(%s)", filled.load_report, normalization(self))
        return filled.load_report


def normalization(model: nn.Module) -> dict[str, Any]:
    """`mean`, `std` and `bgr_to_rgb` for the data preprocessor: what the weights of the backbone of ours inside `model` expect."""
    found = [module for module in model.modules() if isinstance(module, Resbackbone)]
    if len(found) != 1:
        raise InputError(
            f"{type(model).__name__} holds {len(found)} backbones of ours, where one is needed; give backbone=dict(type='Resbackbone')"
        )
    mean, std = unit_statistics(found[0].network.preprocessing)
    return {"mean": [each * WHITE for each in mean], "std": [each * WHITE for each in std], "bgr_to_rgb": True}


def _refuse_absent(options: Mapping[str, Any]) -> None:
    for option, neutral in ABSENT.items():
        value = options.get(option, neutral[0])
        if (tuple(value) if isinstance(value, list) else value) not in neutral:
            raise InputError(f"{option}={value!r} asks for what only MMDetection's own ResNet has; leave it at {neutral[0]!r}")


def _variant(style: str) -> str:
    if style not in STYLES:
        raise InputError(f"style={style!r} is not known;{nearest(style, STYLES)} choose from {', '.join(STYLES)}")
    return STYLES[style]


def _output_stride(num_stages: int, strides: Sequence[int], dilations: Sequence[int]) -> int:
    for output_stride, (their_strides, their_dilations) in STRIDES.items():
        if (tuple(strides), tuple(dilations)) == (their_strides[:num_stages], their_dilations[:num_stages]):
            return output_stride
    known = "; ".join(f"{pair[0][:num_stages]} with {pair[1][:num_stages]}" for pair in STRIDES.values())
    raise InputError(
        f"strides={tuple(strides)} with dilations={tuple(dilations)} is not possible for {num_stages} stages; choose from {known}"
    )


def _norm(norm: Mapping[str, Any], norm_eval: bool) -> str:
    kind, learns = norm.get("type"), norm.get("requires_grad", True)
    if kind == "GN" and norm.get("num_groups") == GROUPS:
        return "group"
    if kind not in ("BN", "BN2d", "SyncBN"):
        raise InputError(f"norm_cfg={dict(norm)} is not possible; choose type 'BN' or 'SyncBN', or 'GN' with num_groups={GROUPS}")
    if norm_eval:
        return "eval" if learns else "frozen"
    return "sync" if kind == "SyncBN" else "batch"


def _features(network: Backbone, out_indices: Sequence[int | str], num_stages: int) -> list[str]:
    names = list(network.feature_info)[1 : num_stages + 1]
    known: dict[int | str, str] = {**dict(enumerate(names)), **{name: name for name in names}}
    if not out_indices or any(index not in known for index in out_indices):
        offered = ", ".join(f"{number} or '{name}'" for number, name in enumerate(names))
        raise InputError(f"out_indices={tuple(out_indices)} is not possible; {network.architecture} with {num_stages} stages has {offered}")
    return [known[index] for index in out_indices]


def _init_cfgs(init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, pretrained: str | None) -> list[Mapping[str, Any]]:
    given = [init_cfg] if isinstance(init_cfg, Mapping) else list(init_cfg or ())
    if given and pretrained:
        raise InputError("init_cfg and pretrained both name weights; give init_cfg alone")
    return given + ([{"type": "Pretrained", "checkpoint": pretrained}] if pretrained else [])


def _source(checkpoint: str, name: str) -> str:
    """A file, or "torchvision" for torchvision's own weights of this very network."""
    if checkpoint.startswith(TORCHVISION):
        if checkpoint.removeprefix(TORCHVISION) != name:
            raise InputError(f"checkpoint={checkpoint!r} is for another network than {name}; give {TORCHVISION}{name}, or a file")
        return "torchvision"
    if "://" in checkpoint:
        raise InputError(f"checkpoint={checkpoint!r} isn't downloaded here; download it, and give the file, in any format we read")
    return checkpoint


def _zero_last_norms(network: Backbone) -> None:
    """Each block starts as its shortcut; fixed norms stay, for they would never leave 0."""
    for block in network.modules():
        last = getattr(block, "bn3", getattr(block, "bn2", None))
        if isinstance(last, _BatchNorm | nn.GroupNorm) and last.weight.requires_grad:
            nn.init.zeros_(last.weight)
