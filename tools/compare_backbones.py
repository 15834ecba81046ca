"""Compare backbones: python tools/compare_backbones.py --config C --backbones vgg16 resnet50=W [--seeds 0 1] [key=value ...]"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare_backbones",
        description="Train a detector on each backbone by one recipe and budget, and say what each gains. Started again, it goes on.",
    )
    parser.add_argument("--config", type=Path, required=True, help="the recipe: a YAML file, whose backbone each of --backbones replaces")
    weights = "what to compare; weights: null, a file, torchvision or timm"
    parser.add_argument("--backbones", nargs="+", required=True, metavar="NAME[=WEIGHTS]", help=weights)
    parser.add_argument("--seeds", nargs="+", default=["0", "1"], metavar="S", help="of each backbone's trainings (default: 0 1)")
    parser.add_argument("--baseline", metavar="NAME", help="whose figure the gains count from (default: vgg16 if it takes part)")
    parser.add_argument("--own", nargs=2, action="append", default=[], metavar=("NAME", "K=V"), help="a setting for one backbone alone")
    parser.add_argument("--output", type=Path, help="folder for runs/ and compare.json, .md, .png (default: runs/compare_<config>)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings of the recipe that differ from the file")
    args = parser.parse_intermixed_args(argv)
    sections = ("model.", "data.", "train.", "eval.")  # --backbones and --seeds take every word that follows them
    settings = [text for text in [*args.backbones, *args.seeds] if text.startswith(sections) and "=" in text]
    args.overrides += settings
    args.backbones, args.seeds = ([text for text in given if text not in settings] for given in (args.backbones, args.seeds))
    try:
        args.seeds = [int(text) for text in args.seeds]
    except ValueError as error:
        parser.error(f"argument --seeds: {error}; give whole numbers, such as --seeds 0 1")
    return args


def run(args: argparse.Namespace) -> None:
    from detection.compare import compare, parse_contenders

    output = args.output or Path("runs") / f"compare_{args.config.stem}"
    given = {"seeds": args.seeds, "overrides": args.overrides, "baseline": args.baseline}
    paths = compare(args.config, parse_contenders(args.backbones, args.own), output, **given)
    if os.environ.get("RANK", "0") == "0":  # torchrun starts several of us
        print(paths["md"].read_text())
        print("\n".join(str(path) for path in paths.values()))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)  # before torch is imported: --help answers at once
    from resbackbone.runtime.cli import run_tool

    return run_tool(run, args)


if __name__ == "__main__":
    sys.exit(main())
