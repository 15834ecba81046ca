"""The paper's tables with ours beside them: what is there, what is missing, how to get it, and running it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from detection.config import load_detection_config
from detection.paper_tables import DATA, JOBS, TABLES, Cell, PaperTable
from resbackbone.errors import InputError, nearest
from resbackbone.weights.torchvision import WEIGHTS

CHECKOUT = Path(__file__).resolve().parents[1]
Runner = Callable[[list[str]], int]


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where data sets lie (coco/, voc/, imagenet/, cifar-10-batches-bin/) and where results are kept, a folder for each job."""

    data: Path
    results: Path

    def command(self, job: str) -> list[str]:
        """The words of a job after `python`; training goes on where it was."""
        spec, goes_on = JOBS[job], ["--resume", "auto"] if JOBS[job].tool.startswith("train") else []
        words = [
            word.format(data=self.data, results=self.results) if "={data}" in word or "={results}" in word or word.startswith("{") else word
            for word in spec.words
        ]
        return [f"tools/{spec.tool}.py", *words, "--output", str(self.results / job), *goes_on]

    def metrics(self, job: str) -> Path:
        """The file that shows a job to be done."""
        return self.results / job / "eval" / "metrics.json"

    def weights(self, job: str) -> Path:
        """What jobs that come after it start from."""
        return self.results / job / "model_final.safetensors"

    def missing_data(self, key: str) -> list[Path]:
        """Files of a data set that aren't there."""
        return [self.data / name for name in DATA[key].files if not (self.data / name).exists()]


def reproduce(table: str, places: Places, *, run: bool = False, runner: Runner | None = None) -> str:
    """The table's text; with `run`, what is missing is run first, as far as its data is there.

    runner: executes the words after `python`, returns the exit code. Raises InputError for an unknown table, a result that can't be read
    and a command that fails.
    """
    chosen = _table(table)
    jobs = jobs_of(chosen)
    if run:
        for job in to_run(jobs, places):
            is_ready = all(places.weights(earlier).is_file() for earlier in JOBS[job].after)  # else its data wasn't here
            if is_ready and not any(places.missing_data(key) for key in JOBS[job].data):
                _run(job, places, runner or run_tool)
    return "\n".join([*format_table(chosen, places), "", *_missing(chosen, jobs, places)])


def to_run(jobs: list[str], places: Places) -> list[str]:
    """Those of `jobs`, which stand in order, that lack their figures, or their weights where one of these starts from them."""
    lacking: set[str] = set()
    for job in reversed(jobs):
        is_needed = any(job in JOBS[later].after for later in lacking)
        if not places.metrics(job).is_file() or (is_needed and not places.weights(job).is_file()):
            lacking.add(job)
    return [job for job in jobs if job in lacking]


def jobs_of(table: PaperTable) -> list[str]:
    """The jobs behind a table's cells, each after those it needs."""
    found: list[str] = []
    for cell in (cell for row in table.rows.values() for cell in row if cell.job is not None):
        for job in _with_needed(str(cell.job)):
            if job not in found:
                found.append(job)
    return found


def format_table(table: PaperTable, places: Places) -> list[str]:
    """Lines: under each column the paper's figure and ours, in per cent; "-" for ours where there is none."""
    width, label_width = 2 * 9, max(map(len, table.rows)) + 2
    lines = [
        f"He et al. 2015, {table.title}",
        "",
        " " * label_width + "".join(f"{name:>{max(width, len(name) + 2)}}" for name in table.columns),
    ]
    widths = [max(width, len(name) + 2) for name in table.columns]
    lines.append(" " * label_width + "".join(f"{'paper':>{one - 9}}{'ours':>9}" for one in widths))
    for label, cells in table.rows.items():
        pairs = zip(cells, widths, strict=True)
        lines.append(
            f"{label:<{label_width}}" + "".join(f"{_figure(cell.paper):>{one - 9}}{_figure(ours(cell, places)):>9}" for cell, one in pairs)
        )
    return [*lines, f"({table.note})"]


def ours(cell: Cell, places: Places) -> float | None:
    """Our figure for a cell, in per cent; None where there is none yet."""
    if cell.job is None or not places.metrics(cell.job).is_file():
        return None
    path = places.metrics(cell.job)
    try:
        value = json.loads(path.read_text())
        for key in _keys(cell.metric, value):
            value = value[key]
        return 100 * (1 - value) if cell.error else 100 * value
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} has no figure {cell.metric} ({error}); remove that folder and run its command again") from None


