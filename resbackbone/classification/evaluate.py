"""Top-1 and top-5 of one classifier or several: scores averaged over the views of an image (1 crop, 10 crops, scales), then over networks.

Scores are softmax probabilities, as in the 10-crop tests of Krizhevsky et al. 2012 that the paper follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resbackbone.backbone import Backbone
from resbackbone.classification.config import ClassificationConfig
from resbackbone.classification.dataset import Views
from resbackbone.classification.loader import eval_loader
from resbackbone.classification.networks import Trained, dense_logits, load_trained, normalizer_of
from resbackbone.classification.shards import ShardIndex, read_index
from resbackbone.classification.sources import Source, load_source
from resbackbone.classification.stream import eval_stream
from resbackbone.errors import InputError
from resbackbone.runtime import distributed
from resbackbone.runtime.distributed import Process
from resbackbone.runtime.precision import Precision
from resbackbone.runtime.signals import Interrupted, SignalGuard

TOP = 5
_PIXELS_A_PASS = 64 * 256**2  # views that go through the network together, so that ten crops or 640 pixels fit as well
_COUNTS = ("images", "top1", "top5", "among_classes", "loss")


@dataclass(frozen=True, kw_only=True)
class Split:
    """A validation split, at random access or as shards."""

    data: Source | ShardIndex

    @property
    def classes(self) -> tuple[str, ...]:
        return self.data.classes

    @property
    def size(self) -> int:
        return int(self.data.counts.sum()) if isinstance(self.data, ShardIndex) else len(self.data.labels)

    def batches(self, config: ClassificationConfig, process: Process) -> Iterable[list[Views]]:
        """This process's share of the images."""
        if isinstance(self.data, ShardIndex):
            return eval_stream(config, self.data, process)
        return eval_loader(config, self.data, process)


def load_split(config: ClassificationConfig, split: str) -> Split:
    """The images of `split`. Raises InputError as the sources do."""
    data = config.data
    return Split(data=read_index(data.root, split) if data.kind == "shards" else load_source(data.kind, data.root, split))


class Evaluator:
    """Judges networks on a split; every process takes its share, each image counts once."""

    def __init__(
        self, config: ClassificationConfig, split: Split, *, process: Process, precision: Precision, signals: SignalGuard | None = None
    ) -> None:
        self.config, self.split, self.process, self.precision, self.signals = config, split, process, precision, signals
        self.numbers = _class_numbers(config, split.classes)

    def evaluate(self, nets: Sequence[Backbone]) -> dict[str, float]:
        """top1, top5 (of five classes or fewer: 1), error (1 - top1), loss; with `data.class_numbers`, also top-1 among the
        split's own classes. The same on every process."""
        scorers = [Scorer(net.eval(), self.precision) for net in nets]
        counts = torch.zeros(len(_COUNTS), dtype=torch.float64)
        for batch in self._in_step(self.split.batches(self.config, self.process)):
            if batch is not None:
                counts += self._judged(batch, scorers)
        counts = torch.stack(distributed.gather_objects(counts)).sum(0)
        if int(counts[0]) != self.split.size:
            raise InputError(f"{int(counts[0])} of {self.split.size} images were evaluated; is the data changing while it is read?")
        figures = dict(zip(_COUNTS[1:], (counts[1:] / counts[0]).tolist(), strict=True))
        if self.config.data.class_numbers is None:
            del figures["among_classes"]
        return {"top1": figures.pop("top1"), "top5": figures.pop("top5"), "error": 1.0 - float(counts[1] / counts[0]), **figures}

    def _in_step(self, batches: Iterable[list[Views]]) -> Iterator[list[Views] | None]:
        """Every process makes as many turns (None: it has nothing left), so that they agree on signals."""
        mine = iter(batches)
        while True:
            batch = next(mine, None)
            if not distributed.any_process(batch is not None):
                return
            if self.signals is not None and distributed.any_process(self.signals.requested is not None):
                raise Interrupted(self.signals.requested or 143)
            yield batch

    def _judged(self, batch: list[Views], scorers: Sequence[Scorer]) -> Tensor:
        """float64 [5]: images, right at first, right within five, right among the split's classes, summed loss."""
        readable = [views for views in batch if views.stacks]
        unread = len(batch) - len(readable)
        if not readable:
            return torch.tensor([unread, 0, 0, 0, 0], dtype=torch.float64)
        scores = torch.stack([scorer(readable, self.process.device) for scorer in scorers]).mean(0).double()
        if int(self.numbers.max()) >= scores.shape[1]:
            raise InputError(f"the data has a class number {int(self.numbers.max())}, the network only {scores.shape[1]} outputs")
        labels = self.numbers[[views.label for views in readable]]
        hits = scores.topk(min(TOP, scores.shape[1])).indices == labels[:, None]
        among = self.numbers[scores[:, self.numbers].argmax(1)] == labels
        loss = -scores.gather(1, labels[:, None]).clamp(min=1e-12).log()
        return torch.stack([torch.tensor(float(len(batch))).double(), hits[:, 0].sum(), hits.any(1).sum(), among.sum(), loss.sum()])


