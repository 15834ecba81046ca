"""Modules as if they were on a GPU, where there is none: tensors that have a device and a shape, but no values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class BlockingCopies(TorchDispatchMode):
    """Refuses copies from the host for which it waits: those that are not `non_blocking`."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        name = operator._schema.name
        if name in ("aten::_to_copy", "aten::copy_"):
            source, target = (args[0], result) if name == "aten::_to_copy" else (args[1], args[0])
            waits = not ((kwargs or {}).get("non_blocking", False) or (len(args) > 2 and args[2] is True))
            assert not (waits and source.device != target.device), f"{operator} waits: {source.shape}"
        return result


@contextlib.contextmanager
def as_if_on_a_gpu(module: ModuleT) -> Iterator[ModuleT]:
    """The module on a device "cuda" of tensors without values. What needs a value, or a size that hangs on values, raises."""
    with FakeTensorMode(allow_non_fake_inputs=True), BlockingCopies():
        for part in module.modules():
            for store in (part._parameters, part._buffers):
                for name, tensor in store.items():
                    if tensor is not None:
                        empty = torch.empty_like(tensor, device="cuda")
                        store[name] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        yield module
