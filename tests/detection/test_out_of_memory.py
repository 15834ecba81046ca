"""Running out of memory names the images and what helps; any other error passes as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detection.config import TrainConfig
from detection.faster_rcnn import FasterRCNN
from detection.out_of_memory import explain_out_of_memory, what_helps
from detection.structures import Batch, Target
from resbackbone.errors import InputError
from resbackbone.runtime.memory import is_out_of_memory
from tools.train_det import main


def batch() -> Batch:
    images = [torch.zeros((3, 20, 30), dtype=torch.uint8), torch.zeros((3, 40, 50), dtype=torch.uint8)]
    targets = [
        Target(
            boxes=torch.zeros((count, 4)),
            labels=torch.ones(count, dtype=torch.int64),
            ignore_boxes=torch.zeros((0, 4)),
            image_id=image_id,
            index=0,
            original_size=(20, 30),
        )
        for image_id, count in ((139, 2), ("2008_000008", 700))
    ]
    return Batch(images=images, targets=targets)


def test_the_cpu_s_own_words() -> None:
    """What torch really says when it can't have 2^60 bytes."""
    with pytest.raises(InputError) as caught, explain_out_of_memory(batch(), TrainConfig(batch_size=8, precision="fp32")):
        torch.empty(1 << 60, dtype=torch.uint8)
    said = str(caught.value)
    assert "on 2 images: 139 (20×30 px, 2 boxes), 2008_000008 (40×50 px, 700 boxes)" in said
    assert "train.precision=bf16" in said
    assert "train.batch_size=4 train.accumulate=2" in said


def test_what_is_said_fits_the_settings() -> None:
    with (
        pytest.raises(InputError, match=r"Set model\.backbone\.checkpointing=true"),
        explain_out_of_memory(batch(), TrainConfig(batch_size=1, precision="bf16")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize(("batch_size", "parts"), [(8, (4, 2)), (3, (1, 3)), (9, (3, 3)), (5, (1, 5))])
def test_the_smaller_parts_make_the_same_step(batch_size: int, parts: tuple[int, int]) -> None:
    said = what_helps(TrainConfig(batch_size=batch_size, precision="bf16", accumulate=2), batch_size=batch_size)
    assert f"train.batch_size={parts[0]} train.accumulate={2 * parts[1]} " in said
    assert parts[0] * parts[1] == batch_size


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), ZeroDivisionError()])
def test_other_errors_pass(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), explain_out_of_memory(batch(), TrainConfig()):
        raise error


def test_a_run_ends_with_these_words(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forward(self: FasterRCNN, images: object, targets: object) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(FasterRCNN, "forward", forward)
    options = ["data.workers=0", "train.batch_size=2", "train.save_every=1000", "train.steps=2", "train.warmup_steps=0"]
    assert main(["--config", str(repository / "configs" / "demo_shapes.yaml"), "--output", str(tmp_path), *options]) == 1
    said = capsys.readouterr().err
    assert "out of memory in a training step on 2 images" in said
    assert "train.batch_size=1 train.accumulate=2" in said
