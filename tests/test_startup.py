"""Nobody waits for what he doesn't use: --help and usage errors come without torch, torchvision only with its operators.

Times are benchmarks/bench_import.py's; which modules are loaded is what they follow from, and doesn't waver.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = sorted(path.stem for path in (Path(__file__).resolve().parents[1] / "tools").glob("[a-z]*.py"))
HEAVY = ("torch", "torchvision", "numpy", "cv2", "matplotlib", "tensorboard", "rich", "timm", "pycocotools", "onnx")

SCRIPT = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print("exit", end.code, *[name for name in HEAVY if name in sys.modules])
"""


def ended(repository: Path, *command: str) -> str:
    """How a tool's process ended, in words: its exit code and the heavy packages it had loaded by then."""
    code = f"HEAVY = {HEAVY}\n{SCRIPT}"
    run = subprocess.run([sys.executable, "-c", code, *command], cwd=repository, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()[-1]


@pytest.mark.parametrize("tool", TOOLS)
def test_help_comes_without_torch(repository: Path, tool: str) -> None:
    assert ended(repository, f"tools/{tool}.py", "--help") == "exit 0"


@pytest.mark.parametrize("tool", TOOLS)
def test_so_do_usage_errors(repository: Path, tool: str) -> None:
    assert ended(repository, f"tools/{tool}.py", "--no-such-option") == "exit 2"


def test_torchvision_comes_with_its_operators_only(repository: Path) -> None:
    modules = "detection.config, detection.data, detection.evaluation.coco, resbackbone.convert"
    code = f"import {modules}, sys\nprint([name for name in ('torchvision', 'torch._dynamo', 'matplotlib', 'timm') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
