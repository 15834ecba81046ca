"""Two processes equal one, BN included; a killed worker is restarted by torchrun and the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore

from resbackbone.classification.config import load_classification_config
from resbackbone.classification.loader import train_loader
from resbackbone.classification.networks import build_classifier
from resbackbone.classification.sources import load_source
from resbackbone.classification.train import train
from resbackbone.runtime.checkpoint import load_checkpoint
from resbackbone.runtime.distributed import Process
from resbackbone.runtime.random_state import seed_everything

STEPS = 20

# Two processes: batch norm of uneven shares, and statistics anew, against one process that sees everything.
PROGRAM = """
import torch
from resbackbone.classification.statistics import recompute_statistics
from resbackbone.runtime import distributed as d
from resbackbone.sync_norm import synchronize_on_cpu

process = d.setup("cpu")
torch.manual_seed(0)
images, weights = torch.randn(6, 3, 5, 5, dtype=torch.float64).float() * 2 + 1, torch.randn(6, 3, 5, 5)
both = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.SyncBatchNorm(3))
synchronize_on_cpu(both)
whole, cut = both
assert list(both.state_dict()) == list(torch.nn.Sequential(whole, torch.nn.SyncBatchNorm(3)).state_dict())
with torch.no_grad():
    for norm in (whole, cut):
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0])), norm.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
mine = slice(0, 4) if process.rank == 0 else slice(4, 6)
inputs = [images.clone().requires_grad_(), images[mine].clone().requires_grad_()]
outputs = [whole(inputs[0]), cut(inputs[1])]
assert torch.allclose(outputs[0][mine], outputs[1], atol=1e-5)
(outputs[0] * weights).sum().backward()
(outputs[1] * weights[mine]).sum().backward()
assert torch.allclose(inputs[0].grad[mine], inputs[1].grad, atol=1e-5)
for name in ("weight", "bias"):
    gradients = torch.stack(d.gather_objects(getattr(cut, name).grad)).sum(0)
    assert torch.allclose(getattr(whole, name).grad, gradients, atol=1e-4), name
for name in ("running_mean", "running_var", "num_batches_tracked"):
    assert torch.allclose(getattr(whole, name).double(), getattr(cut, name).double(), atol=1e-6), name
assert torch.allclose(whole.eval()(images)[mine], cut.eval()(images[mine]), atol=1e-5)
assert recompute_statistics(cut, [images[mine]]) == 6
values = images.transpose(0, 1).flatten(1)
assert torch.allclose(cut.running_mean, values.mean(1), atol=1e-6)
assert torch.allclose(cut.running_var, values.var(1), atol=1e-5)
copied = torch.full((2,), float(process.rank))
d.copy_from_main([copied])
assert copied.tolist() == [0.0, 0.0]
d.shutdown()
print("as one")
"""


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def torchrun(repository: Path, data: Path, output: Path, settings: list[str], *extra: str, restarts: int = 0) -> subprocess.Popen[str]:
    """tools/train_cls.py in two processes; settings: overrides."""
    config = output.parent / f"{output.name}.yaml"
    config.write_text(f"data: {{root: {data}}}\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    tool = [str(repository / "tools/train_cls.py"), "--config", str(config), "--output", str(output), *extra]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, "--max-restarts", str(restarts), *tool, *settings]
    return subprocess.Popen(command, env=environment, cwd=output.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    try:
        said, _ = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        raise
    assert process.returncode == 0, said


def losses(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model_final.safetensors")


def test_ranks_see_disjoint_images_and_together_the_epoch(tiny_photos: Path, tiny_settings: list[str]) -> None:
    config = load_classification_config(None, [*tiny_settings, "train.batch_size=6", "data.workers=1"])
    source = load_source("folder", tiny_photos, "train")
    seen: list[list[int]] = []
    for rank in range(2):
        process = Process(rank=rank, world_size=2, local_rank=rank, device=torch.device("cpu"))
        loader, sampler = train_loader(config, source, process)
        batches = iter(loader)
        seen.append([int(index) for _ in range(sampler.batches_per_epoch) for index in next(batches).indices])
    assert not set(seen[0]) & set(seen[1])
    assert len(seen[0]) == len(seen[1]) == 18
    assert len({*seen[0], *seen[1]}) == 36, "all but 37 mod 6, each once"


def test_two_processes_normalise_as_one(repository: Path) -> None:
    common = {**os.environ, "PYTHONPATH": str(repository), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in processes:
        said, _ = process.communicate(timeout=300)
        assert "as one" in said, said


def test_two_processes_give_the_losses_of_one(repository: Path, tiny_photos: Path, tiny_settings: list[str], tmp_path: Path) -> None:
    # A gentle rate, since large steps blow rounding up to any size.
    gentle = ["train.lr=0.00002", "data.normalize=mean_std", "train.milestones=[15]"]
    settings = [*tiny_settings, *gentle, "model.norm=sync", f"train.steps={STEPS}", "train.bn_images=16"]
    finish(torchrun(repository, tiny_photos, tmp_path / "two", settings))
    train(load_classification_config(None, [*settings, f"data.root={tiny_photos}"]), tmp_path / "one")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == STEPS
    assert max(abs(one[step] - two[step]) for step in one) < 1e-4
    figures = [json.loads((tmp_path / name / "eval/metrics.json").read_text()) for name in ("one", "two")]
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], abs=1e-3)
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    seed_everything(0)
    initial = build_classifier(load_classification_config(None, settings), 3).state_dict()
    learned = [name for name in ours if name.endswith(("weight", "bias"))]
    moved, apart = (torch.cat([(ours[name] - other[name]).flatten() for name in learned]).norm() for other in (initial, theirs))
    assert apart < 0.01 * moved, "the steps themselves are the same, not just small"
    alone, first, second = (random_states(tmp_path / name)[rank] for name, rank in (("one", 0), ("two", 0), ("two", 1)))
    assert torch.equal(alone["torch"], first["torch"])
    assert not torch.equal(first["torch"], second["torch"]), "masks of dropout and stochastic depth would be the same on both"


def random_states(output: Path) -> list[dict[str, Any]]:
    """Each process's, at the end of the run."""
    return load_checkpoint(output / f"checkpoints/step_{STEPS:08d}")["random"]


