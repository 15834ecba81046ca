"""The schema of a detection run, and the translation of its parts: into a detector (`build_detector` in build.py), sources and loaders.

Each default states its reason. A YAML file holds one run's differences from them; `key.path=value` overrides either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from resbackbone.errors import InputError
from resbackbone.runtime.config import load_config, load_config_text

if TYPE_CHECKING:
    from detection.data.dataset import DetectionDataset
    from detection.data.loader import BatchLoader
    from detection.data.source import Source
    from resbackbone.runtime.distributed import Process
    from resbackbone.runtime.sampler import ResumableBatchSampler


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which network carries the detector, and how much of it learns."""

    name: str = "resnet50"  # list_backbones() has ours; timm:NAME and torchvision:NAME take theirs
    variant: Literal["v1", "v1.5", "v2"] = (
        "v1.5"  # torchvision's weights have the stride in the 3x3; the paper's own release in the 1x1 (v1)
    )
    weights: str | None = "torchvision"  # null | a file | torchvision | timm
    norm: Literal["batch", "frozen", "eval", "sync", "group", "none"] = "frozen"  # He et al. 2015, appendix A: BN fixed in detection
    norm_eps: float | None = None  # null: the source's, 1e-5
    freeze_at: int = 2  # conv1 and conv2_x, as Fast R-CNN found enough; 0 from scratch
    dilation_rule: Literal["torchvision", "detectron2"] = "torchvision"  # bites with head dc5 only; weights want the rule they met
    checkpointing: bool = False  # trades a third more compute for most of the activations' memory
    options: dict[str, Any] = field(default_factory=dict)  # what only this network has, as {shortcut: A, stochastic_depth: 0.2}


@dataclass(frozen=True, kw_only=True)
class RoiConfig:
    """Regions: how many, and how their features are pooled."""

    op: Literal["align", "pool"] = "align"  # the paper pools; aligning (He et al. 2017) is never worse
    proposals_train: int = 2000  # Ren et al. 2015, §3.3
    proposals_test: int = 300  # He et al. 2015, appendix A; FPN uses 1000
    candidates_train: int | None = None  # boxes by score before NMS; null: 2000 a level on a pyramid, 12000 on one map
    candidates_test: int | None = None  # null: 1000 a level on a pyramid, 6000 on one map
    samples: int | None = None  # regions trained on per image; null: 512 with two FC layers, 128 where conv5_x runs on each (Ren et al.)
    pool_size: int | None = None  # null: 14 before conv5_x (which halves it), 7 before FC layers
    head_width: int = 1024  # of the two FC layers (Lin et al. 2017, FPN §4.2)


@dataclass(frozen=True, kw_only=True)
class TestConfig:
    """What happens at test time: to scored boxes, and the paper's steps (He et al. 2015, appendix B), all off as in its baseline."""

    score_threshold: float = 0.05  # below it a box no longer moves AP
    nms: float = 0.5  # IoU, per class
    detections: int = 100  # COCO counts the best 100 of an image
    refine: bool = False  # pool again from the regressed boxes, NMS 0.3 over both, box voting; twice the time of the region head
    context: bool = False  # the whole image beside each region: a part of the network, so training needs it too
    scales: tuple[int, ...] | None = None  # shorter sides in pixels, made from the image on disk; the paper: [200, 400, 600, 800, 1000]
    scale_merge: Literal["maxout", "nms"] = "maxout"  # the paper's two scales a region; nms: each scale detects alone, NMS joins them
    flip: bool = False  # detect in the mirror image too; NMS joins both

    def __post_init__(self) -> None:
        if self.scales is None:
            return
        listed = ", ".join(map(str, self.scales))
        if list(self.scales) != sorted(set(self.scales)) or min(self.scales, default=0) < 1:
            raise InputError(f"scales=[{listed}] are not possible; give shorter sides in pixels that rise, as [200, 400, 600, 800, 1000]")
        if self.scale_merge == "maxout" and len(self.scales) < 2:
            raise InputError(f"scales=[{listed}] leave maxout nothing to choose from; give two or more, or set data.min_size to that one")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The detector."""

    head: Literal["c4", "fpn", "dc5"] = "c4"  # the paper's own
    weights: str | None = None  # a trained detector to start from, whatever its classes (fine_tune.py); null: the backbone's weights
    mask: bool = False  # the mask branch (He et al. 2017, figure 4): its left form on residual C4, else its right one
    anchor_sizes: tuple[int, ...] | None = None  # pixels; null: 32 … 512 (fpn: one size a level), as torchvision and detectron2
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    roi: RoiConfig = field(default_factory=RoiConfig)
    test: TestConfig = field(default_factory=TestConfig)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images and annotations are and how they are read."""

    kind: str = "coco"  # coco | voc | shapes, or the dotted name of a module of yours
    root: str | None = None  # COCO: holds annotations/ and a folder per split; VOC: holds VOCdevkit/
    train: tuple[str, ...] = ("train2017",)
    val: tuple[str, ...] = ("val2017",)
    images: str | None = None  # image folder below root, where it is not the split's own
    min_size: tuple[int, ...] = (800,)  # shorter side, pixels; several: one is drawn per training image, the last one tests
    max_size: int = 1333  # longer side, pixels
    workers: int = 4
    empty_images: Literal["keep", "drop"] = "drop"  # in training; evaluation always sees every image
    flip: bool = True  # mirror half of the training images
    exif: bool = True  # turn photos as their camera says


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    batch_size: int = 8  # images per forward pass over all processes (the paper: 8 GPUs, one each)
    steps: int = 90000
    lr: float = 0.01  # for `reference_batch` images a step; scaled in proportion
    reference_batch: int = 8
    optimizer: Literal["sgd", "adamw"] = "sgd"  # with adamw rates of 1e-4 or so are usual
    momentum: float = 0.9  # He et al. 2015, §3.4; AdamW's first decay rate
    weight_decay: float = 1e-4  # He et al. 2015, §3.4
    warmup_steps: int = 500
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: tuple[int, ...] = (60000, 80000)
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    channels_last: bool = True  # what convolutions want on CPU and GPU alike
    seed: int = 0
    deterministic: bool = False  # on a GPU: operators that repeat bit for bit, where torch has such (it names those it lacks); slower
    accumulate: int = 1  # forward passes per optimiser step
    clip_norm: float | None = None
    ema: float | None = None  # decay, e.g. 0.9998
    compile: bool = False  # torch.compile of the backbone; minutes at the start
    eval_every: int = 5000  # 0: only at the end
    save_every: int = 1000
    keep_checkpoints: int = 3
    early_stop: int | None = None  # evaluations without a better figure; null: run all steps
    log_every: int = 20
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "reference_batch", "accumulate", "save_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name}={getattr(self, name)} is not possible; it must be at least 1")
        if self.schedule == "step" and list(self.milestones) != sorted(self.milestones):
            raise InputError(f"train.milestones={list(self.milestones)} must rise")


