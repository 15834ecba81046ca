"""Exported detectors against the detectors they come from, and everything that is refused."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from export_peers import CLASSES, TINY, random_detector, register_tiny, stand_in, write_detector
from torch import nn
from torchvision.ops import nms

from detection import export
from detection.build import build_detector, resolved_config
from detection.config import load_detection_config
from detection.data.images import read_image
from detection.exportable import ExportableDetector, suppress
from detection.faster_rcnn import FasterRCNN
from detection.mask_head import paste_masks
from detection.predict import config_from_weights, detector_metadata, load_detector
from detection.structures import Target
from resbackbone.runtime.checkpoint import save_weights
from tools.export import main


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """torch.export logs every symbolic guard, and pytest would format them all."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    register_tiny(monkeypatch)


def settled(detector: FasterRCNN) -> FasterRCNN:
    """With batch norms that fit their inputs, so that a residual network's activations, and with them scores, don't all saturate."""
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    one = {"boxes": torch.tensor([[10.0, 10.0, 80.0, 90.0]]), "labels": torch.tensor([1]), "ignore_boxes": torch.zeros(0, 4)}
    target = Target(**one, masks=torch.ones(1, 96, 128, dtype=torch.uint8), image_id=0, index=0, original_size=(96, 128))
    with torch.no_grad():
        detector.train()([torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8) for _ in range(2)], [target, target])
    nn.init.normal_(detector.rpn.cls_logits.weight, std=0.1)
    nn.init.normal_(detector.roi_head.cls_score.weight, std=0.3)
    return detector.eval()


@pytest.mark.parametrize("to", ["onnx", "torch-export"])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("model.head=fpn",), marks=pytest.mark.slow),
        pytest.param(("model.head=c4",), marks=pytest.mark.slow),
        pytest.param(("model.head=fpn", "model.mask=true"), marks=pytest.mark.slow),
        ("model.head=c4", "model.mask=true", "model.test.context=true"),
    ],
    ids=", ".join,
)
def test_a_detector_runs_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: tuple[str, ...], to: str) -> None:
    if to == "onnx":
        pytest.importorskip("onnxscript")
    weights = write_detector(tmp_path / "w.safetensors", *settings)
    assert main([str(weights), "--to", to]) == 0
    said = capsys.readouterr().out
    found, total = (int(word) for word in said.split(": ")[1].split(" boxes")[0].split(" of "))
    assert found == total > 50, said
    assert ("masks to" in said) == ("model.mask=true" in settings)
    assert (tmp_path / "w").with_suffix({"onnx": ".onnx", "torch-export": ".pt2"}[to]).stat().st_size > 10_000


