"""Writes pickles as Python 2's cPickle did (protocol 2), instruction by instruction: text and bytes are one type, and numpy is numpy 1."""

from __future__ import annotations

import struct

import numpy as np


def text(value: bytes) -> bytes:
    return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def python2_array(values: np.ndarray, *, shape: tuple[int, ...] | None = None, data: bytes | None = None) -> bytes:
    """`shape` and `data` (an instruction): what it claims instead of its own."""
    minus_one = integer(-1)
    kind = call("numpy", "dtype", text(values.dtype.str[1:].encode()), b"K\x00", b"K\x01")
    kind += b"(K\x03" + text(values.dtype.str[:1].encode()) + b"NNN" + minus_one + minus_one + b"K\x00tb"
    axes = b"(" + b"".join(integer(size) for size in (shape or values.shape)) + b"t"
    fresh = call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\n", b"K\x00\x85", text(b"b"))
    return fresh + b"(K\x01" + axes + kind + b"\x89" + (data or text(values.tobytes())) + b"tb"


def python2_dict(items: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(name.encode()) + value for name, value in items.items()) + b"u"


def python2_file(items: dict[str, bytes]) -> bytes:
    return b"\x80\x02" + python2_dict(items) + b"."
