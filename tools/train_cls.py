"""Train a classifier: python tools/train_cls.py --config C.yaml [--output DIR] [--resume auto|PATH] [key.path=value ...]"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train_cls", description="Train and evaluate a classifier; everything lands in --output.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="a YAML file; configs/imagenet, cifar and imagenette have examples")
    what.add_argument("--replay", type=Path, metavar="DIR", help="run the batch of a nonfinite/ folder again and name the first bad module")
    parser.add_argument("--output", type=Path, help="folder for the run (default: runs/<name of the config>)")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on from the newest checkpoint of --output, or from a given one")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that differ from the file")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> None:
    if args.replay is not None:
        from resbackbone.classification.nonfinite import replay

        print(replay(args.replay))
        return
    from resbackbone.classification.config import load_classification_config
    from resbackbone.classification.train import train

    config = load_classification_config(args.config, args.overrides)
    result = train(config, args.output or Path("runs") / args.config.stem, resume=args.resume)
    if os.environ.get("RANK", "0") == "0":  # torchrun starts several of us
        print(f"top-1 {result.metrics['top1']:.4f}, top-5 {result.metrics['top5']:.4f}")
        print(f"weights {result.weights}")
        print(f"error curves {result.output / 'curves.png'}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)  # before torch is imported: --help answers at once
    from resbackbone.runtime.cli import run_tool

    return run_tool(run, args)


if __name__ == "__main__":
    sys.exit(main())
