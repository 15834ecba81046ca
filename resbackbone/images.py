"""A few images for looking into a network: from a folder, or from arrays in an .npz file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from resbackbone.backbone import Preprocessing
from resbackbone.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def load_images(source: str | Path, *, size: int, preprocessing: Preprocessing, limit: int) -> tuple[Tensor, Tensor | None]:
    """At most `limit` images [N, 3, size, size], normalised, and their labels [N] where the source has them.

    Args:
        source: a folder of images, or an .npz with `images`, uint8 [N, H, W, 3] in RGB, and perhaps `labels`, integers [N].
        size: side in pixels; images of another size are resized.

    Raises InputError for a source that is missing, empty or of another kind.
    """
    path = Path(source)
    images, labels = _from_arrays(path, limit) if path.suffix == ".npz" else (_from_folder(path, size, limit), None)
    floats = images.permute(0, 3, 1, 2).float()
    if floats.shape[-2:] != (size, size):
        floats = F.interpolate(floats, (size, size), mode="bilinear", antialias=True, align_corners=False)
    if preprocessing.color_order == "BGR":
        floats = floats.flip(1)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (floats * (preprocessing.input_range / 255) - mean) / std, labels


def _from_arrays(path: Path, limit: int) -> tuple[Tensor, Tensor | None]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays["images"][:limit]
            labels = arrays["labels"][:limit] if "labels" in arrays else None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not an .npz file with an array 'images' [N, H, W, 3] of uint8 ({error})") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise InputError(f"{path}: images is {images.dtype} {list(images.shape)}; it must be uint8 [N, H, W, 3]")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise InputError(f"{path}: labels is {labels.dtype} {list(labels.shape)}; it must be integers [{len(images)}]")
    return torch.from_numpy(images), None if labels is None else torch.from_numpy(labels.astype(np.int64))


def _from_folder(path: Path, size: int, limit: int) -> Tensor:
    import cv2
    import numpy as np

    if not path.is_dir():
        raise InputError(f"{path} is neither a folder of images nor an .npz file")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)[:limit]
    if not files:
        raise InputError(f"{path} holds no images ({', '.join(SUFFIXES)})")
    pixels = []
    for file in files:
        image = cv2.imread(str(file), cv2.IMREAD_COLOR)
        if image is None:
            raise InputError(f"{file} can't be read as an image")
        pixels.append(cv2.cvtColor(cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB))
    return torch.from_numpy(np.stack(pixels))
