"""Caffe's binary models (.caffemodel) as a list of layers: a small reader of the protobuf wire format, which needs no protobuf."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resbackbone.errors import InputError
from resbackbone.weights.files import first_bytes

Fields = dict[int, list[int | bytes | memoryview]]  # field number -> its values, in the file's order
MAX_AXES = 32  # of a blob; Caffe's own limit
NORM_EPS = 1e-5  # BatchNormParameter's default
# Field numbers of caffe.proto: those of NetParameter's layers, then within LayerParameter and the older V1LayerParameter.
NEW, OLD = 100, 2
LAYER_FIELDS = {
    NEW: {"name": 1, "type": 2, "bottom": 3, "top": 4, "blobs": 7, "convolution": 106, "eltwise": 110, "linear": 117, "norm": 139},
    OLD: {"name": 4, "type": 5, "bottom": 2, "top": 3, "blobs": 6, "convolution": 10, "eltwise": 24, "linear": 17, "norm": 0},
}
FIRST_FORMAT = 1  # V1LayerParameter's field that holds a layer of the format before
OLD_TYPES_TEXT = """
    None Accuracy BNLL Concat Convolution Data Dropout EuclideanLoss Flatten HDF5Data HDF5Output Im2col ImageData InfogainLoss
    InnerProduct LRN MultinomialLogisticLoss Pooling ReLU Sigmoid Softmax SoftmaxWithLoss Split TanH WindowData Eltwise Power
    SigmoidCrossEntropyLoss HingeLoss MemoryData ArgMax Threshold DummyData Slice MVN AbsVal Silence ContrastiveLoss Exp Deconvolution
"""
OLD_TYPES = OLD_TYPES_TEXT.split()  # V1LayerParameter.LayerType from 0 on, by the names of today's Caffe


@dataclass(frozen=True, kw_only=True)
class CaffeLayer:
    """One layer: its place in the network, its numbers, and what of its settings matters here."""

    name: str
    type: str
    bottoms: tuple[str, ...] = ()
    tops: tuple[str, ...] = ()
    blobs: tuple[Tensor, ...] = ()  # float32
    stride: int = 1
    group: int = 1
    norm_eps: float = NORM_EPS
    is_sum: bool = True  # of an Eltwise: neither a product, a maximum, nor weighted
    transposed: bool = False  # of an InnerProduct


class _Malformed(Exception):
    """What is wrong with the bytes; read_caffe adds where."""


def read_caffe(path: Path) -> list[CaffeLayer]:
    """The layers of a .caffemodel, in its order. InputError for a file that is missing, cut off, or something else."""
    path = Path(path)
    first_bytes(path)  # says what is wrong with a path that is no file
    try:
        net = _fields(memoryview(path.read_bytes()))
        layers = [_layer(message, kind) for kind in (OLD, NEW) for message in _messages(net, kind)]
    except _Malformed as error:
        raise InputError(f"{path} is not a whole Caffe model ({error}); copy or download it again, or give a .caffemodel file") from error
    if not layers:
        raise InputError(
            f"{path} holds no layers of a Caffe model; give a .caffemodel file, which holds weights, not a .prototxt or a mean"
        )
    return layers


def _fields(message: memoryview) -> Fields:
    found: Fields = {}
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if number == 0:
            raise _Malformed("a field has the number 0")
        value: int | bytes | memoryview
        if wire_type == 0:
            value, position = _varint(message, position)
        elif wire_type in (1, 2, 5):
            size, position = _varint(message, position) if wire_type == 2 else (8 if wire_type == 1 else 4, position)
            if size > len(message) - position:
                raise _Malformed(f"field {number} claims {size} bytes where {len(message) - position} are left")
            value = message[position : position + size]
            value = value if wire_type == 2 else bytes(value)  # a view of 4 bytes takes 200
            position += size
        else:
            raise _Malformed(f"field {number} has the unknown wire type {wire_type}")
        found.setdefault(number, []).append(value)
    return found


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Seven bits a byte, the lowest first, the top bit set on all but the last."""
    value = 0
    for count in range(10):
        if position + count >= len(message):
            raise _Malformed("it ends within a number")
        byte = message[position + count]
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return value, position + count + 1
    raise _Malformed("a number is longer than 64 bits")


