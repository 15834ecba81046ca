"""From files, folders, globs and videos to drawn copies and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from detection.build import build_detector
from detection.config import load_detection_config
from detection.detect import detect_all
from detection.inputs import expand
from detection.predict import Predictor, detector_metadata, resolve_config
from resbackbone.errors import InputError
from resbackbone.runtime.checkpoint import save_weights
from tools.detect import parse

TINY = [
    "model.head=fpn",
    "model.backbone.name=resnet18",
    "model.backbone.weights=null",
    "model.backbone.norm=group",
    "model.roi.head_width=16",
    "model.test.score_threshold=0.0",
    "model.test.detections=5",
    "data.min_size=64",
    "data.max_size=96",
    "train.precision=fp32",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained detector of two classes, as a run would leave it."""
    config = load_detection_config(None, TINY)
    detector = build_detector(config, 2)
    path = tmp_path_factory.mktemp("weights") / "model_final.safetensors"
    save_weights(path, detector.state_dict(), detector_metadata(config, ("cat", "dog"), detector))
    return path


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


def test_same_names_do_not_overwrite_each_other(predictor: Predictor, photos: Path, tmp_path: Path) -> None:
    inputs = [str(photos / "photo0.jpg")] * 2
    drawn, _ = detect_all(predictor, inputs, tmp_path / "out")
    assert len({path.name for path in drawn}) == 2


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image or video"):
        expand([str(tmp_path / "*.jpg")])


def test_backbone_weights_are_no_detector(tmp_path: Path) -> None:
    path = tmp_path / "resnet.safetensors"
    save_weights(path, {"conv1.weight": torch.zeros(2)}, {})
    with pytest.raises(InputError, match="no detector"):
        resolve_config(None, path)


def test_precision_is_one_setting_more() -> None:
    args = parse(["--weights", "w.safetensors", "a.jpg", "--precision", "fp32", "data.min_size=[64]"])
    assert args.overrides == ["data.min_size=[64]", "train.precision=fp32"]
    assert args.inputs == ["a.jpg"]
