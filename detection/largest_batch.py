"""Which train.batch_size fits, measured: real training steps on images as large, with as many boxes, as the training data can give.

On a GPU the batch is doubled until memory really runs out, then bisected. On the CPU running out may take other programs along, so each
batch is tried in a process of its own, and the next one is where the line through the peaks of two of them meets the limit.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from detection.build import build_detector
from detection.config import DetectionConfig, chosen_device, load_split
from detection.data.dataset import DetectionDataset
from detection.data.images import resized_size
from detection.data.source import Source
from detection.out_of_memory import what_helps
from detection.structures import Batch, Target
from detection.train_state import TrainState
from resbackbone.errors import InputError
from resbackbone.runtime import distributed
from resbackbone.runtime.memory import available_mb, is_out_of_memory
from resbackbone.runtime.optimizer import build_optimizer
from resbackbone.runtime.precision import Precision
from resbackbone.runtime.random_state import seed_everything
from resbackbone.runtime.sampler import ResumableBatchSampler
from resbackbone.runtime.timing import peak_memory_mb

MARGIN = 0.1  # of the memory that is left: for fragments, data workers, and evaluation beside the training step
MOST = 1024  # nobody asks for more
PATIENCE_S = 300.0  # a step on the CPU that would take longer is not tried
WORTH_TRYING = 1.1  # times the best batch so far; a line through two peaks isn't more exact


@dataclass(frozen=True, kw_only=True)
class Demand:
    """The most one image can ask for: (height, width) in pixels, boxes on it, masks too or not; and how many classes there are."""

    size: tuple[int, int]
    boxes: int
    masks: bool
    classes: int

    def batch(self, images: int) -> Batch:
        """So many images of noise with boxes of every size."""
        generator = torch.Generator().manual_seed(0)
        height, width = self.size

        def target(number: int) -> Target:
            corners = torch.rand((self.boxes, 2, 2), generator=generator).sort(dim=1).values * 0.9 + torch.tensor([[0.0], [0.1]])
            return Target(
                boxes=(corners * torch.tensor([width, height])).flatten(1),
                labels=torch.randint(1, self.classes + 1, (self.boxes,), generator=generator),
                ignore_boxes=torch.zeros((0, 4)),
                masks=torch.ones((self.boxes, height, width), dtype=torch.uint8) if self.masks else None,
                image_id=number,
                index=number,
                original_size=self.size,
                seed=number,
            )

        pixels = torch.randint(0, 256, (images, 3, height, width), dtype=torch.uint8, generator=generator)
        return Batch(images=list(pixels), targets=[target(number) for number in range(images)])


@dataclass(frozen=True)
class Trial:
    """One batch that fitted: the peak of memory in MB (10^6 bytes) and the time of a step, both once the optimiser has its state."""

    batch_size: int
    peak_mb: float
    seconds: float


def largest_batch(config: DetectionConfig, *, limit_mb: float | None = None, log: Callable[[str], None] = print) -> int:
    """The largest train.batch_size of one process that fits, after a table of what was tried; leaves no file.

    limit_mb: of memory to use; None: nine tenths of what the device has left. Raises InputError under torchrun, and where not even one
    image fits.
    """
    process = distributed.setup(chosen_device(config))
    try:
        if process.world_size > 1:
            raise InputError("--largest-batch measures one process; start it without torchrun and multiply by the number of GPUs")
        demand = demand_of(config, load_split(config, "train"))
        limit_mb = (1 - MARGIN) * _left_mb(process.device) if limit_mb is None else limit_mb
        height, width = demand.size
        log(f"images of {height}×{width} px, the largest by data.min_size and data.max_size, with {demand.boxes} boxes, the most there are")
        log(f"may use {limit_mb:,.0f} MB of memory on {process.device}")
        trials, too_many = _search_on(process.device, config, demand, limit_mb, log)
    finally:
        distributed.shutdown()
    if not trials:
        helps = what_helps(config.train, batch_size=1, checkpointing=config.model.backbone.checkpointing)
        raise InputError(f"not even one image fits into {limit_mb:,.0f} MB. {helps}")
    answer, seconds = trials[-1].batch_size, trials[-1].seconds
    promised = min(_on_the_line(trials, limit_mb), too_many - 1) if process.device.type == "cpu" and len(trials) > 1 else answer
    if promised > WORTH_TRYING * answer:
        log(f"{promised} would fit by the line through these; not tried, as a step would take {seconds * promised / answer:.0f} s")
        answer = promised
    log(_setting(answer, config))
    return answer


def demand_of(config: DetectionConfig, source: Source) -> Demand:
    """Wide and tall images meet in the last batches of an epoch, and a batch is padded to the tallest and the widest.

    Raises InputError for what training would refuse, no image among it.
    """
    data, annotations = config.data, source.annotations
    # Which images are used, and that there are any, is decided in one place.
    used = DetectionDataset(source, min_size=data.min_size, max_size=data.max_size, train=True, empty_images=data.empty_images).keep
    largest = max(data.min_size)
    sizes = [resized_size(*size, min_size=largest, max_size=data.max_size) for size in set(map(tuple, annotations.sizes[used].tolist()))]
    boxes = np.diff(annotations.offsets)[used].max()
    heights, widths = zip(*sizes, strict=True)
    return Demand(size=(max(heights), max(widths)), boxes=int(boxes), masks=config.model.mask, classes=len(annotations.classes))


def _left_mb(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] / 1e6 if device.type == "cuda" else available_mb()


def _search_on(
    device: torch.device, config: DetectionConfig, demand: Demand, limit_mb: float, log: Callable[[str], None]
) -> tuple[list[Trial], int]:
    def told(measure: Callable[[int], Trial | None]) -> Callable[[int], Trial | None]:
        def trial(batch_size: int) -> Trial | None:
            one = measure(batch_size)
            log(f"{batch_size:6} images: " + (f"{one.peak_mb:8,.0f} MB, {one.seconds:7.2f} s a step" if one else "too many"))
            return one

        return trial

    if device.type == "cpu":
        trial = told(lambda batch_size: try_in_a_process(config, demand, batch_size, limit_mb=limit_mb))
        return search(trial, following=lambda trials: _next_on_the_line(trials, limit_mb))
    # The allocator keeps to the limit, so that what runs out there would have come close to running out in training.
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_mb * 1e6 / torch.cuda.get_device_properties(device).total_memory), device)
    try:
        return search(
            told(lambda batch_size: try_here(config, demand, batch_size, device)), following=lambda trials: 2 * trials[-1].batch_size
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def search(trial: Callable[[int], Trial | None], *, following: Callable[[list[Trial]], int], most: int = MOST) -> tuple[list[Trial], int]:
    """The batches that fitted, in the order tried, so that the last is the largest; and the least that is known, or said by `most`, not to.

    trial: a batch size → what it took, or None where it doesn't fit. following: the next size to try, after those that fitted; one that is
    no larger ends the search, and after one that didn't fit the middle takes its place.
    """
    fitting: list[Trial] = []
    best, least_too_many, aim = 0, most + 1, 1
    while best < aim < least_too_many:
        if (one := trial(aim)) is None:
            least_too_many = aim
        else:
            fitting.append(one)
            best = aim
        if fitting:
            aim = min(following(fitting), most)
            aim = (best + least_too_many) // 2 if aim >= least_too_many else aim
    return fitting, least_too_many


def _on_the_line(trials: list[Trial], limit_mb: float) -> int:
    """Where the line through the peaks of the first and the last batch meets the limit."""
    first, last = trials[0], trials[-1]
    slope = (last.peak_mb - first.peak_mb) / (last.batch_size - first.batch_size)
    return MOST if slope <= 0 else min(MOST, max(0, math.floor(last.batch_size + (limit_mb - last.peak_mb) / slope)))


def _next_on_the_line(trials: list[Trial], limit_mb: float) -> int:
    best = trials[-1]
    if len(trials) == 1:
        return 2
    aim = _on_the_line(trials, limit_mb)
    is_affordable = best.seconds * aim / best.batch_size <= PATIENCE_S
    return aim if is_affordable and aim > WORTH_TRYING * best.batch_size else best.batch_size


def try_in_a_process(config: DetectionConfig, demand: Demand, batch_size: int, *, limit_mb: float) -> Trial | None:
    """A fresh process takes the steps: its peak is this batch's alone. None: it took more than the limit, or the system killed it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            one = pool.submit(try_here, config, demand, batch_size, torch.device("cpu")).result()
        except BrokenProcessPool:
            return None
    return one if one is not None and one.peak_mb <= limit_mb else None


