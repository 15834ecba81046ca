"""Keras's .h5 files against a writer of their layout; the networks in them against Keras's arithmetic: channels last, biases, padding."""

from __future__ import annotations

import builtins
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from keras_reference import KerasNetwork, write_h5
from torch import Tensor, nn

from resbackbone import create_backbone, create_classifier
from resbackbone.errors import InputError
from resbackbone.weights.keras import from_keras, read_keras

h5py = pytest.importorskip("h5py")

CAFFE_MEAN = (103.939, 116.779, 123.68)


@pytest.fixture(scope="module")
def layout(shared_data: Path) -> dict[str, Any]:
    return json.loads((shared_data / "weights" / "keras_layout.json").read_text())


def random_weights(shapes: Mapping[str, list[Any]]) -> dict[str, Tensor]:
    """Norms as training leaves them, and kernels that keep activations of their size."""
    generator = torch.Generator().manual_seed(0)
    ranges = {"gamma": (0.5, 1.0), "moving_variance": (0.5, 1.0)}
    weights = {}
    for name, (shape, dtype) in shapes.items():
        assert dtype == "float32"
        tensor = torch.empty(shape)
        if len(shape) > 1:
            bound = (3 / tensor[..., 0].numel()) ** 0.5
            weights[name] = tensor.uniform_(-bound, bound, generator=generator)
        else:
            weights[name] = tensor.uniform_(*ranges.get(name.rpartition("/")[2], (-0.3, 0.3)), generator=generator)
    return weights


def tiny_weights(shapes: Mapping[str, list[Any]]) -> dict[str, Tensor]:
    """For what doesn't look at shapes: every weight has its own few values."""
    return {name: torch.full((2,) * len(shape), float(number)) for number, (name, (shape, _)) in enumerate(shapes.items())}


def layer_names(content: Mapping[str, Any]) -> list[str]:
    return [layer["name"] for layer in content["layer_order"]]


# --- reading ---


@pytest.mark.parametrize("network", ["VGG16", "ResNet50"])
@pytest.mark.parametrize("naming", ["keras1", "keras2"])
@pytest.mark.parametrize("whole_model", [False, True])
def test_both_namings_are_read(network: str, naming: str, whole_model: bool, layout: dict[str, Any], tmp_path: Path) -> None:
    weights = tiny_weights(layout[network]["weights"])
    path = write_h5(tmp_path / "w.h5", weights, layer_names(layout[network]), naming=naming, whole_model=whole_model)
    read = read_keras(path)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == torch.float32 for name, tensor in weights.items())


def test_long_lists_of_names_and_text_attributes_are_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.attrs["layer_names0"], file.attrs["layer_names1"] = ["a"], ["b", "c"]
        for number, layer in enumerate("abc"):
            group = file.create_group(layer)
            group.attrs["weight_names"] = [f"{layer}/kernel"] if layer != "c" else []
            group.create_dataset(f"{layer}/kernel", data=[number], dtype=">f8")
    read = read_keras(tmp_path / "w.h5")
    assert {name: (tensor.dtype, tensor.item()) for name, tensor in read.items()} == {
        "a/kernel": (torch.float64, 0),
        "b/kernel": (torch.float64, 1),
    }


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_cut_off_file_is_refused(kept: float, layout: dict[str, Any], tmp_path: Path) -> None:
    path = write_h5(tmp_path / "w.h5", tiny_weights(layout["VGG16"]["weights"]), layer_names(layout["VGG16"]))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError, match=r"w\.h5 is not a whole HDF5 file"):
        read_keras(path)


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.h5"
    path.write_text("these are not the weights you look for")
    with pytest.raises(InputError, match=r"w\.h5 is not a whole HDF5 file"):
        read_keras(path)
    with pytest.raises(InputError, match=r"none\.h5 is not a whole HDF5 file"):
        read_keras(tmp_path / "none.h5")
    with h5py.File(path, "w") as file:
        file.create_group("layers")
    with pytest.raises(InputError, match="lists no layers"):
        read_keras(path)
    for names, message in ((["conv/table:0"], "no weight of a convolution"), (["a/kernel:0", "b/kernel:0"], "twice the same")):
        with h5py.File(path, "w") as file:
            file.attrs["layer_names"] = ["x"]
            file.create_group("x").attrs["weight_names"] = names
            for name in names:
                file["x"].create_dataset(name, data=[1.0])
        with pytest.raises(InputError, match=message):
            read_keras(path)


