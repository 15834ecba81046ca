"""One process: everything is the identity. Two real gloo processes: the same calls give what arithmetic says."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
}
d.barrier()
d.shutdown()
result["after"] = [d.rank(), d.world_size()]
print(json.dumps(result))
"""


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


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
    assert distributed.worker_start_method() == ("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    distributed.barrier()
    distributed.shutdown()


def test_two_gloo_processes(repository: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(repository), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", PROGRAM]
    processes = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    for rank, output in enumerate(outputs):
        result = json.loads(output.splitlines()[-1])
        assert result["process"] == [rank, 2, rank, "cpu", rank == 0]
        assert result["here"] == [rank, 2, rank == 0]
        assert result["mean"] == [2.0, 5.0]
        assert result["kept"] == [1.0 + 2 * rank, 5.0]
        assert result["carries_gradient"] is False
        assert result["gathered"] == [{"rank": 0, "text": "x"}, {"rank": 1, "text": "xx"}]
        assert result["any"] == [True, False, True]
        assert result["workers"] == "spawn"  # a fork beside gloo's threads may never return
        assert result["after"] == [0, 1]


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
