"""docs/architecture.md says a backbone and a data format are one new file and one config line each: this does what it says.

The files are taken from the page as they stand there, written to an empty folder, and trained with from the command line.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from detection.build import build_detector
from detection.config import DetectionConfig
from detection.data import load_source
from resbackbone.errors import InputError
from resbackbone.runtime.config import parse_config

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "architecture.md").read_text()
FILE = re.compile(r"^<!-- file: (\S+) -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONFIG = re.compile(r"^<!-- config: (\w+) -->\n```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = {
    "model": {"roi": {"proposals_train": 20, "proposals_test": 10, "samples": 8, "head_width": 16}},
    "data": {"min_size": 64, "max_size": 64, "workers": 0},
    "train": {"batch_size": 2, "steps": 2, "warmup_steps": 0, "schedule": "constant", "precision": "fp32"},
    "eval": {"samples": 1},
}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder with the page's files and nothing else."""
    for name, text in FILE.findall(PAGE):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def merged(*parts: dict) -> dict:
    result: dict = {}
    for part in parts:
        for key, value in part.items():
            result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


def config_of(*names: str) -> dict:
    """The page's config lines of these names, over settings that keep a run small."""
    lines = {name: yaml.safe_load(text) for name, text in CONFIG.findall(PAGE)}
    return merged(SMALL, *(lines[name] for name in names))


def train(workspace: Path, config: dict) -> subprocess.CompletedProcess[str]:
    (workspace / "run.yaml").write_text(yaml.safe_dump(config))
    path = os.pathsep.join((str(workspace), str(REPOSITORY)))
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "train_det.py"), "--config", "run.yaml", "--output", "out"],
        cwd=workspace,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def write_csv_data(root: Path) -> None:
    """Four images with one bright box each, two for training and two for validation."""
    (root / "images").mkdir(parents=True)
    for split in ("train", "val"):
        lines = ["image,xmin,ymin,xmax,ymax,class"]
        for number in range(2):
            image = np.zeros((64, 64, 3), dtype=np.uint8)
            image[16:48, 16:48] = 255
            cv2.imwrite(str(root / "images" / f"{split}{number}.png"), image)
            lines.append(f"{split}{number}.png,16,16,48,48,{('cat', 'dog')[number]}")
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")


def test_one_new_file_and_one_config_line_each(workspace: Path) -> None:
    write_csv_data(workspace / "my_data")
    done = train(workspace, config_of("backbone", "data"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 images" in done.stdout + done.stderr
    assert "my_networks.tiny:tiny" in (workspace / "out" / "config.yaml").read_text()
    assert (workspace / "out" / "model_final.safetensors").is_file()
    assert list((workspace / "out" / "samples").iterdir())


@pytest.fixture
def importable(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The workspace on the import path of this process, and no trace of it afterwards."""
    from resbackbone.registry import BACKBONES

    monkeypatch.syspath_prepend(str(workspace))
    before = set(BACKBONES)
    yield workspace
    for name in set(BACKBONES) - before:
        del BACKBONES[name]
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def detection_config(head: str) -> DetectionConfig:
    return parse_config(DetectionConfig, merged(config_of("backbone"), {"model": {"head": head}}), "docs/architecture.md")


def test_the_backbone_serves_every_head_it_can(importable: Path) -> None:
    assert [info.stride for info in build_detector(detection_config("fpn"), 2).backbone.feature_info.values()] == [4, 8, 16, 32, 64]
    assert build_detector(detection_config("c4"), 2).rpn.conv.in_channels == 32
    with pytest.raises(InputError, match="output_stride"):  # dc5 wants dilation, which this network has not
        build_detector(detection_config("dc5"), 2)


def test_without_their_files_neither_name_is_known(importable: Path) -> None:
    for name, _ in FILE.findall(PAGE):
        (importable / name).unlink()
    with pytest.raises(InputError, match=r"my_networks\.tiny"):
        build_detector(detection_config("fpn"), 2)
    with pytest.raises(InputError, match=r"my_formats\.csv_boxes"):
        load_source("my_formats.csv_boxes", importable, "train")
