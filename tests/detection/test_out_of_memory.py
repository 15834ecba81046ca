"""Running out of memory names the images and what helps; any other error passes as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import nn

from detection.build import build_detector
from detection.config import DetectionConfig, TrainConfig, load_detection_config
from detection.faster_rcnn import FasterRCNN
from detection.out_of_memory import explain_out_of_memory, what_helps
from detection.segmentation.config import check_share, load_segmentation_config
from detection.structures import Batch, Target
from detection.train_state import TrainState
from resbackbone.errors import InputError
from resbackbone.runtime import distributed
from resbackbone.runtime.memory import is_out_of_memory
from resbackbone.runtime.sampler import ResumableBatchSampler
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


def settings(*overrides: str) -> DetectionConfig:
    return load_detection_config(None, overrides)


def test_the_cpu_s_own_words() -> None:
    """What torch really says when it can't have 2^60 bytes."""
    config = settings("train.batch_size=8", "train.precision=fp32")
    with pytest.raises(InputError) as caught, explain_out_of_memory(batch(), config, nn.Linear(1, 1)):
        torch.empty(1 << 60, dtype=torch.uint8)
    said = str(caught.value)
    assert "on 2 images: 139 (20×30 px, 2 boxes), 2008_000008 (40×50 px, 700 boxes)" in said
    assert "train.precision=bf16" in said
    assert "train.batch_size=4 train.accumulate=2" in said


@pytest.mark.parametrize(
    ("overrides", "first", "never"),
    [
        (("train.batch_size=1", "train.precision=bf16"), "model.backbone.checkpointing=true", ("bf16", "train.batch_size")),
        (("train.batch_size=1", "train.precision=fp16"), "model.backbone.checkpointing=true", ("bf16",)),
        (("train.batch_size=1", "train.precision=fp32"), "train.precision=bf16", ()),
        (("train.batch_size=1", "model.backbone.checkpointing=true"), "smaller data.min_size", ("bf16", "checkpointing", "checkpoint")),
        (("train.batch_size=2",), "train.batch_size=1 train.accumulate=2 ", ("bf16",)),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, tuple) else None,
)
def test_what_is_said_fits_the_settings(overrides: tuple[str, ...], first: str, never: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught, explain_out_of_memory(batch(), settings(*overrides), nn.Linear(1, 1)):
        raise MemoryError
    said = str(caught.value)
    assert f". Set {first}" in said
    assert not [words for words in never if words in said]


@pytest.mark.parametrize(("batch_size", "parts"), [(8, (4, 2)), (3, (1, 3)), (9, (3, 3)), (5, (1, 5))])
def test_the_smaller_parts_make_the_same_step(batch_size: int, parts: tuple[int, int]) -> None:
    said = what_helps(TrainConfig(batch_size=batch_size, precision="bf16", accumulate=2), batch_size=batch_size)
    assert f"train.batch_size={parts[0]} train.accumulate={2 * parts[1]} " in said
    assert parts[0] * parts[1] == batch_size


@pytest.mark.parametrize(
    ("batch_size", "processes", "images", "wanted"),
    [
        (8, 8, 1, None),  # one image each is the least
        (16, 8, 1, 8),
        (24, 8, 1, 8),
        (12, 4, 1, 4),
        (8, 2, 1, 4),
        (30, 2, 1, 10),
        (16, 8, 2, None),
        (32, 8, 2, 16),
        (24, 8, 2, None),
        (3, 1, 2, None),
    ],
)
def test_every_process_gets_its_share(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, processes: int, images: int, wanted: int | None
) -> None:
    """The advice is what our own code takes, under torchrun as well."""
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    said = what_helps(TrainConfig(batch_size=batch_size), batch_size=batch_size, images=images)
    advised = re.search(r"train\.batch_size=(\d+) train\.accumulate=(\d+)", said)
    assert (int(advised[1]) if advised else None) == wanted
    if advised is None:
        assert "checkpoint keeps" not in said
        return
    assert int(advised[1]) * int(advised[2]) == batch_size
    ResumableBatchSampler(100, batch_size=int(advised[1]), seed=0, world_size=processes)
    if images == 2:
        check_share(int(advised[1]), processes)


def test_a_segmenter_s_share_is_two_images() -> None:
    for head, is_advised in (("deeplabv3", False), ("fcn", True)):
        config = load_segmentation_config(None, [f"model.head={head}", "train.batch_size=3"])
        with pytest.raises(InputError) as caught, explain_out_of_memory(batch(), config, nn.BatchNorm2d(1)):
            raise MemoryError
        assert ("train.batch_size=1 train.accumulate=3" in str(caught.value)) is is_advised
        assert "model.weights" not in str(caught.value), "a segmenter's config has no such setting"


@pytest.mark.parametrize(
    ("norm", "training", "is_same"),
    [
        (nn.BatchNorm2d(4), True, False),
        (nn.SyncBatchNorm(4), True, False),
        (nn.BatchNorm2d(4), False, True),
        (nn.GroupNorm(2, 4), True, True),
    ],
    ids=str,
)
def test_batch_norms_see_smaller_parts(norm: nn.Module, training: bool, is_same: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm.train(training))
    with pytest.raises(InputError) as caught, explain_out_of_memory(batch(), settings("train.batch_size=8"), model):
        raise MemoryError
    assert ("the same step" in str(caught.value)) is is_same
    assert ("batch norms" in str(caught.value)) is not is_same


@pytest.mark.parametrize(("norm", "is_same"), [("batch", False), ("sync", False), ("frozen", True), ("eval", True), ("group", True)])
def test_of_a_detector_s_own_norms(norm: str, is_same: bool) -> None:
    config = settings(
        "model.head=fpn", "model.backbone.name=resnet18", "model.backbone.weights=null", f"model.backbone.norm={norm}", "train.batch_size=8"
    )
    detector = build_detector(config, 2, initial_weights=False).train()
    with pytest.raises(InputError) as caught, explain_out_of_memory(batch(), config, detector):
        raise MemoryError
    assert ("the same step" in str(caught.value)) is is_same


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), ZeroDivisionError()])
def test_other_errors_pass(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), explain_out_of_memory(batch(), settings(), nn.Linear(1, 1)):
        raise error


