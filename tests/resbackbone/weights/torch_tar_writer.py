"""A writer of torch 0.1's tar files, byte by byte, independent of the reader under test."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SYSTEM = {"protocol_version": 1000, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 8}}
NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.float16: "Half",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.uint8: "Byte",
}
FIRST_ADDRESS = 20_000_000  # of the objects when they were saved; it serves as their key


class TarWriter:
    """Writes what torch 0.1's save did, byte by byte."""

    def __init__(self, *, python2: bool = False) -> None:
        self.python2 = python2
        self.storages: dict[int, tuple[int, Tensor]] = {}  # by data pointer
        self.tensors: list[Tensor] = []
        self.parts: list[tuple[int, int, int, int]] = []

    def address(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self.storages.setdefault(storage.data_ptr(), (FIRST_ADDRESS + 64 * len(self.storages), tensor))
        self.tensors.append(tensor)
        return FIRST_ADDRESS * 2 + 64 * len(self.tensors)

    def text(self, word: str) -> bytes:
        data = word.encode()
        return b"U" + bytes([len(data)]) + data if self.python2 else b"X" + struct.pack("<I", len(data)) + data

    def triple(self, first: int, second: bytes, type_name: str) -> bytes:
        return b"\x80\x02J" + struct.pack("<i", first) + second + b"ctorch\n" + type_name.encode() + b"\nq\x01\x87q\x02."

    def storages_member(self) -> bytes:
        chunks = [pickle.dumps(len(self.storages), 2)]
        for address, tensor in self.storages.values():
            flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            chunks.append(self.triple(address, self.text("cpu") + b"q\x00", NAMES[flat.dtype] + "Storage"))
            chunks.append(struct.pack("<q", len(flat)) + flat.numpy().tobytes())
        return b"".join([*chunks, pickle.dumps(self.parts, 2)])

    def tensors_member(self) -> bytes:
        chunks = [pickle.dumps(len(self.tensors), 2)]
        for number, tensor in enumerate(self.tensors, 1):
            address, _ = self.storages[tensor.untyped_storage().data_ptr()]
            storage = b"J" + struct.pack("<i", address)
            chunks.append(self.triple(FIRST_ADDRESS * 2 + 64 * number, storage, NAMES[tensor.dtype] + "Tensor"))
            numbers = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
            chunks.append(struct.pack(f"<ii{len(numbers)}q", tensor.dim(), 0, *numbers))
        return b"".join(chunks)

    def value(self, item: Any) -> bytes:
        if isinstance(item, torch.nn.Parameter):
            # A new Parameter, then its state: data, grad, hooks, requires_grad, volatile.
            return b"ctorch.nn.parameter\nParameter\n)\x81(" + self.value(item.data) + b"NN\x88\x89tb"
        if isinstance(item, Tensor):
            return self.text(str(self.address(item))) + b"Q"
        if isinstance(item, OrderedDict):
            pairs = [self.text(key) + self.value(value) for key, value in item.items()]
            if self.python2:
                return b"ccollections\nOrderedDict\n](" + b"".join(b"](" + pair + b"e" for pair in pairs) + b"e\x85R"
            return b"ccollections\nOrderedDict\n)R(" + b"".join(pairs) + b"u"
        if isinstance(item, dict):
            return b"}(" + b"".join(self.text(key) + self.value(value) for key, value in item.items()) + b"u"
        return pickle.dumps(item, 2)[2:-1]

    def save(self, content: Any, path: Path, **replaced: bytes) -> Path:
        members = {"sys_info": pickle.dumps(SYSTEM, 2), "pickle": b"\x80\x02" + self.value(content) + b"."}
        write_tar(path, members | {"tensors": self.tensors_member(), "storages": self.storages_member()} | replaced)
        return path


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1486000000.25  # a fraction makes an extended header, as torch's files have
            archive.addfile(info, io.BytesIO(data))


def members_of(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}
