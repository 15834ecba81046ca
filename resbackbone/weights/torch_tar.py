"""Weights that torch 0.1 wrote, torchvision's first ResNets among them: a tar of four members, read without executing anything.

The members are runs of pickles with raw little-endian numbers between them. `torch.load(weights_only=True)` refuses such files, because it
would need the pickle module for them; here `pickle_machine` reads them, and the few names that tensors need are listed below.

    sys_info   one pickle: protocol version and byte order
    storages   a count; for each: (key, location, type), then int64 n and n numbers; at the end a list of (key, key of the whole, offset, n)
    tensors    a count; for each: (key, storage's key, type), then int32 dimensions, 4 bytes of padding, int64 sizes, strides and offset
    pickle     the saved object; tensors are in it by key
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from resbackbone.errors import InputError
from resbackbone.weights.pickle_machine import Builder, Dialect, Global, check_key, make_dict, unpickle
from resbackbone.weights.reading import find_state_dict, reading, refusal

BLOCK, RECORD = 512, 10240  # tar is made of blocks; its writers fill up the last record
MEMBERS = ("sys_info", "pickle", "tensors", "storages")
PROTOCOL_VERSION = 1000
PICKLE_PROTOCOL = 2
MAX_NUMBER = 2**63  # torch's own limit
MAX_DIMENSIONS = 64  # torch's own limit
MAX_TEXT = 4096  # of one line of a pickle
DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
}


def is_torch_tar(path: Path) -> bool:
    """Whether the file is a tar at all, by the mark in its first block."""
    with path.open("rb") as file:
        return file.read(BLOCK)[257:262] == b"ustar"


def read_torch_tar(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a torch 0.1 file, on the CPU. Tensors that shared a storage share it again.

    Raises InputError for a file that is cut off, claims more than it holds, or holds anything but tensors in dicts.
    """
    with reading(path, "torch 0.1 tar file"), path.open("rb") as file:
        members = _find_members(file)
        _check_system(_Member(file, *members["sys_info"]))
        storages = _read_storages(_Member(file, *members["storages"]))
        tensors = _read_tensors(_Member(file, *members["tensors"]), storages)
        content = unpickle(_Member(file, *members["pickle"]), DIALECT, {**storages, **tensors})
        return find_state_dict(content, lambda value: value.tensor if isinstance(value, _Parameter) else value)


