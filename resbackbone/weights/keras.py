"""Keras's VGG-16 and ResNets: their .h5 files, and their tensors under our names.

They were converted from the original Caffe releases, or follow them: they see BGR images with the mean subtracted, and the ResNets
stride in the first 1x1 (variant v1). Keras puts channels last, gives every convolution a bias and, in its first ResNet-50, batch norms
an epsilon of 1e-3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resbackbone.errors import InputError
from resbackbone.weights.info import WeightsInfo

# The last word of a weight's name, whatever stands before it: block1_conv1/kernel:0, block1_conv1_W_1:0, kernel.
KIND = re.compile(r"(?:.*[/_])?(kernel|bias|gamma|beta|moving_mean|moving_variance|W|b|running_mean|running_std)(?:_\d+)?(?::\d+)?")
KERAS_1 = {"W": "kernel", "b": "bias", "running_mean": "moving_mean", "running_std": "moving_variance"}  # a variance in spite of its name
NORM_KINDS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}

VGG_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions
FC_WIDTH, MAP_SIDE = 4096, 7
DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}
STEM_WIDTH, EXPANSION = 64, 4
FIRST_NORM_EPS, LATER_NORM_EPS = 1e-3, 1.001e-5  # Keras 2's ResNet50 had the layer's default, keras.applications' later ones their own
MEAN, STD, WHITE = (103.939, 116.779, 123.68), (1.0, 1.0, 1.0), 255.0
KNOWN = "Keras's VGG16, ResNet50, ResNet101 and ResNet152 are known here"


@dataclass(frozen=True)
class Layer:
    """A convolution or a linear layer in Keras and here. `shape` is the kernel's in Keras, with 0 for any number."""

    keras: str
    ours: str
    shape: tuple[int, ...]
    norm: tuple[str, str] | None = None  # the batch norm behind it: in Keras, here


def read_keras(path: Path) -> dict[str, Tensor]:
    """`layer/kind` -> tensor as Keras keeps it, of a weights file or a whole model. Kinds are Keras 2's, also where the file is older.

    Raises InputError for a file that is damaged, no Keras file, or claims more than it holds.
    """
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path} is an HDF5 file; to read it, pip install h5py") from error
    try:
        with h5py.File(path, "r") as file:
            root = file["model_weights"] if not _has_layers(file) and "model_weights" in file else file
            if not _has_layers(root):
                raise InputError(f"{path} lists no layers (layer_names); save it with save_weights('name.h5') of Keras 2 or tf_keras")
            return dict(_read_layers(root, path))
    except InputError:
        raise
    # What HDF5 meets first in a damaged file depends on the damage.
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{path} is not a whole HDF5 file ({reason}); copy or download it again") from error


def from_keras(tensors: Mapping[str, Tensor], label: str) -> tuple[dict[str, Tensor], WeightsInfo]:
    """What `read_keras` returned under our names, and which network and images it is for. With its classifier if the file has it.

    A convolution's bias goes into the mean of the norm behind it. Raises InputError, which calls the source `label`, for other networks.
    """
    architecture, layers, norm_eps = _recognise({name.partition("/")[0] for name in tensors}, label)
    _check(tensors, layers, label)
    ours: dict[str, Tensor] = {}
    for layer in layers:
        weight, bias = _weight(layer, tensors[f"{layer.keras}/kernel"]), tensors[f"{layer.keras}/bias"]
        ours[f"{layer.ours}.weight"] = weight.contiguous()
        if layer.norm is None:
            ours[f"{layer.ours}.bias"] = bias
            continue
        theirs, norm = layer.norm
        ours |= {f"{norm}.{kind}": tensors[f"{theirs}/{keras}"] for keras, kind in NORM_KINDS.items()}
        ours[f"{norm}.running_mean"] = ours[f"{norm}.running_mean"] - bias
    info = WeightsInfo(architecture=architecture, norm_eps=norm_eps, color_order="BGR", mean=MEAN, std=STD, input_range=WHITE)
    return ours, replace(info, variant="v1", shortcut="B") if norm_eps else info


