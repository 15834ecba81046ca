"""Reports of what there is: a split and detections in its benchmark's format, or files alone; and the figures that go with these."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np

from detection.data.images import read_image
from detection.data.source import Source
from detection.evaluation.bootstrap import voc_verdicts
from detection.evaluation.coco import Engine, evaluate_coco, evaluate_coco_fully
from detection.evaluation.coco_truth import IouType
from detection.evaluation.evaluate import voc_figures, voc_rows_as_coco, voc_truth
from detection.evaluation.report.images import Pictures
from detection.evaluation.report.page import Run, write_report
from detection.evaluation.results import Record, coco_image_ids, coco_results, voc_results, write_metrics
from detection.evaluation.rows import Id, VocRow, read_rows, read_typed
from detection.evaluation.voc_files import annotated_images
from resbackbone.errors import InputError

Rows = Sequence[dict[str, Any]]
Show = Callable[[dict[str, float]], None]
Wrote = Callable[[str, Path], None]  # "figures" or "report", and the file


class _Image(msgspec.Struct, gc=False):
    id: Id
    file_name: str = ""
    height: int = 0
    width: int = 0


class _Images(msgspec.Struct):
    images: list[_Image]


def evaluate_coco_files(
    annotations: Path,
    detections: Path,
    *,
    iou_type: IouType = "bbox",
    engine: Engine = "auto",
    output: Path | None = None,
    report: Path | None = None,
    images: Path | None = None,
    compare: Path | None = None,
    show: Show = lambda figures: None,
    wrote: Wrote = lambda what, path: None,
) -> dict[str, float]:
    """`evaluate_coco`, and what it leaves: output/eval/metrics.json and, of boxes, the page report/index.html (else output/report's).

    images: the folder that the annotations' file names are in; without it boxes are drawn on blanks. compare: other detections, or the
    folder of a run. show: is given the figures before anything is written; wrote: each file
    after it was. Raises InputError for what is wrong in any of them.
    """
    folder = report_folder(report, output, compare=compare)
    if iou_type != "bbox":
        if report is not None or compare is not None:
            raise InputError(f"a report shows boxes, not {iou_type}; leave --report and --compare out, or take --iou-type bbox")
        folder = None
    pictures = None if folder is None else _listed_pictures(annotations, images)
    other = None if compare is None else _coco_run(annotations, compare, engine)
    figures = evaluate_coco(annotations, detections, iou_type=iou_type, engine=engine)
    show(figures)
    if output is not None:
        wrote("figures", write_metrics(output, figures))
    if folder is not None and pictures is not None:
        wrote("report", write_report(folder, _coco_run(annotations, detections, engine), pictures=pictures, other=other))
    return figures


def evaluate_voc_files(
    devkit: Path,
    image_set: str | None,
    detections: Path,
    *,
    iou: float = 0.5,
    engine: Engine = "auto",
    output: Path | None = None,
    report: Path | None = None,
    compare: Path | None = None,
    show: Show = lambda figures: None,
    wrote: Wrote = lambda what, path: None,
) -> dict[str, float]:
    """`evaluate_voc_file`, and the same left; pictures are those of the devkit that are there."""
    folder, source = report_folder(report, output, compare=compare), annotated_images(devkit, image_set)
    other = None if compare is None else judge_other(source, compare, iou=iou, engine=engine)
    figures = voc_figures(source, detections, iou=iou, engine=engine)
    show(figures)
    if output is not None:
        wrote("figures", write_metrics(output, figures))
    if folder is not None:
        name = run_name(detections)
        wrote("report", report_source(folder, source, detections, name=name, figures=figures, compare=other, iou=iou, engine=engine))
    return figures


def report_records(folder: Path, source: Source, records: Sequence[Record], *, name: str, **options: Any) -> Path:
    """`report_source` for a detector's records."""
    rows = voc_results(records, source) if source.metric == "voc" else coco_results(records, source)
    return report_source(folder, source, rows, name=name, **options)


def report_source(
    folder: Path,
    source: Source,
    detections: Path | Rows,
    *,
    name: str,
    figures: dict[str, float] | None = None,
    compare: Run | None = None,
    iou: float = 0.5,
    engine: Engine = "auto",
) -> Path:
    """Write folder/index.html for detections of a split, in COCO's or VOC's results format as source.metric says; returns its path.

    figures: more to show, such as those of masks; compare: other detections of this split (see `judge_other`); iou: VOC's threshold.
    Images that can't be read are drawn without. Raises InputError for rows that are wrong.
    """
    run = _source_run(source, detections, name, iou, engine)
    run.figures.update({key: value for key, value in (figures or {}).items() if key not in run.figures})
    annotations, position = source.annotations, {image_id: index for index, image_id in enumerate(coco_image_ids(source))}
    pictures = Pictures(
        names={image_id: annotations.file_name(index) for image_id, index in position.items()},
        sizes={image_id: (int(annotations.sizes[index, 0]), int(annotations.sizes[index, 1])) for image_id, index in position.items()},
        read=lambda image_id: source.read_image(position[image_id]),
    )
    return write_report(folder, run, pictures=pictures, other=compare)


def judge_other(source: Source, given: Path, *, iou: float = 0.5, engine: Engine = "auto") -> Run:
    """Other detections of a split, a file or a run's folder, for a report to compare with. Raises InputError for what is wrong in them."""
    return _source_run(source, results_file(given), run_name(given), iou, engine)


def report_folder(report: Path | None, output: Path | None, *, compare: Path | None = None) -> Path | None:
    """Where a report goes: the folder named for it, else report/ in the output folder, else nowhere.

    Raises InputError for something to compare without a report, and for a file in the folder's place.
    """
    if compare is not None and report is None and output is None:
        raise InputError(f"--compare {compare} is for the report, and none is written; name its folder with --report")
    if report is not None and report.exists() and not report.is_dir():
        raise InputError(f"--report {report}: this is a file; give a folder, which is made if it is not there")
    return report if report is not None or output is None else output / "report"


def results_file(given: Path) -> Path:
    """The detections of a run's folder, or the file itself. Raises InputError for a folder without."""
    if not given.is_dir():
        return given
    file = given / "eval" / "detections.json"
    if not file.is_file():
        raise InputError(f"{given}: there is no eval/detections.json in this folder; name a run's folder or a file of detections")
    return file


def run_name(given: Path) -> str:
    """What a report calls a run: its folder's name, with that above it for one seed of several, or the file's where it lies in no run's."""
    given = Path(os.path.abspath(given))
    if given.name == "detections.json" and given.parent.name == "eval":
        given = given.parents[1]
    elif not given.is_dir():
        return given.stem
    return f"{given.parent.name}/{given.name}" if given.name.startswith("seed_") else given.name


def _coco_run(annotations: Path, given: Path, engine: Engine) -> Run:
    evaluation = evaluate_coco_fully(annotations, results_file(given), engine=engine)
    return Run(name=run_name(given), evaluation=evaluation, figures=dict(evaluation.figures))


def _source_run(source: Source, detections: Path | Rows, name: str, iou: float, engine: Engine) -> Run:
    if source.metric == "voc":
        figures = voc_figures(source, detections, iou=iou, engine=engine)
        rows = voc_rows_as_coco(read_rows(detections, VocRow), source)
        area = voc_verdicts(voc_truth(source), detections, iou=iou)
        verdicts = {"mAP": area, "mAP_11_point": replace(area, metric="11-point")}
        evaluation = evaluate_coco_fully(source.annotations.to_coco(), rows, engine=engine)
        return Run(name=name, evaluation=evaluation, figures=figures, verdicts=verdicts, iou=iou)
    # COCO's own file where there is one, as evaluate_source takes it: areas and crowds are its own.
    truth: Path | dict[str, Any] = source.annotation_file or source.annotations.to_coco()
    given = detections if isinstance(detections, Path) else list(detections)
    evaluation = evaluate_coco_fully(truth, given, engine=engine, image_ids=coco_image_ids(source))
    return Run(name=name, evaluation=evaluation, figures=dict(evaluation.figures))


def _listed_pictures(annotations: Path, folder: Path | None) -> Pictures:
    if folder is not None and not folder.is_dir():
        raise InputError(f"--images {folder}: there is no such folder; leave it out for a report without pictures")
    listed = read_typed(annotations, _Images, "annotations").images
    names = {one.id: one.file_name for one in listed}
    read: Callable[[int], np.ndarray] | None = None if folder is None else lambda image_id: _read_inside(folder, names[image_id])
    return Pictures(names=names, sizes={one.id: (one.height, one.width) for one in listed}, read=read)


def _read_inside(folder: Path, name: str) -> np.ndarray:
    """Pixels of a file named by annotations from outside, which may name nothing but what is in the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not name or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise InputError(f"file name {name!r} is not inside the image folder")
    return read_image(folder / path)
