"""What is computed in which type, and what a device cannot do."""

from __future__ import annotations

import pytest
import torch

from resbackbone.errors import InputError
from resbackbone.runtime.precision import Precision


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_cpu(name: str, dtype: torch.dtype) -> None:
    precision = Precision(name, "cpu")
    linear = torch.nn.Linear(4, 4)
    with precision.autocast():
        output = linear(torch.ones(1, 4))
    assert output.dtype == precision.dtype == dtype
    assert linear.weight.dtype == torch.float32
    # The scaler does nothing, so that a loop can always call it.
    assert not precision.scaler.is_enabled()
    loss = output.float().sum()
    assert precision.scaler.scale(loss) is loss
    assert precision.scaler.state_dict() == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fp16", "train.precision=fp16 needs a GPU, and this run is on cpu; use bf16 or fp32"),
        ("bf61", "train.precision=bf61 is not one of bf16, fp16, fp32; did you mean 'bf16'"),
    ],
)
def test_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Precision(name, "cpu")


@pytest.mark.gpu
def test_fp16_on_a_gpu_scales() -> None:
    precision = Precision("fp16", "cuda")
    assert precision.scaler.is_enabled()
    with precision.autocast():
        assert torch.nn.Linear(4, 4, device="cuda")(torch.ones(1, 4, device="cuda")).dtype == torch.float16