class _Member:
    """One member's bytes, in order. Whoever asks for more than it has gets an error before any memory."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._end = file, start + size
        file.seek(start)

    def read(self, count: int) -> bytes:
        return bytes(self.read_array(count))

    def tell(self) -> int:
        return self._file.tell()

    def readline(self) -> bytes:
        return self._file.readline(min(MAX_TEXT, self._end - self._file.tell()))

    def read_numbers(self, code: str, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{max(count, 0)}{code}", self.read_array(count * struct.calcsize(f"<{code}")))

    def read_array(self, count: int) -> bytearray:
        """Memory that a tensor may own and change."""
        left = self._end - self._file.tell()
        if not 0 <= count <= left:
            raise ValueError(f"it claims {count} more bytes where {left} are left")
        array = bytearray(count)
        self._file.readinto(array)  # type: ignore[attr-defined]
        return array


def _find_members(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Start and size of each of the four members."""
    # tarfile would do, but in Python 3.11 a negative size sends it round for ever, and it takes a tar without its end for a whole one.
    size, start = file.seek(0, io.SEEK_END), 0
    members = {}
    while (header := _read_header(file, start)) is not None:
        name, kind, length = header
        start += BLOCK
        if not 0 <= length <= size - start:
            raise ValueError(f"member {name} claims {length} bytes where {size - start} are left")
        if kind in (b"0", b"\0"):
            members[name] = (start, length)
        start += -(-length // BLOCK) * BLOCK
    missing = [name for name in MEMBERS if name not in members]
    if missing:
        raise ValueError(f"a tar without {', '.join(missing)}; it has {', '.join(members) or 'no members'}")
    if size % RECORD or size - start < 2 * BLOCK:
        raise ValueError(f"its end is missing: {size} bytes are no multiple of {RECORD}")
    return members


def _read_header(file: BinaryIO, start: int) -> tuple[str, bytes, int] | None:
    """Name, kind and size of the member at `start`; None at the tar's end."""
    file.seek(start)
    block = file.read(BLOCK)
    if len(block) == BLOCK and not any(block):
        return None
    checksum = sum(block[:148]) + sum(block[156:]) + 8 * ord(" ")  # its own field counts as blanks
    if len(block) < BLOCK or block[257:262] != b"ustar" or _octal(block[148:156]) != checksum:
        raise ValueError(f"no tar header at byte {start}")
    return block[:100].split(b"\0")[0].decode("latin-1"), block[156:157], _octal(block[124:136])


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    return int(digits, 8) if digits.isdigit() else -1


def _check_system(member: _Member) -> None:
    system = unpickle(member, DIALECT)
    if not isinstance(system, dict) or system.get("protocol_version") != PROTOCOL_VERSION:
        raise ValueError(f"its sys_info is not of version {PROTOCOL_VERSION}")
    if system.get("little_endian") is not True:
        raise InputError("was written on a big-endian machine; convert it to .safetensors there")


def _read_storages(member: _Member) -> dict[str, Tensor]:
    """Each storage as a flat tensor. A part of another shares its memory."""
    storages: dict[str, Tensor] = {}
    for _ in range(unpickle(member, DIALECT)):
        key, _location, kind = unpickle(member, DIALECT)
        dtype = _dtype(kind)
        (numel,) = member.read_numbers("q", 1)
        array = member.read_array(numel * dtype.itemsize)
        storages[_key(key)] = torch.frombuffer(array, dtype=dtype) if numel else torch.empty(0, dtype=dtype)
    for key, whole, offset, numel in unpickle(member, DIALECT):
        storages[_key(key)] = _view(storages[_key(whole)], offset, (numel,), (1,))
    return storages


def _read_tensors(member: _Member, storages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for _ in range(unpickle(member, DIALECT)):
        key, storage, _kind = unpickle(member, DIALECT)
        dimensions, _padding = member.read_numbers("i", 2)
        size = member.read_numbers("q", dimensions)
        stride = member.read_numbers("q", dimensions)
        (offset,) = member.read_numbers("q", 1)
        tensors[_key(key)] = _view(storages[_key(storage)], offset, size, stride)
    return tensors


def _key(key: Any) -> str:
    """Addresses on the machine that saved: numbers in one member, text in another."""
    return str(int(check_key(key)))


def _dtype(kind: Any) -> torch.dtype:
    name = kind.name.replace("torch.cuda.", "torch.") if isinstance(kind, Global) else type(kind).__name__
    if name not in DTYPES:
        raise InputError(f"has a storage of type {name}; known are {', '.join(DTYPES)}. Convert it to .safetensors")
    return DTYPES[name]


def _view(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Part of a flat storage, in any layout that stays within it."""
    is_shaped = len(size) == len(stride) <= MAX_DIMENSIONS
    if not is_shaped or not all(type(n) is int and 0 <= n < MAX_NUMBER for n in (offset, *size, *stride)):
        raise ValueError("a tensor whose offset, sizes and strides are no such thing")
    numel = math.prod(size)
    end = offset + (1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if numel else 0)
    # With strides of 0 a tensor can be larger than its storage, and than any memory it would be copied to; weights have no reason for it.
    if max(end, numel) > len(storage):
        raise ValueError(f"a tensor of sizes {list(size)}, strides {list(stride)} and offset {offset} in a storage of {len(storage)}")
    return storage.as_strided(size, stride, storage.storage_offset() + offset)


class _Parameter:
    """A torch.nn.Parameter in the making: its tensor comes when it is created or, as torch 0.1 wrote it, with its state."""

    def __init__(self, tensor: Any = None, *_: object) -> None:
        self.tensor = tensor


def _rebuild_tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    if not isinstance(storage, Tensor):
        raise ValueError(f"a tensor in a {type(storage).__name__}")
    return _view(storage, offset, size, stride)


BUILDERS: dict[str, Builder] = {
    "collections.OrderedDict": make_dict,
    "torch.nn.parameter.Parameter": _Parameter,
    "torch.autograd.variable.Variable": _Parameter,
    "torch._utils._rebuild_parameter": _Parameter,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
}


def _find_global(name: str) -> Global:
    """Types of tensors and storages stay names; nothing builds them."""
    module, _, attribute = name.rpartition(".")
    is_type = module in ("torch", "torch.cuda") and attribute.isalnum() and attribute.endswith(("Tensor", "Storage"))
    if not is_type and name not in BUILDERS:
        raise refusal(f"names {name}, which no tensor needs")
    return Global(name, BUILDERS.get(name))


def _set_state(target: Any, state: tuple[Any, ...]) -> None:
    """torch 0.1's first Variables have five values with the tensor in front; nothing else's state matters here."""
    if isinstance(target, _Parameter) and len(state) == 5:
        target.tensor = state[0]
    elif not isinstance(target, (_Parameter, dict)):
        raise ValueError(f"a state for a {type(target).__name__}")


DIALECT = Dialect(_find_global, _set_state, PICKLE_PROTOCOL)
