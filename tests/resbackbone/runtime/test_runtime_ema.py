"""The averaged weights follow the formula, buffers included, and travel through a checkpoint."""

from __future__ import annotations

import io

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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


def test_average_is_torchs() -> None:
    """Floats and counters alike."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 2, 1))
    ours = build_ema(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        for average in (ours, theirs):
            average.update_parameters(model)
    assert int(ours.module[1].num_batches_tracked) > 0
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-6, atol=0, msg=name)


def test_average_without_buffers() -> None:
    model = torch.nn.Linear(1, 1)
    average = build_ema(model, 0.5)
    for value in (2.0, 4.0):
        torch.nn.init.constant_(model.weight, value)
        average.update_parameters(model)
    assert average.module.weight.item() == 3.0
