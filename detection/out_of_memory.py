"""When memory runs out in a training step: which images it was, and which settings help."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from detection.config import RunConfig, TrainConfig
from detection.structures import Batch
from resbackbone.errors import InputError
from resbackbone.runtime import distributed
from resbackbone.runtime.memory import is_out_of_memory


@contextlib.contextmanager
def explain_out_of_memory(batch: Batch, config: RunConfig, model: nn.Module) -> Iterator[None]:
    """Turn running out of memory inside into an InputError that names the batch's images, their sizes and what to set."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        helps = what_helps(
            config.train,
            batch_size=config.train.batch_size,
            images=2 if config.model.head == "deeplabv3" else 1,  # segmentation/config.py, check_share
            checkpointing=config.model.backbone.checkpointing,
            fixed_norms=not any(isinstance(module, _BatchNorm) and module.training for module in model.modules()),
            starts_from="model.weights" if hasattr(config.model, "weights") else None,
        )
        detail = (str(error).splitlines() or ["no more is known"])[0]
        raise InputError(f"{_what_happened(batch)}. {helps} ({detail[:120]})") from error


def _what_happened(batch: Batch) -> str:
    images = [
        f"{target.image_id} ({image.shape[-2]}×{image.shape[-1]} px, {len(getattr(target, 'boxes', ()))} boxes)"
        for image, target in zip(batch.images, batch.targets, strict=True)
    ]
    return f"out of memory in a training step on {len(images)} images: {', '.join(images)}"


def what_helps(
    settings: TrainConfig,
    *,
    batch_size: int,
    images: int = 1,
    checkpointing: bool = False,
    fixed_norms: bool = True,
    starts_from: str | None = "model.weights",
) -> str:
    """What to set where a batch of that size over all processes doesn't fit, the cheapest first.

    images: the fewest a process may have; checkpointing: whether the backbone's is on; fixed_norms: whether no norm takes its statistics
    from the batch; starts_from: the setting that names a checkpoint to start another run from, if there is one.
    """
    ways, parts, tail = [], _parts(batch_size, images), ""
    if settings.precision == "fp32":
        ways.append("train.precision=bf16 (about half)")
    if parts is not None:
        same = "the same step in smaller parts" if fixed_norms else "smaller parts; batch norms then see fewer images at a time"
        ways.append(f"train.batch_size={batch_size // parts} train.accumulate={parts * settings.accumulate} ({same})")
        learned = f", with {starts_from}=a checkpoint to keep what was learned" if starts_from else ""
        tail = f". A run that goes on from a checkpoint keeps its batch size: set another of these, or begin in a new --output{learned}"
    if not checkpointing:
        ways.append("model.backbone.checkpointing=true (a third more time)")
    ways.append("smaller data.min_size and data.max_size")
    return f"Set {'; or '.join(ways)}{tail}"


def _parts(batch_size: int, images: int) -> int | None:
    """The fewest equal parts, or the step would change, that each of the processes can have at least so many images of."""
    share, rest = divmod(batch_size, distributed.world_size())
    return None if rest else next((parts for parts in range(2, share // images + 1) if share % parts == 0), None)
