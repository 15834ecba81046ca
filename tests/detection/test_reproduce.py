"""The paper's tables beside ours: what is printed without any data, what --run runs, and that every command would be accepted."""

from __future__ import annotations

import importlib
import json
import os
import statistics
from pathlib import Path

import pytest

from detection.config import load_detection_config
from detection.paper_tables import DATA, JOBS, TABLES
from detection.reproduce import Places, jobs_of, reproduce, run_tool, to_run
from resbackbone.classification.config import load_classification_config
from resbackbone.errors import InputError
from tools import reproduce as tool

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(data=tmp_path / "data", results=tmp_path / "results")


def have_data(places: Places, *keys: str) -> None:
    for key in keys:
        for name in DATA[key].files:
            path = places.data / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def finish(places: Places, job: str, figures: dict) -> None:
    places.metrics(job).parent.mkdir(parents=True, exist_ok=True)
    places.metrics(job).write_text(json.dumps(figures))
    if JOBS[job].tool.startswith("train"):
        places.weights(job).touch()


def test_table_8_without_coco_says_what_is_missing_and_exits_cleanly(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert tool.main(["table8", "--results", str(tmp_path / "none"), "--data", str(tmp_path / "data")]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith(("VGG", "ResNet"))}
    assert rows == {"VGG-16": ["41.5", "-", "21.2", "-"], "ResNet-101": ["48.4", "-", "27.2", "-"]}
    assert "coco_resnet101: python tools/train_det.py --config configs/frcnn_r101_coco.yaml" in printed
    assert "instances_train2014.json and 3 more" in printed
    assert "cocodataset.org" in printed


@pytest.mark.parametrize("name", TABLES)
def test_every_table_prints_all_its_figures(name: str, places: Places) -> None:
    text, table = reproduce(name, places), TABLES[name]
    assert f"Table {name.removeprefix('table')}:" in text
    for label, cells in table.rows.items():
        assert len(cells) == len(table.columns)
        (line,) = [
            line for line in text.splitlines() if line.startswith(label + " " * 2) and line[len(label) :].split()[0][0] in "-0123456789"
        ]
        shown = line[len(label) :].split()[::2]
        assert shown == [
            "-" if cell.paper is None else f"{cell.paper:g}" if "." in f"{cell.paper:g}" else f"{cell.paper:.1f}" for cell in cells
        ]


def test_figures_of_one_table_agree_with_each_other() -> None:
    mean, *classes = TABLES["table10"].rows.values()
    assert len(classes) == 20
    for column, cell in enumerate(mean):
        assert statistics.mean(cells[column].paper for cells in classes) == pytest.approx(cell.paper, abs=0.05)
    for label in ("VGG-16", "ResNet-101"):
        ladder = TABLES["table9"].rows[f"baseline ({label})"]
        assert [cell.paper for cell in ladder[:2]] == [cell.paper for cell in TABLES["table8"].rows[label]]


@pytest.mark.parametrize("job", JOBS)
def test_every_command_would_be_accepted(job: str, places: Places) -> None:
    words = places.command(job)
    assert (REPOSITORY / words[0]).is_file()
    args = importlib.import_module(f"tools.{Path(words[0]).stem}").parse(words[1:])
    assert args.output == places.results / job
    load = load_classification_config if JOBS[job].tool.endswith("cls") else load_detection_config
    config = None if args.config is None else REPOSITORY / args.config
    load(config, args.overrides)
    assert "{" not in " ".join(word for word in words if "options" not in word)
    assert any(word.startswith(f"data.root={places.data}/") for word in words), "data may lie elsewhere than where it was trained"


def test_ours_stands_beside_the_papers(places: Places) -> None:
    finish(
        places,
        "voc_resnet101",
        {"mAP_11_point": 0.7512, "VOC_11_point/cat": 0.881, **{f"VOC_11_point/{n}": 0.5 for n in _classes() if n != "cat"}},
    )
    finish(places, "cifar_resnet56", {"top1": 0.9312})
    finish(places, "imagenet_resnet50_10crop", {"10crop": {"top1": 0.77, "top5": 0.9333}})
    lines = "\n".join(reproduce(name, places) for name in ("table10", "table6", "table3")).splitlines()
    names = ("mAP", "cat", "ResNet-56", "ResNet-50")
    found = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(tuple(f"{name} " for name in names))}
    assert found["mAP"] == ["73.2", "-", "76.4", "75.12", "85.6", "-"]
    assert found["cat"] == ["86.4", "-", "89.8", "88.1", "89.6", "-"]
    assert found["ResNet-56"][-2:] == ["6.97", "6.88"]
    assert found["ResNet-50"][-2:] == ["6.71", "6.67"]


def _classes() -> list[str]:
    return [label for label in TABLES["table10"].rows if label != "mAP"]


def test_running_does_what_is_missing_in_order_and_nothing_twice(places: Places) -> None:
    have_data(places, "coco")
    finish(places, "coco_vgg16", {"AP50": 0.4, "AP": 0.2})
    ran: list[str] = []

    def runner(words: list[str]) -> int:
        job = Path(words[words.index("--output") + 1]).name
        ran.append(job)
        finish(places, job, {"AP50": 0.45, "AP": 0.25})
        return 0

    text = reproduce("table9", places, run=True, runner=runner)
    assert ran == [
        "coco_resnet101",
        "coco_resnet101_refine",
        "coco_resnet101_context_trained",
        "coco_resnet101_context",
        "coco_resnet101_scales",
    ]
    assert ran == [job for job in jobs_of(TABLES["table9"]) if job != "coco_vgg16"]
    assert "All of ours is there" in text
    assert reproduce("table9", places, run=True, runner=runner) == text
    assert len(ran) == 5


