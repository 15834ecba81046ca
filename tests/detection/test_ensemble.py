"""Several detectors as one: the union of proposals, averaged classifiers; from modules, from files, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from literal_steps import TINY, Settings, detect, tiny_detector, tiny_images
from test_steps import assert_same

from detection.build import build_detector
from detection.config import load_detection_config
from detection.ensemble import Ensemble
from detection.predict import Predictor, detector_metadata, resolve_configs
from detection.score import evaluate_weights
from detection.steps import Steps
from resbackbone.errors import InputError
from resbackbone.runtime.checkpoint import save_weights
from tools import detect as detect_tool
from tools import eval_coco, eval_voc

COMBINED = Settings(refine=True, scales=(40, 64), flip=True)


@pytest.mark.parametrize("settings", [Settings(), COMBINED], ids=["plain", "with steps"])
@torch.no_grad()
def test_it_is_the_literal_ensemble(settings: Settings) -> None:
    members = [tiny_detector("c4", seed=1), tiny_detector("fpn", seed=2)]
    steps = Steps(refine=settings.refine, scales=settings.scales, flip=settings.flip)
    image = tiny_images()[0]
    (found,) = Ensemble(members, steps=steps).detect([image])
    assert_same(found, detect(members, image, settings))
    assert all(len(found) != len(alone) or not torch.equal(found.boxes, alone.boxes) for alone in (m.detect([image])[0] for m in members))


def test_one_member_is_that_detector_to_the_bit() -> None:
    member, images = tiny_detector("fpn"), tiny_images()
    for image, found in zip(images, Ensemble([member]).detect(images), strict=True):
        (alone,) = member.detect([image])
        assert len(alone) > 3
        assert torch.equal(found.boxes, alone.boxes)
        assert torch.equal(found.scores, alone.scores)


@pytest.mark.parametrize("branches", [(True, True), (True, False), (False, False)])
def test_masks_are_averaged_over_the_members_that_have_them(branches: tuple[bool, bool]) -> None:
    members = [tiny_detector("fpn", f"model.mask={str(has).lower()}", seed=seed) for seed, has in enumerate(branches)]
    image = tiny_images()[0]
    (found,) = Ensemble(members).detect([image])
    masks = []
    for member, has in zip(members, branches, strict=True):
        if has:
            encoded = member.encode([image])
            masks.append(member.mask_head.detect(encoded.features, [found], encoded.sizes)[0].masks)
    if not masks:
        assert found.masks is None
    else:
        torch.testing.assert_close(found.masks, sum(masks) / len(masks))


def _save(path: Path, head: str, classes: tuple[str, ...] = ("circle", "square", "triangle"), *settings: str) -> Path:
    config = load_detection_config(
        None,
        [f"model.head={head}", "model.backbone.name=resnet20_cifar", *TINY, "data.kind=shapes", "data.train=train", "data.val=val",
         "data.min_size=48", "data.max_size=64", "data.workers=0", "train.precision=fp32", *settings],
    )  # fmt: skip
    torch.manual_seed(0)
    detector = build_detector(config, len(classes))
    save_weights(path, detector.state_dict(), detector_metadata(config, classes, detector))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("ensemble")
    return [_save(folder / f"{head}.safetensors", head) for head in ("c4", "fpn")]


def test_files_make_an_ensemble_whose_members_keep_their_configs(weights: list[Path]) -> None:
    configs = resolve_configs(None, weights, ["model.test.refine=true"])
    assert [config.model.head for config in configs] == ["c4", "fpn"]
    predictor = Predictor(configs, weights)
    assert isinstance(predictor.detector, Ensemble)
    assert predictor.detector.steps == Steps(refine=True)
    assert predictor(np.zeros((48, 64, 3), np.uint8)).boxes.shape[1] == 4


def test_one_config_for_several_is_refused(weights: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="each weights file carries its own"):
        resolve_configs(tmp_path / "a.yaml", weights)


def test_members_of_other_classes_are_refused(weights: list[Path], tmp_path: Path) -> None:
    other = _save(tmp_path / "other.safetensors", "fpn", ("square", "circle", "triangle"))
    both = [weights[0], other]
    with pytest.raises(InputError, match=r"same classes in the same order.*other\.safetensors knows 3 \(square"):
        Predictor(resolve_configs(None, both), both)


@pytest.mark.parametrize("trained", [False, True])
def test_context_cannot_be_switched_after_training(trained: bool, tmp_path: Path) -> None:
    path = _save(tmp_path / "one.safetensors", "fpn", ("a", "b"), f"model.test.context={str(trained).lower()}")
    Predictor(resolve_configs(None, [path]), [path])
    with pytest.raises(InputError, match=f"trained with {str(trained).lower()}: context is a part of the network"):
        Predictor(resolve_configs(None, [path], [f"model.test.context={str(not trained).lower()}"]), [path])


def test_the_tools_take_several_weights_beside_settings(weights: list[Path], tmp_path: Path) -> None:
    names = [str(path) for path in weights]
    for tool in (eval_coco, eval_voc):
        args = tool.parse(["--weights", *names, "model.test.flip=true"])
        assert (args.weights, args.overrides) == (weights, ["model.test.flip=true"])
        assert tool.parse(["model.test.flip=true", "--weights", names[0], "--weights", names[1]]).weights == weights
    cv2.imwrite(str(tmp_path / "photo.png"), np.full((48, 64, 3), 90, np.uint8))
    given = ["--weights", names[0], "--weights", names[1], str(tmp_path / "photo.png"), "--output", str(tmp_path), "model.test.flip=true"]
    assert detect_tool.main(given) == 0
    assert json.loads((tmp_path / "photo.json").read_text())["width"] == 64


@pytest.mark.slow
def test_an_ensemble_is_scored(weights: list[Path], tmp_path: Path) -> None:
    figures = evaluate_weights(resolve_configs(None, weights), weights, output=tmp_path, log=lambda text: None)
    assert 0 <= figures["AP"] <= 1
    assert (tmp_path / "eval/metrics.json").is_file()