def run_tool(words: list[str]) -> int:
    """Run a tool of this checkout with this Python; its output goes where ours goes. Raises InputError without a checkout."""
    if not (CHECKOUT / words[0]).is_file():
        raise InputError(f"{words[0]} isn't beside the package: --run needs a checkout of the repository, whose tools and configs it runs")
    return subprocess.run([sys.executable, *words], cwd=CHECKOUT).returncode


def _table(name: str) -> PaperTable:
    if name not in TABLES:
        raise InputError(f"there is no {name} here;{nearest(name, TABLES)} choose from {', '.join(TABLES)}")
    return TABLES[name]


def _with_needed(job: str) -> Iterator[str]:
    for earlier in JOBS[job].after:
        yield from _with_needed(earlier)
    yield job


def _run(job: str, places: Places, runner: Runner) -> None:
    words = places.command(job)
    code = runner(words)
    if code:
        raise InputError(f"python {shlex.join(words)} ended with {code}; mend what it says, then start again: what is done isn't repeated")
    if not places.metrics(job).is_file():
        raise InputError(
            f"python {shlex.join(words)} ended well but left no {places.metrics(job)}; is --results a folder one can write to?"
        )


def _missing(table: PaperTable, jobs: list[str], places: Places) -> Iterator[str]:
    undone = to_run(jobs, places)
    if undone:
        yield "Missing of ours, and the commands that give it (--run runs them; stopped, they go on where they were):"
        yield from (f"  {job}: python {shlex.join(places.command(job))}" for job in undone)
    else:
        yield f"All of ours is there, in {places.results}."
    for job, earlier in _outdated(jobs, places):
        yield f"{job}: its figures are older than the weights of {earlier} beside it; remove {places.results / job} to have them anew."
    for key in dict.fromkeys(key for job in undone for key in JOBS[job].data):
        lacking = places.missing_data(key)
        if lacking:
            yield f"Data that isn't here: {lacking[0]}{f' and {len(lacking) - 1} more' if len(lacking) > 1 else ''}. How to get it:"
            yield f"  {DATA[key].how.format(data=places.data)}"
    for name, (url, file) in _missing_weights(undone, places).items():
        yield f"ImageNet weights of {name} that aren't here: training downloads {url}; without a network, put that file at {file}"
    reasons = dict.fromkeys(cell.why_not for row in table.rows.values() for cell in row if cell.why_not and cell.paper is not None)
    for reason in reasons:
        labels = [
            label.strip() for label, row in table.rows.items() if any(cell.why_not == reason and cell.paper is not None for cell in row)
        ]
        yield f"Of the paper alone ({', '.join(labels)}): {reason}."


def _outdated(jobs: list[str], places: Places) -> Iterator[tuple[str, str]]:
    """(job, an earlier one) where the earlier one's weights were made after the job's figures."""
    for job in jobs:
        if places.metrics(job).is_file():
            made = places.metrics(job).stat().st_mtime
            newer = (one for one in JOBS[job].after if places.weights(one).is_file() and places.weights(one).stat().st_mtime > made)
            yield from ((job, one) for one in newer)


def _missing_weights(jobs: list[str], places: Places) -> dict[str, tuple[str, Path]]:
    """The torchvision backbones that jobs start from and that aren't in torch.hub's folder: where each comes from, and where it belongs."""
    from torch.hub import get_dir
    from torchvision.models import get_model_weights

    missing = {}
    for words in (places.command(job) for job in jobs if JOBS[job].tool == "train_det"):
        if not (CHECKOUT / words[2]).is_file():  # the package alone is installed: no command of these can run
            continue
        model = load_detection_config(CHECKOUT / words[2], words[3 : words.index("--output")]).model
        if model.weights is None and model.backbone.weights == "torchvision":
            url = get_model_weights(model.backbone.name)[WEIGHTS].url
            file = Path(get_dir()) / "checkpoints" / url.rpartition("/")[2]
            if not file.is_file():
                missing[model.backbone.name] = (url, file)
    return missing


def _keys(metric: str, content: dict) -> list[str]:
    """A figure's name may hold a slash itself, as VOC_11_point/cat does."""
    return [metric] if metric in content else metric.split("/")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}".removesuffix("0")
