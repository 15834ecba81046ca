"""Weights files: safetensors and torch's own formats, read without executing anything in them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resbackbone.errors import InputError, nearest
from resbackbone.weights.torch_tar import is_torch_tar, read_torch_tar

NESTED = ("state_dict", "model_state_dict", "model")  # where training scripts put the tensors of a larger checkpoint
WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read name -> tensor and the file's metadata ({} for torch files), on the CPU.

    Takes .safetensors, torch zip or legacy pickles through weights_only, and torch 0.1's tar. Raises InputError for a file that is
    missing, cut off, not a weights file, or holds code.
    """
    path = Path(path)
    start = first_bytes(path)
    if start[:1] == b"<":
        raise InputError(f"{path} is a web page, not weights; the download went wrong: fetch it again")
    if start[8:9] == b"{":
        tensors, metadata = _read_safetensors(path)
    else:
        content = read_torch_tar(path) if is_torch_tar(path) else _read_torch(path)
        tensors, metadata = _find_tensors(content, path), {}
    for wrapper in WRAPPERS:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors, metadata


def first_bytes(path: Path) -> bytes:
    """The nine bytes that tell formats apart. Raises InputError for a file that is missing, a folder, unreadable, or shorter."""
    if not path.exists():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"weights file {path} does not exist;{nearest(path.name, beside)} give a .safetensors or .pth file")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the weights file in it")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    if len(start) < 9:
        raise InputError(f"{path} is empty or cut off ({len(start)} bytes); copy or download it again")
    return start


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(
            f"{path} is not a file of tensors alone; nothing else in it is run or read, because it could be harmful ({reason}). "
            "If you trust its source, convert it there to .safetensors"
        ) from error
    # What a cut-off or foreign file makes torch raise depends on the byte where it breaks.
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{path} is not a whole torch file ({reason}); copy or download it again, or convert it to .safetensors"
        ) from error


def _find_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what torch.load returned: the content itself, or the entry of a checkpoint that holds it."""
    if isinstance(content, Mapping):
        for name in NESTED:
            if isinstance(content.get(name), Mapping):
                return _find_tensors(content[name], path)
        if content and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()):
            return dict(content)
    found = f"a dict with {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise InputError(f"{path} holds {found}, not a state dict of tensors (looked in {', '.join(NESTED)} as well)")
