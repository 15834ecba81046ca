"""Batches: the same from any number of workers however started, resumed at any position, each evaluation image once, errors in clear."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from detection.data import arrays, load_source
from detection.data import loader as loader_module
from detection.data.loader import BatchLoader, build_eval_loader, build_train_loader, shape_batches
from detection.data.source import Source
from detection.structures import Batch
from resbackbone.errors import InputError
from resbackbone.runtime.sampler import ResumableBatchSampler


@pytest.fixture(scope="module")
def shapes() -> Source:
    return load_source("shapes", None, "train", images=40, size=48, masks=True)


def fingerprint(batches: list[Batch]) -> list[tuple]:
    return [
        (target.image_id, target.seed, image.shape, int(image.sum()), target.boxes.sum().item(), int(target.masks.sum()))
        for batch in batches
        for image, target in zip(batch.images, batch.targets, strict=True)
        if target.masks is not None
    ]


def train(source: Source, **options: object) -> tuple[BatchLoader, ResumableBatchSampler]:
    return build_train_loader(source, **{"batch_size": 4, "workers": 0, "seed": 3, "min_size": 48, "max_size": 80, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(("context", "workers"), [("fork", 3), ("spawn", 1)])
def test_workers_bring_what_the_process_itself_reads(shapes: Source, context: str, workers: int) -> None:
    alone = fingerprint(list(islice(train(shapes)[0], 12)))
    helped = fingerprint(list(islice(train(shapes, workers=workers, context=context)[0], 12)))
    assert helped == alone
    assert len(alone) == 48


@pytest.mark.parametrize("workers", [0, 2])
def test_a_saved_position_goes_on_with_the_next_batch(shapes: Source, workers: int) -> None:
    whole = fingerprint(list(islice(train(shapes)[0], 15)))
    loader, sampler = train(shapes, workers=workers)
    for _ in islice(loader, 7):
        sampler.advance()
    state = sampler.state_dict()
    again, resumed = train(shapes, workers=workers)
    resumed.load_state_dict(state)
    assert fingerprint(list(islice(again, 8))) == whole[28:]


def test_processes_share_the_global_batch(shapes: Source) -> None:
    whole = fingerprint(list(islice(train(shapes)[0], 5)))
    parts = [fingerprint(list(islice(train(shapes, rank=rank, world_size=2)[0], 5))) for rank in range(2)]
    joined = [row for i in range(5) for part in parts for row in part[2 * i : 2 * i + 2]]
    assert joined == whole


def test_wide_and_tall_images_make_separate_batches(coco_mini: Path) -> None:
    source = load_source("coco", coco_mini, "train2017")
    loader, sampler = train(source, group_aspect=True, min_size=32, max_size=64)
    mixed = sum(
        len({image.shape[2] >= image.shape[1] for image in batch.images}) > 1 for batch in islice(loader, sampler.batches_per_epoch)
    )
    assert mixed <= 1, "only what is left of both at the end of the epoch"
    assert len(loader.dataset) == 80


def test_the_global_random_state_is_left_alone(shapes: Source) -> None:
    before = torch.get_rng_state()
    list(islice(train(shapes, workers=2)[0], 2))
    list(build_eval_loader(shapes, batch_size=8, workers=1, min_size=48, max_size=80))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("world_size", "batch_size", "workers"), [(1, 1, 0), (1, 5, 2), (3, 4, 0), (50, 2, 0)])
def test_evaluation_sees_each_image_once(coco_mini: Path, world_size: int, batch_size: int, workers: int) -> None:
    source = load_source("coco", coco_mini, "val2017")
    seen, lengths = [], []
    for rank in range(world_size):
        loader = build_eval_loader(
            source, batch_size=batch_size, workers=workers, min_size=(24, 32), max_size=64, rank=rank, world_size=world_size
        )
        batches = list(loader)
        lengths.append(len(loader))
        assert len(batches) == len(loader)
        seen += [target.index for batch in batches for target in batch.targets]
        assert all(min(image.shape[1:]) <= 32 for batch in batches for image in batch.images)
    assert sorted(seen) == list(range(41))
    assert max(lengths) - min(lengths) <= 1


def test_shape_batches_keep_like_with_like() -> None:
    sizes = np.array([[64, 96], [96, 64], [64, 96], [33, 90], [96, 64], [200, 200]])
    batches = [batch.tolist() for batch in shape_batches(sizes, 2)]
    assert batches == [[5, 0], [2, 3], [1, 4]]
    assert shape_batches(np.zeros((0, 2), np.int64), 2) == []
    with pytest.raises(InputError, match=r"eval\.batch_size=0"):
        shape_batches(sizes, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_data_stops_in_clear_words(bad_inputs: Path, workers: int) -> None:
    source = load_source("coco", bad_inputs, "coco_wrong_size.json")
    loader = build_eval_loader(source, batch_size=1, workers=workers, min_size=32, max_size=64)
    with pytest.raises(InputError) as caught:
        list(loader)
    assert str(caught.value).count("\n") == 0, "no worker's traceback in the message"
    assert "ok_1.jpg: the annotation says 999×888" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_counted_across_workers(coco_with: Callable[..., Path], workers: int) -> None:
    source = load_source("coco", coco_with(None, "truncated.jpg", None, "html_named.jpg"), "train")
    loader, _ = train(source, batch_size=2, workers=workers)
    first = [target.image_id for batch in islice(loader, 6) for target in batch.targets]
    assert set(first) == {1, 3}
    assert loader.unreadable_images() == [1, 3]
    again = [target.image_id for batch in islice(train(source, batch_size=2)[0], 6) for target in batch.targets]
    assert again == first, "who stands in does not depend on the workers"


def test_impossible_settings(shapes: Source) -> None:
    with pytest.raises(InputError, match=r"data\.workers=-1"):
        train(shapes, workers=-1)
    with pytest.raises(InputError, match=r"train\.batch_size"):
        train(shapes, batch_size=41)
    with pytest.raises(InputError, match="evenly"):
        train(shapes, batch_size=4, world_size=3)


# Too little shared memory -------------------------------------------------------------------------------------------------------------


def test_too_little_shared_memory_is_said_before_it_kills(shapes: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, _ = train(shapes, workers=1, context="fork")
    monkeypatch.setattr(arrays.os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 2, 1, 1, 0, 0, 0, 0, 255)))
    with pytest.raises(InputError, match=r"a batch needs .* 0\.0 MiB free\. Set data\.workers=0.*--shm-size"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error. It is possible that …"), "shared memory"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"), "shared memory"),
        (OSError(28, "No space left on device"), "shared memory"),
        (RuntimeError("unable to mmap 8 bytes from file </torch_12_345_6>: Cannot allocate memory (12)"), "shared memory"),
        (
            RuntimeError("Caught RuntimeError in DataLoader worker process 0.\n  …\nRuntimeError: /dev/shm/torch_1_2\n"),
            "shared memory",
        ),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), "memory ran out"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (RuntimeError("unable to open shared memory object </torch_1_2_3> in read-write mode: Too many open files (24)"), "ulimit -n"),
        (OSError(24, "Too many open files"), "ulimit -n"),
    ],
)
def test_what_the_machine_does_to_workers_is_explained(
    shapes: Source, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    loader, _ = train(shapes)
    monkeypatch.setattr(loader_module, "DataLoader", lambda *_, **__: map(fails, [0]))
    with pytest.raises(InputError, match=words) as caught:
        next(iter(loader))
    assert "data.workers" in str(caught.value)


@pytest.mark.parametrize("said", ["", "Caught EOFError in pin memory thread for device 0.\nOriginal Traceback …\nEOFError\n"])
def test_a_worker_that_hangs_up_is_explained_where_there_is_one(shapes: Source, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    def fails(_: object) -> None:
        raise EOFError(said)

    monkeypatch.setattr(loader_module, "DataLoader", lambda *_, **__: map(fails, [0]))
    with pytest.raises(InputError, match=r"ulimit -n .* fewer data\.workers or a smaller train\.batch_size"):
        next(iter(train(shapes, workers=1)[0]))
    with pytest.raises(EOFError):
        next(iter(train(shapes)[0]))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            '  File "/data/torch_1_2/killed by signal: Killed/shared memory/mine.py", line 3, in load\nRuntimeError: a bad record\n'
        ),
        OSError(5, "Input/output error", "/data/torch_12_34/x.jpg"),
        EOFError("Caught EOFError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\nEOFError\n"),
        EOFError("Ran out of input"),
    ],
)
def test_a_folders_name_explains_nothing(shapes: Source, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(_: object) -> None:
        raise error

    monkeypatch.setattr(loader_module, "DataLoader", lambda *_, **__: map(fails, [0]))
    with pytest.raises(type(error)) as caught:
        next(iter(train(shapes, workers=1)[0]))
    assert caught.value is error


def test_other_errors_stay_what_they_are(shapes: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, _ = train(shapes)
    monkeypatch.setattr(shapes, "read_image", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(iter(loader))


def _run(command: list[str], repository: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment, start_new_session=True)


_SMALL_SHM = """
    from detection.data import load_source
    from detection.data.loader import build_train_loader
    from resbackbone.errors import InputError

    if __name__ == "__main__":
        source = load_source("shapes", None, "train", images=16, masks=True)
        loader, _ = build_train_loader(source, batch_size=8, workers=2, seed=0, min_size=400, max_size=400)
        try:
            next(iter(loader))
        except InputError as error:
            print(error)
