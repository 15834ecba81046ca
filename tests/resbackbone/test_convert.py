"""Conversion from file to file, by the function and by the tool, on made weights and on real ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from resbackbone import create_backbone, create_classifier, load_weights
from resbackbone.convert import convert_weights
from resbackbone.errors import InputError
from resbackbone.weights import WeightsInfo
from tests.resbackbone.test_resnet import images, randomise_norms
from tools.convert_weights import main


def saved(folder: Path, name: str, info: WeightsInfo | None = None, **options: object) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    net = create_classifier(name, **options).eval()  # type: ignore[arg-type]
    randomise_norms(net)
    path = folder / f"{name}.safetensors"
    save_file(net.state_dict(), path, metadata=info.to_metadata() if info else None)
    return net, path


def same_logits(one: nn.Module, other: nn.Module, size: int = 64) -> None:
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(images(1, 3, size, size)), one(images(1, 3, size, size)), rtol=1e-5, atol=1e-5)


def test_the_network_is_recognised_and_every_target_reads_back_the_same(tmp_path: Path) -> None:
    net, source = saved(tmp_path, "resnet18")
    for to, target in (("resbackbone", "a.safetensors"), ("torchvision", "b.pth"), ("timm", "c.safetensors"), ("detectron2", "d.pkl")):
        conversion = convert_weights(source, tmp_path / target, to=to)
        assert conversion.info.architecture == "resnet18"
        assert re.search(r"resnet18 \(shortcut B\): loaded (\d+)/\1 tensors", str(conversion))
        again = convert_weights(tmp_path / target, tmp_path / "again.safetensors", to="resbackbone")
        assert again.info.architecture == "resnet18"
        same_logits(net, create_classifier("resnet18", weights=tmp_path / "again.safetensors"))


def test_torchvision_and_timm_load_what_is_written_for_them(tmp_path: Path) -> None:
    import torchvision

    net, source = saved(tmp_path, "resnet18")
    convert_weights(source, tmp_path / "tv.pth", to="torchvision")
    theirs = torchvision.models.resnet18()
    theirs.load_state_dict(torch.load(tmp_path / "tv.pth", weights_only=True), strict=True)
    same_logits(net, theirs)
    timm = pytest.importorskip("timm")
    net, source = saved(tmp_path, "resnet50", variant="v2")
    convert_weights(source, tmp_path / "timm.safetensors", to="timm")
    model = timm.create_model("resnetv2_50", pretrained=False)
    missing = model.load_state_dict(load_file(tmp_path / "timm.safetensors"), strict=False)
    assert not missing.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys)
    same_logits(net, model)


def test_what_the_file_says_travels_along(tmp_path: Path) -> None:
    info = WeightsInfo(variant="v1", norm_eps=1e-3, color_order="BGR", mean=(1.0, 2.0, 3.0), std=(1.0, 1.0, 1.0), input_range=255.0)
    _, source = saved(tmp_path, "resnet50", info, variant="v1", norm_eps=1e-3)
    conversion = convert_weights(source, tmp_path / "out.safetensors", to="resbackbone")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        written = WeightsInfo.from_metadata(file.metadata())
    assert written == conversion.info
    assert (written.architecture, written.variant, written.shortcut, written.norm_eps) == ("resnet50", "v1", "B", 1e-3)
    net = create_backbone("resnet50", weights=tmp_path / "out.safetensors", variant="v1", norm="frozen")
    assert net.preprocessing.color_order == "BGR"
    with pytest.raises(InputError, match=r"variant v1, not v1\.5"):
        create_backbone("resnet50", weights=tmp_path / "out.safetensors")
    for to in ("torchvision", "timm"):
        with pytest.raises(InputError, match=r"v1\.5"):
            convert_weights(source, tmp_path / "no.pth", to=to)
        assert not (tmp_path / "no.pth").exists()


def test_a_backbone_without_its_head_is_enough(tmp_path: Path) -> None:
    save_file(create_backbone("resnet34").state_dict(), tmp_path / "body.safetensors")
    assert convert_weights(tmp_path / "body.safetensors", tmp_path / "b.pth", to="torchvision").info.architecture == "resnet34"


def test_what_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    _, source = saved(tmp_path, "resnet20_cifar")
    out = tmp_path / "out.safetensors"
    with pytest.raises(InputError, match="tensors of plain20_cifar and of resnet20_cifar alike; say which one with --name"):
        convert_weights(source, out, to="resbackbone")
    assert convert_weights(source, out, to="resbackbone", name="plain20_cifar").info.architecture == "plain20_cifar"
    with pytest.raises(InputError, match="says it holds plain20_cifar, not resnet20_cifar"):
        convert_weights(out, tmp_path / "other.safetensors", to="resbackbone", name="resnet20_cifar")
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="no network of ours"):
        convert_weights(tmp_path / "other.safetensors", out, to="resbackbone")
    with pytest.raises(InputError, match="did you mean 'timm'"):
        convert_weights(source, out, to="tim")
    with pytest.raises(InputError, match=r"give the file that ending"):
        convert_weights(source, tmp_path / "x.pth", to="resbackbone", name="plain20_cifar")
    with pytest.raises(InputError, match="torchvision has no resnet20_cifar"):
        convert_weights(source, tmp_path / "x.pth", to="torchvision", name="resnet20_cifar")


def test_lost_tensors_are_named(tmp_path: Path) -> None:
    state = create_classifier("resnet18").state_dict()
    del state["layer3.0.bn1.running_var"]
    save_file(state, tmp_path / "lost.safetensors")
    with pytest.raises(InputError, match=r"1 missing: layer3\.0\.bn1\.running_var"):
        convert_weights(tmp_path / "lost.safetensors", tmp_path / "x.safetensors", to="resbackbone", name="resnet18")


# ------------------------------------------------------------------------------------------------------------------- real weights


@pytest.fixture(scope="module")
def cifar_test(shared_data: Path) -> Tensor:
    """The first 1000 test images of CIFAR-10, uint8 [N, 3, 32, 32]."""
    mosaic = cv2.imread(str(shared_data / "cifar10" / "test_lossless_0.webp"))[..., ::-1]
    tiles = mosaic.reshape(50, 32, 50, 32, 3).transpose(0, 2, 1, 3, 4).reshape(2500, 32, 32, 3)
    return torch.from_numpy(np.ascontiguousarray(tiles[:1000])).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def cifar_labels(shared_data: Path) -> Tensor:
    return torch.from_numpy(np.load(shared_data / "cifar10" / "cifar10_labels.npz")["test"][:1000].astype(np.int64))


@torch.no_grad()
def logits_of(net: nn.Module, pixels: Tensor) -> Tensor:
    return torch.cat([net.eval()(part) for part in pixels.split(250)])


def test_the_known_resnet20_makes_exactly_its_errors(
    shared_data: Path, cifar_test: Tensor, cifar_labels: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = shared_data / "known_answers" / "cifar10_weights", "resnet20-12fca82f.th"
    known = json.loads((folder / "expected.json").read_text())[file]
    arguments = [str(folder / file), str(tmp_path / "out.safetensors"), "--to", "resbackbone", "--name", "resnet20_cifar"]
    assert main(arguments) == 0
    assert "loaded 97/97 tensors" in capsys.readouterr().out
    net = create_classifier("resnet20_cifar", weights=tmp_path / "out.safetensors")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    logits = logits_of(net, (cifar_test / 255 - mean) / std)
    wrong = (logits.argmax(1) != cifar_labels).nonzero().flatten().tolist()
    assert wrong == known["wrong_indices_first_1000"]
    assert len(wrong) == known["errors_first_1000"] == 85
    torch.testing.assert_close(logits[0], torch.tensor(known["logits_image0"]), rtol=0, atol=1e-3)


def test_imagenet_weights_reproduce_their_known_logits(shared_data: Path, unpacked_data: Path) -> None:
    known = json.loads((shared_data / "weights" / "expected_imagenet.json").read_text())
    rows = torch.arange(224 * 224, dtype=torch.float32).view(1, 224, 224)
    x = torch.sin(0.01 * rows + torch.arange(3).view(3, 1, 1))[None]
    for name in ("resnet18", "resnet50"):
        file = f"{name}_imagenet1k_fp16.safetensors"
        answer = known[file]["sin_input"]
        with torch.no_grad():
            logits = create_classifier(name, weights=unpacked_data / "weights" / file).eval()(x)[0]
        torch.testing.assert_close(logits[:8], torch.tensor(answer["first8"]), rtol=0, atol=2e-4)
        assert logits.argmax().item() == answer["argmax"]
        assert logits.max().item() == pytest.approx(answer["max"], abs=2e-4)


def test_a_detector_takes_a_converted_backbone(tmp_path: Path) -> None:
    """The norms' epsilon and the preprocessing reach the detector, and its resolved config keeps the first."""
    from detection.build import build_detector, resolved_config
    from detection.config import parse_detection_config

    info = WeightsInfo(norm_eps=1e-3, color_order="BGR", mean=(1.0, 2.0, 3.0), std=(1.0, 1.0, 1.0), input_range=255.0)
    _, source = saved(tmp_path, "resnet18", info)
    text = f"model: {{head: c4, backbone: {{name: resnet18, weights: {source}, options: {{shortcut: B}}}}}}"
    config = parse_detection_config(text, source="here")
    detector = build_detector(config, 2)
    assert detector.preprocess.preprocessing.color_order == "BGR"
    resolved = resolved_config(config, detector)
    assert resolved.model.backbone.norm_eps == 1e-3
    again = build_detector(resolved, 2, initial_weights=False, preprocessing=detector.preprocess.preprocessing)
    load_weights(again, detector.state_dict())
    epsilons = {module.eps for module in again.modules() if hasattr(module, "running_var")}
    assert epsilons == {1e-3}
