"""VOC's figures: python tools/eval_voc.py --weights W [--config C] [key=value ...] | --devkit D [--image-set S] --detections J"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from resbackbone.runtime.cli import run_tool


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval_voc", description="AP per class, 11-point and area, and COCO's beside them.")
    parser.add_argument("--weights", type=Path, help="model_final.safetensors or a checkpoint of a run")
    parser.add_argument("--config", type=Path, help="the run's YAML file (default: the config the weights carry)")
    parser.add_argument("--devkit", type=Path, metavar="D", help="VOCdevkit, the folder that holds it, a VOC20xx, or one with Annotations/")
    parser.add_argument("--image-set", metavar="S", help="VOC2012/test, test, or a text file of image ids (default: every annotation)")
    parser.add_argument("--detections", type=Path, metavar="J", help="rows {image_id, category, score, bbox}; no model, no images")
    parser.add_argument("--iou", type=float, default=0.5, help="with --detections: the threshold of 11-point and area (default: 0.5)")
    parser.add_argument("--output", type=Path, help="folder for eval/metrics.json, and with --weights eval/detections.json")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="with --weights: settings that differ")
    args = parser.parse_intermixed_args(argv)
    if (args.weights is None) == (args.detections is None) or (args.detections is None) != (args.devkit is None):
        parser.error("give --weights, or --devkit and --detections")
    if (args.config or args.overrides) if args.weights is None else (args.image_set or args.iou != 0.5):
        parser.error("--config and key.path=value go with --weights, --image-set and --iou with --detections")
    return args


def run(argv: list[str] | None = None) -> None:
    args = parse(argv)
    from detection.evaluation.results import write_metrics
    from detection.evaluation.voc import format_voc

    if args.weights is not None:
        from detection.predict import resolve_config
        from detection.score import evaluate_weights

        figures = evaluate_weights(resolve_config(args.config, args.weights, args.overrides), args.weights, output=args.output)
    else:
        from detection.evaluation.voc_files import evaluate_voc_file

        figures = evaluate_voc_file(args.devkit, args.image_set, args.detections, iou=args.iou)
        if args.output is not None:
            write_metrics(args.output, figures)
    if os.environ.get("RANK", "0") == "0":  # torchrun starts several of us
        print(format_voc(figures, iou=args.iou) + (f"\nfigures {args.output / 'eval' / 'metrics.json'}" if args.output else ""))


def main(argv: list[str] | None = None) -> int:
    return run_tool(run, argv)


if __name__ == "__main__":
    sys.exit(main())
