"""detectron2's and Caffe2's weights: read to a network that computes the same, written as detectron2 wants them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from python2_pickles import python2_array, python2_dict, python2_file, text
from references import Reference, randomise
from torch import Tensor, nn

from resbackbone.errors import InputError
from resbackbone.weights.detectron2 import from_detectron2, looks_like_detectron2, read_detectron2, to_detectron2, write_detectron2

# Our reference networks under Caffe2's and detectron2's names.


def layers_of(net: Reference) -> Iterator[tuple[str, str, nn.Conv2d, nn.BatchNorm2d]]:
    """(Caffe2's name of the convolution, detectron2's, the convolution, its norm)."""
    yield "conv1", "stem.conv1", net.conv1, net.bn1
    for stage, blocks in enumerate(net.stages(), 2):
        for number, block in enumerate(blocks):
            for k in range(1, block.count + 1):
                name = f"res{stage}_{number}_branch2{'abc'[k - 1]}"
                yield name, f"res{stage}.{number}.conv{k}", getattr(block, f"conv{k}"), getattr(block, f"bn{k}")
            if block.shortcut == "projection":
                yield f"res{stage}_{number}_branch1", f"res{stage}.{number}.shortcut", *block.downsample


def numpy_of(values: Tensor) -> np.ndarray:
    return values.detach().numpy()


def caffe2_blobs(net: Reference, *, statistics: bool, head: str) -> dict[str, np.ndarray]:
    blobs = {f"{head}_w": numpy_of(net.fc.weight), f"{head}_b": numpy_of(net.fc.bias)}
    for name, _, conv, bn in layers_of(net):
        norm = f"res_{name}" if name == "conv1" else name
        blobs |= {f"{name}_w": numpy_of(conv.weight), f"{norm}_bn_s": numpy_of(bn.weight), f"{norm}_bn_b": numpy_of(bn.bias)}
        blobs |= {f"{name}_b": numpy_of(conv.bias)} if conv.bias is not None else {}
        blobs |= {f"{norm}_bn_rm": numpy_of(bn.running_mean), f"{norm}_bn_riv": numpy_of(bn.running_var)} if statistics else {}
    return blobs


def own_tensors(net: Reference, prefix: str = "") -> dict[str, Tensor]:
    tensors = {"linear.weight": net.fc.weight, "linear.bias": net.fc.bias}
    for _, name, conv, bn in layers_of(net):
        tensors[f"{name}.weight"] = conv.weight
        tensors |= {f"{name}.norm.{kind}": getattr(bn, kind) for kind in ("weight", "bias", "running_mean", "running_var")}
    return {prefix + name: tensor.detach() for name, tensor in tensors.items()}


class Affine(nn.Module):
    """Caffe2's AffineChannel."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight.detach() * 0.7, norm.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def make_affine(net: Reference) -> Reference:
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, Affine(child))
    return net