def try_here(config: DetectionConfig, demand: Demand, batch_size: int, device: torch.device) -> Trial | None:
    """Two optimiser steps as train.py takes them; the first makes the optimiser's state. None where memory runs out."""
    if device.type == "cuda":
        gc.collect()  # what the last trial left
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        return _take_steps(config, demand, batch_size, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def _take_steps(config: DetectionConfig, demand: Demand, batch_size: int, device: torch.device) -> Trial:
    settings, seconds = config.train, 0.0
    seed_everything(settings.seed)
    # With model.weights the backbone's own are never read, as in train.py; which values the weights have costs no memory.
    detector = build_detector(config, demand.classes, initial_weights=config.model.weights is None).to(device)
    if settings.channels_last:
        detector = detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if settings.compile:
        detector.get_submodule("backbone").compile()
    state = TrainState(
        config,
        detector,
        optimizer=build_optimizer(detector, settings, lr=0.0),
        precision=Precision(settings.precision, device),
        sampler=ResumableBatchSampler(batch_size, batch_size=batch_size, seed=settings.seed),
        folder=Path(),
        classes=(),
        metadata={},
        tool="train_det",
    )
    batch = demand.batch(batch_size).to(device)
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(min(settings.accumulate, 2)):  # the second meets the first's gradients; a third finds nothing new
            with state.precision.autocast():
                loss = torch.stack(list(detector(batch.images, batch.targets).values())).sum()
            state.precision.scaler.scale(loss).backward()
        state.update()
        peak_mb = peak_memory_mb(device)  # on a GPU this waits for nothing, but memory is counted as it is asked for
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return Trial(batch_size, peak_mb, seconds)


def _setting(answer: int, config: DetectionConfig) -> str:
    wanted = config.train.batch_size * config.train.accumulate
    if answer >= config.train.batch_size:
        return f"largest batch that fits: {answer}\ntrain.batch_size={answer}"
    parts = -(-wanted // answer)
    return f"largest batch that fits: {answer}, less than the config's\ntrain.batch_size={-(-wanted // parts)} train.accumulate={parts}"
