"""Print Table 1 of a network: python tools/describe.py NAME [--input-size 224] [--variant v1] [--weights W [--images I [--plot P.png]]]"""

from __future__ import annotations

import argparse
import sys


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="describe",
        description="Each stage's output, parameters and multiply-adds, as in the paper's Table 1; layer responses, as in Figure 7.",
    )
    parser.add_argument("name", metavar="NAME", help="a backbone such as resnet50, timm:NAME, torchvision:NAME or MODULE:NAME")
    parser.add_argument("--input-size", type=int, help="image side in pixels (default: what it was designed for, 224 or 32)")
    parser.add_argument(
        "--variant", default="v1", help="v1: the paper's own (default); v1.5: torchvision's, with a bottleneck's stride in its 3x3; v2"
    )
    parser.add_argument("--shortcut", help="A, B or C (default: the network's own)")
    parser.add_argument("--weights", help="see whether these fit: a file of any format, torchvision, or timm")
    parser.add_argument("--images", help="a folder, or an .npz with images and labels: print each 3x3 layer's response to them")
    parser.add_argument("--limit", type=int, default=128, help="how many of the images (default 128)")
    parser.add_argument("--plot", metavar="P.png", help="draw the responses there")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    from resbackbone.analysis import describe, whole_network

    print(describe(args.name, input_size=args.input_size, variant=args.variant, shortcut=args.shortcut, weights=args.weights))
    if args.images:
        from resbackbone.responses import describe_responses

        net = whole_network(args.name, args.variant, args.shortcut, args.weights)
        print(describe_responses(net, args.images, input_size=args.input_size, limit=args.limit, plot=args.plot))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)  # before torch is imported: --help answers at once
    from resbackbone.runtime.cli import run_tool

    return run_tool(run, args)


if __name__ == "__main__":
    sys.exit(main())
