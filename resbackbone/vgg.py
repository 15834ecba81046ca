"""VGG-16 (Simonyan & Zisserman 2015, Table 1, column D), the baseline of the residual networks' detection tables.

State-dict keys are torchvision's (`features.N`, `classifier.N`). Maps conv1 … conv5 are what each pooling layer receives.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from resbackbone.backbone import Backbone, FeatureInfo, RegionHead, imagenet_preprocessing, recompute
from resbackbone.errors import InputError
from resbackbone.layers import conv_norm, initialize, norm_factory
from resbackbone.registry import register_backbone
from resbackbone.weights import locate_weights, read_weights

COLUMN_D = {"conv1": (64, 2), "conv2": (128, 2), "conv3": (256, 3), "conv4": (512, 3), "conv5": (512, 3)}  # channels, convolutions
POOL_SIZE = 7  # what fc6 sees of a 224 x 224 image, and of a region
FC_WIDTH = 4096
DROPOUT = 0.5


class VGG(Backbone):
    """Five stages of 3x3 convolutions with 2x2 max pooling between them; conv5 is conv5_3 at stride 16.

    Args:
        batch_norm: whether a norm stands behind each convolution (vgg16_bn). Without, `norm` has nothing to act on.
        norm: its kind; see layers.NORMS.
        norm_eps: None: 1e-5.
        in_channels: of the images.
        checkpointing: recompute stages in the backward pass.
    """

    head_prefixes: tuple[str, ...] = ("classifier.",)

    def __init__(
        self,
        *,
        batch_norm: bool,
        norm: str = "batch",
        norm_eps: float | None = None,
        in_channels: int = 3,
        checkpointing: bool = False,
    ) -> None:
        info = {name: FeatureInfo(channels, 2**number) for number, (name, (channels, _)) in enumerate(COLUMN_D.items())}
        super().__init__(info, preprocessing=imagenet_preprocessing(in_channels), checkpointing=checkpointing)
        make_norm = norm_factory(norm, eps=norm_eps)
        self._spans: dict[str, range] = {}  # the layers of each stage, its pooling layer left out
        layers: list[nn.Module] = []
        for name, (channels, count) in COLUMN_D.items():
            first = len(layers)
            for _ in range(count):
                layers.append(nn.Conv2d(in_channels, channels, 3, padding=1))
                layers += [make_norm(channels)] * batch_norm
                layers.append(nn.ReLU(inplace=True))
                in_channels = channels
            self._spans[name] = range(first, len(layers))
            # Caffe's pooling, which trained these networks, rounds up; so do all our maps: ceil(H / stride).
            layers.append(nn.MaxPool2d(2, stride=2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        initialize(self)

    def run_stage(self, name: str, features: Tensor) -> Tensor:
        span = self._spans[name]
        if span.start:
            features = self.features[span.start - 1](features)
        layers = self.stage_modules(name)
        return recompute(partial(_run_layers, layers), layers, features, checkpointing=self.checkpointing)

    def stage_modules(self, name: str) -> tuple[nn.Module, ...]:
        return tuple(self.features[number] for number in self._spans[name])

    def remove_stage(self, name: str) -> None:
        del self.features[self._spans.pop(name).start - 1 :]

    def region_head_available(self) -> bool:
        return "conv5" in self.feature_info

    def split_region_head(self) -> RegionHead:
        """fc6 and fc7 to run on each region pooled from conv5, as in Fast and Faster R-CNN; the last pooling layer goes."""
        if not self.region_head_available():
            raise InputError(f"{self.architecture} has no conv5 (any more) to pool regions from")
        head = VGGRegionHead(self.feature_info["conv5"].channels)
        if self.weights is not None:
            head.load_classifier(locate_weights(self.weights, architecture=self.architecture))
        self.out_features = ("conv5",)
        return head


class VGGRegionHead(RegionHead):
    """fc6 and fc7 with ReLU and dropout: [R, 512, 7, 7] -> [R, 4096]."""

    in_feature = "conv5"
    pool_size = POOL_SIZE
    out_channels = FC_WIDTH

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.fc6 = nn.Linear(in_channels * POOL_SIZE**2, FC_WIDTH)
        self.fc7 = nn.Linear(FC_WIDTH, FC_WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(DROPOUT)
        for layer in (self.fc6, self.fc7):
            _initialize_linear(layer, std=0.005)

    def forward(self, pooled: Tensor) -> Tensor:
        hidden = self.dropout(self.relu(self.fc6(pooled.flatten(1))))
        return self.dropout(self.relu(self.fc7(hidden)))

    def load_classifier(self, source: str | Path) -> None:
        """Take fc6 and fc7 from a VGG-16 classifier's file; one that holds convolutions alone leaves them random, with a warning."""
        tensors, _ = read_weights(source)
        names = {
            f"{layer}.{kind}": f"classifier.{number}.{kind}" for layer, number in (("fc6", 0), ("fc7", 3)) for kind in ("weight", "bias")
        }
        if not any(name.startswith("classifier.") for name in tensors):
            warnings.warn(f"{source} has no classifier: fc6 and fc7 of the region head start from random weights", stacklevel=3)
            return
        wanted = self.state_dict()
        wrong = [old for new, old in names.items() if old not in tensors or tensors[old].shape != wanted[new].shape]
        if wrong:
            raise InputError(f"{source}: {', '.join(wrong)} missing or not of VGG-16's shape; the region head needs fc6 and fc7 from there")
        self.load_state_dict({new: tensors[old] for new, old in names.items()})


