"""Convert weights: python tools/convert_weights.py SRC DST --to resbackbone|torchvision|timm|detectron2 [--name NAME] [--variant V]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="convert_weights",
        description="Reads safetensors, torch files, detectron2's .pkl, Caffe's .caffemodel and Keras's .h5; nothing in them is executed.",
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="a weights file of any of these formats")
    parser.add_argument("target", metavar="DST", type=Path, help="the file to write")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="resbackbone, torchvision, timm or detectron2")
    parser.add_argument("--name", help="the network, where the file doesn't tell: resnet50, resnet20_cifar …")
    parser.add_argument("--variant", help="v1, v1.5 or v2, where the file doesn't tell")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    from resbackbone.convert import convert_weights

    print(convert_weights(args.source, args.target, to=args.to, name=args.name, variant=args.variant))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)  # before torch is imported: --help answers at once
    from resbackbone.runtime.cli import run_tool

    return run_tool(run, args)


if __name__ == "__main__":
    sys.exit(main())
