"""The optimiser a config names."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from resbackbone.errors import InputError
from resbackbone.runtime.optimizer import build_optimizer
from resbackbone.runtime.schedule import set_lr


@dataclass(frozen=True, kw_only=True)
class Settings:
    optimizer: str = "sgd"
    momentum: float = 0.8
    weight_decay: float = 0.01


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_it_takes_what_is_not_frozen(name: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, Settings(optimizer=name), lr=0.1)
    (group,) = optimizer.param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in model[1].parameters()]
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.01)
    assert (group["betas"][0] if name == "adamw" else group["momentum"]) == 0.8
    set_lr(optimizer, 0.5)
    assert group["lr"] == 0.5


def test_groups_keep_their_own_decay() -> None:
    model = torch.nn.Linear(2, 2)
    groups = [{"params": [model.weight], "weight_decay": 0.5}, {"params": [model.bias], "weight_decay": 0.0}]
    optimizer = build_optimizer(model, Settings(optimizer="adamw"), lr=0.1, groups=groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_adamw_takes_steps_of_one_size_whatever_the_gradients() -> None:
    """Loshchilov & Hutter 2019, algorithm 2, first step: lr times the gradient's sign, and the decay on its own."""
    start = torch.tensor([1.0, -2.0])
    for scale in (1.0e-3, 1.0, 1.0e3):
        model = torch.nn.ParameterList([start.clone()])
        optimizer = build_optimizer(model, Settings(optimizer="adamw"), lr=0.1)
        (model[0] * torch.tensor([scale, -scale])).sum().backward()
        optimizer.step()
        expected = start * (1 - 0.1 * 0.01) - 0.1 * torch.tensor([1.0, -1.0])
        torch.testing.assert_close(model[0].detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_nothing_left_to_train(name: str) -> None:
    with pytest.raises(InputError, match="every parameter is frozen"):
        build_optimizer(torch.nn.Linear(1, 1).requires_grad_(False), Settings(optimizer=name), lr=0.1)
