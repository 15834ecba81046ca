"""docs/architecture.md says a backbone and a data format are one new file and one config line each: this does what it says.

The files are taken from the page as they stand there, written to an empty folder, and trained with from the command line.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

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


def test_a_backbone_is_one_new_file_and_one_config_line(workspace: Path) -> None:
    (workspace / "my_formats" / "csv_boxes.py").unlink()
    shapes = {"data": {"kind": "shapes", "train": "train", "val": "val", "min_size": 32, "max_size": 32}}
    done = train(workspace, merged(config_of("backbone"), shapes))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (workspace / "out" / "model_final.safetensors").is_file()
    assert "my_networks.tiny:tiny" in (workspace / "out" / "config.yaml").read_text()


def test_a_data_format_is_one_new_file_and_one_config_line(workspace: Path) -> None:
    write_csv_data(workspace / "my_data")
    done = train(workspace, config_of("backbone", "data"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 images" in done.stdout + done.stderr
    assert list((workspace / "out" / "samples").iterdir())


def test_without_their_files_neither_name_is_known(workspace: Path) -> None:
    write_csv_data(workspace / "my_data")
    for folder, name in (("my_networks", "my_networks.tiny"), ("my_formats", "my_formats.csv_boxes")):
        (workspace / folder).rename(workspace / "elsewhere")
        done = train(workspace, config_of("backbone", "data"))
        assert done.returncode == 1, done.stdout + done.stderr
        assert folder in done.stderr
        assert name in done.stderr
        assert "Traceback" not in done.stderr
        (workspace / "elsewhere").rename(workspace / folder)


def test_the_new_backbone_serves_a_c4_head_and_refuses_dilation(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from detection.build import build_detector
    from detection.config import DetectionConfig
    from resbackbone.errors import InputError
    from resbackbone.registry import BACKBONES
    from resbackbone.runtime.config import parse_config

    monkeypatch.syspath_prepend(str(workspace))
    configs = {
        head: parse_config(DetectionConfig, merged(config_of("backbone"), {"model": {"head": head}}), "docs/architecture.md")
        for head in ("c4", "dc5")
    }
    try:
        assert build_detector(configs["c4"], 2).rpn.conv.in_channels == 32
        with pytest.raises(InputError, match="output_stride"):
            build_detector(configs["dc5"], 2)
    finally:
        BACKBONES.pop("tiny", None)
        for name in [name for name in sys.modules if name.startswith("my_networks")]:
            del sys.modules[name]
