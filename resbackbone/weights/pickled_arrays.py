"""Pickles of numpy arrays (.pkl), by Python 2 or 3, read without running them; numpy's own functions are not called either."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resbackbone.weights.files import first_bytes
from resbackbone.weights.pickle_machine import Builder, Dialect, Global, make_dict, unpickle
from resbackbone.weights.reading import reading, refusal

REALS = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64}
INTEGERS = {"i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64, "u1": torch.uint8, "b1": torch.uint8}
DTYPES = REALS | INTEGERS
MAX_AXES = 32
PROTOCOL = 5  # of pickle: the newest


def read_pickle(path: Path) -> Any:
    """What a .pkl holds: dicts, lists, tuples, text and numbers, and a `PickledArray` for every array.

    Raises InputError for a file that is missing, cut off, or asks for anything else.
    """
    path = Path(path)
    first_bytes(path)  # says what is wrong with a path that is no file
    with reading(path, "pickle"):
        return unpickle(io.BytesIO(path.read_bytes()), DIALECT)


@dataclass(eq=False)
class _Dtype:
    """What the pickle told of a numpy.dtype."""

    code: str
    order: str = "="


@dataclass(eq=False)
class PickledArray:
    """One array; its tensor comes with a later instruction than itself."""

    tensor: Tensor | None = None


def _empty_array(*_: object) -> PickledArray:
    return PickledArray()


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
    return PickledArray(_tensor(shape, dtype, order == "F", data))


def _scalar(dtype: Any, data: Any) -> PickledArray:
    return PickledArray(_tensor((), dtype, False, data))


def _dtype(code: Any, *_: object) -> _Dtype:
    if not isinstance(code, str):
        raise ValueError("a type without a name")
    return _Dtype(code)


def _encode(text: Any, encoding: Any) -> bytes:
    """Bytes, as Python 3 writes them for Python 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("bytes made of what is no text")
    return text.encode("latin1")


# What pickles of arrays name: by Python 2 and 3, numpy 1 and 2, protocols 2 to 5.
BUILDERS: dict[str, Builder | None] = {
    **{f"numpy.{core}.multiarray._reconstruct": _empty_array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array for core in ("core", "_core")},
    "numpy.ndarray": None,
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
    "collections.OrderedDict": make_dict,
}


def _find_global(name: str) -> Global:
    if name not in BUILDERS:
        raise refusal(f"asks for {name}")
    return Global(name, BUILDERS[name])


def _set_state(target: Any, state: tuple[Any, ...]) -> None:
    match target, state:
        case PickledArray(), (int(), shape, dtype, fortran, data):
            target.tensor = _tensor(shape, dtype, bool(fortran), data)
        case _Dtype(), (int(), "<" | ">" | "=" | "|" as order, None, None, None, *_):
            target.order = order
        case _:
            raise refusal(f"changes a {type(target).__name__.strip('_')} as numpy never does")


DIALECT = Dialect(_find_global, _set_state, PROTOCOL)


def _tensor(shape: Any, dtype: Any, fortran: bool, data: Any) -> Tensor:
    """float32 or int64, whatever the array was."""
    code = dtype.code[:40] if isinstance(dtype, _Dtype) else "?"
    if code not in DTYPES:
        raise refusal(f"has an array of the type {code!r}, not one of {', '.join(DTYPES)}")
    data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 had no other bytes
    if not isinstance(data, bytes | bytearray) or not isinstance(shape, tuple) or len(shape) > MAX_AXES:
        raise ValueError("an array of no bytes or no shape")
    item_size = int(code[1])
    if not all(type(size) is int and 0 < size <= len(data) for size in shape) or math.prod(shape) * item_size != len(data):
        raise ValueError(f"an array of {len(shape)} axes does not have the {len(data)} bytes that its shape wants")
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if dtype.order == ">":
        values = values.view(-1, item_size).flip(1).flatten()
    values = values.view(DTYPES[code])
    values = values.float() if code in REALS else values.long()
    # Fortran's order is C's of the transposed.
    return values.view(shape[::-1]).permute(*reversed(range(len(shape)))).contiguous() if fortran else values.view(shape)
