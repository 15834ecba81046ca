"""detectron2's weights, to and from our names: its own (`res2.0.conv1.norm.weight`) and Caffe2's (`res2_0_branch2a_bn_s`).

Caffe2's norms, and those of He's ImageNet networks as detectron2 has them, are a scale and a shift a channel. They become norms of mean 0
and variance 1 - eps, which divide by exactly 1.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from resbackbone.errors import InputError, nearest
from resbackbone.runtime.atomic import write_atomically
from resbackbone.weights.info import WeightsInfo
from resbackbone.weights.pickled_arrays import PickledArray, read_pickle

NORM_EPS = 1e-5  # of Caffe2's, detectron2's and our norms
PIXEL_MEAN = (103.530, 116.280, 123.675)  # detectron2's for the weights that Caffe2 trained, BGR
# Blocks in res2 … res4, convolutions in a block, groups of its 3x3, and channels of the block's output for each of the 3x3's.
LAYOUTS = {
    ((2, 2, 2), 2, 1, 1): "resnet18",
    ((3, 4, 6), 2, 1, 1): "resnet34",
    ((3, 4, 6), 3, 1, 4): "resnet50",
    ((3, 4, 23), 3, 1, 4): "resnet101",
    ((3, 8, 36), 3, 1, 4): "resnet152",
    ((3, 4, 6), 3, 32, 2): "resnext50_32x4d",
    ((3, 4, 6), 3, 1, 2): "wide_resnet50_2",
}
# Caffe2's `riv` stands for an inverse, and holds the variance.
KINDS = {"w": "weight", "b": "bias", "s": "weight", "rm": "running_mean", "riv": "running_var"}
BRANCHES = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
CAFFE2_NAME = re.compile(r"(?:res_)?(conv1|res[2-5]_\d+_branch(?:1|2[abc])|fc1000|pred)(_bn)?_(w|b|s|rm|riv)")
# A C4 detector keeps res5 among its heads.
OWN_NAME = re.compile(
    r"(?:(?:backbone\.)?(?:bottom_up\.)?|roi_heads\.)(stem(?=\.conv1\.)|res[2-5]\.\d+|linear|fc)(?:\.(conv[123]|shortcut))?(\.norm)?"
    r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
)
OUR_NAME = re.compile(
    r"(?:(layer[1-4]\.\d+)\.)?(?:(conv|bn)([123])|downsample\.([01])|(fc))\.(weight|bias|running_mean|running_var|num_batches_tracked)"
)
# Parts of a detector around its backbone, in both schemes.
DETECTOR = re.compile(
    r"proposal_generator\.|roi_heads\.|(backbone\.)?fpn_|pixel_(mean|std)$|(conv_)?rpn_|conv_rpn|(cls_score|bbox_pred|fc6|fc7)_|"
    r"_?\[?mask|conv5_mask|head_conv|kps_|conv_fcn|lr$"
)
COUNTER = "num_batches_tracked"
NORM_WEIGHT = re.compile(r"((?:.*\.)?(?:bn[123]|downsample\.1))\.weight")
CONVOLUTION = re.compile(r"(?:conv([123])|downsample\.0)\.")
STRIDED_1X1 = ("resnet50", "resnet101", "resnet152")  # in Caffe2, as in He's release; ResNeXts stride in the 3x3
STEM_SIZE = 7
PROTOCOL = 4  # of pickle: what Python 3.4 and newer read
EXAMPLES = ("stem.conv1.weight", "res2.0.conv1.weight", "linear.weight", "conv1_w", "res2_0_branch2a_w", "fc1000_w")


def read_detectron2(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a .pkl, float32 or int64; bare, or within {"model": …} or {"blobs": …}. Solver state is left.

    Raises InputError for a file that is missing, cut off, or asks for anything but arrays.
    """
    content = read_pickle(path)
    if isinstance(content, dict):
        content = next((content[name] for name in ("model", "blobs") if isinstance(content.get(name), dict)), content)
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds no dict of arrays; give a .pkl of detectron2 or Caffe2")
    found: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, PickledArray) or value.tensor is None:
            raise InputError(f"{path}: entry {str(name)[:80]!r} is a {type(value).__name__}, not an array; give a .pkl of weights alone")
        if not name.endswith("_momentum"):
            found[name] = value.tensor
    return found


