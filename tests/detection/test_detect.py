"""From files, folders, globs and videos to drawn copies and JSON."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tiny_weights import save_tiny

from detection.detect import detect_all
from detection.draw import draw_detections
from detection.inputs import Frame, frames_of
from detection.predict import Predictor, resolve_config
from detection.structures import Detections
from resbackbone.errors import InputError
from resbackbone.runtime.checkpoint import save_weights
from tools.detect import parse


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained detector of two classes, as a run would leave it."""
    return save_tiny(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def predictor(weights: Path) -> Predictor:
    return Predictor(resolve_config(None, weights), weights)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate([(60, 90), (120, 80)]):
        cv2.imwrite(str(folder / f"photo{number}.jpg"), np.full((*size, 3), 90 * number, np.uint8))
    return folder


def test_a_folder_gives_a_drawing_and_a_json_each(predictor: Predictor, photos: Path, tmp_path: Path) -> None:
    drawn, complaints = detect_all(predictor, [str(photos)], tmp_path / "out", threshold=0.0)
    assert [path.name for path in drawn] == ["photo0.jpg", "photo1.jpg"]
    assert complaints == []
    content = json.loads((tmp_path / "out/photo1.json").read_text())
    assert (content["width"], content["height"]) == (80, 120)
    for found in content["detections"]:
        left, top, right, bottom = found["box_xyxy"]
        assert 0 <= left < right <= 80
        assert 0 <= top < bottom <= 120
        assert found["label"] in ("cat", "dog")


def test_a_video_gives_a_video_and_every_frame(predictor: Predictor, tmp_path: Path) -> None:
    source = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
    for brightness in (10, 120, 240):
        writer.write(np.full((64, 96, 3), brightness, np.uint8))
    writer.release()
    drawn, _ = detect_all(predictor, [str(source)], tmp_path / "out")
    assert drawn == [tmp_path / "out/clip.mp4"]
    frames = json.loads((tmp_path / "out/clip.json").read_text())["frames"]
    assert [frame["frame"] for frame in frames] == [0, 1, 2]
    capture = cv2.VideoCapture(str(drawn[0]))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3


def test_one_unreadable_file_does_not_stop_the_others(predictor: Predictor, photos: Path, tmp_path: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"<html>")
    drawn, complaints = detect_all(predictor, [str(photos / "*.jpg")], tmp_path / "out", log=lambda text: None)
    assert len(drawn) == 2
    assert "broken.jpg" in complaints[0]


def write_clip(path: Path, frames: int) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
    for number in range(frames):
        writer.write(np.random.default_rng(number).integers(0, 256, (8, 12, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1))
    writer.release()
    return path


def one_after_the_other(predictor: Predictor, source: Path, output: Path) -> None:
    """What `detect_all` writes for one readable file, with nothing at the same time."""
    output.mkdir(exist_ok=True)
    records, pictures = [], []
    frames = list(frames_of(str(source)))
    for frame in frames:
        found = predictor(frame.image)
        rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
        record = {} if frame.index is None else {"frame": frame.index}
        record |= {"width": frame.image.shape[1], "height": frame.image.shape[0]}
        record["detections"] = [
            {"label": predictor.classes[label - 1], "score": round(score, 4), "box_xyxy": [round(side, 1) for side in box]}
            for label, score, box in rows
        ]
        records.append(record)
        pictures.append(draw_detections(frame.image, found, predictor.classes, threshold=0.0)[..., ::-1])
    content = {"source": str(source)} | ({"frames": records} if frames[0].index == 0 else records[0])
    (output / f"{source.stem}.json").write_text(json.dumps(content, indent=1) + "\n")
    if frames[0].index is None:
        cv2.imwrite(str(output / f"{source.stem}.jpg"), pictures[0], [cv2.IMWRITE_JPEG_QUALITY, 90])
        return
    writer = cv2.VideoWriter(str(output / f"{source.stem}.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, pictures[0].shape[1::-1])
    for picture in pictures:
        writer.write(np.ascontiguousarray(picture))
    writer.release()


def test_stages_at_once_change_no_byte_and_no_order(predictor: Predictor, photos: Path, tmp_path: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"<html>")
    (photos / "empty.mp4").write_bytes(b"")
    write_clip(photos / "clip.mp4", 7)
    write_clip(photos / "zoo.mp4", 1)
    said: list[str] = []
    drawn, complaints = detect_all(predictor, [str(photos)], tmp_path / "out", threshold=0.0, log=said.append)
    assert [path.name for path in drawn] == ["clip.mp4", "photo0.jpg", "photo1.jpg", "zoo.mp4"]
    assert ["broken.jpg" in complaints[0], "empty.mp4" in complaints[1], len(complaints)] == [True, True, 2]
    assert [line.split(":")[0].rpartition("/")[2] for line in said] == [
        "skipped",
        "clip.mp4",
        "skipped",
        "photo0.jpg",
        "photo1.jpg",
        "zoo.mp4",
    ]
    for path in drawn:
        one_after_the_other(predictor, photos / path.name, tmp_path / "wanted")
    wanted = sorted((tmp_path / "wanted").iterdir())
    assert [path.name for path in wanted] == sorted(path.name for path in (tmp_path / "out").iterdir())
    for path in wanted:
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


class Failing:
    """The predictor up to its third batch, then an error."""

    def __init__(self, predictor: Predictor, error: BaseException) -> None:
        self.predictor, self.classes, self.error, self.frames = predictor, predictor.classes, error, 0

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        self.frames += 1
        if self.frames == 3:
            raise self.error
        return self.predictor.detect(images)


def endless(source: str) -> Iterator[Frame]:
    """A camera."""
    for index in itertools.count():
        yield Frame(name=source, image=np.zeros((64, 96, 3), np.uint8), index=index)


def test_what_the_detector_refuses_ends_its_source_only(
    predictor: Predictor, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detection.detect.frames_of", lambda source: endless(source) if source == "0" else frames_of(source))
    failing: Any = Failing(predictor, InputError("too small a picture"))
    drawn, complaints = detect_all(failing, ["0", str(photos / "photo0.jpg")], tmp_path, log=lambda text: None)
    assert complaints == ["too small a picture"]
    assert [path.name for path in drawn] == ["photo0.jpg"]
    assert not (tmp_path / "camera0.json").exists()


@pytest.mark.parametrize("error", [RuntimeError("broken kernel"), MemoryError(), KeyboardInterrupt()], ids=repr)
def test_any_other_error_ends_all_and_arrives(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr("detection.detect.frames_of", endless)
    failing: Any = Failing(predictor, error)
    threads = threading.active_count()
    with pytest.raises(type(error)) as caught:
        detect_all(failing, ["0"], tmp_path)
    assert caught.value is error
    assert threading.active_count() == threads
    capture = cv2.VideoCapture(str(tmp_path / "camera0.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 2, "the drawn frames before it are in a video that opens"
    content = json.loads((tmp_path / "camera0.json").read_text())
    assert [frame["frame"] for frame in content["frames"]] == [0, 1], "and in a JSON, which is how a camera's always ends"


def test_a_drawn_video_keeps_its_last_row_and_column(predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 63×97 pixels, drawn five times as large: the encoder would make 314×484 of that."""

    def odd(source: str) -> Iterator[Frame]:
        yield from (Frame(name=source, image=np.full((63, 97, 3), 200, np.uint8), index=index) for index in range(3))

    monkeypatch.setattr("detection.detect.frames_of", odd)
    _, complaints = detect_all(predictor, ["0"], tmp_path, log=lambda text: None)
    assert not complaints
    capture = cv2.VideoCapture(str(tmp_path / "camera0.mp4"))
    is_read, frame = capture.read()
    assert is_read
    assert frame.shape == (316, 486, 3)
    assert (frame.astype(int)[-2:, -2:] > 180).all(), "repeated, not black"
    assert json.loads((tmp_path / "camera0.json").read_text())["frames"][0]["width"] == 97


@pytest.mark.parametrize("threshold", ["nan", "50", "-0.1"])
def test_a_threshold_that_no_score_has(capsys: pytest.CaptureFixture[str], threshold: str) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--weights", "w.safetensors", "a.jpg", f"--threshold={threshold}"])
    assert caught.value.code == 2
    assert "scores lie between 0 and 1" in capsys.readouterr().err


def test_a_full_disk_ends_all_and_arrives(predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detection.detect.frames_of", endless)
    drawing = Failing(predictor, OSError(28, "No space left on device"))
    monkeypatch.setattr("detection.detect.draw_detections", lambda image, found, classes, threshold: drawing.detect([image]) and image)
    threads = threading.active_count()
    with pytest.raises(InputError, match="the disk is full"):
        detect_all(predictor, ["0"], tmp_path)
    assert threading.active_count() == threads


def test_a_reader_of_the_log_that_leaves_is_no_full_disk(predictor: Predictor, photos: Path, tmp_path: Path) -> None:
    def log(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        detect_all(predictor, [str(photos)], tmp_path / "out", log=log)


def test_what_cannot_be_written_is_said(predictor: Predictor, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a file stands where a folder is needed"):
        detect_all(predictor, [str(photos)], photos / "photo0.jpg")
    write_clip(photos / "clip.mp4", 1)
    (tmp_path / "out" / "clip.mp4").mkdir(parents=True)
    drawn, complaints = detect_all(predictor, [str(photos)], tmp_path / "out")
    assert [path.name for path in drawn] == ["photo0.jpg", "photo1.jpg"]
    assert "clip.mp4 can't be written as a video of 480×320 pixels, 10 frames a second" in complaints[0]
    (tmp_path / "out" / "photo0.json").unlink()
    (tmp_path / "out" / "photo0.json").mkdir()
    with pytest.raises(InputError, match=r"out: writing failed .Is a directory"):
        detect_all(predictor, [str(photos)], tmp_path / "out")


@pytest.mark.parametrize("by", ["its folder", "a link to its folder", "a link to it"])
def test_an_input_is_never_overwritten(predictor: Predictor, photos: Path, tmp_path: Path, by: str) -> None:
    write_clip(photos / "clip.mp4", 2)
    before = {path: path.read_bytes() for path in photos.iterdir()}
    output = photos if by == "its folder" else tmp_path / "out"
    if by == "a link to its folder":
        output.symlink_to(photos)
    elif by == "a link to it":
        output.mkdir()
        (output / "clip.mp4").symlink_to(photos / "clip.mp4")
        (output / "photo1.json").symlink_to(photos / "photo0.jpg")
    for inputs in ([str(photos / "clip.mp4")], [str(photos)]):
        with pytest.raises(InputError, match=r"is the input .* choose another --output"):
            detect_all(predictor, inputs, output)
    assert {path: path.read_bytes() for path in photos.iterdir()} == before
    assert output == photos or by != "a link to it" or len(list(output.iterdir())) == 2
    detect_all(predictor, [str(photos)], tmp_path / "other")
    detect_all(predictor, [str(photos)], tmp_path / "other", log=lambda text: None)  # an earlier output is replaced


class Watched:
    """The predictor, with the size of every batch, that refuses pictures that are white."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor, self.classes, self.batches = predictor, predictor.classes, list[int]()

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        self.batches.append(len(images))
        if any(image.min() == 255 for image in images):
            raise InputError("a white picture")
        return self.predictor.detect(images)


def noise(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)


@pytest.mark.parametrize("sizes", [[(64, 96)] * 3, [(64, 96), (96, 64), (80, 80), (64, 96)]], ids=["one size", "several"])
def test_a_batch_finds_what_one_by_one_does(predictor: Predictor, sizes: list[tuple[int, int]]) -> None:
    images = [noise(*size, seed) for seed, size in enumerate(sizes)]
    for image, found in zip(images, predictor.detect(images), strict=True):
        alone = predictor(image)
        assert len(found) == len(alone) > 0
        assert torch.equal(found.labels, alone.labels)
        torch.testing.assert_close(found.scores, alone.scores, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.boxes, alone.boxes, atol=1e-4, rtol=0)


def test_stills_in_batches_are_written_as_one_by_one(predictor: Predictor, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(5):
        cv2.imwrite(str(folder / f"{number}.png"), noise(64, 96, number))
    cv2.imwrite(str(folder / "2.png"), np.full((64, 96, 3), 255, np.uint8))
    (folder / "1b.jpg").write_bytes(b"<html>")
    write_clip(folder / "3b.mp4", 2)
    written = []
    for batch_size in (1, 3):
        watched: Any = Watched(predictor)
        said: list[str] = []
        output = tmp_path / f"out{batch_size}"
        detect_all(watched, [str(folder)], output, threshold=0.0, batch_size=batch_size, log=lambda text, said=said: said.append(text))
        written.append(({path.name: path.read_bytes() for path in output.iterdir()}, [text.partition(" → ")[0] for text in said]))
        assert watched.batches == {1: [1] * 7, 3: [2, 2, 1, 1, 1, 1, 1]}[batch_size]
    assert written[0] == written[1]
    assert [text for text in written[0][1] if "skipped" in text][1] == "skipped: a white picture"
    with pytest.raises(InputError, match="--batch-size 0"):
        detect_all(predictor, [str(folder)], tmp_path, batch_size=0)


def test_same_names_do_not_overwrite_each_other(predictor: Predictor, photos: Path, tmp_path: Path) -> None:
    inputs = [str(photos / "photo0.jpg")] * 2
    drawn, _ = detect_all(predictor, inputs, tmp_path / "out")
    assert [path.name for path in drawn] == ["photo0.jpg", "photo0_2.jpg"]
    three = [photos / "a.jpg", photos / "a.png", photos / "a_2.jpg"]
    for brightness, path in enumerate(three):
        cv2.imwrite(str(path), np.full((64, 64, 3), 100 * brightness, np.uint8))
    drawn, _ = detect_all(predictor, [str(path) for path in three], tmp_path / "three")
    assert [path.name for path in drawn] == ["a.jpg", "a_2.jpg", "a_2_2.jpg"]
    assert [json.loads(path.with_suffix(".json").read_text())["source"] for path in drawn] == [str(path) for path in three]


def test_backbone_weights_are_no_detector(tmp_path: Path) -> None:
    path = tmp_path / "resnet.safetensors"
    save_weights(path, {"conv1.weight": torch.zeros(2)}, {})
    with pytest.raises(InputError, match="no detector"):
        resolve_config(None, path)


def test_precision_is_one_setting_more() -> None:
    args = parse(["--weights", "w.safetensors", "a.jpg", "--precision", "fp32", "data.min_size=[64]", "--batch-size", "4"])
    assert args.overrides == ["data.min_size=[64]", "train.precision=fp32"]
    assert args.inputs == ["a.jpg"]
    assert args.batch_size == 4
