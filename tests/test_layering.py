"""The walls of the house, read from the source itself: who imports whom, how long things are, what is never called.

Each check is a function from a tree of files to a list of complaints, so that a test can also show that it complains.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("resbackbone", "detection", "tools")
SEARCHED = (*PACKAGES, "benchmarks", "tests")
MAX_FILE, MAX_FUNCTION, MAX_TOOL, MAX_MEDIAN, MAX_HOPS = 350, 60, 60, 12, 6

# Who may import what of the project. The longest matching prefix on the left decides; everything outside the project is free.
MAY_IMPORT = {
    "tools": ("detection", "resbackbone"),
    "detection": ("detection", "resbackbone"),
    "detection.data": ("detection.data", "detection.structures", "resbackbone.errors", "resbackbone.runtime"),
    "detection.evaluation": ("detection.evaluation", "detection.data", "detection.structures", "resbackbone.errors", "resbackbone.runtime"),
    "resbackbone": ("resbackbone",),
    "resbackbone.runtime": ("resbackbone.runtime", "resbackbone.errors"),
}
HARMLESS_XML = {"xml.etree.ElementTree.Element", "xml.etree.ElementTree.ParseError"}  # a type and an error; neither parses
# Networks and heads take values: they never see the configuration or the loop.
VALUE_MODULES = (
    *("anchors", "boxes", "context", "ensemble", "faster_rcnn", "losses", "mask_head", "matching", "multiscale", "pooling"),
    *("preprocess", "refine", "roi_head", "rpn", "steps"),
)


def python_files(root: Path, folders: tuple[str, ...] = SEARCHED) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _named_by(node: ast.AST, package: str) -> list[str]:
    """The dotted names one import statement may refer to, the most specific first."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parents, *([base] if base else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    return []


@cache
def import_graph(root: Path) -> dict[str, dict[str, int]]:
    """module -> {module of the project it imports, anywhere in its text: the line}."""
    files = {module_name(path, root): path for path in python_files(root, PACKAGES)}
    graph: dict[str, dict[str, int]] = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        edges: dict[str, int] = {}
        for node in ast.walk(ast.parse(path.read_text())):
            for name in _named_by(node, package):
                while name and name not in files:
                    name = name.rpartition(".")[0]
                if name and name != module:
                    edges.setdefault(name, getattr(node, "lineno", 0))
        graph[module] = edges
    return graph


