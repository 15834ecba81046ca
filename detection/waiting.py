"""What makes the host wait for the device, and how a training step does without it.

A GPU works behind the host. Whoever asks it for a value, or for a result whose size hangs on values (`nonzero`, a mask as an index), waits
until it has come so far, and the GPU then idles until new work reaches it. So on a GPU every tensor of a training step has a size known
beforehand, and places that hold nothing are marked; on a CPU, where asking costs nothing, tensors have the size of what there is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_asking_free(tensor: Tensor) -> bool:
    """Whether values of `tensor` can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def constant(values: Sequence[float] | Sequence[Sequence[float]], *, like: Tensor) -> Tensor:
    """Numbers of the host as a tensor with the dtype and device of `like`: what `new_tensor` gives, which waits until they are there."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)
