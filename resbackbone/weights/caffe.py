"""Caffe's networks under our names: He's ImageNet ResNets, VGG-16, and the CIFAR networks of 6n+2 layers.

Caffe's max pooling rounds sizes up and starts at the image's edge, where our ResNets, as torchvision's, pad by one pixel and round down:
He's ImageNet weights arrive exactly, but their maps differ from those that Caffe itself computes, most at the edges.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resbackbone.errors import InputError
from resbackbone.weights.caffe_format import CaffeLayer, read_caffe
from resbackbone.weights.info import WeightsInfo

__all__ = ["CaffeLayer", "from_caffe", "read_caffe"]

BLOBS: dict[str, tuple[int, ...]] = {  # the layers our networks have, or compute without being told, and how many blobs they may have
    **dict.fromkeys(("Convolution", "InnerProduct", "Scale"), (1, 2)),
    "BatchNorm": (3,),
    "Eltwise": (0,),
    **dict.fromkeys(("Data", "DummyData", "HDF5Data", "ImageData", "Input", "MemoryData"), (0,)),
    **dict.fromkeys(("Accuracy", "Dropout", "Flatten", "Pooling", "ReLU", "Silence", "Softmax", "SoftmaxWithLoss", "Split"), (0,)),
}
SUPPORTED = "He's ResNet-50, -101 and -152, VGG-16, and the CIFAR networks of 6n+2 layers can be read"

RESNET_DEPTHS = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}
# The blocks of a stage are a, b, c … or, where they are many, a, b1, b2 …
RESNET_NAME = re.compile("res([2-5])(?:([a-z])|b([0-9]{1,2}))_branch(1|2[abc])")
BRANCHES = {"2a": ("conv1", "bn1"), "2b": ("conv2", "bn2"), "2c": ("conv3", "bn3"), "1": ("downsample.0", "downsample.1")}
RESNET_MEAN = (102.9801, 115.9465, 122.7717)  # py-faster-rcnn's; He's release subtracts a mean image, which is a file of its own
VGG_MEAN = (103.939, 116.779, 123.68)  # its authors'
VGG_NUMBERS = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}  # stage -> its convolutions in our `features`
VGG_NAMES = {
    **{f"conv{stage}_{k}": f"features.{number}" for stage, numbers in VGG_NUMBERS.items() for k, number in enumerate(numbers, 1)},
    "fc6": "classifier.0",
    "fc7": "classifier.3",
    "fc8": "classifier.6",
}
CIFAR_WIDTHS = (16, 32, 64)  # He et al. 2015, §4.2


@dataclass(eq=False, kw_only=True)
class _Unit:
    """A convolution or linear layer with the norm behind it, or a sum. Its inputs are units too; None: the images."""

    layer: CaffeLayer
    inputs: tuple[_Unit | None, ...]
    norm: CaffeLayer | None = None
    scale: CaffeLayer | None = None


def from_caffe(layers: Sequence[CaffeLayer], label: str) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Our names for He's ImageNet ResNets, VGG-16, and the CIFAR networks of 6n+2 layers, and what is known of them.

    BatchNorm and Scale become one norm. A convolution's bias moves into its norm's running mean, so that the network computes the same.
    Nothing is left behind in silence: InputError names a layer that has no place. `label` is what errors call the file.
    """
    units = _graph(layers, label)
    names = {unit.layer.name for unit in units}
    if "res2a_branch2a" in names:
        return _from_resnet(units, label)
    if "conv1_1" in names:
        return _from_vgg(units, label)
    return _from_cifar(units, label)


