"""The report as a file: whole in itself, safe with any text, with the figures the tools print, small, and written for whatever there is."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_cases import noisy_records, shapes

REPOSITORY = Path(__file__).resolve().parents[4]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parents[1])]
from coco_cases import copied_voc, random_case  # noqa: E402

from detection.evaluation.bootstrap import coco_verdicts, paired_bootstrap  # noqa: E402
from detection.evaluation.coco import NAMES, evaluate_coco  # noqa: E402
from detection.evaluation.evaluate import evaluate_source, voc_truth  # noqa: E402
from detection.evaluation.report import page  # noqa: E402
from detection.evaluation.report.errors import MISSED  # noqa: E402
from detection.evaluation.report.report import (  # noqa: E402
    evaluate_coco_files,
    evaluate_voc_files,
    judge_other,
    report_records,
    report_source,
    run_name,
)
from detection.evaluation.results import write_results  # noqa: E402
from detection.evaluation.voc import evaluate_voc  # noqa: E402
from detection.evaluation.voc_files import annotated_images  # noqa: E402
from resbackbone.errors import InputError  # noqa: E402
from tools import eval_coco, eval_voc  # noqa: E402

HOSTILE = "</script><b>&amp;\u2028'\"<!--"
CARRIERS = {"src", "href", "action", "srcset", "poster", "data", "formaction"}


class Parsed(HTMLParser):
    """Tags, what they point at, and the data block, as a browser's parser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.labelled: set[str] = set()
        self.ids: list[str] = []
        self._inside = self.data = self.title = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in CARRIERS]
        self.ids += [values["id"]] if values.get("id") else []
        self._inside = "data" if values.get("id") == "data" else tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.data += data if self._inside == "data" else ""
        self.title += data if self._inside == "title" else ""


def parsed(folder: Path) -> tuple[Parsed, dict[str, Any]]:
    html = Parsed((folder / "index.html").read_text(encoding="utf-8"))
    return html, json.loads(html.data)


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def coco_files(folder: Path, seed: int = 8) -> tuple[Path, Path]:
    truth, rows = random_case(seed, "bbox")
    return write_json(folder / "truth.json", truth), write_json(folder / "found.json", rows)


def known_answer(shared_data: Path) -> tuple[Path, Path]:
    folder = shared_data / "known_answers" / "coco_val2014_100"
    return folder / "instances_val2014_100.json", folder / "instances_val2014_fakebbox100_results.json"


def test_the_page_is_whole_in_itself(tmp_path: Path) -> None:
    source = shapes(6)
    path = report_records(tmp_path / "report", source, noisy_records(source), name="run")
    assert path == tmp_path / "report" / "index.html"
    assert [one.name for one in path.parent.iterdir()] == ["index.html"]
    html, data = parsed(path.parent)
    assert all(address.startswith(("#", "data:")) for address in html.addresses), html.addresses
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.findall(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    assert "default-src 'none'" in text
    assert {"h1", "main", "nav", "noscript", "dialog"} <= set(html.tags)
    assert len(html.ids) == len(set(html.ids))
    assert html.title == "Detection report: run"
    assert [len(one["source"]) > 500 for one in data["images"]] == [True] * 6
    assert len(data["images"][0]["objects"][0]) == 6
    assert data["imageCount"] == 6


@pytest.mark.parametrize("seed", [5, 8, 11])
def test_its_figures_are_those_of_eval_coco(seed: int, tmp_path: Path) -> None:
    truth, found = coco_files(tmp_path, seed)
    printed = evaluate_coco_files(truth, found, output=tmp_path)
    _, data = parsed(tmp_path / "report")
    assert printed == evaluate_coco(truth, found)
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text()) == printed
    assert data["runs"][0]["figures"] == {name: printed[name] for name in NAMES}
    assert data["runs"][0]["perClass"]["AP"] == [printed[f"AP/{name}"] for name in data["classes"]]
    mean = np.mean([one for one in data["runs"][0]["ap50"] if one is not None])
    assert mean == pytest.approx(printed["AP50"], abs=1e-12)


