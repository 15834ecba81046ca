"""torchvision's Faster R-CNN and Mask R-CNN weights under our names."""

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


def from_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of torchvision's fasterrcnn_…_fpn or maskrcnn_…_fpn as ours (FPN, two FC layers) loads them, strictly.

    Raises InputError for a name that is neither's: the box heads and pyramids of its "v2" models have layers ours lack.
    """
    return {_renamed(name): tensor for name, tensor in state_dict.items()}


def _renamed(name: str) -> str:
    old_mask = re.fullmatch(r"roi_heads\.mask_head\.mask_fcn(\d)\.(.+)", name)
    if old_mask:
        return f"mask_head.convs.{int(old_mask[1]) - 1}.{old_mask[2]}"
    for pattern, ours in _RULES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    raise InputError(f"'{name}' is no tensor of torchvision's fasterrcnn_*_fpn or maskrcnn_*_fpn; its v2 detectors are not supported")