@pytest.mark.parametrize("kind", ["huge", "integers", "external", "link", "virtual", "absent", "attribute"])
def test_claims_beyond_the_file_are_refused(kind: str, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other.create_dataset("secret", data=[1.0, 2.0])
    (tmp_path / "raw").write_bytes(b"\0" * 64)
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.attrs["layer_names"] = ["x"]
        group = file.create_group("x")
        group.attrs["weight_names"] = ["kernel:0"]
        if kind == "huge":
            group.create_dataset("kernel:0", shape=(2**20, 2**20), dtype="f4", chunks=(64, 64))
        elif kind == "integers":
            group.create_dataset("kernel:0", data=[1, 2])
        elif kind == "external":
            group.create_dataset("kernel:0", shape=(4,), dtype="f4", external=[(str(tmp_path / "raw"), 0, 16)])
        elif kind == "link":
            group["kernel:0"] = h5py.ExternalLink("other.h5", "secret")
        elif kind == "virtual":
            sources = h5py.VirtualLayout(shape=(2,), dtype="f8")
            sources[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "secret", shape=(2,))
            group.create_virtual_dataset("kernel:0", sources)
        elif kind == "attribute":
            file.attrs["layer_names"] = 5
    with pytest.raises(InputError, match=r"w\.h5.*again"):
        read_keras(tmp_path / "w.h5")


def test_without_h5py_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def fake_import(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "h5py":
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fake_import)
    with pytest.raises(InputError, match="pip install h5py"):
        read_keras(tmp_path / "w.h5")


# --- the networks ---


def bgr_image(size: int = 64) -> Tensor:
    """As Keras's preprocessing leaves it, channels last."""
    return torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1


def channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2) if x.dim() == 4 else x


def assert_equal_to(expected: Tensor, ours: Tensor, name: str) -> None:
    expected = channels_first(expected)
    assert ours.shape == expected.shape
    difference = (ours - expected).abs().max() / expected.abs().max()
    assert difference <= 1e-5, f"{name}: {difference}"


