"""Write tar shards for streaming: python tools/make_shards.py --kind folder --root DATA --split train --output SHARDS [--short-side 256]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make_shards", description="Images and labels into tar files that training reads front to back.")
    parser.add_argument("--kind", choices=("folder", "ilsvrc", "cifar10"), default="folder", help="how the data lies now (default: folder)")
    parser.add_argument("--root", type=Path, required=True, help="what data.root would be")
    parser.add_argument("--split", required=True, help="train, val …; the shards go into a folder of this name below --output")
    parser.add_argument("--output", type=Path, required=True, help="what data.root becomes, with data.kind=shards")
    parser.add_argument("--per-shard", type=int, default=1000, metavar="N", help="images in a shard (default: 1000)")
    parser.add_argument(
        "--short-side", type=int, metavar="PX", help="shrink images whose shorter side is longer; default: bytes as they are"
    )
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs that were shrunk (default: 90)")
    parser.add_argument("--seed", type=int, default=0, help="of the order that images are written in (default: 0)")
    parser.add_argument("--keep-order", action="store_true", help="don't shuffle, as for a validation split")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    from resbackbone.classification.shards import write_shards
    from resbackbone.classification.sources import load_source

    source = load_source(args.kind, args.root, args.split)
    folder = args.output / args.split
    seed = None if args.keep_order else args.seed
    index = write_shards(source, folder, per_shard=args.per_shard, short_side=args.short_side, quality=args.quality, seed=seed)
    print(f"{int(index.counts.sum())} images of {len(index.classes)} classes in {len(index.names)} shards, {sum(index.sizes) / 1e6:.1f} MB")
    print(f"shards {folder}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)  # before torch is imported: --help answers at once
    from resbackbone.runtime.cli import run_tool

    return run_tool(run, args)


if __name__ == "__main__":
    sys.exit(main())
