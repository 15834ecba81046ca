"""Annotations of a COCO file: ours as flat arrays beside pycocotools.COCO; loading, and what a forked worker's copy costs.

    python benchmarks/bench_annotations.py [--images 29500] [--rounds 3]

The file is simulated: 7.3 objects an image with polygons as long as COCO's, 80 classes; 29,500 images are a quarter of train2017. Processor
time of loading, by turns in one process; the ratio is pycocotools' over ours. Boxes only on our side (polygons are skipped unread), as for
a detector without masks; what is equal is the boxes and labels of every image, which are compared. Then each is inherited by a forked
process that reads the boxes of every image once: printed is how much private memory that process has more than one that reads nothing.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from detection.data import load_source

CLASSES, OBJECTS, CORNERS = 80, 7.3, 20


def write_file(folder: Path, images: int) -> Path:
    """annotations/instances_train.json below `folder`; images are empty files, since ours looks whether they are there."""
    draw = np.random.default_rng(0)
    counts = draw.poisson(OBJECTS, images)
    annotations = []
    for image, count in enumerate(counts.tolist(), 1):
        extent = 8 + draw.random((count, 2)) ** 2 * np.array([500.0, 400.0])
        boxes = np.round(np.concatenate((draw.random((count, 2)) * 70, extent), axis=1), 2).tolist()
        labels = draw.integers(1, CLASSES + 1, count).tolist()
        polygons = np.round(draw.random((count, 2 * CORNERS)) * 400, 2).tolist()
        for box, label, polygon in zip(boxes, labels, polygons, strict=True):
            one = {"id": len(annotations) + 1, "image_id": image, "category_id": label, "bbox": box, "segmentation": [polygon]}
            annotations.append({**one, "area": round(box[2] * box[3], 2), "iscrowd": 0})
    content = {
        "images": [{"id": k, "file_name": f"{k:012d}.jpg", "height": 480, "width": 640} for k in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": k, "name": f"class{k}"} for k in range(1, CLASSES + 1)],
    }
    path = folder / "annotations" / "instances_train.json"
    path.parent.mkdir()
    (folder / "train").mkdir()
    for one in content["images"]:
        (folder / "train" / one["file_name"]).touch()
    path.write_text(json.dumps(content))
    return path


def timed(load: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    start = time.process_time()
    loaded = load()
    return time.process_time() - start, loaded


def their_load(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def private_mb(walk: Callable[[], object]) -> float:
    """MB of private memory of a forked process after `walk`."""
    read, write = os.pipe()
    if os.fork() == 0:
        walk()
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        kilobytes = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
        os.write(write, str(kilobytes).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        kilobytes = int(answer.read())
    os.wait()
    return kilobytes / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=29500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_file(Path(folder), options.images)
        size_mb = path.stat().st_size / 2**20
        times = []
        for _ in range(options.rounds):
            their_s, coco = timed(lambda: their_load(path))
            our_s, source = timed(lambda: load_source("coco", folder, "train"))
            times.append((their_s, our_s))
    annotations, numbers = source.annotations, range(1, options.images + 1)
    theirs = [[one["bbox"] for one in coco.imgToAnns[number]] for number in numbers]
    wanted = np.array([box for boxes in theirs for box in boxes], dtype=np.float64)
    wanted[:, 2:] += wanted[:, :2]
    same = np.allclose(annotations.boxes, wanted.clip(max=[640, 480, 640, 480]), atol=0.01)
    labels = [one["category_id"] for number in numbers for one in coco.imgToAnns[number]]
    same_labels = annotations.labels.tolist() == labels
    del theirs, wanted, labels
    gc.collect()
    nothing = private_mb(lambda: None)
    lists = private_mb(lambda: [one["bbox"][0] + one["category_id"] for k in numbers for one in coco.imgToAnns[k]]) - nothing
    arrays = private_mb(lambda: [annotations.boxes[annotations.of_image(k)].sum() for k in range(len(annotations))]) - nothing
    ratios = sorted(theirs_s / ours_s for theirs_s, ours_s in times)
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    print(f"{options.images} images, {len(annotations.labels)} objects, {size_mb:.0f} MB of JSON, {options.rounds} rounds")
    print(f"loading: pycocotools {medians[0]:.2f} s, ours {medians[1]:.2f} s of processor time, ", end="")
    print(f"ratio {statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}); boxes equal: {same}, labels equal: {same_labels}")
    print(f"private memory of a forked worker after one walk: pycocotools {lists:.1f} MB, ours {arrays:.1f} MB")


if __name__ == "__main__":
    main()
