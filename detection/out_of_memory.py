"""When memory runs out in a training step: which images it was, and which settings help."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from detection.config import TrainConfig
from detection.structures import Batch
from resbackbone.errors import InputError
from resbackbone.runtime.memory import is_out_of_memory


@contextlib.contextmanager
def explain_out_of_memory(batch: Batch, settings: TrainConfig) -> Iterator[None]:
    """Turn running out of memory inside into an InputError that names the batch's images, their sizes and what to set."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        helps = what_helps(settings, batch_size=settings.batch_size)
        raise InputError(f"{_what_happened(batch)}. {helps} ({str(error).splitlines()[0][:120]})") from error


def _what_happened(batch: Batch) -> str:
    images = [
        f"{target.image_id} ({image.shape[-2]}×{image.shape[-1]} px, {len(getattr(target, 'boxes', ()))} boxes)"
        for image, target in zip(batch.images, batch.targets, strict=True)
    ]
    return f"out of memory in a training step on {len(images)} images: {', '.join(images)}"


def what_helps(settings: TrainConfig, *, batch_size: int) -> str:
    """What to set where a batch of that size doesn't fit, the cheapest first."""
    ways = []
    if settings.precision == "fp32":
        ways.append("train.precision=bf16 (about half)")
    if batch_size > 1:
        parts = next(count for count in range(2, batch_size + 1) if batch_size % count == 0)  # equal ones, or the step would change
        accumulate = parts * settings.accumulate
        ways.append(f"train.batch_size={batch_size // parts} train.accumulate={accumulate} (the same step in smaller parts)")
    ways += ["model.backbone.checkpointing=true (a third more time)", "smaller data.min_size and data.max_size"]
    return f"Set {'; or '.join(ways)}"
