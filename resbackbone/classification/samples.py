"""samples/: what the network is shown, as pictures, so that a wrong label or an augmentation gone mad is seen before hours have passed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from resbackbone.classification.recipe import Normalizer
from resbackbone.runtime.atomic import write_atomically

_SMALLEST_SIDE_PX = 224  # smaller pictures are enlarged, so that their name can be read
_CAPTION_PX = 20


def draw_samples(folder: Path, images: Tensor, labels: Tensor, classes: Sequence[str], normalizer: Normalizer, *, count: int) -> None:
    """Write the first `count` of a batch as train_00.jpg …, each with its label below.

    images: the network's input, float [N, 3, S, S]; labels: numbers [N], or shares of each class [N, K] where images are mixed.
    """
    pixels = normalizer.undo(images[:count].detach()).permute(0, 2, 3, 1).cpu().numpy()
    for number, (picture, label) in enumerate(zip(pixels, labels[:count].detach().cpu(), strict=True)):
        done, encoded = cv2.imencode(".jpg", with_caption(picture, caption_of(label, classes))[..., ::-1])
        assert done, "OpenCV has no encoder for .jpg"
        write_atomically(folder / f"train_{number:02d}.jpg", encoded.tobytes())


def caption_of(label: Tensor, classes: Sequence[str]) -> str:
    """A class's name; of a mixed label (float [K]), the two largest shares: "cat 70 % + dog 30 %"."""
    if label.ndim == 0:
        return classes[int(label)]
    shares, numbers = label.sort(descending=True)
    parts = zip(shares[:2].tolist(), numbers[:2].tolist(), strict=True)
    return " + ".join(f"{classes[number]} {share:.0%}" for share, number in parts if share >= 0.005)


def with_caption(picture: np.ndarray, text: str) -> np.ndarray:
    """uint8 RGB [S, S, 3] -> the same, small ones enlarged by a whole factor, over a white strip with `text` (ASCII; others become ?)."""
    factor = max(1, -(-_SMALLEST_SIDE_PX // min(picture.shape[:2])))
    enlarged = picture.repeat(factor, 0).repeat(factor, 1)
    framed = np.pad(enlarged, ((0, _CAPTION_PX), (0, 0), (0, 0)), constant_values=255)
    place = (4, framed.shape[0] - 6)
    return cv2.putText(framed, text.encode("ascii", "replace").decode(), place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