def _inside(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def broken_walls(root: Path) -> list[str]:
    complaints = []
    for module, edges in import_graph(root).items():
        wall = max((name for name in MAY_IMPORT if _inside(module, (name,))), key=len)
        allowed = MAY_IMPORT[wall]
        complaints += [
            f"{module}:{line} imports {name}; {wall} may import {allowed}" for name, line in edges.items() if not _inside(name, allowed)
        ]
    return complaints


def circles(root: Path) -> list[str]:
    """One line per circle of imports (lazy ones count: they hide a circle, they don't open it)."""
    graph, done, found = import_graph(root), set(), []

    def walk(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            found.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for name in graph[module]:
                walk(name, (*trail, module))
            done.add(module)

    for module in graph:
        walk(module, ())
    return found


def shortest_way(root: Path, start: str, goal: str) -> list[str]:
    """The files a reader opens from `start` to `goal`, both counted, along imports that exist; [] where there is no way."""
    graph, queue, seen = import_graph(root), [[start]], {start}
    while queue:
        way = queue.pop(0)
        if way[-1] == goal:
            return way
        for name in graph[way[-1]]:
            if name not in seen:
                seen.add(name)
                queue.append([*way, name])
    return []


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def too_long(root: Path) -> list[str]:
    complaints = []
    for path in python_files(root):
        lines, limit = len(path.read_text().splitlines()), MAX_TOOL if path.parent == root / "tools" else MAX_FILE
        if lines > limit:
            complaints.append(f"{path.relative_to(root)} has {lines} lines, more than {limit}")
        complaints += [f"{path.relative_to(root)}: {name} has {size} lines" for name, size in _functions(path) if size > MAX_FUNCTION]
    return complaints


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _forbidden(call: ast.Call) -> str | None:
    """Why this call is never made here, or None: all of these can execute what a file says."""
    name, keywords = _dotted(call.func), {word.arg: word.value for word in call.keywords}

    def is_given(keyword: str, value: object) -> bool:
        given = keywords.get(keyword)
        return isinstance(given, ast.Constant) and given.value is value

    if name in {
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "os.system",
        "eval",
        "exec",
    }:
        return f"{name} can execute what it reads"
    if name == "torch.load" and not is_given("weights_only", True):
        return "torch.load without weights_only=True executes pickles"
    if name.endswith("np.load") and is_given("allow_pickle", True):
        return "np.load(allow_pickle=True) executes pickles"
    if name.startswith("subprocess.") and is_given("shell", True):
        return "shell=True hands a string to a shell"
    return None


def forbidden_calls(root: Path) -> list[str]:
    complaints = []
    for path in python_files(root, (*PACKAGES, "benchmarks")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (reason := _forbidden(node)):
                complaints.append(f"{path.relative_to(root)}:{node.lineno}: {reason}")
            names = {name for name in _named_by(node, "") if name.startswith("xml.")} - HARMLESS_XML
            if names and not path.is_relative_to(root / "benchmarks"):
                complaints.append(f"{path.relative_to(root)}:{node.lineno}: untrusted XML goes through defusedxml")
    return complaints


def project_files(root: Path) -> list[Path]:
    """What git tracks or would track."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: which files belong to the project isn't known")
    return [root / name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def lines_matching(files: list[Path], pattern: str) -> list[str]:
    found = []
    for path in files:
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1):
            if re.search(pattern, line):
                found.append(f"{path.name}:{number}: {line.strip()[:100]}")
    return found


def test_walls_stand() -> None:
    assert broken_walls(REPOSITORY) == []


def test_no_circles() -> None:
    assert circles(REPOSITORY) == []


def test_networks_take_values_not_configs() -> None:
    graph = import_graph(REPOSITORY)
    seers = [
        f"detection.{name}" for name in VALUE_MODULES if {"detection.config", "detection.train"} & set(graph.get(f"detection.{name}", {}))
    ]
    assert seers == []


def test_sizes() -> None:
    assert too_long(REPOSITORY) == []


def test_median_function_is_short() -> None:
    sizes = [size for path in python_files(REPOSITORY, PACKAGES) for _, size in _functions(path)]
    assert statistics.median(sizes) <= MAX_MEDIAN


@pytest.mark.parametrize(
    ("start", "goal"),
    [
        ("tools.train_det", "detection.losses"),
        ("tools.detect", "detection.boxes"),
        ("tools.eval_coco", "detection.evaluation.coco"),
        ("tools.train_cls", "resbackbone.classification.recipe"),
        ("tools.train_seg", "detection.segmentation.segmenter"),
    ],
)
def test_short_ways(start: str, goal: str) -> None:
    way = shortest_way(REPOSITORY, start, goal)
    assert 2 <= len(way) <= MAX_HOPS, way


def test_the_ways_in_the_documentation_are_real_imports() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    ways = [line.split(" → ") for line in text.splitlines() if line.startswith("tools/") and " → " in line]
    assert len(ways) >= 2, "docs/architecture.md draws the way to a loss and the way to the boxes"
    graph = import_graph(REPOSITORY)
    for way in ways:
        modules = [name.strip().removesuffix(".py").replace("/", ".") for name in way]
        assert len(modules) <= MAX_HOPS, way
        missing = [f"{here} does not import {there}" for here, there in pairwise(modules) if there not in graph[here]]
        assert missing == []


def test_import_resbackbone_is_light() -> None:
    code = "import sys, json, torch\nbefore = set(sys.modules)\nimport resbackbone\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded = json.loads(run.stdout)
    foreign = {name.partition(".")[0] for name in loaded} - {"resbackbone"} - set(sys.stdlib_module_names)
    assert foreign <= {"torch"}, foreign
    assert not [name for name in loaded if name.startswith(("torch._dynamo", "torch._inductor", "torch.distributed.tensor"))]


def test_nothing_executes_what_it_reads() -> None:
    assert forbidden_calls(REPOSITORY) == []


def test_no_path_of_a_machine() -> None:
    files = [path for path in project_files(REPOSITORY) if path.relative_to(REPOSITORY).as_posix() != "tests/conftest.py"]
    assert lines_matching(files, "(^|[^A-Za-z0-9_.>)])/" + "(work|root|home/[a-z]+)/|\\.\\./" + "shared") == []


def test_no_registry_host_and_no_token() -> None:
    assert (
        lines_matching(project_files(REPOSITORY), "(?i)index-" + "url|pypi" + "\\.org|files\\.python" + "hosted|hf_[A-Za-z0-9]{20}") == []
    )


def test_nothing_was_left_for_later() -> None:
    files = list(python_files(REPOSITORY))
    words = "TO" + "DO|FIX" + "ME|raise NotImplemented" + "Error|mark\\.x" + "fail|pytest\\.x" + "fail"
    assert lines_matching(files, words) == []


def test_every_package_is_installed() -> None:
    setup = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    folders = {path.parent for path in python_files(REPOSITORY, ("resbackbone", "detection"))}
    packages = {folder.relative_to(REPOSITORY).as_posix().replace("/", ".") for folder in folders}
    assert set(setup["tool"]["setuptools"]["packages"]) == packages | {"resbackbone_tools"}
    for command, target in setup["project"]["scripts"].items():
        module, function = target.split(":")
        source = REPOSITORY / "tools" / f"{module.removeprefix('resbackbone_tools.')}.py"
        assert command == "resbackbone-" + source.stem.replace("_", "-")
        assert function in dict(_functions(source)), f"{source.name} has no {function}()"


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in (REPOSITORY / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names)), "two test files of one name hide each other"
    assert "__init__.py" not in names


# The checks themselves can fail: a small tree with one fault each.

FAULTS = {
    "tool imports tool": ({"tools/a.py": "import tools.b", "tools/b.py": ""}, broken_walls),
    "upward": ({"resbackbone/a.py": "from detection import x", "detection/x.py": ""}, broken_walls),
    "lazy upward": ({"resbackbone/a.py": "def f():\n    import detection.x", "detection/x.py": ""}, broken_walls),
    "runtime knows a network": ({"resbackbone/runtime/a.py": "from ..resnet import ResNet", "resbackbone/resnet.py": ""}, broken_walls),
    "data knows a model": ({"detection/data/a.py": "from detection.rpn import x", "detection/rpn.py": ""}, broken_walls),
    "circle": ({"detection/a.py": "import detection.b", "detection/b.py": "from detection import a"}, circles),
    "lazy circle": ({"detection/a.py": "import detection.b", "detection/b.py": "def f():\n    from detection import a"}, circles),
    "long file": ({"detection/a.py": "x = 1\n" * 351}, too_long),
    "long tool": ({"tools/a.py": "x = 1\n" * 61}, too_long),
    "long function": ({"detection/a.py": "def f():\n" + "    x = 1\n" * 60}, too_long),
    "pickle": ({"detection/a.py": "import pickle\npickle.load(f)"}, forbidden_calls),
    "torch.load": ({"detection/a.py": "import torch\ntorch.load(p, weights_only=False)"}, forbidden_calls),
    "yaml.load": ({"detection/a.py": "import yaml\nyaml.load(f)"}, forbidden_calls),
    "xml": ({"detection/a.py": "from xml.etree import ElementTree"}, forbidden_calls),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checks_can_fail(fault: str, tmp_path: Path) -> None:
    files, check = FAULTS[fault]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert check(tmp_path)


def test_the_path_check_can_fail(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("put it in /" + "work/data/voc")
    assert lines_matching([tmp_path / "a.md"], "(^|[^A-Za-z0-9_.>)])/" + "(work|root)/")
