"""COCO's figures: python tools/eval_coco.py --weights W [--config C] [key=value ...] | --annotations A.json --detections D.json"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from resbackbone.runtime.cli import run_tool


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval_coco", description="Run a detector on its validation split, or score a detections file.")
    parser.add_argument("--weights", type=Path, help="model_final.safetensors or a checkpoint of a run")
    parser.add_argument("--config", type=Path, help="the run's YAML file (default: the config the weights carry)")
    parser.add_argument("--annotations", type=Path, metavar="A.json", help="ground truth in COCO's format")
    parser.add_argument("--detections", type=Path, metavar="D.json", help="detections in COCO's results format; no model, no images")
    parser.add_argument("--iou-type", choices=("bbox", "segm", "keypoints"), help="what to score of --detections (default: bbox)")
    parser.add_argument("--engine", choices=("auto", "pycocotools", "hotcoco"), help="who computes; the figures are the same")
    parser.add_argument("--output", type=Path, help="folder for eval/metrics.json, and with --weights eval/detections.json")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="with --weights: settings that differ")
    args = parser.parse_intermixed_args(argv)
    if (args.weights is None) == (args.detections is None) or (args.detections is None) != (args.annotations is None):
        parser.error("give --weights, or --annotations and --detections")
    if (args.config or args.overrides) if args.weights is None else args.iou_type:
        parser.error("--config and key.path=value go with --weights, --iou-type with --detections")
    return args


def run(argv: list[str] | None = None) -> None:
    args = parse(argv)
    from detection.evaluation.coco import evaluate_coco, format_coco, format_run
    from detection.evaluation.results import write_metrics

    if args.weights is not None:
        from detection.predict import resolve_config
        from detection.score import evaluate_weights

        overrides = [*([f"eval.engine={args.engine}"] if args.engine else []), *args.overrides]
        lines = format_run(evaluate_weights(resolve_config(args.config, args.weights, overrides), args.weights, output=args.output))
    else:
        kind = args.iou_type or "bbox"
        figures = evaluate_coco(args.annotations, args.detections, iou_type=kind, engine=args.engine or "auto")
        lines = format_coco(figures, iou_type=kind)
        if args.output is not None:
            write_metrics(args.output, figures)
    if os.environ.get("RANK", "0") == "0":  # torchrun starts several of us
        print(lines + (f"\nfigures {args.output / 'eval' / 'metrics.json'}" if args.output else ""))


def main(argv: list[str] | None = None) -> int:
    return run_tool(run, argv)


if __name__ == "__main__":
    sys.exit(main())