def _graph(layers: Sequence[CaffeLayer], label: str) -> list[_Unit]:
    """Who feeds whom, by the names of bottoms and tops; a layer may overwrite its bottom, so the file's order counts."""
    units: list[_Unit] = []
    current: dict[str, _Unit | None] = {}  # what a name stands for at this point of the file
    for layer in layers:
        _check_layer(layer, label)
        inputs = tuple(current.get(name) for name in layer.bottoms)
        result = inputs[0] if inputs else None
        if layer.type in ("Convolution", "InnerProduct", "Eltwise"):
            result = _Unit(layer=layer, inputs=inputs)
            units.append(result)
        elif layer.type == "BatchNorm":
            if result is None or result.layer.type != "Convolution" or result.norm:
                raise InputError(
                    f"{label}: BatchNorm {layer.name!r} has no convolution of its own before it; our networks norm nothing else"
                )
            result.norm = layer
        elif layer.type == "Scale":
            if result is None or result.norm is None or result.scale:
                raise InputError(f"{label}: Scale {layer.name!r} has no BatchNorm of its own before it; our networks scale nowhere else")
            result.scale = layer
        current.update(dict.fromkeys(layer.tops, result))
    return units


def _check_layer(layer: CaffeLayer, label: str) -> None:
    if layer.type not in BLOBS:
        raise InputError(f"{label}: layer {layer.name!r} of type {layer.type!r} has no place in our networks; {SUPPORTED}")
    if len(layer.blobs) not in BLOBS[layer.type]:
        raise InputError(
            f"{label}: {layer.type} {layer.name!r} has {len(layer.blobs)} blobs, not {BLOBS[layer.type]}; was the file cut off?"
        )
    bottoms = {"Eltwise": 2, "Convolution": 1, "InnerProduct": 1}.get(layer.type, len(layer.bottoms))
    if not layer.is_sum or len(layer.bottoms) != bottoms:
        raise InputError(f"{label}: {layer.type} {layer.name!r} is not a plain sum of two maps or has not one input; {SUPPORTED}")
    if layer.type == "Convolution" and (layer.blobs[0].dim() != 4 or layer.group != 1):
        raise InputError(f"{label}: Convolution {layer.name!r} is grouped or not two-dimensional; {SUPPORTED}")


def _normed(unit: _Unit, convolution: str, norm: str, label: str) -> dict[str, Tensor]:
    """A convolution and its norm. Caffe keeps sums of means and of variances, and in a third blob the weight of either sum."""
    if unit.norm is None:
        raise InputError(f"{label}: no BatchNorm follows the convolution {unit.layer.name!r}; our {convolution} has one")
    weight = unit.layer.blobs[0]
    total = _vector(unit.norm, 2, 0, channels=1, label=label).item()
    factor = 0 if total == 0 else 1 / total  # Caffe's rule: a norm that has seen no image has mean and variance 0
    mean, variance, bias, scale, shift = (
        _vector(layer, index, default, channels=len(weight), label=label)
        for layer, index, default in ((unit.norm, 0, 0), (unit.norm, 1, 0), (unit.layer, 1, 0), (unit.scale, 0, 1), (unit.scale, 1, 0))
    )
    return {
        f"{convolution}.weight": weight,
        f"{norm}.weight": scale.float(),
        f"{norm}.bias": shift.float(),
        f"{norm}.running_mean": (mean * factor - bias).float(),  # norm(x + bias), as our convolution adds none
        f"{norm}.running_var": (variance * factor).float(),
    }


def _unnormed(unit: _Unit, name: str, label: str) -> dict[str, Tensor]:
    """A convolution or linear layer with a bias and no norm."""
    layer = unit.layer
    if unit.norm or layer.type == "Eltwise":
        raise InputError(f"{label}: {layer.name!r} is a sum or has a norm; our {name} is a layer with a bias alone")
    weight = layer.blobs[0]
    if layer.type == "InnerProduct":  # written as [1, 1, outputs, inputs] by older versions
        weight = weight.reshape(-1, weight.shape[-1])
        weight = weight.T.contiguous() if layer.transposed else weight
    return {f"{name}.weight": weight, f"{name}.bias": _vector(layer, 1, 0, channels=len(weight), label=label).float()}


def _vector(layer: CaffeLayer | None, index: int, default: float, *, channels: int, label: str) -> Tensor:
    """A blob with one number a channel; `default` for each where there is no such layer or blob."""
    if layer is None or index >= len(layer.blobs):
        return torch.full((channels,), default, dtype=torch.float64)
    if layer.blobs[index].numel() != channels:
        shape = list(layer.blobs[index].shape)
        raise InputError(f"{label}: blob {index} of {layer.type} {layer.name!r} has the shape {shape}, not {channels} numbers")
    return layer.blobs[index].double().flatten()


