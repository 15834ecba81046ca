"""Weights files: what fits is loaded as it is, what doesn't is named, what could harm is refused."""

from __future__ import annotations

import copy
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from resbackbone import create_backbone, create_classifier, load_weights
from resbackbone.backbone import Preprocessing
from resbackbone.errors import InputError
from resbackbone.weights import WeightsInfo, read_state_dict
from resbackbone.weights import torchvision as torchvision_weights
from resbackbone.weights.formats import read_weights


class Tiny(nn.Module):
    head_prefixes = ("fc.",)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)


def tiny_state(**extra: torch.Tensor) -> dict[str, torch.Tensor]:
    return {key: torch.rand(value.shape) for key, value in Tiny().state_dict().items() if value.is_floating_point()} | extra


def sin_image() -> torch.Tensor:
    return torch.sin(0.01 * torch.arange(224 * 224.0).view(1, 224, 224) + torch.arange(3.0).view(3, 1, 1))[None]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_real_weights_give_their_known_logits(name: str, shared_data: Path, unpacked_data: Path) -> None:
    file = unpacked_data / "weights" / f"{name}_imagenet1k_fp16.safetensors"
    known = json.loads((shared_data / "weights" / "expected_imagenet.json").read_text())[file.name]["sin_input"]
    net = create_classifier(name, weights=file).eval()
    assert net.load_report.startswith("loaded 1" if name == "resnet18" else "loaded 267/267")
    with torch.no_grad():
        logits = net(sin_image())[0]
    torch.testing.assert_close(logits[:8], torch.tensor(known["first8"]), rtol=0, atol=1e-3)
    assert (logits.argmax().item(), round(logits.max().item(), 3)) == (known["argmax"], pytest.approx(known["max"], abs=1e-3))


@pytest.mark.parametrize("norm", ["batch", "frozen", "eval"])
def test_real_weights_load_strictly_into_backbones(norm: str, unpacked_data: Path) -> None:
    net = create_backbone("resnet18", weights=unpacked_data / "weights" / "resnet18_imagenet1k_fp16.safetensors", norm=norm, freeze_at=2)
    assert "loaded 100/100 tensors" in net.load_report
    assert "head left: fc." in net.load_report
    assert all(value.dtype == torch.float32 for value in net.state_dict().values() if value.is_floating_point())


def test_frozen_and_batch_norm_see_the_same_in_real_weights(unpacked_data: Path) -> None:
    file = unpacked_data / "weights" / "resnet18_imagenet1k_fp16.safetensors"
    frozen, batch = (create_backbone("resnet18", weights=file, norm=norm) for norm in ("frozen", "batch"))
    image = sin_image()[..., :96, :128]
    with torch.no_grad():
        for (name, ours), expected in zip(frozen.train()(image).items(), batch.eval()(image).values(), strict=True):
            assert (ours - expected).norm() / expected.norm() < 1e-5, name


def test_weights_of_another_architecture_are_refused(unpacked_data: Path) -> None:
    file = unpacked_data / "weights" / "resnet50_imagenet1k_fp16.safetensors"
    with pytest.raises(InputError, match="says it is for architecture resnet50, not resnet18"):
        create_backbone("resnet18", weights=file)
    with pytest.raises(InputError) as error:
        load_weights(create_backbone("resnet18"), read_state_dict(file)[0])
    message = str(error.value)
    assert "resnet18" in message
    assert "165 unexpected: layer1.0.bn3" in message
    assert "of another shape: layer1.0.conv1.weight [64, 64, 1, 1] where [64, 64, 3, 3] belongs" in message
    with pytest.raises(InputError, match="unexpected"):
        create_backbone("resnet50", weights=file, norm="group")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".legacy.pth", ".nested.pth"])
def test_every_format_is_read(suffix: str, tmp_path: Path) -> None:
    state, path = tiny_state(), tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(state, path, metadata={"arch": "tiny"})
    else:
        content = {"epoch": 3, "state_dict": state} if "nested" in suffix else state
        torch.save(content, path, _use_new_zipfile_serialization="legacy" not in suffix)
    tensors, metadata = read_state_dict(path)
    assert metadata == ({"arch": "tiny"} if suffix == ".safetensors" else {})
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[key], state[key]) for key in state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_wrappers_add_is_stripped(prefix: str, tmp_path: Path) -> None:
    torch.save({prefix + key: value for key, value in tiny_state().items()}, tmp_path / "w.pth")
    assert str(load_weights(Tiny(), tmp_path / "w.pth")).startswith("loaded 6/6")


def test_half_precision_is_cast_and_the_head_left(tmp_path: Path) -> None:
    state = {key: value.half() for key, value in tiny_state(**{"fc.weight": torch.rand(2, 2)}).items()}
    save_file(state, tmp_path / "w.safetensors")
    net = Tiny()
    report = load_weights(net, tmp_path / "w.safetensors")
    assert report.left == ("fc.weight",)
    assert net.conv.weight.dtype == torch.float32
    assert torch.equal(net.conv.weight, state["conv.weight"].float())


