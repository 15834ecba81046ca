"""Reading a tar from front to back: as Python's tarfile and webdataset read it, or refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from resbackbone.classification.shards import read_shard, write_shards
from resbackbone.classification.sources import ArraySource
from resbackbone.classification.tar import tar_files

CONTENTS = {"00000000.jpg": b"x" * 1234, "00000000.cls": b"7", "00000001.png": bytes(512), "00000001.cls": b""}


def tar(files: dict[str, bytes], *, form: int = tarfile.USTAR_FORMAT, mtime: float = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.type = len(content), mtime, kind
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1.5])  # a fraction of a second gets a header of its own in PAX
def test_every_format_that_tarfile_writes(form: int, mtime: float) -> None:
    data = tar(CONTENTS, form=form, mtime=mtime)
    assert dict(tar_files(io.BytesIO(data))) == CONTENTS
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert {one.name: archive.extractfile(one).read() for one in archive} == CONTENTS  # type: ignore[union-attr]


def test_what_is_no_plain_tar() -> None:
    data = bytearray(tar(CONTENTS))
    with pytest.raises(ValueError, match="ends within a file"):
        list(tar_files(io.BytesIO(bytes(data[:1000]))))
    with pytest.raises(ValueError, match="header is damaged"):
        list(tar_files(io.BytesIO(bytes(data[:100]))))
    data[3] ^= 1
    with pytest.raises(ValueError, match="header is damaged"):
        list(tar_files(io.BytesIO(bytes(data))))
    with pytest.raises(ValueError, match="no plain file"):
        list(tar_files(io.BytesIO(tar({"a.jpg": b""}, kind=tarfile.SYMTYPE))))
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with pytest.raises(ValueError, match="no plain file"):
            list(tar_files(io.BytesIO(tar({"a" * 300 + ".jpg": b"1"}, form=form))))
    assert list(tar_files(io.BytesIO(b""))) == []


def test_webdataset_reads_what_we_read(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    index = write_shards(ArraySource(pixels, np.arange(9) % 3, ("a", "b", "c"), label="arrays"), tmp_path / "train")
    rows = list(read_shard(index, 0))
    theirs = list(webdataset.WebDataset(str(tmp_path / "train" / index.names[0]), shardshuffle=False))
    assert [(one["png"], int(one["cls"])) for one in theirs] == [row[1:] for row in rows]
    assert [int(one["__key__"]) for one in theirs] == [row[0] for row in rows] == list(range(9))
