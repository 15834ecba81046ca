"""Find every data problem: python tools/check_data.py --config C | --coco A.json --images DIR | --voc DEVKIT [--output FILE]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="check_data", description="List every problem of a data set, and what training does about each.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="a run's YAML file: checks its training and validation data")
    what.add_argument("--coco", type=Path, metavar="A.json", help="a COCO instances file")
    what.add_argument("--voc", type=Path, metavar="DEVKIT", help="a VOCdevkit, the folder that holds it, or one year of it")
    parser.add_argument("--images", type=Path, metavar="DIR", help="the images of --coco (default: the folder of the JSON)")
    parser.add_argument("--output", type=Path, default=Path("check_data.json"), help="the report as JSON (default: check_data.json)")
    parser.add_argument("--headers-only", action="store_true", help="read image headers only; misses damage further on, far sooner done")
    parser.add_argument("--no-exif", action="store_true", help="with --coco or --voc: leave photos as stored, as data.exif=false does")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="with --config: settings that differ from the file")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> int:
    from detection.data.check import check_coco, check_splits, check_voc, print_report, write_report

    how = {"decode": not args.headers_only, "exif": not args.no_exif}
    if args.config:
        from detection.config import load_detection_config

        config = load_detection_config(args.config, args.overrides)
        data, how["exif"] = config.data, config.data.exif
        report = check_splits(data.kind, data.root, (data.train, data.val), masks=config.model.mask, images=data.images, **how)
    elif args.coco:
        report = check_coco(args.coco, args.images or args.coco.parent, **how)
    else:
        report = check_voc(args.voc, **how)
    print_report(report)
    write_report(report, args.output)
    print(f"report {args.output}")
    print("training would refuse this data" if report.refused else "training would accept this data")
    return 1 if report.refused else 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)  # before torch is imported: --help answers at once
    from resbackbone.runtime.cli import run_tool

    return run_tool(run, args)


if __name__ == "__main__":
    sys.exit(main())
