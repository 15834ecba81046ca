"""Shards give back what was written; the stream's order is fixed by a seed, whole, resumable, and the same for any number of processes."""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from resbackbone.classification.config import ClassificationConfig, load_classification_config
from resbackbone.classification.files import decode
from resbackbone.classification.loader import Batch, eval_loader
from resbackbone.classification.shards import INDEX_FILE, ShardIndex, read_index, read_shard, write_shards
from resbackbone.classification.sources import ArraySource, load_source
from resbackbone.classification.stream import StreamSampler, eval_stream, train_stream
from resbackbone.errors import InputError
from resbackbone.runtime.distributed import Process
from resbackbone.runtime.sampler import ResumableBatchSampler

COUNTS = np.array([7, 7, 7, 7, 7, 2])


def process(rank: int = 0, world_size: int = 1) -> Process:
    return Process(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def shards(tiny_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny photos as shards of seven, byte for byte."""
    root = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        write_shards(load_source("folder", tiny_photos, split), root / split, per_shard=7, seed=0 if split == "train" else None)
    return root


def config_of(shards: Path, *extra: str) -> ClassificationConfig:
    settings = ["data.kind=shards", f"data.root={shards}", "data.size=24", "data.shorter_side=[24,40]", "data.workers=0", "data.lanes=4"]
    tiny = ["data.shuffle_block=4", "train.batch_size=8", "train.seed=5", "eval.shorter_side=24", "eval.crop=24", "eval.batch_size=4"]
    return load_classification_config(None, [*settings, *tiny, *extra])


def batches(config: ClassificationConfig, count: int, *, done: int = 0, rank: int = 0, world_size: int = 1) -> list[Batch]:
    loader, sampler = train_stream(config, read_index(config.data.root, "train"), process(rank, world_size))
    sampler.advance(done)
    return list(islice(iter(loader), count))


def test_what_is_written_is_read(shards: Path, tiny_photos: Path) -> None:
    source = load_source("folder", tiny_photos, "train")
    index = read_index(str(shards), "train")
    assert index.counts.tolist() == [7, 7, 7, 7, 7, 2]
    assert index.classes == source.classes
    rows = [row for shard in range(6) for row in read_shard(index, shard)]
    assert [number for number, _, _ in rows] == list(range(37))
    originals = {source.read(number): int(source.labels[number]) for number in range(37)}
    assert {data: label for _, data, label in rows} == originals
    assert [label for _, _, label in rows] != sorted(label for _, _, label in rows), "shuffled"
    part = list(read_shard(index, 1, first=2, last=4))
    assert part == rows[9:11]
    kept = read_index(str(shards), "val")
    assert [row[1:] for shard in range(2) for row in read_shard(kept, shard)] == [
        (val.read(number), int(val.labels[number])) for val in [load_source("folder", tiny_photos, "val")] for number in range(13)
    ]


def test_writing_twice_gives_the_same_bytes(shards: Path, tiny_photos: Path, tmp_path: Path) -> None:
    write_shards(load_source("folder", tiny_photos, "train"), tmp_path / "train", per_shard=7)
    for path in sorted((shards / "train").iterdir()):
        assert (tmp_path / "train" / path.name).read_bytes() == path.read_bytes()


def test_short_side_shrinks_and_only_shrinks(tiny_photos: Path, tmp_path: Path) -> None:
    source = load_source("folder", tiny_photos, "val")
    index = write_shards(source, tmp_path / "small", short_side=40, seed=None)
    sizes = {decode(data, name="a").shape[:2] for _, data, _ in read_shard(index, 0)}
    assert sizes == {(40, 53), (53, 40)}
    whole = write_shards(source, tmp_path / "large", short_side=400, seed=None)
    assert next(iter(read_shard(whole, 0)))[1] == source.read(0)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    arrays = write_shards(ArraySource(pixels, np.array([1, 0]), ("a", "b"), label="arrays"), tmp_path / "arrays", seed=None)
    assert np.array_equal(decode(next(iter(read_shard(arrays, 0)))[1], name="a"), pixels[0]), "arrays are kept without loss"


@pytest.mark.parametrize("lanes", [1, 4, 8])
def test_an_epoch_gives_each_image_once(lanes: int) -> None:
    sampler = StreamSampler(COUNTS, batch_size=8, lanes=lanes, block=3, seed=1)
    starts = np.concatenate([[0], np.cumsum(COUNTS)])
    orders = []
    for epoch in (0, 1):
        seen = []
        for lane in range(lanes):
            for pieces, order in sampler.blocks(epoch, lane):
                numbers = np.concatenate([np.arange(first, last) + starts[shard] for shard, first, last in pieces])
                seen += numbers[order].tolist()
        assert len(seen) == len(set(seen)) == 32
        orders.append(seen)
    assert orders[0] != orders[1]


def test_one_order_for_any_number_of_processes_and_workers(shards: Path) -> None:
    config = config_of(shards)
    alone = batches(config, 9)
    assert len({int(index) for batch in alone[:4] for index in batch.indices}) == 32, "an epoch of four batches, each image once"
    two = [batches(config, 9, rank=rank, world_size=2) for rank in range(2)]
    for number, batch in enumerate(alone):
        for name, tensor in batch._asdict().items():
            assert torch.equal(tensor, torch.cat([part[number]._asdict()[name] for part in two])), name
    by_workers = batches(config_of(shards, "data.workers=2"), 5)
    assert all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(alone, by_workers, strict=False))
    assert alone[0].images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("done", [1, 3, 4, 6])
def test_the_stream_goes_on_where_it_was(shards: Path, done: int) -> None:
    whole, rest = batches(config_of(shards), 8), batches(config_of(shards), 8 - done, done=done)
    assert all(torch.equal(a.images, b.images) and torch.equal(a.indices, b.indices) for a, b in zip(whole[done:], rest, strict=True))


def test_a_position_in_a_folder_is_none_in_shards_and_the_other_way_round() -> None:
    streamed = StreamSampler(COUNTS, batch_size=8, lanes=4, block=3, seed=1)
    at_random = ResumableBatchSampler(int(COUNTS.sum()), batch_size=8, seed=1)
    for one, other in ((streamed, at_random), (at_random, streamed)):
        with pytest.raises(InputError, match="its position would mean other images"):
            one.load_state_dict(other.state_dict())


def test_the_position_belongs_to_its_order() -> None:
    sampler = StreamSampler(COUNTS, batch_size=8, lanes=4, block=3, seed=1)
    sampler.advance(3)
    other = StreamSampler(COUNTS, batch_size=8, lanes=4, block=3, seed=1, world_size=2)
    other.load_state_dict(sampler.state_dict())
    assert other.batches_done == 3
    with pytest.raises(InputError, match="lanes = 4, this run has 2"):
        StreamSampler(COUNTS, batch_size=8, lanes=2, block=3, seed=1).load_state_dict(sampler.state_dict())
    with pytest.raises(InputError, match=r"data\.lanes=4.*3 processes"):
        StreamSampler(COUNTS, batch_size=8, lanes=4, block=3, seed=1, world_size=3)
    with pytest.raises(InputError, match="37 images, fewer than"):
        StreamSampler(COUNTS, batch_size=64, lanes=4, block=3, seed=1)


def test_evaluation_sees_each_image_once_as_from_the_folder(shards: Path, tiny_photos: Path) -> None:
    config = config_of(shards)
    index = read_index(str(shards), "val")
    parts = [[views for batch in eval_stream(config, index, process(rank, 2)) for views in batch] for rank in range(2)]
    assert [len(part) for part in parts] == [7, 6]
    folder = [views for batch in eval_loader(config, load_source("folder", tiny_photos, "val"), process()) for views in batch]
    for ours, theirs in zip(parts[0] + parts[1], folder, strict=True):
        assert ours.label == theirs.label
        assert torch.equal(ours.stacks[0], theirs.stacks[0])


# -------------------------------------------------------------------------------------------------------------------------- damaged shards


def copy_of(shards: Path, tmp_path: Path) -> Path:
    for path in (shards / "train").iterdir():
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "train"


def index_without_check(folder: Path) -> ShardIndex:
    """The index as it was before the file was damaged: what a store that can't be asked for sizes gives."""
    content = json.loads((folder / INDEX_FILE).read_text())
    names, counts = [shard["name"] for shard in content["shards"]], np.array([shard["samples"] for shard in content["shards"]])
    return ShardIndex(place=str(folder), classes=tuple(content["classes"]), names=tuple(names), counts=counts, sizes=(0,) * len(names))


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.7])  # the last fifth pads the file
def test_a_shard_that_is_cut_off(keep: float, shards: Path, tmp_path: Path) -> None:
    folder = copy_of(shards, tmp_path)
    victim = folder / "shard_00002.tar"
    victim.write_bytes(victim.read_bytes()[: int(keep * victim.stat().st_size)])
    with pytest.raises(InputError, match=r"shard_00002\.tar has \d+ bytes instead of"):
        read_index(str(tmp_path), "train")
    with pytest.raises(InputError, match=r"shard_00002\.tar: this shard cannot be read"):
        list(read_shard(index_without_check(folder), 2))


