"""VOC's figures: python tools/eval_voc.py --weights W [--config C] [key=value ...] | --devkit D [--image-set S] --detections J"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval_voc", description="AP per class, 11-point and area, and COCO's beside them.")
    parser.add_argument("--weights", nargs="+", action="extend", default=[], metavar="W", help="of a run, or of several as an ensemble")
    parser.add_argument("--config", type=Path, help="the run's YAML file (default: the config the weights carry)")
    parser.add_argument("--devkit", type=Path, metavar="D", help="VOCdevkit, the folder that holds it, a VOC20xx, or one with Annotations/")
    parser.add_argument("--image-set", metavar="S", help="VOC2012/test, test, or a text file of image ids (default: every annotation)")
    parser.add_argument("--detections", type=Path, metavar="J", help="rows {image_id, category, score, bbox}; no model, no images")
    parser.add_argument("--iou", type=float, default=0.5, help="with --detections: the threshold of 11-point and area (default: 0.5)")
    parser.add_argument("--engine", choices=("auto", "pycocotools", "hotcoco"), help="who computes COCO's; the figures are the same")
    parser.add_argument("--output", type=Path, help="folder for eval/metrics.json, report/, and with --weights eval/detections.json")
    parser.add_argument("--report", type=Path, metavar="DIR", help="folder for index.html, which shows the errors (default: OUTPUT/report)")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="more detections, or a run's folder, beside these in the report")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="with --weights: settings that differ")
    args = parser.parse_intermixed_args(argv)
    args.overrides += [text for text in args.weights if "=" in text and not Path(text).exists()]
    args.weights = [Path(text) for text in args.weights if text not in args.overrides]
    if (not args.weights) == (args.detections is None) or (args.detections is None) != (args.devkit is None):
        parser.error("give --weights, or --devkit and --detections")
    if (args.config or args.overrides) if not args.weights else (args.image_set or args.iou != 0.5):
        parser.error("--config and key.path=value go with --weights, --image-set and --iou with --detections")
    return args


def run(args: argparse.Namespace) -> None:
    from detection.evaluation.report.report import evaluate_voc_files
    from detection.evaluation.voc import format_voc

    def show(figures: dict[str, float]) -> None:
        print(format_voc(figures, iou=args.iou))

    places = {"output": args.output, "report": args.report, "compare": args.compare, "show": show, "wrote": print}
    if args.weights:
        from detection.predict import resolve_configs
        from detection.score import evaluate_weights

        given = [*args.overrides, *([f"eval.engine={args.engine}"] if args.engine else [])]
        evaluate_weights(resolve_configs(args.config, args.weights, given), args.weights, metric="voc", **places)
    else:
        evaluate_voc_files(args.devkit, args.image_set, args.detections, iou=args.iou, engine=args.engine or "auto", **places)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)  # before torch is imported: --help answers at once
    from resbackbone.runtime.cli import run_tool

    return run_tool(run, args)


if __name__ == "__main__":
    sys.exit(main())
