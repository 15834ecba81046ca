"""Print Table 1 of a network: python tools/describe.py NAME [--input-size 224] [--variant v1] [--weights W]"""

from __future__ import annotations

import argparse
import sys

from resbackbone.runtime.cli import run_tool


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="describe", description="Each stage's output, parameters and multiply-adds, as in the paper's Table 1."
    )
    parser.add_argument("name", metavar="NAME", help="a backbone such as resnet50, timm:NAME, torchvision:NAME or MODULE:NAME")
    parser.add_argument("--input-size", type=int, default=224, help="image side in pixels (default 224)")
    parser.add_argument(
        "--variant", default="v1", help="v1: the paper's own (default); v1.5: torchvision's, with a bottleneck's stride in its 3x3"
    )
    parser.add_argument("--weights", help="see whether these fit: a file, torchvision, or timm")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def run(argv: list[str] | None = None) -> None:
    args = parse(argv)
    from resbackbone.analysis import describe

    print(describe(args.name, input_size=args.input_size, variant=args.variant, weights=args.weights))


def main(argv: list[str] | None = None) -> int:
    return run_tool(run, argv)


if __name__ == "__main__":
    sys.exit(main())
