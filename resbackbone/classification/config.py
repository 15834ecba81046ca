"""The schema of a classification run. The defaults are the paper's ImageNet recipe (He et al. 2015, §3.4), each with its reason.

A YAML file holds one run's differences from them; `key.path=value` overrides either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from resbackbone.errors import InputError
from resbackbone.runtime.config import load_config, load_config_text


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network learns. How many classes it tells apart comes from the data."""

    name: str = "resnet50"  # list_backbones() has them all
    variant: Literal["v1", "v1.5", "v2"] = "v1.5"  # v1 is the paper's own; v1.5 is what everybody's weights have
    norm: Literal["batch", "sync", "group", "none"] = "batch"  # sync: statistics over all processes, for few images on each
    weights: str | None = None  # null: He initialisation | a file | torchvision
    checkpointing: bool = False  # trades a third more compute for most of the activations' memory
    options: dict[str, Any] = field(default_factory=dict)  # what only this network has, as {shortcut: A, stochastic_depth: 0.2}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images are, and what becomes of one before it reaches the network."""

    kind: Literal["folder", "ilsvrc", "cifar10", "shards"] = "folder"
    root: str | None = None  # folder and shards: holds a folder per split
    train: str = "train"
    val: str = "val"
    size: int = 224  # side of a training image, pixels (§3.4)
    crop: Literal["scale", "area", "pad"] = "scale"  # the paper's | torchvision's RandomResizedCrop | CIFAR's (§4.2)
    shorter_side: tuple[int, ...] = (256, 480)  # scale: it is drawn from this range, both ends included (§3.4)
    area: tuple[float, ...] = (0.08, 1.0)  # area: share of the image that a crop covers (Szegedy et al. 2014)
    padding: int = 4  # pad: zeros on each side before cropping `size` (§4.2)
    flip: bool = True  # mirror half of the training images
    pca_noise: float = 0.1  # deviation of the colour noise along RGB's principal axes (Krizhevsky et al. 2012, §4.1); 0: none
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = "none"  # torchvision's, with its own defaults
    # The paper subtracts the mean from 0 … 255; mean_std is what later networks take. Weights that say what they expect have it their way.
    normalize: Literal["mean", "mean_std"] = "mean"
    decode: Literal["cpu", "gpu"] = "cpu"  # gpu: training JPEGs are decoded, cut and resized there (torchvision's nvJPEG)
    reduced_decoding: bool = True  # on the CPU, decode a JPEG at 1/2, 1/4 or 1/8 where the crop still has pixels enough
    class_numbers: dict[str, int] | None = None  # evaluating weights with more outputs: which of them each class is; null: in order
    unreadable: Literal["stop", "skip"] = "stop"  # skip: the next image takes its place (in evaluation it counts as wrong)
    workers: int = 4
    lanes: int = 16  # shards: streams read side by side; processes must divide it, and the order of images depends on it
    shuffle_block: int = 256  # shards: images of a lane that are shuffled among themselves; all of them are held in memory

    def __post_init__(self) -> None:
        if self.decode == "gpu" and self.crop == "pad":
            raise InputError("data.decode=gpu cuts JPEGs, and data.crop=pad is CIFAR's; set data.decode=cpu, or data.crop to scale or area")
        _check_range("data.shorter_side", self.shorter_side, low=1)
        _check_range("data.area", self.area, low=0.0, high=1.0)
        for name, least in (("size", 1), ("workers", 0), ("padding", 0), ("lanes", 1), ("shuffle_block", 1), ("pca_noise", 0)):
            if getattr(self, name) < least:
                raise InputError(f"data.{name}={getattr(self, name)} is not possible; it must be at least {least}")
        if self.crop == "scale" and self.shorter_side[0] < self.size:
            raise InputError(f"data.shorter_side={list(self.shorter_side)} must be at least data.size={self.size}, the crop taken from it")
        negative = [f"{name}: {number}" for name, number in (self.class_numbers or {}).items() if number < 0]
        if negative:
            raise InputError(f"data.class_numbers has {', '.join(negative[:5])}; a network's outputs are numbered from 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. "Images" are counted over all processes."""

    batch_size: int = 256  # images a forward pass
    steps: int = 600_000  # "up to 60 x 10^4 iterations"
    lr: float = 0.1  # for `reference_batch` images a step; scaled in proportion
    reference_batch: int = 256
    optimizer: Literal["sgd", "adamw"] = "sgd"  # adamw takes rates of 2e-4 or so
    momentum: float = 0.9  # adamw: its first decay rate
    weight_decay: float = 1e-4
    decay_norms_and_biases: bool = True  # the paper decays all parameters; modern recipes leave these out
    schedule: Literal["plateau", "step", "cosine", "constant"] = "plateau"  # "divided by 10 when the error plateaus"
    milestones: tuple[int, ...] = ()  # step: where it is divided by 10
    plateau_patience: int = 5  # plateau: evaluations without a lower error before the rate is divided
    plateau_threshold: float = 0.002  # plateau: error must fall by this much to count, in shares of 1
    warmup: Literal["linear", "constant"] = "linear"
    warmup_steps: int = 0  # none for ImageNet (§3.4)
    warmup_factor: float = 0.1  # constant: the share of lr used (§4.2: 0.01 for ResNet-110)
    # constant: it ends once training error is below this, after warmup_steps at the latest. The error is that of the images since the
    # last line of the log and is looked at there, so another log_every may end the warm-up at another step.
    warmup_until_error: float | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha of torchvision's MixUp; 0: none
    cutmix: float = 0.0  # alpha of torchvision's CutMix; with both, a batch takes one of the two
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    seed: int = 0
    deterministic: bool = False  # on a GPU: operators that repeat bit for bit, where torch has such (it names those it lacks); slower
    accumulate: int = 1  # forward passes per optimiser step
    clip_norm: float | None = None
    ema: float | None = None  # decay, e.g. 0.9999
    compile: bool = False  # torch.compile; minutes at the start
    bn_images: int = 0  # at the end, batch norm's statistics are computed anew over so many training images (appendix A); -1: all
    eval_every: int = 5000  # about an epoch of ImageNet at 256; 0: only at the end
    save_every: int = 1000
    keep_checkpoints: int = 3
    log_every: int = 50
    samples: int = 8  # images of the first batch, as the network is shown them, that are drawn into samples/
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "reference_batch", "accumulate", "save_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name}={getattr(self, name)} is not possible; it must be at least 1")
        if self.samples < 0:
            raise InputError(f"train.samples={self.samples} is not possible; it is how many training images are drawn, 0 for none")
        if self.schedule == "step" and list(self.milestones) != sorted(self.milestones):
            raise InputError(f"train.milestones={list(self.milestones)} must rise")
        if self.schedule == "plateau" and self.eval_every < 1:
            raise InputError("train.eval_every=0 leaves schedule=plateau without errors to watch; set it, or take schedule=step")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise InputError(f"train.label_smoothing={self.label_smoothing} should be from 0 to below 1, such as 0.1")
        if self.bn_images < -1:
            raise InputError(f"train.bn_images={self.bn_images} is not possible; -1 takes all training images, 0 none")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How a classifier is judged."""

    mode: Literal["1crop", "10crop", "multiscale"] = "1crop"
    shorter_side: int = 256  # crops are taken from the image resized to this
    crop: int = 224
    scales: tuple[int, ...] = (224, 256, 384, 480, 640)  # multiscale: shorter sides whose scores are averaged (§3.4)
    flip: bool = False  # multiscale: average with the mirrored image too
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.crop > self.shorter_side:
            raise InputError(f"eval.crop={self.crop} is larger than eval.shorter_side={self.shorter_side}, which it is taken from")
        if self.batch_size < 1 or not self.scales:
            raise InputError(f"eval.batch_size={self.batch_size} and eval.scales={list(self.scales)}: at least one of each is needed")


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """Everything a classification run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def load_classification_config(path: Path | None, overrides: Sequence[str] = ()) -> ClassificationConfig:
    """Read a YAML file and `key.path=value` overrides; InputError names what is wrong, where, and the nearest key."""
    return load_config(ClassificationConfig, path, overrides)


def parse_classification_config(text: str, *, source: str, overrides: Sequence[str] = ()) -> ClassificationConfig:
    """The same for YAML in memory, such as the config inside a weights file."""
    return load_config_text(ClassificationConfig, text, source=source, overrides=overrides)


def _check_range(name: str, values: tuple[float, ...], *, low: float, high: float | None = None) -> None:
    if len(values) != 2 or not low <= values[0] <= values[1] or (high is not None and values[1] > high):
        raise InputError(f"{name}={list(values)} is not a range; it takes [smallest, largest]" + (f", at most {high}" if high else ""))
