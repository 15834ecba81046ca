"""Training and the tools leave a report of what they evaluated, with the figures they print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[4]
sys.path.insert(0, str(REPOSITORY))

from detection.config import load_detection_config  # noqa: E402
from detection.evaluation.coco import NAMES  # noqa: E402
from detection.evaluation.report import page  # noqa: E402
from detection.train import train  # noqa: E402
from tools import eval_coco  # noqa: E402

TINY = {
    "data": {"workers": 0, "min_size": 48, "max_size": 64},
    "model": {"head": "fpn", "backbone.name": "resnet18", "backbone.weights": None, "backbone.norm": "group", "backbone.freeze_at": 0},
    "model.roi": {"samples": 16, "head_width": 16},
    "train": {"batch_size": 2, "steps": 1, "eval_every": 0, "precision": "fp32"},
}


@pytest.fixture(scope="module")
def output(tiny_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    settings = [f"{group}.{key}={json.dumps(value)}" for group, values in TINY.items() for key, value in values.items()]
    train(load_detection_config(None, [*settings, f"data.root={tiny_coco}"]), folder)
    return folder


def report_of(folder: Path) -> dict[str, Any]:
    text = (folder / "index.html").read_text(encoding="utf-8")
    return json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])


def test_training_leaves_one(output: Path) -> None:
    figures, data = json.loads((output / "eval" / "metrics.json").read_text()), report_of(output / "report")
    assert data["runs"][0]["name"] == "tiny"
    assert {name: data["runs"][0]["figures"][name] for name in NAMES} == {name: figures[name] for name in NAMES}
    assert data["imageCount"] == 5
    assert all(one["source"].startswith("data:image/jpeg;base64,") for one in data["images"])
    assert f"report: {output / 'report' / 'index.html'}" in (output / "log.txt").read_text()


def test_the_tool_leaves_one_and_compares_runs(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "RESAMPLES", 5)
    weights = ["--weights", str(output / "model_final.safetensors")]
    assert eval_coco.main([*weights, "--report", str(tmp_path / "r"), "--compare", str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report {tmp_path / 'r' / 'index.html'}"
    first, second = report_of(tmp_path / "r")["runs"]
    assert first["figures"] == pytest.approx({name: second["figures"][name] for name in first["figures"]}, abs=1e-6)
    assert eval_coco.main([*weights, "--output", str(tmp_path / "o")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report {tmp_path / 'o' / 'report' / 'index.html'}"
    assert eval_coco.main([*weights, "--output", str(tmp_path / "q"), "eval.report=false"]) == 0
    assert (tmp_path / "q" / "eval" / "metrics.json").is_file()
    assert not (tmp_path / "q" / "report").exists()
    capsys.readouterr()
    assert eval_coco.main([*weights, "--output", str(tmp_path / "o"), "eval.report=false"]) == 0
    assert "report" not in capsys.readouterr().out.splitlines()[-1], "the page there is an earlier evaluation's"
