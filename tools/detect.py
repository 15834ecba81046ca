"""Detect objects: python tools/detect.py --weights RUN/model_final.safetensors INPUT... [--output DIR]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="detect", description="Draw what a trained detector finds, and write it as JSON.")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image, folder, glob, video or camera number; key.path=value overrides")
    parser.add_argument(
        "--weights",
        type=Path,
        action="append",
        required=True,
        help="model_final.safetensors of a run; it carries its config. Given more than once, the detectors work as an ensemble",
    )
    parser.add_argument("--config", type=Path, help="use this config instead of the one the weights carry")
    parser.add_argument("--output", type=Path, default=Path("detections"), help="folder for drawn files and JSON (default: detections)")
    parser.add_argument("--threshold", type=float, default=0.5, help="draw boxes of at least this score (the JSON has all; default 0.5)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images of one size to look at together (default 1)")
    parser.add_argument(
        "--precision", choices=("bf16", "fp16", "fp32"), help="to compute in (default: as trained); bf16 halves a C4's time"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_intermixed_args(argv)
    args.overrides = [text for text in args.inputs if "=" in text and not Path(text).exists()]
    args.inputs = [text for text in args.inputs if text not in args.overrides]
    args.overrides += [f"train.precision={args.precision}"] if args.precision else []
    if not args.inputs:
        parser.error("no INPUT given")
    if not 0 <= args.threshold <= 1:
        parser.error(f"--threshold {args.threshold:g}: scores lie between 0 and 1")
    return args


def run(args: argparse.Namespace) -> int:
    from detection.detect import detect_all
    from detection.inputs import printable
    from detection.predict import Predictor, resolve_configs

    configs = resolve_configs(args.config, args.weights, args.overrides)
    predictor, options = Predictor(configs, args.weights), {"threshold": args.threshold, "batch_size": args.batch_size}
    drawn, complaints = detect_all(predictor, args.inputs, args.output, **options)
    print(printable(f"{len(drawn)} drawn, {len(complaints)} with complaints; {args.output}"))
    return 1 if complaints else 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)  # before torch is imported: --help answers at once
    from resbackbone.runtime.cli import run_tool

    return run_tool(run, args)


if __name__ == "__main__":
    sys.exit(main())