def test_a_shard_of_noise_and_a_missing_one(shards: Path, tmp_path: Path) -> None:
    folder = copy_of(shards, tmp_path)
    victim = folder / "shard_00001.tar"
    size = victim.stat().st_size
    victim.write_bytes(np.random.default_rng(0).bytes(size))
    config = config_of(tmp_path, "data.workers=2")
    with pytest.raises(InputError, match=r"shard_00001\.tar: this shard cannot be read"):
        batches(config, 4)
    victim.unlink()
    with pytest.raises(InputError, match=r"shard_00001\.tar is not there"):
        read_index(str(tmp_path), "train")
    with pytest.raises(InputError, match=r"shard_00001\.tar: this shard cannot be read"):
        list(read_shard(index_without_check(folder), 1))


def test_an_image_that_is_cut_off_inside_a_shard(tiny_photos: Path, tmp_path: Path) -> None:
    source = load_source("folder", tiny_photos, "val")
    write_shards(source, tmp_path / "train", seed=None)
    tar = tmp_path / "train" / "shard_00000.tar"
    data = source.read(4)
    tar.write_bytes(tar.read_bytes().replace(data, data[:-300] + bytes(300)))
    with pytest.raises(InputError, match=r"image 4: the file is cut off.*data\.unreadable=skip"):
        batches(config_of(tmp_path), 1)
    (batch,) = batches(config_of(tmp_path, "data.unreadable=skip"), 1)
    assert 4 not in batch.indices.tolist()


