"""Detect in files and videos: a drawn copy and a JSON for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from detection.draw import draw_detections, save_image
from detection.inputs import Frame, expand, frames_of
from detection.predict import Predictor
from detection.structures import Detections
from resbackbone.errors import InputError


def detect_all(
    predictor: Predictor, inputs: list[str], output: Path, *, threshold: float = 0.5, log: Callable[[str], None] = print
) -> tuple[list[Path], list[str]]:
    """Write a drawn file and a JSON of every input into `output`; returns the drawn files and the complaints about unreadable ones."""
    output.mkdir(parents=True, exist_ok=True)
    drawn: list[Path] = []
    complaints: list[str] = []
    for source, stem in zip(sources := expand(inputs), _distinct_stems(sources), strict=True):
        try:
            path, count = _detect_one(predictor, source, output / stem, threshold)
        except InputError as error:
            complaints.append(str(error))
            log(f"skipped: {error}")
            continue
        drawn.append(path)
        log(f"{source}: {count} detections of at least {threshold:g} → {path}")
    return drawn, complaints


def _detect_one(predictor: Predictor, source: str, target: Path, threshold: float) -> tuple[Path, int]:
    records: list[dict[str, Any]] = []
    writer: cv2.VideoWriter | None = None
    path = target.with_name(target.name + ".jpg")
    try:
        for frame in frames_of(source):
            found = predictor(frame.image)
            records.append(_as_json(frame, found, predictor.classes))
            picture = draw_detections(frame.image, found, predictor.classes, threshold=threshold)
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
