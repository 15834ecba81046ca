"""The scripts of docs/swapping.md run, before and after, and print what the page says; frameworks are imported when asked for."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DIFF = re.compile(r"<!-- tested: diff -->\n```diff\n(?P<lines>.*?)^```\n\nprints `(?P<printed>[^`]+)`", re.MULTILINE | re.DOTALL)
PAGE = (Path(__file__).resolve().parents[3] / "docs" / "swapping.md").read_text()
CASES = [(match["lines"], side, match["printed"]) for match in DIFF.finditer(PAGE) for side in "-+"]


def script(lines: str, side: str) -> str:
    return "\n".join(line[1:] for line in lines.splitlines() if line[:1] in (" ", side))


def test_every_diff_is_found() -> None:
    assert len(CASES) == 2 * PAGE.count("```diff") == 8


@pytest.mark.parametrize(("lines", "side", "printed"), CASES)
def test_scripts_run(lines: str, side: str, printed: str, tmp_path: Path) -> None:
    code = script(lines, side)
    if "segmentation_models_pytorch" in code:
        pytest.importorskip("segmentation_models_pytorch")
    if "import timm" in code:
        pytest.importorskip("timm")
    assert ("resbackbone" in code) is (side == "+")
    (tmp_path / "swap.py").write_text(code)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(str(tmp_path / "swap.py"))
    assert output.getvalue().strip() == printed


def test_each_framework_is_imported_only_when_asked_for(repository: Path) -> None:
    """Ours and theirs, the lighter first, since timm imports torchvision, and segmentation_models_pytorch both."""
    pytest.importorskip("timm")
    pytest.importorskip("segmentation_models_pytorch")
    code = """
import importlib, sys, resbackbone, resbackbone.integrations
frameworks = {"torchvision": "torchvision", "timm": "timm", "smp": "segmentation_models_pytorch"}
later = list(frameworks.values())
for ours, theirs in frameworks.items():
    assert not set(later) & set(sys.modules), (ours, later)
    importlib.import_module(f"resbackbone.integrations.{ours}")
    assert theirs in sys.modules
    later.remove(theirs)
from segmentation_models_pytorch.encoders import encoders
import timm
assert not timm.list_models("rb_*") and "rb_resnet18" not in encoders
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
