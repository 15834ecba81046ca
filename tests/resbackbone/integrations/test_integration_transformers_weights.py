"""Weights of any format into transformers' models, what is saved with them, and what goes wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from host_checks import batch_of, randomise, relative
from safetensors.torch import save_file
from torch import nn

from resbackbone import create_backbone, create_classifier
from resbackbone.errors import InputError
from resbackbone.layers import FrozenBatchNorm2d
from resbackbone.weights import WeightsInfo

transformers = pytest.importorskip("transformers")

from resbackbone.integrations import transformers as integration  # noqa: E402
from resbackbone.integrations.transformers import (  # noqa: E402
    ResbackboneBackbone,
    ResbackboneConfig,
    load_backbone_weights,
    normalization,
)

BGR = {"color_order": "BGR", "mean": (10.0, 20.0, 30.0), "std": (1.0, 2.0, 4.0), "input_range": 255.0}


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    integration.register()
    transformers.logging.set_verbosity_error()


def detr(**options: Any) -> nn.Module:
    size = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 4, "encoder_layers": 1, "decoder_layers": 1}
    config = ResbackboneConfig(name="resnet18", **options)
    return transformers.DetrForObjectDetection(
        transformers.DetrConfig(backbone_config=config, encoder_attention_heads=2, decoder_attention_heads=2, **size)
    )


def write(folder: Path, name: str = "resnet18", **facts: Any) -> Path:
    """A classifier with norms as training leaves them, as a file."""
    torch.manual_seed(2)
    path = folder / f"{name}.safetensors"
    save_file(randomise(create_classifier(name, num_classes=5)).state_dict(), path, WeightsInfo(architecture=name, **facts).to_metadata())
    return path


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_a_file_fills_the_backbone_inside_a_detector(norm: str, tmp_path: Path) -> None:
    path = write(tmp_path)
    model = detr(norm=norm, out_features=["conv4_x", "conv5_x"], freeze_at=1).eval()
    report = load_backbone_weights(model, path)
    assert "head left: fc." in report
    whole = create_backbone("resnet18", weights=path).eval()
    with torch.no_grad():
        found, expected = model.model.backbone.model(batch_of()).feature_maps, whole(batch_of())
    assert relative(found[0], expected["conv4_x"]) < 1e-5
    assert relative(found[1], expected["conv5_x"]) < 1e-5


def test_what_the_weights_say_is_saved_with_the_model(tmp_path: Path) -> None:
    """Their epsilon, and their images: those are BGR, which become RGB in a host."""
    path = write(tmp_path, norm_eps=0.01, **BGR)
    model = detr(norm="frozen").eval()
    load_backbone_weights(model, path)
    assert normalization(model) == {
        "image_mean": pytest.approx([30 / 255, 20 / 255, 10 / 255]),
        "image_std": pytest.approx([4 / 255, 2 / 255, 1 / 255]),
    }
    model.save_pretrained(tmp_path / "saved")
    again = transformers.DetrForObjectDetection.from_pretrained(tmp_path / "saved")
    norms = [module for module in again.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert len(norms) == 20
    assert all(norm.eps == 0.01 for norm in norms)
    assert normalization(again) == normalization(model)
    whole = create_backbone("resnet18", weights=path).eval()
    with torch.no_grad():
        found = again.model.backbone.model(batch_of()).feature_maps[0]
        assert relative(found, whole(batch_of().flip(1))["conv5_x"]) < 1e-5
        assert torch.equal(found, model.model.backbone.model(batch_of()).feature_maps[0])
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["backbone_config"]
    assert saved["needs"] == "from resbackbone.integrations.transformers import register; register()"


def test_another_epsilon_needs_norms_that_the_host_leaves_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"norm_eps=0.01, and DetrForObjectDetection .*norm='frozen'"):
        load_backbone_weights(detr(), write(tmp_path, norm_eps=0.01))


def test_registered_once_and_found_by_type(tmp_path: Path) -> None:
    integration.register()
    config = transformers.AutoConfig.for_model("resbackbone", name="resnet18", out_indices=[-1, -2][::-1])
    assert isinstance(config, ResbackboneConfig)
    assert config.out_features == ["conv4_x", "conv5_x"]
    backbone = transformers.AutoBackbone.from_config(config)
    assert isinstance(backbone, ResbackboneBackbone)
    assert backbone.channels == [256, 512]
    backbone.save_pretrained(tmp_path)
    again = ResbackboneBackbone.from_pretrained(tmp_path, out_features=["conv3_x"])
    assert [list(each.shape) for each in again(batch_of()).feature_maps] == [[2, 128, 4, 6]]
    assert "resnet" not in ResbackboneConfig.model_type  # or DETR freezes all but its own names


def test_options_reach_the_network() -> None:
    config = ResbackboneConfig(name="resnet18", in_channels=1, output_stride=8, network={"shortcut": "A"}, out_indices=(0, 4))
    backbone = ResbackboneBackbone(config).eval()
    assert config.num_channels == 1
    assert config.image_mean == [pytest.approx(0.449)]
    assert backbone.network.shortcut == "A"
    output = backbone(torch.rand(1, 1, 64, 64), output_hidden_states=True)
    assert [each.shape[2] for each in output.feature_maps] == [32, 8]
    assert [each.shape[2] for each in output.hidden_states] == [32, 16, 8, 8, 8]
    (maps,) = backbone(torch.rand(1, 1, 64, 64), return_dict=False)
    assert len(maps) == 2
    backbone.out_features = ["conv2_x"]
    assert backbone(torch.rand(1, 1, 64, 64)).hidden_states is None
    assert backbone.channels == [64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": 2}, "no option 'freeze'; did you mean 'freeze_at'"),
        ({"weights": "resnet18.pth"}, r"load_backbone_weights\(model, FILE\)"),
        ({"name": "resnet51"}, "did you mean 'resnet"),
        ({"out_features": ["stage4"]}, "transformers' stage4 is our conv5_x"),
        ({"out_features": ["conv6_x"]}, "did you mean 'conv"),
        ({"out_features": ["conv5_x", "conv2_x"]}, "same order"),
        ({"out_features": ["conv2_x", "conv3_x"], "out_indices": [1, 3]}, "same stages"),
        ({"out_indices": [1, 7]}, r"4 \(conv5_x\)"),
        ({"out_indices": [-9]}, r"0 \(conv1\)"),
        ({"output_stride": 4}, "takes 8, 16 or 32"),
        ({"network": {"shortcuts": "A"}}, "did you mean 'shortcut'"),
        ({"freeze_at": 9}, "0 to 5"),
    ],
)
def test_wrong_configurations_are_explained(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResbackboneConfig(**{"name": "resnet18", **options})


def test_wrong_weights_are_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="says it is for architecture resnet34"):
        load_backbone_weights(detr(), write(tmp_path, "resnet34"))
    with pytest.raises(InputError, match="holds 0 backbones of ours"):
        load_backbone_weights(nn.Identity(), tmp_path)
    with pytest.raises(InputError, match="holds 2 backbones of ours"):
        load_backbone_weights(nn.ModuleList([detr(), detr()]), tmp_path)


def test_saved_weights_that_lack_something_are_refused(tmp_path: Path) -> None:
    """transformers would draw at random what it doesn't find; counters of batches are of no consequence."""
    ResbackboneBackbone(ResbackboneConfig(name="resnet18")).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="belongs to other weights"):
        ResbackboneBackbone.from_pretrained(tmp_path, config=ResbackboneConfig(name="resnet34"))
    fixed = ResbackboneBackbone(ResbackboneConfig(name="resnet18", norm="frozen"))
    fixed.save_pretrained(tmp_path / "fixed")
    learning = ResbackboneBackbone.from_pretrained(tmp_path / "fixed", config=ResbackboneConfig(name="resnet18"))
    assert learning.network.bn1.num_batches_tracked == 0


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "resbackbone.integrations.transformers")
    with pytest.raises(InputError, match=r"pip install 'resbackbone\[transformers\]'"):
        import resbackbone.integrations.transformers  # noqa: F401
