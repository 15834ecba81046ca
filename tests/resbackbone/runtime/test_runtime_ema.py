"""The averaged weights follow the formula, buffers included, and travel through a checkpoint."""

from __future__ import annotations

import io

import pytest
import torch

from resbackbone.errors import InputError
from resbackbone.runtime.ema import build_ema


def test_average_by_hand() -> None:
    model = torch.nn.BatchNorm1d(2)
    average = build_ema(model, 0.75)
    for weight, mean in ((1.0, 4.0), (5.0, 8.0), (9.0, 0.0)):
        with torch.no_grad():
            model.weight.fill_(weight)
            model.running_mean.fill_(mean)  # type: ignore[union-attr]
        average.update_parameters(model)
    # The first update copies; then 0.75 * old + 0.25 * new.
    assert average.module.weight.tolist() == [0.75 * (0.75 * 1 + 0.25 * 5) + 0.25 * 9] * 2
    assert average.module.running_mean.tolist() == [0.75 * (0.75 * 4 + 0.25 * 8)] * 2
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    again = build_ema(torch.nn.BatchNorm1d(2), 0.75)
    again.load_state_dict(torch.load(file, weights_only=True))
    again.update_parameters(model)
    average.update_parameters(model)
    assert torch.equal(again.module.weight, average.module.weight)


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_a_decay_that_averages_nothing(decay: float) -> None:
    with pytest.raises(InputError, match=r"train.ema=.* should be between 0 and 1"):
        build_ema(torch.nn.Linear(1, 1), decay)