def test_the_last_row_of_table_10_is_a_chain_from_coco_to_voc(places: Places) -> None:
    have_data(places, "coco", "voc")
    for job in ("voc_vgg16", "voc_resnet101"):
        finish(places, job, {"mAP_11_point": 0.7, **{f"VOC_11_point/{name}": 0.7 for name in _classes()}})
    ran: list[list[str]] = []

    def runner(words: list[str]) -> int:
        ran.append(words)
        figures = {f"VOC_11_point/{name}": 0.8 for name in _classes()}
        finish(places, Path(words[words.index("--output") + 1]).name, {"AP50": 0.5, "AP": 0.3, "mAP_11_point": 0.8512, **figures})
        return 0

    assert reproduce("table10", places, run=True, runner=runner).count("85.12") == 1
    coco, voc, last = ran
    assert [words[0] for words in ran] == ["tools/train_det.py", "tools/train_det.py", "tools/eval_voc.py"]
    assert "configs/frcnn_r101_coco.yaml" in coco
    assert f"model.weights={places.results}/coco_resnet101_context_trained/model_final.safetensors" in voc
    assert all("model.test.context=true" in words for words in (coco, voc))
    config = load_detection_config(REPOSITORY / "configs/frcnn_r101_voc.yaml", voc[3:6])
    assert (config.model.weights, config.model.backbone.name) == (voc[3].partition("=")[2], "resnet101")
    assert last[2] == f"{places.results}/voc_resnet101_from_coco/model_final.safetensors"
    assert {"model.test.refine=true", "model.test.scales=[200,400,600,800,1000]"} < set(last)


def test_figures_older_than_the_weights_they_came_from_are_named(places: Places) -> None:
    for job in jobs_of(TABLES["table9"]):
        finish(places, job, {"AP50": 0.45, "AP": 0.25})
    assert "figures are older" not in reproduce("table9", places)
    made = places.metrics("coco_resnet101_refine").stat().st_mtime
    os.utime(places.weights("coco_resnet101"), (made + 60, made + 60))
    text = reproduce("table9", places)
    assert "coco_resnet101_refine: its figures are older than the weights of coco_resnet101 beside it" in text
    assert "coco_resnet101: its" not in text


def test_without_coco_the_fine_tuning_waits(places: Places) -> None:
    have_data(places, "voc")
    ran: list[str] = []

    def runner(words: list[str]) -> int:
        ran.append(Path(words[words.index("--output") + 1]).name)
        finish(places, ran[-1], {"mAP_11_point": 0.7, **{f"VOC_11_point/{name}": 0.7 for name in _classes()}})
        return 0

    assert "cocodataset.org" in reproduce("table10", places, run=True, runner=runner)
    assert ran == ["voc_vgg16", "voc_resnet101"]


def test_weights_that_were_not_kept_are_made_again_only_where_they_are_needed(places: Places) -> None:
    have_data(places, "coco")
    jobs = jobs_of(TABLES["table9"])
    for job in jobs:
        finish(places, job, {"AP50": 0.45, "AP": 0.25})
    for job in ("coco_resnet101", "coco_resnet101_context_trained"):
        places.weights(job).unlink()
    assert to_run(jobs, places) == []
    places.metrics("coco_resnet101_refine").unlink()
    assert to_run(jobs, places) == ["coco_resnet101", "coco_resnet101_refine"]


def test_a_detector_that_is_there_is_fine_tuned_without_its_own_data(places: Places) -> None:
    have_data(places, "voc")
    figures = {"mAP_11_point": 0.7, **{f"VOC_11_point/{name}": 0.7 for name in _classes()}}
    for job in ("voc_vgg16", "voc_resnet101", "coco_resnet101_context_trained"):
        finish(places, job, figures)
    ran: list[str] = []

    def runner(words: list[str]) -> int:
        ran.append(Path(words[words.index("--output") + 1]).name)
        finish(places, ran[-1], figures)
        return 0

    reproduce("table10", places, run=True, runner=runner)
    assert ran == ["voc_resnet101_from_coco", "voc_resnet101_from_coco_scales"]


def test_weights_that_jobs_start_from_are_named(places: Places, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    text = reproduce("table10", places)
    assert (
        f"training downloads https://download.pytorch.org/models/vgg16-397923af.pth; without a network, put that file at {folder}" in text
    )
    assert text.count("ImageNet weights of") == 2  # four jobs, two networks
    folder.mkdir(parents=True)
    (folder / "vgg16-397923af.pth").touch()
    assert [line.split()[3] for line in reproduce("table10", places).splitlines() if "weights of" in line] == ["resnet101"]
    assert "ImageNet weights" not in reproduce("table6", places)  # learns from nothing


def test_running_without_data_runs_nothing(places: Places) -> None:
    def runner(words: list[str]) -> int:
        raise AssertionError(words)

    assert "Data that isn't here" in reproduce("table7", places, run=True, runner=runner)


def test_what_goes_wrong_is_said(places: Places) -> None:
    have_data(places, "voc")
    with pytest.raises(InputError, match=r"train_det\.py .* ended with 3; mend"):
        reproduce("table7", places, run=True, runner=lambda words: 3)
    with pytest.raises(InputError, match="ended well but left no"):
        reproduce("table7", places, run=True, runner=lambda words: 0)
    with pytest.raises(InputError, match="no table88 here; did you mean 'table8'"):
        reproduce("table88", places)
    finish(places, "voc_vgg16", {"AP": 0.1})
    with pytest.raises(InputError, match="has no figure mAP_11_point"):
        reproduce("table7", places)
    with pytest.raises(InputError, match="needs a checkout"):
        run_tool(["tools/none.py"])


def test_a_tool_is_really_run() -> None:
    assert run_tool(["tools/reproduce.py", "--help"]) == 0
