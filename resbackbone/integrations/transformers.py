"""Our networks as backbones of transformers' detectors and segmenters: DETR and its relatives, RT-DETR, Mask2Former, UperNet.

>>> register()
>>> model = DetrForObjectDetection(DetrConfig(backbone_config=ResbackboneConfig(name="resnet50", out_features=["conv5_x"])))
>>> load_backbone_weights(model, "resnet50.safetensors")

It builds backbones from configurations and looks for none elsewhere, so `register()` comes first, also before a saved model is loaded. The
model type is "resbackbone": with "resnet" in it, DETR would freeze every parameter whose name isn't its own ResNet's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resbackbone.backbone import Backbone
from resbackbone.errors import InputError, nearest
from resbackbone.integrations.hosting import fill, prepare, unit_statistics
from resbackbone.registry import create_backbone

try:
    from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
    from transformers.modeling_outputs import BackboneOutput
except ImportError as error:
    raise InputError("resbackbone.integrations.transformers needs transformers; pip install 'resbackbone[transformers]'") from error

MODEL_TYPE = "resbackbone"
NEEDS = "from resbackbone.integrations.transformers import register; register()"  # stands in every saved configuration
OPTIONS = ("variant", "norm", "norm_eps", "freeze_at", "output_stride", "dilation_rule", "in_channels", "checkpointing")
# What transformers itself gives a configuration beside the fields of PreTrainedConfig.
COMMON = {"num_labels", "torch_dtype", "name_or_path", "attn_implementation", "experts_implementation", "output_attentions", "_commit_hash"}
THEIR_STAGES = {"stem": "conv1", **{f"stage{number}": f"conv{number + 1}_x" for number in range(1, 5)}}
COUNTER = "num_batches_tracked"  # files of fixed norms don't have it, and nothing computed depends on it
HOST_EPS = 1e-5  # of the norms that DETR and its relatives put in the place of BatchNorm2d


class ResbackboneConfig(BackboneConfigMixin, PreTrainedConfig):
    """Which network: `name`, the options of `create_backbone` that OPTIONS lists, and under `network` those that only some networks have.

    `out_features` (a list of our names, conv1 … conv5_x) or `out_indices` (0 is conv1) say which maps a detector gets; None: the last.
    `image_mean` and `image_std` are what the weights expect of RGB images whose white is 1; `load_backbone_weights` sets them.
    """

    model_type = MODEL_TYPE
    attribute_map = {"num_channels": "in_channels"}  # noqa: RUF012  as every class there has it

    name: str = "resnet50"
    variant: str = "v1.5"
    norm: str = "batch"
    norm_eps: float | None = None
    freeze_at: int = 0
    output_stride: int = 32
    dilation_rule: str = "torchvision"
    in_channels: int = 3
    checkpointing: bool = False
    network: dict | None = None
    image_mean: list | None = None
    image_std: list | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs = {key: value for key, value in kwargs.items() if key not in ("stage_names", "needs")}
        features, indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        self._refuse_unknown(kwargs)
        with torch.device("meta"):
            net = self.create()
        self.stage_names = list(net.feature_info)
        if self.image_mean is None or self.image_std is None:
            self.image_mean, self.image_std = unit_statistics(net.preprocessing)
        self.set_output_features_output_indices(out_features=features, out_indices=indices)
        super().__post_init__(**kwargs)

    def create(self, weights: str | Path | None = None) -> Backbone:
        """The network; without weights also where its norms are fixed, for in transformers they come later."""
        options = {option: getattr(self, option) for option in OPTIONS} | {"allow_random_frozen": True, **(self.network or {})}
        return prepare(create_backbone(self.name, weights=weights, **options))

    def verify_out_features_out_indices(self) -> None:
        """transformers' check, behind one that knows our names."""
        for feature in self._out_features or ():
            if feature not in self.stage_names:
                hint = (
                    f" transformers' {feature} is our {THEIR_STAGES[feature]};"
                    if feature in THEIR_STAGES
                    else nearest(feature, self.stage_names)
                )
                raise InputError(f"{self.name} has no feature map {feature!r};{hint} it has {', '.join(self.stage_names)}")
        for index in self._out_indices or ():
            if not -len(self.stage_names) <= index < len(self.stage_names):
                offered = ", ".join(f"{number} ({name})" for number, name in enumerate(self.stage_names))
                raise InputError(f"out_indices={self._out_indices} is not possible; {self.name} has {offered}")
        super().verify_out_features_out_indices()

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "needs": NEEDS}

    def _refuse_unknown(self, given: dict[str, Any]) -> None:
        known = {"name", *OPTIONS, "network", "out_features", "out_indices", "image_mean", "image_std"}
        for key in given.keys() - COMMON - PreTrainedConfig().to_dict().keys():
            raise InputError(
                f"ResbackboneConfig has no option {key!r};{nearest(key, known)} it has {', '.join(sorted(known))}; "
                "options that only some networks have go into network={…}, and weights into load_backbone_weights(model, FILE)"
            )


