"""Every shipped config loads, says what it is for, and builds; every wrong key or value is explained."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from detection.build import build_detector
from detection.config import DetectionConfig, load_detection_config
from detection.segmentation.config import SegmentationConfig, load_segmentation_config
from detection.structures import Target
from resbackbone.errors import InputError
from resbackbone.runtime.config import save_config

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
PROMISED = [
    *(f"frcnn_{net}_{data}" for net in ("r18", "r50", "r101", "vgg16") for data in ("coco", "voc")),
    *(f"frcnn_{net}_fpn_{data}" for net in ("r18", "r50", "r101") for data in ("coco", "voc")),
    *("deeplabv3_r50_coco", "fcn_r50_coco", "deeplabv3_r18_pennfudan"),
    *("mask_r50_fpn_coco", "frcnn_r18_fpn_pennfudan", "demo_shapes"),
]
NETWORKS = {"r18": "resnet18", "r50": "resnet50", "r101": "resnet101", "vgg16": "vgg16"}
FROM_SCRATCH = ["model.backbone.weights=null", "model.backbone.norm=group"]


def is_segmenter(path: Path) -> bool:
    return path.stem.startswith(("fcn_", "deeplabv3_"))


def load(path: Path, overrides: list[str] | None = None) -> DetectionConfig | SegmentationConfig:
    return (load_segmentation_config if is_segmenter(path) else load_detection_config)(path, overrides or [])


def header_of(path: Path) -> str:
    """The comment lines a config opens with, as one text."""
    lines = path.read_text().splitlines()
    opening = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:opening])


def header_faults(path: Path) -> list[str]:
    header = header_of(path)
    faults = []
    tool = "train_seg" if is_segmenter(path) else "compare_backbones" if path.stem.startswith("compare_") else "train_det"
    if f"python tools/{tool}.py --config configs/{path.name}" not in header:
        faults.append("its command is missing")
    if len(re.split(r"python tools/", header)[0].split()) < 8:
        faults.append("what it is for is missing")
    result = re.search(r"Result: (.+)", header)
    if result is None or not (result[1].startswith("not measured yet") or re.search(r"\d.*docs/results\.md", result[1])):
        faults.append("neither a measured result that names docs/results.md nor 'not measured yet'")
    return faults


def sections(schema: type, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Each group of settings in the schema: its key path and the names of its settings."""
    types = typing.get_type_hints(schema)
    yield path, [field.name for field in dataclasses.fields(schema)]
    for name, annotation in types.items():
        if dataclasses.is_dataclass(annotation):
            yield from sections(typing.cast(type, annotation), (*path, name))


SECTIONS = list(sections(DetectionConfig))


