"""One process: everything is the identity. Two real gloo processes: the same calls give what arithmetic says."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from resbackbone.errors import InputError
from resbackbone.runtime import distributed

PROGRAM = """
import json, torch
from resbackbone.runtime import distributed as d
process = d.setup("cpu")
me = process.rank
value = torch.tensor([1.0 + 2 * me, 5.0], requires_grad=True)
mean = d.mean_across_processes(value)
result = {
    "process": [process.rank, process.world_size, process.local_rank, str(process.device), process.is_main],
    "here": [d.rank(), d.world_size(), d.is_main()],
    "mean": mean.tolist(),
    "kept": value.tolist(),
    "carries_gradient": mean.requires_grad,
    "gathered": d.gather_objects({"rank": me, "text": "x" * (me + 1)}),
    "any": [d.any_process(me == 1), d.any_process(False), d.any_process(True)],
    "workers": d.worker_start_method(),
    "restarted": d.was_restarted(),
    "told": d.on_main(lambda: f"by {me}"),
}

def fail():
    raise d.InputError(f"the disk of {me} is full")

try:
    d.on_main(fail)
except d.InputError as error:
    result["failure"] = str(error)
d.barrier()
d.shutdown()
result["after"] = [d.rank(), d.world_size()]
for turn in range(3):
    d.setup("cpu")
    result["again"] = d.gather_objects([turn, me])
    d.shutdown()
print(json.dumps(result))
"""


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def run_two(repository: Path, arguments: list[str]) -> list[str]:
    """What Python prints, with errors, in two processes as torchrun would start them, the second by an agent that has started it before."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in ("0", "1"):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": rank}
        output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen([sys.executable, *arguments], env=common | own, **output))
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    return said


def test_one_process() -> None:
    process = distributed.setup("cpu")
    assert (process.rank, process.world_size, process.local_rank, process.is_main) == (0, 1, 0, True)
    assert process.device == torch.device("cpu")
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    tensor = torch.ones(2)
    assert distributed.mean_across_processes(tensor) is tensor
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.any_process(True) is True
    assert distributed.any_process(False) is False
    assert distributed.on_main(lambda: "x") == "x"
    assert distributed.was_restarted() is False
    assert distributed.worker_start_method() == ("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    distributed.barrier()
    distributed.shutdown()


def test_two_gloo_processes(repository: Path) -> None:
    for rank, output in enumerate(run_two(repository, ["-c", PROGRAM])):
        result = json.loads(output.splitlines()[-1])
        assert result["process"] == [rank, 2, rank, "cpu", rank == 0]
        assert result["here"] == [rank, 2, rank == 0]
        assert result["mean"] == [2.0, 5.0]
        assert result["kept"] == [1.0 + 2 * rank, 5.0]
        assert result["carries_gradient"] is False
        assert result["gathered"] == [{"rank": 0, "text": "x"}, {"rank": 1, "text": "xx"}]
        assert result["any"] == [True, False, True]
        assert result["workers"] == "spawn"  # a fork beside gloo's threads may never return
        assert result["restarted"] is True  # torchrun's agents count restarts each for themselves
        assert result["told"] == "by 0"
        assert result["failure"] == "the disk of 0 is full"
        assert result["after"] == [0, 1]
        assert result["again"] == [[2, 0], [2, 1]]


# ---------------------------------------------------------------------------------------------------------------------- where ranks meet


def meet(store: Callable[[], dist.Store], world_size: int, *, late: int | None = None) -> list[list[str]]:
    """What each rank finds the others to have written into the corner they agreed on; `late`: a rank that comes after the others."""

    def one(rank: int) -> list[str]:
        if rank == late:
            time.sleep(0.3)
        corner = distributed.own_corner(store(), rank, world_size, within=datetime.timedelta(seconds=20))
        corner.set(f"address {rank}", f"{rank} of {world_size}")
        assert not corner.check(["dead"])
        return [corner.get(f"address {other}").decode() for other in range(world_size)]

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(one, range(world_size)))


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_ranks_meet_where_the_dead_have_been(kind: str, tmp_path: Path) -> None:
    kept = dist.HashStore()

    def store() -> dist.Store:
        return kept if kind == "memory" else dist.FileStore(str(tmp_path / "store"))

    for world_size, late in ((3, None), (2, 0), (3, 1), (2, 1)):
        assert meet(store, world_size, late=late) == [[f"{rank} of {world_size}" for rank in range(world_size)]] * world_size
        # A round whose main process died waiting, and of whose others one was there.
        store().set("corner", f"died in {world_size}")
        dist.PrefixStore(f"died in {world_size}", store()).set(f"1 of {world_size}", "a dead token")
        dist.PrefixStore(f"died in {world_size}", store()).set("dead", "")


@pytest.mark.parametrize("rank", [0, 1])
def test_who_stays_alone_says_so(rank: int) -> None:
    with pytest.raises(InputError, match=rf"process {rank} of 2 waited 0 s for the others, .* with the same --rdzv-id and --rdzv-endpoint"):
        distributed.own_corner(dist.HashStore(), rank, 2, within=datetime.timedelta(seconds=0.2))


def test_a_broken_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="WORLD_SIZE='two', which should be a whole number; start several processes with torchrun"):
        distributed.setup("cpu")


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="torch finds no GPU here"):
        distributed.setup("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="process 2 of this machine has no GPU: there are 2; start torchrun with --nproc_per_node=2"):
        distributed.setup("cuda")
