"""A trained detector as the start of another's training, on the same classes or others (He et al. 2015, appendix B: COCO, then VOC).

Everything is taken over as it is but the layers whose rows belong to classes: there the background's rows and those of classes
that both know by name, COCO's and VOC's spellings alike. The rows of new classes start as in any training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from detection.build import build_detector
from detection.config import DetectionConfig, parse_detection_config
from detection.faster_rcnn import FasterRCNN
from detection.predict import DetectorFile, read_detector_file
from detection.torchvision_weights import CLASS_ROWS
from resbackbone.backbone import Backbone
from resbackbone.errors import InputError
from resbackbone.layers import NORM_EPS

ALIASES = {  # VOC's names in COCO's words
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
MASKS = "mask_head."
MOST_NAMES = 25  # a line can name all of VOC
_STATISTICS = ("batch", "frozen", "eval", "sync")  # norms with the same tensors: a file of one fills any other


def detector_from(config: DetectionConfig, classes: Sequence[str], *, checkpoint: Path | None = None) -> tuple[FasterRCNN, list[str]]:
    """The detector of `config` for `classes`, filled from the file model.weights names, and lines that say what was taken over.

    Preprocessing and the norms' epsilon are the file's. checkpoint: of this run, when it goes on: these are then the checkpoint's, whose
    tensors will be loaded, and the file is not read. Raises InputError for what is no detector, or one of another architecture.
    """
    file = read_detector_file(checkpoint or Path(config.model.weights or ""))
    theirs = parse_detection_config(file.config, source=f"the config inside {file.path}")
    eps = theirs.model.backbone.norm_eps
    if config.model.backbone.norm_eps is None:
        spec = dataclasses.replace(config.model.backbone, norm_eps=eps)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=spec))
    _check_settings(config, theirs, file.path)
    detector = build_detector(config, len(classes), initial_weights=False, preprocessing=file.preprocessing)
    next(module for module in detector.modules() if isinstance(module, Backbone)).weights_eps = eps
    return detector, [] if checkpoint else take_over(detector, file, classes)


def same_classes(classes: Sequence[str], known: Sequence[str]) -> dict[int, int]:
    """Label → label in `known`, for each of `classes` that is there under its own name or, failing that, under an alias."""
    by_name = {name: label for label, name in enumerate(known, 1)}
    by_meaning = {_meaning(name): label for label, name in enumerate(known, 1)}
    found = {label: by_name.get(name, by_meaning.get(_meaning(name))) for label, name in enumerate(classes, 1)}
    return {label: other for label, other in found.items() if other is not None}


def take_over(detector: FasterRCNN, file: DetectorFile, classes: Sequence[str]) -> list[str]:
    """Fill `detector`, for `classes`, with the file's tensors; returns lines that say what was taken.

    Of a mask branch that only one of the two has, nothing is taken. Raises InputError where tensors don't fit; nothing is then filled.
    """
    ours, given = (
        {name: value for name, value in all_.items() if not name.endswith("num_batches_tracked")}
        for all_ in (detector.state_dict(), file.tensors)
    )
    has_masks, gives_masks = (any(name.startswith(MASKS) for name in tensors) for tensors in (ours, given))
    if has_masks != gives_masks:
        ours, given = ({name: value for name, value in tensors.items() if not name.startswith(MASKS)} for tensors in (ours, given))
    _check_tensors(ours, given, file.path)
    labels = {0: 0} | same_classes(classes, file.classes)
    for name, value in ours.items():
        value.copy_(_with_rows(value, given[name], len(classes) + 1, labels) if _has_class_rows(name) else given[name])
    rows = {layer: each for layer, each in CLASS_ROWS.items() if f"{layer}.weight" in ours}
    return [
        f"detector weights {file.path}: {sum(not _has_class_rows(name) for name in ours)} tensors as they are",
        "rows taken over: " + ", ".join(f"{layer} {each * len(labels)} of {each * (len(classes) + 1)}" for layer, each in rows.items()),
        *_told_of_classes(classes, file.classes, labels),
        *(["the mask branch is new: the file has none"] if has_masks and not gives_masks else []),
        *(["the file's mask branch is left out"] if gives_masks and not has_masks else []),
    ]


def _meaning(name: str) -> str:
    plain = name.lower().replace("_", " ").strip()
    return ALIASES.get(plain, plain)


def _with_rows(value: Tensor, given: Tensor, count: int, labels: Mapping[int, int]) -> Tensor:
    """`value`, a layer's weight or bias for `count` labels, with the rows that `labels` (ours → theirs) finds in `given`."""
    filled = value.unflatten(0, (count, -1)).clone()
    each = filled.shape[1]
    filled[list(labels)] = given.unflatten(0, (-1, each))[list(labels.values())].to(filled)
    return filled.flatten(0, 1)


