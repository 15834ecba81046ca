"""data.decode=gpu on the CPU, where torchvision's decoder has the same call: the crops of the plain path, and what happens to bad files."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision.io

from resbackbone.classification import train as train_module
from resbackbone.classification.config import ClassificationConfig, load_classification_config
from resbackbone.classification.device_decode import EncodedCollate, EncodedTransform, encoded_preparation
from resbackbone.classification.loader import Batch, Preparation, train_loader
from resbackbone.classification.shards import read_index, write_shards
from resbackbone.classification.sources import load_source
from resbackbone.classification.stream import train_stream
from resbackbone.classification.train import train
from resbackbone.errors import InputError
from resbackbone.runtime.distributed import Process

CPU = torch.device("cpu")
ALONE = Process(rank=0, world_size=1, local_rank=0, device=CPU)


def config_of(root: Path, *extra: str) -> ClassificationConfig:
    settings = ["data.size=32", "data.shorter_side=[32,64]", "data.workers=0", "data.lanes=4", "data.reduced_decoding=false"]
    return load_classification_config(None, [f"data.root={root}", "train.batch_size=8", "data.decode=gpu", *settings, *extra])


def preparation_of(config: ClassificationConfig, device: torch.device = CPU) -> Preparation:
    return Preparation(EncodedTransform(data=config.data, seed=config.train.seed), EncodedCollate(config.data))


def both(root: Path, *extra: str, count: int = 4) -> tuple[list[Batch], list[Batch]]:
    """The first batches as workers decode them, and as the device does."""
    config = config_of(root, *extra)
    if config.data.kind == "shards":
        index = read_index(str(root), "train")
        loaders = [train_stream(config, index, ALONE, preparation=one)[0] for one in (None, preparation_of(config))]
    else:
        source = load_source("folder", root, "train")
        loaders = [train_loader(config, source, ALONE, preparation=one)[0] for one in (None, preparation_of(config))]
    plain, encoded = ([batch.to(CPU) for batch in islice(iter(loader), count)] for loader in loaders)
    return plain, encoded


def assert_alike(plain: list[Batch], encoded: list[Batch]) -> None:
    """Labels, colour shifts and numbers are equal; pixels differ by what two decoders and two bilinear filters differ."""
    for one, other in zip(plain, encoded, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.shifts, other.shifts)
        assert other.images.dtype == torch.uint8
        assert other.images.is_contiguous(memory_format=torch.channels_last)
        difference = (one.images.int() - other.images.int()).abs()
        assert difference.float().mean() < 0.6
        assert difference.max() <= 8
    flat = torch.cat([batch.images for batch in plain])
    assert (flat[:-1].int() - flat[1:].int()).abs().float().mean() > 8, "neighbours do differ"


@pytest.mark.parametrize("extra", [[], ["data.crop=area"], ["data.workers=2"], ["data.auto_augment=trivialaugment"]])
def test_the_same_crops_from_a_folder(tiny_photos: Path, extra: list[str]) -> None:
    plain, encoded = both(tiny_photos, *extra)
    if "data.auto_augment=trivialaugment" in extra:  # posterising and the like make a large difference of a small one
        shares = [((one.images.int() - other.images.int()).abs() <= 8).float().mean() for one, other in zip(plain, encoded, strict=True)]
        assert min(shares) > 0.95
    else:
        assert_alike(plain, encoded)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_crops_from_shards(tiny_photos: Path, tmp_path: Path, workers: int) -> None:
    write_shards(load_source("folder", tiny_photos, "train"), tmp_path / "train", per_shard=7)
    assert_alike(*both(tmp_path, "data.kind=shards", f"data.workers={workers}", count=5))


@pytest.fixture
def photos(tiny_photos: Path, tmp_path: Path) -> Path:
    """A copy that tests may damage."""
    shutil.copytree(tiny_photos, tmp_path / "photos")
    return tmp_path / "photos"


def test_what_is_no_jpeg_and_what_only_the_cpu_decodes(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victims = sorted((photos / "train/red").iterdir())
    cv2.imwrite(str(victims[0].with_suffix(".png")), cv2.imread(str(victims[0])))
    victims[0].unlink()
    refused = torch.from_numpy(np.fromfile(victims[1], dtype=np.uint8))
    decode_jpeg = torchvision.io.decode_jpeg

    def choosy(jpegs: list[torch.Tensor], **options: object) -> list[torch.Tensor]:
        if any(torch.equal(jpeg, refused) for jpeg in jpegs):
            raise RuntimeError("JPEG_NOT_SUPPORTED")
        return decode_jpeg(jpegs, **options)

    monkeypatch.setattr(torchvision.io, "decode_jpeg", choosy)
    plain, encoded = both(photos)
    assert_alike(plain, encoded)
    assert sum(len(batch.labels) for batch in plain) == 32


def test_a_cut_off_jpeg_stops_or_is_skipped(photos: Path) -> None:
    victim = sorted((photos / "train/red").iterdir())[1]
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"red.*{victim.name}: the file is cut off.*data\.unreadable=skip"):
        both(photos, count=5)
    assert_alike(*both(photos, "data.unreadable=skip", count=5))


def test_damage_that_only_decoding_shows_names_the_file(photos: Path) -> None:
    victim = sorted((photos / "train/red").iterdir())[1]
    data = victim.read_bytes()
    start = data.index(b"\xff\xdb")  # the quantisation table becomes no marker at all; size and end are still there
    frame = data.index(b"\xff\xc0")
    victim.write_bytes(data[:start] + data[frame : frame + 19] + b"\xff\xd9")
    config = config_of(photos)
    loader, _ = train_loader(config, load_source("folder", photos, "train"), ALONE, preparation=preparation_of(config))
    with pytest.raises(InputError, match=rf"red.*{victim.name}: not an image, or damaged"):
        [batch.to(CPU) for batch in islice(iter(loader), 5)]


def test_where_it_cannot_be_done(tiny_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"data\.decode=gpu decodes on an NVIDIA GPU.*cpu; set data\.decode=cpu"):
        train(config_of(tiny_photos, "train.steps=1", "model.name=resnet20_cifar", "train.device=cpu"), tmp_path / "run")
    with pytest.raises(InputError, match=r"data\.crop=pad is CIFAR's"):
        config_of(tiny_photos, "data.crop=pad")
    assert encoded_preparation(config_of(tiny_photos), torch.device("cuda")).collate

    def without(*args: object, **options: object) -> None:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr(torchvision.io, "decode_jpeg", without)
    with pytest.raises(InputError, match=r"built without nvJPEG.*data\.decode=cpu"):
        both(tiny_photos, count=1)


def test_a_run_trains_with_it(tiny_photos: Path, tiny_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop around it, the statistics at the end included, with the CPU in the place of the GPU."""
    monkeypatch.setattr(train_module, "encoded_preparation", preparation_of)
    options = [f"data.root={tiny_photos}", "data.decode=gpu", "train.steps=2", "train.bn_images=8"]
    result = train(load_classification_config(None, [*tiny_settings, *options]), tmp_path / "run")
    assert result.weights.is_file()
