"""`shapes`: a data set that needs no file. Circles, squares and triangles of three scales, overlapping, on textured backgrounds.

Each image is drawn when it is asked for, from (seed, split, number) alone; nothing is stored but its boxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from resbackbone.errors import InputError, nearest

from .annotations import Annotations, assemble
from .masks import PackedMasks

SHAPE_CLASSES = ("circle", "square", "triangle")
SPLITS = {"train": 4000, "val": 200}  # images by default
# Side or diameter as a fraction of the image: small, medium and large, each as likely.
_SCALES = ((0.13, 0.18), (0.22, 0.34), (0.42, 0.6))
_MAX_OBJECTS = 5
_MIN_VISIBLE = 0.6  # of an object's own pixels, once those in front are drawn
_MIN_CONTRAST = 130  # sum over RGB of the difference to the background's mean


@dataclass(kw_only=True)
class ShapesSource:
    """Drawn images; `size` pixels square."""

    annotations: Annotations
    seed: int
    split_number: int
    size: int
    metric: Literal["coco", "voc"] = "coco"
    annotation_file: Path | None = None

    def read_image(self, index: int) -> np.ndarray:
        """Image `index`, drawn anew: RGB uint8 [size, size, 3]."""
        rng = _generator(self.seed, self.split_number, self.annotations.image_id(index))
        owner, _ = _place_objects(rng, self.size)
        return _paint(rng, owner)


def load(
    root: Path | None,
    split: str | tuple[str, ...] = "train",
    *,
    masks: bool = False,
    images: int | None = None,
    size: int = 128,
    seed: int = 0,
) -> ShapesSource:
    """`images` drawn images of split train or val; `root` is not used. About 0.5 ms an image."""
    if not isinstance(split, str) or split not in SPLITS:
        raise InputError(f"the shapes have no split {split!r};{nearest(str(split), SPLITS)} they have: {', '.join(SPLITS)}")
    if size < 32:
        raise InputError(f"shapes of size {size} would not show; use 32 pixels or more")
    count, split_number = images or SPLITS[split], list(SPLITS).index(split)
    scenes = [_place_objects(_generator(seed, split_number, number), size) for number in range(1, count + 1)]
    return ShapesSource(annotations=_annotate(scenes, split, size, masks=masks), seed=seed, split_number=split_number, size=size)


def _generator(seed: int, split_number: int, number: int | str) -> np.random.Generator:
    return np.random.default_rng([seed, split_number, int(number)])


def _place_objects(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[int]]:
    """(uint8 [size, size] saying whose pixel it is: 0 background, object k is k; the labels 1..3 of objects 1..)."""
    owner: np.ndarray = np.zeros((size, size), np.uint8)
    labels, full_areas = list[int](), [0]
    for _ in range(int(rng.integers(2, _MAX_OBJECTS + 1))):
        label, scale = int(rng.integers(1, len(SHAPE_CLASSES) + 1)), _SCALES[rng.integers(len(_SCALES))]
        for _ in range(4):  # tries until it hides no other object too much
            candidate = cv2.fillPoly(owner.copy(), [_outline(rng, label, scale, size)], len(labels) + 1)
            visible = np.bincount(candidate.reshape(-1), minlength=len(labels) + 2)
            if all(visible[k] >= _MIN_VISIBLE * full_areas[k] for k in range(1, len(labels) + 1)):
                owner, full_areas = candidate, [*full_areas, int(visible[-1])]
                labels.append(label)
                break
    return owner, labels


def _outline(rng: np.random.Generator, label: int, scale: tuple[float, float], size: int) -> np.ndarray:
    """Corners of one object inside the image, int32 [P, 2] as (x, y)."""
    radius = rng.uniform(*scale) * size / 2
    centre = rng.uniform(radius * 1.05, size - 1 - radius * 1.05, size=2)
    corners, turn = {1: (24, 0.0), 2: (4, np.pi / 4), 3: (3, -np.pi / 2)}[label]
    reach = radius if label != 2 else radius * 1.1
    angles = np.arange(corners) * (2 * np.pi / corners) + turn + rng.uniform(-0.25, 0.25)
    points = centre + reach * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.clip(np.rint(points), 0, size - 1).astype(np.int32)


def _paint(rng: np.random.Generator, owner: np.ndarray) -> np.ndarray:
    """Colours and textures for every pixel's owner."""
    size = len(owner)
    base = rng.integers(60, 196, size=3)
    patches = np.clip(base + rng.integers(-45, 46, size=(6, 6, 3)), 0, 255).astype(np.uint8)
    picture = cv2.resize(patches, (size, size), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    colours = np.stack([base, *(_contrasting(rng, base) for _ in range(_MAX_OBJECTS))]).astype(np.int16)
    inside = owner > 0
    picture[inside] = colours[owner[inside]]
    direction, period = rng.uniform(0, np.pi), rng.uniform(4, 12)
    ramp = np.arange(size) * (2 * np.pi / period)
    stripes = 14 * np.sin(np.cos(direction) * ramp[None, :] + np.sin(direction) * ramp[:, None])
    picture += stripes.astype(np.int16)[:, :, None]
    picture += rng.integers(-12, 13, size=picture.shape, dtype=np.int16)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _contrasting(rng: np.random.Generator, base: np.ndarray) -> np.ndarray:
    """A colour that stands out from `base`."""
    while True:
        colour = rng.integers(0, 256, size=3)
        if np.abs(colour - base).sum() >= _MIN_CONTRAST:
            return colour


def _annotate(scenes: list[tuple[np.ndarray, list[int]]], split: str, size: int, *, masks: bool) -> Annotations:
    """Boxes (and masks) of what is visible."""
    boxes = [_visible_box(owner == k + 1) for owner, labels in scenes for k in range(len(labels))]
    areas = [np.count_nonzero(owner == k + 1) for owner, labels in scenes for k in range(len(labels))]
    labels_flat = np.array([label for _, labels in scenes for label in labels], dtype=np.int64)
    return assemble(
        classes=SHAPE_CLASSES,
        category_ids=range(1, len(SHAPE_CLASSES) + 1),
        image_ids=range(1, len(scenes) + 1),
        file_names=[f"{split}_{number:06d}" for number in range(1, len(scenes) + 1)],
        sizes=np.full((len(scenes), 2), size),
        image_of_box=np.repeat(np.arange(len(scenes)), [len(labels) for _, labels in scenes]),
        boxes=np.array(boxes, dtype=np.float32),
        labels=labels_flat,
        ignore=np.zeros(len(labels_flat), dtype=bool),
        areas=np.array(areas),
        masks=_masks(scenes) if masks else None,
    )


def _visible_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """xyxy of a mask's pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _masks(scenes: list[tuple[np.ndarray, list[int]]]) -> PackedMasks:
    from pycocotools import mask as coco_mask

    encoded = [coco_mask.encode(np.asfortranarray(owner == k + 1).view(np.uint8)) for owner, labels in scenes for k in range(len(labels))]
    return PackedMasks.pack(encoded)
