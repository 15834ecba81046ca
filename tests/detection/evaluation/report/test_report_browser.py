"""The report in a headless Chromium: it opens fast, without a complaint and without asking for anything, and its filters filter."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
from headless import Page, chromium, find_chromium
from report_cases import noisy_records, shapes

from detection.evaluation.report.page import page as fill_page
from detection.evaluation.report.report import judge_other, report_records
from detection.evaluation.results import write_results

READY = "document.documentElement.dataset.ready"
MOST_S = 2.0
HOSTILE = "</script><b>bold</b><img src=x onerror=document.title='stolen'>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = find_chromium()
    if program is None:
        pytest.skip("there is no Chromium here; set RESBACKBONE_CHROMIUM to one, or put it on PATH")
    with chromium(program, tmp_path_factory.mktemp("profile")) as page:
        page.emulate()
        yield page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one/ and two/: the report of one run on 60 drawn images, and of two."""
    folder, source = tmp_path_factory.mktemp("reports"), shapes(60)
    report_records(folder / "one", source, noisy_records(source), name="one")
    write_results(folder / "second" / "eval" / "detections.json", source, noisy_records(source, seed=1, noise=0.1))
    report_records(folder / "two", source, noisy_records(source), name="first", compare=judge_other(source, folder / "second"))
    return folder


@pytest.fixture
def one(browser: Page, folder: Path) -> Page:
    """The report of one run, opened anew."""
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(folder / "one" / "index.html", ready=READY)
    return browser


def data_of(report: Path) -> dict[str, Any]:
    text = (report / "index.html").read_text(encoding="utf-8")
    return json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])


def shown(page: Page) -> list[str]:
    """The images that the filters left, all of them."""
    while page.run("!document.getElementById('more').hidden"):
        page.click("#more")
    return page.run("[...document.querySelectorAll('#grid figcaption')].map(one => one.title)")


def text_of(page: Page, selector: str) -> str:
    return page.run(f"document.querySelector({json.dumps(selector)}).textContent")


def choose_class(page: Page, number: int) -> None:
    page.run(f"(() => {{ const one = document.getElementById('class'); one.value = {number}; one.dispatchEvent(new Event('change')); }})()")


def expected_images(data: dict[str, Any], *, kind: int | None = None, label: int | None = None) -> set[str]:
    """Which images have an error of a kind, and of a class, at the threshold the page starts with."""
    threshold, names = math.floor(data["runs"][0]["threshold"] * 100) / 100, set()
    for image in data["images"]:
        found = [box for box in image["runs"][0]["found"] if box[5] >= threshold]
        objects = image["objects"]
        for box in found:
            labels = {box[4]} | ({objects[box[7]][4]} if box[7] >= 0 else set())
            if (kind is None or box[6] == kind) and (label is None or label in labels):
                names.add(image["name"])
        for number, one in enumerate(objects):
            is_asked = kind is None or (kind == 5 and number in image["runs"][0]["missed"])
            if is_asked and (label is None or one[4] == label):
                names.add(image["name"])
    return names


def test_it_opens_fast_and_quietly(browser: Page, folder: Path) -> None:
    browser.complaints.clear()
    browser.requests.clear()
    reports = [folder / name / "index.html" for name in ("one", "two", "one")]
    seconds = [browser.open(report, ready=READY) for report in reports]
    assert min(seconds) < MOST_S, seconds  # of three, as the machine may be busy with other things
    assert browser.complaints == []
    assert browser.requests == [report.resolve().as_uri() for report in reports]
    assert browser.run("[...document.querySelectorAll('#grid image')].length") == 24


def test_figures_and_charts_are_there(one: Page, folder: Path) -> None:
    data = data_of(folder / "one")
    assert text_of(one, "[data-figure='AP']") == f"{data['runs'][0]['figures']['AP']:.3f}"
    exact = one.run("[...document.querySelectorAll('[data-figure-exact]')].map(cell => Number(cell.dataset.figureExact))")
    assert exact == list(data["runs"][0]["figures"].values())
    _, low, high = data["runs"][0]["intervals"]["AP"]
    assert text_of(one, "[data-interval='AP']") == f"95 %: {low:.3f} … {high:.3f}"
    assert one.run("document.querySelectorAll('#figures tbody tr')[0].lastChild.textContent") == f"{low:.3f} … {high:.3f}"
    assert one.run("document.querySelectorAll('#pr path').length") == 3
    assert one.run("document.querySelectorAll('#sizes rect').length") >= 4
    assert one.run("document.querySelectorAll('#class-table tbody tr').length") == 3
    assert one.run("document.querySelectorAll('#matrix tbody tr').length") == 4
    assert one.run("document.querySelectorAll('#kinds button').length") == 6


