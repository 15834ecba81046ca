"""When a loss is nan or infinite: stop before the weights are touched, and leave where it began and all that is needed to see it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resbackbone.runtime import distributed
from resbackbone.runtime.atomic import write_atomically
from resbackbone.runtime.checkpoint import save_weights
from resbackbone.runtime.log import to_json
from resbackbone.runtime.train_state import TrainState

FOLDER = "nonfinite"


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is kept of a batch whose loss is not finite. tensors: what replays it; records: one dict an image, its id first;
    metadata: what travels with the weights; run: calls the model as the training step did."""

    tensors: Mapping[str, torch.Tensor]
    records: list[dict[str, Any]]
    metadata: dict[str, str]
    run: Callable[[], Any]


Answer = Callable[[], bool]


def ask_if_finite(losses: Iterable[torch.Tensor]) -> Answer:
    """Whether all losses are; to be called once backward has been asked for too, so that a GPU has work while the host waits for this."""
    answer = torch.isfinite(torch.stack([loss.detach().float() for loss in losses])).all()
    if not answer.is_cuda:
        return lambda: bool(answer)
    arrived, here = torch.cuda.Event(), torch.empty((), dtype=torch.bool, pin_memory=True)
    here.copy_(answer, non_blocking=True)
    arrived.record()

    def read() -> bool:
        arrived.synchronize()
        return bool(here)

    return read


def stop_unless_finite(
    is_finite: Answer, losses: Mapping[str, torch.Tensor], state: TrainState[Any], output: Path, gather: Callable[[], Evidence]
) -> None:
    """Raise NonFiniteLoss on every rank when a loss of any rank is not finite. is_finite: of `losses`, from ask_if_finite.

    No update has happened yet: the state is kept as a checkpoint if it is still good, and `nonfinite/` gets the batch, the weights, the
    loss terms and the name of the first module whose output was not finite. Of several such ranks the lowest writes.
    """
    finite = is_finite()
    if not distributed.any_process(not finite):
        return
    going_on, finite_ones = state.save_last_good(), distributed.gather_objects(finite)
    what = "a loss of another process is not finite"
    if not finite:
        evidence = gather()
        terms = ", ".join(f"{name} {float(loss.detach()):g}" for name, loss in losses.items())
        what = f"a loss is not finite ({terms}); images {[next(iter(record.values())) for record in evidence.records]}"
        if distributed.rank() == finite_ones.index(False):
            _write_evidence(evidence, losses, state, output)
    raise NonFiniteLoss(
        f"step {state.step + 1}: {what}. {output / FOLDER / 'report.json'} has the details, {going_on}; a lower train.lr, some "
        "train.warmup_steps or train.clip_norm often helps"
    )


def _write_evidence(evidence: Evidence, losses: Mapping[str, torch.Tensor], state: TrainState[Any], output: Path) -> None:
    module = None
    if distributed.world_size() == 1:  # a forward pass of one process would wait for the others; the replay names the module then
        with torch.no_grad(), state.precision.autocast():
            module = first_nonfinite_module(state.model, evidence.run)
    save_weights(output / FOLDER / "model.safetensors", state.model.state_dict(), evidence.metadata)
    write_nonfinite_report(
        output,
        step=state.step + 1,
        losses={name: float(loss.detach()) for name, loss in losses.items()},
        batch={name: tensor.detach().cpu().contiguous() for name, tensor in evidence.tensors.items()},
        records=evidence.records,
        module=module,
        command=f"python tools/{state.tool}.py --replay {output / FOLDER}",
    )


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
    place = Path(folder) / FOLDER
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
