"""VOC's figures: python tools/eval_voc.py --weights W [--config C] [key=value ...] | --devkit D --image-set S --detections J"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from resbackbone.runtime.cli import run_tool


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="eval_voc", description="AP per class, 11-point and area, and COCO's beside them.")
    parser.add_argument("--weights", type=Path, help="model_final.safetensors or a checkpoint of a run")
    parser.add_argument("--config", type=Path, help="the run's YAML file (default: the config the weights carry)")
    parser.add_argument("--devkit", type=Path, metavar="D", help="VOCdevkit, its parent, a VOC20xx, or any folder with Annotations/")
    parser.add_argument("--image-set", metavar="S", help="VOC2012/test, test, or a text file of image ids")
    parser.add_argument("--detections", type=Path, metavar="J", help="rows {image_id, category, score, bbox}; no model, no images")
    parser.add_argument("--output", type=Path, help="folder for eval/detections.json and eval/metrics.json")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="with --weights: settings that differ")
    return parser, parser.parse_intermixed_args(argv)


def run(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    from_file = (args.devkit, args.image_set, args.detections)
    if (args.weights is None) == (args.detections is None) or (args.detections is not None and None in from_file):
        parser.error("give --weights, or --devkit, --image-set and --detections")
    from detection.evaluation.voc import format_voc

    if args.weights is not None:
        from detection.predict import resolve_config
        from detection.score import evaluate_weights

        print(format_voc(evaluate_weights(resolve_config(args.config, args.weights, args.overrides), args.weights, output=args.output)))
        return
    from detection.evaluation.results import write_metrics
    from detection.evaluation.voc_files import evaluate_voc_file

    figures = evaluate_voc_file(args.devkit, args.image_set, args.detections)
    print(format_voc(figures))
    if args.output is not None:
        print(f"figures {write_metrics(args.output, figures)}")


def main(argv: list[str] | None = None) -> int:
    return run_tool(run, argv)


if __name__ == "__main__":
    sys.exit(main())
