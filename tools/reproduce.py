"""A table of the paper with ours beside it: python tools/reproduce.py table8 [--results DIR] [--data DIR] [--run]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reproduce", description="The paper's figures, ours beside them, what is missing of ours and the commands that give it."
    )
    parser.add_argument("table", metavar="TABLE", help="table3, table4, table6, table7, table8, table9 or table10")
    parser.add_argument("--results", type=Path, default=Path("runs/reproduce"), help="where ours is kept (default: runs/reproduce)")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="holds coco/, voc/, imagenet/, cifar-10-batches-bin/ (default: data)"
    )
    parser.add_argument("--run", action="store_true", help="run what is missing, as far as its data is there; weeks of a GPU for some")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    from detection.reproduce import Places, reproduce

    print(reproduce(args.table, Places(data=args.data.resolve(), results=args.results.resolve()), run=args.run))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)  # before torch is imported: --help answers at once
    from resbackbone.runtime.cli import run_tool

    return run_tool(run, args)


if __name__ == "__main__":
    sys.exit(main())