def looks_like_detectron2(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are of either scheme."""
    return any(re.match(r"(backbone\.)?(bottom_up\.)?res2\.0\.|res2_0_branch", name) for name in tensors)


def from_detectron2(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], WeightsInfo]:
    """A backbone, and its classifier where there is one, under our names, and what is known of it.

    Of a detector, the parts around the backbone are left. Any other name is an InputError.
    """
    is_caffe2 = any(name.startswith("res2_0_branch") for name in tensors)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = _our_name(_own_name(name) if is_caffe2 else name)
        if ours is None and not DETECTOR.match(name):
            raise InputError(
                f"{name!r} is no name of detectron2's or Caffe2's ResNets;{nearest(name, EXAMPLES)} remove it or convert it by hand"
            )
        if ours in found:
            raise InputError(f"{name!r} is a second tensor for our {ours}; remove one of the two")
        if ours is not None and not ours.endswith(COUNTER):
            found[ours] = tensor.float()
    architecture = _architecture(found)
    _complete_norms(found, is_affine=is_caffe2)
    if not is_caffe2:
        return found, WeightsInfo(architecture=architecture, norm_eps=NORM_EPS)
    info = WeightsInfo(
        architecture=architecture,
        variant="v1" if architecture in STRIDED_1X1 else "",
        norm_eps=NORM_EPS,
        color_order="BGR",
        mean=PIXEL_MEAN,
        std=(1.0, 1.0, 1.0),
        input_range=255.0,
    )
    return found, info


def _own_name(name: str) -> str:
    """Caffe2's name -> detectron2's; what isn't one stays."""
    match = CAFFE2_NAME.fullmatch(name)
    if not match:
        return name
    layer, norm, kind = match.groups()
    if layer in ("fc1000", "pred"):
        return f"linear.{KINDS[kind]}"
    stage, _, branch = layer.rpartition("_")
    place = "stem.conv1" if layer == "conv1" else f"{stage.replace('_', '.')}.{BRANCHES[branch]}"
    return f"{place}{'.norm' if norm else ''}.{KINDS[kind]}"


def _our_name(name: str) -> str | None:
    match = OWN_NAME.fullmatch(name)
    if not match:
        return None
    place, layer, norm, kind = match.groups()
    if place in ("linear", "fc"):
        return None if layer or norm else f"fc.{kind}"
    if layer is None:
        return None
    layer = layer if layer == "shortcut" else f"bn{layer[-1]}" if norm else layer
    if place == "stem":
        return f"{layer}.{kind}"
    stage, _, block = place.partition(".")
    layer = f"downsample.{1 if norm else 0}" if layer == "shortcut" else layer
    return f"layer{int(stage[-1]) - 1}.{block}.{layer}.{kind}"


def _complete_norms(tensors: dict[str, Tensor], *, is_affine: bool) -> None:
    """Give affine maps the statistics that make norms of them, and let norms take over the biases of the convolutions before them."""
    for norm in [match[1] for name in tensors if (match := NORM_WEIGHT.fullmatch(name))]:
        if is_affine and f"{norm}.running_var" not in tensors:
            tensors[f"{norm}.running_mean"] = torch.zeros_like(tensors[f"{norm}.weight"])
            tensors[f"{norm}.running_var"] = torch.full_like(tensors[f"{norm}.weight"], 1 - NORM_EPS)
    for name in [name for name in tensors if name.endswith(".bias") and CONVOLUTION.search(name)]:
        bias = tensors.pop(name)
        mean = CONVOLUTION.sub(lambda match: f"bn{match[1]}." if match[1] else "downsample.1.", name).replace(".bias", ".running_mean")
        if mean not in tensors or tensors[mean].shape != bias.shape:
            raise InputError(f"our {name} is the bias of a convolution with no batch norm behind it; our networks have none such")
        tensors[mean] = tensors[mean] - bias


def _architecture(tensors: Mapping[str, Tensor]) -> str:
    blocks = {name.rpartition(".conv1.")[0] for name in tensors if name.endswith(".conv1.weight")}
    depths = tuple(sum(block.startswith(f"layer{stage}.") for block in blocks) for stage in (1, 2, 3))
    convolutions = [tensors[name] for k in (1, 2, 3) if (name := f"layer1.0.conv{k}.weight") in tensors and tensors[name].dim() == 4]
    if len(convolutions) < 2:
        raise InputError("the tensors hold no ResNet: res2.0 has not two convolutions; give the weights of a ResNet backbone")
    groups = len(convolutions[1]) // max(convolutions[1].shape[1], 1)
    layout = (depths, len(convolutions), groups, len(convolutions[-1]) // max(len(convolutions[1]), 1))
    if layout not in LAYOUTS:
        raise InputError(
            f"a ResNet with {depths} blocks in res2 to res4, {len(convolutions)} convolutions in a block and {groups} groups "
            f"is none of ours: {', '.join(LAYOUTS.values())}"
        )
    return LAYOUTS[layout]


def to_detectron2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> detectron2's own, for its ResNets. InputError for a network that those can't express."""
    _check_expressible(tensors)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = OUR_NAME.fullmatch(name)
        if not match or (CONVOLUTION.search(name) and name.endswith(".bias")):
            raise InputError(f"{name!r} has no place in detectron2's ResNets; only ResNets of variant v1 or v1.5 with norms can be written")
        block, layer, number, shortcut, linear, kind = match.groups()
        if kind != COUNTER:
            stage = f"res{int(block[5]) + 1}{block[6:]}" if block else "stem"
            place = f"{stage}.shortcut" if shortcut else f"{stage}.conv{number}"
            norm = ".norm" if layer == "bn" or shortcut == "1" else ""
            found["linear." + kind if linear else f"{place}{norm}.{kind}"] = tensor
    return found


def _check_expressible(tensors: Mapping[str, Tensor]) -> None:
    stem = tensors.get("conv1.weight")
    reason = ""
    if any(name.startswith(("features.", "classifier.")) for name in tensors):
        reason = "a VGG network"
    elif "bn_last.weight" in tensors:
        reason = "a pre-activation ResNet (v2)"
    elif stem is None or "layer1.0.conv1.weight" not in tensors:
        reason = "no ResNet"
    elif stem.shape[-1] != STEM_SIZE:
        reason = "a CIFAR network, or one with another stem"
    elif "layer2.0.conv1.weight" in tensors and "layer2.0.downsample.0.weight" not in tensors:
        reason = "a plain network, or one whose shortcuts have no convolution"
    if reason:
        raise InputError(f"this is {reason}, which detectron2 has no names for; give an ImageNet ResNet of variant v1 or v1.5")


def write_detectron2(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what `to_detectron2` returned as a .pkl that detectron2's checkpointer takes (its MODEL.WEIGHTS), whole or not at all.

    numpy names its own modules in it: one that numpy 2 wrote is read by numpy 1.26 and newer.
    """
    arrays = {name: tensor.detach().cpu().float().numpy() for name, tensor in tensors.items()}
    # With this author and heuristics, detectron2 matches names by their ends, so that a detector's backbone finds them.
    content = {"model": arrays, "__author__": "resbackbone", "matching_heuristics": True}
    write_atomically(path, pickle.dumps(content, protocol=PROTOCOL))
