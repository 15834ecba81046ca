"""Shards behind HTTP and in an object store: the same images, cut connections, missing files, and commands that are never run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from resbackbone.classification import shards as shards_module
from resbackbone.classification import stores
from resbackbone.classification.config import ClassificationConfig, load_classification_config
from resbackbone.classification.evaluate import load_split
from resbackbone.classification.shards import INDEX_FILE, read_index, read_shard, write_shards
from resbackbone.classification.sources import load_source
from resbackbone.classification.stream import eval_stream, train_stream
from resbackbone.errors import InputError
from resbackbone.runtime.distributed import Process

ALONE = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


class Server(ThreadingHTTPServer):
    """Serves a folder on 127.0.0.1; `cuts` has, for a file's name, after how many bytes each of the next connections breaks off."""

    cuts: dict[str, list[int]]
    asked: list[str]


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.asked.append(name)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        coming = self.server.cuts.get(name)
        self.wfile.write(data[: coming.pop(0)] if coming else data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def shards(tiny_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    for split in ("train", "val"):
        write_shards(load_source("folder", tiny_photos, split), root / split, per_shard=7)
    return root


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(shards_module, "_WAIT_S", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), partial(Handler, directory=str(shards))) as server:
        server.cuts, server.asked = {}, []
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def url_of(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def config_of(root: object, *extra: str) -> ClassificationConfig:
    settings = ["data.kind=shards", f"data.root={root}", "data.size=24", "data.shorter_side=[24,40]", "data.workers=0", "data.lanes=4"]
    tiny = ["data.shuffle_block=4", "train.batch_size=8", "eval.shorter_side=24", "eval.crop=24", "eval.batch_size=4"]
    return load_classification_config(None, [*settings, *tiny, *extra])


def assert_same_batches(root: str, local: Path, *, workers: int) -> None:
    """An epoch and a bit, and every validation image, from `root` as from the folder."""
    streams = []
    for place, count in ((str(local), 0), (root, workers)):
        config = config_of(place, f"data.workers={count}")
        batches = iter(train_stream(config, read_index(place, "train"), ALONE)[0])
        val = [views for batch in eval_stream(config, read_index(place, "val"), ALONE) for views in batch]
        streams.append(
            ([next(batches) for _ in range(5)], sorted(val, key=lambda views: (views.label, float(views.stacks[0].float().mean()))))
        )
    for ours, theirs in zip(streams[0][0], streams[1][0], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    for one, other in zip(streams[0][1], streams[1][1], strict=True):
        assert one.label == other.label
        assert torch.equal(one.stacks[0], other.stacks[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_http_gives_what_the_folder_gives(server: Server, shards: Path, workers: int) -> None:
    assert_same_batches(url_of(server), shards, workers=workers)
    assert {"index.json", "shard_00000.tar", "shard_00005.tar"} <= set(server.asked)


def test_an_object_store_gives_what_the_folder_gives(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's store in memory in the place of S3: what is tested is the way there, not Amazon's service."""
    memory = pytest.importorskip("fsspec").filesystem("memory")
    monkeypatch.setattr(stores, "OBJECT_STORES", {"memory": "fsspec"})
    monkeypatch.setattr(stores, "SCHEMES", ("memory",))
    monkeypatch.setattr(shards_module, "_WAIT_S", 0.001)
    for path in shards.glob("*/*"):
        memory.pipe_file(f"/bucket/{path.parent.name}/{path.name}", path.read_bytes())
    assert_same_batches("memory://bucket", shards, workers=0)
    memory.rm_file("/bucket/train/shard_00001.tar")
    with pytest.raises(InputError, match=r"memory://bucket/train/shard_00001\.tar: this shard cannot be read"):
        list(read_shard(read_index("memory://bucket", "train"), 1))
    with pytest.raises(InputError, match=r"memory://bucket/vall/index\.json cannot be read"):
        read_index("memory://bucket", "vall")


def test_an_object_store_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")

    def missing(*args: object, **options: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "open", missing)
    with pytest.raises(InputError, match=r"s3://bucket/train/index\.json is read through fsspec.*pip install s3fs"):
        read_index("s3://bucket", "train")


def cut_points(path: Path) -> list[int]:
    """Nothing, half a header, between an image and its label, between two samples, within an image, all but the last bytes."""
    import tarfile

    with tarfile.open(path) as tar:
        members = tar.getmembers()
    return [0, 200, members[3].offset, members[4].offset, members[4].offset_data + 100, path.stat().st_size // 2]


@pytest.mark.parametrize("point", range(6))
def test_a_cut_connection_is_opened_anew(server: Server, shards: Path, point: int, caplog: pytest.LogCaptureFixture) -> None:
    name = "shard_00002.tar"
    cut = cut_points(shards / "train" / name)[point]
    server.cuts[name] = [cut, cut]
    index = read_index(url_of(server), "train")
    assert list(read_shard(index, 2)) == list(read_shard(read_index(str(shards), "train"), 2)), "each image once"
    assert server.asked.count(name) == 3
    assert caplog.text.count("trying again") == 2


@pytest.mark.parametrize("point", range(6))
def test_a_connection_that_is_always_cut_stops_the_run(server: Server, shards: Path, point: int) -> None:
    name = "shard_00002.tar"
    server.cuts[name] = [cut_points(shards / "train" / name)[point]] * 9
    config = config_of(url_of(server))
    with pytest.raises(InputError, match=r"http://.*/train/shard_00002\.tar: this shard cannot be read"):
        list(iter_epoch(config))
    assert server.asked.count(name) == 4, "four tries and no more"


def iter_epoch(config: ClassificationConfig) -> Iterator[object]:
    loader, sampler = train_stream(config, read_index(config.data.root, "train"), ALONE)
    batches = iter(loader)
    for _ in range(sampler.batches_per_epoch + 1):
        yield next(batches)


def test_an_evaluation_is_never_short(server: Server, shards: Path) -> None:
    server.cuts["shard_00001.tar"] = [(shards / "val/shard_00001.tar").stat().st_size // 2] * 9
    config = config_of(url_of(server))
    with pytest.raises(InputError, match=r"val/shard_00001\.tar: this shard cannot be read"):
        list(eval_stream(config, read_index(config.data.root, "val"), ALONE))


def test_what_is_not_there(server: Server, shards: Path) -> None:
    with pytest.raises(InputError, match=r"/vall/index\.json cannot be read \(HTTP Error 404"):
        read_index(url_of(server), "vall")
    index = read_index(url_of(server), "train")
    hidden = shards / "train/shard_00003.tar"
    content = hidden.read_bytes()
    hidden.unlink()
    try:
        with pytest.raises(InputError, match=r"shard_00003\.tar: this shard cannot be read \(HTTP Error 404"):
            list(read_shard(index, 3))
    finally:
        hidden.write_bytes(content)
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match=r"cannot be read \(.*refused"):
        read_index(url_of(server), "train")


def test_a_silent_server_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(stores, "TIMEOUT_S", 0.2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(InputError, match=r"cannot be read \(timed out\)"):
        read_index(f"http://127.0.0.1:{silent.getsockname()[1]}", "train")


@pytest.mark.parametrize("root", ["pipe:touch {}; echo ", "pipe:touch {}; echo http://x", "pipe:touch {} #://"])
def test_a_command_is_never_run(root: str, tmp_path: Path) -> None:
    """load_split is the one way in, also for the config inside a weights file, which is read where no --config is given."""
    trace = tmp_path / "trace"
    with pytest.raises(InputError, match=r"is a command, and commands from a config are never run.*https"):
        load_split(config_of(root.format(trace)), "train")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("root", "words"),
    [
        ("htps://a/b", r"htps:// is not read; did you mean 'https'"),
        ("reference://a", "reference:// is not read"),
        ("local://a", "local:// is not read"),
        ("s3://a::reference://b", "a chain of stores is not read"),
    ],
)
def test_other_schemes_are_refused(root: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_index(root, "train")


def test_a_file_url_is_a_folder(shards: Path) -> None:
    index = read_index(f"file://{shards}/", "val")
    assert index.place == f"{shards}/val"
    assert (Path(index.place) / INDEX_FILE).is_file()
