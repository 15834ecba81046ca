"""What a run leaves behind when its loss is no longer finite: where it began, and all that is needed to see it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resbackbone.runtime.atomic import write_atomically
from resbackbone.runtime.checkpoint import save_weights
from resbackbone.runtime.log import to_json


class NonFiniteLoss(RuntimeError):
    """Training stopped itself because a loss was not finite. A tool exits with 3."""


class _Found(Exception):
    """Ends the replay as soon as the module is known."""


def first_nonfinite_module(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """Call `run` (a replay of the batch through `model`) and name the first module whose output holds a NaN or an infinity.

    Returns "name (Class)" of the innermost such module, or None when all outputs were finite (the loss itself then went wrong).
    """
    culprit: list[str] = []

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not all(bool(torch.isfinite(tensor).all()) for tensor in _float_tensors(output)):
                culprit.append(f"{name} ({type(module).__name__})" if name else type(module).__name__)
                raise _Found

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules()]
    try:
        run()
    except _Found:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return culprit[0] if culprit else None


def write_nonfinite_report(
    folder: Path,
    *,
    step: int,
    losses: Mapping[str, Any],
    batch: Mapping[str, torch.Tensor],
    records: list[dict[str, Any]],
    module: str | None,
    command: str,
) -> Path:
    """Write `folder/nonfinite/report.json` and `batch.safetensors`; returns that folder.

    `records`: one dict an image (id, boxes, labels, …); `batch`: the tensors that replay it; `command`: the one command that does.
    """
    place = Path(folder) / "nonfinite"
    report = {
        "step": step,
        "losses": dict(losses),
        "first_nonfinite_module": module,
        "images": records,
        "batch": "batch.safetensors",
        "replay": command,
    }
    save_weights(place / "batch.safetensors", dict(batch), {"step": str(step)})
    write_atomically(place / "report.json", to_json(report, indent=2).encode())
    return place


def _float_tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, Mapping):
        yield from (tensor for item in value.values() for tensor in _float_tensors(item))
    elif isinstance(value, (list, tuple)):
        yield from (tensor for item in value for tensor in _float_tensors(item))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (tensor for field in dataclasses.fields(value) for tensor in _float_tensors(getattr(value, field.name)))
