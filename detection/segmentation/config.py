"""The schema of a segmentation run; what it shares with detection is detection's own. build.py makes modules of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from detection.config import BackboneConfig, DataConfig, TrainConfig
from resbackbone.errors import InputError
from resbackbone.runtime.config import load_config, load_config_text


@dataclass(frozen=True, kw_only=True)
class SegmentationBackbone(BackboneConfig):
    """Detection's, but whole images in larger batches let every layer and its statistics learn."""

    norm: Literal["batch", "frozen", "eval", "sync", "group", "none"] = "batch"
    freeze_at: int = 0


@dataclass(frozen=True, kw_only=True)
class SegmentationModel:
    """The segmenter."""

    head: Literal["deeplabv3", "fcn"] = "deeplabv3"
    output_stride: Literal[8, 16, 32] = 8  # of the last map; 8 is what both heads were published with, 16 a third of the time
    auxiliary: float | None = None  # weight of a second loss, of an FCN head on the map below (torchvision: 0.5); null: no such head
    backbone: SegmentationBackbone = field(default_factory=SegmentationBackbone)


@dataclass(frozen=True, kw_only=True)
class SegmentationData(DataConfig):
    """Detection's, at the size torchvision segments at. The data needs masks: kind coco or shapes."""

    min_size: tuple[int, ...] = (520,)  # shorter side, pixels; several: one is drawn per training image, the last one tests
    max_size: int = 1040  # longer side, pixels


@dataclass(frozen=True, kw_only=True)
class SegmentationEval:
    """How a segmenter is judged: at each image's own size, whatever the network saw."""

    batch_size: int = 1
    samples: int = 8  # validation images drawn into samples/


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig:
    """Everything a segmentation run depends on."""

    model: SegmentationModel = field(default_factory=SegmentationModel)
    data: SegmentationData = field(default_factory=SegmentationData)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: SegmentationEval = field(default_factory=SegmentationEval)

    def __post_init__(self) -> None:
        if self.model.head == "deeplabv3":
            check_share(self.train.batch_size, 1)


def check_share(batch_size: int, processes: int) -> None:
    """Raise InputError where a process would get one image a step: DeepLabV3's image pooling has one value a channel for each image,
    and the batch norm behind it needs two (Chen et al. 2017, §3.3)."""
    if batch_size < 2 * processes:
        raise InputError(
            f"train.batch_size={batch_size} over {processes} process(es) is too small for model.head=deeplabv3, whose image pooling is "
            f"batch-normalised; use {2 * processes} or more, or model.head=fcn"
        )


def load_segmentation_config(path: Path | None, overrides: Sequence[str] = ()) -> SegmentationConfig:
    """Read a YAML file and `key.path=value` overrides; InputError names what is wrong, where, and the nearest key."""
    return load_config(SegmentationConfig, path, overrides)


def parse_segmentation_config(text: str, *, source: str, overrides: Sequence[str] = ()) -> SegmentationConfig:
    """The same for YAML in memory, such as the config inside a weights file."""
    return load_config_text(SegmentationConfig, text, source=source, overrides=overrides)
