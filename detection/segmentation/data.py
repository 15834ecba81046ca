"""Instance masks as one label map an image: each pixel's class, 0 for the background and 255 where nothing is to be learned or judged."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from detection.data import Source, load_source
from detection.data.annotations import Annotations
from detection.data.augment import Scene
from detection.data.dataset import DetectionDataset
from detection.data.loader import BatchLoader, build_eval_loader, build_train_loader
from detection.segmentation.config import SegmentationConfig
from detection.structures import Target
from resbackbone.errors import InputError
from resbackbone.runtime.distributed import Process
from resbackbone.runtime.sampler import ResumableBatchSampler

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


def train_loader(config: SegmentationConfig, source: Source, process: Process) -> tuple[BatchLoader, ResumableBatchSampler]:
    """This process's share of endless training batches, and the sampler whose position a checkpoint keeps."""
    return build_train_loader(
        source,
        batch_size=config.train.batch_size,
        workers=config.data.workers,
        seed=config.train.seed,
        rank=process.rank,
        world_size=process.world_size,
        min_size=config.data.min_size,
        max_size=config.data.max_size,
        flip=config.data.flip,
        empty_images=config.data.empty_images,
        kind=SegmentationDataset,
    )


def eval_loader(config: SegmentationConfig, source: Source, process: Process) -> BatchLoader:
    """This process's share of the evaluation images; each image is in exactly one share."""
    return build_eval_loader(
        source,
        batch_size=config.eval.batch_size,
        workers=config.data.workers,
        rank=process.rank,
        world_size=process.world_size,
        min_size=config.data.min_size,
        max_size=config.data.max_size,
        kind=SegmentationDataset,
    )
