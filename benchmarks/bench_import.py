"""What starting costs: `import resbackbone` beside `import torch`, and every tool's --help.

    python benchmarks/bench_import.py [--rounds 7]

Each import runs in a process of its own, by turns; the processor time (user and system) of the whole process is taken, so the ratio
includes Python's own start on both sides. Of --help the wall time is shown, since that is what one waits for; the first round warms
the disk and isn't counted.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
MODULES = ("torch", "resbackbone")


def measure(command: list[str]) -> tuple[float, float]:
    """(processor seconds, wall seconds) of one process."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    after, wall_s = os.times(), time.perf_counter() - start
    return after.children_user + after.children_system - before.children_user - before.children_system, wall_s


def bench_imports(rounds: int) -> None:
    commands = [["-c", f"import {module}"] for module in MODULES]
    times = [[measure(command)[0] for command in commands] for _ in range(rounds + 1)][1:]
    ratios = sorted(ours / theirs for theirs, ours in times)
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    print(f"import torch {medians[0]:.2f} s, import resbackbone {medians[1]:.2f} s of processor time")
    print(f"ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})", flush=True)


def bench_help(rounds: int) -> None:
    for tool in sorted((REPOSITORY / "tools").glob("[a-z]*.py")):
        walls = sorted([measure([str(tool), "--help"])[1] for _ in range(rounds + 1)][1:])
        print(f"{tool.name:20} --help {statistics.median(walls):.2f} s of wall time ({walls[0]:.2f} to {walls[-1]:.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    bench_imports(options.rounds)
    bench_help(options.rounds)


if __name__ == "__main__":
    main()