def test_wrong_indexes(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.root is not set"):
        read_index(None, "train")
    with pytest.raises(InputError, match="cannot be read"):
        read_index(str(tmp_path), "train")
    folder = copy_of(shards, tmp_path)
    content = json.loads((folder / INDEX_FILE).read_text())
    for change, words in (
        ({"shards": [{**content["shards"][0], "name": "pipe:touch x; .tar"}]}, "names a shard 'pipe"),
        ({"shards": []}, "names no shard"),
        ({"version": 9}, "version 9"),
        ({"classes": None}, "not an index"),
    ):
        (folder / INDEX_FILE).write_text(json.dumps(content | change))
        with pytest.raises(InputError, match=words):
            read_index(str(tmp_path), "train")
    (folder / INDEX_FILE).write_text("[")
    with pytest.raises(InputError, match="not an index"):
        read_index(str(tmp_path), "train")


def test_what_writing_refuses(shards: Path, tiny_photos: Path, tmp_path: Path) -> None:
    source = load_source("folder", tiny_photos, "val")
    with pytest.raises(InputError, match="holds shards already"):
        write_shards(source, shards / "val")
    with pytest.raises(InputError, match="--per-shard 0"):
        write_shards(source, tmp_path / "a", per_shard=0)
    for side in (0, -1):
        with pytest.raises(InputError, match=f"--short-side {side} is not possible"):
            write_shards(source, tmp_path / "a", short_side=side)
    broken = tmp_path / "photos" / "val" / "red"
    broken.mkdir(parents=True)
    data = cv2.imencode(".jpg", np.zeros((32, 32, 3), dtype=np.uint8))[1].tobytes()
    (broken / "half.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"half\.jpg: the file is cut off"):
        write_shards(load_source("folder", tmp_path / "photos", "val"), tmp_path / "out")
    assert not (tmp_path / "out" / INDEX_FILE).exists()


def test_the_tool(tiny_photos: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("make_shards", repository / "tools/make_shards.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    command = ["--root", str(tiny_photos), "--split", "val", "--output", str(tmp_path), "--per-shard", "5", "--short-side", "40"]
    assert tool.main(command) == 0
    assert "13 images of 3 classes in 3 shards" in capsys.readouterr().out
    assert read_index(str(tmp_path), "val").counts.tolist() == [5, 5, 3]
    assert tool.main(command) == 1
    assert "holds shards already" in capsys.readouterr().err


def test_without_webdataset_the_extra_is_named(tiny_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(InputError, match=r"resbackbone\[shards\]"):
        write_shards(load_source("folder", tiny_photos, "val"), tmp_path)
