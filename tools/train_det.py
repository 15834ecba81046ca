"""Train a detector: python tools/train_det.py --config C.yaml [--output DIR] [--resume auto|PATH] [--largest-batch] [key.path=value ...]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train_det", description="Train, evaluate and draw a detector; everything lands in --output.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="a YAML file; configs/ has examples, a run's own config.yaml repeats it")
    what.add_argument("--replay", type=Path, metavar="DIR", help="run the batch of a nonfinite/ folder again and name the first bad module")
    parser.add_argument("--output", type=Path, help="folder for the run (default: runs/<name of the config>)")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on from the newest checkpoint of --output, or from a given one")
    parser.add_argument("--largest-batch", action="store_true", help="don't train: measure the largest train.batch_size that fits")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that differ from the file")
    args = parser.parse_intermixed_args(argv)
    if args.largest_batch and (args.output or args.resume or args.replay):
        parser.error("--largest-batch only measures: it goes with --config and key.path=value")
    return args


def run(args: argparse.Namespace) -> None:
    if args.replay is not None:
        from detection.nonfinite import replay

        print(replay(args.replay))
        return
    from detection.alternating import train_alternating
    from detection.config import load_detection_config
    from detection.train import train

    config = load_detection_config(args.config, args.overrides)
    if args.largest_batch:
        from detection.largest_batch import largest_batch

        largest_batch(config)
        return
    by_protocol = {"joint": train, "alternating": train_alternating}[config.train.protocol]
    result = by_protocol(config, args.output or Path("runs") / args.config.stem, resume=args.resume)
    print(f"{result.primary} {result.metrics[result.primary]:.3f}")
    print(f"weights {result.weights}")
    print(f"drawn detections {result.output / 'samples'}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)  # before torch is imported: --help answers at once
    from resbackbone.runtime.cli import run_tool

    return run_tool(run, args)


if __name__ == "__main__":
    sys.exit(main())
