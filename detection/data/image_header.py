"""What an image file says about itself in its first bytes: size, channels, orientation. Nothing is decoded or allocated."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

MAX_PIXELS = 2**27  # 134 million, 400 MB as RGB; a header may claim anything

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the start-of-frame markers
_JPEG_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length
_OTHERS = {b"BM": "bmp", b"GIF8": "gif", b"II*\0": "tiff", b"MM\0*": "tiff"}


class BrokenHeader(ValueError):
    """The file is not an image, or its header is cut off."""


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """height, width: as stored, in pixels (0 where the format is not read here); orientation: EXIF's 1..8."""

    format: str
    height: int = 0
    width: int = 0
    channels: int = 3
    bits: int = 8
    orientation: int = 1
    adobe_transform: int = 1  # JPEG only; 0 with 3 channels means the file holds RGB, not YCbCr
    pixels_at: int = 0  # where the compressed pixels start

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) once turned as the orientation says."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)

    @property
    def oddities(self) -> list[str]:
        """What makes this file unusual, in words; all of it is read right."""
        found = ["CMYK"] if self.format == "jpeg" and self.channels == 4 else []
        found += ["alpha channel (ignored)"] if self.format == "png" and self.channels in (2, 4) else []
        found += [f"{self.bits} bits a channel"] if self.bits > 8 else []
        found += [f"turned by EXIF orientation {self.orientation}"] if self.orientation != 1 else []
        return found


def read_header(data: bytes) -> ImageHeader:
    """The header of an image file's first bytes (256 KiB do for nearly all). Raises BrokenHeader saying what the file is instead."""
    if data[:2] == b"\xff\xd8":
        return _jpeg_header(data)
    if data[:8] == _PNG:
        return _png_header(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ImageHeader(format="webp")
    for magic, name in _OTHERS.items():
        if data.startswith(magic):
            return ImageHeader(format=name)
    if not data:
        raise BrokenHeader("the file is empty")
    start = data[:64].lstrip().lower()
    what = "a web page" if start.startswith((b"<!doctype", b"<html")) else f"no image format known here (it starts with {data[:8]!r})"
    raise BrokenHeader(f"it is {what}")


def is_cut_off(data: bytes, header: ImageHeader) -> bool:
    """Whether a JPEG or PNG lacks its end marker; decoders fill the missing rows with grey and say nothing."""
    if header.format == "jpeg":
        return data.rfind(b"\xff\xd9", header.pixels_at) < 0
    return header.format == "png" and data.rfind(b"IEND", header.pixels_at) < 0


def _jpeg_header(data: bytes) -> ImageHeader:
    header, position = ImageHeader(format="jpeg"), 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:  # stray bytes between segments; decoders skip them too
            position = data.find(b"\xff", position)
            if position < 0:
                break
            continue
        marker = data[position + 1]
        if marker == 0xFF or marker in _JPEG_ALONE:
            position += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        body = data[position + 4 : position + 2 + length]
        if marker == 0xDA:
            if not header.height:
                break
            return replace(header, pixels_at=position + 2 + length)
        header = _with_segment(header, marker, body)
        position += 2 + length
    raise BrokenHeader("its JPEG header is cut off")


def _with_segment(header: ImageHeader, marker: int, body: bytes) -> ImageHeader:
    if marker in _JPEG_SIZES and len(body) >= 6:
        bits, height, width, channels = struct.unpack_from(">BHHB", body)
        return replace(header, bits=bits, height=height, width=width, channels=channels)
    if marker == 0xE1 and body[:6] == b"Exif\0\0":
        return replace(header, orientation=orientation_of(body[6:]))
    if marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
        return replace(header, adobe_transform=body[11])
    return header


def _png_header(data: bytes) -> ImageHeader:
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise BrokenHeader("its PNG header is cut off")
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    channels = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}.get(colour, 3)
    header, position = ImageHeader(format="png", height=height, width=width, channels=channels, bits=bits), 33
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IDAT":
            break
        if kind == b"eXIf":
            header = replace(header, orientation=orientation_of(data[position + 8 : position + 8 + length]))
        if kind == b"tRNS":
            header = replace(header, channels=4)
        position += 12 + length
    return replace(header, pixels_at=position)


def orientation_of(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory of an EXIF block or TIFF file; 1 (upright) when absent or damaged."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 10:
        return 1
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    if start + 2 > len(tiff):
        return 1
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    for entry in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
        tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
        if tag == 0x0112:
            return value if 1 <= value <= 8 else 1
    return 1