def test_the_known_answer(shared_data: Path, tmp_path: Path) -> None:
    truth, found = known_answer(shared_data)
    evaluate_coco_files(truth, found, report=tmp_path)
    _, data = parsed(tmp_path)
    run, expected = data["runs"][0], json.loads((truth.parent / "expected.json").read_text())
    assert run["figures"] == pytest.approx(expected["bbox"], abs=1e-12)
    assert [sum(counts) for counts in run["count"]] == [83, 1, 0, 1, 0, 97]
    costs = [np.mean([one for one in kind if one is not None]) for kind in run["cost"]]
    assert costs == pytest.approx([0.1675747827, 0.0024988213, 0.0, 0.0002059923, 0.0, 0.0822873572], abs=1e-9)
    assert sum(data["objects"][-1]) == 830
    assert data["crowds"] == 9
    assert data["images"][0]["note"] == "no images were given"
    assert "COCO_val2014" in data["images"][0]["name"]
    for named in data["images"]:
        assert sum(named["runs"][0]["counts"][::2]) == sum(not one[5] for one in named["objects"])


def test_voc_has_its_own_figures_too(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "voc_known_answer"
    printed = evaluate_voc_files(folder, "test", folder / "detections.json", output=tmp_path)
    _, data = parsed(tmp_path / "report")
    run = data["runs"][0]
    assert {name: run["figures"][name] for name in ("mAP", "mAP_11_point", "AP", "AP50")} == {
        name: printed[name] for name in ("mAP", "mAP_11_point", "AP", "AP50")
    }
    assert printed["mAP"] == pytest.approx(0.578884, abs=1e-6)
    assert run["perClass"]["VOC"] == [printed[f"VOC/{name}"] for name in data["classes"]]
    stricter = evaluate_voc_files(folder, "test", folder / "detections.json", iou=0.75, report=tmp_path / "strict")
    assert parsed(tmp_path / "strict")[1]["runs"][0]["figures"]["mAP"] == stricter["mAP"] == pytest.approx(0.353917, abs=1e-6)


def _moved(value: float, drawn: np.ndarray) -> list[float]:
    """The figure and the interval of its draws, less what these lie above it on average."""
    return [value, *(np.quantile(drawn, [0.025, 0.975]) - (drawn.mean() - value))]


def test_intervals_are_those_of_a_literal_bootstrap(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VOC's means on images copied by hand, as often as each was drawn; of one run, and of two on the same draws."""
    monkeypatch.setattr(page, "RESAMPLES", 30)
    folder = shared_data / "voc_known_answer"
    rows = [row | {"score": 1.0 / (2 + n)} for n, row in enumerate(json.loads((folder / "detections.json").read_text()))]  # no ties
    fewer = [row for n, row in enumerate(rows) if n % 3]
    files = [write_json(tmp_path / f"{name}.json", some) for name, some in (("all", rows), ("fewer", fewer))]
    printed = evaluate_voc_files(folder, "test", files[1], report=tmp_path, compare=files[0])
    data = parsed(tmp_path)[1]
    truth, draw, literal = voc_truth(annotated_images(folder, "test")), np.random.default_rng(0), []
    for _ in range(30):
        times = np.bincount(draw.integers(0, len(truth.image_ids), len(truth.image_ids)), minlength=len(truth.image_ids))
        results = [evaluate_voc(*copied_voc(truth, some, times)) for some in (fewer, rows)]
        literal.append([[one.map_area, one.map_11_point] for one in results])
    drawn = np.array(literal)  # (30, 2 runs, 2 figures)
    for number, name in enumerate(("mAP", "mAP_11_point")):
        for run, one in zip(data["runs"], drawn[:, :, number].T, strict=True):
            assert run["intervals"][name] == pytest.approx(_moved(run["figures"][name], one), abs=1e-12)
        gains = drawn[:, 1, number] - drawn[:, 0, number]
        first, second = (run["figures"][name] for run in data["runs"])
        assert data["comparison"]["overall"][name] == pytest.approx(_moved(second - first, gains), abs=1e-12)
        assert np.ptp(gains) > 0.005
    assert data["runs"][0]["figures"]["mAP"] == printed["mAP"]
    assert data["resamples"] == 30


def test_cocos_ap_has_its_interval_in_one_run_too(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "RESAMPLES", 40)
    evaluate_coco_files(*known_answer(shared_data), report=tmp_path)
    run = parsed(tmp_path)[1]["runs"][0]
    assert run["intervals"].keys() == {"AP", "AP50"}
    for name, ious in (("AP", np.linspace(0.5, 0.95, 10).tolist()), ("AP50", [0.5])):
        verdicts = coco_verdicts(*known_answer(shared_data), ious=ious)
        interval = paired_bootstrap(verdicts, verdicts, resamples=40).first
        assert run["intervals"][name] == pytest.approx([run["figures"][name], interval.low, interval.high], abs=1e-12)


def test_masks_figures_are_shown_beside(tmp_path: Path) -> None:
    source = shapes(4)
    records = noisy_records(source)
    figures = evaluate_source(source, records) | {"segm/AP": 0.25, "segm/AP/circle": 0.5, "loss": 1.5}
    report_records(tmp_path, source, records, name="run", figures=figures)
    run = parsed(tmp_path)[1]["runs"][0]
    assert run["figures"]["segm/AP"] == 0.25
    assert run["figures"]["AP"] == figures["AP"]
    assert run["perClass"]["segm/AP"] == [0.5, None, None]


def test_text_of_data_sets_stays_text(tmp_path: Path) -> None:
    truth, rows = random_case(8, "bbox")
    truth["categories"][0]["name"] = HOSTILE
    for one in truth["images"]:
        one["file_name"] = f"<img src=x onerror=alert(1)>{HOSTILE}"
    found = write_json(tmp_path / "<i>&run.json", rows)
    evaluate_coco_files(write_json(tmp_path / "truth.json", truth), found, report=tmp_path)
    html, data = parsed(tmp_path)
    assert html.tags.count("script") == 2
    assert not {"b", "i", "img"} & set(html.tags)
    assert html.title == "Detection report: <i>&run"
    assert HOSTILE in data["classes"]
    assert data["images"][0]["name"] == f"<img src=x onerror=alert(1)>{HOSTILE}"
    assert "<" not in html.data
    script = (REPOSITORY / "detection" / "evaluation" / "report" / "page.js").read_text()
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script)


def test_marks_of_the_template_in_names_do_nothing(tmp_path: Path) -> None:
    truth, rows = random_case(8, "bbox")
    truth["categories"][0]["name"] = "/*SCRIPT*/<!--DATA--><!--TITLE-->"
    evaluate_coco_files(write_json(tmp_path / "truth.json", truth), write_json(tmp_path / "<!--DATA-->.json", rows), report=tmp_path)
    html, data = parsed(tmp_path)
    assert html.title == "Detection report: <!--DATA-->"
    assert "/*SCRIPT*/<!--DATA--><!--TITLE-->" in data["classes"]


def test_nothing_found(tmp_path: Path) -> None:
    truth, _ = coco_files(tmp_path)
    evaluate_coco_files(truth, write_json(tmp_path / "none.json", []), report=tmp_path)
    _, data = parsed(tmp_path)
    assert data["runs"][0]["figures"]["AP"] == 0.0
    assert data["runs"][0]["threshold"] == 0.5
    assert sum(map(sum, data["runs"][0]["count"][:MISSED])) == 0
    assert sum(data["runs"][0]["count"][MISSED]) == sum(data["objects"][-1]) > 0
    assert all(one["runs"][0]["found"] == [] for one in data["images"])


def test_nothing_there(tmp_path: Path) -> None:
    truth = write_json(tmp_path / "t.json", {"images": [], "annotations": [], "categories": []})
    evaluate_coco_files(truth, write_json(tmp_path / "none.json", []), report=tmp_path)
    data = parsed(tmp_path)[1]
    assert (data["images"], data["runs"][0]["intervals"]) == ([], {})


def test_unknown_ids_are_refused(tmp_path: Path) -> None:
    truth, found = coco_files(tmp_path)
    row = json.loads(found.read_text())[0]
    for key, words in (("image_id", "no image of the annotations has the id"), ("category_id", "no category has the id")):
        wrong = write_json(tmp_path / "wrong.json", [row | {key: 123456}])
        with pytest.raises(InputError, match=words):
            evaluate_coco_files(truth, wrong, report=tmp_path / "r")
        with pytest.raises(InputError, match=words):
            evaluate_coco_files(truth, found, report=tmp_path / "r", compare=wrong)
    source = shapes(2)
    with pytest.raises(InputError, match="no image of the annotations has the id"):
        report_source(tmp_path / "r", source, [{"image_id": 99, "category_id": 1, "score": 0.5, "bbox": [0, 0, 5, 5]}], name="run")
    assert not (tmp_path / "r").exists()


def test_two_runs(tmp_path: Path) -> None:
    source = shapes(30)
    good, bad = noisy_records(source, noise=0.03), noisy_records(source, seed=1, noise=0.12, lost=0.4)
    write_results(tmp_path / "better" / "eval" / "detections.json", source, good)
    report_records(tmp_path, source, bad, name="worse", compare=judge_other(source, tmp_path / "better"))
    _, data = parsed(tmp_path)
    assert [run["name"] for run in data["runs"]] == ["worse", "better"]
    gain, low, high = data["comparison"]["overall"]["AP"]
    figures = [evaluate_source(source, records)["AP"] for records in (bad, good)]
    assert gain == pytest.approx(figures[1] - figures[0], abs=1e-6)
    assert 0 < low < gain < high
    assert len(data["comparison"]["classes"]) == 3
    assert all(len(one["runs"]) == 2 for one in data["images"])
    assert [run["figures"]["AP"] for run in data["runs"]] == pytest.approx(figures, abs=1e-6)
    with pytest.raises(InputError, match=r"there is no eval/detections.json in this folder"):
        judge_other(source, tmp_path)


def test_names_of_runs() -> None:
    assert run_name(Path("runs/r50/eval/detections.json")) == "r50"
    assert run_name(Path("runs/found.json")) == "found"
    assert run_name(REPOSITORY / "tools") == "tools"
    assert run_name(Path("gain/runs/vgg16/seed_0/eval/detections.json")) == "vgg16/seed_0"


def test_two_runs_of_one_name_are_told_apart(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "RESAMPLES", 5)
    truth, found = known_answer(shared_data)
    evaluate_coco_files(truth, found, report=tmp_path, compare=found)
    names = [run["name"] for run in parsed(tmp_path)[1]["runs"]]
    assert names == [f"{found.stem} (first)", f"{found.stem} (second)"]


def test_names_that_are_no_text_are_shown_with_a_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "RESAMPLES", 5)
    truth = {
        "images": [{"id": 1, "file_name": "a\ud800.jpg", "height": 9, "width": 9}],
        "annotations": [],
        "categories": [{"id": 1, "name": "x"}],
    }
    files = [write_json(tmp_path / "truth.json", truth), write_json(tmp_path / "found.json", [])]
    evaluate_coco_files(*files, report=tmp_path / "report")
    assert "a?.jpg" in (tmp_path / "report/index.html").read_text()


def test_the_tools_write_it_and_say_where(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "RESAMPLES", 5)
    truth, found = known_answer(shared_data)
    files = ["--annotations", str(truth), "--detections", str(found)]
    assert eval_coco.main([*files, "--report", str(tmp_path / "r"), "--compare", str(found)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report {tmp_path / 'r' / 'index.html'}"
    assert len(parsed(tmp_path / "r")[1]["runs"]) == 2
    assert eval_coco.main([*files, "--iou-type", "segm", "--report", str(tmp_path)]) == 1
    assert "a report shows boxes, not segm" in capsys.readouterr().err
    assert eval_coco.main([*files, "--compare", str(found)]) == 1
    assert "name its folder with --report" in capsys.readouterr().err
    folder = shared_data / "voc_known_answer"
    voc = ["--devkit", str(folder), "--detections", str(folder / "detections.json")]
    assert eval_voc.main([*voc, "--report", str(tmp_path / "v"), "--compare", str(folder / "detections.json")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report {tmp_path / 'v' / 'index.html'}"
    assert eval_voc.main(voc) == 0
    assert "report" not in capsys.readouterr().out
