"""COCO's figures: python tools/eval_coco.py --weights W [--config C] [key=value ...] | --annotations A.json --detections D.json"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval_coco", description="Run a detector on its validation split, or score a detections file.")
    parser.add_argument("--weights", nargs="+", action="extend", default=[], metavar="W", help="of a run, or of several as an ensemble")
    parser.add_argument("--config", type=Path, help="the run's YAML file (default: the config the weights carry)")
    parser.add_argument("--annotations", type=Path, metavar="A.json", help="ground truth in COCO's format")
    parser.add_argument("--detections", type=Path, metavar="D.json", help="detections in COCO's results format; no model, no images")
    parser.add_argument("--iou-type", choices=("bbox", "segm", "keypoints"), help="what to score of --detections (default: bbox)")
    parser.add_argument("--engine", choices=("auto", "pycocotools", "hotcoco"), help="who computes; the figures are the same")
    parser.add_argument("--output", type=Path, help="folder for eval/metrics.json, report/, and with --weights eval/detections.json")
    parser.add_argument("--report", type=Path, metavar="DIR", help="folder for index.html, which shows the errors (default: OUTPUT/report)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="with --detections: image folder, for the report")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="more detections, or a run's folder, beside these in the report")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="with --weights: settings that differ")
    args = parser.parse_intermixed_args(argv)
    args.overrides += [text for text in args.weights if "=" in text and not Path(text).exists()]
    args.weights = [Path(text) for text in args.weights if text not in args.overrides]
    if (not args.weights) == (args.detections is None) or (args.detections is None) != (args.annotations is None):
        parser.error("give --weights, or --annotations and --detections")
    if (args.config or args.overrides) if not args.weights else (args.iou_type or args.images):
        parser.error("--config and key.path=value go with --weights, --iou-type and --images with --detections")
    return args


def run(args: argparse.Namespace) -> None:
    from detection.evaluation.coco import format_coco, format_run
    from detection.evaluation.report.report import evaluate_coco_files

    places = {"output": args.output, "report": args.report, "compare": args.compare, "wrote": print}
    if args.weights:
        from detection.predict import resolve_configs
        from detection.score import evaluate_weights

        given = [*args.overrides, *([f"eval.engine={args.engine}"] if args.engine else [])]
        evaluate_weights(resolve_configs(args.config, args.weights, given), args.weights, show=lambda one: print(format_run(one)), **places)
    else:
        kind, engine = args.iou_type or "bbox", args.engine or "auto"
        places |= {"annotations": args.annotations, "detections": args.detections, "images": args.images}
        evaluate_coco_files(iou_type=kind, engine=engine, show=lambda one: print(format_coco(one, iou_type=kind)), **places)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)  # before torch is imported: --help answers at once
    from resbackbone.runtime.cli import run_tool

    return run_tool(run, args)


if __name__ == "__main__":
    sys.exit(main())