def _told_of_classes(classes: Sequence[str], known: Sequence[str], labels: Mapping[int, int]) -> list[str]:
    pairs = [(classes[label - 1], known[other - 1]) for label, other in labels.items() if label]
    taken = [mine if mine == theirs else f"{mine} ← {theirs}" for mine, theirs in pairs]
    new = [name for label, name in enumerate(classes, 1) if label not in labels]
    left = [name for label, name in enumerate(known, 1) if label not in labels.values()]
    kinds = (("taken over", ["background", *taken]), ("new, untrained", new), ("left out", left))
    return [f"classes {what}: {_few(names)}" for what, names in kinds if names]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= MOST_NAMES else f"{', '.join(names[:MOST_NAMES])} … {len(names)} in all"


def _check_settings(config: DetectionConfig, theirs: DetectionConfig, path: Path) -> None:
    mine, other = _architecture(config), _architecture(theirs)
    differing = [f"{key}={_text(other[key])} (here {_text(mine[key])})" for key in mine if mine[key] != other[key]]
    if differing:
        raise InputError(
            f"model.weights={path} is a detector of another architecture than this config's: it has {', '.join(differing)}. "
            "Set these as the file has them, or leave model.weights out"
        )


def _architecture(config: DetectionConfig) -> dict[str, Any]:
    """What weights mean something with alone. Norms that have the same tensors count as one."""
    model, backbone = config.model, config.model.backbone
    return {
        "model.head": model.head,
        "model.backbone.name": backbone.name,
        "model.backbone.variant": backbone.variant,
        "model.backbone.norm": "batch" if backbone.norm in _STATISTICS else backbone.norm,
        "model.backbone.norm_eps": NORM_EPS if backbone.norm_eps is None else backbone.norm_eps,
        "model.backbone.dilation_rule": backbone.dilation_rule,
        "model.backbone.options": backbone.options,
        "model.anchor_sizes": model.anchor_sizes,
        "model.roi.op": model.roi.op,
        "model.roi.pool_size": model.roi.pool_size,
        "model.roi.head_width": model.roi.head_width,
        "model.test.context": model.test.context,
    }


def _text(value: Any) -> str:
    """As it is typed in a config."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _check_tensors(ours: Mapping[str, Tensor], given: Mapping[str, Tensor], path: Path) -> None:
    """Every tensor must have its place; in layers whose rows are classes', the rows may be as many as the file has classes."""
    missing, unexpected = sorted(ours.keys() - given.keys()), sorted(given.keys() - ours.keys())
    shapes = [name for name in ours.keys() & given.keys() if _shape(name, ours[name]) != _shape(name, given[name])]
    if missing or unexpected or shapes:
        raise InputError(
            f"model.weights={path} does not fit this config's detector: {len(missing)} tensors missing {missing[:3]}, {len(unexpected)} "
            f"unexpected {unexpected[:3]}, {len(shapes)} of another shape {sorted(shapes)[:3]}. Take the settings below model from the "
            "config.yaml beside the file, or leave model.weights out"
        )


def _has_class_rows(name: str) -> bool:
    return name.rpartition(".")[0] in CLASS_ROWS


def _shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape[1:] if _has_class_rows(name) else tensor.shape)
