"""What `detect` can look at: an image, a folder, a glob, a video or a camera, all as a stream of frames."""

from __future__ import annotations

import glob
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detection.data.images import read_image
from resbackbone.errors import InputError

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"}


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One picture to detect in: uint8 (H, W, 3) RGB, what to call it, and its place in a video (None for a still)."""

    name: str
    image: np.ndarray
    index: int | None = None
    frames_per_second: float = 25.0


def expand(inputs: list[str]) -> list[str]:
    """Each input as files (or a camera number): folders give their images and videos, globs what they match, in order."""
    found: list[str] = []
    for given in inputs:
        path = Path(given)
        if given.isdigit() and not path.exists():
            found.append(given)
        elif path.is_dir():
            found += [str(entry) for entry in sorted(path.iterdir()) if entry.suffix.lower() in IMAGES | VIDEOS]
        elif path.is_file():
            found.append(given)
        else:
            found += sorted(glob.glob(given, recursive=True))
    if not found:
        raise InputError(
            f"no image or video at {' '.join(inputs)}; give files, a folder with {', '.join(sorted(IMAGES))}, or a camera number"
        )
    return found


def frames_of(source: str) -> Generator[Frame, None, None]:
    """The frames of one file or camera; InputError names a file that cannot be read."""
    if not source.isdigit() and Path(source).suffix.lower() not in VIDEOS:
        yield Frame(name=Path(source).name, image=read_image(Path(source)))
        return
    yield from _video_frames(source)


def _video_frames(source: str) -> Generator[Frame, None, None]:
    import cv2

    capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
    name, rate = f"camera{source}" if source.isdigit() else Path(source).name, capture.get(cv2.CAP_PROP_FPS) or 25.0
    index = 0
    try:
        while True:
            is_read, frame = capture.read()
            if not is_read:
                break
            yield Frame(name=name, image=cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), index=index, frames_per_second=rate)
            index += 1
    finally:
        capture.release()
    if index == 0:
        raise InputError(f"{source} gave no frame: not a video this OpenCV can decode, or no such camera")
