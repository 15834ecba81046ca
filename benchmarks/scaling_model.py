"""A model, not a measurement: time and cost of 90 epochs of ImageNet on ResNet-50 from 1 to 1024 GPUs; docs/scaling.md explains it.

    python benchmarks/scaling_model.py [--images-per-s 2500] [--between-gb-s 25] … (every assumption is an option)

A step takes as long as the slowest of: computing plus the part of the all-reduce that the backward pass doesn't hide, and reading images.
The slowest process of a step is found by simulation (normal jitter of each process's computing time, fixed seed).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

import numpy as np

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TRAIN_IMAGES = 1_281_167


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Every number that the table depends on; none of them was measured here unless docs/scaling.md says so."""

    images_per_s: float = 2500.0  # of one GPU computing alone, bf16, channels_last
    batch_per_gpu: int = 256
    largest_batch: int = 8192  # over all GPUs; beyond it this recipe loses accuracy (Goyal et al. 2017, Figure 1)
    floor_ms: float = 12.0  # of a step, however small the batch: launching kernels
    gradient_mb: float = 102.2  # 25.6 M parameters in float32
    within_gb_s: float = 200.0  # all-reduce bandwidth a GPU sees inside a machine
    between_gb_s: float = 25.0  # and between machines
    latency_us: float = 15.0  # of one hop
    hidden: float = 0.8  # share of the computing time under which communication can hide: most of the backward pass
    flags_us: float = 200.0  # the two small gloo exchanges of a step (finite? signal?), a hop each way a doubling
    jitter: float = 0.02  # standard deviation of a process's step, as a share of it
    gpus_per_machine: int = 8
    cores_per_gpu: int = 12
    images_per_core_s: float = 300.0  # decode and crop; from shards of short side 256
    epochs: int = 90
    restart_s: float = 120.0  # from a death to the first step: torchrun's rendezvous, imports, the checkpoint
    save_every: int = 1000
    save_s: float = 2.0  # rank 0 writes 300 MB
    days_between_failures: float = 200.0  # of one machine, preemption included
    euros_per_gpu_hour: float = 2.5


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the model says of one number of GPUs. Times in seconds unless named otherwise."""

    gpus: int
    batch: int  # over all GPUs
    compute: float
    exposed: float
    input: float
    step: float
    images_per_s: float
    efficiency: float
    hours: float
    lost_hours: float
    euros: float


def allreduce_s(gpus: int, a: Assumptions) -> float:
    """A ring inside each machine, then between machines; the latency of a tree, as NCCL chooses for many."""
    inside, machines = min(gpus, a.gpus_per_machine), -(-gpus // a.gpus_per_machine)
    transfer = sum(2 * (n - 1) / n * a.gradient_mb / 1e3 / rate for n, rate in ((inside, a.within_gb_s), (machines, a.between_gb_s)))
    return transfer + 2 * np.log2(max(gpus, 1)) * a.latency_us / 1e6


def slowest_of(gpus: int, jitter: float) -> float:
    """Mean over 400 simulated steps of the slowest process's time, in units of the mean step."""
    draw = np.random.default_rng(0)
    return float((1 + jitter * draw.standard_normal((400, gpus))).max(1).mean())


def row_of(gpus: int, a: Assumptions) -> Row:
    batch = min(a.batch_per_gpu, a.largest_batch // gpus)
    compute = max(batch / a.images_per_s, a.floor_ms / 1e3) * slowest_of(gpus, a.jitter)
    exposed = max(0.0, allreduce_s(gpus, a) - a.hidden * compute) + a.flags_us / 1e6 * np.log2(gpus)
    reading = batch / (a.cores_per_gpu * a.images_per_core_s)
    step = max(compute + exposed, reading)
    steps = a.epochs * TRAIN_IMAGES / (batch * gpus)
    hours = steps * (step + a.save_s / a.save_every) / 3600
    machines = -(-gpus // a.gpus_per_machine)
    failures = hours / 24 * machines / a.days_between_failures
    lost = failures * (a.save_every * step / 2 + a.restart_s) / 3600
    rate = gpus * batch / step
    return Row(
        gpus=gpus,
        batch=batch * gpus,
        compute=compute,
        exposed=exposed,
        input=reading,
        step=step,
        images_per_s=rate,
        efficiency=rate / gpus / a.images_per_s,
        hours=hours,
        lost_hours=lost,
        euros=(hours + lost) * gpus * a.euros_per_gpu_hour,
    )


def table(a: Assumptions) -> str:
    """The Markdown table of docs/scaling.md."""
    lines = [
        "| GPUs | batch | compute ms | exposed all-reduce ms | input ms | images/s | efficiency | hours | lost to failures, s | cost, € |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for gpus in GPUS:
        r = row_of(gpus, a)
        lines.append(
            f"| {gpus} | {r.batch} | {1e3 * r.compute:.1f} | {1e3 * r.exposed:.1f} | {1e3 * r.input:.1f} | "
            f"{r.images_per_s:,.0f} | {r.efficiency:.0%} | {r.hours:.2f} | {3600 * r.lost_hours:.1f} | {r.euros:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for one in fields(Assumptions):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)
    print(table(Assumptions(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
