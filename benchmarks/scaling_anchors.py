"""What scaling_model.py assumes, measured where it can be: two gloo processes on this machine's loopback, one thread each, and the input.

    python benchmarks/scaling_anchors.py [--networks resnet18 resnet50] [--side 96] [--batch 8] [--rounds 5] [--images DIR]

In each round, in turn: a training step of one process while the other waits, a step of both in DistributedDataParallel, and an all-reduce
of as many bytes as the network has gradients. Two clocks: processor time, which other work on the machine hardly changes (in it nothing
hides behind anything, so the model's `hidden` is 0), and wall time, which it does. Printed are medians (smallest to largest) and, beside
the step of two processes, what the model makes of the other figures. Then images a second and core, from files and from shards.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CLOCKS: dict[str, Callable[[], float]] = {"processor": time.process_time, "wall": time.perf_counter}
SMALL_EXCHANGES = 50
Times = dict[str, list[float]]


def timed(job: Callable[[], object], into: Times, repeat: int = 1) -> None:
    """Add the seconds of one of `repeat` runs, by each clock."""
    began = {name: clock() for name, clock in CLOCKS.items()}
    for _ in range(repeat):
        job()
    for name, clock in CLOCKS.items():
        into.setdefault(name, []).append((clock() - began[name]) / repeat)


def measured(name: str, *, side: int, batch: int, rounds: int) -> dict[str, Times]:
    """In each of the two processes: seconds of {alone, together, allreduce, flag}, by clock, in every round but a first."""
    import torch

    from resbackbone import create_classifier
    from resbackbone.runtime import distributed

    process = distributed.setup("cpu")
    torch.set_num_threads(1)
    torch.manual_seed(process.rank)
    images, labels = torch.randn(batch, 3, side, side), torch.randint(0, 1000, (batch,))

    def step_of(parallel: bool) -> Callable[[], object]:
        net = create_classifier(name, num_classes=1000)
        model = distributed.parallel(net, process) if parallel else net
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

        def step() -> None:
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    alone, together = step_of(False), step_of(True)
    gradients = torch.zeros(sum(parameter.numel() for parameter in create_classifier(name, num_classes=1000).parameters()))
    found: dict[str, Times] = {what: {} for what in ("alone", "together", "allreduce", "flag")}
    for number in range(rounds + 1):
        kept = found if number else {what: {} for what in found}
        if process.is_main:
            timed(alone, kept["alone"])
        distributed.barrier()
        timed(together, kept["together"])
        distributed.barrier()
        timed(lambda: torch.distributed.all_reduce(gradients), kept["allreduce"])
        timed(lambda: distributed.any_process(False), kept["flag"], repeat=SMALL_EXCHANGES)
    distributed.shutdown()
    return found | {"megabytes": {"all": [gradients.numel() * 4 / 1e6]}}


def in_two_processes(name: str, options: argparse.Namespace) -> dict[str, Times]:
    """What the first of them measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--measure", name, "--side", str(options.side), "--batch", str(options.batch)]
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [*command, "--rounds", str(options.rounds)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in (0, 1)
    ]
    said, _ = children[0].communicate()
    assert [child.wait() for child in children] == [0, 0], "a process failed; its error is above"
    return json.loads(said)


def shown(values: list[float], unit: float = 1e3, digits: int = 0) -> str:
    middle, low, high = (f"{unit * one:.{digits}f}" for one in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def report(name: str, found: dict[str, Times], batch: int) -> None:
    from scaling_model import Assumptions, row_of

    megabytes = found["megabytes"]["all"][0]
    print(f"{name}: {megabytes:.1f} MB of gradients, {batch} images a process")
    for clock in CLOCKS:
        alone, together, allreduce = (found[what][clock] for what in ("alone", "together", "allreduce"))
        rate, latency_us = megabytes / 1e3 / statistics.median(allreduce), 1e6 * statistics.median(found["flag"][clock])
        known = {"images_per_s": batch / statistics.median(alone), "batch_per_gpu": batch, "gradient_mb": megabytes, "within_gb_s": rate}
        rest = {"floor_ms": 0.0, "jitter": 0.0, "flags_us": 0.0, "latency_us": 0.0, "images_per_core_s": 1e9}
        predicted = {hidden: 1e3 * row_of(2, Assumptions(**known, **rest, hidden=hidden)).step for hidden in (0.0, 0.8)}
        print(f"  {clock} time: all-reduce {shown(allreduce)} ms = {rate:.2f} GB/s; a flag {latency_us:.0f} us")
        print(f"    step of one {shown(alone)} ms, of two {shown(together)} ms; model: {predicted[0.0]:.0f} ms with nothing hidden", end="")
        print(
            f", {predicted[0.8]:.0f} ms with 0.8"
            if clock == "wall"
            else f"; measured / model {statistics.median(together) / 1e-3 / predicted[0.0]:.2f}"
        )


def report_input(folder: Path | None, count: int, rounds: int) -> None:
    import torch
    from bench_cls_input import contestants, draw_pictures

    from resbackbone.classification.sources import FileSource

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            draw_pictures(Path(scratch), count)
        place = folder or Path(scratch)
        files = sorted(path.name for path in place.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))[:count]
        runs = contestants(FileSource(place, files, [0] * len(files), ("any",)), Path(scratch) / "shards")
        times: dict[str, Times] = {name: {} for name in runs}
        for epoch in range(rounds + 1):
            for name, run in runs.items():
                timed(lambda run=run, epoch=epoch: run(epoch), times[name] if epoch else {})  # type: ignore[misc]
    print(f"input, {len(files)} JPEGs, one core, processor time:")
    for name, found in times.items():
        print(f"  {name}: {len(files) / statistics.median(found['processor']):.0f} images/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=["resnet18", "resnet50"])
    parser.add_argument("--side", type=int, default=96, help="of an image, pixels")
    parser.add_argument("--batch", type=int, default=8, help="images a process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=Path, help="a folder of JPEGs; default: drawn pictures of 500 x 375")
    parser.add_argument("--count", type=int, default=64, help="of them, at most")
    parser.add_argument("--measure", metavar="NETWORK", help="be one of the two processes")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.measure, side=options.side, batch=options.batch, rounds=options.rounds)))
        return
    for name in options.networks:
        report(name, in_two_processes(name, options), options.batch)
    report_input(options.images, options.count, options.rounds)


if __name__ == "__main__":
    main()
