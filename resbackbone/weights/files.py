"""Weights files: safetensors and torch's own formats, read without executing anything in them."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from resbackbone.errors import InputError, nearest
from resbackbone.weights.reading import find_state_dict, reading
from resbackbone.weights.torch_tar import is_torch_tar, read_torch_tar

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
        tensors, metadata = read_torch_tar(path) if is_torch_tar(path) else _read_torch(path), {}
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


def _read_torch(path: Path) -> dict[str, Tensor]:
    with reading(path, "torch file"):
        try:
            return find_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except pickle.UnpicklingError as error:
            wanted = re.search(r"GLOBAL (\S+)", str(error))  # the rest of torch's text recommends weights_only=False
            asks = f" (it asks for {wanted[1]})" if wanted else ", or is damaged"
            raise InputError(
                f"is not a file of tensors alone{asks}; nothing else in it is run or read, because it could be harmful. If you trust its "
                "source, convert it there to .safetensors; if it may be cut off, copy or download it again"
            ) from error
