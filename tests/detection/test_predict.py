"""Arrays as a program has them: any strides, and words for what is no picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_weights import save_tiny

from detection.predict import Predictor, read_detector_file, resolve_config
from resbackbone.errors import InputError


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    path = save_tiny(tmp_path_factory.mktemp("weights"))
    return Predictor(resolve_config(None, path), path)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)


VIEWS = {
    "BGR turned round": lambda image: image[..., ::-1],
    "upside down": lambda image: image[::-1],
    "mirrored": lambda image: image[:, ::-1],
    "transposed": lambda image: image.transpose(1, 0, 2),
    "every second row": lambda image: image[::2],
}


@pytest.mark.parametrize("size", [(48, 48), (64, 64), (128, 136)], ids=["enlarged", "as it is", "shrunk"])
@pytest.mark.parametrize("view", VIEWS)
def test_strides_do_not_matter(predictor: Predictor, view: str, size: tuple[int, int]) -> None:
    """`cv2.imread(path)[..., ::-1]` has a negative one."""
    image = VIEWS[view](noise(*size))
    wanted, found = predictor(image.copy()), predictor(image)
    assert len(found) > 0
    assert torch.equal(found.boxes, wanted.boxes)
    assert torch.equal(found.scores, wanted.scores)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((80, 90), np.uint8), r"uint8 of shape \[80, 90\]; .*: np\.stack"),
        (np.zeros((80, 90, 1), np.uint8), r"image\.repeat\(3, axis=2\)"),
        (np.zeros((80, 90, 4), np.uint8), r"shape \[80, 90, 4\]; it should be uint8 \[height, width, 3\].*image\[\.\.\., :3\]"),
        (np.zeros((3, 80, 90), np.uint8), r"image\.transpose\(1, 2, 0\)"),
        (np.zeros((80, 90, 5), np.uint8), r"leave three channels"),
        (np.zeros((1, 80, 90, 3), np.uint8), r"one image at a time"),
        (np.zeros((80, 90, 3), np.uint16), r"an image is uint16 .*image / 257"),
        (np.zeros((80, 90, 3), np.float32), r"an image is float32 .*image \* 255"),
        (np.zeros((80, 90, 3), np.int64), r"an image is int64 .*astype"),
        (np.zeros((0, 90, 3), np.uint8), r"no pixels"),
        (torch.zeros((3, 80, 90), dtype=torch.uint8), r"is a Tensor; .*permute"),
        (None, r"is None, which is what cv2\.imread gives"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_what_is_no_picture_is_said(predictor: Predictor, image: np.ndarray, said: str) -> None:
    with pytest.raises(InputError, match=said):
        predictor(image)
    with pytest.raises(InputError, match=said):
        predictor.detect([noise(64, 64), image])


@pytest.mark.parametrize(
    ("image", "advice"),
    [
        (np.full((80, 90), 7, np.uint8), lambda image: np.stack([image] * 3, axis=2)),
        (np.full((80, 90, 1), 7, np.uint8), lambda image: image.repeat(3, axis=2)),
        (np.full((80, 90, 4), 7, np.uint8), lambda image: image[..., :3]),
        (np.full((3, 80, 90), 7, np.uint8), lambda image: image.transpose(1, 2, 0)),
        (np.full((80, 90, 3), 65535, np.uint16), lambda image: (image / 257).round().astype(np.uint8)),
        (np.full((80, 90, 3), 1.0, np.float32), lambda image: (image * 255).round().astype(np.uint8)),
    ],
)
def test_the_advice_works(predictor: Predictor, image: np.ndarray, advice) -> None:
    assert len(predictor(advice(image))) > 0
    assert image.dtype == np.uint8 or advice(image).max() == 255


@pytest.mark.parametrize("content", [{"conv1.weight": torch.ones(2)}, {"model": {"conv1.weight": torch.ones(2)}, "epoch": 3}])
def test_another_pt_file_is_no_detector(tmp_path: Path, content: dict) -> None:
    torch.save(content, tmp_path / "plain.pt")
    with pytest.raises(InputError, match=r"plain\.pt holds no detector of ours"):
        read_detector_file(tmp_path / "plain.pt")
