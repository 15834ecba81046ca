"""Weights that torch 0.1 wrote, torchvision's first ResNets among them: a tar of four members, read without executing anything.

The members are runs of pickles with raw little-endian numbers between them. `torch.load(weights_only=True)` refuses such files, because it
would need the pickle module for them; here a small interpreter knows the few instructions and names that tensors need, and nothing else.

    sys_info   one pickle: protocol version and byte order
    storages   a count; for each: (key, location, type), then int64 n and n numbers; at the end a list of (key, key of the whole, offset, n)
    tensors    a count; for each: (key, storage's key, type), then int32 dimensions, 4 bytes of padding, int64 sizes, strides and offset
    pickle     the saved object; tensors are in it by key
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from resbackbone.errors import InputError

BLOCK, RECORD = 512, 10240  # tar is made of blocks; its writers fill up the last record
MEMBERS = ("sys_info", "pickle", "tensors", "storages")
NESTED = ("state_dict", "model_state_dict", "model")  # where training scripts put the tensors of a larger checkpoint
PROTOCOL_VERSION = 1000
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
    try:
        with path.open("rb") as file:
            members = _find_members(file)
            _check_system(_Member(file, *members["sys_info"]))
            storages = _read_storages(_Member(file, *members["storages"]))
            tensors = _read_tensors(_Member(file, *members["tensors"]), storages)
            return _find_state_dict(_unpickle(_Member(file, *members["pickle"]), {**storages, **tensors}))
    except InputError as error:
        raise InputError(f"{path} {error}") from error
    # What a damaged file breaks first, a number, a key or a stack, depends on the damage.
    except (ValueError, TypeError, LookupError, OverflowError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{path} is not a whole torch 0.1 tar file ({reason}); copy or download it again, or convert it to .safetensors"
        ) from error


class _Member:
    """One member's bytes, in order. Whoever asks for more than it has gets an error before any memory."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._end = file, start + size
        file.seek(start)

    def read(self, count: int) -> bytes:
        return bytes(self.read_array(count))

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
    system = _unpickle(member)
    if not isinstance(system, dict) or system.get("protocol_version") != PROTOCOL_VERSION:
        raise ValueError(f"its sys_info is not of version {PROTOCOL_VERSION}")
    if system.get("little_endian") is not True:
        raise InputError("was written on a big-endian machine; convert it to .safetensors there")


def _read_storages(member: _Member) -> dict[str, Tensor]:
    """Each storage as a flat tensor. A part of another shares its memory."""
    storages: dict[str, Tensor] = {}
    for _ in range(_unpickle(member)):
        key, _location, kind = _unpickle(member)
        dtype = _dtype(kind)
        (numel,) = member.read_numbers("q", 1)
        array = member.read_array(numel * dtype.itemsize)
        storages[_key(key)] = torch.frombuffer(array, dtype=dtype) if numel else torch.empty(0, dtype=dtype)
    for key, whole, offset, numel in _unpickle(member):
        storages[_key(key)] = _view(storages[_key(whole)], offset, (numel,), (1,))
    return storages


