"""Top-1 and top-5: python tools/eval_cls.py --weights W [W ...] [--config C] [--mode 1crop|10crop|multiscale|all] [key=value ...]"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

MODES = ("1crop", "10crop", "multiscale")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval_cls", description="Top-1 and top-5 on the validation split; several weights vote together.")
    files = "model_final.safetensors, or a checkpoint's folder; several vote"
    parser.add_argument("--weights", type=Path, nargs="+", required=True, metavar="W", help=files)
    parser.add_argument("--config", type=Path, help="a YAML file (default: the config the weights carry)")
    parser.add_argument("--mode", choices=(*MODES, "all"), help="how many views of an image are averaged (default: the config's eval.mode)")
    recompute = "first compute batch norm's statistics anew over train.bn_images training images, and judge the file with them"
    parser.add_argument("--recompute-bn", type=Path, metavar="OUT.safetensors", help=recompute)
    parser.add_argument("--output", type=Path, help="folder for eval/metrics.json")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that differ")
    args = parser.parse_intermixed_args(argv)
    settings = [path for path in args.weights if re.match(r"\w+(\.\w+)+=", str(path))]  # --weights takes every word that follows it
    args.overrides += map(str, settings)
    args.weights = [path for path in args.weights if path not in settings]
    if not args.weights:
        parser.error(f"--weights names no file, only settings ({', '.join(map(str, settings))})")
    return args


def run(args: argparse.Namespace) -> None:
    from resbackbone.classification.judge import judge
    from resbackbone.runtime.atomic import write_atomically
    from resbackbone.runtime.log import to_json

    modes = MODES if args.mode == "all" else (args.mode,)
    figures = judge(args.weights, args.config, args.overrides, modes, recomputed=args.recompute_bn)
    if os.environ.get("RANK", "0") != "0":  # torchrun starts several of us
        return
    for mode, found in figures.items():
        print(f"{mode}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    if args.recompute_bn is not None:
        print(f"weights {args.recompute_bn}")
    if args.output is not None:
        write_atomically(args.output / "eval" / "metrics.json", to_json(figures, indent=2).encode())
        print(f"figures {args.output / 'eval' / 'metrics.json'}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)  # before torch is imported: --help answers at once
    from resbackbone.runtime.cli import run_tool

    return run_tool(run, args)


if __name__ == "__main__":
    sys.exit(main())
