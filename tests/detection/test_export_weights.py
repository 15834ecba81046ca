"""Which weights files are exported as detectors, which as backbones, and with which options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from detection import export
from detection.predict import FORMAT
from resbackbone.runtime.checkpoint import save_weights
from tools.export import main, parse


@pytest.mark.parametrize(
    ("name", "tensors", "is_one"),
    [
        ("fasterrcnn_resnet50_fpn_coco.pth", {"roi_heads.box_head.fc6.weight": torch.ones(2)}, True),
        ("theirs.safetensors", {"backbone.body.conv1.weight": torch.ones(2), "roi_heads.box_head.fc6.weight": torch.ones(2)}, True),
        ("resnet50.pth", {"conv1.weight": torch.ones(2)}, False),
        ("broken.pth", None, False),
        ("best.pt", {"model": {}, "config": "{}", "classes": ["cat"]}, True),
        ("reference.pt", {"model": {"conv1.weight": torch.ones(2)}, "epoch": 3}, False),
        ("fasterrcnn.pt", {"roi_heads.box_head.fc6.weight": torch.ones(2)}, True),
    ],
)
def test_torchvision_s_files_are_detectors_too(tmp_path: Path, name: str, tensors: dict[str, Any] | None, is_one: bool) -> None:
    path = tmp_path / name
    if tensors is None:
        path.write_bytes(b"not a weights file")
    elif path.suffix != ".safetensors":
        torch.save(tensors, path)
    else:
        save_weights(path, tensors, {})
    assert export.is_detector(path) is is_one


@pytest.mark.parametrize(
    ("metadata", "wrong", "kind", "left_out"),
    [
        ({"format": FORMAT}, ["--name", "resnet50", "--variant", "v2"], "holds a detector", "leave --name resnet50 --variant v2 out"),
        ({}, ["model.test.flip=true", "data.min_size=[96]"], "holds no detector", "leave model.test.flip=true data.min_size=[96] out"),
    ],
)
def test_options_of_the_other_kind_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    metadata: dict[str, str],
    wrong: list[str],
    kind: str,
    left_out: str,
) -> None:
    weights, calls = tmp_path / "w.safetensors", []
    save_weights(weights, {"conv1.weight": torch.ones(2)}, metadata)

    def exporter(path: Path, **options: Any) -> str:
        calls.append(options)
        return "written"

    monkeypatch.setattr(export, "export_detector", exporter)
    monkeypatch.setattr(export, "export_backbone", exporter)
    assert main([str(weights), *wrong, "--to", "torch-export"]) == 1
    said = capsys.readouterr().err
    assert kind in said
    assert left_out in said
    assert calls == []
    assert main([str(weights), "--to", "torch-export"]) == 0
    assert calls[0]["pictures"] == []


def test_settings_after_images_are_settings(tmp_path: Path) -> None:
    picture = tmp_path / "a=b.jpg"
    picture.touch()
    args = parse(["w.safetensors", "model.roi.op=pool", "--to", "onnx", "--images", "photos", str(picture), "model.test.refine=false"])
    assert args.images == ["photos", str(picture)]
    assert args.overrides == ["model.roi.op=pool", "model.test.refine=false"]
