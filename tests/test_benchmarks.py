"""Every benchmark runs and finds what it compares equal; what it measures is docs/results.md's."""

from __future__ import annotations

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
    "bench_train_step.py --case r18 --rounds 1 --threads 1": r"ours bf16 against torchvision bf16: [\d.]+",
    "bench_coco_eval.py --images 20 --detections 20 --rounds 1": r"differ by at most 0\.0e\+00",
    "bench_annotations.py --images 50 --rounds 1": r"boxes equal: True, labels equal: True",
    "bench_cls_input.py --count 3 --rounds 1": r"shards of short side 256 +[\d.]+x",
    "bench_det_input.py --count 2 --rounds 1 --min-size 200": r"mean difference of the normalised pixels 0\.0[0-4]",
    "bench_detect_video.py --size 64 96 --frames 3 --min-size 64 --proposals 10 --rounds 1": r"equal: JSON True, drawn video True",
    "bench_memory.py --size 96 128 --batch 1 --backbone resnet18": r"ours bf16 .* of ours fp32",
    "bench_roi_align.py --case fpn_test --precision fp32 --rounds 1": r"output \d\.\de-0[5-9] abs",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS)
def test_a_benchmark_runs(repository: Path, command: str) -> None:
    script, *options = command.split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(repository / "benchmarks" / script), *options], cwd=repository, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert re.search(RUNS[command], run.stdout), run.stdout


@pytest.mark.slow
def test_the_scaling_plot(repository: Path, tmp_path: Path) -> None:
    script = str(repository / "benchmarks" / "scaling.py")
    command = [sys.executable, script, "--only", "data", "--rounds", "1", "--steps", "50", "200", "--output", str(tmp_path / "a.png")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"time: (no growth|growing part).*; memory: ", run.stdout), run.stdout
    assert (tmp_path / "a.png").stat().st_size > 5000
