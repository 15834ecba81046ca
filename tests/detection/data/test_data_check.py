"""The checker: every bad file is found, by file, image and annotation, in one pass; its verdict is what training does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from detection.data.check import check_coco, check_splits, check_voc
from detection.data.problems import ACTIONS, POLICY
from resbackbone.errors import InputError
from tools import check_data

# annotation file -> the kinds found once images are looked at too
COCO_KINDS = {
    "coco_valid.json": [],
    "coco_not_json.json": ["not_json"],
    "coco_missing_images.json": ["missing_key"],
    "coco_missing_categories.json": ["empty_image", "missing_key"],
    "coco_unknown_category.json": ["unknown_category"],
    "coco_unknown_image.json": ["unknown_image"],
    "coco_duplicate_ids.json": ["duplicate_id"],
    "coco_nan_box.json": ["box_not_finite"],
    "coco_zero_area.json": ["box_zero_area"],
    "coco_negative_wh.json": ["box_negative"],
    "coco_box_outside.json": ["box_outside", "box_partly_outside", "empty_image"],
    "coco_string_ids.json": ["wrong_type"],
    "coco_missing_file.json": ["missing_file"],
    "coco_wrong_size.json": ["wrong_size"],
    "coco_path_escape.json": ["path_escape"],
}
VOC_KINDS = {
    "voc_valid.xml": [],
    "voc_missing_bndbox.xml": ["missing_key"],
    "voc_swapped_corners.xml": ["box_negative"],
    "voc_zero_based.xml": ["box_zero_based"],
    "voc_float_coords.xml": ["box_fractional"],
    "voc_unknown_class.xml": ["unknown_category"],
    "voc_box_outside.xml": ["box_partly_outside"],
    "voc_no_objects.xml": ["empty_image"],
    "voc_not_xml.xml": ["not_xml"],
    "entity_bomb.xml": ["unsafe_xml"],
}
IMAGE_KINDS = {
    "truncated.jpg": "unreadable_image",
    "zero_bytes.jpg": "unreadable_image",
    "html_named.jpg": "unreadable_image",
    "huge_header.png": "unreadable_image",
    "cmyk.jpg": "unusual_image",
    "gray16.png": "unusual_image",
    "palette_alpha.png": "unusual_image",
    "rgba.png": "unusual_image",
    "exif_rotated_6.jpg": "unusual_image",
    "gray.jpg": None,
    "one_pixel.png": None,
    "upright.png": None,
    "ok_1.jpg": None,
    "ok_2.jpg": None,
}
SIZES = {"one_pixel.png": (1, 1), "gray16.png": (120, 160), "palette_alpha.png": (120, 160), "rgba.png": (120, 160)}
SIZES |= {"upright.png": (213, 320), "exif_rotated_6.jpg": (213, 320), "ok_2.jpg": (213, 320)}


def kinds_of(report: object) -> list[str]:
    return sorted({problem.kind for problem in report.problems})  # type: ignore[attr-defined]


def test_every_bad_input_is_in_these_tables(bad_inputs: Path) -> None:
    assert {path.name for path in bad_inputs.iterdir()} == {*COCO_KINDS, *VOC_KINDS, *IMAGE_KINDS}


@pytest.mark.parametrize("name", sorted(COCO_KINDS))
def test_coco_files(bad_inputs: Path, name: str) -> None:
    report = check_coco(bad_inputs / name, bad_inputs)
    # These files have masks too; only where the box was found sound is the mask looked at.
    assert kinds_of(report) == COCO_KINDS[name]
    assert report.refused == any(POLICY[kind] == "refuse" for kind in COCO_KINDS[name])


@pytest.mark.parametrize("name", sorted(VOC_KINDS))
def test_voc_files(devkit_with: Callable[..., Path], name: str) -> None:
    report = check_voc(devkit_with(name))
    assert kinds_of(report) == VOC_KINDS[name]
    assert report.refused == any(POLICY[kind] == "refuse" for kind in VOC_KINDS[name])


@pytest.mark.parametrize("decode", [True, False])
def test_all_images_in_one_pass(coco_with: Callable[..., Path], decode: bool) -> None:
    names = sorted(IMAGE_KINDS)
    sizes = {number: SIZES.get(name, (228, 320)) for number, name in enumerate(names, start=1)}
    root = coco_with(*names, sizes=sizes)
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    for one in content["annotations"]:
        one["bbox"] = [0, 0, 1, 1]
    path.write_text(json.dumps(content))
    report = check_splits("coco", root, ["train"], decode=decode)
    found = {names[int(str(problem.image)) - 1]: problem.kind for problem in report.problems}
    expected = {name: kind for name, kind in IMAGE_KINDS.items() if kind}
    if not decode:
        del expected["truncated.jpg"]  # its header is whole
    assert found == expected
    assert not report.refused


def test_all_damage_of_one_file_in_one_pass(coco_with: Callable[..., Path]) -> None:
    root = coco_with(None, None, "zero_bytes.jpg", None, sizes={2: (99, 99)})
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    extra = [
        {"id": 10, "image_id": 1, "category_id": 9, "bbox": [0, 0, 5, 5]},
        {"id": 11, "image_id": 8, "category_id": 7, "bbox": [0, 0, 5, 5]},
        {"id": 12, "image_id": 1, "category_id": 7, "bbox": [0, 0, float("nan"), 5]},
        {"id": 13, "image_id": 1, "category_id": 7, "bbox": [0, 0, 0, 5]},
        {"id": 14, "image_id": 1, "category_id": 7, "bbox": [0, 0, -3, 5]},
        {"id": 15, "image_id": 1, "category_id": 7, "bbox": [300, 0, 90, 5]},
        {"id": 16, "image_id": 1, "category_id": 7, "bbox": [400, 0, 90, 5]},
        {"id": 17, "image_id": 1, "category_id": 7},
        {"id": 18, "image_id": 1, "category_id": "7", "bbox": [0, 0, 5, 5]},
        {"id": 18, "image_id": 1, "category_id": 7, "bbox": [0, 0, 5, 5]},
        {"id": 18, "image_id": 1, "category_id": 7, "bbox": [0, 0, 5, 5]},
    ]
    content["annotations"] += extra
    content["images"] += [
        {"id": 5, "file_name": "/etc/passwd", "height": 1, "width": 1},
        {"id": 6, "file_name": "6.jpg", "height": 1, "width": 1},
    ]
    content["images"] += [{"id": 7, "file_name": "1.jpg", "height": 0, "width": 1}]
    path.write_text(json.dumps(content))
    report = check_splits("coco", root, ["train"])
    found = {(problem.kind, problem.image, problem.annotation) for problem in report.problems}
    assert found == {
        ("unknown_category", 1, 10),
        ("unknown_image", None, 11),
        ("box_not_finite", 1, 12),
        ("box_zero_area", 1, 13),
        ("box_negative", 1, 14),
        ("box_partly_outside", 1, 15),
        ("box_outside", 1, 16),
        ("missing_key", None, 17),
        ("wrong_type", None, 18),
        ("duplicate_id", None, 18),
        ("path_escape", 5, None),
        ("missing_file", 6, None),
        ("bad_size", 7, None),
        ("wrong_size", 2, None),
        ("unreadable_image", 3, None),
    }


@pytest.mark.parametrize("nothing", [None, [], "left out"])
def test_a_file_of_boxes_alone_is_sound(tmp_path: Path, nothing: Any) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((60, 80, 3), np.uint8))
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "iscrowd": 0}
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.png", "height": 60, "width": 80}],
        "categories": [{"id": 1, "name": "x"}],
    }
    content["annotations"] = [box | ({} if nothing == "left out" else {"segmentation": nothing})]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    assert check_coco(tmp_path / "boxes.json", tmp_path).problems == []
    outline = {"id": 2, "segmentation": [[1, 1, 9, 1, 9, 9]]}
    content["annotations"].append(box | outline)
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    assert kinds_of(check_coco(tmp_path / "boxes.json", tmp_path)) == ["bad_mask"]


def test_bad_masks_are_among_them(coco_with: Callable[..., Path]) -> None:
    root = coco_with(None, None, "zero_bytes.jpg", None)
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = {"size": [228, 320], "counts": "zzzzzzzzzzzz"}
    content["annotations"][1]["segmentation"] = {"size": [228, 320], "counts": [-5, 72965]}
    content["annotations"][2]["segmentation"] = [[1e9, 0, 2e9, 1e9, 5, 5]]
    content["annotations"][3]["segmentation"] = [["a", 1, 2, 3, 4, 5]]
    path.write_text(json.dumps(content))
    report = check_coco(path, root / "train")
    masks = [("bad_mask", number, number) for number in (1, 2, 3, 4)]
    assert {(one.kind, one.image, one.annotation) for one in report.problems} == {*masks, ("unreadable_image", 3, None)}
    assert report.refused


def test_real_data_has_no_refused_problem(coco_mini: Path, shared_data: Path) -> None:
    report = check_splits("coco", coco_mini, ["train2017", "val2017"], masks=True, decode=False)
    assert not report.refused
    assert [(problem.kind, problem.image) for problem in report.problems] == [("empty_image", 226111), ("empty_image", 58636)]
    folder = shared_data / "pennfudan"
    assert not check_coco(folder / "pennfudan_test.json", folder / "PennFudanPed" / "JPEGImages", decode=False).problems


def test_drawn_and_home_made_sources_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_splits("shapes", None, ["val"]).problems == []
    (tmp_path / "odd_format").mkdir()
    (tmp_path / "odd_format" / "reader.py").write_text(
        "from detection.data import shapes\nfrom detection.data.images import UnreadableImage\n\n\n"
        "class Odd(shapes.ShapesSource):\n    def read_image(self, index):\n"
        "        if index == 1:\n            raise UnreadableImage('one is gone')\n"
        "        return super().read_image(index)[: 40 if index == 2 else None]\n\n\n"
        "def load(root, split, *, masks=False):\n    return Odd(**vars(shapes.load(root, split, images=4, size=64)))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    report = check_splits("odd_format.reader", None, ["val"])
    assert [(problem.kind, problem.image) for problem in report.problems] == [("unreadable_image", 2), ("wrong_size", 3)]


def test_splits_with_other_classes(coco_with: Callable[..., Path]) -> None:
    root = coco_with(None)
    shutil.copytree(root / "train", root / "val")
    text = (root / "annotations" / "instances_train.json").read_text()
    (root / "annotations" / "instances_val.json").write_text(text.replace('"thing"', '"other"'))
    report = check_splits("coco", root, ["train", "val"])
    assert report.refused
    assert "only in train ['thing'], only in val ['other']" in str(report.problems[0])


def test_the_policy_has_a_word_for_every_kind() -> None:
    assert set(POLICY.values()) == set(ACTIONS)


# The tool -----------------------------------------------------------------------------------------------------------------------------


def test_tool_coco(bad_inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report.json"
    arguments = ["--images", str(bad_inputs), "--output", str(output)]
    assert check_data.main(["--coco", str(bad_inputs / "coco_nan_box.json"), *arguments]) == 1
    printed = capsys.readouterr().out
    assert "box_not_finite" in printed
    assert "refuse: " in printed
    assert "training would refuse this data" in printed
    report = json.loads(output.read_text())
    assert report["would_refuse"] is True
    assert report["kinds"] == {"box_not_finite": {"count": 1, "training": "refuse"}}
    assert report["problems"][0]["annotation"] == 2
    assert check_data.main(["--coco", str(bad_inputs / "coco_valid.json"), *arguments]) == 0
    assert "no problem found" in capsys.readouterr().out


def test_tool_voc(devkit_with: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = devkit_with("voc_zero_based.xml", "voc_unknown_class.xml")
    output = tmp_path / "report.json"
    for devkit in (root, root / "VOCdevkit", root / "VOCdevkit" / "VOC2012"):
        assert check_data.main(["--voc", str(devkit), "--output", str(output)]) == 1
        assert set(json.loads(output.read_text())["kinds"]) == {"box_zero_based", "unknown_category"}
    shutil.rmtree(root / "VOCdevkit" / "VOC2012" / "ImageSets")
    (root / "VOCdevkit" / "VOC2012" / "Annotations" / "2008_000002.xml").unlink()
    assert check_data.main(["--voc", str(root), "--output", str(output)]) == 0
    assert "clip = " in capsys.readouterr().out


def test_tool_config(tmp_path: Path, coco_mini: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, output = tmp_path / "run.yaml", tmp_path / "report.json"
    config.write_text(f"data: {{kind: coco, root: {coco_mini}, train: train2017, val: val2017}}\n")
    assert check_data.main(["--config", str(config), "--output", str(output), "--headers-only"]) == 0
    assert "train2017: 81 images, 731 objects and 8 to ignore, 80 classes" in capsys.readouterr().out
    assert check_data.main(["--config", str(config), "--output", str(output), "data.root=/nowhere"]) == 1
    assert "cocodataset" in capsys.readouterr().err


def test_tool_says_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_data.main(["--coco", str(tmp_path / "a.json"), "--images", str(tmp_path)]) == 1
    assert "a.json: there is no such file" in capsys.readouterr().err
    assert check_data.main(["--voc", str(tmp_path)]) == 1
    assert "Annotations/" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        check_data.main([])
    assert caught.value.code == 2
    with pytest.raises(InputError):
        check_coco(tmp_path, tmp_path)
