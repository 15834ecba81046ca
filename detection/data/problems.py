"""What can be wrong with a data set, and what training does about each kind: the words the trainer and the checker share."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from resbackbone.errors import InputError

Action = Literal["refuse", "skip", "clip", "ok"]

ACTIONS: dict[Action, str] = {
    "refuse": "training refuses to start (or stops where only reading the image shows it)",
    "skip": "training leaves it out and counts it: a box is dropped, an unreadable image is replaced by the next readable one of the "
    "epoch's set (in evaluation by a black one, so that its objects count as missed)",
    "clip": "training cuts the box to the image and counts it",
    "ok": "training reads it as it is",
}

POLICY: dict[str, Action] = {
    "not_json": "refuse",
    "not_xml": "refuse",
    "unsafe_xml": "refuse",  # entities or a DTD: an annotation needs neither, an attack needs both
    "missing_key": "refuse",
    "wrong_type": "refuse",
    "bad_size": "refuse",
    "duplicate_id": "refuse",
    "unknown_image": "refuse",
    "unknown_category": "refuse",
    "box_not_finite": "refuse",
    "box_negative": "refuse",  # negative width, or corners swapped: an object is there, and leaving it out would teach background
    "box_zero_area": "skip",  # COCO's own train2017 has two
    "box_outside": "skip",
    "box_partly_outside": "clip",
    "box_zero_based": "clip",
    "box_fractional": "ok",  # official VOC 2012 files have them
    "bad_mask": "refuse",
    "path_escape": "refuse",
    "missing_file": "refuse",
    "unreadable_image": "skip",
    "wrong_size": "refuse",
    "unusual_image": "ok",  # CMYK, 16 bit, alpha, or turned by EXIF: converted to upright 8-bit RGB
    "empty_image": "ok",  # data.empty_images decides
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing found: its kind (a key of POLICY), the words for the user, and where it is."""

    kind: str
    message: str
    file: str
    image: int | str | None = None
    annotation: int | str | None = None

    @property
    def action(self) -> Action:
        return POLICY[self.kind]

    def __str__(self) -> str:
        places = [self.file]
        places += [f"image {self.image}"] if self.image is not None else []
        places += [f"annotation {self.annotation}"] if self.annotation is not None else []
        return f"{', '.join(places)}: {self.message}"


@dataclass
class ProblemLog:
    """Everything found in one pass over a data set."""

    found: list[Problem] = field(default_factory=list)

    def add(self, kind: str, message: str, *, file: object, image: int | str | None = None, annotation: int | str | None = None) -> None:
        """Note one problem; `kind` must be in POLICY."""
        assert kind in POLICY, kind
        self.found.append(Problem(kind=kind, message=message, file=str(file), image=image, annotation=annotation))

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def kinds(self) -> Counter[str]:
        """How often each kind was found."""
        return Counter(problem.kind for problem in self.found)

    @property
    def refused(self) -> list[Problem]:
        """The problems that training would not start with."""
        return [problem for problem in self.found if problem.action == "refuse"]

    def settle(self) -> None:
        """What training does: raise InputError with the first refused problem; else say once what was skipped or clipped."""
        refused = self.refused
        if refused:
            more = f" ({len(refused) - 1} more like this or other; tools/check_data.py lists them all)" if len(refused) > 1 else ""
            raise InputError(f"{refused[0]}{more}")
        counted = Counter(problem.kind for problem in self.found if problem.action in ("skip", "clip"))
        for kind, count in sorted(counted.items()):
            first = next(problem for problem in self.found if problem.kind == kind)
            done = {"skip": "left out", "clip": "cut to the image"}[POLICY[kind]]
            logging.getLogger(__name__).warning("%d × %s: %s; the first: %s", count, kind, done, first)
