"""Writes Caffe models: protobuf's wire format by hand, and the layers of our reference networks as Caffe's nets have them."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from references import Reference
from torch import Tensor, nn

V1_TYPES = {"Convolution": 4, "Data": 5, "Dropout": 6, "InnerProduct": 14, "LRN": 15, "Pooling": 17, "ReLU": 18, "Softmax": 20}


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def text(field: int, value: str) -> bytes:
    return message(field, value.encode())


def blob(values: Tensor, form: str = "new") -> bytes:
    """`form`: new (BlobShape, packed) | unpacked | double | old (num, channels, height, width)."""
    flat = values.flatten().tolist()
    if form == "old":
        shape = [1] * (4 - values.dim()) + list(values.shape)
        return b"".join(number(axis, size) for axis, size in enumerate(shape, 1)) + message(5, struct.pack(f"<{len(flat)}f", *flat))
    if form == "unpacked":
        shape_bytes = message(7, b"".join(number(1, size) for size in values.shape))
        return b"".join(varint(5 << 3 | 5) + struct.pack("<f", value) for value in flat) + shape_bytes
    shape_bytes = message(7, message(1, b"".join(varint(size) for size in values.shape)))
    if form == "double":
        return shape_bytes + message(8, struct.pack(f"<{len(flat)}d", *flat))
    return shape_bytes + message(5, struct.pack(f"<{len(flat)}f", *flat)) + message(6, bytes(4 * len(flat)))  # and its gradient


def layer(
    name: str, kind: str, bottoms: Sequence[str], tops: Sequence[str], blobs: Iterable[Tensor] = (), form: str = "new", extra: bytes = b""
) -> bytes:
    parts = [text(1, name), text(2, kind), *(text(3, bottom) for bottom in bottoms), *(text(4, top) for top in tops)]
    return message(100, b"".join([*parts, number(10, 0), *(message(7, blob(values, form)) for values in blobs), extra]))


def old_layer(name: str, kind: str, bottoms: Sequence[str], tops: Sequence[str], blobs: Iterable[Tensor] = (), extra: bytes = b"") -> bytes:
    parts = [*(text(2, bottom) for bottom in bottoms), *(text(3, top) for top in tops), text(4, name), number(5, V1_TYPES[kind])]
    return message(2, b"".join([*parts, *(message(6, blob(values, "old")) for values in blobs), extra]))


class Writer:
    """Collects layers; convolutions with norms are three, in place, as Caffe's nets have them."""

    def __init__(self, form: str = "new", factor: float = 999.5, stride_field: int = 6) -> None:
        self.layers = [layer("Data1", "Data", [], ["data", "label"])]
        self.form, self.factor, self.stride_field = form, factor, stride_field

    def add(
        self, name: str, kind: str, bottoms: Sequence[str], tops: Sequence[str], blobs: Iterable[Tensor] = (), extra: bytes = b""
    ) -> None:
        self.layers.append(layer(name, kind, bottoms, tops, blobs, self.form, extra))

    def conv_norm(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, names: Sequence[str], bottom: str, top: str) -> None:
        settings = message(106, number(1, conv.out_channels) + number(3, conv.padding[0]) + number(self.stride_field, conv.stride[0]))
        self.add(names[0], "Convolution", [bottom], [top], [conv.weight, conv.bias], settings)
        statistics = [bn.running_mean * self.factor, bn.running_var * self.factor, torch.tensor([self.factor])]
        self.add(names[1], "BatchNorm", [top], [top], statistics, message(139, varint(3 << 3 | 5) + struct.pack("<f", bn.eps)))
        self.add(names[2], "Scale", [top], [top], [bn.weight, bn.bias])

    def write(self, path: Path) -> Path:
        path.write_bytes(text(1, "a net") + b"".join(self.layers))
        return path


