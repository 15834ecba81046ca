"""Every problem of a data set in one pass: its annotations as the trainer reads them, then every image file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from resbackbone.errors import InputError

from . import format_module, load_source, scan_source
from .images import UnreadableImage, image_header, read_image
from .problems import ACTIONS, POLICY, Problem, ProblemLog
from .source import FolderSource, Source, check_same_classes, wrong_size_message

_THREADS = 8  # decoders release Python's lock
_LISTED = 20  # problems printed one by one; the JSON has all


@dataclass
class CheckReport:
    """What was looked at, and everything found."""

    parts: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        """Whether training would refuse."""
        return any(problem.action == "refuse" for problem in self.problems)

    def add(self, name: str, source: Source | None, log: ProblemLog, *, decode: bool = True) -> None:
        """Take in one split: what its annotations had, and what its images have."""
        if source is not None:
            check_images(source, log, decode=decode)
        self.parts.append(f"{name}: {source.annotations.summary() if source is not None else 'nothing could be read'}")
        self.problems += log.found

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        kinds = Counter(problem.kind for problem in self.problems)
        return {
            "checked": self.parts,
            "would_refuse": self.refused,
            "kinds": {kind: {"count": count, "training": POLICY[kind]} for kind, count in sorted(kinds.items())},
            "policy": ACTIONS,
            "problems": [{**asdict(problem), "training": problem.action} for problem in self.problems],
        }


def check_coco(json_path: Path, images: Path, *, exif: bool = True, decode: bool = True) -> CheckReport:
    """Any COCO JSON beside any image folder."""
    from .coco import scan_files

    for path, what in ((json_path, json_path.is_file()), (images, images.is_dir())):
        if not what:
            raise InputError(f"{path}: there is no such {'file' if path == json_path else 'folder'}")
    report = CheckReport()
    report.add(str(json_path), *scan_files(json_path, images, masks=None, exif=exif), decode=decode)
    return report


def check_voc(devkit: Path, *, exif: bool = True, decode: bool = True) -> CheckReport:
    """Every year of a VOC devkit: all images its sets list, or every annotation where a year has no sets."""
    from .voc import listed_images, scan_images, year_folders

    years = year_folders(devkit)
    if not years:
        raise InputError(f"{devkit}: no folder with Annotations/ here or in VOCdevkit/; give the devkit, what holds it, or one year")
    report = CheckReport()
    for year in years:
        report.add(str(year), *scan_images([(year, image_id) for image_id in listed_images(year)], exif=exif), decode=decode)
    return report


def check_splits(
    kind: str,
    root: Path | str | None,
    splits: Sequence[str | tuple[str, ...]],
    *,
    masks: bool = False,
    images: str | None = None,
    exif: bool = True,
    decode: bool = True,
) -> CheckReport:
    """The splits of a run as its config names them, a format of one's own included, and whether their classes agree."""
    report, sources = CheckReport(), []
    for split in splits:
        name = split if isinstance(split, str) else " + ".join(split)
        if hasattr(format_module(kind), "scan"):
            source, log = scan_source(kind, root, split, masks=masks, images=images, exif=exif)
        else:
            source, log = load_source(kind, root, split, masks=masks, images=images, exif=exif), ProblemLog()
        report.add(name, source, log, decode=decode)
        sources += [source] if source is not None else []
    for other in sources[1:]:
        try:
            check_same_classes(sources[0], other)
        except InputError as error:
            report.problems.append(Problem(kind="unknown_category", message=str(error), file=str(root)))
    return report


def check_images(source: Source, log: ProblemLog, *, decode: bool) -> None:
    """Note in `log` every image that cannot be read, has another size than stated, holds no object, or is unusual."""
    look = partial(_look_at_file, source) if isinstance(source, FolderSource) else partial(_look_at_drawn, source)
    objects = source.annotations.num_objects()
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda index: list(look(index, decode=decode)), range(len(objects)), chunksize=64)
        for index, rows in enumerate(found):
            image = source.annotations.image_id(index)
            for kind, message in rows:
                log.add(kind, message, file=source.annotations.file_name(index), image=image)
            if not objects[index]:
                log.add(
                    "empty_image",
                    "it has no object to learn from; data.empty_images decides whether training sees it",
                    file=source.annotations.file_name(index),
                    image=image,
                )


def _look_at_file(source: FolderSource, index: int, *, decode: bool) -> Iterable[tuple[str, str]]:
    """(kind, message) of what is wrong with one image file."""
    path = source.folder / source.annotations.file_name(index)
    stated = tuple(source.annotations.sizes[index].tolist())
    try:
        header = image_header(path)
        found = header.upright_size if source.exif else (header.height, header.width)
        if header.oddities:
            yield "unusual_image", ", ".join(header.oddities)
        if decode or not header.height:
            found = read_image(path, exif=source.exif).shape[:2]
    except UnreadableImage as error:
        yield "unreadable_image", str(error)
        return
    if found != stated:
        yield "wrong_size", wrong_size_message(path, stated=stated, found=found)


def _look_at_drawn(source: Source, index: int, *, decode: bool) -> Iterable[tuple[str, str]]:
    """The same for a source that does not keep its images as files in a folder."""
    if not decode:
        return
    stated = tuple(source.annotations.sizes[index].tolist())
    try:
        found = source.read_image(index).shape[:2]
    except UnreadableImage as error:
        yield "unreadable_image", str(error)
        return
    except InputError as error:
        yield "wrong_size", str(error)
        return
    if found != stated:
        yield "wrong_size", wrong_size_message(Path(source.annotations.file_name(index)), stated=stated, found=found)


def write_report(report: CheckReport, path: Path) -> None:
    """The whole report as JSON. Raises InputError where the file cannot be written."""
    try:
        path.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False))
    except OSError as error:
        raise InputError(f"{path}: the report cannot be written ({error.strerror}); name another file with --output") from None


def print_report(report: CheckReport) -> None:
    """A table by kind with what training does about each, then the first problems one by one."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    console = Console(soft_wrap=True, highlight=False)
    for part in report.parts:
        console.print(escape(part))
    if not report.problems:
        console.print("no problem found")
        return
    table = Table("problem", "found", "training", Column("for example", overflow="fold"))
    for kind, count in sorted(Counter(problem.kind for problem in report.problems).items()):
        example = next(problem for problem in report.problems if problem.kind == kind)
        table.add_row(kind, str(count), POLICY[kind], escape(str(example)))
    Console(highlight=False).print(table)
    worst_first = sorted((problem for problem in report.problems if problem.action != "ok"), key=lambda problem: problem.action != "refuse")
    for problem in worst_first[:_LISTED]:
        console.print(f"{problem.action}: {escape(str(problem))}")
    if len(worst_first) > _LISTED:
        console.print(f"… and {len(worst_first) - _LISTED} more, in the JSON")
    for action in sorted({problem.action for problem in report.problems}):
        console.print(f"{action} = {ACTIONS[action]}")
