"""What an input stands for: files, folders, globs, videos, cameras; and what stands for nothing."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from detection.inputs import IncompleteVideo, expand, frames_of, is_camera, is_video, read_some
from resbackbone.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Holds a.jpg, b.png, clip.mp4, notes.txt, an empty folder, and is where one works."""
    for number, name in enumerate(("a.jpg", "b.png")):
        cv2.imwrite(str(tmp_path / name), np.full((8, 8, 3), 100 * number, np.uint8))
    for name in ("clip.mp4", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("inputs", "stills", "found"),
    [
        (["a.jpg", "a.jpg"], False, ["a.jpg", "a.jpg"]),
        (["clip.mp4", "."], False, ["clip.mp4", "a.jpg", "b.png", "clip.mp4"]),
        (["."], True, ["a.jpg", "b.png"]),
        (["*"], False, ["a.jpg", "b.png", "clip.mp4", "notes.txt"]),
        (["*.???"], True, ["a.jpg", "b.png", "notes.txt"]),
        (["0", "b.png"], False, ["0", "b.png"]),
        ([], True, []),
    ],
)
def test_inputs_become_files(folder: Path, inputs: list[str], stills: bool, found: list[str]) -> None:
    assert expand(inputs, stills=stills) == found


@pytest.mark.parametrize(
    ("inputs", "stills", "said"),
    [
        (["*.bmp"], False, "no image or video at *.bmp; give files"),
        (["a.jpg", "b.pgn"], False, "no image or video at b.pgn (did you mean 'b.png'?); give files"),
        (["zzz.tif", "a.jpg", "*.bmp", "empty"], False, "at zzz.tif and none at *.bmp and none at empty; give files"),
        (["nowhere/a.jpg"], False, "at nowhere/a.jpg; give files"),
        (["a.jpg", "clip.mp4"], True, "no image at clip.mp4; give files"),
        (["0"], True, "no image at 0; give files"),
    ],
)
def test_every_input_that_is_nothing_is_named(folder: Path, inputs: list[str], stills: bool, said: str) -> None:
    with pytest.raises(InputError) as caught:
        expand(inputs, stills=stills)
    assert said in str(caught.value)
    assert ("camera" in str(caught.value)) is not stills


def test_a_file_named_by_a_number_is_no_camera(folder: Path) -> None:
    (folder / "a.jpg").rename("7")
    assert (is_camera("0"), is_camera("7")) == (True, False)
    assert [frame.index for frame in frames_of("7")] == [None]


def test_of_many_images_a_few_are_read(folder: Path) -> None:
    said: list[str] = []
    for number in range(20):
        cv2.imwrite(f"empty/{number:02}.png", np.full((8, 8, 3), number, np.uint8))
    assert [int(image[0, 0, 0]) for image in read_some(["empty"], log=said.append)] == [0, 2, 5, 7, 10, 12, 15, 17]
    assert said == ["looking at 8 of 20 images, evenly spread"]
    assert len(read_some(["a.jpg", "."], most=3, log=said.append)) == 3
    assert len(said) == 1


def test_every_usual_video_is_one_and_else_the_endings_are_said(folder: Path) -> None:
    for name in ("a.mpg", "b.MPEG", "c.wmv", "d.flv", "e.3gp", "f.ts", "g.mts", "h.m2ts", "i.ogv"):
        (folder / "empty" / name).write_bytes(b"\0\0\1\xba")
        assert is_video(name)
    assert len(expand(["empty"])) == 9
    assert expand(["notes.txt"]) == ["notes.txt"]
    with pytest.raises(InputError, match=r"notes\.txt: .* no image format known here .*; a video should end with \.3gp, \.avi, .*, \.wmv$"):
        list(frames_of("notes.txt"))
    (folder / "c.jpg").write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"a web page$"):
        list(frames_of("c.jpg"))
    with pytest.raises(InputError, match=r"give files, a folder with \.3gp, .*\.jpg, .*\.mpg, .*, or a camera number"):
        expand(["nothing"])


@pytest.mark.parametrize(
    ("suffix", "code"), [("mpg", "MPG1"), ("mpeg", "MPG2"), ("wmv", "WMV2"), ("flv", "FLV1"), ("3gp", "mp4v"), ("ts", "MPG2")]
)
def test_other_videos_are_read_whole(tmp_path: Path, suffix: str, code: str) -> None:
    path = tmp_path / f"clip.{suffix}"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 25, (64, 48))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no such video")
    for number in range(7):
        writer.write(np.full((48, 64, 3), 30 * number, np.uint8))
    writer.release()
    assert [frame.index for frame in frames_of(str(path))] == list(range(7))


class Capture:
    """What OpenCV makes of a video that announces some frames and has others."""

    def __init__(self, frames: int, announced: float) -> None:
        self.left, self.announced = frames, announced

    def get(self, what: int) -> float:
        return self.announced if what == cv2.CAP_PROP_FRAME_COUNT else 25.0

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.left -= 1
        return (True, np.zeros((2, 2, 3), np.uint8)) if self.left >= 0 else (False, None)

    def release(self) -> None:
        pass


@pytest.mark.parametrize(
    ("source", "frames", "announced", "is_whole"),
    [
        ("clip.mp4", 60, 60, True),
        ("clip.mp4", 61, 60, True),
        ("clip.mp4", 58, 60, True),  # a length that was rounded
        ("clip.mp4", 57, 60, False),  # a hole
        ("clip.mp4", 31, 60, False),
        ("clip.mp4", 1, 3, True),
        ("clip.mp4", 1, 4, False),
        ("clip.mp4", 990, 1000, True),  # sound that outlasts the picture
        ("clip.mp4", 989, 1000, False),
        ("clip.mp4", 5, 0, True),  # a container that doesn't say
        ("clip.mp4", 5, -1, True),
        ("clip.mp4", 5, -2e18, True),  # what FFmpeg makes of an unknown length
        ("0", 5, 60, True),  # a camera
    ],
)
def test_a_video_that_announces_more_frames_is_said_to_be_incomplete(
    folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, frames: int, announced: float, is_whole: bool
) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", lambda given: Capture(frames, announced))
    read, complaint = 0, None
    try:
        for frame in frames_of(source):
            assert frame.index == read
            read += 1
    except IncompleteVideo as error:
        complaint = str(error)
    assert read == frames
    assert (complaint is None) == is_whole
    assert complaint is None or complaint.startswith(f"clip.mp4: {frames} of {announced} frames could be read; ")