# --- the file ---


def _has_layers(group: Any) -> bool:
    return "layer_names" in group.attrs or "layer_names0" in group.attrs


def _read_layers(root: Any, path: Path) -> Iterator[tuple[str, Tensor]]:
    seen: set[str] = set()
    for layer in _names(root, "layer_names", path):
        for weight in _names(root[layer], "weight_names", path):
            match = KIND.fullmatch(weight)
            name = f"{layer}/{KERAS_1.get(match[1], match[1])}" if match else ""
            if not name or name in seen:
                what = "twice the same of one layer (a model in a model?)" if name else "no weight of a convolution, linear layer or norm"
                raise InputError(f"{path}: layer {layer} has {weight}, {what}; {KNOWN}, saved on their own")
            seen.add(name)
            yield name, _read_dataset(root[layer][weight], f"{layer}: {weight}", path)


def _names(group: Any, attribute: str, path: Path) -> list[str]:
    """A list of names; Keras cuts one that is too long for a single attribute into attribute0, attribute1, …"""
    numbered = takewhile(group.attrs.__contains__, (f"{attribute}{number}" for number in count()))
    names: list[str] = []
    for part in [attribute] if attribute in group.attrs else numbered:
        claimed = group.attrs.get_id(part)
        if math.prod(claimed.shape) * claimed.dtype.itemsize > path.stat().st_size:
            raise InputError(f"{path}: {part} claims more names than the file can hold; copy or download it again")
        names += [name.decode() if isinstance(name, bytes) else str(name) for name in group.attrs[part]]
    return names


def _read_dataset(dataset: Any, name: str, path: Path) -> Tensor:
    # HDF5 can fill in what a file doesn't hold, and fetch it from other files.
    elsewhere = dataset.external or dataset.is_virtual or dataset.file.filename != str(path)
    if dataset.dtype.kind != "f" or elsewhere or dataset.nbytes > path.stat().st_size:
        why = "lies in another file" if elsewhere else f"is {dataset.dtype} of shape {list(dataset.shape)}, not floats that the file holds"
        raise InputError(f"{path}: {name} {why}; copy or download the file again")
    values = dataset[()]
    return torch.tensor(values.astype(values.dtype.newbyteorder("=")))


# --- the networks ---


def _recognise(names: set[str], label: str) -> tuple[str, list[Layer], float | None]:
    """The architecture, its layers that the file should have, and the epsilon of its norms (None: it has none)."""
    if "block1_conv1" in names:
        head = _vgg_head() if names & {"fc1", "fc2", "predictions"} else []
        return "vgg16", [*_vgg_convolutions(), *head], None
    if "res2a_branch2a" in names:
        layers = _resnet(DEPTHS["resnet50"], _first_name, ("conv1", "bn_conv1"))
        return "resnet50", [*layers, *_resnet_head(names, "fc1000")], FIRST_NORM_EPS
    if "conv2_block1_1_conv" in names:
        depths = tuple(sum(f"conv{stage}_block{block}_1_conv" in names for block in range(1, 99)) for stage in (2, 3, 4, 5))
        # A file with other numbers of blocks is held against ResNet50, so the message tells what is missing or too much.
        architecture = next((name for name in DEPTHS if DEPTHS[name] == depths), "resnet50")
        layers = _resnet(DEPTHS[architecture], _later_name, ("conv1_conv", "conv1_bn"))
        return architecture, [*layers, *_resnet_head(names, "predictions", "probs")], LATER_NORM_EPS
    raise InputError(f"{label} has layers {_first(sorted(names))}; no network is known by them. {KNOWN}")


def _vgg_convolutions() -> Iterator[Layer]:
    number, inputs = 0, 3  # of the layer in our nn.Sequential, where a ReLU follows each convolution and pooling each block
    for block, (channels, convolutions) in enumerate(VGG_BLOCKS, 1):
        for convolution in range(1, convolutions + 1):
            yield Layer(f"block{block}_conv{convolution}", f"features.{number}", (3, 3, inputs, channels))
            inputs = channels
            number += 2
        number += 1


