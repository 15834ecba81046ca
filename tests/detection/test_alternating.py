"""4-step alternating training: what learns in each step and what stays, whose proposals are used, and going on where it stopped."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from literal_steps import tiny_detector, tiny_images
from safetensors.torch import load_file

from detection import alternating
from detection.alternating import HalfRCNN, train_alternating
from detection.config import DetectionConfig, load_detection_config
from detection.structures import Target
from resbackbone.errors import InputError
from resbackbone.runtime.config import save_config
from tools import train_det

TINY = [
    "data.kind=coco",
    "data.min_size=48",
    "data.max_size=64",
    "data.workers=0",
    "model.head=fpn",
    "model.backbone.name=resnet20_cifar",
    "model.backbone.weights=null",
    "model.backbone.norm=batch",
    "model.backbone.freeze_at=0",
    "model.roi.samples=8",
    "model.roi.head_width=16",
    "model.roi.proposals_train=50",
    "model.test.score_threshold=0.0",
    "train.protocol=alternating",
    "train.steps=2",
    "train.batch_size=2",
    "train.reference_batch=2",
    "train.warmup_steps=0",
    "train.schedule=constant",
    "train.precision=fp32",
    "train.eval_every=0",
    "eval.samples=0",
    "eval.report=false",
]


def _config(data: Path) -> DetectionConfig:
    return load_detection_config(None, [f"data.root={data}", *TINY])


@pytest.fixture(scope="module")
def run(tiny_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alternating") / "run"
    recipe = output.parent / "recipe.yaml"
    recipe.write_text(f"data: {{root: {tiny_coco}}}\n")
    assert train_det.main(["--config", str(recipe), "--output", str(output), *TINY]) == 0
    return output


def _equal(one: dict, other: dict, part: str) -> bool:
    names = [name for name in one if name.startswith(part) and not name.endswith("num_batches_tracked")]
    assert names
    return all(torch.equal(one[name], other[name]) for name in names)


def test_each_step_changes_its_own_part(run: Path) -> None:
    files = [*(run / f"step_{number}/model_final.safetensors" for number in (1, 2, 3)), run / "model_final.safetensors"]
    first, second, third, last = (load_file(path) for path in files)
    assert not _equal(first, second, "backbone.")  # two networks of their own
    assert not _equal(first, second, "roi_head.")  # the detector's head learned in the second
    for later in (third, last):
        assert _equal(second, later, "backbone.")  # statistics included
    assert _equal(second, third, "roi_head.")
    assert not _equal(first, third, "rpn.")
    assert _equal(third, last, "rpn.")
    assert not _equal(third, last, "roi_head.")
    assert (run / "eval/metrics.json").is_file()


def test_a_stopped_training_goes_on_in_its_step(run: Path, tiny_coco: Path, tmp_path: Path) -> None:
    wanted, copy = load_file(run / "model_final.safetensors"), tmp_path / "copy"
    copy.mkdir()
    for number in (1, 2):
        shutil.copytree(run / f"step_{number}", copy / f"step_{number}")
    before = (copy / "step_2/model_final.safetensors").stat().st_mtime_ns
    train_alternating(_config(tiny_coco), copy, resume="auto")
    assert (copy / "step_2/model_final.safetensors").stat().st_mtime_ns == before
    found = load_file(copy / "model_final.safetensors")
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def _finished_steps(run: Path, copy: Path) -> Path:
    for number in (1, 2, 3):
        shutil.copytree(run / f"step_{number}", copy / f"step_{number}")
    return copy


@pytest.mark.parametrize("change", ["train.lr=0.5", "train.steps=3", "model.test.context=true", "data.flip=false"])
def test_finished_steps_of_other_settings_are_not_taken(run: Path, tiny_coco: Path, tmp_path: Path, change: str) -> None:
    copy = _finished_steps(run, tmp_path / "copy")
    config = load_detection_config(None, [f"data.root={tiny_coco}", *TINY, change])
    with pytest.raises(InputError, match=rf"step_1 holds a run with other settings: {change.partition('=')[0]}: .* → .*--output"):
        train_alternating(config, copy, resume="auto")
    assert not (copy / "checkpoints").exists()


def test_a_folder_that_is_taken_is_said_before_the_first_step(tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternating, "train", lambda config, folder, **options: pytest.fail(f"{folder} was trained"))
    config = _config(tiny_coco)
    joint = dataclasses.replace(config, train=dataclasses.replace(config.train, protocol="joint"))
    save_config(joint, tmp_path / "config.yaml")
    with pytest.raises(InputError, match="another run is in this folder"):
        train_alternating(config, tmp_path)
    with pytest.raises(InputError, match=r"holds a run with other settings: train\.protocol: joint → alternating"):
        train_alternating(config, tmp_path, resume="auto")


def test_settings_without_weight_may_change(run: Path, tiny_coco: Path, tmp_path: Path) -> None:
    copy = _finished_steps(run, tmp_path / "copy")
    changes = ["eval.samples=1", "eval.report=true", "train.log_every=1", "model.test.score_threshold=0.01"]
    train_alternating(load_detection_config(None, [f"data.root={tiny_coco}", *TINY, *changes]), copy, resume="auto")
    wanted, found = (load_file(folder / "model_final.safetensors") for folder in (run, copy))
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def test_half_detectors_are_neither_drawn_nor_reported(tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(alternating, "train", lambda config, folder, **options: ran.append((folder.name, config.eval)))
    config = load_detection_config(None, [f"data.root={tiny_coco}", *TINY, "eval.samples=3", "eval.report=true"])
    train_alternating(config, tmp_path / "run")
    assert [(name, one.samples, one.report) for name, one in ran] == [*((f"step_{n}", 0, False) for n in (1, 2, 3)), ("run", 3, True)]


def test_one_checkpoint_cannot_resume_four_runs(tiny_coco: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give --resume auto"):
        train_alternating(_config(tiny_coco), tmp_path, resume="somewhere/step_00000002")


def _targets() -> list[Target]:
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
    empty = torch.zeros(0, 4)
    return [
        Target(boxes=boxes, labels=torch.tensor([1]), ignore_boxes=empty, image_id=i, index=i, original_size=(64, 80), seed=i)
        for i in range(2)
    ]


@pytest.mark.parametrize("head", ["fpn", "c4"])
@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("learns", ["rpn", "regions"])
def test_losses_and_gradients_are_those_of_one_half(learns: str, stays: bool, head: str) -> None:
    images = [tiny_images()[0], tiny_images()[2]]
    whole = tiny_detector(head, "model.mask=false")
    both = whole(images, _targets())
    half = HalfRCNN(whole, learns=learns, backbone_stays=stays).train()
    losses = half(images, _targets())
    assert set(losses) == ({"rpn_objectness", "rpn_box"} if learns == "rpn" else {"roi_class", "roi_box"})
    if learns == "rpn":
        for name, value in losses.items():
            torch.testing.assert_close(value, both[name])
    sum(losses.values()).backward()
    parts = {name.split(".")[0] for name, p in half.named_parameters() if p.grad is not None and p.grad.any()}
    assert parts == {"rpn" if learns == "rpn" else "roi_head", *([] if stays else ["backbone"])}
    assert {name.split(".")[0] for name, p in half.named_parameters() if p.requires_grad} == parts


def test_regions_come_from_the_proposer() -> None:
    images = [tiny_images()[0], tiny_images()[2]]
    whole, proposer = tiny_detector("fpn"), tiny_detector("fpn", seed=1)
    half = HalfRCNN(whole, learns="regions", proposer=proposer).eval()
    seen, encoded = proposer.encode(images), whole.encode(images)
    proposals = proposer.rpn.propose(seen.predictions, seen.sizes, proposer.rpn.train_limits)
    wanted = whole.region_losses(encoded, proposals, _targets(), whole.generators(_targets(), encoded), across_processes=True)
    looks: list[object] = []
    whole.rpn.register_forward_hook(lambda *seen: looks.append(seen))
    losses = half(images, _targets())
    assert not looks, "its own RPN has no part in it"
    assert {name: value.item() for name, value in losses.items()} == {name: value.item() for name, value in wanted.items()}
    own = HalfRCNN(whole, learns="regions").eval()(images, _targets())
    assert losses["roi_class"].item() != own["roi_class"].item()
    assert half.state_dict().keys() == whole.state_dict().keys()
