"""The first module whose output was not finite is named, and what is left behind replays the batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from resbackbone.errors import InputError
from resbackbone.runtime.nonfinite import first_nonfinite_module, write_nonfinite_report


class Log(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        return {"maps": [x.detach().clone(), x.log()], "labels": [torch.tensor([1])]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Identity(), Log())
        self.head = nn.Identity()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.stem(x)["maps"]
        self.calls += 1
        return self.head(maps[1]).sum()


@pytest.mark.parametrize(
    ("value", "expected"), [(1.0, None), (0.0, "stem.1 (Log)"), (-1.0, "stem.1 (Log)"), (float("nan"), "stem.0 (Identity)")]
)
def test_the_innermost_first_module(value: float, expected: str | None) -> None:
    net = Net()
    assert first_nonfinite_module(net, lambda: net(torch.full((2,), value))) == expected
    assert not any(module._forward_hooks for module in net.modules())
    assert net.calls == (expected is None)


def test_the_model_itself_and_empty_outputs() -> None:
    class Bare(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
            return x / 0, None, torch.zeros(0)

    bare = Bare()
    assert first_nonfinite_module(bare, lambda: bare(torch.ones(1))) == "Bare"
    assert first_nonfinite_module(bare, lambda: bare(torch.ones(0))) is None


def test_an_error_in_the_replay_is_not_hidden() -> None:
    net = Net()
    with pytest.raises(AttributeError):
        first_nonfinite_module(net, lambda: net("x"))
    assert not any(module._forward_hooks for module in net.modules())


def test_report(tmp_path: Path) -> None:
    batch = {"image_0": torch.arange(12, dtype=torch.uint8).view(3, 2, 2), "boxes_0": torch.zeros(0, 4)}
    place = write_nonfinite_report(
        tmp_path,
        step=7,
        losses={"rpn_box": torch.tensor(float("nan")), "roi_class": 1.5, "roi_box": float("inf")},
        batch=batch,
        records=[{"image_id": 139, "boxes": [[0.0, 0.0, float("nan"), 5.0]]}],
        module="rpn (ProposalNetwork)",
        command="python tools/train_det.py …",
    )
    assert place == tmp_path / "nonfinite"
    report = json.loads((place / "report.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert report["losses"] == {"rpn_box": "nan", "roi_class": 1.5, "roi_box": "inf"}
    assert report["images"] == [{"image_id": 139, "boxes": [[0.0, 0.0, "nan", 5.0]]}]
    assert (report["step"], report["first_nonfinite_module"]) == (7, "rpn (ProposalNetwork)")
    assert report["replay"] == "python tools/train_det.py …"
    loaded = load_file(place / report["batch"])
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in batch.items())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "nonfinite").write_text("")
    with pytest.raises(InputError, match="a file stands where"):
        write_nonfinite_report(tmp_path, step=1, losses={}, batch={}, records=[], module=None, command="")
