"""What `detect` can look at: an image, a folder, a glob, a video or a camera, all as a stream of frames."""

from __future__ import annotations

import glob
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detection.data.images import UnreadableImage, read_image
from resbackbone.errors import InputError, nearest

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
# What OpenCV's FFmpeg may decode; a file of such a name that it can't is said to be no such video, rather than no image.
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts", ".mts", ".m2ts", ".ogv"}
MOST_PICTURES = 8  # to check an export on: each is run six times, in two sizes, alone and beside its mirror image
MOST_FRAMES_PER_SECOND = 1000.0  # more is what a camera says that doesn't know
# Frames that may lack of what a video announces. AVI and MP4 count them; of Matroska and WebM the number is length times rate, which is off
# by one or two where either was rounded, and by a share where sound outlasts the picture or the rate wavers.
LACKING, LACKING_SHARE = 2, 0.01


class IncompleteVideo(InputError):
    """A video whose last readable frames have been given, and which announces more of them."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One picture to detect in: uint8 (H, W, 3) RGB, what to call it, and its place in a video (None for a still)."""

    name: str
    image: np.ndarray
    index: int | None = None
    frames_per_second: float = 25.0


def is_camera(source: str) -> bool:
    """Whether a source is a camera's number; a file of such a name is a file."""
    return source.isdigit() and not Path(source).exists()


def is_video(source: str) -> bool:
    """Whether a source has frames, as videos and cameras do; all else is a still."""
    return is_camera(source) or Path(source).suffix.lower() in VIDEOS


def printable(text: str) -> str:
    """`text` with what is not UTF-8 in it as \\xe9: such bytes may name a file, but can be neither printed nor given to OpenCV."""
    return text.encode("utf-8", sys.getfilesystemencodeerrors()).decode("utf-8", "backslashreplace")


def expand(inputs: Sequence[str], *, stills: bool = False) -> list[str]:
    """Each input as files (or a camera number): folders give their images and videos, globs what they match, in order.

    stills: leave out videos and cameras. Raises InputError that names every input without a match.
    """
    matches = {given: _matches(given, stills=stills) for given in inputs}
    missing = [given + _near(given) for given, found in matches.items() if not found]
    if missing:
        wanted, more = ("image", "") if stills else ("image or video", ", or a camera number")
        kinds = ", ".join(sorted(IMAGES if stills else IMAGES | VIDEOS))
        raise InputError(f"no {wanted} at {' and none at '.join(missing)}; give files, a folder with {kinds}{more}")
    return [source for given in inputs for source in matches[given]]


def _matches(given: str, *, stills: bool) -> list[str]:
    path = Path(given)
    if path.is_dir():
        found = [str(entry) for entry in sorted(path.iterdir()) if entry.suffix.lower() in IMAGES | VIDEOS]
    elif path.is_file() or is_camera(given):
        found = [given]
    else:
        found = [match for match in sorted(glob.glob(given, recursive=True)) if Path(match).is_file()]
    return [source for source in found if not (stills and is_video(source))]


def _near(given: str) -> str:
    """The file beside `given` that may be meant, as a question."""
    path = Path(given)
    if path.exists() or not path.parent.is_dir():
        return ""
    hint = nearest(path.name, [entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in IMAGES | VIDEOS])
    return f" ({hint.strip()})" if hint else ""


def read_some(inputs: Sequence[str], *, most: int = MOST_PICTURES, log: Callable[[str], None] = print) -> list[np.ndarray]:
    """The images of `inputs`, uint8 (H, W, 3) RGB: of more than `most`, as many evenly spread ones, which is logged."""
    names = expand(inputs, stills=True)
    chosen = names if len(names) <= most else [names[number * len(names) // most] for number in range(most)]
    if len(chosen) < len(names):
        log(f"looking at {len(chosen)} of {len(names)} images, evenly spread")
    return [read_image(Path(name)) for name in chosen]


def frames_of(source: str) -> Generator[Frame, None, None]:
    """The frames of one file or camera; InputError names a file that cannot be read.

    IncompleteVideo comes after the frames of a video that is cut off or damaged.
    """
    if not is_video(source):
        yield Frame(name=Path(source).name, image=_still(Path(source)))
        return
    yield from _video_frames(source)


def _still(path: Path) -> np.ndarray:
    try:
        return read_image(path)
    except UnreadableImage as error:
        if path.suffix.lower() in IMAGES:
            raise
        raise InputError(f"{error}; a video should end with {', '.join(sorted(VIDEOS))}") from None


def _video_frames(source: str) -> Generator[Frame, None, None]:
    import cv2

    if printable(source) != source:  # it would end the process
        raise InputError(f"{source}: OpenCV can't open a video whose name, folders included, is not UTF-8; rename it, or link to it")
    capture = cv2.VideoCapture(int(source) if is_camera(source) else source)
    name, rate = f"camera{source}" if is_camera(source) else Path(source).name, capture.get(cv2.CAP_PROP_FPS)
    announced = 0 if is_camera(source) else int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    rate = rate if 0 < rate <= MOST_FRAMES_PER_SECOND else 25.0
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
        if is_camera(source):
            raise InputError(f"camera {source} gave no frame: there is none of this number, or another program has it")
        raise InputError(f"{source} gave no frame: not a video this OpenCV can decode")
    if announced - index > max(LACKING, LACKING_SHARE * announced):  # never of a camera, or a file that doesn't say
        raise IncompleteVideo(
            f"{source}: {index} of {announced} frames could be read; the file is cut off or damaged, or was trimmed but not rewritten: "
            "copy or download it again, or write it anew with a video editor"
        )