class VGGClassifier(VGG):
    """The whole network: [N, 3, H, W] -> logits [N, num_classes]."""

    head_prefixes = ()

    def __init__(self, *, num_classes: int, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.avgpool = nn.AdaptiveAvgPool2d(POOL_SIZE)  # the identity at 224 x 224
        in_channels = self.feature_info["conv5"].channels
        self.classifier = nn.Sequential(
            nn.Linear(in_channels * POOL_SIZE**2, FC_WIDTH),
            nn.ReLU(inplace=True),
            nn.Dropout(DROPOUT),
            nn.Linear(FC_WIDTH, FC_WIDTH),
            nn.ReLU(inplace=True),
            nn.Dropout(DROPOUT),
            nn.Linear(FC_WIDTH, num_classes),
        )
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                _initialize_linear(layer, std=0.01)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        features = self.features[-1](super().forward(images)["conv5"])
        return self.classifier(self.avgpool(features).flatten(1))


def _run_layers(layers: tuple[nn.Module, ...], features: Tensor) -> Tensor:
    """Convolutions with a ReLU each, and perhaps a norm between the two."""
    for layer, following in zip(layers, (*layers[1:], nn.Identity()), strict=True):
        if isinstance(layer, nn.Conv2d):
            norm = nn.Identity() if isinstance(following, nn.ReLU) else following
            features = conv_norm(layer, norm, features)
        elif isinstance(layer, nn.ReLU):
            features = layer(features)
    return features


def _initialize_linear(layer: nn.Linear, *, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)


def _builder(*, batch_norm: bool) -> Callable[..., VGG]:
    def build(
        *,
        variant: str = "v1.5",  # one only, whatever the residual network that it is compared with has
        norm: str = "batch",
        norm_eps: float | None = None,
        output_stride: int = 32,
        dilation_rule: str = "torchvision",
        in_channels: int = 3,
        checkpointing: bool = False,
        num_classes: int | None = None,
    ) -> VGG:
        # A last map of stride 16 fulfils both of the larger output strides.
        if output_stride not in (16, 32):
            raise InputError(f"output_stride={output_stride} is not possible; VGG-16 takes 16 or 32, and its last map has stride 16")
        options = {"norm": norm, "norm_eps": norm_eps, "in_channels": in_channels, "checkpointing": checkpointing}
        if num_classes is None:
            return VGG(batch_norm=batch_norm, **options)  # type: ignore[arg-type]
        return VGGClassifier(batch_norm=batch_norm, num_classes=num_classes, **options)

    return build


register_backbone("vgg16")(_builder(batch_norm=False))  # as published: no norms, so `norm` changes nothing
register_backbone("vgg16_bn")(_builder(batch_norm=True))  # torchvision's, with batch normalisation