def _read_tensors(member: _Member, storages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for _ in range(_unpickle(member)):
        key, storage, _kind = _unpickle(member)
        dimensions, _padding = member.read_numbers("i", 2)
        size = member.read_numbers("q", dimensions)
        stride = member.read_numbers("q", dimensions)
        (offset,) = member.read_numbers("q", 1)
        tensors[_key(key)] = _view(storages[_key(storage)], offset, size, stride)
    return tensors


def _key(key: Any) -> str:
    """Addresses on the machine that saved: numbers in one member, text in another."""
    return str(int(key))


def _dtype(kind: Any) -> torch.dtype:
    name = kind.text.replace("torch.cuda.", "torch.") if isinstance(kind, _Name) else type(kind).__name__
    if name not in DTYPES:
        raise InputError(f"has a storage of type {name}; known are {', '.join(DTYPES)}. Convert it to .safetensors")
    return DTYPES[name]


def _view(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Part of a flat storage, in any layout that stays within it."""
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise ValueError("a tensor whose offset, sizes and strides are no such thing")
    numel = math.prod(size)
    end = offset + (1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if numel else 0)
    # With strides of 0 a tensor can be larger than its storage, and than any memory it would be copied to; weights have no reason for it.
    if max(end, numel) > len(storage):
        raise ValueError(f"a tensor of sizes {list(size)}, strides {list(stride)} and offset {offset} in a storage of {len(storage)}")
    return storage.as_strided(size, stride, storage.storage_offset() + offset)


def _find_state_dict(content: Any) -> dict[str, Tensor]:
    """The state dict in what was saved: the content itself, or the entry of a checkpoint that holds it."""
    if not isinstance(content, dict):
        raise InputError(f"holds a {type(content).__name__}, not a state dict of tensors")
    content = next((content[place] for place in NESTED if isinstance(content.get(place), dict)), content)
    tensors = {name: value.tensor if isinstance(value, _Parameter) else value for name, value in content.items()}
    wrong = [name for name, value in tensors.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if wrong or not tensors:
        found = f"{str(wrong[0])[:80]!r}, which is no tensor," if wrong else "nothing"
        raise InputError(f"holds {found} where a state dict of tensors belongs (looked in {', '.join(NESTED)} as well)")
    return tensors


class _Name:
    """A class or function that a pickle names. It stays a name: nothing is imported."""

    def __init__(self, text: str) -> None:
        module, _, self.attribute = text.partition(" ")
        self.text = f"{module}.{self.attribute}"
        is_type = module in ("torch", "torch.cuda") and self.attribute.isalnum() and self.attribute.endswith(("Tensor", "Storage"))
        if not is_type and self.text not in BUILDERS:
            raise InputError(
                f"names {self.text[:200]}, which no tensor needs; nothing in the file is run, because it could be harmful. "
                "If you trust its source, save the state_dict alone there, as .safetensors"
            )


class _Parameter:
    """A torch.nn.Parameter in the making: its tensor comes when it is created or, as torch 0.1 wrote it, with its state."""

    def __init__(self, tensor: Any = None, *_: object) -> None:
        self.tensor = tensor


def _dict(pairs: Any = ()) -> dict[Any, Any]:
    pairs = list(pairs)
    if not all(isinstance(key, (str, int)) for key, _ in pairs):  # tuples in tuples in tuples can take for ever to hash
        raise ValueError("a dict whose keys are neither text nor numbers")
    return dict(pairs)


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    return _view(storage, offset, size, stride)


BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "torch.nn.parameter.Parameter": _Parameter,
    "torch.autograd.variable.Variable": _Parameter,
    "torch._utils._rebuild_parameter": _Parameter,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
}


def _unpickle(member: _Member, persistent: Mapping[str, Any] | None = None) -> Any:
    """The object of the pickle at the member's position, which is behind it afterwards. It may refer to `persistent` by key."""
    machine = _Machine(persistent or {})
    for opcode, argument, _ in pickletools.genops(member):  # type: ignore[arg-type]
        machine.step(opcode.name, argument)
    return machine.stack.pop()


class _Machine:
    """What pickle's instructions work on: a stack, the stacks below each open mark, and a memo."""

    def __init__(self, persistent: Mapping[str, Any]) -> None:
        self.stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._persistent = persistent

    def step(self, name: str, argument: Any) -> None:
        if name in LITERALS:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in CONTAINERS:
            operands = self._operands(name)  # before the stack is looked up: it may be another afterwards
            self.stack.append(CONTAINERS[name](operands))
        elif name in ACTIONS:
            ACTIONS[name](self, *self._operands(name))
        elif name in PUTS:
            self._memo[argument] = self.stack[-1]
        elif name in GETS:
            self.stack.append(self._memo[argument])
        elif name == "MARK":
            self._marks.append(self.stack)
            self.stack = []
        elif name == "GLOBAL":
            self.stack.append(_Name(argument))
        elif name == "BINPERSID":
            self.stack.append(self._persistent[_key(self.stack.pop())])
        elif name not in ("PROTO", "STOP"):
            raise InputError(f"uses pickle's instruction {name}, which no tensor needs; convert it to .safetensors")

    def _operands(self, name: str) -> list[Any]:
        """A fixed number from the top of the stack, or all above the last mark."""
        if name not in OPERANDS:
            operands, self.stack = self.stack, self._marks.pop()
            return operands
        return [self.stack.pop() for _ in range(OPERANDS[name])][::-1]

    def set_items(self, *flat: Any) -> None:
        if not isinstance(self.stack[-1], dict):
            raise ValueError(f"items for a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(_pairs(flat))

    def append(self, *values: Any) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError(f"elements for a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(values)

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, _Name) or function.text not in BUILDERS:
            name = function.text if isinstance(function, _Name) else f"a {type(function).__name__}"
            raise InputError(f"calls {name}, which no tensor needs; nothing in the file is run")
        self.stack.append(BUILDERS[function.text](*arguments))

    def set_state(self, state: Any) -> None:
        """torch 0.1's first Variables have five values with the tensor in front; nothing else's state matters here."""
        if isinstance(self.stack[-1], _Parameter) and isinstance(state, tuple) and len(state) == 5:
            self.stack[-1].tensor = state[0]
        elif not isinstance(self.stack[-1], (_Parameter, dict)):
            raise ValueError(f"a state for a {type(self.stack[-1]).__name__}")


def _pairs(flat: Any) -> dict[Any, Any]:
    return _dict(zip(flat[::2], flat[1::2], strict=True))


LITERALS = {"INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT"} | {
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE")
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
PUTS, GETS = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
NO_OPERANDS = dict.fromkeys(("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"), 0)
OPERANDS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "SETITEM": 2, "APPEND": 1, "REDUCE": 2, "NEWOBJ": 2, "BUILD": 1} | NO_OPERANDS
CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    **dict.fromkeys(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"), tuple),
    **dict.fromkeys(("LIST", "EMPTY_LIST"), list),
    **dict.fromkeys(("DICT", "EMPTY_DICT"), _pairs),
}
ACTIONS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("SETITEM", "SETITEMS"), _Machine.set_items),
    **dict.fromkeys(("APPEND", "APPENDS"), _Machine.append),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call),
    "BUILD": _Machine.set_state,
}