"""


def test_a_really_small_shared_memory(tmp_path: Path, repository: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a small /dev/shm takes the right to mount one")
    script = tmp_path / "small.py"
    script.write_text(textwrap.dedent(_SMALL_SHM))
    command = f"mount -t tmpfs -o size=2m tmpfs /dev/shm && exec {sys.executable} {script}"
    done = _run(["unshare", "-m", "sh", "-c", command], repository)
    assert "data.workers=0" in done.stdout, done.stderr


_FEW_FILES = """
    import resource
    import sys
    from detection.data import load_source
    from detection.data.loader import build_train_loader
    from resbackbone.errors import InputError

    soft, hard = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    source = load_source("shapes", None, "train", images=64, size=32, masks=True)
    loader, _ = build_train_loader(source, batch_size=32, workers=1, seed=0, min_size=32, max_size=32)
    batches = iter(loader)
    print(resource.getrlimit(resource.RLIMIT_NOFILE))
    try:
        print(len(next(batches)))
    except InputError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere tensors travel otherwise")
@pytest.mark.parametrize(("hard", "words"), [(1024, "^32$"), (128, "160 tensors needs 320 open files, of the 128 allowed .*ulimit -n")])
def test_few_open_files_are_made_more_or_said(repository: Path, hard: int, words: str) -> None:
    done = _run([sys.executable, "-c", textwrap.dedent(_FEW_FILES), "128", str(hard)], repository)
    limits, said = done.stdout.splitlines()
    assert limits == f"({hard}, {hard})", done.stderr
    assert re.search(words, said), said