class ResbackboneBackbone(BackboneMixin, PreTrainedModel):
    """A network of ours behind transformers' interface, its names flat: `conv1.weight`, as in the timm backbones of DETR checkpoints."""

    config_class = ResbackboneConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    has_attentions = False
    network: Backbone

    def __init__(self, config: ResbackboneConfig) -> None:
        super().__init__(config)
        network = config.create()
        self._modules = network._modules  # shared: what a host replaces here is replaced there
        object.__setattr__(self, "network", network)
        self.num_features = [info.channels for info in network.feature_info.values()]
        self._is_empty = any(tensor.is_meta for tensor in network.state_dict().values())  # about to be filled by from_pretrained
        self.post_init()

    def train(self, mode: bool = True) -> ResbackboneBackbone:
        """Set the mode of everything that isn't frozen, and freeze again: `from_pretrained` puts in parameters that learn."""
        super().train(mode)
        self.network.train(mode)
        self.network.freeze(self.config.freeze_at)
        return self

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple[Any, ...]:
        """Normalised images [N, C, H, W] -> the maps of `out_features`; `hidden_states` are all maps."""
        all_maps = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        self.network.out_features = self.stage_names if all_maps else self.out_features
        maps = self.network(pixel_values)
        output = BackboneOutput(
            feature_maps=tuple(maps[name] for name in self.out_features), hidden_states=tuple(maps.values()) if all_maps else None
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _init_weights(self, module: nn.Module) -> None:
        """Our networks are initialised when they are built. What a saved file lacks is an error: transformers would draw it at random."""
        if not self._is_empty:
            return
        tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        for name, tensor in tensors.items():
            if getattr(tensor, "_is_hf_initialized", False):
                continue
            if name == COUNTER:
                tensor.data.zero_()
            else:
                raise InputError(
                    f"the saved weights have no {name} of shape {list(tensor.shape)} for {self.config.name} {self.config.variant}; "
                    "its configuration belongs to other weights"
                )


def register() -> None:
    """Make transformers know model type "resbackbone", for AutoConfig, AutoBackbone and every model with a `backbone_config`."""
    AutoConfig.register(MODEL_TYPE, ResbackboneConfig, exist_ok=True)
    AutoBackbone.register(ResbackboneConfig, ResbackboneBackbone, exist_ok=True)


def load_backbone_weights(model: nn.Module, weights: str | Path) -> str:
    """Load a file of any format we read, or "torchvision", into the backbone of ours inside `model`; returns the report.

    The norms' epsilon comes with the weights, and so does what they expect of images: see `normalization`. The classifier is left.

    Raises InputError for weights that don't fit strictly, for a model without a backbone of ours or with several.
    """
    backbone = _ours_in(model)
    filled = backbone.config.create(weights)
    replaced = any(hasattr(norm, "running_var") and not hasattr(norm, "eps") for norm in backbone.network.modules())
    if replaced and filled.weights_eps not in (None, HOST_EPS):
        raise InputError(
            f"{weights} was trained with norm_eps={filled.weights_eps:g}, and {type(model).__name__} has put in norms of its own, with "
            f"{HOST_EPS:g}; build it with ResbackboneConfig(norm='frozen', …), whose norms it leaves alone"
        )
    fill(backbone.network, filled)
    for config in _configs_of(model, backbone):
        config.norm_eps = filled.weights_eps if config.norm_eps is None else config.norm_eps
        config.image_mean, config.image_std = unit_statistics(filled.preprocessing)
    return filled.load_report


def normalization(model: nn.Module) -> dict[str, list[float]]:
    """`image_mean` and `image_std` for an image processor: those the weights of the backbone of ours inside `model` expect."""
    config = _ours_in(model).config
    return {"image_mean": list(config.image_mean), "image_std": list(config.image_std)}


def _ours_in(model: nn.Module) -> ResbackboneBackbone:
    found = [module for module in model.modules() if isinstance(module, ResbackboneBackbone)]
    if len(found) != 1:
        raise InputError(
            f"{type(model).__name__} holds {len(found)} backbones of ours, where one is needed; "
            "build it with backbone_config=ResbackboneConfig(…)"
        )
    return found[0]


def _configs_of(model: nn.Module, backbone: ResbackboneBackbone) -> list[ResbackboneConfig]:
    """The backbone's configuration, and copies of it that are saved with the models around it."""
    configs = [backbone.config, *(getattr(getattr(module, "config", None), "backbone_config", None) for module in model.modules())]
    return [config for config in {id(config): config for config in configs}.values() if isinstance(config, ResbackboneConfig)]
