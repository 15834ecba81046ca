"""samples/ shows what the network is shown: pixels put back, names below, once a run."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from resbackbone.classification.config import load_classification_config
from resbackbone.classification.loader import train_loader
from resbackbone.classification.recipe import Normalizer
from resbackbone.classification.samples import caption_of, draw_samples, with_caption
from resbackbone.classification.sources import load_source
from resbackbone.classification.train import train
from resbackbone.errors import InputError
from resbackbone.runtime.distributed import Process


@pytest.mark.parametrize("input_range", [1.0, 255.0])
def test_normalising_is_undone(input_range: float) -> None:
    normalizer = Normalizer(mean=(0.5 * input_range, 0.4, 0.3), std=(0.2, 1.0, 0.3), input_range=input_range)
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    assert torch.equal(normalizer.undo(normalizer(images)), images)
    shifted = normalizer.undo(normalizer(images, torch.tensor([[0.1, 0.0, -0.1]] * 2)))
    expected = (images.float() + 255 * torch.tensor([0.1, 0.0, -0.1])[:, None, None]).round().clamp(0, 255)
    assert (shifted.float() - expected).abs().max() <= 1


def test_captions() -> None:
    classes = ("cat", "dog", "cow")
    assert caption_of(torch.tensor(1), classes) == "dog"
    assert caption_of(torch.tensor([0.3, 0.0, 0.7]), classes) == "cow 70% + cat 30%"
    assert caption_of(torch.tensor([0.0, 1.0, 0.0]), classes) == "dog 100%"
    picture = np.full((32, 32, 3), 90, dtype=np.uint8)
    framed = with_caption(picture, "grün")
    assert framed.shape == (244, 224, 3), "seven times as large, and a strip"
    assert (framed[:224] == 90).all()
    assert framed[224:].min() < 60 < framed[224:].max() == 255


def test_a_run_shows_the_images_of_its_first_batch(tiny_photos: Path, tiny_settings: list[str], tmp_path: Path) -> None:
    settings = [*tiny_settings, f"data.root={tiny_photos}", "train.steps=1", "train.samples=3", "data.pca_noise=0.0"]
    config = load_classification_config(None, settings)
    train(config, tmp_path / "run")
    files = sorted((tmp_path / "run/samples").iterdir())
    assert [path.name for path in files] == ["train_00.jpg", "train_01.jpg", "train_02.jpg"]
    process = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    batch = next(iter(train_loader(config, load_source("folder", tiny_photos, "train"), process)[0]))
    for path, image in zip(files, batch.images, strict=False):
        shown = cv2.imread(str(path))[:224, :, ::-1]
        expected = image.permute(1, 2, 0).numpy().repeat(14, 0).repeat(14, 1)
        assert np.abs(shown.astype(int) - expected).mean() < 4, "but for JPEG's losses"
    written = [path.stat().st_mtime_ns for path in files]
    train(load_classification_config(None, [*settings, "train.steps=2"]), tmp_path / "run", resume="auto")
    assert [path.stat().st_mtime_ns for path in files] == written, "a run that goes on leaves them"


def test_mixed_images_and_none_at_all(tmp_path: Path) -> None:
    normalizer = Normalizer(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), input_range=255.0)
    images, labels = torch.rand(2, 3, 8, 8) * 255, torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    draw_samples(tmp_path / "some", images, labels, ("a", "b"), normalizer, count=9)
    assert len(list((tmp_path / "some").iterdir())) == 2
    draw_samples(tmp_path / "none", images, labels, ("a", "b"), normalizer, count=0)
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match=r"train\.samples=-1"):
        load_classification_config(None, ["train.samples=-1"])
