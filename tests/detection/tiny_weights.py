"""An untrained detector of two classes, as a run would leave it."""

from __future__ import annotations

from pathlib import Path

from detection.build import build_detector
from detection.config import load_detection_config
from detection.predict import detector_metadata
from resbackbone.runtime.checkpoint import save_weights

TINY = [
    "model.head=fpn",
    "model.backbone.name=resnet18",
    "model.backbone.weights=null",
    "model.backbone.norm=group",
    "model.roi.head_width=16",
    "model.test.score_threshold=0.0",
    "model.test.detections=5",
    "data.min_size=64",
    "data.max_size=96",
    "train.precision=fp32",
]


def save_tiny(folder: Path) -> Path:
    """folder/model_final.safetensors, for the classes cat and dog."""
    config = load_detection_config(None, TINY)
    detector = build_detector(config, 2)
    save_weights(folder / "model_final.safetensors", detector.state_dict(), detector_metadata(config, ("cat", "dog"), detector))
    return folder / "model_final.safetensors"
