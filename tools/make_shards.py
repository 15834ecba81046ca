"""Write tar shards for streaming: python tools/make_shards.py --kind folder --root DATA --split train --output SHARDS [--short-side 256]"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make_shards", description="Images and labels into tar files that training reads front to back.")
    parser.add_argument("--kind", choices=("folder", "ilsvrc", "cifar10"), default="folder", help="how the data lies now (default: folder)")
    parser.add_argument("--root", type=Path, help="what data.root would be")
    parser.add_argument("--split", help="train, val …; the shards go into a folder of this name below --output")
    parser.add_argument("--output", help="what data.root becomes, with data.kind=shards")
    parser.add_argument("--per-shard", type=int, default=1000, metavar="N", help="images in a shard (default: 1000)")
    shrink = "shrink images whose shorter side is longer; default: bytes as they are"
    parser.add_argument("--short-side", type=int, metavar="PX", help=shrink)
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs that were shrunk (default: 90)")
    parser.add_argument("--seed", type=int, default=0, help="of the order that images are written in (default: 0)")
    parser.add_argument("--keep-order", action="store_true", help="don't shuffle, as for a validation split")
    parser.add_argument("--unreadable", choices=("stop", "skip"), default="stop", help="what to do at a damaged image (default: stop)")
    parser.add_argument("--index", type=Path, metavar="DIR", help="only write the index.json of the webdataset tars of a split in DIR")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="with --index: class names, one a line (default: their numbers)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    missing = [name for name in ("root", "split", "output") if args.index is None and getattr(args, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(f'--{name}' for name in missing)}; or --index")
    return args


def run(args: argparse.Namespace) -> None:
    from resbackbone.classification.shards import index_shards, write_shards
    from resbackbone.classification.sources import load_source
    from resbackbone.classification.stores import local_folder

    report, left_out = partial(print, flush=True), 0
    if args.index is not None:
        folder, index = args.index, index_shards(args.index, args.classes, report=report)
    else:
        folder, source = local_folder(args.output) / args.split, load_source(args.kind, args.root, args.split)
        how = {"skip_unreadable": args.unreadable == "skip", "seed": None if args.keep_order else args.seed, "report": report}
        index = write_shards(source, folder, per_shard=args.per_shard, short_side=args.short_side, quality=args.quality, **how)
        left_out = len(source.labels) - index.images
    ending = f"; {left_out} could not be read and were left out" if left_out else ""
    print(f"{index.images} images of {len(index.classes)} classes in {len(index.names)} shards, {sum(index.sizes) / 1e6:.1f} MB{ending}")
    print(f"shards {folder}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)  # before torch is imported: --help answers at once
    from resbackbone.runtime.cli import run_tool

    return run_tool(run, args)


if __name__ == "__main__":
    sys.exit(main())