def load(net: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    missing, unexpected = net.load_state_dict(tensors, strict=False, assign=True)
    assert (unexpected, [name for name in missing if not name.endswith("num_batches_tracked")]) == ([], [])
    return net.eval()


LATER_PLACES = {"1": "0", "2a": "1", "2b": "2", "2c": "3"}


def later_name(name: str) -> str:
    """keras.applications' later name for a weight of the first ResNet50."""
    layer, _, kind = name.partition("/")
    if layer.startswith(("res", "bn")) and layer != "bn_conv1":
        what, place = ("conv", layer[3:]) if layer.startswith("res") else ("bn", layer[2:])
        stage, block, branch = place[0], "abcdef".index(place[1]) + 1, place.partition("branch")[2]
        return f"conv{stage}_block{block}_{LATER_PLACES[branch]}_{what}/{kind}"
    return {"conv1": "conv1_conv", "bn_conv1": "conv1_bn", "fc1000": "predictions"}[layer] + f"/{kind}"


@torch.no_grad()
@pytest.mark.parametrize(("later", "top", "eps"), [(False, True, 1e-3), (True, False, 1.001e-5)])
def test_resnet50_computes_what_keras_computes(later: bool, top: bool, eps: float, layout: dict[str, Any], tmp_path: Path) -> None:
    content = layout["ResNet50"]
    weights = random_weights({name: shape for name, shape in content["weights"].items() if top or "fc1000" not in name})
    expected = KerasNetwork(weights, content["layer_order"], eps=eps if later else None).resnet50(bgr_image())
    theirs = {later_name(name) if later else name: tensor for name, tensor in weights.items()}
    path = write_h5(tmp_path / "w.h5", theirs, list(dict.fromkeys(name.partition("/")[0] for name in theirs)))
    tensors, info = from_keras(read_keras(path), "w.h5")
    assert (info.architecture, info.variant, info.norm_eps, info.color_order) == ("resnet50", "v1", eps, "BGR")
    assert (info.mean, info.std, info.input_range) == (CAFFE_MEAN, (1, 1, 1), 255)
    options = {"variant": info.variant, "norm_eps": info.norm_eps}
    with torch.device("meta"):
        backbone, classifier = create_backbone("resnet50", **options), create_classifier("resnet50", **options)
    load(backbone, {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")})
    image = channels_first(bgr_image())
    for (name, ours), theirs_map in zip(backbone(image).items(), expected[:5], strict=True):
        assert_equal_to(theirs_map, ours, name)
    if top:
        assert_equal_to(expected[5], load(classifier, tensors)(image), "logits")


@torch.no_grad()
def test_vgg16s_convolutions_compute_what_keras_computes(layout: dict[str, Any]) -> None:
    content = layout["VGG16"]
    weights = random_weights({name: shape for name, shape in content["weights"].items() if name.startswith("block")})
    expected = KerasNetwork(weights, content["layer_order"]).vgg16(bgr_image())
    tensors, info = from_keras(weights, "w.h5")
    assert (info.architecture, info.variant, info.norm_eps, info.color_order) == ("vgg16", "", None, "BGR")
    assert (info.mean, info.std, info.input_range) == (CAFFE_MEAN, (1, 1, 1), 255)
    with torch.device("meta"):
        backbone = create_backbone("vgg16")
    maps = load(backbone, tensors)(channels_first(bgr_image()))
    for (name, ours), theirs in zip(maps.items(), expected, strict=True):
        assert_equal_to(theirs, ours, name)


@torch.no_grad()
def test_vgg16s_top_computes_what_keras_computes(layout: dict[str, Any]) -> None:
    content = layout["VGG16"]
    small = {name: shape for name, shape in content["weights"].items() if name != "fc1/kernel"}
    weights = random_weights(small)
    numbers = (
        torch.arange(25088 * 16.0).sin().view(25088, 16) / 100
    )  # the first layer's 4096 units are 16, over and over, each with its own bias
    weights["fc1/kernel"] = numbers.repeat(1, 256)
    pooled = torch.rand(2, 7, 7, 512, generator=torch.Generator().manual_seed(2))
    net = KerasNetwork(weights, content["layer_order"])
    hidden = net.dense("fc2", net.dense("fc1", pooled.flatten(1)).relu()).relu()
    with torch.device("meta"):
        classifier = create_classifier("vgg16")
    load(classifier, from_keras(weights, "w.h5")[0])
    assert_equal_to(net.dense("predictions", hidden), classifier.classifier(channels_first(pooled).flatten(1)), "logits")


@pytest.mark.parametrize(("name", "depths"), [("resnet101", (3, 4, 23, 3)), ("resnet152", (3, 8, 36, 3))])
def test_deeper_networks_of_the_later_kind_are_told_by_their_blocks(name: str, depths: tuple[int, ...]) -> None:
    with torch.device("meta"):
        ours = create_classifier(name, num_classes=7).state_dict()
        theirs = {"conv1_conv/kernel": torch.empty(7, 7, 3, 64), "conv1_conv/bias": torch.empty(64)}
        theirs |= {f"conv1_bn/{kind}": torch.empty(64) for kind in ("gamma", "beta", "moving_mean", "moving_variance")}
        theirs |= {"predictions/kernel": torch.empty(2048, 7), "predictions/bias": torch.empty(7)}
        for stage, depth in enumerate(depths, 2):
            width, outputs = 16 * 2**stage, 64 * 2**stage
            for block in range(1, depth + 1):
                inputs = outputs if block > 1 else max(64, outputs // 2) if stage > 2 else 64
                shapes = {1: (1, 1, inputs, width), 2: (3, 3, width, width), 3: (1, 1, width, outputs), 0: (1, 1, inputs, outputs)}
                for place, shape in shapes.items():
                    if place or block == 1:
                        layer = f"conv{stage}_block{block}_{place}"
                        theirs |= {f"{layer}_conv/kernel": torch.empty(shape), f"{layer}_conv/bias": torch.empty(shape[-1])}
                        theirs |= {
                            f"{layer}_bn/{kind}": torch.empty(shape[-1]) for kind in ("gamma", "beta", "moving_mean", "moving_variance")
                        }
        tensors, info = from_keras(theirs, "w.h5")
    assert (info.architecture, info.variant, info.norm_eps) == (name, "v1", 1.001e-5)
    wanted = {key: value.shape for key, value in ours.items() if not key.endswith("num_batches_tracked")}
    assert {key: value.shape for key, value in tensors.items()} == wanted


def test_weights_that_do_not_fit_are_named(layout: dict[str, Any]) -> None:
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, (shape, _) in layout["VGG16"]["weights"].items()}
        resnet = {name: torch.empty(shape) for name, (shape, _) in layout["ResNet50"]["weights"].items()}
        turned = {name: tensor.permute(3, 2, 0, 1) if tensor.dim() == 4 else tensor for name, tensor in weights.items()}
        extra = {"block3_conv4/kernel": torch.empty(3, 3, 256, 256), "block3_conv4/bias": torch.empty(256)}
    for given, message in (
        ({name: tensor for name, tensor in weights.items() if "conv2" not in name}, "10 missing: block1_conv2/kernel, block1_conv2/bias"),
        ({name: tensor for name, tensor in weights.items() if "fc2" not in name}, "2 missing: fc2/kernel, fc2/bias"),
        ({name: tensor for name, tensor in resnet.items() if name != "bn3a_branch1/gamma"}, "1 missing: bn3a_branch1/gamma"),
        (turned, r"block1_conv1/kernel \[64, 3, 3, 3\] where \[3, 3, 3, 64\] belongs.*tf_kernels"),
        (weights | extra, "2 unexpected: block3_conv4/kernel, block3_conv4/bias"),
        (resnet | {"fc1000/kernel": weights["fc2/kernel"]}, r"fc1000/kernel \[4096, 4096\] where \[2048, 0\] belongs"),
        ({"dense_1/kernel": weights["fc2/kernel"]}, "has layers dense_1; no network is known"),
        ({}, "no network is known"),
        ({"conv2_block1_1_conv/kernel": weights["fc2/kernel"]}, "missing: conv1_conv/kernel"),
    ):
        with pytest.raises(InputError, match=message) as error:
            from_keras(given, "some.h5")
        assert str(error.value).startswith("some.h5 ")
