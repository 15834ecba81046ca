"""Our networks as encoders of segmentation_models_pytorch, under `rb_NAME`: rb_resnet50 is v1.5, rb_resnet50_v1 and _v2 the others.

>>> register()
>>> register_encoder("rb_mine", "resnet50", weights="resnet50.safetensors", freeze_at=2)
>>> segmentation_models_pytorch.Unet("rb_mine", encoder_weights=None)

It keeps encoders in a dict and looks for none elsewhere, so registering comes first. `encoder_weights` is None always: it names
repositories of a hub, while our weights are files, and belong to a registered encoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resbackbone.backbone import Preprocessing
from resbackbone.errors import InputError
from resbackbone.integrations.hosting import PREFIX, HostedBackbone, prepare, variants_of
from resbackbone.registry import create_backbone
from resbackbone.resnet import TABLE_1

try:
    from segmentation_models_pytorch.encoders import encoders
    from segmentation_models_pytorch.encoders._base import EncoderMixin
except ImportError as error:
    raise InputError("resbackbone.integrations.smp needs segmentation_models_pytorch; pip install 'resbackbone[smp]'") from error

STRIDES = (2, 4, 8, 16, 32)  # of an encoder's maps, as decoders take them for granted; the image itself comes first


class Encoder(HostedBackbone, EncoderMixin):
    """Images -> [images, conv1, conv2_x …], `depth` maps. Names in its state dict are those of the host's own ResNets.

    Args:
        name: of our network; `options` are those of `create_backbone`.
        depth: how many maps, 1 to 5; what lies above is removed.
        output_stride: 32, or 16 / 8 with dilation.
    """

    def __init__(self, name: str, *, depth: int = 5, output_stride: int = 32, **options: Any) -> None:
        network = create_backbone(name, output_stride=output_stride, **options)
        names = list(network.feature_info)
        if not 1 <= depth <= len(names):
            raise InputError(f"encoder_depth={depth} is not possible; {name} has {len(names)} maps")
        network.out_features = names[:depth]
        network.trim()
        super().__init__(prepare(network))
        self.options = {"name": name, "depth": depth, "output_stride": output_stride, **options}
        self._depth, self._output_stride, self._in_channels = depth, output_stride, len(network.preprocessing.mean)
        self._out_channels = [self._in_channels, *(info.channels for info in network.feature_info.values())]

    @property
    def preprocessing(self) -> Preprocessing:
        """What the weights expect of an image."""
        return self.network.preprocessing

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images, *self.network(images).values()]

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """Build the network again for images of that many channels: its weights fit themselves to them."""
        if in_channels != self._in_channels:
            self.__dict__.update(Encoder(**{**self.options, "in_channels": in_channels}).__dict__)

    def make_dilated(self, output_stride: int) -> None:
        """Nothing to do: it was built so, by the dilation rule it was registered with. The host's way would use its own rule."""


class NoRepositories(dict[str, Any]):
    """What `encoder_weights` may be, which is nothing; asking says what to do instead."""

    def __contains__(self, weights: object) -> bool:
        raise InputError(
            f"encoder_weights={weights!r} names no weights of ours; give encoder_weights=None, and for weights of yours "
            "register_encoder('rb_mine', 'resnet50', weights=FILE) before"
        )


def register() -> list[str]:
    """Register the residual and plain ImageNet networks, without weights; returns the names."""
    return [
        _add(f"{PREFIX}{name}{suffix}", name, {"variant": variant}) for name in TABLE_1 for suffix, variant in variants_of(name).items()
    ]


def register_encoder(encoder_name: str, name: str, **options: Any) -> str:
    """Register a network with its weights and whatever else `create_backbone` takes, under a name of yours.

    Raises InputError for a name that is taken, and for options that don't go together.
    """
    for option, instead in (("in_channels", "in_channels"), ("output_stride", "encoder_output_stride"), ("out_features", "encoder_depth")):
        if option in options:
            raise InputError(f"{option} is the segmentation model's to say; leave it out here and give the model {instead}")
    with torch.device("meta"):
        network = create_backbone(name, **{**options, "weights": None, "allow_random_frozen": True})
    strides = tuple(info.stride for info in network.feature_info.values())
    if strides != STRIDES:
        raise InputError(f"decoders need maps of strides {STRIDES}, and {name} has {strides}; take one of {', '.join(TABLE_1)}")
    return _add(encoder_name, name, options)


def _add(encoder_name: str, name: str, options: dict[str, Any]) -> str:
    params = {"name": name, **options}
    known = encoders.get(encoder_name)
    if known is not None and (known["encoder"], known["params"]) != (Encoder, params):
        raise InputError(f"there is an encoder {encoder_name!r} already; choose another name, such as rb_mine")
    encoders[encoder_name] = {"encoder": Encoder, "pretrained_settings": NoRepositories(), "params": params}
    return encoder_name
