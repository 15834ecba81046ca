"""Geometry that keeps image, boxes and masks in step. Images are uint8 [H, W, 3] here, boxes xyxy float32 in pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from .images import resize_image


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One image and where things are in it: boxes [B, 4], masks uint8 [B, H, W] or None."""

    image: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray | None = None


def resized(scene: Scene, size: tuple[int, int]) -> Scene:
    """The scene at `size` (height, width); each axis has its own exact factor, masks take the nearest pixel."""
    height, width = scene.image.shape[:2]
    factors = np.array([size[1] / width, size[0] / height] * 2, dtype=np.float32)
    masks = scene.masks
    if masks is not None:
        drawn = [cv2.resize(mask, (size[1], size[0]), interpolation=cv2.INTER_NEAREST) for mask in masks]
        masks = np.stack(drawn) if drawn else np.zeros((0, *size), np.uint8)
    return Scene(image=resize_image(scene.image, size), boxes=scene.boxes * factors, masks=masks)


def horizontal_flip(scene: Scene) -> Scene:
    """The scene in a mirror: x becomes width - x, and x1 stays left of x2."""
    width = scene.image.shape[1]
    boxes = scene.boxes.copy()
    boxes[:, 0], boxes[:, 2] = width - scene.boxes[:, 2], width - scene.boxes[:, 0]
    masks = None if scene.masks is None else np.ascontiguousarray(scene.masks[:, :, ::-1])
    return replace(scene, image=cv2.flip(scene.image, 1), boxes=boxes, masks=masks)
