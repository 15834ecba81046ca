"""What makes the host wait for the device, and how a training step does without it.

A GPU works behind the host. Whoever asks it for a value, or for a result whose size hangs on values (`nonzero`, a mask as an index), waits
until it has come so far, and the GPU then idles until new work reaches it. So on a GPU every tensor of a training step has a size known
beforehand, and places that hold nothing are marked. On a CPU asking costs nothing, and tensors have the size of what there is; devices
that are neither go this way too, which needs no operator that they might lack.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_asking_free(tensor: Tensor) -> bool:
    """Whether values of `tensor` may be asked for: no GPU has to be waited for."""
    return tensor.device.type != "cuda"


def constant(values: Sequence[float] | Sequence[Sequence[float]], *, like: Tensor) -> Tensor:
    """Numbers of the host as a tensor with the dtype and device of `like`: what `new_tensor` gives, which waits until they are there."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)