def write_cifar(net: Reference, writer: Writer, path: Path) -> Path:
    """Running numbers for names; the projection before or after the residual in turns, and either may be a sum's first input."""
    count = itertools.count(1)

    def conv_norm(conv: nn.Conv2d, bn: nn.BatchNorm2d, bottom: str) -> str:
        k = next(count)
        writer.conv_norm(conv, bn, [f"Convolution{k}", f"BatchNorm{k}", f"Scale{k}"], bottom, f"Convolution{k}")
        return f"Convolution{k}"

    top = conv_norm(net.conv1, net.bn1, "data")
    writer.add("ReLU1", "ReLU", [top], [top])
    for number_, block in enumerate(block for stage in net.stages() for block in stage):
        split = [f"{top}_split_0", f"{top}_split_1"] if block.shortcut != "none" else [top, top]
        writer.layers += [layer(f"{top}_split", "Split", [top], split)] if block.shortcut != "none" else []
        projection_first = number_ % 2 == 0
        shortcut = conv_norm(*block.downsample, split[0]) if block.shortcut == "projection" and projection_first else split[0]
        inner = conv_norm(block.conv1, block.bn1, split[1])
        writer.add(f"ReLU_{inner}", "ReLU", [inner], [inner])
        top = conv_norm(block.conv2, block.bn2, inner)
        if block.shortcut == "projection" and not projection_first:
            shortcut = conv_norm(*block.downsample, split[0])
        if block.shortcut != "none":
            writer.add(f"Eltwise{number_}", "Eltwise", [shortcut, top] if number_ % 3 else [top, shortcut], [f"Eltwise{number_}"])
            top = f"Eltwise{number_}"
        writer.add(f"ReLU_{top}", "ReLU", [top], [top])
    writer.add("Pooling1", "Pooling", [top], ["Pooling1"])
    writer.add("InnerProduct1", "InnerProduct", ["Pooling1"], ["InnerProduct1"], [net.fc.weight, net.fc.bias])
    writer.add("SoftmaxWithLoss1", "SoftmaxWithLoss", ["InnerProduct1", "label"], ["loss"])
    return writer.write(path)


def write_imagenet(net: Reference, path: Path) -> Path:
    writer, top = Writer(), "pool1"
    writer.conv_norm(net.conv1, net.bn1, ["conv1", "bn_conv1", "scale_conv1"], "data", "conv1")
    writer.add("pool1", "Pooling", ["conv1"], ["pool1"])
    for stage, blocks in enumerate(net.stages(), 2):
        for k, block in enumerate(blocks):
            suffix = f"{stage}a" if k == 0 else f"{stage}b{k}" if len(blocks) > 6 else f"{stage}{'abcdef'[k]}"
            branches = [(f"branch2{'abc'[n]}", getattr(block, f"conv{n + 1}"), getattr(block, f"bn{n + 1}")) for n in range(3)]
            branches += [("branch1", *block.downsample)] if block.shortcut == "projection" else []
            for branch, conv, bn in branches:
                names = [f"{word}{suffix}_{branch}" for word in ("res", "bn", "scale")]
                writer.conv_norm(conv, bn, names, top, names[0])
            shortcut = f"res{suffix}_branch1" if block.shortcut == "projection" else top
            writer.add(f"res{suffix}", "Eltwise", [shortcut, f"res{suffix}_branch2c"], [f"res{suffix}"])
            top = f"res{suffix}"
    writer.add("pool5", "Pooling", [top], ["pool5"])
    writer.add("fc1000", "InnerProduct", ["pool5"], ["fc1000"], [net.fc.weight, net.fc.bias])
    return writer.write(path)


def vgg_layers(writer: Callable[..., bytes], width: int = 2) -> tuple[list[bytes], nn.Sequential, nn.Sequential]:
    """A narrow VGG-16 in torchvision's keys, and its layers."""
    features, layers, channels, bottom = nn.Sequential(), [writer("data", "Data", [], ["data"])], 3, "data"
    for stage, count in enumerate((2, 2, 3, 3, 3), 1):
        for k in range(1, count + 1):
            conv, name = nn.Conv2d(channels, width * stage, 3, padding=1), f"conv{stage}_{k}"
            features.extend([conv, nn.ReLU()])
            layers += [
                writer(name, "Convolution", [bottom], [name], [conv.weight, conv.bias]),
                writer(f"relu{name}", "ReLU", [name], [name]),
            ]
            bottom, channels = name, width * stage
        features.append(nn.MaxPool2d(2))
        layers.append(writer(f"pool{stage}", "Pooling", [bottom], [f"pool{stage}"]))
        bottom = f"pool{stage}"
    sizes = (channels, 12, 12, 5)
    linears = [nn.Linear(sizes[k], sizes[k + 1]) for k in range(3)]
    classifier = nn.Sequential(linears[0], nn.ReLU(), nn.Dropout(), linears[1], nn.ReLU(), nn.Dropout(), linears[2])
    for k, linear in enumerate(linears):
        layers.append(writer(f"fc{6 + k}", "InnerProduct", [bottom], [f"fc{6 + k}"], [linear.weight, linear.bias]))
        bottom = f"fc{6 + k}"
    return layers, features, classifier
