"""Mean IoU of a segmenter: python tools/eval_seg.py --weights W [--config C] [--output DIR] [key.path=value ...]"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="eval_seg", description="Run a segmenter on its validation split: each class's IoU, and the means."
    )
    parser.add_argument("--weights", type=Path, required=True, help="model_final.safetensors or a checkpoint of a run")
    parser.add_argument("--config", type=Path, help="the run's YAML file (default: the config the weights carry)")
    parser.add_argument("--output", type=Path, help="folder for eval/metrics.json and eval/confusion.json")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that differ")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> None:
    from detection.segmentation.iou import format_figures
    from detection.segmentation.predict import resolve_config
    from detection.segmentation.score import evaluate_weights

    config = resolve_config(args.config, args.weights, args.overrides)
    lines = format_figures(evaluate_weights(config, args.weights, output=args.output))
    if os.environ.get("RANK", "0") == "0":  # torchrun starts several of us
        print(lines + (f"\nfigures {args.output / 'eval' / 'metrics.json'}" if args.output else ""))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)  # before torch is imported: --help answers at once
    from resbackbone.runtime.cli import run_tool

    return run_tool(run, args)


if __name__ == "__main__":
    sys.exit(main())
