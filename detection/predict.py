"""An image in, its boxes out: loading a trained detector and running it, on one image or over a validation split."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detection.build import build_detector, chosen_steps
from detection.config import DetectionConfig, RunConfig, chosen_device, load_detection_config, parse_detection_config, read_size
from detection.data.images import check_pixels, resize_image, resized_size
from detection.ensemble import Ensemble
from detection.faster_rcnn import FasterRCNN
from detection.structures import Detections
from detection.torchvision_weights import looks_like_torchvision, torchvision_detector
from resbackbone.backbone import Preprocessing
from resbackbone.errors import InputError
from resbackbone.runtime import distributed
from resbackbone.runtime.checkpoint import load_checkpoint
from resbackbone.runtime.config import dump_config
from resbackbone.runtime.precision import Precision
from resbackbone.weights import read_state_dict

FORMAT = "resbackbone-detector-1"


def detector_metadata(config: DetectionConfig, classes: Sequence[str], detector: torch.nn.Module) -> dict[str, str]:
    """What travels with a detector's weights: its config, class names and preprocessing, as text."""
    assert isinstance(detector, FasterRCNN)
    preprocessing = dataclasses.asdict(detector.preprocess.preprocessing)
    return {
        "format": FORMAT,
        "config": dump_config(config),
        "classes": json.dumps(list(classes)),
        "preprocessing": json.dumps(preprocessing),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorFile:
    """The content of a weights file or checkpoint that training left. preprocessing: None where the file doesn't say."""

    path: Path
    tensors: dict[str, Tensor]
    config: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing | None


def read_detector_file(path: Path, *, expected: str = FORMAT) -> DetectorFile:
    """Read model_final.safetensors, a checkpoint (its folder or its state.pt), or torchvision's Faster or Mask R-CNN; else InputError.

    expected: the format its metadata must name; a segmenter's file is read by this as well.
    """
    path = Path(path)
    saved = read_run_checkpoint(path)
    if saved is not None:
        tensors = saved["model"]
        if saved.get("ema") is not None:  # the average is what was judged
            tensors = {name.removeprefix("module."): value for name, value in saved["ema"].items() if name != "n_averaged"}
        said = saved.get("metadata", {}).get("preprocessing")  # not in checkpoints of before 2026-11
        classes = tuple(saved["classes"])
        return DetectorFile(
            path=path, tensors=tensors, config=saved["config"], classes=classes, preprocessing=said and _preprocessing(said)
        )
    tensors, metadata = ({}, {}) if path.is_dir() else read_state_dict(path)
    if expected == FORMAT and looks_like_torchvision(tensors):
        tensors, text, classes = torchvision_detector(tensors, str(path))
        return DetectorFile(path=path, tensors=tensors, config=text, classes=classes, preprocessing=Preprocessing())
    if metadata.get("format") != expected:
        raise InputError(
            f"{path} holds no {expected.split('-')[1]} of ours (its metadata lacks format={expected}); give a run's "
            "model_final.safetensors or a folder below its checkpoints/. Backbone weights belong into model.backbone.weights"
        )
    return DetectorFile(
        path=path,
        tensors=tensors,
        config=metadata["config"],
        classes=tuple(json.loads(metadata["classes"])),
        preprocessing=_preprocessing(metadata["preprocessing"]),
    )


def read_run_checkpoint(path: Path) -> dict[str, Any] | None:
    """What a checkpoint of ours holds, by its folder or as a .pt file of any name; None for what isn't one."""
    if not (path.is_dir() or path.suffix == ".pt"):
        return None
    saved = load_checkpoint(path)
    return saved if {"model", "config", "classes"} <= saved.keys() else None


def _preprocessing(text: str) -> Preprocessing:
    values: dict[str, Any] = json.loads(text)
    return Preprocessing(**values | {name: tuple(values[name]) for name in ("mean", "std")})


def config_from_weights(path: Path, overrides: Sequence[str] = ()) -> DetectionConfig:
    """The config a detector was trained with, as its file carries it, with overrides."""
    return parse_detection_config(read_detector_file(path).config, source=f"the config inside {path}", overrides=overrides)


def resolve_config(path: Path | None, weights: Path, overrides: Sequence[str] = ()) -> DetectionConfig:
    """The config of a file, or, where `path` is None, the one inside the weights; with overrides."""
    return config_from_weights(weights, overrides) if path is None else load_detection_config(path, overrides)


def resolve_configs(path: Path | None, weights: Sequence[Path], overrides: Sequence[str] = ()) -> list[DetectionConfig]:
    """The config of each weights file, as `resolve_config` finds it; several files are an ensemble, whose members carry their own."""
    if path is not None and len(weights) > 1:
        raise InputError(
            f"--config {path} cannot describe {len(weights)} detectors; leave it out: each weights file carries its own config"
        )
    return [resolve_config(path, one, overrides) for one in weights]


def load_detector(config: DetectionConfig, weights: Path, *, device: torch.device) -> tuple[FasterRCNN, tuple[str, ...]]:
    """The detector `config` describes with the weights of `weights`, in eval mode on `device`, and its class names.

    Raises InputError when the file belongs to another architecture, naming the first tensors that differ.
    """
    file = read_detector_file(weights)
    _check_context(config, file)
    detector = build_detector(config, len(file.classes), initial_weights=False, preprocessing=file.preprocessing)
    load_strictly(detector, file, config)
    detector.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return detector.eval(), file.classes


def load_strictly(model: torch.nn.Module, file: DetectorFile, config: RunConfig) -> None:
    """Put a file's tensors into the model that `config` describes; InputError names the first ones that don't fit."""
    ours = model.state_dict()
    missing, unexpected = sorted(ours.keys() - file.tensors.keys()), sorted(file.tensors.keys() - ours.keys())
    shapes = [name for name in ours.keys() & file.tensors.keys() if ours[name].shape != file.tensors[name].shape]
    if missing or unexpected or shapes:
        raise InputError(
            f"{file.path} belongs to another architecture than the config's ({config.model.backbone.name}, head {config.model.head}): "
            f"{len(missing)} tensors missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}, {len(shapes)} of another shape "
            f"{sorted(shapes)[:3]}. Leave --config out: the file carries its own"
        )
    model.load_state_dict(file.tensors)


def _check_context(config: DetectionConfig, file: DetectorFile) -> None:
    trained = parse_detection_config(file.config, source=f"the config inside {file.path}").model.test.context
    if config.model.test.context != trained:
        raise InputError(
            f"model.test.context={str(not trained).lower()}, but {file.path} was trained with {str(trained).lower()}: context is a part of "
            "the network; leave it as it is, or train a detector with it"
        )


def load_detectors(
    configs: Sequence[DetectionConfig], weights: Sequence[Path], *, device: torch.device
) -> tuple[FasterRCNN | Ensemble, tuple[str, ...]]:
    """The detector of a weights file, or the ensemble of several, with the steps of the first's config; and their class names.

    Raises InputError where the members don't have the same classes in the same order.
    """
    loaded = [load_detector(config, path, device=device) for config, path in zip(configs, weights, strict=True)]
    (first, classes), others = loaded[0], loaded[1:]
    if not others:
        return first, classes
    for path, (_, theirs) in zip(weights[1:], others, strict=True):
        if theirs != classes:
            raise InputError(
                f"an ensemble needs the same classes in the same order: {weights[0]} knows {len(classes)} ({', '.join(classes[:4])} …), "
                f"{path} knows {len(theirs)} ({', '.join(theirs[:4])} …)"
            )
    return Ensemble([detector for detector, _ in loaded], steps=chosen_steps(configs[0])).eval(), classes


class Predictor:
    """A trained detector, or an ensemble, for images as they are; the first config says at which size they look."""

    def __init__(self, configs: DetectionConfig | Sequence[DetectionConfig], weights: Path | Sequence[Path]) -> None:
        config, *_ = configs = [configs] if isinstance(configs, DetectionConfig) else list(configs)
        paths = [weights] if isinstance(weights, Path) else list(weights)
        self.device = distributed.setup(chosen_device(config)).device
        self.detector, self.classes = load_detectors(configs, paths, device=self.device)
        self.size_rule = read_size(config)
        self.precision = Precision(config.train.precision, self.device)

    def __call__(self, image: np.ndarray) -> Detections:
        """Detect in `image`, uint8 (H, W, 3) RGB of any size; boxes come back in its own pixels, on the CPU.

        Raises InputError for an array of another kind.
        """
        (found,) = self.detect([image])
        return found

    @torch.inference_mode()
    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """The same for several images of any sizes: those of one padded size pass through the network together."""
        for image in images:
            check_pixels(image)
        sizes = [resized_size(*image.shape[:2], **self.size_rule) for image in images]
        pixels = [self._pixels(image, size) for image, size in zip(images, sizes, strict=True)]
        with self.precision.autocast():
            found = self.detector.detect(pixels)
        return [one.scaled(size, image.shape[:2]).to("cpu") for one, size, image in zip(found, sizes, images, strict=True)]

    def _pixels(self, image: np.ndarray, size: tuple[int, int]) -> Tensor:
        """(3, *size) uint8, on the device."""
        return torch.from_numpy(np.ascontiguousarray(resize_image(image, size))).permute(2, 0, 1).contiguous().to(self.device)
