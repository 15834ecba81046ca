"""A trained detector as a file that runs without this package, checked box by box against the detector it comes from."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from detection.config import DetectionConfig
from detection.context import ContextRoIHead
from detection.data import load_source
from detection.data.images import resize_image, resized_size
from detection.exportable import NOTHING, ExportableDetector, suppress
from detection.faster_rcnn import FasterRCNN
from detection.inputs import read_some
from detection.pooling import RegionPooler
from detection.predict import FORMAT, config_from_weights, load_detector, read_run_checkpoint
from detection.roi_head import RoIHead
from detection.structures import Detections
from detection.torchvision_weights import looks_like_torchvision
from resbackbone.errors import InputError
from resbackbone.export import (
    MAX_IMAGES,
    MAX_SIDE,
    Graph,
    Run,
    check_format,
    checked_file,
    export_backbone,
    open_program,
    output_path,
    refusal,
    write_program,
)
from resbackbone.weights import read_state_dict

LEAST_CELLS = 3  # rows of 32 pixels: below, the pyramid's p6 is one cell, which torch.export takes for a broadcast
LEAST_SIDE = 32 * (LEAST_CELLS - 1) + 1  # pixels: what is less is padded to more than in `detect`, and has other borders and anchors
SAME_BOX, SAME_SCORE, SAME_MASK = 0.99, 1e-3, 0.02  # IoU, score and every probability of the mask of one box in both
MAX_UNMATCHED = 0.01  # share of boxes: scores next to the threshold and overlaps next to NMS's fall to either side by rounding
SYNTHETIC = 4  # drawn images, where nobody names real ones


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far program and detector agree: detections of both, those without a partner, and the largest differences of the others.

    mask: of any probability; None where there are no masks. One whose mask differs has no partner.
    """

    boxes: int
    unmatched: int
    score: float
    pixels: float
    mask: float | None

    def __str__(self) -> str:
        masks = "" if self.mask is None else f", masks to {self.mask:.1e}"
        found = f"{self.boxes - self.unmatched} of {self.boxes} boxes matched"
        return f"{found}, scores to {self.score:.1e}, corners to {self.pixels:.1e} px{masks}"

    @property
    def holds(self) -> bool:
        return self.unmatched <= MAX_UNMATCHED * self.boxes


def export_weights(
    weights: Path,
    *,
    to: str,
    output: Path | None = None,
    images: Sequence[str] = (),
    overrides: Sequence[str] = (),
    name: str | None = None,
    variant: str | None = None,
) -> str:
    """Export what a weights file holds, detector or backbone; see `export_detector`, `export_backbone`.

    images: what to check it on, as `expand` takes them; of many, a few. Raises InputError for an option that is of no use to this kind.
    """
    check_format(to)
    if not is_detector(weights):
        if overrides:
            raise InputError(f"{weights} holds no detector, and only detectors have settings; leave {' '.join(overrides)} out")
        return export_backbone(weights, to=to, output=output, pictures=read_some(images), name=name, variant=variant)
    useless = " ".join(f"--{option} {value}" for option, value in (("name", name), ("variant", variant)) if value)
    if useless:
        raise InputError(f"{weights} holds a detector, which says itself what its backbone is; leave {useless} out")
    return export_detector(weights, to=to, output=output, pictures=read_some(images), overrides=overrides)


def is_detector(weights: Path) -> bool:
    """Whether `read_detector_file` knows this as a detector: a run's weights or checkpoint, or torchvision's file; else a backbone's."""
    if weights.is_dir():
        return True
    if not weights.is_file() or weights.suffix not in (".safetensors", ".pth", ".pt"):
        return False
    try:
        if read_run_checkpoint(weights) is not None:
            return True
        tensors, metadata = read_state_dict(weights)
    except InputError:  # backbones come in more formats; their reader says what is wrong with it
        return False
    return metadata.get("format") == FORMAT or looks_like_torchvision(tensors)


def export_detector(
    weights: Path, *, to: str, output: Path | None = None, pictures: Sequence[np.ndarray] = (), overrides: Sequence[str] = ()
) -> str:
    """Write the detector of a weights file and check it on pictures (drawn shapes where there are none); returns what was found.

    Each picture is looked at in two sizes, alone and beside its mirror image; those that the detector would see with a side below
    LEAST_SIDE are left out, which is said. Raises InputError for a detector that can't be exported, or where the check finds nothing to
    compare or too much that differs; nothing is then written.
    """
    check_format(to)
    path = output_path(weights, output, to)
    config = config_from_weights(weights, overrides)
    detector, classes = load_detector(config, weights, device=torch.device("cpu"))
    _check_exportable(detector, config, to)
    given = pictures or _drawn()
    pictures = _comparable(given, config)
    with checked_file(path) as program:
        write_program(detector_graph(detector, config, classes, to=to), program, to=to)
        parity = compare(detector, open_program(program, to=to), pictures, sizes=_test_sizes(config), max_size=config.data.max_size)
        if not parity.boxes:
            raise InputError(
                f"{path} was not written, being unchecked: the detector finds nothing in these images; name others with --images"
            )
        if not parity.holds:
            raise refusal(path, f"only {parity}")
    sizes = " and ".join(str(size) for size in _test_sizes(config))
    said = f"{path}: {parity}; {len(pictures)} images, shorter side {sizes}, batches of 1 and 2"
    if narrow := len(given) - len(pictures):
        said += f". Left out: {narrow} of {len(given)}, seen with a side below {LEAST_SIDE} px, where the program finds other boxes"
    return said


