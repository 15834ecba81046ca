"""Every shipped classification config loads, says what it is for and builds its network; the scaling page shows what its script prints."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resbackbone.classification.config import ClassificationConfig, load_classification_config
from resbackbone.classification.networks import build_classifier
from resbackbone.errors import InputError
from resbackbone.registry import designed_for
from resbackbone.runtime.config import save_config

REPOSITORY = Path(__file__).resolve().parents[3]
CONFIGS = sorted(path for folder in ("imagenet", "cifar", "imagenette") for path in (REPOSITORY / "configs" / folder).glob("*.yaml"))
PROMISED = [
    *("imagenet/resnet50", "imagenet/resnet50_modern"),
    *(f"cifar/{name}" for name in ("resnet20", "resnet56", "resnet110", "plain20", "plain56")),
    *(f"imagenette/{name}" for name in ("resnet18", "compare")),
]


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def header_faults(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    header = " ".join(line.lstrip("# ") for line in lines[: next(n for n, line in enumerate(lines) if not line.startswith("#"))])
    faults = []
    if not re.search(rf"python tools/(train|eval)_cls\.py --config configs/{name_of(path)}\.yaml", header):
        faults.append("its command is missing")
    if len(re.split(r"(?:python|torchrun) ", header)[0].split()) < 8:
        faults.append("what it is for is missing")
    result = re.search(r"Result: (.+)", header)
    if result is None or not (result[1].startswith("not measured yet") or re.search(r"\d.*docs/results\.md", result[1])):
        faults.append("neither a measured result nor 'not measured yet'")
    return faults


def test_promised_configs_are_here() -> None:
    assert {name_of(path) for path in CONFIGS} >= set(PROMISED)


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_config_loads_and_explains_itself(path: Path, tmp_path: Path) -> None:
    config = load_classification_config(path)
    assert header_faults(path) == []
    assert len(path.read_text().splitlines()) <= 40, "short"
    train = config.train
    if train.schedule == "step":
        assert all(train.warmup_steps < milestone < train.steps for milestone in train.milestones)
    save_config(config, tmp_path / "config.yaml")
    assert load_classification_config(tmp_path / "config.yaml") == config
    network = config.model.name.removesuffix("_cifar")
    assert path.stem.startswith((network, "imagenet_weights", "compare"))


@pytest.mark.parametrize("name", ["imagenet/resnet50", "cifar/resnet110", "cifar/plain20", "imagenette/resnet18"])
def test_network_builds_and_gives_logits(name: str) -> None:
    config = load_classification_config(REPOSITORY / "configs" / f"{name}.yaml")
    net = build_classifier(config, 10).eval()
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 10)  # type: ignore[attr-defined]
    assert designed_for(config.model.name).input_size in (config.data.size, 224)


def test_the_papers_recipe_is_the_default() -> None:
    """ImageNet's config repeats the defaults, so that it can be read alone; here they are checked against §3.4."""
    default, config = ClassificationConfig(), load_classification_config(REPOSITORY / "configs/imagenet/resnet50.yaml")
    same = {
        "batch_size": 256,
        "steps": 600_000,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule": "plateau",
        "label_smoothing": 0.0,
    }
    for one in (default, config):
        assert {name: getattr(one.train, name) for name in same} == same
        assert (one.data.crop, one.data.shorter_side, one.data.size, one.data.pca_noise, one.data.normalize) == (
            "scale",
            (256, 480),
            224,
            0.1,
            "mean",
        )
        assert one.train.decay_norms_and_biases


@pytest.mark.parametrize("group", ["model", "data", "train", "eval"])
def test_typos_are_answered_with_the_nearest_key(group: str) -> None:
    key = max((field.name for field in dataclasses.fields(getattr(ClassificationConfig(), group))), key=len)
    with pytest.raises(InputError, match=rf"did you mean '{key}'"):
        load_classification_config(None, [f"{group}.{key[:-1]}=1"])


def test_the_scaling_page_shows_what_its_script_prints() -> None:
    done = subprocess.run([sys.executable, str(REPOSITORY / "benchmarks/scaling_model.py")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in (REPOSITORY / "docs/scaling.md").read_text()


def test_the_scaling_model_obeys_arithmetic() -> None:
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        from scaling_model import Assumptions, allreduce_s, row_of
    finally:
        sys.path.pop(0)
    ideal = Assumptions(jitter=0.0, latency_us=0.0, flags_us=0.0, floor_ms=0.0, save_s=0.0, images_per_core_s=1e9)
    one, eight = row_of(1, ideal), row_of(8, ideal)
    assert one.hours == pytest.approx(90 * 1_281_167 / 2500 / 3600)
    assert eight.hours == pytest.approx(one.hours / 8)
    assert allreduce_s(8, ideal) == pytest.approx(2 * 7 / 8 * 0.1022 / 200)
    assert allreduce_s(16, ideal) == pytest.approx(allreduce_s(8, ideal) + 0.1022 / 25)
    starved = row_of(8, dataclasses.replace(ideal, images_per_core_s=10.0, cores_per_gpu=10))
    assert starved.step == pytest.approx(2.56), "256 images at 100 a second"
