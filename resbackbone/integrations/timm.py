"""Our networks in timm, under `rb_NAME`: rb_resnet50 is v1.5, rb_resnet50_v1 and rb_resnet50_v2 are the others.

>>> register()
>>> timm.create_model("rb_resnet50", features_only=True, out_indices=("conv4_x", "conv5_x"), weights="resnet50.safetensors")

timm finds a model when a module that registers it has been imported; it looks for none, so `register()` must be called first. Whatever
takes timm's names takes these: effdet, anomalib, transformers, `tu-` encoders of segmentation_models_pytorch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from resbackbone.backbone import Preprocessing
from resbackbone.cifar import CIFAR10
from resbackbone.errors import InputError
from resbackbone.integrations.hosting import PREFIX, unit_statistics, variants_of
from resbackbone.registry import designed_for, list_backbones
from resbackbone.resnet import TABLE_1

try:
    import timm
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

    from resbackbone.integrations.timm_backbone import TimmBackbone
except ImportError as error:
    raise InputError("resbackbone.integrations.timm needs timm; pip install 'resbackbone[timm]'") from error

default_cfgs: dict[str, Any] = {}  # timm looks for the configurations of a module's models under this name


def register() -> list[str]:
    """Register every residual and plain network of ours in timm, once; returns the names. InputError if one is taken."""
    names = [*TABLE_1, *list_backbones("*_cifar")]
    return [_register(f"{PREFIX}{name}{suffix}", name, variant) for name in names for suffix, variant in variants_of(name).items()]


def _register(key: str, name: str, variant: str) -> str:
    if timm.is_model(key):
        if timm.model_entrypoint(key).__module__ != __name__:
            raise InputError(
                f"timm has a model {key!r} already, registered by {timm.model_entrypoint(key).__module__}; register ours first"
            )
        return key

    def entry_point(pretrained: bool = False, **options: Any) -> nn.Module:
        return _create(key, partial(TimmBackbone, name, variant=variant), pretrained, **options)

    entry_point.__name__ = entry_point.__qualname__ = key
    default_cfgs.update(generate_default_cfgs({key: _configuration(name)}))
    globals()[key] = register_model(entry_point)  # timm puts the name into this module's __all__
    return key


def _configuration(name: str) -> dict[str, Any]:
    task = designed_for(name)
    mean, std = unit_statistics(CIFAR10 if name.endswith("_cifar") else Preprocessing())
    size = (3, task.input_size, task.input_size)
    stride = 4 if name.endswith("_cifar") else 32  # of the last map; building each network to ask it would take seconds
    return {
        "input_size": size,
        "pool_size": (task.input_size // stride,) * 2,
        "num_classes": task.num_classes,
        "mean": tuple(mean),
        "std": tuple(std),
        "crop_pct": 0.875,
        "first_conv": "conv1",
        "classifier": "fc",
    }


def _create(key: str, network: Callable[..., TimmBackbone], pretrained: bool, **options: Any) -> nn.Module:
    if pretrained and not (options.get("pretrained_cfg") or options.get("pretrained_cfg_overlay")):
        raise InputError(f"timm has no weights for {key}; leave pretrained out and give weights=FILE or weights='torchvision'")
    if options.get("feature_cls", "getter") != "getter":
        raise InputError(
            f"feature_cls={options['feature_cls']!r} would take {key} to pieces, with them its freezing and the last norm of a v2 network; "
            "leave it out"
        )
    features = {"out_indices": None, "feature_cls": "getter"}
    model: Any = build_model_with_cfg(network, key, pretrained, feature_cfg=features, **options)
    ours: TimmBackbone = model.model if options.get("features_only") else model
    mean, std = unit_statistics(ours.network.preprocessing)
    model.pretrained_cfg.update(mean=tuple(mean), std=tuple(std), input_size=(ours.in_chans, *model.pretrained_cfg["input_size"][1:]))
    return model