def _check_exportable(detector: torch.nn.Module, config: DetectionConfig, to: str) -> None:
    if type(detector) is not FasterRCNN or type(detector.roi_head) not in (RoIHead, ContextRoIHead):
        raise InputError(
            "the exported detector looks at each image once: refinement, scales and mirror images are left out; "
            "set model.test.refine=false model.test.scales=null model.test.flip=false"
        )
    if config.model.roi.op == "pool" and to == "onnx":
        raise InputError("model.roi.op=pool has no equal in ONNX; take --to torch-export, or train with model.roi.op=align")
    side = config.data.min_size[-1]
    if side < LEAST_SIDE:
        raise InputError(
            f"data.min_size={side} is too small to export: the program pads to {32 * LEAST_CELLS} pixels a side, the detector to "
            f"{32 * -(-side // 32)}, and finds other boxes there. Give data.min_size={LEAST_SIDE} or more, after training at that size"
        )


def _comparable(pictures: Sequence[np.ndarray], config: DetectionConfig) -> list[np.ndarray]:
    """The pictures that program and detector pad alike; InputError where there are none.

    Others are so long that data.max_size makes them narrow, which it does at each of `_test_sizes`.
    """
    shorter, longer = config.data.min_size[-1], config.data.max_size
    fitting = [one for one in pictures if min(resized_size(*one.shape[:2], min_size=shorter, max_size=longer)) >= LEAST_SIDE]
    if not fitting:
        raise InputError(
            f"none of the {len(pictures)} images can be compared: with data.min_size={shorter} and data.max_size={longer} each is less "
            f"than {LEAST_SIDE} pixels high or wide, and the program pads that to {32 * LEAST_CELLS}, the detector to less; name squarer "
            "ones with --images, or raise data.max_size"
        )
    return fitting


