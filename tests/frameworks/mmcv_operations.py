"""Stands in for mmcv's compiled operations, which its wheels of today lack: those a test detector runs, through torchvision.

MMDetection's models can't be imported without `mmcv._ext`. An operation that isn't here is refused when it is called.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms, roi_align


class Operations(ModuleType):
    """A module that has every operation by name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(f"{name} is a compiled operation of mmcv, and these tests stand in for nms and roi_align alone")

        return refuse


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """[N, 4], [N] -> indices kept; with `offset` 1 a box ends one pixel later."""
    return nms(boxes + boxes.new_tensor([0, 0, offset, offset]), scores, iou_threshold)


def _roi_align_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    assert pool_mode == 1, "the mean; a maximum has no counterpart"
    output.copy_(roi_align(features, rois, (aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned))


def _roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    cells = (aligned_height, aligned_width)
    gradient = torch.ops.torchvision._roi_align_backward
    grad_input.copy_(gradient(grad_output, rois, spatial_scale, *cells, *grad_input.shape, sampling_ratio, aligned))


def provide() -> None:
    """Put the operations where mmcv looks for them, unless it has its own."""
    if "mmcv._ext" in sys.modules or importlib.util.find_spec("mmcv") is None or importlib.util.find_spec("mmcv._ext") is not None:
        return
    module = Operations("mmcv._ext")
    module.nms, module.roi_align_forward, module.roi_align_backward = _nms, _roi_align_forward, _roi_align_backward
    sys.modules["mmcv._ext"] = module
