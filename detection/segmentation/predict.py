"""A trained segmenter: what travels with its weights, loading them, and an image in, its label map out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detection.config import RunConfig, chosen_device
from detection.data.images import check_pixels, resize_image, resized_size
from detection.predict import load_strictly, read_detector_file
from detection.segmentation.build import build_segmenter
from detection.segmentation.config import SegmentationConfig, load_segmentation_config, parse_segmentation_config
from detection.segmentation.segmenter import Segmenter
from resbackbone.runtime import distributed
from resbackbone.runtime.config import dump_config
from resbackbone.runtime.precision import Precision

FORMAT = "resbackbone-segmenter-1"


def segmenter_metadata(config: SegmentationConfig, classes: Sequence[str], segmenter: Segmenter) -> dict[str, str]:
    """What travels with a segmenter's weights: its config, class names without the background, and preprocessing, as text."""
    return {
        "format": FORMAT,
        "config": dump_config(config),
        "classes": json.dumps(list(classes)),
        "preprocessing": json.dumps(dataclasses.asdict(segmenter.preprocess.preprocessing)),
    }


def resolve_config(path: Path | None, weights: Path, overrides: Sequence[str] = ()) -> SegmentationConfig:
    """The config of a file, or, where `path` is None, the one inside the weights; with overrides."""
    if path is not None:
        return load_segmentation_config(path, overrides)
    file = read_detector_file(weights, expected=FORMAT)
    return parse_segmentation_config(file.config, source=f"the config inside {weights}", overrides=overrides)


def load_segmenter(config: SegmentationConfig, weights: Path, *, device: torch.device) -> tuple[Segmenter, tuple[str, ...]]:
    """The segmenter `config` describes with the weights of `weights`, in eval mode on `device`, and its class names.

    Raises InputError when the file belongs to another architecture, naming the first tensors that differ.
    """
    file = read_detector_file(weights, expected=FORMAT)
    segmenter = build_segmenter(config, len(file.classes), initial_weights=False, preprocessing=file.preprocessing)
    load_strictly(segmenter, file, config)
    segmenter.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return segmenter.eval(), file.classes


def load_for_replay(weights: Path) -> tuple[RunConfig, Segmenter]:
    """The config inside a weights file and its segmenter on the CPU."""
    config = resolve_config(None, weights)
    return config, load_segmenter(config, weights, device=torch.device("cpu"))[0]


@torch.no_grad()
def segment_image(segmenter: Segmenter, image: np.ndarray, config: SegmentationConfig, precision: Precision) -> Tensor:
    """The label map of `image`, uint8 (H, W, 3) RGB of any size: uint8 (H, W) on the CPU.

    The network sees it at the size it was judged at. Raises InputError for an array of another kind.
    """
    check_pixels(image)
    height, width = image.shape[:2]
    size = resized_size(height, width, min_size=config.data.min_size[-1], max_size=config.data.max_size)
    pixels = torch.from_numpy(np.ascontiguousarray(resize_image(image, size))).permute(2, 0, 1).contiguous().to(precision.device)
    with precision.autocast():
        (found,) = segmenter.segment([pixels], [(height, width)])
    return found.cpu()


class SegmentationPredictor:
    """A trained segmenter for single images."""

    def __init__(self, config: SegmentationConfig, weights: Path) -> None:
        device = distributed.setup(chosen_device(config)).device
        self.config, self.precision = config, Precision(config.train.precision, device)
        self.segmenter, self.classes = load_segmenter(config, weights, device=device)

    def __call__(self, image: np.ndarray) -> Tensor:
        """`image`, uint8 (H, W, 3) RGB of any size -> its label map, uint8 (H, W): 0 the background, c the c-th of `classes`.

        Raises InputError for an array of another kind.
        """
        return segment_image(self.segmenter, image, self.config, self.precision)
