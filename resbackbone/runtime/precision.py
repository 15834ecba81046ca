"""bf16, fp16 or fp32: the autocast to compute under and the scaler that fp16 gradients need."""

from __future__ import annotations

import contextlib

import torch

from resbackbone.errors import InputError, nearest

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Precision:
    """What a training step computes in. Weights stay float32 throughout.

    `scaler` is a GradScaler, switched on only for fp16 (bf16 has float32's range): call it always, it then does nothing.
    Raises InputError for an unknown name, fp16 on a CPU, or bf16 on a GPU that has none.
    """

    def __init__(self, name: str, device: torch.device | str) -> None:
        self.name, self.device = name, torch.device(device)
        if name not in DTYPES:
            raise InputError(f"train.precision={name} is not one of {', '.join(DTYPES)};{nearest(name, DTYPES)}")
        if name == "fp16" and self.device.type != "cuda":
            raise InputError(f"train.precision=fp16 needs a GPU, and this run is on {self.device.type}; use bf16 or fp32")
        if name == "bf16" and self.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise InputError(f"train.precision=bf16 is not supported by {torch.cuda.get_device_name(self.device)}; use fp16 or fp32")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=name == "fp16")

    @property
    def dtype(self) -> torch.dtype:
        """What convolutions and matrix products are computed in."""
        return DTYPES[self.name]

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context for the forward pass and the loss; backward stays outside it."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)
