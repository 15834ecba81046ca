"""What a run says and writes while it goes: metrics.jsonl, TensorBoard, log.txt, the progress line, environment.json."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from resbackbone.runtime.atomic import storage_errors, write_atomically

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """The record of one run in `output`. Everything is a no-op unless `main` (the process that writes).

    On a resume at step s, lines of later steps, which the killed run had written, are dropped, and so is an evaluation that it had
    written but not recorded in a checkpoint, for it is made again: each line is in the file once.
    """

    def __init__(self, output: Path, *, total_steps: int, main: bool, resume_step: int = 0, evaluated_step: int | None = None) -> None:
        self.total_steps, self.main = total_steps, main
        self._writer: Any = None
        if not main:
            return
        self._output = output = Path(output)
        with storage_errors(output):
            output.mkdir(parents=True, exist_ok=True)
            _drop_later_lines(output / METRICS_FILE, resume_step, resume_step if evaluated_step is None else evaluated_step)
            self._metrics: TextIO = (output / METRICS_FILE).open("a", encoding="utf-8")
            self._text: TextIO = (output / "log.txt").open("a", encoding="utf-8")
        self._console = _make_console()
        self._writer = _make_tensorboard(output / "tensorboard", resume_step)

    def metrics(self, step: int, **values: Any) -> None:
        """Append one JSON object, `{"step": …, "time": …, **values}`, and the numbers in it as TensorBoard scalars."""
        if not self.main:
            return
        plain = {name: value.item() if isinstance(value, (torch.Tensor, np.generic)) else value for name, value in values.items()}
        _append(self._metrics, to_json({"step": step, "time": round(time.time(), 3), **plain}) + "\n", self._output)
        for name, value in plain.items():
            if self._writer is not None and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(name, value, step)

    def message(self, text: str) -> None:
        """Say something on the console and in log.txt, where it gets the time of day."""
        if not self.main:
            return
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        _append(self._text, "".join(f"{stamp} {line}\n" for line in text.splitlines() or [""]), self._output)

    def progress(
        self, step: int, *, losses: Mapping[str, Any], images_per_s: float, split: Mapping[str, float], memory_mb: float, eta_s: float
    ) -> None:
        """The progress line: loss terms, speed, where the time goes (`split`: fractions by name), memory, time left."""
        self.message(
            progress_line(step, self.total_steps, losses=losses, images_per_s=images_per_s, split=split, memory_mb=memory_mb, eta_s=eta_s)
        )

    def close(self) -> None:
        """Flush and close the files."""
        if self.main:
            with storage_errors(self._output):
                self._metrics.close()
                self._text.close()
        if self._writer is not None:
            self._writer.close()


def progress_line(
    step: int,
    total_steps: int,
    *,
    losses: Mapping[str, Any],
    images_per_s: float,
    split: Mapping[str, float],
    memory_mb: float,
    eta_s: float,
) -> str:
    """`step 20/100 | loss 2.10 (rpn_box 0.31 …) | 4.2 images/s | data 3% forward 40% … | 812 MB | 0:01:23 left`."""
    numbers = {name: float(value) for name, value in losses.items()}
    terms = " ".join(f"{name} {value:.3f}" for name, value in numbers.items())
    shares = " ".join(f"{name} {share:.0%}" for name, share in split.items())
    width = len(str(total_steps))
    return (
        f"step {step:{width}d}/{total_steps} | loss {sum(numbers.values()):.4f} ({terms}) | {images_per_s:.1f} images/s | {shares} | "
        f"{memory_mb:.0f} MB | {format_duration(eta_s)} left"
    )


def format_duration(seconds: float) -> str:
    """1:02:03, with days where there are any."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d " * bool(days) + f"{hour}:{minute:02d}:{second:02d}"


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON that every reader takes: NaN and infinities become the texts "nan", "inf" and "-inf"; tensors become numbers or lists."""
    return json.dumps(_jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False)


def write_environment(output: Path, seed: int) -> None:
    """Write environment.json: versions, git revision, machine, seed, command."""
    environment = {
        "command": sys.argv,
        "seed": seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git": git_revision(Path(__file__).parent),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": _machine(),
    }
    write_atomically(Path(output) / "environment.json", to_json(environment, indent=2).encode())


def git_revision(folder: Path) -> str | None:
    """The commit of the checkout that `folder` is in, with "-dirty" where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _append(file: TextIO, text: str, folder: Path) -> None:
    with storage_errors(folder):
        file.write(text)
        file.flush()


def _versions() -> dict[str, str | None]:
    names = ("resbackbone", "torchvision", "numpy", "opencv-python-headless", "simplejpeg", "pycocotools", "hotcoco", "timm")
    found: dict[str, str | None] = {"torch": str(torch.__version__)}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _drop_later_lines(path: Path, resume_step: int, evaluated_step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if resume_step > 0 and _is_known(line, resume_step, evaluated_step)]
    if len(kept) != len(lines):
        write_atomically(path, "".join(line + "\n" for line in kept).encode())


def _is_known(line: str, resume_step: int, evaluated_step: int) -> bool:
    """Whether the checkpoint of `resume_step` has seen what a metrics line tells; False for a line that was cut off by a kill."""
    try:
        values = json.loads(line)
        last = evaluated_step if any(name.startswith("eval/") for name in values) else resume_step
        return int(values["step"]) <= last
    except (ValueError, KeyError, TypeError):
        return False


def _jsonable(value: Any) -> Any:
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _make_console() -> Any:
    from rich.console import Console

    return Console()


def _make_tensorboard(folder: Path, resume_step: int) -> Any:
    """A SummaryWriter that hides what a killed run had written after `resume_step`."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)
