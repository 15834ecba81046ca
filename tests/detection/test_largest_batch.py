"""The largest batch that fits: the search against known limits, real steps of a tiny detector, and every way it can fail."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from detection import largest_batch as module
from detection.config import DetectionConfig, load_detection_config, load_split
from detection.faster_rcnn import FasterRCNN, check_boxes
from detection.largest_batch import (
    MOST,
    PATIENCE_S,
    WORTH_TRYING,
    Demand,
    Trial,
    demand_of,
    largest_batch,
    search,
    try_here,
    try_in_a_process,
)
from resbackbone.errors import InputError
from resbackbone.runtime.distributed import Process
from tools.train_det import main

TINY = (
    "model.head=fpn",
    "model.backbone.name=resnet18",
    "model.backbone.weights=null",
    "model.backbone.norm=group",
    "model.backbone.freeze_at=0",
    "model.roi.head_width=16",
    "model.roi.samples=16",
    "data.min_size=[32,48]",
    "data.max_size=64",
    "train.device=cpu",
)
DEMAND = Demand(size=(48, 64), boxes=3, masks=False, classes=2)
CPU = torch.device("cpu")


def tiny(*overrides: str) -> DetectionConfig:
    return load_detection_config(None, [*TINY, *overrides])


def machine(fits: Callable[[int], bool], tried: list[int], *, peak: Callable[[int], float] = float, seconds: float = 0.1) -> Callable:
    """A trial on a machine that needs `peak` MB for a batch and has room where `fits` says so."""

    def trial(batch_size: int) -> Trial | None:
        tried.append(batch_size)
        return Trial(batch_size, peak(batch_size), seconds * batch_size) if fits(batch_size) else None

    return trial


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 7, 8, 9, 63, 100, MOST - 1, MOST, 5000])
def test_doubling_finds_the_largest(limit: int) -> None:
    tried: list[int] = []
    trials, least_too_many = search(
        machine(lambda batch_size: batch_size <= limit, tried), following=lambda trials: 2 * trials[-1].batch_size
    )
    assert (trials[-1].batch_size if trials else 0) == min(limit, MOST)
    assert least_too_many == min(limit, MOST) + 1
    assert len(tried) == len(set(tried)) <= 21
    assert [one.batch_size for one in trials] == sorted(one.batch_size for one in trials)


PEAKS = {"line": lambda n: 500 + 37 * n, "steeper": lambda n: 500 + 30 * n + 0.2 * n**2, "flatter": lambda n: 500 + 60 * n**0.9}


@pytest.mark.parametrize("limit", [537, 600, 1000, 9000])
@pytest.mark.parametrize("shape", PEAKS)
def test_the_line_comes_close_in_few_steps(shape: str, limit: float) -> None:
    peak, tried = PEAKS[shape], []
    trials, _ = search(
        machine(lambda batch_size: peak(batch_size) <= limit, tried, peak=peak),
        following=lambda trials: module._next_on_the_line(trials, limit),
    )
    most = max((batch_size for batch_size in range(1, MOST + 1) if peak(batch_size) <= limit), default=0)
    found = trials[-1].batch_size if trials else 0
    assert most / (WORTH_TRYING + 0.05) <= found <= most
    assert len(tried) <= 8


def test_no_step_that_takes_for_ever() -> None:
    tried: list[int] = []
    search(machine(lambda _: True, tried, seconds=PATIENCE_S / 100), following=lambda trials: module._next_on_the_line(trials, 1000))
    assert tried == [1, 2]
    tried.clear()
    search(machine(lambda _: True, tried, seconds=PATIENCE_S / 2000), following=lambda trials: module._next_on_the_line(trials, 1000))
    assert tried == [1, 2, 1000]


def test_memory_that_does_not_grow_is_no_reason_to_divide_by_zero() -> None:
    trials, _ = search(
        machine(lambda _: True, [], peak=lambda _: 7.0, seconds=1e-3), following=lambda trials: module._next_on_the_line(trials, 9)
    )
    assert trials[-1].batch_size == MOST


def test_the_most_that_data_can_ask_for(tiny_coco: Path) -> None:
    """Images of 48×64 and 64×48: a mixed batch is padded to 64×64, at the largest of the sizes trained at."""
    config = tiny(f"data.root={tiny_coco}", "model.mask=true")
    source = load_split(config, "train")
    demand, annotations = demand_of(config, source), source.annotations
    counts = [annotations.of_image(index).stop - annotations.of_image(index).start for index in range(len(annotations))]
    assert demand == Demand(size=(64, 64), boxes=max(counts), masks=True, classes=2)
    batch = demand.batch(3)
    check_boxes(batch.targets)
    assert [image.shape for image in batch.images] == [(3, 64, 64)] * 3
    assert [(len(target.boxes), target.masks.shape) for target in batch.targets if target.masks is not None] == [
        (demand.boxes, (demand.boxes, 64, 64))
    ] * 3


@pytest.mark.parametrize("keep", [[], ["images"]])
def test_nothing_to_train_on_is_said_as_in_training(keep: list[str], tiny_coco: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").symlink_to(tiny_coco / "train2017")
    content = json.loads((tiny_coco / "annotations" / "instances_train2017.json").read_text())
    content = {key: value if key == "categories" or key in keep else [] for key, value in content.items()}
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"no image is left to use.*data\.train"):
        largest_batch(tiny(f"data.root={tmp_path}"), limit_mb=1000, log=lambda text: None)


def test_images_that_training_drops_ask_for_nothing(tiny_coco: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").symlink_to(tiny_coco / "train2017")
    path = tiny_coco / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    wide = [one["id"] for one in content["images"] if one["width"] == 64]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in wide]
    (tmp_path / "annotations" / path.name).write_text(json.dumps(content))
    sizes = {}
    for rule in ("drop", "keep"):
        config = tiny(f"data.root={tmp_path}", f"data.empty_images={rule}")
        sizes[rule] = demand_of(config, load_split(config, "train")).size
    assert sizes == {"drop": (48, 64), "keep": (64, 64)}


@pytest.mark.parametrize("mask", ["false", "true"])
def test_real_steps(mask: str) -> None:
    demand = Demand(size=(48, 64), boxes=3, masks=mask == "true", classes=2)
    one = try_here(tiny(f"model.mask={mask}", "train.ema=0.9", "train.accumulate=3"), demand, 2, CPU)
    assert one is not None
    assert one.batch_size == 2
    assert one.seconds > 0
    assert one.peak_mb > 50


def test_out_of_memory_is_an_answer_and_other_errors_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: FasterRCNN, images: list[torch.Tensor], targets: object) -> dict[str, torch.Tensor]:
        if len(images) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if len(images) == 4:
            raise RuntimeError("broken kernel")
        return {"loss": sum(parameter.sum() for parameter in self.parameters())}

    monkeypatch.setattr(FasterRCNN, "forward", forward)
    trials, _ = search(lambda batch_size: try_here(tiny(), DEMAND, batch_size, CPU), following=lambda trials: 5 * trials[-1].batch_size)
    assert [one.batch_size for one in trials] == [1, 5]
    with pytest.raises(RuntimeError, match="broken kernel"):
        try_here(tiny(), DEMAND, 4, CPU)


class Killed(Demand):
    """A batch for which the system ends the process."""

    def batch(self, images: int) -> None:  # type: ignore[override]
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_the_system_kills_had_too_many() -> None:
    assert try_in_a_process(tiny(), Killed(size=(32, 32), boxes=1, masks=False, classes=1), 1, limit_mb=1e6) is None


@pytest.mark.parametrize("more", [["--output", "runs/a"], ["--resume", "auto"]])
def test_nothing_is_measured_into_a_run(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--config", "c.yaml", "--largest-batch", *more])
    assert caught.value.code == 2
    assert "only measures" in capsys.readouterr().err


def test_the_tool_prints_a_table_and_leaves_nothing(
    tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real processes; the line's promise is not tried, since patience is set to nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    monkeypatch.setattr(module, "available_mb", lambda: 1e6)
    config = tmp_path / "tiny.yaml"
    config.write_text("{}\n")
    assert main(["--config", str(config), "--largest-batch", *TINY, f"data.root={tiny_coco}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("images of 64×64 px")
    assert said[1] == "may use 900,000 MB of memory on cpu"
    assert [line.split()[0] for line in said[2:4]] == ["1", "2"]
    assert "not tried" in said[4]
    assert said[-1] == f"train.batch_size={said[-2].split()[-1]}"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_not_even_one(tiny_coco: Path) -> None:
    with pytest.raises(InputError, match=r"not even one image fits into 10 MB\. Set model\.backbone\.checkpointing=true"):
        largest_batch(tiny(f"data.root={tiny_coco}"), limit_mb=10, log=lambda text: None)


def test_less_than_the_config_has_is_accumulated(tiny_coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module, "try_in_a_process", lambda config, demand, n, *, limit_mb: Trial(n, 100 * n, n) if 100 * n <= limit_mb else None
    )
    said: list[str] = []
    assert largest_batch(tiny(f"data.root={tiny_coco}", "train.batch_size=16"), limit_mb=799, log=said.append) == 7
    assert said[-1].endswith("train.batch_size=6 train.accumulate=3")
    assert largest_batch(tiny(f"data.root={tiny_coco}", "train.batch_size=6"), limit_mb=799, log=said.append) == 7
    assert said[-1].endswith("train.batch_size=7")


def test_nothing_is_promised_that_was_tried_in_vain(tiny_coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line through 1 and 2 promises 70; the system kills whatever has more than 5."""
    monkeypatch.setattr(module, "try_in_a_process", lambda config, demand, n, *, limit_mb: Trial(n, 10 * n, n) if n <= 5 else None)
    said: list[str] = []
    assert largest_batch(tiny(f"data.root={tiny_coco}", "train.batch_size=1"), limit_mb=700, log=said.append) == 5
    assert not [line for line in said if "not tried" in line]


def test_one_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.distributed, "setup", lambda device: Process(rank=0, world_size=2, local_rank=0, device=CPU))
    with pytest.raises(InputError, match="without torchrun"):
        largest_batch(tiny())