@pytest.mark.parametrize("kind", range(6))
def test_clicking_a_kind_filters_the_images(kind: int, one: Page, folder: Path) -> None:
    everything, wanted = shown(one), expected_images(data_of(folder / "one"), kind=kind)
    assert len(everything) == 60
    one.click(f"#kind-filter [data-kind='{kind}']")
    assert set(shown(one)) == wanted
    assert 0 < len(wanted) < 60
    assert text_of(one, "#image-count").startswith(f"{len(wanted)} of the 60 images")
    assert one.run(f"document.querySelector(\"#kinds [data-kind='{kind}']\").getAttribute('aria-pressed')") == "true"
    one.click("#kind-filter [data-kind='-1']")
    assert shown(one) == everything
    one.click(f"#kinds [data-kind='{kind}']")  # the bar is a switch for the same
    assert set(shown(one)) == wanted
    assert one.complaints == []


def test_choosing_a_class_filters_everything(one: Page, folder: Path) -> None:
    data, before = data_of(folder / "one"), text_of(one, "#pr .keys")
    for label in range(3):
        choose_class(one, label)
        assert set(shown(one)) == expected_images(data, label=label)
        assert f"IoU 0.5: {data['runs'][0]['ap50'][label]:.3f}" in text_of(one, "#pr .keys")
        assert text_of(one, "#class-table tr.chosen button") == data["classes"][label]
        one.click("#kind-filter [data-kind='1']")
        assert set(shown(one)) == expected_images(data, label=label, kind=1)
        one.click("#kind-filter [data-kind='-1']")
    one.click("#class-table tr.chosen button")
    assert text_of(one, "#pr .keys") == before
    assert len(shown(one)) == 60
    assert one.complaints == []


def test_the_threshold_and_the_boxes_to_draw(one: Page) -> None:
    assert one.run("[document.getElementById('threshold').min, document.getElementById('threshold').step]") == ["0.05", "0.01"]
    boxes = "document.querySelectorAll('#grid .box{}').length"
    before, truth, right = (one.run(boxes.format(name)) for name in ("", ".truth", ".right"))
    assert right == truth > 10  # an object that is found, and what found it
    one.click("#draw-right")
    assert one.run(boxes.format("")) == before - right
    one.click("#draw-truth")
    assert one.run(boxes.format(".truth") + "+" + boxes.format(".unfound")) == 0
    one.click("#draw-right")
    one.click("#draw-truth")
    assert one.run(boxes.format("")) == before
    one.click("#draw-names")
    assert one.run("document.querySelectorAll('#grid text').length") == 0
    slide = "(() => { const one = document.getElementById('threshold'); one.value = 0.95; one.dispatchEvent(new Event('input')); })()"
    one.run(slide)
    assert text_of(one, "#threshold-value") == "0.95"
    assert one.run(boxes.format(".right")) < right
    assert one.run(boxes.format(".unfound")) > 10
    assert "not found" in text_of(one, "#grid figcaption span")


def test_orders(one: Page) -> None:
    def right_shares() -> list[float]:
        counts = one.run("[...document.querySelectorAll('#grid figcaption span')].map(one => one.textContent.match(/\\d+/g).map(Number))")
        return [right / max(right + wrong + unfound, 1) for right, wrong, unfound in counts]

    shown(one)
    assert right_shares() == sorted(right_shares())
    one.run("(() => { const one = document.getElementById('order'); one.value = 'best'; one.dispatchEvent(new Event('change')); })()")
    shown(one)
    assert right_shares() == sorted(right_shares(), reverse=True)
    one.click("#class-table [data-sort='ap0']")
    column = "[...document.querySelectorAll('#class-table tbody tr')].map(row => Number(row.children[2].textContent))"
    down = one.run(column)
    assert down == sorted(down, reverse=True)
    one.click("#class-table [data-sort='ap0']")
    assert one.run(column) == down[::-1]


