"""Training from shards: killed and resumed to the bit, each process its own images, and what it shares with a run from the folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cls_distributed import ELASTIC, finish, free_port, kill_worker, losses, torchrun, weights

from resbackbone.classification import train as train_module
from resbackbone.classification.config import ClassificationConfig, load_classification_config
from resbackbone.classification.dataset import ClassificationDataset, TrainTransform
from resbackbone.classification.shards import read_index, read_shard, write_shards
from resbackbone.classification.sources import load_source
from resbackbone.classification.stream import train_stream
from resbackbone.classification.train import train
from resbackbone.runtime.distributed import Process

# Four batches an epoch: steps 3, 6 and 9, where checkpoints are, lie within epochs.
RUN = ["train.steps=10", "train.milestones=[8]", "train.save_every=3", "train.eval_every=5", "train.ema=0.9", "train.bn_images=16"]
STREAM = ["data.kind=shards", "data.lanes=4", "data.shuffle_block=4", "train.seed=5"]
ALONE = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))

# One of two processes: an epoch's images as they come, from every process, printed by the first.
PROGRAM = """
import json, sys
from resbackbone.classification.config import load_classification_config
from resbackbone.classification.shards import read_index
from resbackbone.classification.stream import train_stream
from resbackbone.runtime import distributed as d

process = d.setup("cpu")
config = load_classification_config(None, sys.argv[1:])
loader, sampler = train_stream(config, read_index(config.data.root, "train"), process)
batches = iter(loader)
mine = [next(batches).indices.tolist() for _ in range(sampler.batches_per_epoch)]
everyone = d.gather_objects(mine)
if process.is_main:
    print(json.dumps(everyone))
batches.close()
d.shutdown()
"""


class Killed(BaseException):
    """Nothing of ours catches it, so nothing is saved on the way out."""


@pytest.fixture(scope="module")
def tiny_shards(tiny_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny_shards")
    for split in ("train", "val"):
        write_shards(load_source("folder", tiny_photos, split), root / split, per_shard=7, seed=0 if split == "train" else None)
    return root


@pytest.fixture(scope="module")
def config_of(tiny_shards: Path, tiny_settings: list[str]) -> Callable[..., ClassificationConfig]:
    return lambda *extra: load_classification_config(None, [*tiny_settings, *STREAM, f"data.root={tiny_shards}", *RUN, *extra])


@pytest.fixture(scope="module")
def undisturbed(config_of: Callable[..., ClassificationConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    train(config_of(), output)
    return output


def rows(output: Path) -> dict[int, dict[str, float]]:
    """Loss, training error, rate, position and figures by step."""
    found: dict[int, dict[str, float]] = {}
    for line in (output / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept = {name: value for name, value in row.items() if name in ("loss", "train_error", "lr", "epoch") or name.startswith("eval/")}
        found.setdefault(row["step"], {}).update(kept)
    return found


@pytest.mark.parametrize(("killed_at", "goes_on_from", "workers"), [(2, 0, 0), (4, 3, 0), (8, 6, 2)])
def test_a_killed_run_ends_as_if_left_alone(
    config_of: Callable[..., ClassificationConfig],
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
    goes_on_from: int,
    workers: int,
) -> None:
    log_step = train_module.log_step

    def killing(log: Any, state: Any, *args: Any, **options: Any) -> None:
        log_step(log, state, *args, **options)
        if state.step == killed_at:
            raise Killed

    output, config = tmp_path / "run", config_of(f"data.workers={workers}")
    monkeypatch.setattr(train_module, "log_step", killing)
    with pytest.raises(Killed):
        train(config, output)
    monkeypatch.undo()
    train(config, output, resume="auto")
    assert (f"resumed at step {goes_on_from}" in (output / "log.txt").read_text()) == (goes_on_from > 0)
    ours, theirs = weights(output), weights(undisturbed)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    ours_by_step, theirs_by_step = rows(output), rows(undisturbed)
    assert ours_by_step.keys() == theirs_by_step.keys() == set(range(1, 11))
    for step, row in theirs_by_step.items():
        # Evaluation hands whole shards to workers: with another number of them the same losses are added up in another order.
        assert ours_by_step[step] == (row if workers == 0 else pytest.approx(row, rel=1e-6))


@pytest.fixture(scope="module")
def two_left_alone(repository: Path, tiny_shards: Path, tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("two_left_alone") / "run"
    finish(torchrun(repository, tiny_shards, output, [*tiny_settings, *STREAM, *ELASTIC]))
    return output


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "at_step", "workers"), [(1, 2, 0), (0, 8, 1), (1, 13, 2)])
def test_sigkill_of_one_of_two_processes_changes_nothing(
    repository: Path,
    tiny_shards: Path,
    tiny_settings: list[str],
    two_left_alone: Path,
    tmp_path: Path,
    rank: int,
    at_step: int,
    workers: int,
) -> None:
    settings = [*tiny_settings, *STREAM, *ELASTIC, f"data.workers={workers}"]
    launcher = torchrun(repository, tiny_shards, tmp_path / "run", settings, "--resume", "auto", restarts=3)
    kill_worker(launcher, tmp_path / "run", rank=rank, at_step=at_step)
    finish(launcher)
    ours, theirs = weights(tmp_path / "run"), weights(two_left_alone)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert losses(tmp_path / "run") == losses(two_left_alone)


def test_two_processes_read_disjoint_images_and_together_the_epoch(
    config_of: Callable[..., ClassificationConfig], tiny_shards: Path, tiny_settings: list[str], repository: Path
) -> None:
    settings = [*tiny_settings, *STREAM, f"data.root={tiny_shards}"]
    common = os.environ | {"PYTHONPATH": str(repository), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *settings],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    first, second = json.loads(said[0][0])
    seen = [[number for batch in share for number in batch] for share in (first, second)]
    assert len(seen[0]) == len(seen[1]) == 16
    assert len({*seen[0], *seen[1]}) == 32, "all but 37 mod 8, each once"
    loader, sampler = train_stream(config_of(), read_index(str(tiny_shards), "train"), ALONE)
    alone = iter(loader)
    for number in range(sampler.batches_per_epoch):
        assert next(alone).indices.tolist() == first[number] + second[number], "the batches of one process, cut in two"


def test_shards_give_the_samples_of_the_folder_in_another_order(tiny_photos: Path, tiny_settings: list[str], tmp_path: Path) -> None:
    """What docs/training_at_scale.md says: the same files and labels; with --keep-order also the same crop of image n in epoch e."""
    source = load_source("folder", tiny_photos, "train")
    write_shards(source, tmp_path / "train", per_shard=7, seed=None)
    index = read_index(str(tmp_path), "train")
    read = [row for shard in range(len(index.counts)) for row in read_shard(index, shard)]
    assert read == [(number, source.read(number), int(source.labels[number])) for number in range(37)]
    config = load_classification_config(None, [*tiny_settings, *STREAM, f"data.root={tmp_path}"])
    loader, sampler = train_stream(config, index, ALONE)
    folder = ClassificationDataset(source, TrainTransform(data=config.data, seed=config.train.seed), stand_in=None)
    stream, order = iter(loader), []
    for batch_number in range(2 * sampler.batches_per_epoch):
        batch = next(stream)
        for image, label, shift, number in zip(*batch, strict=True):
            sample = folder[batch_number // sampler.batches_per_epoch, int(number)]
            assert torch.equal(image, sample.image)
            assert int(label) == sample.label
            assert np.array_equal(shift, sample.shift)
            order.append(int(number))
    assert len(set(order[:32])) == len(set(order[32:])) == 32
    assert order[:32] != order[32:]