# Workers and signals ------------------------------------------------------------------------------------------------------------------

_LEAVES_IN_A_HURRY = """
    import signal
    from detection.data import load_source
    from detection.data.loader import build_train_loader

    source = load_source("shapes", None, "train", images=16, size=48)
    loader, _ = build_train_loader(source, batch_size=2, workers=2, seed=0, min_size=48, max_size=48)
    batches = iter(loader)
    next(batches)
    {}
"""


# Set first, since what a shell starts in the background ignores SIGINT.
_CTRL_C = "import os; signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(0, signal.SIGINT)"


@pytest.mark.parametrize(("ending", "code"), [("raise ValueError('no')", 1), (_CTRL_C, 130)])
def test_a_process_that_stops_takes_its_workers_along(tmp_path: Path, repository: Path, ending: str, code: int) -> None:
    script = tmp_path / "leaves.py"
    script.write_text(textwrap.dedent(_LEAVES_IN_A_HURRY.format(ending)))
    started = time.monotonic()
    done = _run([sys.executable, str(script)], repository)
    assert done.returncode in (code, -2)
    assert time.monotonic() - started < 55, "workers that are not told to stop hold the exit up for 60 s"
    assert "Process Process" not in done.stderr, "workers say nothing of their own"


def test_workers_outlive_a_schedulers_signal(repository: Path) -> None:
    code = "import os, signal; [os.kill(0, one) for one in (signal.SIGUSR1, signal.SIGTERM)]; print(len(list(zip(range(6), batches))))"
    ignore = "import signal; [signal.signal(one, lambda *_: None) for one in (signal.SIGUSR1, signal.SIGTERM)]\n"
    script = ignore + textwrap.dedent(_LEAVES_IN_A_HURRY.format(code))
    done = _run([sys.executable, "-c", script], repository)
    assert done.stdout.strip() == "6", done.stderr