def test_the_viewer_by_mouse_and_keyboard(one: Page) -> None:
    names = shown(one)
    one.click("#grid figure:nth-child(2) button")
    assert one.run("document.getElementById('viewer').open")
    assert text_of(one, "#viewer-title") == names[1]
    one.press("ArrowRight", 39)
    assert text_of(one, "#viewer-title") == names[2]
    one.press("ArrowLeft", 37)
    one.press("ArrowLeft", 37)
    one.press("ArrowLeft", 37)
    assert text_of(one, "#viewer-title") == names[0]
    one.press("Escape", 27)
    assert not one.run("document.getElementById('viewer').open")
    one.run("document.querySelector(\"#kind-filter [data-kind='5']\").focus()")
    one.press("Enter", 13)
    assert one.run("document.querySelector(\"#kind-filter [data-kind='5']\").getAttribute('aria-pressed')") == "true"
    assert one.complaints == []


def test_two_runs_side_by_side(browser: Page, folder: Path) -> None:
    browser.complaints.clear()
    browser.open(folder / "two" / "index.html", ready=READY)
    data = data_of(folder / "two")
    assert text_of(browser, "#runs") == "firstsecond"
    assert browser.run("document.querySelectorAll('#grid figure:first-child svg').length") == 2
    assert browser.run("document.querySelectorAll('#pr path').length") == 6
    gain, low, high = data["comparison"]["overall"]["AP"]
    row = browser.run(
        "[...document.querySelectorAll('#figures tbody tr')].map(one => one.textContent).find(text => text.startsWith('AP, IoU 0.50 to'))"
    )
    sign = "−" if gain < 0 else "+"
    assert f"{sign}{abs(gain):.4f}" in row
    assert f"{abs(low):.3f} … " in row
    assert f"{abs(high):.3f}" in row
    before = text_of(browser, "#matrix")
    browser.click("#confusion-run button:nth-child(2)")
    assert text_of(browser, "#matrix") != before
    assert browser.complaints == []


def open_changed(page: Page, report: Path, changes: dict[str, Any]) -> None:
    """A report with other data: a value for a path of keys, such as runs.0.iou."""
    data, path = data_of(report), report.parent / "changed.html"
    for keys, value in changes.items():
        *way, last = [int(key) if key.isdigit() else key for key in keys.split(".")]
        reduce(getitem, way, data)[last] = value
    path.write_text(fill_page(data), encoding="utf-8")
    page.complaints.clear()
    page.open(path, ready=READY)


def test_a_detector_of_low_scores_is_found_where_the_matrix_finds_it(browser: Page, tmp_path: Path) -> None:
    """Its best F1 lies far below 0.05; the captions at the slider's beginning count what the confusion matrix counts."""
    source = shapes(12)
    records = noisy_records(source)
    for one in records:
        one.detections.scores.mul_(0.04)
    browser.complaints.clear()
    browser.open(report_records(tmp_path, source, records, name="low"), ready=READY)
    (run,) = data_of(tmp_path)["runs"]
    least = math.floor(run["threshold"] * 1000) / 1000
    slider = browser.run("(() => { const one = document.getElementById('threshold'); return [one.min, one.step, one.value]; })()")
    assert slider == [f"{least:g}", "0.001", f"{least:g}"]
    assert text_of(browser, "#threshold-value") == f"{least:.3f}"
    texts = browser.run("[...document.querySelectorAll('#grid figcaption span')].map(one => one.textContent)")
    right = [int(re.findall(r"\d+", text)[0]) for text in texts]
    assert sum(right) == sum(times for there, called, times in run["confusion"] if there == called) > 10
    assert f"Detections scored {run['threshold']:.3f} or more" in text_of(browser, "#confusion-note")
    assert (len(right), browser.complaints) == (12, [])


def test_differences_without_an_interval(browser: Page, folder: Path) -> None:
    open_changed(browser, folder / "two", {"comparison.classes.1": [0.5, None, None], "comparison.classes.2": None})
    rows = browser.run("[...document.querySelectorAll('#class-table tr')].map(row => [...row.children].map(one => one.textContent))")
    names, place = data_of(folder / "two")["classes"], rows[0].index("95 % interval")
    cells = {row[0]: row[place - 1 : place + 1] for row in rows}
    assert [cells[name] for name in names[1:]] == [["+0.500", "–"], ["–", "–"]]
    assert " … " in cells[names[0]][1]
    assert (
        browser.run("[...document.querySelectorAll('#class-table td')].filter(one => one.textContent === '+0.500')[0].className") == "quiet"
    )
    browser.click("#class-table [data-sort='interval']")
    assert "fewer than 5 images" in text_of(browser, "#classes-note")
    assert browser.complaints == []