def _vgg_head() -> list[Layer]:
    inputs = VGG_BLOCKS[-1][0] * MAP_SIDE**2
    return [
        Layer("fc1", "classifier.0", (inputs, FC_WIDTH)),
        Layer("fc2", "classifier.3", (FC_WIDTH, FC_WIDTH)),
        Layer("predictions", "classifier.6", (FC_WIDTH, 0)),
    ]


def _resnet(depths: tuple[int, ...], name: Callable[[int, int, int], tuple[str, str]], stem: tuple[str, str]) -> Iterator[Layer]:
    """`name` tells a convolution's and its norm's names in Keras from stage, block and place, counted from 1; place 0 is the projection."""
    yield Layer(stem[0], "conv1", (7, 7, 3, STEM_WIDTH), (stem[1], "bn1"))
    inputs = STEM_WIDTH
    for stage, depth in enumerate(depths, 1):
        inner = STEM_WIDTH * 2 ** (stage - 1)
        outputs = inner * EXPANSION
        for block in range(1, depth + 1):
            ours = f"layer{stage}.{block - 1}"
            shapes = ((1, 1, inputs, inner), (3, 3, inner, inner), (1, 1, inner, outputs))
            for place, shape in enumerate(shapes, 1):
                conv, norm = name(stage, block, place)
                yield Layer(conv, f"{ours}.conv{place}", shape, (norm, f"{ours}.bn{place}"))
            if block == 1:
                conv, norm = name(stage, block, 0)
                yield Layer(conv, f"{ours}.downsample.0", (1, 1, inputs, outputs), (norm, f"{ours}.downsample.1"))
            inputs = outputs


def _first_name(stage: int, block: int, place: int) -> tuple[str, str]:
    """res2a_branch2a: stages count from the paper's conv2_x, blocks from a; branch 1 is the projection, branch 2 has layers a, b, c."""
    place_name = f"{stage + 1}{'abcdef'[block - 1]}_branch{('1', '2a', '2b', '2c')[place]}"
    return f"res{place_name}", f"bn{place_name}"


def _later_name(stage: int, block: int, place: int) -> tuple[str, str]:
    place_name = f"conv{stage + 1}_block{block}_{place}"
    return f"{place_name}_conv", f"{place_name}_bn"


def _resnet_head(names: set[str], *choices: str) -> list[Layer]:
    inputs = STEM_WIDTH * 2**3 * EXPANSION
    return [Layer(name, "fc", (inputs, 0)) for name in choices if name in names]


# --- the tensors ---


def _check(tensors: Mapping[str, Tensor], layers: list[Layer], label: str) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        wanted |= {f"{layer.keras}/kernel": layer.shape, f"{layer.keras}/bias": layer.shape[-1:]}
        if layer.norm is not None:
            wanted |= {f"{layer.norm[0]}/{kind}": layer.shape[-1:] for kind in NORM_KINDS}
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    wrong = [
        f"{name} {list(tensors[name].shape)} where {list(shape)} belongs"
        for name, shape in wanted.items()
        if name in tensors and not _fits(tuple(tensors[name].shape), shape)
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape (0 is any number)": wrong}
    found = [f"{len(names)} {kind}: {_first(names)}" for kind, names in problems.items() if names]
    if found:
        advice = f"{KNOWN}, saved as they are and with channels last (tf_dim_ordering_tf_kernels)"
        raise InputError(f"{label} does not fit a Keras network: {'; '.join(found)}. {advice}")


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(expected in (0, found) for found, expected in zip(shape, wanted, strict=True))


def _weight(layer: Layer, kernel: Tensor) -> Tensor:
    """[h, w, in, out] -> [out, in, h, w]; [in, out] -> [out, in], where VGG's first counts pixels before channels and we the reverse."""
    if kernel.dim() == 4:
        return kernel.permute(3, 2, 0, 1)
    if layer.keras == "fc1":
        return kernel.reshape(MAP_SIDE, MAP_SIDE, -1, kernel.shape[1]).permute(3, 2, 0, 1).flatten(1)
    return kernel.T


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
