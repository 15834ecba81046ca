"""Export a network: python tools/export.py WEIGHTS --to onnx|torch-export [--output F] [--images I ...] [key.path=value ...]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="export",
        description="A detector or backbone that runs without this package; checked against the original, refused if it differs.",
    )
    parser.add_argument(
        "weights", metavar="WEIGHTS", type=Path, help="a run's model_final.safetensors or checkpoint, or a backbone's weights"
    )
    parser.add_argument("--to", required=True, metavar="FORMAT", help="onnx or torch-export")
    parser.add_argument("--output", type=Path, metavar="F", help="the file to write (default: WEIGHTS with the ending .onnx or .pt2)")
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="I",
        help="images, folders or globs to check it on; of many, 8 are taken",
    )
    parser.add_argument("--name", help="of a backbone whose file doesn't tell: resnet50, resnet20_cifar …")
    parser.add_argument("--variant", help="v1, v1.5 or v2, where a backbone's file doesn't tell")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="of a detector: settings that differ from those it carries")
    args = parser.parse_intermixed_args(argv)
    settings = [text for text in args.images if "=" in text and not Path(text).exists()]  # --images takes all that follows it
    args.images, args.overrides = [text for text in args.images if text not in settings], args.overrides + settings
    return args


def run(args: argparse.Namespace) -> None:
    from detection.export import export_weights

    options = {"output": args.output, "images": args.images, "overrides": args.overrides, "name": args.name, "variant": args.variant}
    print(export_weights(args.weights, to=args.to, **options))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)  # before torch is imported: --help answers at once
    from resbackbone.runtime.cli import run_tool

    return run_tool(run, args)


if __name__ == "__main__":
    sys.exit(main())
