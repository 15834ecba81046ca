"""Detect in files and videos: a drawn copy and a JSON for each. Reading, the network and drawing work at the same time."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from detection.draw import draw_detections, save_image
from detection.inputs import Frame, expand, frames_of
from detection.pipeline import overlapped
from detection.predict import Predictor
from detection.structures import Detections
from resbackbone.errors import InputError

# What travels between the stages: the number of the source, and a frame of it or why there is none.
Read = tuple[int, Frame | InputError]
Seen = tuple[int, tuple[Frame, Detections] | InputError]


def detect_all(
    predictor: Predictor, inputs: list[str], output: Path, *, threshold: float = 0.5, log: Callable[[str], None] = print
) -> tuple[list[Path], list[str]]:
    """Write a drawn file and a JSON of every input into `output`; returns the drawn files and the complaints about unreadable ones."""
    output.mkdir(parents=True, exist_ok=True)
    drawn: list[Path] = []
    complaints: list[str] = []
    sources = expand(inputs)
    targets = [output / stem for stem in _distinct_stems(sources)]
    given_up: set[int] = set()  # sources of which no more is wanted: without it a camera would go on for ever
    seen = overlapped(_look(predictor, overlapped(_read(sources, given_up)), given_up))
    with contextlib.closing(seen):
        for number, of_source in itertools.groupby(seen, key=lambda item: item[0]):
            source = sources[number]
            try:
                path, count = _write(source, targets[number], (result for _, result in of_source), predictor.classes, threshold)
            except InputError as error:
                given_up.add(number)
                complaints.append(str(error))
                log(f"skipped: {error}")
                continue
            drawn.append(path)
            log(f"{source}: {count} detections of at least {threshold:g} → {path}")
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


def _look(predictor: Predictor, frames: Generator[Read, None, None], given_up: set[int]) -> Generator[Seen, None, None]:
    """The second stage: what the detector finds in each frame."""
    with contextlib.closing(frames):
        for number, frame in frames:
            if number in given_up:
                continue
            try:
                yield number, frame if isinstance(frame, InputError) else (frame, predictor(frame.image))
            except InputError as error:
                given_up.add(number)
                yield number, error


def _write(
    source: str,
    target: Path,
    results: Iterable[tuple[Frame, Detections] | InputError],
    classes: tuple[str, ...],
    threshold: float,
) -> tuple[Path, int]:
    """The last stage, of one source: draw, encode, write. Returns the drawn file and how many boxes it shows; raises its InputError."""
    records: list[dict[str, Any]] = []
    writer: cv2.VideoWriter | None = None
    path = target.with_name(target.name + ".jpg")
    try:
        for result in results:
            if isinstance(result, InputError):
                raise result
            frame, found = result
            records.append(_as_json(frame, found, classes))
            picture = draw_detections(frame.image, found, classes, threshold=threshold)
            if frame.index is None:
                save_image(path, picture)
                continue
            if writer is None:
                path = target.with_name(target.name + ".mp4")
                size = (picture.shape[1], picture.shape[0])
                writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), frame.frames_per_second, size)
            writer.write(np.ascontiguousarray(picture[..., ::-1]))
    finally:
        if writer is not None:
            writer.release()
    is_video = writer is not None
    content = {"source": source, "frames": records} if is_video else {"source": source, **records[0]}
    target.with_name(target.name + ".json").write_text(json.dumps(content, indent=1) + "\n")
    return path, sum(score >= threshold for record in records for score in (d["score"] for d in record["detections"]))


def _as_json(frame: Frame, found: Detections, classes: tuple[str, ...]) -> dict[str, Any]:
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    detections = [
        {"label": classes[label - 1], "score": round(score, 4), "box_xyxy": [round(side, 1) for side in box]} for box, score, label in rows
    ]
    place = {} if frame.index is None else {"frame": frame.index}
    return place | {"width": frame.image.shape[1], "height": frame.image.shape[0], "detections": detections}


def _distinct_stems(sources: list[str]) -> list[str]:
    """File stems; where two inputs share one, later ones get a number, so that nothing is overwritten."""
    seen: dict[str, int] = {}
    stems = []
    for source in sources:
        stem = f"camera{source}" if source.isdigit() else Path(source).stem
        seen[stem] = seen.get(stem, 0) + 1
        stems.append(stem if seen[stem] == 1 else f"{stem}_{seen[stem]}")
    return stems