def as_two(command: list[str]) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of Python in two processes, started as torchrun starts them, which keeps the store."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    common = os.environ | meeting | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    processes = [subprocess.Popen([sys.executable, *command], env=common | rank, **pipes) for rank in ranks]
    try:
        said = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def test_an_output_that_is_taken_is_one_message_each(repository: Path, tiny_photos: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    tool, config = (str(repository / name) for name in ("tools/train_cls.py", "configs/imagenette/resnet18.yaml"))
    found = as_two([tool, "--config", config, "--output", str(tmp_path), f"data.root={tiny_photos}", "train.device=cpu"])
    message = (
        f"error: --output {tmp_path}: another run is in this folder (config.yaml); go on with it by --resume auto, or choose another folder"
    )
    assert [(code, errors) for code, _, errors in found] == [(1, f"{message}\n"), (1, f"[process 1] {message}\n")]


def test_all_modes_are_judged_in_one_meeting(repository: Path, tiny_photos: Path, tiny_settings: list[str], tmp_path: Path) -> None:
    config = load_classification_config(None, [*tiny_settings, f"data.root={tiny_photos}", "train.steps=1", "eval.scales=[18, 24]"])
    trained = train(config, tmp_path / "run").weights
    command = [str(repository / "tools/eval_cls.py"), "--weights", str(trained), "--mode", "all", "--output"]
    # Before they met once: the second mode's processes could take the first's addresses for their own.
    assert [(code, errors) for code, _, errors in as_two([*command, str(tmp_path / "two")])] == [(0, ""), (0, "")]
    subprocess.run([sys.executable, *command, str(tmp_path / "one")], check=True, capture_output=True)
    one, two = (json.loads((tmp_path / name / "eval/metrics.json").read_text()) for name in ("one", "two"))
    assert list(one) == list(two) == ["1crop", "10crop", "multiscale"]
    assert two == {mode: pytest.approx(figures) for mode, figures in one.items()}


# ------------------------------------------------------------------------------------------------------------------ a worker that is killed

ELASTIC = [f"train.steps={STEPS}", "train.milestones=[15]", "train.save_every=3", "train.eval_every=10", "train.ema=0.9"]


def kill_worker(launcher: subprocess.Popen[str], output: Path, *, rank: int, at_step: int) -> None:
    """SIGKILL for the process of `rank` once the log has reached `at_step`."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and launcher.poll() is None:
        path = output / "metrics.jsonl"
        if path.exists() and f'"step": {at_step},' in path.read_text():
            break
        time.sleep(0.01)
    workers = [child for child in psutil.Process(launcher.pid).children() if child.environ().get("RANK") == str(rank)]
    assert len(workers) == 1, "the run ended before it was disturbed"
    workers[0].send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(repository: Path, tiny_photos: Path, tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(torchrun(repository, tiny_photos, output, [*tiny_settings, *ELASTIC]))
    return output


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "at_step", "workers"), [(1, 2, 0), (1, 8, 1), (0, 13, 0), (1, 19, 0)])
def test_a_killed_worker_changes_nothing(
    repository: Path, tiny_photos: Path, tiny_settings: list[str], tmp_path: Path, undisturbed: Path, rank: int, at_step: int, workers: int
) -> None:
    output = tmp_path / "run"
    settings = [*tiny_settings, *ELASTIC, f"data.workers={workers}"]
    launcher = torchrun(repository, tiny_photos, output, settings, "--resume", "auto", restarts=3)
    kill_worker(launcher, output, rank=rank, at_step=at_step)
    finish(launcher)
    ours, theirs = weights(output), weights(undisturbed)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert losses(output) == losses(undisturbed)


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_images(
    repository: Path, tiny_photos: Path, tiny_settings: list[str], tmp_path: Path
) -> None:
    settings = [*tiny_settings, "model.norm=sync", f"train.steps={STEPS}", "train.save_every=7", "train.keep_checkpoints=9"]
    finish(torchrun(repository, tiny_photos, tmp_path / "two", settings))
    config = load_classification_config(None, [*settings, f"data.root={tiny_photos}"])
    train(config, tmp_path / "one", resume=str(tmp_path / "two/checkpoints/step_00000007"))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert set(one) == set(range(8, STEPS + 1))
    assert max(abs(one[step] - two[step]) for step in one) < 1e-4