def test_promised_configs_are_here() -> None:
    assert {path.stem for path in CONFIGS} >= set(PROMISED)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_and_explains_itself(path: Path) -> None:
    config = load(path)
    assert header_faults(path) == []
    assert "_base_" not in path.read_text(), "a config is whole"
    assert len(path.read_text().splitlines()) <= 40, "and short"
    if isinstance(config, SegmentationConfig):
        assert (config.model.head, NETWORKS[path.stem.split("_")[1]]) == (path.stem.split("_")[0], config.model.backbone.name)
    if path.stem.startswith("frcnn"):
        assert isinstance(config, DetectionConfig)
        assert config.model.backbone.name == NETWORKS[path.stem.split("_")[1]]
        assert config.model.head == ("fpn" if "_fpn" in path.stem else "c4")
        assert config.model.mask is False
    if config.train.schedule == "step":
        assert all(config.train.warmup_steps < milestone < config.train.steps for milestone in config.train.milestones)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_resolved_config_repeats_the_run(path: Path, tmp_path: Path) -> None:
    config = load(path, ["train.seed=7"])
    save_config(config, tmp_path / path.name)
    assert load(tmp_path / path.name) == config


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("model:\n  head: c4\n", "command"),
        ("# What this is for, in a few words that are enough.\n#   python tools/train_det.py --config configs/a.yaml\n", "measured"),
        ("# python tools/train_det.py --config configs/a.yaml\n# Result: not measured yet.\n", "for"),
        ("# What it is for, in eight words at least.\n# python tools/train_det.py --config configs/a.yaml\n# Result: AP 37.\n", "measured"),
    ],
)
def test_a_bare_header_is_found(text: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert any(fault in found for found in header_faults(tmp_path / "a.yaml"))


@pytest.mark.parametrize(("path", "keys"), SECTIONS, ids=lambda value: ".".join(value) if isinstance(value, tuple) else "")
def test_typos_are_answered_with_the_nearest_key(path: tuple[str, ...], keys: list[str], tmp_path: Path) -> None:
    key = max(keys, key=len)
    typo = key[:-1]
    with pytest.raises(InputError, match=rf"(?s){typo}.*did you mean '(\w+\.)*{key}'"):
        load_detection_config(REPOSITORY / "configs" / "demo_shapes.yaml", [f"{'.'.join((*path, typo))}=1"])
    nested: dict | int = 1
    for name in reversed((*path, typo)):
        nested = {name: nested}
    (tmp_path / "typo.yaml").write_text(str(nested))
    with pytest.raises(InputError, match=rf"(?s)typo\.yaml.*{typo}.*did you mean '(\w+\.)*{key}'"):
        load_detection_config(tmp_path / "typo.yaml")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.steps=many", "train.steps"),
        ("train.lr=fast", "train.lr"),
        ("data.flip=perhaps", "data.flip"),
        ("model.head=c5", "c4"),
        ("model.backbone=resnet50", "model.backbone"),
        ("train.milestones=[a]", "train.milestones"),
        ("train.steps=0", "train.steps"),
    ],
)
def test_wrong_values_are_explained(override: str, named: str) -> None:
    with pytest.raises(InputError, match=re.escape(named)):
        load_detection_config(REPOSITORY / "configs" / "demo_shapes.yaml", [override])


def test_numbers_yaml_reads_as_text_are_understood() -> None:
    assert load_detection_config(REPOSITORY / "configs" / "demo_shapes.yaml", ["train.lr=1e-4"]).train.lr == 1e-4


def test_voc_years_are_chosen_from_the_command_line() -> None:
    joined = load_detection_config(REPOSITORY / "configs" / "frcnn_r50_voc.yaml")
    assert joined.data.train == ("VOC2007/trainval", "VOC2012/trainval")
    one = load_detection_config(
        REPOSITORY / "configs" / "frcnn_r50_voc.yaml", ["data.train=[VOC2012/trainval]", "data.val=VOC2012/test", "data.root=elsewhere"]
    )
    assert (one.data.train, one.data.val, Path(one.data.root or "")) == (("VOC2012/trainval",), ("VOC2012/test",), Path("elsewhere"))


@pytest.mark.parametrize("head", ["c4", "dc5", "fpn"])
def test_masks_go_with_every_head(head: str) -> None:
    given = ["model.mask=true", f"model.head={head}"]
    assert load_detection_config(REPOSITORY / "configs" / "frcnn_r50_coco.yaml", given).model.mask


@pytest.mark.parametrize("name", ["demo_shapes", "frcnn_r18_voc", "frcnn_r18_fpn_coco", "frcnn_vgg16_voc", "mask_r50_fpn_coco"])
def test_detector_builds_and_gives_losses(name: str) -> None:
    config = load_detection_config(
        REPOSITORY / "configs" / f"{name}.yaml", [*FROM_SCRATCH, "model.roi.proposals_train=20", "model.roi.samples=8"]
    )
    torch.manual_seed(0)
    detector = build_detector(config, 3).train()
    target = Target(
        boxes=torch.tensor([[8.0, 8.0, 60.0, 50.0]]),
        labels=torch.tensor([2]),
        ignore_boxes=torch.zeros(0, 4),
        image_id=1,
        index=0,
        original_size=(64, 96),
        seed=0,
        masks=torch.ones(1, 64, 96, dtype=torch.uint8) if config.model.mask else None,
    )
    losses = detector([torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)], [target])
    names = {"rpn_objectness", "rpn_box", "roi_class", "roi_box"} | ({"mask"} if config.model.mask else set())
    assert set(losses) == names
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_dc5_head_builds_by_naming_it() -> None:
    config = load_detection_config(REPOSITORY / "configs" / "frcnn_r18_voc.yaml", [*FROM_SCRATCH, "model.head=dc5"])
    assert build_detector(config, 3).backbone.feature_info
