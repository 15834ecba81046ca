"""Instance masks as one label map an image: each pixel's class, 0 for the background and 255 where nothing is to be learned or judged."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch

from detection.config import eval_loader as detection_eval_loader
from detection.config import train_loader as detection_train_loader
from detection.data import Source, load_source
from detection.data.annotations import Annotations
from detection.data.augment import Scene
from detection.data.dataset import DetectionDataset
from detection.segmentation.config import SegmentationConfig
from detection.structures import Target
from resbackbone.errors import InputError

IGNORED = 255


def label_map(annotations: Annotations, boxes: slice, height: int, width: int) -> np.ndarray:
    """uint8 [height, width] of one image: a pixel's class is that of the object whose mask covers it.

    IGNORED where objects of different classes claim it, since nobody says which is in front, and in crowds, where no object covers them.
    """
    classes: np.ndarray = np.zeros((height, width), dtype=np.uint8)
    disputed: np.ndarray = np.zeros((height, width), dtype=bool)
    crowd = disputed.copy()
    for box in range(boxes.start, boxes.stop):
        mask = annotations.mask(box, height, width).astype(bool)
        if annotations.ignore[box]:
            crowd |= mask
            continue
        label = annotations.labels[box]
        disputed |= mask & (classes != 0) & (classes != label)
        classes[mask] = label
    classes[disputed | (crowd & (classes == 0))] = IGNORED
    return classes


class SegmentationDataset(DetectionDataset):
    """Detection's images with a label map in their targets: in training it goes with the image, in evaluation it keeps its own size."""

    def _masks(self, boxes: slice, height: int, width: int) -> np.ndarray | None:
        return label_map(self.source.annotations, boxes, height, width)[None] if self.train else None

    def _target(self, scene: Scene, index: int, boxes: slice, size: tuple[int, int], *, seed: int) -> Target:
        drawn = label_map(self.source.annotations, boxes, *size) if scene.masks is None else scene.masks[0]
        target = super()._target(replace(scene, masks=None), index, boxes, size, seed=seed)
        return replace(target, label_map=torch.from_numpy(drawn))


def load_split(config: SegmentationConfig, which: Literal["train", "val"]) -> Source:
    """The training or validation data of a run, its annotations and masks read and checked. Raises InputError."""
    data = config.data
    if data.kind == "voc":
        raise InputError("data.kind=voc has no object masks here (its XML holds boxes only); convert it to COCO JSON with masks")
    return load_source(data.kind, data.root, getattr(data, which), masks=True, images=data.images, exif=data.exif)


train_loader = partial(detection_train_loader, kind=SegmentationDataset)
eval_loader = partial(detection_eval_loader, kind=SegmentationDataset)
