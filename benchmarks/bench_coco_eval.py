"""COCO box evaluation: the default engine beside pycocotools on a simulated val split, by turns in one process.

    python benchmarks/bench_coco_eval.py [--images 5000] [--detections 100] [--rounds 3]

Simulated: about 7 objects of 80 classes an image, `--detections` boxes an image, part of them near objects, scores with ties. Both are
given the same two JSON files and go from there to the 12 figures, as tools/eval_coco.py does: ours with its checks of every row and the AP
of each class, pycocotools as its own example does it. Wall time, since both engines may use threads, and processor time; the ratio is
pycocotools' over ours. The 12 figures must be equal.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.evaluation.coco import NAMES, evaluate_coco

CLASSES, OBJECTS = 80, 7
SIZE = np.array([640.0, 480.0])


def simulate(images: int, detections: int, seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(ground truth, results) in COCO's formats."""
    draw = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(1, images + 1):
        count = int(draw.poisson(OBJECTS))
        extent = 8 + draw.random((count, 2)) ** 2 * (SIZE - 8)
        boxes = np.concatenate((draw.random((count, 2)) * (SIZE - extent), extent), axis=1)
        labels = draw.integers(1, CLASSES + 1, count)
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
            crowd = int(draw.random() < 0.01)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3] * 0.6,
                    "iscrowd": crowd,
                }
            )
        near = draw.integers(0, count, detections // 4) if count else np.zeros(0, dtype=int)
        found = boxes[near] * draw.normal(1, 0.08, (len(near), 4)) if count else np.zeros((0, 4))
        other = 8 + draw.random((detections - len(near), 2)) * (SIZE - 8) / 2
        found = np.concatenate((found, np.concatenate((draw.random(other.shape) * (SIZE - other), other), axis=1)))
        classes = np.concatenate((labels[near] if count else near, draw.integers(1, CLASSES + 1, len(other))))
        scores = np.round(draw.random(detections) * np.where(np.arange(detections) < len(near), 1.0, 0.6), 3)
        results += [
            {"image_id": image, "category_id": label, "bbox": box, "score": score}
            for label, box, score in zip(classes.tolist(), found.tolist(), scores.tolist(), strict=True)
        ]
    truth = {
        "images": [{"id": image, "width": 640, "height": 480, "file_name": f"{image}.jpg"} for image in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": label, "name": f"class{label}"} for label in range(1, CLASSES + 1)],
    }
    return truth, results


def write(folder: Path, images: int, detections: int) -> tuple[Path, Path]:
    """The two files."""
    paths = folder / f"truth_{images}.json", folder / f"detections_{images}.json"
    for path, content in zip(paths, simulate(images, detections), strict=True):
        path.write_text(json.dumps(content))
    return paths


def theirs(truth: Path, results: Path) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        evaluation = COCOeval(coco, coco.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def ours(truth: Path, results: Path) -> list[float]:
    figures = evaluate_coco(truth, results)
    return [figures[name] for name in NAMES]


def timed(run: Callable[[Path, Path], list[float]], *data: Path) -> tuple[float, float, list[float]]:
    wall, processor = time.perf_counter(), time.process_time()
    figures = run(*data)
    return time.perf_counter() - wall, time.process_time() - processor, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="an image")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        few, data = write(Path(folder), 10, 10), write(Path(folder), options.images, options.detections)
        theirs(*few), ours(*few)  # the first call imports
        rounds = [(timed(theirs, *data), timed(ours, *data)) for _ in range(options.rounds)]
    print(f"{options.images} images, {options.images * options.detections} detections, {options.rounds} rounds")
    for column, clock in enumerate(("wall time", "processor time")):
        ratios = sorted(peer[column] / mine[column] for peer, mine in rounds)
        seconds = [statistics.median(one[side][column] for one in rounds) for side in (0, 1)]
        print(f"{clock}: pycocotools {seconds[0]:.2f} s, ours {seconds[1]:.2f} s, ", end="")
        print(f"ratio {statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})")
    difference = max(abs(a - b) for peer, mine in rounds for a, b in zip(peer[2], mine[2], strict=True))
    print(f"the 12 figures differ by at most {difference:.1e} (AP {rounds[0][1][2][0]:.3f})")


if __name__ == "__main__":
    main()