@pytest.mark.parametrize("report", ["one", "two"])
def test_a_set_of_one_image_has_no_interval(browser: Page, folder: Path, report: str) -> None:
    changes = {"resamples": 0, "runs.0.intervals": {}} | ({"comparison.overall": {}} if report == "two" else {})
    open_changed(browser, folder / report, changes)
    assert " … " not in text_of(browser, "#cards") + text_of(browser, "#figures")
    assert "There are no intervals" in text_of(browser, "#figures")
    assert browser.complaints == []


def test_an_interval_from_0_and_vocs_threshold(browser: Page, folder: Path) -> None:
    open_changed(browser, folder / "one", {"runs.0.intervals.AP": [0.1, -0.0, 0.25], "runs.0.figures.mAP": 0.75, "runs.0.iou": 0.01})
    assert text_of(browser, "[data-interval='AP']") == "95 %: 0.000 … 0.250"
    assert text_of(browser, "#cards .card") == "VOC mAP0.750area, IoU 0.01"
    assert "VOC mAP, area, IoU 0.01" in text_of(browser, "#figures")


def test_every_control_has_a_name(one: Page) -> None:
    nameless = one.run(
        "[...document.querySelectorAll('button, select, input, [role=img]')].filter(one => !(one.textContent.trim() || one.ariaLabel ||"
        " one.closest('label'))).map(one => one.outerHTML)"
    )
    assert nameless == []
    assert one.run("document.documentElement.lang") == "en"


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_in_light_and_dark(browser: Page, folder: Path, dark: bool) -> None:
    """WCAG AA: a contrast of 4.5 between text and what it stands on."""
    browser.emulate(dark=dark)
    browser.open(folder / "one" / "index.html", ready=READY)
    for selector in ("h1", ".quiet", "nav a", ".card b", "td", "#kinds span", "figcaption span", "legend", "#legend span"):
        ink, paper = browser.run(
            f"(() => {{ let one = document.querySelector({json.dumps(selector)}); const ink = getComputedStyle(one).color;"
            "while (getComputedStyle(one).backgroundColor === 'rgba(0, 0, 0, 0)') one = one.parentElement;"
            "return [ink, getComputedStyle(one).backgroundColor].map(text => text.match(/[0-9]+/g).slice(0, 3).map(Number)); })()"
        )
        light, shade = sorted((_luminance(ink), _luminance(paper)), reverse=True)
        assert (light + 0.05) / (shade + 0.05) >= 4.5, selector
        assert (_luminance(paper) < 0.1) == dark, selector
    browser.click("#theme")
    assert browser.run("document.documentElement.classList.contains('dark')") != dark
    browser.emulate()


def _luminance(color: list[int]) -> float:
    linear = [(one / 255 / 12.92) if one <= 10 else ((one / 255 + 0.055) / 1.055) ** 2.4 for one in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_narrow_window_has_no_sideways_scrolling(one: Page) -> None:
    one.emulate(width=380, height=800)
    assert one.run("document.documentElement.scrollWidth") <= 380
    one.emulate()


def test_hostile_text_does_nothing(browser: Page, folder: Path, tmp_path: Path) -> None:
    data = data_of(folder / "one")
    data["classes"] = [HOSTILE, "&lt;i&gt;", "${1}"]
    for one in data["images"]:
        one["name"] = HOSTILE
    data["runs"][0]["name"] = HOSTILE
    (tmp_path / "index.html").write_text(fill_page(data), encoding="utf-8")
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(tmp_path / "index.html", ready=READY)
    choose_class(browser, 0)
    browser.click("#grid figure button")
    assert browser.run("document.querySelectorAll('main b:not(.card b), img, i b').length") == 0
    assert browser.run("document.title") == f"Detection report: {HOSTILE}"
    assert text_of(browser, "#viewer-title") == HOSTILE
    assert text_of(browser, "#class option:nth-child(2)") == HOSTILE
    assert len(browser.requests) == 1
    assert browser.complaints == []
