"""Pickles of numpy arrays (.pkl), by Python 2 or 3, read without running them.

A pickle is a program, so it isn't handed to Python's pickle. A machine with the few instructions that arrays need walks over it, calls
nothing of the file's choosing, and makes nothing that the file's own bytes don't fill.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resbackbone.errors import InputError
from resbackbone.weights.files import first_bytes

# What pickles of arrays name: by Python 2 and 3, numpy 1 and 2, protocols 2 to 5.
GLOBALS = {
    **{f"numpy.{core}.multiarray.{name}": name for core in ("core", "_core") for name in ("_reconstruct", "scalar")},
    **{f"numpy.{core}.numeric._frombuffer": "_frombuffer" for core in ("core", "_core")},
    "numpy.ndarray": "ndarray",
    "numpy.dtype": "dtype",
    "_codecs.encode": "encode",
    "collections.OrderedDict": "OrderedDict",
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
REALS = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64}
INTEGERS = {"i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64, "u1": torch.uint8, "b1": torch.uint8}
DTYPES = REALS | INTEGERS
MAX_AXES = 32
LITERALS_TEXT = """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    SHORT_BINSTRING BINSTRING SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8
"""
LITERALS = frozenset(LITERALS_TEXT.split())  # the instructions that are a value


class _Unexpected(Exception):
    """The pickle isn't a plain collection of arrays; the message says why."""


def read_pickle(path: Path) -> Any:
    """What a .pkl holds: dicts, lists, tuples, text and numbers, and a `PickledArray` for every array.

    Raises InputError for a file that is missing, cut off, or asks for anything else.
    """
    path = Path(path)
    first_bytes(path)  # says what is wrong with a path that is no file
    data = path.read_bytes()
    machine = _Machine(len(data))
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except _Unexpected as error:
        raise InputError(
            f"{path} is not a file of arrays alone: {error}; nothing in it is run, because it could be harmful. "
            "If you trust its source, convert it there to .safetensors"
        ) from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:  # which one depends on the byte where it breaks
        reason = (str(error).splitlines() or [""])[0][:200]
        raise InputError(f"{path} is not a whole pickle ({reason}); copy or download it again") from error
    raise InputError(f"{path} is not a whole pickle (no end); copy or download it again")


@dataclass(frozen=True)
class _Global:
    """Stands for a function or type of GLOBALS."""

    name: str


@dataclass(eq=False)
class _Dtype:
    """What the pickle told of a numpy.dtype."""

    code: str
    order: str = "="


@dataclass(eq=False)
class PickledArray:
    """One array; its tensor comes with a later instruction than itself."""

    tensor: Tensor | None = None


class _Machine:
    """pickle's stack machine. Its memo is a dict, so no number in the file makes it large; a dict's keys are text or numbers."""

    def __init__(self, size: int) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        # What calls may still make, in bytes and entries: text to bytes, bytes to an array. Calling again on one value ends here.
        self.left = 2 * size

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name.endswith("PUT") or name == "MEMOIZE":
            self.memo[len(self.memo) if argument is None else int(argument)] = stack[-1]
        elif name.endswith("GET"):
            stack.append(self.memo[int(argument)])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "TUPLE" or name in TUPLES:
            stack.append(tuple(self._pop(TUPLES.get(name))))
        elif name in ("APPEND", "APPENDS"):
            self._extend(self._pop(1 if name == "APPEND" else None))
        elif name in ("SETITEM", "SETITEMS"):
            self._update(self._pop(2 if name == "SETITEM" else None))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_global(argument.split(" ", 1) if name == "GLOBAL" else self._pop(2)))
        elif name == "REDUCE":
            stack.append(self._call(*self._pop(2)))
        elif name == "BUILD":
            self._build(*self._pop(1))
        elif name in LITERALS:
            stack.append(argument)
        elif name not in ("PROTO", "FRAME"):
            raise _Unexpected(f"it uses pickle's instruction {name}")

    def _pop(self, count: int | None) -> list[Any]:
        """The uppermost `count` values; None: those above the last mark."""
        start = self.marks.pop() if count is None else len(self.stack) - count
        if not 0 <= start <= len(self.stack):
            raise IndexError("it takes values that it hasn't made")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise _Unexpected(f"it appends to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(values)

    def _update(self, values: list[Any]) -> None:
        keys = values[::2]
        if not isinstance(self.stack[-1], dict) or not all(type(key) in (str, int) for key in keys):
            raise _Unexpected("it has a dict whose keys are not names")
        self.stack[-1].update(zip(keys, values[1::2], strict=True))

    def _spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise _Unexpected("it claims to hold more than its own bytes")

    def _call(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case _Global("_reconstruct"), (_Global("ndarray"), tuple(), _):
                return PickledArray()
            case _Global("_frombuffer"), (data, _Dtype() as dtype, shape, "C" | "F" as order):
                return PickledArray(self._tensor(shape, dtype, order == "F", data))
            case _Global("scalar"), (_Dtype() as dtype, data):
                return PickledArray(self._tensor((), dtype, False, data))
            case _Global("dtype"), (str(code), *_):
                return _Dtype(code)
            case _Global("encode"), (str(text), "latin1"):  # bytes, as Python 3 writes them for Python 2
                self._spend(len(text))
                return text.encode("latin1")
            case _Global("OrderedDict"), ():
                return {}
            case _Global("OrderedDict"), (list(pairs),):  # of Python 2
                self._spend(len(pairs))
                self.stack.append({})
                self._update([part for key, value in pairs for part in (key, value)])
                return self.stack.pop()
        raise _Unexpected(f"it calls {function.name if isinstance(function, _Global) else 'what is no function'} as numpy never does")

    def _build(self, state: Any) -> None:
        match self.stack[-1], state:
            case PickledArray() as array, (int(), shape, _Dtype() as dtype, fortran, data):
                array.tensor = self._tensor(shape, dtype, bool(fortran), data)
            case _Dtype() as dtype, (int(), "<" | ">" | "=" | "|" as order, None, None, None, *_):
                dtype.order = order
            case target, _:
                raise _Unexpected(f"it changes a {type(target).__name__.strip('_')} as numpy never does")

    def _tensor(self, shape: Any, dtype: _Dtype, fortran: bool, data: Any) -> Tensor:
        """float32 or int64, whatever the array was."""
        if dtype.code not in DTYPES:
            raise _Unexpected(f"it has an array of the type {dtype.code[:40]!r}, not one of {', '.join(DTYPES)}")
        data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 had no other bytes
        if not isinstance(data, bytes | bytearray) or not isinstance(shape, tuple) or len(shape) > MAX_AXES:
            raise _Unexpected("it has an array of no bytes or no shape")
        item_size = int(dtype.code[1])
        if not all(type(size) is int and 0 < size <= len(data) for size in shape) or math.prod(shape) * item_size != len(data):
            raise ValueError(f"an array of {len(shape)} axes does not have the {len(data)} bytes that its shape wants")
        self._spend(len(data))
        values = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if dtype.order == ">":
            values = values.view(-1, item_size).flip(1).flatten()
        values = values.view(DTYPES[dtype.code])
        values = values.float() if dtype.code in REALS else values.long()
        # Fortran's order is C's of the transposed.
        return values.view(shape[::-1]).permute(*reversed(range(len(shape)))).contiguous() if fortran else values.view(shape)


def _global(names: Sequence[Any]) -> _Global:
    name = ".".join(str(part)[:100] if isinstance(part, str) else "?" for part in names)
    if name not in GLOBALS:
        raise _Unexpected(f"it asks for {name}")
    return _Global(GLOBALS[name])
