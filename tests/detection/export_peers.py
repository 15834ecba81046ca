"""Small detectors to export, and the exported graph without exporting it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from detection import export
from detection.build import build_detector
from detection.config import DetectionConfig, load_detection_config
from detection.exportable import ExportableDetector
from detection.faster_rcnn import FasterRCNN
from detection.predict import config_from_weights, detector_metadata, load_detector
from resbackbone.backbone import FeatureInfo, StagedBackbone
from resbackbone.registry import BACKBONES, register_backbone
from resbackbone.runtime.checkpoint import save_weights

CLASSES = ("cat", "dog", "bird")
TINY = (
    "model.backbone.name=tiny_for_export",
    "model.backbone.weights=null",
    "model.backbone.norm=batch",
    "model.backbone.freeze_at=0",
    "model.roi.head_width=16",
    "model.roi.candidates_test=40",
    "model.roi.proposals_test=30",
    "model.test.detections=20",
    "data.kind=shapes",
    "data.min_size=[128]",
    "data.max_size=160",
)


def stage(inside: int, outside: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.BatchNorm2d(outside), nn.ReLU())


def register_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five strided convolutions: seconds to trace, where a ResNet takes half a minute."""
    monkeypatch.setattr("resbackbone.registry.BACKBONES", dict(BACKBONES))

    @register_backbone("tiny_for_export")
    def tiny() -> StagedBackbone:
        names, widths = ("conv1", "conv2_x", "conv3_x", "conv4_x", "conv5_x"), (3, 8, 8, 16, 16, 16)
        return StagedBackbone({name: (stage(*widths[k : k + 2]), FeatureInfo(widths[k + 1], 2 << k)) for k, name in enumerate(names)})


def random_detector(config: DetectionConfig, classes: tuple[str, ...] = CLASSES, *, certainty: float = 2.0) -> FasterRCNN:
    """Random weights that find something: scores over the whole range, higher with `certainty`, and boxes that move."""
    torch.manual_seed(0)
    detector = build_detector(config, len(classes), initial_weights=False)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
            module.running_mean.normal_(0, 0.1)
    for layer, std in ((detector.rpn.cls_logits, 1.0), (detector.rpn.bbox_pred, 0.05)):
        nn.init.normal_(layer.weight, std=std)
    nn.init.normal_(detector.roi_head.cls_score.weight, std=certainty)
    nn.init.normal_(detector.roi_head.bbox_pred.weight, std=1.0)
    if detector.mask_head is not None:
        nn.init.normal_(detector.mask_head.mask_fcn_logits.weight, std=3.0)
    return detector.eval()


def write_detector(path: Path, *overrides: str, certainty: float = 2.0) -> Path:
    config = load_detection_config(None, [*TINY, *overrides])
    detector = random_detector(config, certainty=certainty)
    save_weights(path, detector.state_dict(), detector_metadata(config, CLASSES, detector))
    return path


def blocks(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8).repeat(16, axis=0).repeat(16, axis=1)


def stand_in(monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    """The exported graph in eager mode, in the place of a program."""
    monkeypatch.setattr(export, "write_program", lambda graph, path, *, to: path.write_bytes(b"x"))
    run = in_eager_mode(load_detector(config_from_weights(weights), weights, device=torch.device("cpu"))[0])
    monkeypatch.setattr(export, "open_program", lambda path, *, to: run)


def in_eager_mode(detector: FasterRCNN) -> export.Run:
    graph = ExportableDetector(detector).eval()

    @torch.no_grad()
    def run(*inputs: np.ndarray) -> list[np.ndarray]:
        return [output.numpy() for output in graph(*map(torch.from_numpy, inputs))]

    return run