def _test_sizes(config: DetectionConfig) -> tuple[int, int]:
    """Shorter sides in pixels: the config's, and three quarters of it."""
    side = config.data.min_size[-1]
    return side, max(3 * side // 4, 32 * LEAST_CELLS)


def detector_graph(detector: FasterRCNN, config: DetectionConfig, classes: Sequence[str], *, to: str) -> Graph:
    """images (N, 3, H, W) uint8 RGB and sizes (N, 2) int64 → boxes (N, D, 4), scores (N, D), labels (N, D) [, masks (N, D, M, M)].

    N, H and W vary.
    """
    # Channels first: torch.export would guard on the strides of channels_last maps, and so on the images' sizes.
    module = copy.deepcopy(detector).eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for pooler in (part for part in module.modules() if isinstance(part, RegionPooler)):
        pooler.compiled_op = True
    how, translations = _suppress_in_onnx() if to == "onnx" else (suppress, None)
    count = torch.export.Dim("images", min=1, max=MAX_IMAGES)
    rows, columns = (torch.export.Dim(name, min=LEAST_CELLS, max=MAX_SIDE // 32) for name in ("rows", "columns"))
    side = 32 * (LEAST_CELLS + 1)
    return Graph(
        module=ExportableDetector(module, suppress=how),
        example=(torch.zeros((2, 3, side, side + 32), dtype=torch.uint8), torch.tensor([[side, side]] * 2)),
        shapes={"images": {0: count, 2: 32 * rows, 3: 32 * columns}, "sizes": {0: count}},
        inputs=("images", "sizes"),
        outputs=("boxes", "scores", "labels") if detector.mask_head is None else ("boxes", "scores", "labels", "masks"),
        metadata={
            "classes": json.dumps(list(classes)),
            "min_size": str(config.data.min_size[-1]),
            "max_size": str(config.data.max_size),
            "divisor": "32",
        },
        translations=translations,
    )


@cache
def _suppress_in_onnx() -> tuple[Callable[..., Tensor], dict[Callable, Callable]]:
    """`suppress` as one torch operator, and that operator as ONNX's NonMaxSuppression, which knows sets (its batches) by itself."""
    from onnxscript import opset18

    onnx: Any = opset18  # its signatures name ONNX's types, not what tracing hands over
    operator = torch.library.custom_op("resbackbone::suppress", suppress, mutates_args=())
    operator.register_fake(lambda boxes, scores, iou: torch.empty_like(scores, dtype=torch.bool))

    def translated(boxes: Any, scores: Any, iou: float) -> Any:
        every, least = onnx.Constant(value_int=2**62), onnx.Constant(value_float=NOTHING / 2)
        chosen = onnx.NonMaxSuppression(boxes, onnx.Unsqueeze(scores, [1]), every, onnx.Constant(value_float=iou), least)
        place = onnx.Gather(chosen, [0, 2], axis=1)
        nowhere = onnx.Expand(onnx.Constant(value_float=0.0), onnx.Shape(scores))
        here = onnx.Expand(onnx.Constant(value_float=1.0), onnx.Shape(place, start=0, end=1))
        return onnx.Cast(onnx.ScatterND(nowhere, place, here), to=9)  # 9: bool

    return operator, {torch.ops.resbackbone.suppress.default: translated}


def _drawn() -> list[np.ndarray]:
    source = load_source("shapes", None, "val", size=256)
    return [source.read_image(number) for number in range(SYNTHETIC)]


def compare(detector: FasterRCNN, run: Run, pictures: Sequence[np.ndarray], *, sizes: Sequence[int], max_size: int) -> Parity:
    """The detector's boxes beside the program's, for every picture at every shorter side, alone and beside its mirror image."""
    pairs: list[tuple[Detections, Detections, Tensor]] = []
    for picture in pictures:
        for size in sizes:
            height, width = resized_size(*picture.shape[:2], min_size=size, max_size=max_size)
            image = torch.from_numpy(resize_image(picture, (height, width)).copy()).permute(2, 0, 1)
            for batch in ([image], [image, image.flip(2)]):
                for mine, theirs in zip(detector.detect(batch), _run(run, batch, detector), strict=True):
                    pairs.append((mine, theirs, _partners(mine, theirs)))
    matched = [(mine[partner >= 0], theirs[partner[partner >= 0]]) for mine, theirs, partner in pairs]
    total = sum(max(len(mine), len(theirs)) for mine, theirs, _ in pairs)
    return Parity(
        boxes=total,
        unmatched=total - sum(len(mine) for mine, _ in matched),
        score=max((_apart(mine.scores, theirs.scores) for mine, theirs in matched), default=0.0),
        pixels=max((_apart(mine.boxes, theirs.boxes) for mine, theirs in matched), default=0.0),
        mask=None if detector.mask_head is None else max((_masks_apart(*pair) for pair in matched), default=0.0),
    )


def _apart(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).abs().max()) if mine.numel() else 0.0


def _masks_apart(mine: Detections, theirs: Detections) -> float:
    assert mine.masks is not None
    assert theirs.masks is not None
    return _apart(mine.masks, theirs.masks)


def _run(run: Run, images: Sequence[Tensor], detector: FasterRCNN) -> Iterator[Detections]:
    """What the program finds in images of one size."""
    height, width = images[0].shape[1:]
    rows, columns = (max(side, 32 * LEAST_CELLS) for side in detector.preprocess.padded_size((height, width)))
    batch: np.ndarray = np.zeros((len(images), 3, rows, columns), dtype=np.uint8)
    for place, image in zip(batch, images, strict=True):
        place[:, :height, :width] = image.numpy()
    outputs = run(batch, np.array([[height, width]] * len(images), dtype=np.int64))
    for one in zip(*outputs, strict=True):
        boxes, scores, labels, *masks = (torch.from_numpy(output[one[1] > 0]) for output in one)
        yield Detections(boxes=boxes, scores=scores, labels=labels, masks=masks[0] if masks else None)


def _partners(mine: Detections, theirs: Detections) -> Tensor:
    """(D,) for each of `mine` the one of `theirs` that is the same box, or -1; each is somebody's partner once at most."""
    same = (mine.labels[:, None] == theirs.labels) & ((mine.scores[:, None] - theirs.scores).abs() <= SAME_SCORE)
    iou = torch.where(same, box_iou(mine.boxes, theirs.boxes), 0.0)
    partner = torch.full((len(mine),), -1)
    for row in range(len(mine) if len(theirs) else 0):
        best = int(iou[row].argmax())
        if iou[row, best] >= SAME_BOX and _is_same_mask(mine, row, theirs, best):
            partner[row] = best
            iou[:, best] = 0
    return partner


def _is_same_mask(mine: Detections, row: int, theirs: Detections, best: int) -> bool:
    return mine.masks is None or (theirs.masks is not None and _apart(mine.masks[row], theirs.masks[best]) <= SAME_MASK)
