"""Backbones compared: what is trained and what is taken as it is, the figures, and the interval against a literal bootstrap."""

from __future__ import annotations

import copy
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import yaml

from detection import compare as compare_module
from detection.build import build_detector
from detection.compare import Contender, compare, paired_gain, parse_contenders
from detection.config import DetectionConfig, load_detection_config
from detection.data.shapes import load
from detection.evaluation.bootstrap import coco_verdicts, mean_ap
from detection.evaluation.coco import evaluate_coco
from detection.predict import detector_metadata
from resbackbone.errors import InputError
from resbackbone.runtime.checkpoint import save_weights
from resbackbone.runtime.config import save_config
from tools import compare_backbones

TINY = [
    "data.kind=shapes",
    "data.train=train",
    "data.val=val",
    "data.min_size=32",
    "data.max_size=32",
    "data.workers=0",
    "model.head=fpn",
    "model.backbone.weights=null",
    "model.backbone.norm=group",
    "model.backbone.freeze_at=0",
    "model.roi.head_width=16",
    "model.roi.samples=8",
    "train.steps=2",
    "train.batch_size=2",
    "train.schedule=constant",
    "train.warmup_steps=0",
    "train.eval_every=0",
    "eval.batch_size=8",
    "eval.samples=0",
]
IMAGES = 12


def detections_of(truth: dict, seed: int, skill: float) -> list[dict]:
    """Made detections: some objects found, more where skill is higher, and some false ones."""
    draw = np.random.default_rng(seed)
    rows = []
    for one in truth["annotations"]:
        x, y, width, height = one["bbox"]
        if draw.random() < skill:
            box = [x + draw.normal(0, width / 12), y + draw.normal(0, height / 12), width, height]
            rows.append({"image_id": one["image_id"], "category_id": one["category_id"], "score": draw.random(), "bbox": box})
        if draw.random() < 0.4:
            other = {"image_id": one["image_id"], "category_id": int(draw.integers(1, 4)), "score": draw.random() * 0.9}
            rows.append(other | {"bbox": [float(draw.integers(0, 60)), float(draw.integers(0, 60)), width, height]})
    return rows


@pytest.fixture(scope="module")
def truth() -> dict:
    return load(None, "val", images=IMAGES).annotations.to_coco()


def drawn_data(truth: dict, rows: list[dict], images: list[int]) -> tuple[dict, list[dict]]:
    """The data set with exactly the drawn images, each copy an image of its own."""
    content = {"images": [], "annotations": [], "categories": truth["categories"]}
    found: list[dict] = []
    for number, index in enumerate(images, 1):
        old = truth["images"][index]
        content["images"].append(old | {"id": number})
        for one in truth["annotations"]:
            if one["image_id"] == old["id"]:
                content["annotations"].append(copy.deepcopy(one) | {"id": len(content["annotations"]) + 1, "image_id": number})
        found += [row | {"image_id": number} for row in rows if row["image_id"] == old["id"]]
    return content, found


