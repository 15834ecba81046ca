"""A writer of Keras's .h5 files and a network in Keras's own terms: channels last, explicit padding, a bias everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

KERAS_1 = {"kernel": "W", "bias": "b", "moving_mean": "running_mean", "moving_variance": "running_std"}
ORDER = {kind: number for number, kind in enumerate(("beta", "gamma", "bias", "kernel", "moving_mean", "moving_variance"))}


def write_h5(path: Path, weights: Mapping[str, Tensor], layers: list[str], *, naming: str = "keras2", whole_model: bool = False) -> Path:
    """As Keras saves: a group for each layer, their names in attributes, the weights in the order in which the layer made them."""
    import h5py

    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights") if whole_model else file
        root.attrs["layer_names"] = [layer.encode() for layer in layers]
        if whole_model:
            file.attrs["model_config"] = "{}"
            file.create_group("optimizer_weights").create_dataset("iteration:0", data=3)
        for layer in layers:
            kinds = sorted((name.partition("/")[2] for name in weights if name.startswith(f"{layer}/")), key=ORDER.get)
            group = root.create_group(layer)
            names = []
            for kind in kinds:
                suffix = "_1" if "conv" in layer else ""
                names.append(f"{layer}/{kind}:0" if naming == "keras2" else f"{layer}_{KERAS_1.get(kind, kind)}{suffix}:0")
                group.create_dataset(names[-1], data=weights[f"{layer}/{kind}"].numpy())
            group.attrs["weight_names"] = [name.encode() for name in names]
    return path


class KerasNetwork:
    """Keras's layers on [N, H, W, C] maps, each configured as the layout says."""

    def __init__(self, weights: Mapping[str, Tensor], layers: list[dict[str, Any]], *, eps: float | None = None) -> None:
        self.weights, self.layers, self.eps = weights, {layer["name"]: layer for layer in layers}, eps

    def conv(self, name: str, x: Tensor) -> Tensor:
        kernel, layer = self.weights[f"{name}/kernel"], self.layers[name]
        (height, width), stride = layer["kernel_size"], layer["strides"][0]
        assert kernel.shape[:2] == (height, width)
        if layer["padding"] == "same":
            assert stride == 1
            x = pad(x, height // 2)
        rows, columns = ((side - size) // stride + 1 for side, size in zip(x.shape[1:3], (height, width), strict=True))
        out = self.weights[f"{name}/bias"]
        for i in range(height):
            for j in range(width):
                window = x[:, i : i + stride * rows : stride, j : j + stride * columns : stride][:, :rows, :columns]
                out = out + window @ kernel[i, j]
        return out

    def norm(self, name: str, x: Tensor) -> Tensor:
        gamma, beta, mean, variance = (self.weights[f"{name}/{kind}"] for kind in ("gamma", "beta", "moving_mean", "moving_variance"))
        eps = self.layers[name]["epsilon"] if self.eps is None else self.eps
        return gamma * (x - mean) / (variance + eps).sqrt() + beta

    def dense(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}/kernel"] + self.weights[f"{name}/bias"]

    def resnet50(self, x: Tensor) -> list[Tensor]:
        """conv1, conv2_x … conv5_x and, where there is a top, what the softmax gets."""
        maps = [self.norm("bn_conv1", self.conv("conv1", pad(x, 3))).relu()]
        x = max_pool(pad(maps[0], 1), 3)
        for stage, blocks in zip("2345", ("abc", "abcd", "abcdef", "abc"), strict=True):
            for block in blocks:
                x = self.block(f"{stage}{block}_branch", x, projection=block == "a")
            maps.append(x)
        if "fc1000/kernel" in self.weights:
            maps.append(self.dense("fc1000", x.mean((1, 2))))
        return maps

    def block(self, name: str, x: Tensor, *, projection: bool) -> Tensor:
        out = x
        for place in "abc":
            out = self.norm(f"bn{name}2{place}", self.conv(f"res{name}2{place}", out))
            out = out.relu() if place != "c" else out
        return (out + (self.norm(f"bn{name}1", self.conv(f"res{name}1", x)) if projection else x)).relu()

    def vgg16(self, x: Tensor) -> list[Tensor]:
        """What each pooling layer receives."""
        maps = []
        for name, layer in self.layers.items():
            if layer["cls"] == "Conv2D":
                x = self.conv(name, x).relu()
            elif layer["cls"] == "MaxPooling2D":
                maps.append(x)
                x = max_pool(x, 2)
        return maps


def pad(x: Tensor, width: int) -> Tensor:
    return nn.functional.pad(x, (0, 0, width, width, width, width))


def max_pool(x: Tensor, size: int) -> Tensor:
    return x.unfold(1, size, 2).unfold(2, size, 2).amax((-1, -2))
