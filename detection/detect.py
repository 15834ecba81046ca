"""Detect in files and videos: a drawn copy and a JSON for each. Reading, the network and drawing work at the same time."""

from __future__ import annotations

import contextlib
import itertools
import json
import textwrap
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from detection.draw import draw_detections, save_image
from detection.inputs import Frame, IncompleteVideo, expand, frames_of, is_camera, is_video, printable
from detection.pipeline import overlapped
from detection.predict import Predictor
from detection.structures import Detections
from resbackbone.errors import InputError
from resbackbone.runtime.atomic import storage_errors

# What travels between the stages: the number of the source, and a frame of it or why there is none.
Result = tuple[Frame, Detections] | InputError
Read = tuple[int, Frame | InputError]
Seen = tuple[int, Result]


def detect_all(
    predictor: Predictor,
    inputs: list[str],
    output: Path,
    *,
    threshold: float = 0.5,
    batch_size: int = 1,
    log: Callable[[str], None] = print,
) -> tuple[list[Path], list[str]]:
    """Write a drawn file and a JSON of every input into `output`; returns the drawn files and the complaints about unreadable ones.

    A video of which only a part could be read is among both. batch_size: how many stills pass through the network together, at most. Raises
    InputError, before anything is written, for inputs that are not there or would be overwritten; and where `output` can't be written.
    """
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size} is too small; give 1 or more")
    sources = expand(inputs)
    targets = [output / stem for stem in _distinct_stems(sources)]
    with storage_errors(output):
        _check_apart(sources, targets)
        output.mkdir(parents=True, exist_ok=True)
    drawn: list[Path] = []
    complaints: list[str] = []
    given_up: set[int] = set()  # sources of which no more is wanted: without it a camera would go on for ever
    frames = overlapped(_read(sources, given_up), ahead=batch_size + 1)
    seen = overlapped(_look(predictor, frames, given_up, batch_size))
    with contextlib.closing(seen):
        for number, of_source in itertools.groupby(seen, key=lambda item: item[0]):
            source = sources[number]
            with storage_errors(output):  # a full disk ends all; what can't be read, only itself
                written = _write(source, targets[number], (result for _, result in of_source), predictor.classes, threshold)
            if isinstance(written, InputError):
                given_up.add(number)
                complaints.append(printable(str(written)))
                log(f"skipped: {complaints[-1]}")
                continue
            path, count, lack = written
            drawn.append(path)
            log(printable(f"{source}: {count} detections of at least {threshold:g} → {path}"))
            if lack is not None:
                complaints.append(printable(f"{lack}; what could be read is in {path}"))
                log(printable(f"incomplete: {lack}"))
    return drawn, complaints


def _read(sources: Sequence[str], given_up: set[int]) -> Generator[Read, None, None]:
    """The first stage: the frames of all sources, one after the other."""
    for number, source in enumerate(sources):
        try:
            with contextlib.closing(frames_of(source)) as frames:
                for frame in frames:
                    yield number, frame
                    if number in given_up:
                        break
        except InputError as error:
            yield number, error


def _look(predictor: Predictor, frames: Generator[Read, None, None], given_up: set[int], batch_size: int) -> Generator[Seen, None, None]:
    """The second stage: what the detector finds in each frame."""
    with contextlib.closing(frames):
        for batch in _batches(frames, batch_size):
            for number, result in _found(predictor, [read for read in batch if read[0] not in given_up]):
                if isinstance(result, InputError):
                    given_up.add(number)
                yield number, result


def _batches(frames: Iterable[Read], batch_size: int) -> Generator[list[Read], None, None]:
    """What is read, in order: up to `batch_size` stills together, a video's frame by itself."""
    batch: list[Read] = []
    for number, frame in frames:
        is_of_video = isinstance(frame, Frame) and frame.index is not None
        if is_of_video and batch:
            yield batch
            batch = []
        batch.append((number, frame))
        if is_of_video or len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _found(predictor: Predictor, batch: Sequence[Read]) -> list[Seen]:
    """What the detector finds in a batch; where it refuses that, in one frame after the other, since it may mean only one."""
    images = [frame.image for _, frame in batch if isinstance(frame, Frame)]
    try:
        found = iter(predictor.detect(images) if images else [])
    except InputError as error:
        return [(batch[0][0], error)] if len(batch) == 1 else [seen for one in batch for seen in _found(predictor, [one])]
    return [(number, (frame, next(found)) if isinstance(frame, Frame) else frame) for number, frame in batch]


