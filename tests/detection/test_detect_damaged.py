"""Videos of which only a part can be read: the part is kept, and the rest is said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from detection.detect import detect_all
from detection.structures import Detections

FRAMES = 20


class Steady:
    """A predictor that finds one cat in every picture."""

    classes = ("cat",)

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        box = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
        return [Detections(boxes=box, scores=torch.tensor([0.9]), labels=torch.tensor([1])) for _ in images]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A whole AVI of noise, between two stills."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "z.png"):
        cv2.imwrite(str(folder / name), np.full((64, 96, 3), 99, np.uint8))
    path = folder / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (96, 64))
    for number in range(FRAMES):
        writer.write(np.random.default_rng(number).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    writer.release()
    return path


def detected(clip: Path) -> tuple[list[str], list[str], list[str], list[int]]:
    """What `detect_all` draws, complains of and says, and the frames in the video's JSON, which are as many as in the drawn video."""
    said: list[str] = []
    predictor: Any = Steady()
    output = clip.parent.parent / "out"
    drawn, complaints = detect_all(predictor, [str(clip.parent)], output, batch_size=2, log=said.append)
    frames = json.loads((output / "clip.json").read_text())["frames"]
    assert cv2.VideoCapture(str(output / "clip.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == len(frames)
    assert all(len(frame["detections"]) == 1 for frame in frames)
    return [path.name for path in drawn], complaints, said, [frame["frame"] for frame in frames]


@pytest.mark.parametrize("damage", ["cut", "hole"])
def test_what_could_be_read_is_kept_and_the_rest_is_said(clip: Path, damage: str) -> None:
    content, third = clip.read_bytes(), len(clip.read_bytes()) // 3
    clip.write_bytes(content[: 2 * third] if damage == "cut" else content[:third] + bytes(third) + content[2 * third :])
    drawn, complaints, said, frames = detected(clip)
    assert drawn == ["a.jpg", "clip.mp4", "z.jpg"]
    assert 1 < len(frames) < FRAMES - 2
    assert frames == list(range(len(frames)))
    (complaint,) = complaints
    assert complaint.startswith(f"{clip}: {len(frames)} of {FRAMES} frames could be read; ")
    assert complaint.endswith(f"what could be read is in {clip.parent.parent / 'out' / 'clip.mp4'}")
    assert [line.partition(":")[0] for line in said if "clip.avi" in line] == [str(clip), "incomplete"]


def test_a_whole_one_gives_no_complaint(clip: Path) -> None:
    drawn, complaints, _, frames = detected(clip)
    assert drawn == ["a.jpg", "clip.mp4", "z.jpg"]
    assert complaints == []
    assert len(frames) == FRAMES
