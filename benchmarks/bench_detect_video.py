"""Detecting in a video: reading, network and drawing at the same time beside one after the other, by turns in one process.

    python benchmarks/bench_detect_video.py [--video FILE] [--size 720 1280] [--frames 40] [--backbone resnet18] [--min-size 320]
        [--proposals 300] [--device auto] [--threads 1] [--rounds 3]

The peer is `detect_all` without its threads: a frame is decoded, seen by the network, drawn and encoded before the next is read. The
detector (FPN) has random weights and draws ten boxes a frame; the video is made here unless one is named. Wall-clock time from the file
to the written files; the ratio is the peer's over ours. It can be the sum of the three stages over the longest of them at most, which is
printed as well; on the CPU that takes a core for each. Equal: every byte of the JSON and of the drawn video, which is checked.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import cv2
import numpy as np
import torch

from detection import detect
from detection.build import build_detector
from detection.config import load_detection_config
from detection.draw import draw_detections
from detection.inputs import frames_of
from detection.pipeline import overlapped
from detection.predict import Predictor, detector_metadata
from resbackbone.runtime.checkpoint import save_weights


def write_video(path: Path, size: tuple[int, int], frames: int) -> None:
    """Colours that drift, a fine pattern over them: neither flat nor noise, as a codec likes neither."""
    draw = np.random.default_rng(0)
    height, width = size
    coarse = cv2.resize(draw.integers(0, 256, (9, 16, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    fine = cv2.resize(draw.integers(0, 40, (height // 4, width // 4, 3), dtype=np.uint8), (width, height))
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25, (width, height))
    for number in range(frames):
        writer.write(cv2.add(np.roll(coarse, 8 * number, axis=1), fine))
    writer.release()


def build_predictor(folder: Path, options: argparse.Namespace) -> Predictor:
    overrides = [
        "model.head=fpn",
        f"model.backbone.name={options.backbone}",
        f"data.min_size={options.min_size}",
        f"model.roi.proposals_test={options.proposals}",
        "model.test.score_threshold=0",
        "model.test.detections=10",
        f"train.device={options.device}",
    ]
    config = load_detection_config(None, overrides)
    detector = build_detector(config, 20, initial_weights=False)
    path = folder / "model_final.safetensors"
    save_weights(path, detector.state_dict(), detector_metadata(config, [f"class{number}" for number in range(20)], detector))
    return Predictor(config, path)


def in_turn(items: Generator, *, ahead: int = 2) -> Generator:
    """What the peer has in the place of `overlapped`."""
    yield from items


def run(predictor: Predictor, video: Path, output: Path, *, peer: bool) -> float:
    """Seconds to detect in the video and write what is drawn."""
    detect.overlapped = in_turn if peer else overlapped
    start = time.perf_counter()
    detect.detect_all(predictor, [str(video)], output, threshold=0.0, log=lambda text: None)
    return time.perf_counter() - start


def stage_seconds(predictor: Predictor, video: Path, folder: Path) -> tuple[float, float, float]:
    """Reading, network, drawing and encoding, each for all frames, nothing beside it."""
    clock = [time.perf_counter()]
    frames = list(frames_of(str(video)))
    clock.append(time.perf_counter())
    found = [predictor(frame.image) for frame in frames]
    clock.append(time.perf_counter())
    writer = cv2.VideoWriter()
    for frame, one in zip(frames, found, strict=True):
        picture = draw_detections(frame.image, one, predictor.classes, threshold=0.0)
        if not writer.isOpened():
            writer.open(str(folder / "drawn.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 25, picture.shape[1::-1])
        writer.write(np.ascontiguousarray(picture[..., ::-1]))
    writer.release()
    clock.append(time.perf_counter())
    reading, network, drawing = np.diff(clock)
    return reading, network, drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path)
    parser.add_argument("--size", type=int, nargs=2, default=(720, 1280), metavar=("HEIGHT", "WIDTH"), help="of the video made here")
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--min-size", type=int, default=320)
    parser.add_argument("--proposals", type=int, default=300)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="of torch; OpenCV's codecs choose their own")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        video = options.video or folder / "clip.mp4"
        if options.video is None:
            write_video(video, options.size, options.frames)
        predictor = build_predictor(folder, options)
        run(predictor, video, folder / "ours", peer=False)  # the first call pays for code generation
        times = []
        for _ in range(options.rounds):
            times.append((run(predictor, video, folder / "peer", peer=True), run(predictor, video, folder / "ours", peer=False)))
        stages = stage_seconds(predictor, video, folder)
        names = f"{video.stem}.json", f"{video.stem}.mp4"
        equal = [(folder / "peer" / name).read_bytes() == (folder / "ours" / name).read_bytes() for name in names]
    ratios = sorted(theirs / ours for theirs, ours in times)
    theirs, ours = (statistics.median(column) for column in zip(*times, strict=True))
    where = f"{predictor.device}, {options.threads} thread(s), {options.rounds} rounds"
    print(f"{options.backbone} FPN at {options.min_size}, {options.proposals} proposals, {where}")
    print(f"one after the other {theirs:.2f} s, at the same time {ours:.2f} s")
    print(f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), at most {sum(stages) / max(stages):.2f}: ", end="")
    print("reading {:.2f} s, network {:.2f} s, drawing and encoding {:.2f} s".format(*stages))
    print(f"equal: JSON {equal[0]}, drawn video {equal[1]}")


if __name__ == "__main__":
    main()