def assert_same(source: nn.Module, target: nn.Module, tensors: dict[str, Tensor]) -> None:
    missing, unexpected = target.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert [name for name in missing if not name.endswith("num_batches_tracked")] == []
    images = torch.rand((2, 3, 65, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = source(images), target.eval()(images)
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert expected.std() > 1e-3


NETWORKS = {"resnet50": ("imagenet", (3, 4, 6, 3)), "resnet101": ("imagenet", (3, 4, 23, 3)), "resnet18": ("cifar", (2, 2, 2, 2))}


@pytest.mark.parametrize(
    ("name", "statistics", "head", "python2"),
    [("resnet50", False, "fc1000", True), ("resnet101", True, "pred", False), ("resnet18", False, "pred", True)],
)
def test_caffe2_networks_compute_the_same(name: str, statistics: bool, head: str, python2: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = randomise(Reference(*NETWORKS[name], 4, bias=True))
    source = source if statistics else make_affine(source)
    blobs = caffe2_blobs(source, statistics=statistics, head=head)
    blobs["conv1_w_momentum"] = np.ones(3, np.float32)
    if python2:
        content = python2_file({"blobs": python2_dict({key: python2_array(value) for key, value in blobs.items()}), "cfg": text(b"a: 1")})
        again = pickle.loads(content, encoding="latin1")["blobs"]
        assert all(np.array_equal(again[key], blobs[key]) for key in blobs), "the writer is wrong"
    else:
        content = pickle.dumps({"blobs": blobs}, protocol=2)
    (tmp_path / "net.pkl").write_bytes(content)
    tensors = read_detectron2(tmp_path / "net.pkl")
    assert looks_like_detectron2(tensors)
    ours, info = from_detectron2(tensors)
    assert_same(source, Reference(*NETWORKS[name], 4, bias=False), ours)
    assert (info.architecture, info.variant, info.norm_eps) == (name, "" if name == "resnet18" else "v1", 1e-5)
    assert (info.color_order, info.mean, info.std, info.input_range) == ("BGR", (103.530, 116.280, 123.675), (1, 1, 1), 255)


def test_an_affine_norm_divides_by_exactly_one() -> None:
    source = make_affine(randomise(Reference("cifar", (2, 2, 2, 2), 4, bias=True)))
    ours, _ = from_detectron2({key: torch.from_numpy(value) for key, value in caffe2_blobs(source, statistics=False, head="pred").items()})
    assert torch.equal(ours["bn1.running_var"] + 1e-5, torch.ones(4))
    assert torch.equal(ours["bn1.running_mean"], -source.conv1.bias.detach())


@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.bottom_up.", "bottom_up."])
@pytest.mark.parametrize("name", ["resnet50", "resnet18"])
def test_own_names_compute_the_same(name: str, prefix: str) -> None:
    torch.manual_seed(1)
    source = randomise(Reference(*NETWORKS[name], 4, bias=False))
    tensors = own_tensors(source, prefix) | {f"{prefix}res2.0.conv1.norm.num_batches_tracked": torch.tensor(3)}
    others = ("proposal_generator.rpn_head.conv.weight", "roi_heads.box_head.fc1.weight", "backbone.fpn_lateral2.weight", "pixel_mean")
    ours, info = from_detectron2(tensors | {other: torch.ones(1) for other in others})
    assert looks_like_detectron2(tensors)
    assert_same(source, Reference(*NETWORKS[name], 4, bias=False), ours)
    assert (info.architecture, info.norm_eps, info.variant, info.color_order, info.mean) == (name, 1e-5, "", "", ())


def test_the_last_stage_of_a_c4_detector_is_found_among_its_heads() -> None:
    tensors = own_tensors(Reference(*NETWORKS["resnet50"], 4, bias=False))
    moved = {f"{'roi_heads.' if name.startswith('res5') else 'backbone.'}{name}": tensor for name, tensor in tensors.items()}
    expected, found = from_detectron2(tensors)[0], from_detectron2(moved)[0]
    assert expected.keys() == found.keys()


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "resnet101", "resnet152"])
def test_there_and_back_is_exact_and_the_name_is_found(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = torchvision.models.get_model(name).state_dict()
    small = name in ("resnet18", "resnext50_32x4d")  # the others' names and shapes are told without their numbers
    ours = {key: torch.rand(value.shape) if small else torch.empty(()).expand(value.shape) for key, value in shapes.items()}
    theirs = to_detectron2(ours)
    counters = [key for key in ours if key.endswith("num_batches_tracked")]
    assert len(theirs) == len(ours) - len(counters)
    if small:
        write_detectron2(tmp_path / "new" / "net.pkl", theirs)
        theirs = read_detectron2(tmp_path / "new" / "net.pkl")
        back, info = from_detectron2(theirs)
        assert back.keys() == ours.keys() - set(counters)
        assert all(torch.equal(back[key], ours[key]) for key in back)
    else:
        info = from_detectron2({key: value for key, value in theirs.items() if ".norm." not in key})[1]
    assert info.architecture == name


def test_what_is_written_is_what_detectron2_reads(tmp_path: Path) -> None:
    net = randomise(Reference(*NETWORKS["resnet50"], 2, bias=False))
    write_detectron2(tmp_path / "net.pkl", to_detectron2({key: value.double() for key, value in net.state_dict().items()}))
    content = pickle.loads((tmp_path / "net.pkl").read_bytes())
    assert (content["__author__"], content["matching_heuristics"]) == ("resbackbone", True)
    expected = own_tensors(net)
    assert content["model"].keys() == expected.keys()
    for name, values in content["model"].items():
        assert values.dtype == np.float32
        assert np.array_equal(values, expected[name].numpy())
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.pkl"]


def state_of(*names: str, stem: int = 7) -> dict[str, Tensor]:
    return {"conv1.weight": torch.ones(4, 3, stem, stem), **{name: torch.ones(4, 4, 1, 1) for name in ("layer1.0.conv1.weight", *names)}}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"features.0.weight": torch.ones(1)}, "a VGG network"),
        (state_of("bn_last.weight"), "a pre-activation ResNet"),
        (state_of(stem=3), "a CIFAR network"),
        (state_of("layer2.0.conv1.weight"), "a plain network"),
        ({"weight": torch.ones(1)}, "no ResNet"),
        (state_of("layer1.0.conv1.bias"), "'layer1.0.conv1.bias' has no place"),
        (state_of("layer1.0.extra.weight"), "'layer1.0.extra.weight' has no place"),
    ],
)
def test_what_detectron2_cannot_express_is_refused(tensors: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        to_detectron2(tensors)


def test_unknown_names_and_networks_are_refused() -> None:
    tensors = own_tensors(Reference("cifar", (2, 2, 2, 2), 2, bias=False))
    with pytest.raises(InputError, match=r"'stem.conv2.weight' is no name .* did you mean 'stem.conv1.weight'"):
        from_detectron2({**tensors, "stem.conv2.weight": torch.ones(1)})
    with pytest.raises(InputError, match=r"second tensor for our fc.weight"):
        from_detectron2({**tensors, "fc.weight": torch.ones(1)})
    with pytest.raises(InputError, match=r"\(2, 2, 1\) blocks"):
        from_detectron2({name: tensor for name, tensor in tensors.items() if not name.startswith("res4.1")})
    with pytest.raises(InputError, match="hold no ResNet"):
        from_detectron2({"pixel_mean": torch.ones(3)})
    with pytest.raises(InputError, match="no batch norm behind it"):
        from_detectron2({**tensors, "res2.0.conv1.bias": torch.ones(7)})
    assert not looks_like_detectron2({"conv1.weight": torch.ones(1), "layer1.0.conv1.weight": torch.ones(1)})