@dataclass(frozen=True, kw_only=True)
class DetectorTrainConfig(TrainConfig):
    """One training run of a detector."""

    protocol: Literal["joint", "alternating"] = "joint"  # joint: RPN and detector at once, as accurate in a quarter of the time
    # (Ren et al.'s own later code); alternating: their paper's four steps, each of `steps` (§3.2)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How a detector is judged."""

    engine: Literal["auto", "pycocotools", "hotcoco"] = "auto"  # auto: the fast one where its figures are proven identical
    batch_size: int = 1
    samples: int = 8  # validation images drawn into samples/
    report: bool = True  # OUTPUT/report/index.html, a page of the last evaluation: seconds (15 more at the size of val2017), some megabytes


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """Everything a detection run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: DetectorTrainConfig = field(default_factory=DetectorTrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


class RunConfig(Protocol):
    """What every training run's config has, whatever it trains."""

    @property
    def model(self) -> Any: ...

    @property
    def data(self) -> DataConfig: ...

    @property
    def train(self) -> TrainConfig: ...

    @property
    def eval(self) -> Any: ...


def load_detection_config(path: Path | None, overrides: Sequence[str] = ()) -> DetectionConfig:
    """Read a YAML file and `key.path=value` overrides; InputError names what is wrong, where, and the nearest key."""
    return load_config(DetectionConfig, path, overrides)


def parse_detection_config(text: str, *, source: str, overrides: Sequence[str] = ()) -> DetectionConfig:
    """The same for YAML in memory, such as the config inside a weights file."""
    return load_config_text(DetectionConfig, text, source=source, overrides=overrides)


def chosen_device(config: RunConfig) -> str | None:
    """ "cpu" or "cuda" where the config says so; None lets torch choose."""
    return None if config.train.device == "auto" else config.train.device


def load_split(config: DetectionConfig, which: Literal["train", "val"]) -> Source:
    """The training or validation data of a run, its annotations read and checked. Raises InputError."""
    from detection.data import load_source

    data = config.data
    return load_source(data.kind, data.root, getattr(data, which), masks=config.model.mask, images=data.images, exif=data.exif)


def train_loader(
    config: RunConfig, source: Source, process: Process, *, kind: type[DetectionDataset] | None = None
) -> tuple[BatchLoader, ResumableBatchSampler]:
    """This process's share of endless training batches, and the sampler whose position a checkpoint keeps.

    kind: what a sample is; None: an image with its objects.
    """
    from detection.data.dataset import DetectionDataset
    from detection.data.loader import build_train_loader

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
        kind=kind or DetectionDataset,
    )


def read_size(config: RunConfig) -> dict[str, Any]:
    """How `resized_size` makes a test image: by data.min_size and max_size. Several scales have all the detail that the largest one shows,
    and what is smaller than that stays as it is on disk.
    """
    from detection.multiscale import LONGEST_PX

    test, shorter = getattr(config.model, "test", None), config.data.min_size[-1]
    if test is None or test.scales is None:
        return {"min_size": shorter, "max_size": config.data.max_size, "enlarge": True}
    largest = max(shorter, *test.scales)
    return {"min_size": largest, "max_size": max(largest, LONGEST_PX, config.data.max_size), "enlarge": False}


def eval_loader(config: RunConfig, source: Source, process: Process, *, kind: type[DetectionDataset] | None = None) -> BatchLoader:
    """This process's share of the evaluation images; each image is in exactly one share."""
    from detection.data.dataset import DetectionDataset
    from detection.data.loader import build_eval_loader

    return build_eval_loader(
        source,
        batch_size=config.eval.batch_size,
        workers=config.data.workers,
        rank=process.rank,
        world_size=process.world_size,
        kind=kind or DetectionDataset,
        **read_size(config),
    )
