"""What the README and the docs tell people to type exists and is accepted; what needs no data is really run."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md")))]
BLOCK = re.compile(r"^(?:<!-- tested: (?P<mark>\w+) -->\n)?```(?P<language>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
# What makes a README command small enough for a test; it still trains, evaluates on all 200 images and draws.
TINY = [
    "train.steps=2",
    "train.batch_size=2",
    "train.warmup_steps=0",
    "data.min_size=32",
    "data.max_size=32",
    "data.workers=0",
    "eval.samples=2",
]


def blocks(document: str, language: str, mark: str | None = None) -> list[str]:
    """The fenced blocks of a document in one language; with `mark`, only those under `<!-- tested: mark -->`."""
    found = BLOCK.finditer((REPOSITORY / document).read_text())
    return [block["body"] for block in found if block["language"] == language and mark in (None, block["mark"])]


def commands(document: str, mark: str | None = None) -> list[list[str]]:
    """Each command line of a document's bash blocks, split into words, comments dropped."""
    lines = "".join(blocks(document, "bash", mark)).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


ALL_COMMANDS = [(document, words) for document in DOCUMENTS for words in commands(document)]
TOOL_COMMANDS = [(document, words[words.index(tool) :]) for document, words in ALL_COMMANDS for tool in words if tool.startswith("tools/")]


def run(words: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, env=environment, timeout=300, **options)  # type: ignore[call-overload]


@cache
def help_of(tool: str) -> str:
    shown = run([sys.executable, tool, "--help"])
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def faults_of(words: list[str]) -> list[str]:
    """What is wrong with `tools/X.py …` as a document shows it: a tool, flag, config file or setting that does not exist."""
    from detection.config import load_detection_config
    from detection.segmentation.config import load_segmentation_config
    from resbackbone.classification.config import load_classification_config
    from resbackbone.errors import InputError

    tool, *rest = words
    if not (REPOSITORY / tool).is_file():
        return [f"there is no {tool}"]
    flags = {word.partition("=")[0] for word in rest if word.startswith("--")}
    faults = [f"{tool} has no {flag}" for flag in flags if not re.search(rf"{flag}\b", help_of(tool))]
    config = next((Path(value) for flag, value in pairwise(rest) if flag == "--config"), None)
    if config is not None and config.parts[0] == "configs":
        overrides = [word for word in rest if re.match(r"[a-z_]+(\.[a-z_]+)+=", word)]
        try:
            loaders = {"cls": load_classification_config, "seg": load_segmentation_config}
            loaders.get(Path(tool).stem[-3:], load_detection_config)(REPOSITORY / config, overrides)
        except InputError as error:
            faults.append(str(error))
    return faults


@pytest.mark.parametrize(("document", "words"), TOOL_COMMANDS, ids=lambda value: value if isinstance(value, str) else " ".join(value[:3]))
def test_documented_tool_commands_are_accepted(document: str, words: list[str]) -> None:
    assert faults_of(words) == []


@pytest.mark.parametrize(
    "command",
    [
        "tools/no_such_tool.py",
        "tools/train_det.py --config configs/demo_shapes.yaml --no-such-flag",
        "tools/train_det.py --config configs/no_such_config.yaml",
        "tools/train_det.py --config configs/demo_shapes.yaml train.stepz=3",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    assert faults_of(shlex.split(command))


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for _, words in ALL_COMMANDS if words[0] == "make"}
    assert {"demo", "test"} <= named <= targets
    assert {"test-slow", "lint", "bench", "clean"} <= targets


def test_continuous_integration_runs_the_documented_test_command() -> None:
    assert ["make", "test"] in commands("README.md")
    assert "make test" in (REPOSITORY / ".ci" / "run").read_text()
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)


def test_links_lead_somewhere() -> None:
    missing = []
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", (REPOSITORY / document).read_text()):
            if not ((REPOSITORY / document).parent / target).exists():
                missing.append(f"{document} → {target}")
    assert missing == []


def test_documented_policy_is_the_policy() -> None:
    from detection.data.problems import POLICY

    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|$", (REPOSITORY / "docs" / "data.md").read_text(), re.MULTILINE)
    assert dict(rows) == POLICY


def test_each_tool_is_documented() -> None:
    named = {words[0] for _, words in TOOL_COMMANDS}
    tools = {f"tools/{path.name}" for path in (REPOSITORY / "tools").glob("*.py") if path.name != "__init__.py"}
    assert tools <= named, tools - named


def test_extras_in_the_readme_exist() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for _, words in ALL_COMMANDS:
        for named in re.findall(r"^\.\[(.+)\]$", " ".join(words[-1:])):
            assert set(named.split(",")) <= set(extras)


def test_readme_commands_run(tmp_path: Path) -> None:
    ran = commands("README.md", "runs")
    assert {"tools/train_det.py", "tools/eval_coco.py", "tools/detect.py"} <= {words[1] for words in ran}
    for words in ran:
        assert words[0] == "python"
        here = [word.replace("runs/", f"{tmp_path}/") for word in words[1:]]
        done = run([sys.executable, *here, *(TINY if "train_det" in words[1] else [])])
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    assert list((tmp_path / "shapes" / "drawn").glob("*.jpg"))


def test_readme_python_runs() -> None:
    (code,) = blocks("README.md", "python", "python")
    done = run([sys.executable, "-c", code + "print({name: list(each.shape) for name, each in maps.items()})"])
    assert done.returncode == 0, done.stderr
    assert "FeatureInfo(channels=1024, stride=16)" in done.stdout
    assert "{'conv2_x': [1, 256, 56, 56], 'conv5_x': [1, 2048, 7, 7]}" in done.stdout


def test_the_paper_map_names_what_exists() -> None:
    text = (REPOSITORY / "docs" / "paper_map.md").read_text()
    places = re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", text)
    assert len(places) > 20
    missing = [f"{path}:{name}" for path, name in places if not _is_defined(REPOSITORY / path, name)]
    assert missing == []


def _is_defined(path: Path, name: str) -> bool:
    """Whether a file exists and, where `name` is given, defines it at the top or inside a class (Class.method)."""
    if not path.is_file():
        return False
    nodes: list[ast.stmt] = ast.parse(path.read_text()).body
    for part in filter(None, name.split(".")):
        found = [node for node in nodes if part in _names_bound_by(node)]
        if not found:
            return False
        nodes = getattr(found[0], "body", [])
    return True


def _names_bound_by(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]
