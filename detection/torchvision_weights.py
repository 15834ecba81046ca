"""torchvision's Faster R-CNN and Mask R-CNN (FPN) weights as a detector of ours: names, settings and classes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from resbackbone.errors import InputError

# torchvision's name → ours, in the order they are tried; both its present names and those of its published files of 2019.
_RULES = (
    (r"backbone\.body\.(.+)", r"backbone.backbone.\1"),
    (r"backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.(?:0\.)?(weight|bias)", r"backbone.\1_blocks.\2.0.\3"),
    (r"rpn\.head\.conv\.(?:0\.0\.)?(weight|bias)", r"rpn.conv.\1"),
    (r"rpn\.head\.(cls_logits|bbox_pred)\.(.+)", r"rpn.\1.\2"),
    (r"roi_heads\.box_head\.(fc\d)\.(.+)", r"roi_head.box_head.\1.\2"),
    (r"roi_heads\.box_predictor\.(.+)", r"roi_head.\1"),
    (r"roi_heads\.mask_head\.(\d)\.0\.(.+)", r"mask_head.convs.\1.\2"),
    (r"roi_heads\.mask_predictor\.(.+)", r"mask_head.\1"),
)

COCO_ROWS = 91
CLASS_ROWS = {"roi_head.cls_score": 1, "roi_head.bbox_pred": 4, "mask_head.mask_fcn_logits": 1}  # of ours: how many rows a class has
_NETWORKS: dict[tuple[tuple[int, ...], bool], str] = {  # blocks of layers 1 to 4, and whether a block has a third convolution
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}


def from_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of torchvision's fasterrcnn_…_fpn or maskrcnn_…_fpn as ours (FPN, two FC layers) loads them, strictly.

    Raises InputError for a name that is neither's: the box heads and pyramids of its "v2" models have layers ours lack.
    """
    return {_renamed(name): tensor for name, tensor in state_dict.items()}


def looks_like_torchvision(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are a whole detector of torchvision's R-CNN family."""
    return any(name.startswith("roi_heads.") for name in tensors)


def torchvision_detector(state_dict: Mapping[str, Tensor], label: str) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """Tensors under our names, the config (YAML) of the detector they make, and its classes.

    91 rows are COCO's numbers up to 90: of these the 80 in use stay, and norm_eps is 0, as in torchvision's published files. Classes of
    another number are called class 1, class 2 … Raises InputError, with `label`, for what is no ResNet with an FPN and two FC layers.
    """
    tensors = {name: value for name, value in from_torchvision(state_dict).items() if not name.endswith("num_batches_tracked")}
    blocks = {name.split(".conv1.")[0].rpartition("backbone.")[2] for name in tensors if re.search(r"layer\d\.\d+\.conv1\.weight", name)}
    layout = tuple(sum(block.startswith(f"layer{stage}.") for block in blocks) for stage in (1, 2, 3, 4))
    network = _NETWORKS.get((layout, "backbone.backbone.layer1.0.conv3.weight" in tensors))
    if network is None or not {"roi_head.cls_score.weight", "roi_head.box_head.fc6.weight"} <= tensors.keys():
        raise InputError(
            f"{label} is no fasterrcnn_resnet*_fpn or maskrcnn_resnet*_fpn of torchvision's: {layout} residual blocks in layers 1 to 4"
        )
    count = len(tensors["roi_head.cls_score.weight"])
    names = _coco_categories() if count == COCO_ROWS else ["background", *(f"class {label}" for label in range(1, count))]
    kept = [label for label, name in enumerate(names) if name != "N/A"]
    for name, value in tensors.items():
        if name.rpartition(".")[0] in CLASS_ROWS:
            tensors[name] = value.unflatten(0, (count, -1))[kept].flatten(0, 1)
    mask = any(name.startswith("mask_head.") for name in tensors)
    width = len(tensors["roi_head.box_head.fc6.weight"])
    eps = "0.0" if count == COCO_ROWS else "null"
    backbone, roi = f"{{name: {network}, norm_eps: {eps}}}", f"{{proposals_test: 1000, head_width: {width}}}"
    return (
        tensors,
        f"model: {{head: fpn, mask: {str(mask).lower()}, backbone: {backbone}, roi: {roi}}}\n",
        tuple(names[label] for label in kept[1:]),
    )


def _coco_categories() -> list[str]:
    """By COCO's number, with "N/A" in its gaps."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    return list(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])


def _renamed(name: str) -> str:
    old_mask = re.fullmatch(r"roi_heads\.mask_head\.mask_fcn(\d)\.(.+)", name)
    if old_mask:
        return f"mask_head.convs.{int(old_mask[1]) - 1}.{old_mask[2]}"
    for pattern, ours in _RULES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    raise InputError(f"'{name}' is no tensor of torchvision's fasterrcnn_*_fpn or maskrcnn_*_fpn; its v2 detectors are not supported")
