"""The files of a tar from front to back, and no more of the format than shards use: Python's tarfile takes several times as long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

_BLOCK = 512
_NAME, _SIZE, _SUM, _KIND = slice(0, 100), slice(124, 136), slice(148, 156), slice(156, 157)
_FILE = (b"0", b"\0")
_EXTENDED = b"x"  # what a header has no room for, such as fractions of a second; the next header is the file's


def tar_files(stream: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file of an uncompressed tar. Raises ValueError for a damaged one, and for what isn't a plain file."""
    while (header := stream.read(_BLOCK)).strip(b"\0"):
        if len(header) < _BLOCK or sum(header) - sum(header[_SUM]) + len(header[_SUM]) * ord(" ") != _octal(header[_SUM]):
            raise ValueError("a header is damaged")
        size = _octal(header[_SIZE])
        content = stream.read(size + -size % _BLOCK)
        if len(content) < size:
            raise ValueError("it ends within a file")
        if header[_KIND] in _FILE:
            yield header[_NAME].rstrip(b"\0").decode(errors="replace"), content[:size]
        elif header[_KIND] != _EXTENDED or b"path=" in content or b"size=" in content:
            raise ValueError("it holds something that is no plain file with a short name")


def _octal(field: bytes) -> int:
    return int(field.strip(b" \0") or b"-", 8)
