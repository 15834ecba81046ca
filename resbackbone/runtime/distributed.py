"""One process or many, on one machine or several: everything here does nothing special when there is only one."""

from __future__ import annotations

import contextlib
import datetime
import functools
import multiprocessing
import os
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from resbackbone.errors import InputError

# Evaluation on the main process may keep the others waiting; the default of ten minutes would kill such a run.
TIMEOUT = datetime.timedelta(hours=2)
# For processes to find each other: as long as torch may take to be imported. Then they end, and torchrun tries again.
MEETING = datetime.timedelta(minutes=10)
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Process:
    """Which process this is: `rank` of `world_size` over all machines, `local_rank` on this one."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and talks."""
        return self.rank == 0


def setup(device: str | None = None) -> Process:
    """Join the processes that torchrun started (gloo on CPU, nccl on CUDA), or be the only one.

    `device`: "cpu" or "cuda"; by default CUDA where there is one. Raises InputError for more processes than this machine has GPUs.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for, but torch finds no GPU here; use the CPU, or install torch with CUDA")
    world_size, rank, local_rank = _torchrun_number("WORLD_SIZE", 1), _torchrun_number("RANK", 0), _torchrun_number("LOCAL_RANK", 0)
    chosen = _select_gpu(local_rank) if kind == "cuda" else torch.device(kind)
    if world_size > 1 and not dist.is_initialized():
        # Objects and flags travel over gloo even where tensors use nccl: that needs no wait for the GPU.
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        corner = own_corner(_store(rank, world_size), rank, world_size, within=MEETING)
        dist.init_process_group(backend, store=corner, rank=rank, world_size=world_size, timeout=TIMEOUT)
    return Process(rank=rank, world_size=world_size, local_rank=local_rank, device=chosen)


def shutdown() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process is number 0."""
    return rank() == 0


def mean_across_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of a float tensor over all processes, on each of them; the tensor itself where there is one. Carries no gradient."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def parallel(model: nn.Module, process: Process) -> nn.Module:
    """The model, wrapped in DistributedDataParallel where there are several processes."""
    if process.world_size == 1:
        return model
    device_ids = [process.local_rank] if process.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)


def without_sync(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Gradients of all but the last of several accumulated passes stay where they are; only the last exchanges them."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else contextlib.nullcontext()


def worker_start_method() -> str:
    """How data workers start: fork where there is one, since it starts at once and shares memory by itself; beside other processes, spawn.

    Threads of gloo take locks of the interpreter as they finish their work. A child forked at such a moment waits for the lock for
    ever, and with it every process (seen with Python 3.11).
    """
    return "fork" if world_size() == 1 and "fork" in multiprocessing.get_all_start_methods() else "spawn"


def copy_from_main(tensors: Iterable[torch.Tensor]) -> None:
    """Give these tensors the values they have on the main process, in place, on every other one."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather_objects(item: Any) -> list[Any]:
    """`[item of rank 0, item of rank 1, …]`, on every process. The items are pickled, so they must be small and our own."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def on_main(call: Callable[[], Result]) -> Result:
    """What `call` returns on the main process, on every one; an InputError of the main process is raised on every one, so that all end.

    The result is pickled, so it must be small and our own.
    """
    if not is_main():
        result, problem = gather_objects(None)[0]
        if problem is not None:
            raise InputError(problem)
        return result
    try:
        result = call()
    except InputError as error:
        gather_objects((None, str(error)))
        raise
    gather_objects((result, None))
    return result


def was_restarted() -> bool:
    """Whether torchrun has started these processes anew after a failure; its agents count for themselves, so one that did is enough."""
    return any_process(_torchrun_number("TORCHELASTIC_RESTART_COUNT", 0) > 0)


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        # Not dist.barrier: under nccl that guesses a device and waits for its stream.
        dist.all_reduce(torch.zeros(1))


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process; every process gets the same answer."""
    if world_size() == 1:
        return flag
    raised = torch.tensor([int(flag)])
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


@functools.cache  # where process 0 is the server, a second meeting would find the first one's closing
def _store(rank: int, world_size: int) -> dist.Store:
    """Where processes find each other: torchrun's server, or one in process 0."""
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=MEETING))
    store.set_timeout(TIMEOUT)
    return store


def own_corner(store: dist.Store, rank: int, world_size: int, *, within: datetime.timedelta) -> dist.Store:
    """A corner of `store` that these processes share with no earlier ones. Raises InputError when they are not all here in time.

    torchrun may keep one server for all restarts, at which a new process would find the addresses of dead ones, and wait for them for ever.
    No number tells restarts apart (each agent counts its own), so: rank 0 opens a corner under a random name, the others put random tokens
    into it, and with all of them there rank 0 lists them. A list without one's own token is a dead round's: a newer corner will come.
    """
    token, deadline = secrets.token_hex(16), time.monotonic() + within.total_seconds()
    others = [f"{other} of {world_size}" for other in range(1, world_size)]
    if rank == 0:
        store.set("corner", token)
    while time.monotonic() < deadline:
        corner = dist.PrefixStore(token if rank == 0 else _text_at(store, "corner"), store)
        if rank > 0:
            corner.set(others[rank - 1], token)
        elif corner.check(others):
            corner.set("members", " ".join([token, *(_text_at(corner, other) for other in others)]))
        if token in _text_at(corner, "members").split():
            return corner
        time.sleep(0.05)
    raise InputError(
        f"process {rank} of {world_size} waited {within.total_seconds():.0f} s for the others, which did not all start; look for their "
        "errors, and start torchrun on every machine with the same --rdzv-id and --rdzv-endpoint"
    )


def _text_at(store: dist.Store, key: str) -> str:
    """What a store has there by now, "" for nothing; `get` alone would wait for it."""
    return store.get(key).decode() if store.check([key]) else ""


def _torchrun_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise InputError(
            f"the environment has {name}={text!r}, which should be a whole number; start several processes with torchrun"
        ) from None


def _select_gpu(local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise InputError(
            f"process {local_rank} of this machine has no GPU: there are {count}; start torchrun with --nproc_per_node={count}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