@pytest.mark.parametrize("mask", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_the_documentation_s_script_runs_it(repository: Path, tmp_path: Path, mask: str) -> None:
    """docs/export.md's script, on a picture that needs no resizing, prints the boxes that the detector finds, and of masks how many pixels
    they have; nothing of ours is loaded."""
    pytest.importorskip("onnxscript")
    weights = write_detector(tmp_path / "w.safetensors", "model.head=c4", "data.min_size=[96]", f"model.mask={mask}", certainty=4.0)
    assert main([str(weights), "--to", "onnx"]) == 0
    script = (repository / "docs" / "export.md").read_text().split("<!-- file: run_onnx.py -->\n```python\n")[1].split("```")[0]
    assert "resbackbone" not in script.replace("resbackbone[", "")
    (tmp_path / "run_onnx.py").write_text(script)
    picture = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    cv2.imwrite(str(tmp_path / "a.png"), picture[..., ::-1])
    command = [sys.executable, "-I", str(tmp_path / "run_onnx.py"), str(tmp_path / "w.onnx"), str(tmp_path / "a.png")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.splitlines()
    detector, classes = load_detector(config_from_weights(weights), weights, device=torch.device("cpu"))
    (found,) = detector.detect([torch.from_numpy(picture).permute(2, 0, 1)])
    found = found[found.scores >= 0.5]
    areas = [] if found.masks is None else [[int(mask.sum())] for mask in paste_masks(found, (96, 128))]
    rows = zip(*map(torch.Tensor.tolist, (found.labels, found.scores, found.boxes)), areas or [[]] * len(found), strict=True)
    wanted = sorted((classes[label - 1], score, *box, *area) for label, score, box, area in rows)
    said = sorted((words[1], *map(float, words[2:])) for words in (line.split() for line in printed))
    assert len(said) == len(wanted) > 0
    assert [one[0] for one in said] == [one[0] for one in wanted]
    np.testing.assert_allclose([one[1] for one in said], [one[1] for one in wanted], atol=2e-3)
    np.testing.assert_allclose([one[6:] for one in said], [one[6:] for one in wanted], rtol=0.02, atol=8)
    if mask == "true":
        assert len(said[0]) == 7
        assert 0 < sum(one[6] for one in wanted) < sum((one[4] - one[2]) * (one[5] - one[3]) for one in wanted)


PLAIN, MASKS, CONTEXT = (), ("model.mask=true",), ("model.test.context=true",)


@pytest.mark.parametrize(
    ("head", "more"),
    [("fpn", PLAIN), ("c4", PLAIN), ("fpn", MASKS), ("c4", MASKS), ("fpn", CONTEXT), ("c4", CONTEXT)],
)
def test_without_a_loop_the_same(head: str, more: tuple[str, ...]) -> None:
    """The graph in eager mode beside `detect`, on images of two sizes in one batch; fewer anchors than candidates on the small levels."""
    detector = random_detector(load_detection_config(None, [*TINY, f"model.head={head}", *more]))
    assert min(check_equal_without_a_loop(detector)) > 5


@pytest.mark.parametrize("more", [MASKS, CONTEXT])
def test_a_conv5_x_that_regions_masks_and_context_share(more: tuple[str, ...]) -> None:
    config = load_detection_config(None, [*TINY, "model.head=c4", "model.backbone.name=resnet18", *more])
    assert sum(check_equal_without_a_loop(settled(random_detector(config)))) > 2


def check_equal_without_a_loop(detector: FasterRCNN) -> list[int]:
    """Returns how many detections the two images have."""
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((96, 128), (80, 120))]
    wanted = detector.detect(images)
    batch = torch.zeros((2, 3, 96, 128), dtype=torch.uint8)
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    with torch.no_grad():
        boxes, scores, labels, *masks = ExportableDetector(detector)(batch, torch.tensor([image.shape[1:] for image in images]))
    assert len(masks) == (detector.mask_head is not None)
    for row, mine in enumerate(wanted):
        count = int((scores[row] > 0).sum())
        assert count == len(mine)
        torch.testing.assert_close(boxes[row, :count], mine.boxes, atol=1e-3, rtol=0)
        torch.testing.assert_close(scores[row, :count], mine.scores, atol=1e-5, rtol=0)
        assert torch.equal(labels[row, :count], mine.labels)
        assert not boxes[row, count:].any()
        if masks:
            assert mine.masks is not None
            assert mine.masks.std() > 0.05
            assert masks[0].shape[2:] == mine.masks.shape[1:]
            torch.testing.assert_close(masks[0][row, :count], mine.masks, atol=1e-3, rtol=0)
            assert not masks[0][row, count:].any()
    return [len(mine) for mine in wanted]


@pytest.mark.parametrize(("shift", "holds"), [(1e-3, True), (0.05, False)])
def test_masks_that_differ_are_not_the_same_box(shift: float, holds: bool) -> None:
    detector = random_detector(load_detection_config(None, [*TINY, "model.head=c4", "model.mask=true"]))
    graph = ExportableDetector(detector).eval()

    @torch.no_grad()
    def run(*inputs: np.ndarray) -> list[np.ndarray]:
        *others, masks = graph(*map(torch.from_numpy, inputs))
        return [output.numpy() for output in (*others, masks + shift)]

    picture = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    parity = export.compare(detector, run, [picture], sizes=[96], max_size=128)
    assert parity.holds is holds
    assert parity.unmatched == (0 if holds else parity.boxes)
    assert parity.boxes > 5
    assert f"masks to {shift if holds else 0:.1e}" in str(parity)


def test_sets_suppress_only_themselves() -> None:
    """The exported NMS beside torchvision's, set by set; places without a box neither stay nor suppress; a set may be empty."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand((4, 60, 2), generator=generator) * 50
    boxes = torch.cat((corner, corner + 5 + 30 * torch.rand((4, 60, 2), generator=generator)), dim=2)
    scores = torch.rand((4, 60), generator=generator)
    scores[0, ::3], scores[3] = -1.0, -1.0
    kept = suppress(boxes, scores, 0.5)
    for one in range(4):
        there = torch.nonzero(scores[one] >= 0).flatten()
        wanted = torch.zeros(60, dtype=torch.bool)
        wanted[there[nms(boxes[one, there], scores[one, there], 0.5)]] = True
        assert torch.equal(kept[one], wanted)
    assert kept[:3].sum() > 20
    assert not suppress(boxes[:1], torch.full((1, 60), -1.0), 0.5).any()


def test_a_program_that_differs_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    weights = write_detector(tmp_path / "w.safetensors", "model.head=c4")
    monkeypatch.setattr(export, "write_program", lambda graph, path, *, to: path.write_bytes(b"x"))
    config = config_from_weights(weights)
    other = ExportableDetector(random_detector(config, CLASSES)).eval()
    other.detector.roi_head.score_threshold = 0.3  # the only difference: boxes that score less are missing
    other.detector.load_state_dict(load_detector(config, weights, device=torch.device("cpu"))[0].state_dict())

    def run(*inputs: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [output.numpy() for output in other(*map(torch.from_numpy, inputs))]

    monkeypatch.setattr(export, "open_program", lambda path, *, to: run)
    assert main([str(weights), "--to", "torch-export"]) == 1
    assert "was not written: the program doesn't agree with the network it comes from: only" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [weights]
    other.detector.roi_head.score_threshold = 0.05
    assert main([str(weights), "--to", "torch-export"]) == 0
    detects_nothing = [np.zeros((2, 20, 4), np.float32), np.zeros((2, 20), np.float32), np.zeros((2, 20), np.int64)]
    monkeypatch.setattr(export, "open_program", lambda path, *, to: lambda images, sizes: [one[: len(images)] for one in detects_nothing])
    assert main([str(weights), "--to", "torch-export", "model.test.score_threshold=1"]) == 1
    assert "finds nothing" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"w.safetensors", "w.pt2"}, "the one that agreed stays"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "onxn"], "did you mean 'onnx'?"),
        (["--to", "torch-export", "--output", "a.onnx"], "writes .pt2 files"),
        (["--to", "torch-export", "--images", "nosuch.jpg"], "no image at nosuch.jpg"),
        (["--to", "torch-export", "--name", "resnet50", "--variant", "v2"], "leave --name resnet50 --variant v2 out"),
        (["--to", "torch-export", "model.test.refine=true"], "looks at each image once"),
        (["--to", "onnx", "model.roi.op=pool"], "no equal in ONNX"),
    ],
)
def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    weights = write_detector(tmp_path / "w.safetensors", "model.head=fpn")
    assert main([str(weights), *arguments]) == 1
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [weights]


def test_it_is_checked_on_a_few_of_the_images_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder with a video in it; the program here is the detector itself, which finds the same."""
    weights, folder = write_detector(tmp_path / "w.safetensors", "model.head=c4"), tmp_path / "photos"
    folder.mkdir()
    (folder / "clip.mp4").write_bytes(b"x")
    for number in range(20):
        picture = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(16, axis=0).repeat(16, axis=1)
        cv2.imwrite(str(folder / f"{number}.png"), picture)
    stand_in(monkeypatch, weights)
    assert main([str(weights), "--to", "torch-export", "--images", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "looking at 8 of 20 images" in said
    assert "8 images, shorter side 128 and 96" in said
    assert "Left out" not in said


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    weights = write_detector(tmp_path / "w.safetensors", "model.head=fpn")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([str(weights), "--to", "onnx"]) == 1
    assert "pip install 'resbackbone[export]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "torch-export"])
@pytest.mark.parametrize("head", ["fpn", "c4"])
def test_r50_on_20_voc_images(voc_root: Path, unpacked_data: Path, tmp_path: Path, head: str, to: str) -> None:
    """ResNet-50 from ImageNet weights with random heads: same boxes after matching, scores to 1e-3, at two sizes and two batch sizes."""
    backbone = next(unpacked_data.rglob("resnet50_imagenet1k_fp16.safetensors"))
    proposals = {"fpn": 50, "c4": 15}[head]  # conv5_x on each region takes most of the time
    settings = [f"model.head={head}", "model.backbone.name=resnet50", f"model.backbone.weights={backbone}", "data.min_size=[160]"]
    config = load_detection_config(None, [*settings, "data.max_size=256", f"model.roi.proposals_test={proposals}"])
    torch.manual_seed(0)
    detector = build_detector(config, 20)
    for layer in (detector.rpn.cls_logits, detector.roi_head.cls_score):
        nn.init.normal_(layer.weight, std=0.05)
    config = resolved_config(config, detector)
    weights = tmp_path / "w.safetensors"
    save_weights(weights, detector.state_dict(), detector_metadata(config, [f"class{k}" for k in range(20)], detector))
    pictures = sorted(voc_root.rglob("*.jpg"))[:20]
    assert len(pictures) == 20
    said = export.export_detector(weights, to=to, pictures=[read_image(path) for path in pictures])
    found, total = (int(word) for word in said.split(": ")[1].split(" boxes")[0].split(" of "))
    assert total > 200, said
    assert found >= 0.99 * total, said