def _norm_eps(units: Iterable[_Unit], label: str) -> float | None:
    values = {float(f"{unit.norm.norm_eps:.6g}"): unit.norm.name for unit in units if unit.norm}  # kept as float32
    if len(values) > 1:
        raise InputError(f"{label}: its norms have different epsilons ({values}); ours share one")
    return next(iter(values), None)


def _from_resnet(units: Sequence[_Unit], label: str) -> tuple[dict[str, Tensor], WeightsInfo]:
    tensors: dict[str, Tensor] = {}
    in_3x3 = False
    for unit in units:
        name = unit.layer.name
        if name == "fc1000":
            tensors |= _unnormed(unit, "fc", label)
        elif unit.layer.type != "Eltwise":
            tensors |= _normed(unit, *_resnet_place(name, label), label)
            in_3x3 |= name.endswith("branch2b") and unit.layer.stride == 2
    blocks = [name.rpartition(".conv1.")[0] for name in tensors if name.endswith(".conv1.weight")]
    depths = tuple(sum(block.startswith(f"layer{stage}.") for block in blocks) for stage in (1, 2, 3, 4))
    if depths not in RESNET_DEPTHS:
        raise InputError(f"{label}: a ResNet with {depths} blocks is none of {RESNET_DEPTHS}; was the file cut off?")
    convolutions = [f"{block}.conv{k}" for block in blocks for k in (1, 2, 3)] + [f"layer{stage}.0.downsample.0" for stage in (1, 2, 3, 4)]
    _check_complete(tensors, ["conv1", *convolutions, "fc"], label)
    info = WeightsInfo(
        architecture=RESNET_DEPTHS[depths],
        variant="v1.5" if in_3x3 else "v1",
        norm_eps=_norm_eps(units, label),
        color_order="BGR",
        mean=RESNET_MEAN,
        std=(1.0, 1.0, 1.0),
        input_range=255.0,
    )
    return tensors, info


def _resnet_place(name: str, label: str) -> tuple[str, str]:
    """Our names for a convolution and its norm."""
    if name == "conv1":
        return "conv1", "bn1"
    match = RESNET_NAME.fullmatch(name)
    if not match:
        raise InputError(f"{label}: layer {name!r} has weights and no place in He's ResNets; {SUPPORTED}")
    stage, letter, number, branch = match.groups()
    block = f"layer{int(stage) - 1}.{ord(letter) - ord('a') if letter else int(number)}"
    convolution, norm = BRANCHES[branch]
    return f"{block}.{convolution}", f"{block}.{norm}"


def _from_vgg(units: Sequence[_Unit], label: str) -> tuple[dict[str, Tensor], WeightsInfo]:
    tensors: dict[str, Tensor] = {}
    for unit in units:
        if unit.layer.name not in VGG_NAMES:
            raise InputError(f"{label}: layer {unit.layer.name!r} has no place in VGG-16; {SUPPORTED}")
        tensors |= _unnormed(unit, VGG_NAMES[unit.layer.name], label)
    _check_complete(tensors, VGG_NAMES.values(), label)
    info = WeightsInfo(architecture="vgg16", color_order="BGR", mean=VGG_MEAN, std=(1.0, 1.0, 1.0), input_range=255.0)
    return tensors, info


def _check_complete(tensors: Iterable[str], layers: Iterable[str], label: str) -> None:
    missing = [layer for layer in layers if f"{layer}.weight" not in tensors]
    if missing:
        raise InputError(f"{label}: {len(missing)} layers are missing, first our {missing[0]}; was the file cut off? {SUPPORTED}")