def test_what_does_not_fit_is_counted_and_named_and_changes_nothing() -> None:
    state = tiny_state(**{f"more.{n}": torch.zeros(1) for n in range(7)})
    del state["bn.weight"]
    state["conv.bias"] = torch.zeros(9)
    net = Tiny()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError) as error:
        load_weights(net, state)
    message = str(error.value)
    for part in (
        "4 of 6",
        "1 missing: bn.weight",
        "7 unexpected: more.0, more.1, more.2, more.3, more.4, …",
        "conv.bias [9] where [4] belongs",
    ):
        assert part in message
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    report = load_weights(net, state, strict=False)
    assert (report.loaded, report.missing) == (4, ("bn.weight",))
    assert torch.equal(net.conv.weight, state["conv.weight"])


def test_nothing_in_common_is_refused_even_when_not_strict() -> None:
    with pytest.raises(InputError, match="0 of 6"):
        load_weights(Tiny(), {"other": torch.zeros(1)}, strict=False)


class Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["RESBACKBONE_TEST_HARM"],)


def test_a_malicious_pickle_is_refused_unexecuted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESBACKBONE_TEST_HARM", str(tmp_path / "harm"))
    torch.save({"conv.weight": Harm()}, tmp_path / "zip.pth")
    torch.save({"conv.weight": Harm()}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"conv.weight": Harm()}))
    for name in ("zip.pth", "legacy.pth", "plain.pth"):
        with pytest.raises(InputError, match=name):
            load_weights(Tiny(), tmp_path / name)
        with pytest.raises(InputError, match="nothing else in it is run"):
            read_state_dict(tmp_path / "zip.pth")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".legacy.pth"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_cut_off_file_is_refused(suffix: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(tiny_state(), path)
    else:
        torch.save(tiny_state(), path, _use_new_zipfile_serialization="legacy" not in suffix)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError, match="again"):
        read_state_dict(path)


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<!doctype html><html>404</html>")
    (tmp_path / "text.pth").write_text("these are not the weights you look for")
    (tmp_path / "huge.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{" + b" " * 100)
    torch.save([1, 2, 3], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    torch.save({}, tmp_path / "empty.pth")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("readme.txt", "no weights here")
    for name, message in {
        "page.pth": "web page",
        "text.pth": "text.pth",
        "huge.safetensors": "safetensors",
        "list.pth": "a list",
        "epoch.pth": "a dict with epoch",
        "empty.pth": "not a state dict",
        "zip.pth": "zip.pth",
    }.items():
        with pytest.raises(InputError, match=message):
            read_state_dict(tmp_path / name)
    with pytest.raises(InputError, match="is a folder"):
        read_state_dict(tmp_path)
    with pytest.raises(InputError, match=r"did you mean 'list\.pth'"):
        read_state_dict(tmp_path / "lists.pth")


def test_the_papers_own_round_trip(tmp_path: Path) -> None:
    net = create_classifier("resnet18")
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    twin = create_classifier("resnet18", weights=tmp_path / "w.safetensors")
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in net.state_dict().items())


