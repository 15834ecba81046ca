"""The scripts of docs/swapping.md run, before and after, and print what the page says; frameworks are imported when asked for."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resbackbone.errors import InputError
from tests.frameworks import mmcv_operations

DIFF = re.compile(r"<!-- tested: diff -->\n```diff\n(?P<lines>.*?)^```\n\nprints `(?P<printed>[^`]+)`", re.MULTILINE | re.DOTALL)
PAGE = (Path(__file__).resolve().parents[3] / "docs" / "swapping.md").read_text()
CASES = [(match["lines"], side, match["printed"]) for match in DIFF.finditer(PAGE) for side in "-+"]
# What a script needs, and the modules whose import says something.
FRAMEWORKS = {
    "segmentation_models_pytorch": (),
    "timm": (),
    "transformers": (),
    "mmdet": ("mmdet.datasets",),
    "detectron2": (),
}


def script(lines: str, side: str) -> str:
    return "\n".join(line[1:] for line in lines.splitlines() if line[:1] in (" ", side))


def test_every_diff_is_found() -> None:
    assert len(CASES) == 2 * PAGE.count("```diff") == 14


@pytest.mark.parametrize(("lines", "side", "printed"), CASES)
def test_scripts_run(lines: str, side: str, printed: str, tmp_path: Path) -> None:
    code = script(lines, side)
    for framework, loud in FRAMEWORKS.items():
        if f"import {framework}" in code or f"from {framework}" in code:
            pytest.importorskip(framework, reason=f"{framework} is not installed here")
            mmcv_operations.provide()
            for module in loud:
                importlib.import_module(module)
    assert ("resbackbone" in code) is (side == "+")
    (tmp_path / "swap.py").write_text(code)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(str(tmp_path / "swap.py"))
    assert output.getvalue().strip() == printed


def test_each_framework_is_imported_only_when_asked_for(repository: Path) -> None:
    """Ours and theirs, the lighter first: transformers and timm import torchvision, and segmentation_models_pytorch both."""
    for framework in ("timm", "segmentation_models_pytorch", "transformers"):
        pytest.importorskip(framework)
    code = """
import importlib, sys, resbackbone, resbackbone.integrations
frameworks = {"torchvision": "torchvision", "transformers": "transformers", "timm": "timm", "smp": "segmentation_models_pytorch"}
later = [*frameworks.values(), "mmdet", "mmengine", "detectron2"]
for ours, theirs in frameworks.items():
    assert not set(later) & set(sys.modules), (ours, later)
    importlib.import_module(f"resbackbone.integrations.{ours}")
    assert theirs in sys.modules
    later.remove(theirs)
from segmentation_models_pytorch.encoders import encoders
from transformers import CONFIG_MAPPING
import timm
assert not timm.list_models("rb_*") and "rb_resnet18" not in encoders and "resbackbone" not in CONFIG_MAPPING
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("integration", "framework", "message"),
    [("mmdet", "mmdet", "pip install mmengine mmcv mmdet"), ("detectron2", "detectron2", "no package registry has")],
)
def test_without_a_framework(integration: str, framework: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(f"{framework}.")]:
        monkeypatch.delitem(sys.modules, name)  # what other tests have loaded would be found without its parent
    monkeypatch.setitem(sys.modules, framework, None)
    monkeypatch.delitem(sys.modules, f"resbackbone.integrations.{integration}", raising=False)
    with pytest.raises(InputError, match=message):
        importlib.import_module(f"resbackbone.integrations.{integration}")