def _messages(fields: Fields, number: int) -> list[memoryview]:
    values = [value for value in fields.get(number, []) if isinstance(value, memoryview)]
    if len(values) != len(fields.get(number, [])):
        raise _Malformed(f"field {number} is a number where a message or text belongs")
    return values


def _message(fields: Fields, number: int) -> Fields:
    """An optional message: the last one counts."""
    return next((_fields(message) for message in _messages(fields, number)[-1:]), {})


def _texts(fields: Fields, number: int) -> tuple[str, ...]:
    return tuple(bytes(value).decode(errors="replace") for value in _messages(fields, number))


def _integers(fields: Fields, number: int) -> list[int]:
    """Of a repeated field, packed or not."""
    found = []
    for value in fields.get(number, []):
        if isinstance(value, int):
            found.append(value)
            continue
        position, packed = 0, memoryview(value)
        while position < len(packed):
            integer, position = _varint(packed, position)
            found.append(integer)
    return found


def _reals(fields: Fields, number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of a repeated field, packed or not, as float32."""
    values = [value for value in fields.get(number, []) if not isinstance(value, int)]
    data = bytearray().join(values)
    if len(data) % dtype.itemsize or len(values) != len(fields.get(number, [])):
        raise _Malformed(f"field {number} does not hold {str(dtype).removeprefix('torch.')} numbers")
    return torch.frombuffer(data, dtype=dtype).float() if data else torch.empty(0)


def _layer(message: memoryview, kind: int) -> CaffeLayer:
    number, fields = LAYER_FIELDS[kind], _fields(message)
    if kind == OLD and FIRST_FORMAT in fields:
        raise _Malformed("its layers are in Caffe's first format; Caffe's tool upgrade_net_proto_binary makes them readable")
    name = "".join(_texts(fields, number["name"])[-1:])
    types = [_old_type(value) for value in _integers(fields, number["type"])] if kind == OLD else _texts(fields, number["type"])
    convolution, eltwise, linear, norm = (_message(fields, number[key]) for key in ("convolution", "eltwise", "linear", "norm"))
    return CaffeLayer(
        name=name,
        type="".join(types[-1:]),
        bottoms=_texts(fields, number["bottom"]),
        tops=_texts(fields, number["top"]),
        blobs=tuple(_blob(_fields(blob), name) for blob in _messages(fields, number["blobs"])),
        stride=max(_integers(convolution, 6) + _integers(convolution, 13) + _integers(convolution, 14), default=1),
        group=max(_integers(convolution, 5), default=1),
        norm_eps=(_reals(norm, 3).tolist() or [NORM_EPS])[-1],
        is_sum=_integers(eltwise, 1) in ([], [1]) and bool((_reals(eltwise, 2) == 1).all()),
        transposed=any(_integers(linear, 6)),
    )


def _old_type(value: int) -> str:
    return OLD_TYPES[value] if value < len(OLD_TYPES) else f"type {value}"


def _blob(fields: Fields, layer: str) -> Tensor:
    values = torch.cat([_reals(fields, 5), _reals(fields, 8, torch.float64)])
    shape = _integers(_message(fields, 7), 1)
    if 7 not in fields and fields.keys() & {1, 2, 3, 4}:  # num, channels, height, width
        shape = [(_integers(fields, axis) or [0])[-1] for axis in (1, 2, 3, 4)]
    shape = shape or [len(values)]
    if not len(values) or len(shape) > MAX_AXES or math.prod(shape) != len(values):
        raise _Malformed(f"a blob of layer {layer!r} claims the shape {shape[:MAX_AXES]} and holds {len(values)} numbers")
    return values.view(shape)