def out_of_memory(*given: object, **named: object) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize(
    ("where", "name"), [(FasterRCNN, "forward"), (Batch, "to"), (TrainState, "update")], ids=["forward", "copying a batch", "optimiser"]
)
def test_a_run_ends_with_these_words(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: type, name: str
) -> None:
    monkeypatch.setattr(where, name, out_of_memory)
    options = ["data.workers=0", "train.batch_size=2", "train.save_every=1000", "train.steps=2", "train.warmup_steps=0"]
    assert main(["--config", str(repository / "configs" / "demo_shapes.yaml"), "--output", str(tmp_path), *options]) == 1
    said = capsys.readouterr().err
    assert "out of memory in a training step on 2 images" in said
    assert "train.batch_size=1 train.accumulate=2" in said
    assert "bf16" not in said, "it is set"


def test_what_is_advised_for_a_run_that_goes_on_works(
    tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(f"data: {{root: {tiny_coco}, min_size: 64, max_size: 64, workers: 0}}\n")
    model = ["model.head=fpn", "model.backbone.name=resnet18", "model.backbone.weights=null", "model.backbone.norm=group"]
    model += ["model.roi.samples=32", "model.roi.head_width=16"]
    train = ["train.steps=2", "train.save_every=1", "train.warmup_steps=0", "train.batch_size=2", "train.precision=fp32"]
    options = [*model, *train, "train.milestones=[]", "eval.samples=1", "eval.report=false"]
    command = ["--config", str(tmp_path / "tiny.yaml"), "--output"]
    update = TrainState.update
    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "update", lambda state: out_of_memory() if state.step else update(state))
        assert main([*command, str(tmp_path / "first"), *options]) == 1
    said = capsys.readouterr().err
    assert "A run that goes on from a checkpoint keeps its batch size: set another of these, or begin in a new --output" in said
    smaller = ["train.batch_size=1", "train.accumulate=2"]
    assert f"{' '.join(smaller)} (the same step in smaller parts)" in said
    assert "with model.weights=a checkpoint" in said

    resumed = [*command, str(tmp_path / "first"), "--resume", "auto", *options]
    assert main([*resumed, *smaller]) == 1
    assert "train.batch_size = 2" in capsys.readouterr().err
    others = ["train.precision=bf16", "model.backbone.checkpointing=true", "data.min_size=48", "data.max_size=48"]
    assert main([*resumed, *others]) == 0
    checkpoint = max((tmp_path / "first" / "checkpoints").iterdir())
    assert main([*command, str(tmp_path / "second"), *options, *smaller, f"model.weights={checkpoint}"]) == 0
