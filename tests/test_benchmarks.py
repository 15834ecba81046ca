"""Every benchmark runs and finds what it compares equal; what it measures is docs/results.md's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# The smallest run of each, and what it must print.
RUNS = {
    "bench_import.py --rounds 1": r"ratio [\d.]+",
    "bench_matching.py --rounds 1 --boxes 8 --grid c4": r"ratio .* 0 matches differ",
    "bench_c4_inference.py --backbone resnet18 --size 64 96 --proposals 10 --rounds 1": r"differ by [\d.]+e-0[2-9], relative",
    "bench_train_step.py --case r18 --rounds 1 --threads 1 --deterministic": r"ours bf16, deterministic against ours bf16: [\d.]+",
    "bench_coco_eval.py --images 20 --detections 20 --rounds 1": r"differ by at most 0\.0e\+00",
    "bench_annotations.py --images 50 --rounds 1": r"boxes equal: True, labels equal: True",
    "bench_cls_input.py --count 3 --rounds 1": r"shards of short side 256 +[\d.]+x",
    "bench_det_input.py --count 2 --rounds 1 --min-size 200": r"mean difference of the normalised pixels 0\.0[0-4]",
    "bench_detect_video.py --size 64 96 --frames 3 --min-size 64 --proposals 10 --rounds 1": r"equal: JSON True, drawn video True",
    "bench_int8.py --backbone resnet18 --size 64 96 --calibration 2 --engines onednn --rounds 1": r"int8 onednn .* bf16 / int8 [\d.]+",
    "bench_memory.py --size 96 128 --batch 1 --backbone resnet18": r"ours bf16 .* of ours fp32",
    "scaling_anchors.py --networks resnet18 --side 32 --batch 2 --rounds 1 --count 4": r"measured / model",
    "bench_gpu.py --device cpu --case r50_fpn r101_c4 --size 64 96 --batch 1 --rounds 1 --steps 1": r"r101_c4[^:]*[\s\S]*ours against",
    "bench_gpu.py --device cpu --case cls --size 64 64 --batch 2 --rounds 1 --steps 1": r"ours against timm bf16: [\d.]+",
    "bench_roi_align.py --case fpn_test --precision fp32 --rounds 1": r"output \d\.\de-0[5-9] abs",
}


def run_script(repository: Path, script: str, *options: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(repository / "benchmarks" / script), *options]
    run = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS)
def test_a_benchmark_runs(repository: Path, command: str) -> None:
    printed = run_script(repository, *command.split())
    assert re.search(RUNS[command], printed), printed


@pytest.mark.slow
def test_the_scaling_plot(repository: Path, tmp_path: Path) -> None:
    script = str(repository / "benchmarks" / "scaling.py")
    command = [sys.executable, script, "--only", "data", "--rounds", "1", "--steps", "50", "200", "--output", str(tmp_path / "a.png")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"time: (no growth|growing part).*; memory: ", run.stdout), run.stdout
    assert (tmp_path / "a.png").stat().st_size > 5000


@pytest.fixture
def few_voc_images(voc_root: Path, tmp_path: Path) -> Path:
    """A devkit of eight training and four test images."""
    whole, few = voc_root / "VOCdevkit/VOC2012", tmp_path / "few/VOCdevkit/VOC2012"
    (few / "ImageSets/Main").mkdir(parents=True)
    for part in ("Annotations", "JPEGImages"):
        (few / part).symlink_to(whole / part)
    for split, count in (("trainval", 8), ("test", 4)):
        names = (whole / f"ImageSets/Main/{split}.txt").read_text().split()[:count]
        (few / f"ImageSets/Main/{split}.txt").write_text("\n".join(names))
    return tmp_path / "few"


@pytest.mark.slow
def test_training_without_the_savings_and_int8(repository: Path, unpacked_data: Path, few_voc_images: Path, tmp_path: Path) -> None:
    """With the savings undone the losses of the first step are the same; a detector's backbone is quantised and judged."""
    weights = unpacked_data / "weights/resnet18_imagenet1k_fp16.safetensors"
    options = ["--config", "configs/compare_fpn_voc.yaml", f"data.root={few_voc_images}", f"model.backbone.weights={weights}"]
    options += ["data.min_size=64", "data.max_size=86", "train.steps=2", "train.precision=fp32", "train.channels_last=false"]
    losses = {}
    for name, more in (("with", []), ("without", ["--plain"])):
        printed = run_script(repository, "savings_voc.py", "--output", str(tmp_path / name), *more, *options)
        assert 0 <= json.loads(printed.splitlines()[-1])["mAP"] <= 1
        losses[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert losses["without"] == pytest.approx(losses["with"], rel=1e-4)
    detector = str(tmp_path / "with/model_final.safetensors")
    assert re.search(r"int8 onednn +mAP [\d.]+", run_script(repository, "int8_voc.py", detector, "--calibration", "4"))