def _from_cifar(units: Sequence[_Unit], label: str) -> tuple[dict[str, Tensor], WeightsInfo]:
    """The layers have running numbers for names, so their places are read from who feeds whom, from the output backwards."""
    if not units or units[-1].layer.type != "InnerProduct":
        raise InputError(f"{label}: its last layer with weights is not an InnerProduct; was the file cut off? {SUPPORTED}")
    is_residual = any(unit.layer.type == "Eltwise" for unit in units)
    stem, blocks = (_residual_blocks if is_residual else _plain_blocks)(units[-1].inputs[0], label)
    used = [stem, units[-1], *(unit for block in blocks for unit in block if unit)]
    left = [unit.layer.name for unit in units if unit.layer.blobs and unit not in used]
    count = len(blocks) // 3
    if left or len(blocks) % 3 or not blocks:
        left_text = f" and leaves {', '.join(left[:5])}" if left else ""
        raise InputError(f"{label}: the way from its output to the images has {len(blocks)} blocks{left_text}, not 3n; {SUPPORTED}")
    tensors = _normed(stem, "conv1", "bn1", label)
    for number, block in enumerate(blocks):
        _check_cifar_block(block, number, count, is_residual, label)
        name = f"layer{number // count + 1}.{number % count}"
        for unit, convolution, norm in zip(block, ("conv1", "conv2", "downsample.0"), ("bn1", "bn2", "downsample.1"), strict=True):
            tensors |= _normed(unit, f"{name}.{convolution}", f"{name}.{norm}", label) if unit else {}
    tensors |= _unnormed(units[-1], "fc", label)
    info = WeightsInfo(
        architecture=f"{'resnet' if is_residual else 'plain'}{6 * count + 2}_cifar",
        shortcut="B" if is_residual else "",
        norm_eps=_norm_eps(units, label),
        color_order="RGB",
        std=(1.0, 1.0, 1.0),
        input_range=255.0,
    )
    return tensors, info


Block = tuple[_Unit, _Unit, _Unit | None]  # two 3x3 convolutions and the shortcut's projection


def _residual_blocks(unit: _Unit | None, label: str) -> tuple[_Unit, list[Block]]:
    """Backwards from the last sum to the stem."""
    blocks: list[Block] = []
    while unit and unit.layer.type == "Eltwise":
        found = [block for order in (1, -1) if (block := _block(*unit.inputs[::order]))]
        if len(found) != 1:
            raise InputError(f"{label}: Eltwise {unit.layer.name!r} does not add two convolutions and a shortcut around them; {SUPPORTED}")
        blocks.insert(0, found[0])
        unit = found[0][0].inputs[0]
    return _check_stem(unit, label), blocks


def _block(shortcut: _Unit | None, second: _Unit | None) -> Block | None:
    first = second.inputs[0] if second and second.layer.type == "Convolution" else None
    if second is None or first is None or first.layer.type != "Convolution":
        return None
    start = first.inputs[0]
    if shortcut is not None and shortcut is start:
        return first, second, None
    is_projection = shortcut and start and shortcut.layer.type == "Convolution" and shortcut.inputs[0] is start
    return (first, second, shortcut) if is_projection else None


def _plain_blocks(unit: _Unit | None, label: str) -> tuple[_Unit, list[Block]]:
    chain: list[_Unit] = []
    while unit:
        chain.insert(0, unit)
        unit = unit.inputs[0]
    stem = _check_stem(chain[0] if chain else None, label)
    return stem, [(first, second, None) for first, second in zip(chain[1::2], chain[2::2], strict=False)]


def _check_stem(unit: _Unit | None, label: str) -> _Unit:
    if unit is None or unit.layer.type != "Convolution" or unit.inputs[0] is not None:
        raise InputError(f"{label}: no convolution of the images stands before the blocks; was the file cut off? {SUPPORTED}")
    return unit


def _check_cifar_block(block: Block, number: int, count: int, is_residual: bool, label: str) -> None:
    """Widths, strides and the place of projections, which keys and shapes alone wouldn't tell from another network's."""
    is_entry = number % count == 0 and number > 0
    found = [(len(unit.layer.blobs[0]), unit.layer.stride) for unit in block if unit]
    width, stride = CIFAR_WIDTHS[number // count], 2 if is_entry else 1
    expected = [(width, stride), (width, 1)] + [(width, stride)] * (is_entry and is_residual)
    if found != expected:
        raise InputError(f"{label}: block {number} at {block[0].layer.name!r} has {found} (channels, stride), not {expected}; {SUPPORTED}")
