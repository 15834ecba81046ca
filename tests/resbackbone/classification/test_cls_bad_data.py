"""Damage that only reading shows: wrong labels inside a shard, a JPEG cut off in the validation part, ILSVRC's as well."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from test_cls_sources import write_ilsvrc

from resbackbone.classification.config import ClassificationConfig, load_classification_config
from resbackbone.classification.loader import eval_loader, train_loader
from resbackbone.classification.shards import ShardIndex, read_index, read_shard, write_shards
from resbackbone.classification.sources import FileSource, load_source
from resbackbone.classification.stream import eval_stream
from resbackbone.errors import InputError
from resbackbone.runtime.distributed import Process

ALONE = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
Change = Callable[[str, bytes], tuple[str, bytes] | None]


def config_of(*extra: str) -> ClassificationConfig:
    small = ["data.size=24", "data.shorter_side=[24,40]", "data.workers=0", "train.batch_size=4", "eval.shorter_side=24", "eval.crop=24"]
    return load_classification_config(None, [*small, *extra])


@pytest.fixture
def index(tiny_photos: Path, tmp_path: Path) -> ShardIndex:
    return write_shards(load_source("folder", tiny_photos, "val"), tmp_path / "val", seed=None)


def rewrite(index: ShardIndex, change: Change) -> None:
    """Write the shard again with every (name, content) replaced by what `change` makes of it, None being left out."""
    path = Path(index.place) / index.names[0]
    with tarfile.open(path) as tar:
        files = [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for changed in (change(*file) for file in files):
            if changed is not None:
                info = tarfile.TarInfo(changed[0])
                info.size = len(changed[1])
                tar.addfile(info, io.BytesIO(changed[1]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda name, data: (name, b"3") if name == "00000004.cls" else (name, data),
            "sample 00000004 has 1 images and the label '3' of 3",
        ),
        (lambda name, data: (name, b"cat") if name == "00000004.cls" else (name, data), "00000004 .* the label 'cat'"),
        (lambda name, data: (name, b"") if name == "00000004.cls" else (name, data), "00000004 .* the label ''"),
        (lambda name, data: None if name == "00000004.cls" else (name, data), "00000004 .* the label ''"),
        (lambda name, data: None if name == "00000004.jpg" else (name, data), "00000004 has 0 images"),
        (lambda name, data: None if name.startswith("00000004") else (name, data), "it holds 12 images, the index says 13"),
    ],
)
def test_wrong_labels_in_a_shard(index: ShardIndex, change: Change, words: str) -> None:
    rewrite(index, change)
    with pytest.raises(InputError, match=rf"shard_00000\.tar: this shard cannot be read \(.*{words}.*make_shards"):
        list(read_shard(index, 0))


def test_a_damaged_header_in_the_middle_of_a_shard(index: ShardIndex) -> None:
    path = Path(index.place) / index.names[0]
    with tarfile.open(path) as tar:
        at = tar.getmembers()[11].offset
    data = bytearray(path.read_bytes())
    data[at + 130] ^= 0xFF
    path.write_bytes(data)
    assert read_index(str(path.parents[1]), "val").counts.tolist() == [13], "the size tells nothing"
    with pytest.raises(InputError, match=r"shard_00000\.tar: this shard cannot be read"):
        list(read_shard(index, 0))


def test_a_truncated_jpeg_in_a_validation_shard(index: ShardIndex, tiny_photos: Path) -> None:
    rewrite(index, lambda name, data: (name, data[: len(data) // 2] if name == "00000004.jpg" else data))
    with pytest.raises(InputError, match=r"val, image 4: the file is cut off.*data\.unreadable=skip"):
        list(eval_stream(config_of(), index, ALONE))
    views = [one for batch in eval_stream(config_of("data.unreadable=skip"), index, ALONE) for one in batch]
    assert [number for number, one in enumerate(views) if not one.stacks] == [4], "it stays, and counts as wrong"
    assert len(views) == 13


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_truncated_jpeg_in_ilsvrc(tiny_photos: Path, tmp_path: Path, split: str) -> None:
    write_ilsvrc(tmp_path, tiny_photos, [3, 1, 2, 2, 3])
    source = load_source("ilsvrc", tmp_path, split)
    assert isinstance(source, FileSource)
    victim = Path(source.name(2))
    victim.write_bytes(victim.read_bytes()[:-300])
    config = config_of()
    with pytest.raises(InputError, match=rf"{victim.name}: the file is cut off.*data\.unreadable=skip"):
        list(islice(iter(train_loader(config, source, ALONE)[0]), 9) if split == "train" else eval_loader(config, source, ALONE))


def test_a_truncated_jpeg_in_a_validation_folder(tiny_photos: Path, tmp_path: Path) -> None:
    victim = tmp_path / "val/red/a.jpg"
    victim.parent.mkdir(parents=True)
    data = sorted((tiny_photos / "val/red").iterdir())[0].read_bytes()
    victim.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"val/red/a\.jpg: the file is cut off.*data\.unreadable=skip"):
        list(eval_loader(config_of(), load_source("folder", tmp_path, "val"), ALONE))
