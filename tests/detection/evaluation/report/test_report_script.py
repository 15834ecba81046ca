"""The page's own script in Node, with a document that does nothing: what stands at a score, what is missed, and what captions say."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from detection.evaluation.report import images
from detection.evaluation.report.report import evaluate_coco_files

REPOSITORY = Path(__file__).resolve().parents[4]
SCRIPT = REPOSITORY / "detection" / "evaluation" / "report" / "page.js"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="there is no Node here to run the page's script")

# Any property of anything is a function that gives the same again, so that the page draws itself into nothing.
HARNESS = """
const fs = require('fs'), vm = require('vm'), [data, expression] = JSON.parse(fs.readFileSync(0, 'utf8'));
const special = {textContent: JSON.stringify(data), [Symbol.toPrimitive]: () => '', [Symbol.iterator]: () => [].values()};
const nothing = new Proxy(function () {}, {
  get: (_, name) => name in special ? special[name] : nothing, apply: () => nothing, set: () => true });
const world = vm.createContext({document: nothing, matchMedia: () => nothing});
vm.runInContext(fs.readFileSync(process.argv[1], 'utf8'), world);
process.stdout.write(vm.runInContext(`JSON.stringify(${expression})`, world));
"""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Image near: an object found at 0.6 and one badly placed at 0.4; image far: nothing near its object, and three claims left out."""
    monkeypatch.setattr(images, "MOST_WRONG", 1)
    boxes = [(1, [0.0, 0.0, 9.0, 9.0]), (1, [32.0, 0.0, 9.0, 9.0]), (2, [0.0, 0.0, 9.0, 9.0])]
    found = [
        (1, boxes[0][1], 0.6),
        (1, [36.0, 0.0, 9.0, 9.0], 0.4),
        *((2, [50.0, 50.0, 9.0, 9.0], score) for score in (0.9, 0.7, 0.2, 0.2)),
    ]
    truth = {
        "images": [{"id": n, "file_name": name, "width": 64, "height": 64} for n, name in ((1, "near"), (2, "far"))],
        "annotations": [{"id": n, "image_id": image, "category_id": 1, "bbox": box} for n, (image, box) in enumerate(boxes, 1)],
        "categories": [{"id": 1, "name": "thing"}],
    }
    rows = [{"image_id": image, "category_id": 1, "bbox": box, "score": score} for image, box, score in found]
    for name, content in (("truth", truth), ("found", rows)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    evaluate_coco_files(tmp_path / "truth.json", tmp_path / "found.json", report=tmp_path)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    return json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])


def chosen(data: Any, choices: str) -> list[list[str]]:
    """Name and caption of the images that the page shows for these choices."""
    expression = f"(Object.assign(choice, {choices}), chosenImages().map(one => [one.image.name, counted(one.verdicts[0])]))"
    command = [str(NODE), "-e", HARNESS, str(SCRIPT)]
    done = subprocess.run(command, input=json.dumps([data, expression]), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_captions_count_what_stands_at_the_score_and_what_was_left_out(data: Any) -> None:
    assert chosen(data, "{threshold: 0.5}") == [["far", "0 right, 2 wrong, 1 not found"], ["near", "1 right, 0 wrong, 1 not found"]]
    assert chosen(data, "{threshold: 0.1}") == [["far", "0 right, 4 wrong, 1 not found"], ["near", "1 right, 1 wrong, 1 not found"]]


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.95])
def test_missed_shows_the_images_that_were_counted_whatever_the_score(data: Any, threshold: float) -> None:
    assert data["runs"][0]["count"][5] == [1]
    assert [name for name, _ in chosen(data, f"{{threshold: {threshold}, kind: MISSED}}")] == ["far"]
