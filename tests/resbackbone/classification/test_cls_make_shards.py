"""tools/make_shards.py: what it refuses, what it leaves out, what it says on the way, and other people's tars."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from resbackbone.classification import shards as shards_module
from resbackbone.classification.files import decode
from resbackbone.classification.shards import index_shards, read_index, read_shard, write_shards
from resbackbone.classification.sources import load_source
from resbackbone.errors import InputError
from tools import make_shards as make_shards_tool

Tool = Callable[[list[str]], int]


@pytest.fixture
def make_shards() -> Tool:
    return make_shards_tool.main


@pytest.fixture
def damaged(tiny_photos: Path, tmp_path: Path) -> Path:
    """The tiny photos with two validation JPEGs cut in half, the first among them."""
    root = tmp_path / "damaged"
    shutil.copytree(tiny_photos, root)
    for victim in (sorted((root / "val/blue").iterdir())[0], sorted((root / "val/red").iterdir())[1]):
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    return root


def test_a_store_is_no_output(
    make_shards: Tool, tiny_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert make_shards(["--root", str(tiny_photos), "--split", "val", "--output", "s3://bucket/photos"]) == 1
    assert "--output s3://bucket/photos: shards are written to a folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert make_shards(["--root", str(tiny_photos), "--split", "val", "--output", f"file://{tmp_path}/out"]) == 0
    assert read_index(str(tmp_path / "out"), "val").images == 13


def test_damaged_photos_are_left_out_on_request(
    make_shards: Tool, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    command = ["--root", str(damaged), "--split", "val", "--output", str(tmp_path / "out"), "--per-shard", "4", "--keep-order"]
    assert make_shards(command) == 1
    assert "--unreadable skip" in capsys.readouterr().err
    assert make_shards([*command, "--unreadable", "skip"]) == 0
    said = capsys.readouterr().out
    assert "shard_00001.tar: 8 of 13 images" in said
    assert "11 images of 3 classes in 3 shards" in said
    assert "2 could not be read and were left out" in said
    assert [record.getMessage().split(":")[0].split("/")[-2] for record in caplog.records] == ["blue", "red"]
    index = read_index(str(tmp_path / "out"), "val")
    assert index.counts.tolist() == [4, 4, 3]
    source = load_source("folder", damaged, "val")
    kept = [source.read(number) for number in range(13) if _is_readable(source.read(number))]
    assert [data for shard in range(3) for _, data, _ in read_shard(index, shard)] == kept


def _is_readable(data: bytes) -> bool:
    try:
        return decode(data, name="") is not None
    except InputError:
        return False


def test_a_disk_that_is_gone_is_no_run_of_damaged_photos(damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (damaged / "val").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of the 13 images can be read"):
        write_shards(load_source("folder", damaged, "val"), tmp_path / "a", skip_unreadable=True)
    monkeypatch.setattr(shards_module, "_MAX_UNREADABLE_IN_A_ROW", 5)
    with pytest.raises(InputError, match="5 images in a row cannot be read"):
        write_shards(load_source("folder", damaged, "val"), tmp_path / "b", skip_unreadable=True)


# ------------------------------------------------------------------------------------------------------------------- other people's tars


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


@pytest.fixture
def foreign(tiny_photos: Path, tmp_path: Path) -> Path:
    """Two tars, their samples in folders, with captions."""
    photos = sorted((tiny_photos / "val").rglob("*.jpg"))
    for shard in range(2):
        files = {}
        for number in range(3):
            key = f"./part.{shard}/n02_{number}"
            files |= {f"{key}.JPEG": photos[3 * shard + number].read_bytes(), f"{key}.cls": b"%d\n" % (2 * shard), f"{key}.json": b"{}"}
        write_tar(tmp_path / "train" / f"imagenet-train-{shard:06d}.tar", files)
    return tmp_path


def test_an_index_for_other_peoples_tars(make_shards: Tool, foreign: Path, tiny_photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_shards(["--index", str(foreign / "train")]) == 0
    assert "6 images of 3 classes in 2 shards" in capsys.readouterr().out
    index = read_index(str(foreign), "train")
    assert index.classes == ("0", "1", "2")
    rows = [row for shard in range(2) for row in read_shard(index, shard)]
    photos = sorted((tiny_photos / "val").rglob("*.jpg"))
    assert rows == [(number, photos[number].read_bytes(), 0 if number < 3 else 2) for number in range(6)]
    with pytest.raises(InputError, match="holds shards already"):
        index_shards(foreign / "train")


def test_class_names_come_from_a_file(make_shards: Tool, foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names, command = foreign / "names.txt", ["--index", str(foreign / "train"), "--classes", str(foreign / "names.txt")]
    assert make_shards(command) == 1
    assert "names.txt is not there" in capsys.readouterr().err
    names.write_text("cat\ndog\n")
    assert make_shards(command) == 1
    assert "imagenet-train-000001.tar" in (said := capsys.readouterr().err)
    assert "label '2' of 2 classes" in said
    names.write_text("cat\ndog\neel\n")
    assert make_shards(command) == 0
    assert json.loads((foreign / "train/index.json").read_text())["classes"] == ["cat", "dog", "eel"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.jpg": b"x"}, "sample a has 1 images and the label ''"),
        ({"a.cls": b"1"}, "sample a has 0 images"),
        ({"a.jpg": b"x", "a.png": b"x", "a.cls": b"1"}, "sample a has 2 images"),
        ({"a.jpg": b"x", "a.cls": b"cat"}, "the label 'cat'"),
        ({}, "holds no samples"),
        ({f"{'long' * 40}.jpg": b"x"}, "no plain file with a short name"),
        (None, "holds no .tar files"),
    ],
)
def test_tars_that_cannot_be_indexed(files: dict[str, bytes] | None, words: str, tmp_path: Path) -> None:
    if files is not None:
        write_tar(tmp_path / "a.tar", files)
    with pytest.raises(InputError, match=words):
        index_shards(tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_what_must_be_given(make_shards: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        make_shards(["--root", "photos"])
    assert stopped.value.code == 2
    assert "--split, --output; or --index" in capsys.readouterr().err