def test_torchvisions_weights_are_downloaded_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked: list[tuple[str, str]] = []

    def download(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        asked.append((url, hash_prefix))
        torch.save(create_classifier("resnet18").state_dict(), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert "loaded 120/120" in create_backbone("resnet18", weights="torchvision", norm="batch").load_report
    assert asked == [("https://download.pytorch.org/models/resnet18-f37072fd.pth", "f37072fd")]


def test_torchvisions_weights_in_the_papers_variant_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    for name, file in (("resnet50", "resnet50-0676ba61.pth"), ("resnet18", "resnet18-f37072fd.pth")):
        torch.save(create_classifier(name).state_dict(), tmp_path / "checkpoints" / file)
    with pytest.raises(InputError, match=r"is for variant v1\.5, not v1; take variant=v1\.5"):
        create_backbone("resnet50", weights="torchvision", variant="v1")
    create_backbone("resnet50", weights="torchvision")
    create_backbone("resnet18", weights="torchvision", variant="v1")


def small_weights(folder: Path, name: str = "resnet20_cifar", **metadata: str) -> Path:
    save_file(create_classifier(name).state_dict(), folder / "w.safetensors", metadata=metadata)
    return folder / "w.safetensors"


def test_a_file_that_says_it_is_for_another_network_is_refused(tmp_path: Path) -> None:
    path = small_weights(tmp_path, architecture="resnet20_cifar", shortcut="A", norm_eps="0.001")
    with pytest.raises(InputError, match="for architecture resnet20_cifar, not plain20_cifar; take name=resnet20_cifar"):
        create_backbone("plain20_cifar", weights=path)
    with pytest.raises(InputError, match="shortcut A, not B; take shortcut=A"):
        create_backbone("resnet20_cifar", weights=path, shortcut="B")
    with pytest.raises(InputError, match=r"norm_eps=0\.001, not 1e-05"):
        create_backbone("resnet20_cifar", weights=path, norm_eps=1e-5)


def test_what_a_file_says_of_norms_and_images_is_taken_over(tmp_path: Path) -> None:
    path = small_weights(tmp_path, bn_eps="1e-3", colour_order="BGR", mean="100,110,120", std="1,1,1", input_range="255")
    net = create_backbone("resnet20_cifar", weights=path, norm="frozen")
    assert {module.eps for module in net.modules() if hasattr(module, "running_var")} == {1e-3}
    assert net.weights_eps == 1e-3
    assert net.preprocessing == Preprocessing(mean=(100, 110, 120), std=(1, 1, 1), color_order="BGR", input_range=255)


def test_information_survives_the_way_through_a_file() -> None:
    info = WeightsInfo(
        architecture="resnet50", variant="v1", shortcut="B", norm_eps=1e-3, color_order="BGR", mean=(1.5, 2.0, 3.0), std=(1.0, 1.0, 1.0),
        input_range=255.0, classes=("a cat", "ä"),
    )  # fmt: skip
    assert WeightsInfo.from_metadata(info.to_metadata()) == info
    assert WeightsInfo.from_metadata(WeightsInfo().to_metadata()) == WeightsInfo()
    nonsense = {"mean": "a,b", "norm_eps": "small", "classes": "{", "input_range": "0..1 before mean/std", "format": "pt"}
    assert WeightsInfo.from_metadata(nonsense) == WeightsInfo()


@pytest.mark.parametrize(("name", "first"), [("resnet20_cifar", "conv1"), ("vgg16", "features.0")])
def test_other_input_channels_follow_the_stated_rule(name: str, first: str) -> None:
    state = create_backbone(name).state_dict()
    grey, four = (create_backbone(name, in_channels=channels) for channels in (1, 4))
    assert "loaded" in str(load_weights(grey, state))
    image = torch.rand(1, 1, 32, 32)
    color, one = create_backbone(name).get_submodule(first), grey.get_submodule(first)
    color.load_state_dict({"weight": state[f"{first}.weight"], **({"bias": state[f"{first}.bias"]} if color.bias is not None else {})})
    torch.testing.assert_close(one(image), color(image.expand(-1, 3, -1, -1)))
    load_weights(four, state)
    weight = state[f"{first}.weight"]
    torch.testing.assert_close(four.get_submodule(first).weight, torch.cat([weight, weight[:, :1]], 1) * 0.75)


def test_a_modules_own_names_are_left_alone(tmp_path: Path) -> None:
    """Names that another library has as well: a network of one's own, and that library's itself."""
    own = nn.ModuleDict({"stem": nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3)}), "norm": nn.BatchNorm2d(4)})
    save_file(own.state_dict(), tmp_path / "own.safetensors")
    twin = copy.deepcopy(own)
    twin["stem"]["conv"].weight.data.zero_()
    load_weights(twin, tmp_path / "own.safetensors")
    assert torch.equal(twin["stem"]["conv"].weight, own["stem"]["conv"].weight)
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnetv2_50", pretrained=False)
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    theirs = create_backbone("timm:resnetv2_50", weights=tmp_path / "timm.safetensors")
    ours = create_backbone("resnet50", variant="v2", weights=tmp_path / "timm.safetensors")
    assert torch.equal(theirs.net.stages_2.blocks[3].conv2.weight, ours.layer3[3].conv2.weight)


def test_cifar_weights_by_their_usual_names(tmp_path: Path) -> None:
    net = create_classifier("resnet20_cifar")
    state = {f"module.{key.replace('fc.', 'linear.')}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "net.th", _use_new_zipfile_serialization=False)
    twin = create_classifier("resnet20_cifar")
    assert not load_weights(twin, tmp_path / "net.th").problems()
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("error", [OSError("Name or service not known"), RuntimeError('invalid hash value (expected "f37072fd")')])
def test_offline_or_damaged_downloads_say_where_to_put_the_file(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(InputError, match=r"put that file at .*resnet18-f37072fd\.pth"):
        create_backbone("resnet18", weights="torchvision", norm="frozen")


def test_torchvision_has_weights_for_all_of_ours() -> None:
    for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2", "vgg16", "vgg16_bn"):
        assert torchvision_weights._url(name).endswith(".pth")
    with pytest.raises(InputError, match="no weights for 'resnet19'"):
        torchvision_weights._url("resnet19")


def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path: Path) -> None:
    """One safetensors file in 32 has 0x80, a pickle's first byte, as the low byte of its header's length."""
    path = tmp_path / "unlucky.safetensors"
    for padding in range(0, 264, 8):
        save_file({"fc.bias": torch.ones(3)}, path, {"note": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert torch.equal(read_weights(path)[0]["fc.bias"], torch.ones(3))
