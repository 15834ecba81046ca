"""One training or evaluation sample from a source, decided by (seed, epoch, index) alone: the sampler's position is the whole state."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from detection.structures import Target
from resbackbone.errors import InputError
from resbackbone.runtime.random_state import item_seed

from .augment import Scene, horizontal_flip, resized
from .images import UnreadableImage, resized_size
from .source import Source

_MAX_UNREADABLE_IN_A_ROW = 100  # then the disk is gone, not a file
_logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Sample:
    """image: uint8 [3, h, w] RGB at the network's size, contiguous and its own memory; target: in pixels of that image."""

    image: Tensor
    target: Target


class DetectionDataset:
    """A source's images resized, flipped and paired with their targets.

    `keep` maps positions in the data set to images of the source (empty ones may be dropped); Target.index is the image's number in
    the *source*. An unreadable image is replaced by the next readable one when training, by a black one in evaluation, so that
    its objects count as missed; either way it is flagged once in `unreadable`, uint8 [images of the source], which the loader shares.
    """

    def __init__(
        self,
        source: Source,
        *,
        min_size: int | tuple[int, ...],
        max_size: int,
        flip: bool = False,
        train: bool,
        seed: int = 0,
        empty_images: Literal["keep", "drop"] = "keep",
        enlarge: bool = True,
    ) -> None:
        self.enlarge = enlarge
        self.source, self.max_size, self.flip, self.train, self.seed = source, max_size, flip, train, seed
        self.min_sizes = (min_size,) if isinstance(min_size, int) else tuple(min_size)
        if min(self.min_sizes, default=0) < 1 or max_size < max(self.min_sizes):
            raise InputError(
                f"data.min_size={list(self.min_sizes)} and data.max_size={max_size}: sizes are pixels, max_size the largest of them"
            )
        objects = source.annotations.num_objects()
        self.keep = np.flatnonzero(objects > 0) if empty_images == "drop" else np.arange(len(objects))
        if not len(self.keep):
            raise InputError(
                "no image is left to use: none has an object that is neither crowd nor difficult. Check data.train and data.root"
            )
        self.unreadable = torch.zeros(len(objects), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of `(epoch, position)`. Raises InputError for what problems.POLICY refuses."""
        epoch, position = key
        index = int(self.keep[position])
        rng = np.random.default_rng(item_seed(self.seed, epoch, index))
        min_size = int(self.min_sizes[rng.integers(len(self.min_sizes))]) if self.train else self.min_sizes[-1]
        mirrored = self.flip and self.train and bool(rng.random() < 0.5)
        index, image = self._readable(position)
        height, width = image.shape[:2]
        boxes = self.source.annotations.of_image(index)
        scene = Scene(image=image, boxes=self.source.annotations.boxes[boxes], masks=self._masks(boxes, height, width))
        scene = resized(scene, resized_size(height, width, min_size=min_size, max_size=self.max_size, enlarge=self.enlarge))
        if mirrored:
            scene = horizontal_flip(scene)
        return Sample(
            image=_planes(scene.image),
            target=self._target(scene, index, boxes, (height, width), seed=item_seed(self.seed, epoch, index, 1)),
        )

    def resized_sizes(self) -> np.ndarray:
        """int64 [len, 2]: (height, width) of each position's image at the test size, from the annotations alone."""
        sizes = self.source.annotations.sizes[self.keep].tolist()
        rule = partial(resized_size, min_size=self.min_sizes[-1], max_size=self.max_size, enlarge=self.enlarge)
        return np.array([rule(height, width) for height, width in sizes], dtype=np.int64)

    def _readable(self, position: int) -> tuple[int, np.ndarray]:
        """(number in the source, pixels) of the image at `position`, or its stand-in."""
        for step in range(min(len(self.keep), _MAX_UNREADABLE_IN_A_ROW)):
            index = int(self.keep[(position + step) % len(self.keep)])
            try:
                return index, self.source.read_image(index)
            except UnreadableImage as error:
                self._note(index, error)
                if not self.train:
                    return index, np.zeros((*self.source.annotations.sizes[index].tolist(), 3), dtype=np.uint8)
        raise InputError(f"{step + 1} images in a row cannot be read; is the disk still there? tools/check_data.py lists them")

    def _note(self, index: int, error: UnreadableImage) -> None:
        if not self.unreadable[index]:
            self.unreadable[index] = 1
            stand_in = "the next image takes its place" if self.train else "its objects count as missed"
            _logger.warning("%s; %s", error, stand_in)

    def _masks(self, boxes: slice, height: int, width: int) -> np.ndarray | None:
        """uint8 [B, height, width] of one image's boxes; ignored ones are left empty, nothing looks at them."""
        annotations = self.source.annotations
        if annotations.masks is None:
            return None
        drawn = np.zeros((boxes.stop - boxes.start, height, width), dtype=np.uint8)
        for row, box in enumerate(range(boxes.start, boxes.stop)):
            if not annotations.ignore[box]:
                drawn[row] = annotations.mask(box, height, width)
        return drawn

    def _target(self, scene: Scene, index: int, boxes: slice, size: tuple[int, int], *, seed: int) -> Target:
        annotations = self.source.annotations
        ignore = annotations.ignore[boxes]
        return Target(
            boxes=torch.from_numpy(scene.boxes[~ignore]),
            labels=torch.from_numpy(annotations.labels[boxes][~ignore]),
            ignore_boxes=torch.from_numpy(scene.boxes[ignore]),
            image_id=annotations.image_id(index),
            index=index,
            original_size=size,
            seed=seed,
            masks=None if scene.masks is None else torch.from_numpy(scene.masks[~ignore]),
        )


def _planes(image: np.ndarray) -> Tensor:
    """uint8 [h, w, 3] -> uint8 [3, h, w] in memory of its own: a tensor that goes to another process may not borrow a decoder's buffer."""
    planes = torch.empty((3, *image.shape[:2]), dtype=torch.uint8)
    cv2.split(image, list(planes.numpy()))  # into the three planes; four times as fast as permuting
    return planes
