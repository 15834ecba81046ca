"""COCO's figures: python tools/eval_coco.py --weights W [--config C] [key=value ...] | --annotations A.json --detections D.json"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from resbackbone.runtime.cli import run_tool


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="eval_coco", description="Run a detector on its validation split, or score a detections file.")
    parser.add_argument("--weights", type=Path, help="model_final.safetensors or a checkpoint of a run")
    parser.add_argument("--config", type=Path, help="the run's YAML file (default: the config the weights carry)")
    parser.add_argument("--annotations", type=Path, metavar="A.json", help="ground truth in COCO's format")
    parser.add_argument("--detections", type=Path, metavar="D.json", help="detections in COCO's results format; no model, no images")
    parser.add_argument("--iou-type", choices=("bbox", "segm", "keypoints"), default="bbox", help="what --detections holds (default: bbox)")
    parser.add_argument("--engine", choices=("auto", "pycocotools", "hotcoco"), default="auto", help="the figures are the same")
    parser.add_argument("--output", type=Path, help="folder for eval/detections.json and eval/metrics.json")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="with --weights: settings that differ")
    return parser, parser.parse_intermixed_args(argv)


def run(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    if (args.weights is None) == (args.detections is None) or (args.detections is None) != (args.annotations is None):
        parser.error("give --weights, or --annotations and --detections")
    from detection.evaluation.coco import evaluate_coco, format_coco

    if args.weights is not None:
        from detection.predict import resolve_config
        from detection.score import evaluate_weights

        config = resolve_config(args.config, args.weights, [f"eval.engine={args.engine}", *args.overrides])
        metrics = evaluate_weights(config, args.weights, output=args.output)
        print(format_coco(metrics))
        if config.model.mask:
            print(format_coco({name.removeprefix("segm/"): value for name, value in metrics.items() if name.startswith("segm/")}))
        return
    from detection.evaluation.results import write_metrics

    metrics = evaluate_coco(args.annotations, args.detections, iou_type=args.iou_type, engine=args.engine)
    print(format_coco(metrics, iou_type=args.iou_type))
    if args.output is not None:
        print(f"figures {write_metrics(args.output, metrics)}")


def main(argv: list[str] | None = None) -> int:
    return run_tool(run, argv)


if __name__ == "__main__":
    sys.exit(main())
