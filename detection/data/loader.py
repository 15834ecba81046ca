"""Batches from worker processes: endless for training, each image once for evaluation."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import re
import signal
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from detection.structures import Batch
from resbackbone.errors import InputError
from resbackbone.runtime.distributed import worker_start_method
from resbackbone.runtime.sampler import ResumableBatchSampler

from .arrays import SHARED_MEMORY_HELP, check_shared_memory
from .dataset import DetectionDataset
from .source import Source

try:
    import resource
except ImportError:  # Windows, where open files have no such limit
    resource = None  # type: ignore[assignment]

_PREFETCH = 2  # batches each worker keeps ready
_PAD_TO = 32  # images of one padded shape go together; the detector pads to this
_QUEUE_BYTES = 2**16  # a worker's queues, locks and events, generously
_SIGTERM_GRACE_S = 60
_SPARE_DESCRIPTORS = 32  # a worker's image, logs and connections
_SHARED_MEMORY_NAME = re.compile(r"(</?|/dev/shm/)torch_\d+_")  # as torch says it: </torch_PID_RANDOM_NUMBER>
_OPEN_FILES_HELP = (
    "Allow more open files (ulimit -n 65536 before the start; docker run --ulimit nofile=65536), or set fewer data.workers or a smaller "
    "train.batch_size: each tensor of a batch on its way takes one"
)


def build_train_loader(
    source: Source,
    *,
    batch_size: int,
    workers: int,
    seed: int,
    min_size: int | tuple[int, ...],
    max_size: int,
    rank: int = 0,
    world_size: int = 1,
    flip: bool = True,
    empty_images: Literal["keep", "drop"] = "drop",
    group_aspect: bool = True,
    context: str | None = None,
    kind: type[DetectionDataset] = DetectionDataset,
) -> tuple[BatchLoader, ResumableBatchSampler]:
    """(loader, sampler): this process's share of each global batch, for ever; call sampler.advance() once a batch is used up.

    group_aspect: wide and tall images make separate batches, which saves padding. context: how workers start, fork | spawn | forkserver
    (None: fork where there is one, it starts at once and shares memory by itself). kind: of data set, what a sample is. Raises InputError.
    """
    dataset = kind(source, min_size=min_size, max_size=max_size, flip=flip, train=True, seed=seed, empty_images=empty_images)
    sizes = source.annotations.sizes[dataset.keep]
    groups = (sizes[:, 1] >= sizes[:, 0]).astype(np.int64) if group_aspect else None
    sampler = ResumableBatchSampler(len(dataset), groups, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
    return BatchLoader(dataset, sampler, workers=workers, context=context), sampler


def build_eval_loader(
    source: Source,
    *,
    batch_size: int,
    workers: int,
    min_size: int | tuple[int, ...],
    max_size: int,
    rank: int = 0,
    world_size: int = 1,
    context: str | None = None,
    kind: type[DetectionDataset] = DetectionDataset,
    enlarge: bool = True,
) -> BatchLoader:
    """Every image of the source exactly once over all processes, images of one shape together; several min_size: the last is used.

    The order is fixed, so a figure cannot depend on it. `len()` is this process's number of batches; processes may differ by one.
    """
    dataset = kind(source, min_size=min_size, max_size=max_size, train=False, enlarge=enlarge)
    batches = shape_batches(dataset.resized_sizes(), batch_size)[rank::world_size]
    return BatchLoader(dataset, [[(0, int(i)) for i in batch] for batch in batches], workers=workers, context=context)


def shape_batches(sizes: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Positions 0..n-1 in batches whose (height, width) [n, 2] are alike once padded; largest first: memory runs out at once or never."""
    if batch_size < 1:
        raise InputError(f"eval.batch_size={batch_size} is not a batch size; it is the number of images per forward pass, 1 or more")
    padded = -(-sizes // _PAD_TO)
    order = np.lexsort((np.arange(len(sizes)), padded[:, 1], padded[:, 0], -padded.prod(axis=1)))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class BatchLoader:
    """Iterates over `Batch`es that workers prepare ahead. `dataset.unreadable` and `unreadable_images()` tell what had to be skipped."""

    def __init__(
        self,
        dataset: DetectionDataset,
        batches: ResumableBatchSampler | Sequence[list[tuple[int, int]]],
        *,
        workers: int,
        context: str | None = None,
    ) -> None:
        if workers < 0:
            raise InputError(f"data.workers={workers} is not possible; 0 reads in the training process itself")
        self.dataset, self.batches, self.workers = dataset, batches, workers
        if workers:
            check_shared_memory(dataset.unreadable.nbytes + workers * _QUEUE_BYTES, what=f"starting {workers} workers")
            dataset.unreadable.share_memory_()
        self.context = context or worker_start_method()

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # endless in training: TypeError, rightly

    def __iter__(self) -> Iterator[Batch]:
        """From the sampler's position on. Raises InputError for bad data, and for too little shared memory saying which setting helps."""
        if self.workers:
            _raise_open_files_limit()
        batches = self._batches()
        _running().add(batches)
        return batches

    def _batches(self) -> Iterator[Batch]:
        loader: DataLoader[Batch] = DataLoader(
            _BatchReader(self.dataset, in_worker=self.workers > 0),  # type: ignore[arg-type]  # it has what the loader asks for
            batch_sampler=self.batches,
            num_workers=self.workers,
            collate_fn=_identity,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker if self.workers else None,
            multiprocessing_context=self.context if self.workers else None,
            prefetch_factor=_PREFETCH if self.workers else None,
            # Its own generator: the loader draws a seed at each start, which must not move the training's random state.
            generator=torch.Generator(),
        )
        try:
            for batch in loader:
                if isinstance(batch, InputError):
                    raise batch
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            explained = _explained(error) if self.workers or not isinstance(error, EOFError) else None
            if explained is None:
                raise
            raise InputError(explained) from error

    def unreadable_images(self) -> list[int]:
        """Numbers (in the source) of the images that could not be read so far."""
        return torch.nonzero(self.dataset.unreadable).flatten().tolist()


@cache
def _running() -> weakref.WeakSet:
    """Iterators whose workers must end before the process does: multiprocessing would send SIGTERM, which they sit out (see below)."""
    running: weakref.WeakSet = weakref.WeakSet()
    atexit.register(lambda: [batches.close() for batches in list(running)])
    return running


def _explained(error: Exception) -> str | None:
    """The words for a loader that the machine stopped, or None for any other error."""
    lines = str(error).lower().split("\n")
    # Of a worker's error, the last line says what it was; those before are its traceback, and name any folder.
    text, code = next((line for line in reversed(lines) if line.strip()), ""), getattr(error, "errno", None)
    # The worker's end of a connection that has no descriptor left hangs up without a word.
    has_hung_up = isinstance(error, EOFError) and (not text or "pin memory thread" in lines[0])
    if has_hung_up or "ancdata" in text or "too many open files" in text or code in (errno.EMFILE, errno.ENFILE):
        return f"the data workers ran out of open files (file descriptors). {_OPEN_FILES_HELP}"
    if "shared memory" in text or "bus error" in text or _SHARED_MEMORY_NAME.search(text) or code == errno.ENOSPC:
        return f"a data worker ran out of shared memory (/dev/shm). {SHARED_MEMORY_HELP}"
    if "killed by signal: killed" in text:
        return "a data worker was killed, most likely because memory ran out; set fewer data.workers or a smaller train.batch_size"
    return None


@dataclass
class _BatchReader:
    """The data set as the loader's workers see it: a list of keys in, a whole `Batch` out, or the InputError that stops the run.

    An exception raised in a worker would reach the user wrapped in a worker's traceback; a returned one is raised as it is.
    """

    dataset: DetectionDataset
    in_worker: bool

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch | InputError:
        try:
            samples = [self.dataset[key] for key in keys]
            batch = Batch(images=[sample.image for sample in samples], targets=[sample.target for sample in samples])
            return _to_shared_memory(batch) if self.in_worker else batch
        except InputError as error:
            return error


def _to_shared_memory(batch: Batch) -> Batch:
    """Move the batch here, where a failure can be answered; the queue's own thread would die of it and leave the training waiting."""
    tensors = [*batch.images, *(tensor for target in batch.targets for tensor in _tensors(target))]
    check_shared_memory(sum(tensor.nbytes for tensor in tensors), what="a batch")
    _check_descriptors(len(tensors))
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        raise InputError(_explained(error) or f"a data worker can't share its batch: {error}. {SHARED_MEMORY_HELP}") from error
    return batch


def _raise_open_files_limit() -> None:
    """The soft limit becomes the hard one, as any process may: batches need more than the usual 1024."""
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # macOS has a hard limit that it doesn't allow
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _check_descriptors(num_tensors: int) -> None:
    """Refuse before the queue's thread would fail. A tensor takes a file descriptor in its worker, and another until it is taken over.

    Raises InputError that names the settings that help.
    """
    if resource is None or torch.multiprocessing.get_sharing_strategy() != "file_descriptor" or not os.path.isdir("/proc/self/fd"):
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd"))
    if limit != resource.RLIM_INFINITY and in_use + 2 * num_tensors + _SPARE_DESCRIPTORS > limit:
        needs = f"a batch of {num_tensors} tensors needs {2 * num_tensors} open files, of the {limit} allowed {in_use} are in use"
        raise InputError(f"the data workers ran out of open files (file descriptors): {needs}. {_OPEN_FILES_HELP}")


def _tensors(target: object) -> list[Tensor]:
    values = (getattr(target, one.name) for one in fields(target))  # type: ignore[arg-type]
    return [value for value in values if isinstance(value, Tensor)]


def _identity(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    """One thread a worker (the workers are the parallelism), and signals left to the training process.

    A scheduler signals every process of a job; training then finishes its step and writes a checkpoint, for which it needs its workers.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_SIGTERM_GRACE_S))