def test_the_interval_is_the_literal_bootstraps(truth: dict) -> None:
    runs = {"poor": [detections_of(truth, seed, 0.5) for seed in (0, 1)], "good": [detections_of(truth, seed, 0.8) for seed in (2, 3)]}
    verdicts = {name: [coco_verdicts(truth, rows) for rows in group] for name, group in runs.items()}
    gain, better = paired_gain(verdicts["poor"], verdicts["good"], resamples=15, seed=5)
    draw, gains = np.random.default_rng(5), []
    for images in [list(range(IMAGES)), *(draw.integers(0, IMAGES, IMAGES).tolist() for _ in range(15))]:
        means = {
            name: statistics.mean(evaluate_coco(*drawn_data(truth, rows, images), engine="pycocotools")["AP"] for rows in group)
            for name, group in runs.items()
        }
        gains.append(means["good"] - means["poor"])
    assert gain.value == pytest.approx(gains[0], abs=1e-9)
    moved = np.array(gains[1:]) - (np.mean(gains[1:]) - gains[0])
    assert (gain.low, gain.high) == pytest.approx(tuple(np.quantile(moved, [0.025, 0.975])), abs=1e-9)
    assert better == pytest.approx(np.mean(moved > 0))
    assert gain.low < gain.value < gain.high


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Training replaced by files as it leaves them; the list says what was trained."""
    calls: list[tuple[str, int]] = []

    def train(config: DetectionConfig, output: Path, *, resume: str | None = None) -> None:
        assert resume == "auto"
        name, seed = config.model.backbone.name, config.train.seed
        calls.append((name, seed))
        truth = load(None, "val").annotations.to_coco()
        rows = detections_of(truth, seed, {"vgg16": 0.4, "resnet18": 0.6, "resnet50": 0.8}[name])
        (output / "eval").mkdir(parents=True, exist_ok=True)
        save_config(config, output / "config.yaml")
        (output / "eval/detections.json").write_text(json.dumps(rows))
        (output / "eval/metrics.json").write_text(json.dumps(evaluate_coco(truth, rows)))
        (output / "model_final.safetensors").write_bytes(b"")

    monkeypatch.setattr(compare_module, "train", train)
    draw = compare_module._drawn
    monkeypatch.setattr(compare_module, "_drawn", lambda verdicts, resamples, seed: draw(verdicts, 10, seed))
    return calls


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    save_config(load_detection_config(None, TINY), path)
    return path


def test_tables_plot_and_a_second_call_that_trains_nothing(
    trained: list, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = ["--config", str(recipe), "--backbones", "resnet18", "vgg16=null", "--output", str(tmp_path / "out"), "train.lr=0.02"]
    assert compare_backbones.main([*given, "--seeds", "0", "1"]) == 0
    assert trained == [("resnet18", 0), ("resnet18", 1), ("vgg16", 0), ("vgg16", 1)]
    content = json.loads((tmp_path / "out/compare.json").read_text())
    rows = content["backbones"]
    assert content["baseline"] == "vgg16"
    assert rows["resnet18"]["mean"] == pytest.approx(statistics.mean(rows["resnet18"]["values"]))
    assert rows["resnet18"]["spread"] == pytest.approx(abs(np.subtract(*rows["resnet18"]["values"])))
    assert rows["resnet18"]["gain"] == pytest.approx(rows["resnet18"]["mean"] - rows["vgg16"]["mean"]) != 0
    assert rows["vgg16"]["gain"] == 0
    (pair,) = content["pairs"]
    assert (pair["first"], pair["second"]) == ("resnet18", "vgg16")
    assert pair["gain"] == pytest.approx(-rows["resnet18"]["gain"], abs=1e-9)
    printed = capsys.readouterr().out
    assert f"| resnet18 | None | 0, 1 | {', '.join(f'{100 * value:.1f}' for value in rows['resnet18']['values'])} |" in printed
    assert (tmp_path / "out/compare.png").read_bytes().startswith(b"\x89PNG")
    kept = yaml.safe_load((tmp_path / "out/runs/vgg16/seed_1/config.yaml").read_text())
    assert (kept["train"]["lr"], kept["train"]["seed"], kept["model"]["backbone"]["weights"]) == (0.02, 1, None)
    trained.clear()
    (tmp_path / "out/runs/vgg16/seed_1/model_final.safetensors").unlink()
    assert compare_backbones.main([*given, "--seeds", "0", "1", "2"]) == 0
    assert trained == [("resnet18", 2), ("vgg16", 1), ("vgg16", 2)]


def test_a_run_of_other_settings_is_not_taken(trained: list, recipe: Path, tmp_path: Path) -> None:
    contenders = parse_contenders(["resnet18"])
    compare(recipe, contenders, tmp_path / "out", seeds=[0], log=lambda text: None)
    with pytest.raises(InputError, match=r"seed_0 holds a run with other settings: train.lr: .*Give another --output"):
        compare(recipe, contenders, tmp_path / "out", seeds=[0], overrides=["train.lr=0.5"], log=lambda text: None)


def test_one_run_has_no_spread_and_does_not_count_twice(trained: list, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = ["--config", str(recipe), "--backbones", "resnet18", "vgg16", "--output", str(tmp_path / "out")]
    assert compare_backbones.main([*given, "--seeds", "0", "3", "0"]) == 1
    assert "--seeds names 0 more than once" in capsys.readouterr().err
    assert trained == []
    assert compare_backbones.main([*given, "--seeds", "0"]) == 0
    assert [row["spread"] for row in json.loads((tmp_path / "out/compare.json").read_text())["backbones"].values()] == [None, None]
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " | None | 0 | " in line]
    assert [row[5] for row in rows] == ["–", "–"]


def test_draws_judged_together_are_those_judged_alone(truth: dict) -> None:
    verdicts = [coco_verdicts(truth, detections_of(truth, seed, 0.6)) for seed in (0, 1)]
    found, draw = compare_module._drawn(verdicts, 250, 7), np.random.default_rng(7)
    times = [np.ones(IMAGES, dtype=np.int64)]
    times += [np.bincount(draw.integers(0, IMAGES, IMAGES), minlength=IMAGES) for _ in range(250)]
    assert found == pytest.approx([np.mean([mean_ap(one, count) for one in verdicts]) for count in times], abs=1e-12)


def test_baselines_and_names() -> None:
    assert parse_contenders(["timm:resnet18=timm", "vgg16"]) == [Contender(name="timm:resnet18", weights="timm"), Contender(name="vgg16")]
    assert Contender(name="a.b:c/d").label == "a.b_c_d"
    with pytest.raises(InputError, match="names vgg16 more than once"):
        parse_contenders(["vgg16", "resnet18", "vgg16=null"])


def test_a_setting_for_one_backbone_alone(trained: list, recipe: Path, tmp_path: Path) -> None:
    given = [
        "--config",
        str(recipe),
        "--backbones",
        "resnet18",
        "vgg16",
        "--own",
        "vgg16",
        "model.anchor_sizes=[8,16,32,64]",
        "--seeds",
        "0",
    ]
    assert compare_backbones.main([*given, "--output", str(tmp_path / "out")]) == 0
    kept = [yaml.safe_load((tmp_path / f"out/runs/{name}/seed_0/config.yaml").read_text()) for name in ("resnet18", "vgg16")]
    assert [one["model"]["anchor_sizes"] for one in kept] == [None, [8, 16, 32, 64]]
    assert "\nvgg16 alone: model.anchor_sizes=[8,16,32,64]\n" in (tmp_path / "out/compare.md").read_text()
    with pytest.raises(InputError, match=r"--own vgg train.lr=1: it takes no part; did you mean 'vgg16'"):
        parse_contenders(["resnet18", "vgg16"], [("vgg", "train.lr=1")])


def test_a_baseline_that_takes_no_part(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--baseline resnet5 takes no part; did you mean 'resnet50'"):
        compare(recipe, parse_contenders(["resnet50"]), tmp_path, baseline="resnet5")


def test_settings_after_the_backbones_are_settings(tmp_path: Path) -> None:
    args = compare_backbones.parse(["--config", "c", "--backbones", "vgg16", "my.net:tiny=w.pt", "train.steps=2", "--seeds", "3"])
    assert (args.backbones, args.overrides, args.seeds) == (["vgg16", "my.net:tiny=w.pt"], ["train.steps=2"], [3])
    args = compare_backbones.parse(["--config", "c", "--backbones", "vgg16", "--seeds", "0", "1", "data.root=VOC", "train.steps=2"])
    assert (args.backbones, args.overrides, args.seeds) == (["vgg16"], ["data.root=VOC", "train.steps=2"], [0, 1])


def test_seeds_are_numbers(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        compare_backbones.parse(["--config", "c", "--backbones", "vgg16", "--seeds", "one"])
    assert "argument --seeds: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("last", "own", "message"),
    [
        ("resnet5", [], "resnet5"),
        ("resnet18=/no/such.safetensors", [], r"/no/such\.safetensors"),
        ("resnet18", [("resnet18", "model.anchor_sizes=[8,16]")], "anchor"),
        ("resnet18=null", [("resnet18", "model.backbone.norm=frozen")], "frozen"),
    ],
)
def test_what_is_wrong_with_the_last_is_said_before_the_first_is_trained(
    trained: list, recipe: Path, tmp_path: Path, last: str, own: list, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compare(recipe, parse_contenders(["vgg16", last], own), tmp_path / "out", seeds=[0], log=lambda text: None)
    assert trained == []


def test_a_detector_to_start_from_is_checked_as_well(trained: list, recipe: Path, tmp_path: Path) -> None:
    config = load_detection_config(recipe, ["model.backbone.name=resnet18"])
    detector, weights = build_detector(config, 1), tmp_path / "w.safetensors"
    save_weights(weights, detector.state_dict(), detector_metadata(config, ["cat"], detector))
    contenders = parse_contenders(["resnet18", "resnet34"], [])
    with pytest.raises(InputError, match="resnet34"):
        compare(recipe, contenders, tmp_path / "out", seeds=[0], overrides=[f"model.weights={weights}"], log=lambda text: None)
    assert trained == []


@pytest.mark.slow
def test_real_trainings(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    paths = compare(recipe, parse_contenders(["resnet20_cifar", "resnet18"]), output, seeds=[0], baseline="resnet20_cifar", resamples=20)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("model_final.safetensors")}
    assert len(before) == 2
    content = json.loads(paths["json"].read_text())
    compare(recipe, parse_contenders(["resnet20_cifar", "resnet18"]), output, seeds=[0], baseline="resnet20_cifar", resamples=20)
    assert json.loads(paths["json"].read_text()) == content
    assert {path: path.stat().st_mtime_ns for path in output.rglob("model_final.safetensors")} == before