def _write(
    source: str, target: Path, results: Iterable[Result], classes: tuple[str, ...], threshold: float
) -> tuple[Path, int, IncompleteVideo | None] | InputError:
    """The last stage, of one source: draw, encode, write. Returns the drawn file, how many boxes it shows and what lacks of a video at the
    end of what could be read; or why nothing can be.
    """
    path, json_path = _files(source, target)
    count, records, writer, lack = 0, None, None, None
    try:
        with contextlib.ExitStack() as stack:
            for result in results:
                if isinstance(result, IncompleteVideo):  # all of it has come: what is written stays
                    lack = result
                    continue
                if isinstance(result, InputError):
                    raise result
                frame, found = result
                picture = draw_detections(frame.image, found, classes, threshold=threshold)
                record = _as_json(frame, found, classes)
                count += int((found.scores >= threshold).sum())  # as drawing compares; the record's scores are rounded
                if frame.index is None:
                    json_path.write_text(json.dumps({"source": source, **record}, indent=1) + "\n")
                    save_image(path, picture)
                    continue
                if records is None or writer is None:
                    records = stack.enter_context(_frames_json(json_path, source))
                    writer = stack.enter_context(_video(path, _even(picture), frame.frames_per_second))
                records(record)
                writer.write(np.ascontiguousarray(_even(picture)[..., ::-1]))
    except InputError as error:
        return error
    return path, count, lack


def _files(source: str, target: Path) -> tuple[Path, Path]:
    """The drawn file and the JSON of a source."""
    return target.with_name(target.name + (".mp4" if is_video(source) else ".jpg")), target.with_name(target.name + ".json")


@contextlib.contextmanager
def _frames_json(path: Path, source: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that adds a frame's record to a video's JSON. A camera's takes no memory, and is whole whatever ends it.

    An InputError removes it: the source can't be read.
    """
    with path.open("w") as file:
        file.write(f'{{\n "source": {json.dumps(source)},\n "frames": [')
        separator = "\n"

        def add(record: dict[str, Any]) -> None:
            nonlocal separator
            file.write(separator + textwrap.indent(json.dumps(record, indent=1), "  "))
            separator = ",\n"

        try:
            yield add
        except InputError:
            path.unlink()
            raise
        finally:
            file.write("\n ]\n}\n")


def _even(picture: np.ndarray) -> np.ndarray:
    """`picture` (H, W, 3) with a last row or column twice where it is one of an odd number: a video's encoder would leave it out."""
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") if height % 2 or width % 2 else picture


@contextlib.contextmanager
def _video(path: Path, picture: np.ndarray, frames_per_second: float) -> Iterator[cv2.VideoWriter]:
    """A video of pictures like this one. Raises InputError where OpenCV can't begin it."""
    height, width = picture.shape[:2]
    if printable(str(path)) != str(path):  # it would end the process
        raise InputError(f"{path}: OpenCV can't write a video whose name, folders included, is not UTF-8; choose another --output")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), frames_per_second, (width, height))
    try:
        if not writer.isOpened():
            raise InputError(
                f"{path} can't be written as a video of {width}×{height} pixels, {frames_per_second:g} frames a second; choose another "
                "--output, or convert the input to a usual size and rate"
            )
        yield writer
    finally:
        writer.release()


def _as_json(frame: Frame, found: Detections, classes: tuple[str, ...]) -> dict[str, Any]:
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    detections = [
        {"label": classes[label - 1], "score": round(score, 4), "box_xyxy": [round(side, 1) for side in box]} for box, score, label in rows
    ]
    place = {} if frame.index is None else {"frame": frame.index}
    return place | {"width": frame.image.shape[1], "height": frame.image.shape[0], "detections": detections}


def _distinct_stems(sources: Sequence[str]) -> list[str]:
    """File stems; where two inputs share one, later ones get the next free number, so that nothing is overwritten."""
    stems: dict[str, None] = {}
    last: dict[str, int] = defaultdict(lambda: 1)  # number given to a stem
    for source in sources:
        stem = name = f"camera{source}" if is_camera(source) else Path(source).stem
        while name in stems:
            last[stem] += 1
            name = f"{stem}_{last[stem]}"
        stems[name] = None
    return list(stems)


def _check_apart(sources: Sequence[str], targets: Sequence[Path]) -> None:
    """Raise InputError where a file to write is an input, by whatever name, link or folder."""
    originals = {_identity(Path(source)): source for source in sources if not is_camera(source)}
    for source, target in zip(sources, targets, strict=True):
        for path in _files(source, target):
            if path.exists() and _identity(path) in originals:
                original = originals[_identity(path)]
                raise InputError(f"{path} is the input {original}, and what is found in {source} would replace it; choose another --output")


def _identity(path: Path) -> tuple[int, int]:
    """What all names of one file share, links included."""
    status = path.stat()
    return status.st_dev, status.st_ino