class Scorer:
    """Class probabilities of images from their views, averaged over the views of a stack and then over stacks."""

    def __init__(self, net: Backbone, precision: Precision) -> None:
        self.net, self.precision = net, precision
        self.normalizer = normalizer_of(net)

    @torch.no_grad()
    def __call__(self, batch: Sequence[Views], device: torch.device) -> Tensor:
        """float32 [N, K] on the CPU. Stacks of one shape go through the network together, whichever image they are of."""
        shapes: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for number, views in enumerate(batch):
            for stack in views.stacks:
                shapes.setdefault(tuple(stack.shape), []).append((number, stack))
        totals: list[Any] = [0.0] * len(batch)
        for members in shapes.values():
            scores = self._probabilities(torch.cat([stack for _, stack in members]), device)
            for (number, _), part in zip(members, scores.chunk(len(members)), strict=True):
                totals[number] = totals[number] + part.mean(0) / len(batch[number].stacks)
        return torch.stack(totals)

    def _probabilities(self, images: Tensor, device: torch.device) -> Tensor:
        self.normalizer.to(device)
        at_once = max(1, _PIXELS_A_PASS // (images.shape[-1] * images.shape[-2]))
        found = []
        for part in images.split(at_once):
            inputs = self.normalizer(part.to(device))
            with self.precision.autocast():
                logits = dense_logits(self.net, inputs)
            found.append(logits.float().softmax(1).cpu())
        return torch.cat(found)


def _class_numbers(config: ClassificationConfig, classes: Sequence[str]) -> Tensor:
    """int64 [classes]: which output of the network each class of the data is."""
    named = config.data.class_numbers
    if named is None:
        return torch.arange(len(classes))
    missing = [name for name in classes if name not in named]
    if missing:
        raise InputError(f"data.class_numbers does not say which output {', '.join(missing[:5])} is; add it, or set it to null")
    return torch.tensor([named[name] for name in classes])


def evaluate_files(weights: Sequence[Path], config_file: Path | None, overrides: Sequence[str]) -> dict[str, float]:
    """What tools/eval_cls.py prints: the figures of one weights file, or of several together, on the val split of the first's config.

    Joins the processes of a torchrun, which the caller leaves by `distributed.shutdown()` once it has judged all it wants. Raises
    InputError for files that can't be read, and for networks with different outputs.
    """
    trained = [load_trained(path, config_file, overrides) for path in weights]
    config, device = trained[0].config, trained[0].config.train.device
    expected = _common_classes(weights, trained)
    process = distributed.setup(None if device == "auto" else device)
    split = load_split(config, config.data.val)
    if expected and config.data.class_numbers is None and expected != split.classes:
        raise InputError(
            f"{weights[0]} was trained on other classes than {config.data.root} has; say which output each is with data.class_numbers"
        )
    nets = [_placed(one.net, process.device) for one in trained]
    return Evaluator(config, split, process=process, precision=Precision(config.train.precision, process.device)).evaluate(nets)


def _common_classes(weights: Sequence[Path], trained: Sequence[Trained]) -> tuple[str, ...]:
    """The names of the classes, as far as the files say (none: no file does). Raises InputError where two disagree, or in their number."""
    for path, one in zip(weights, trained, strict=True):
        if one.outputs != trained[0].outputs:
            raise InputError(
                f"{path} tells {one.outputs} classes apart, {weights[0]} {trained[0].outputs}; an ensemble needs the same classes in all"
            )
    named = [(path, one.classes) for path, one in zip(weights, trained, strict=True) if one.classes]
    for path, classes in named[1:]:
        if classes != named[0][1]:
            raise InputError(f"{path} tells other classes apart than {named[0][0]}; an ensemble needs networks of the same classes")
    return named[0][1] if named else ()


def _placed(net: nn.Module, device: torch.device) -> Any:
    return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
