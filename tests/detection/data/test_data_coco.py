"""COCO JSON: the arrays equal pycocotools', and each kind of damage is named where it is."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from detection.data import coco, load_source
from detection.data.masks import compress_counts
from detection.data.problems import ProblemLog
from detection.data.source import check_file_names
from resbackbone.errors import InputError


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_arrays_and_masks_equal_pycocotools(coco_mini: Path, split: str) -> None:
    source = load_source("coco", coco_mini, split, masks=True)
    reference = COCO(str(coco_mini / "annotations" / f"instances_{split}.json"))
    annotations = source.annotations
    assert annotations.category_ids.tolist() == sorted(reference.getCatIds())
    assert sorted(annotations.image_ids.tolist()) == sorted(reference.getImgIds())
    for index in range(len(annotations)):
        image = reference.imgs[annotations.image_id(index)]
        assert annotations.sizes[index].tolist() == [image["height"], image["width"]]
        assert annotations.file_name(index) == image["file_name"]
        expected = reference.imgToAnns[image["id"]]
        rows = annotations.of_image(index)
        assert annotations.category_ids[annotations.labels[rows] - 1].tolist() == [one["category_id"] for one in expected]
        assert annotations.ignore[rows].tolist() == [bool(one["iscrowd"]) for one in expected]
        xywh = np.array([one["bbox"] for one in expected]).reshape(-1, 4)
        ours = annotations.boxes[rows]
        assert (
            np.abs(np.hstack([ours[:, :2], ours[:, 2:] - ours[:, :2]]) - xywh).max(initial=0) < 1.0
        )  # cut at the border by less than a pixel
        for box, one in zip(range(rows.start, rows.stop), expected, strict=True):
            assert np.array_equal(annotations.mask(box, image["height"], image["width"]), reference.annToMask(one))


def test_category_ids_map_both_ways(coco_mini: Path) -> None:
    annotations = load_source("coco", coco_mini, "val2017").annotations
    for label, category_id in enumerate(annotations.category_ids.tolist(), start=1):
        assert annotations.label_of(category_id) == label
    assert annotations.category_ids[79] == 90
    with pytest.raises(KeyError):
        annotations.label_of(12)  # one of COCO's gaps


def test_penn_fudan_layout(shared_data: Path) -> None:
    source = load_source("coco", shared_data / "pennfudan", "pennfudan_train.json", images="PennFudanPed/JPEGImages", masks=True)
    assert (len(source.annotations), len(source.annotations.labels)) == (120, 307)
    height, width = source.annotations.sizes[0].tolist()
    assert source.read_image(0).shape == (height, width, 3)
    box, mask = source.annotations.boxes[0], source.annotations.mask(0, height, width)
    rows, columns = np.nonzero(mask)
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box.tolist()


def test_to_coco_and_back(coco_mini: Path, tmp_path: Path) -> None:
    source = load_source("coco", coco_mini, "val2017", masks=True)
    path = tmp_path / "again.json"
    path.write_text(json.dumps(source.annotations.to_coco()))
    again, log = coco.scan_files(path, coco_mini / "val2017", masks=True)
    assert again is not None
    assert not log.refused
    for name in ("boxes", "labels", "ignore", "offsets", "sizes", "image_ids", "name_bytes"):
        assert np.array_equal(getattr(again.annotations, name), getattr(source.annotations, name)), name
    for name in ("points", "polygon_offsets", "rle_bytes"):
        assert np.array_equal(getattr(again.annotations.masks, name), getattr(source.annotations.masks, name)), name


def test_select_takes_images_in_any_order(coco_mini: Path) -> None:
    whole = load_source("coco", coco_mini, "train2017", masks=True).annotations
    order = [5, 80, 0, 5]
    part = whole.select(order)
    for position, index in enumerate(order):
        assert part.file_name(position) == whole.file_name(index)
        ours, theirs = part.of_image(position), whole.of_image(index)
        assert np.array_equal(part.boxes[ours], whole.boxes[theirs])
        height, width = whole.sizes[index].tolist()
        for box in range(ours.stop - ours.start):
            assert np.array_equal(part.mask(ours.start + box, height, width), whole.mask(theirs.start + box, height, width))
    assert len(whole.select([])) == 0


def test_pickled_arrays_come_back_whole(coco_mini: Path) -> None:
    source = load_source("coco", coco_mini, "val2017", masks=True)
    again = pickle.loads(pickle.dumps(source)).annotations
    assert again.classes == source.annotations.classes
    for name in ("boxes", "labels", "ignore", "areas", "offsets", "sizes", "image_ids", "name_bytes", "category_ids"):
        ours, theirs = getattr(again, name), getattr(source.annotations, name)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)
    assert again.masks is not None
    assert np.array_equal(again.mask(3, *again.sizes[0].tolist()), source.annotations.mask(3, *again.sizes[0].tolist()))


def test_run_length_codes_of_both_kinds(coco_with: Callable[..., Path]) -> None:
    root = coco_with(None, None)
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    mask = np.zeros((228, 320), np.uint8)
    mask[20:60, 10:41] = 1
    counts = [int(n) for n in np.diff(np.flatnonzero(np.diff(np.concatenate([[0], mask.T.reshape(-1), [0]])) != 0), prepend=0)]
    counts.append(228 * 320 - sum(counts))
    content["annotations"][0]["segmentation"] = {"size": [228, 320], "counts": counts}
    compressed = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    content["annotations"][1]["segmentation"] = {"size": [228, 320], "counts": compressed}
    assert compress_counts(counts, 228, 320) == compressed
    path.write_text(json.dumps(content))
    annotations = load_source("coco", root, "train", masks=True).annotations
    assert np.array_equal(annotations.mask(0, 228, 320), mask)
    assert np.array_equal(annotations.mask(1, 228, 320), mask)


def test_bad_masks_are_refused_only_where_masks_are_used(coco_with: Callable[..., Path]) -> None:
    root = coco_with(None, None, None, None)
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    bad = [{"size": [9, 9], "counts": "x"}, {"size": [228, 320], "counts": [5, 5]}, [[1, 2, 3, 4]], None]
    for one, segmentation in zip(content["annotations"], bad, strict=True):
        one["segmentation"] = segmentation
    path.write_text(json.dumps(content))
    assert len(load_source("coco", root, "train").annotations.labels) == 4
    _, log = coco.scan(root, "train", masks=True)
    assert [problem.kind for problem in log] == ["bad_mask"] * 4
    assert "annotation 1" in str(log.found[0])
    assert "size [9, 9]" in str(log.found[0])
    with pytest.raises(InputError, match="segmentation cannot be used"):
        load_source("coco", root, "train", masks=True)


# file -> (kind, what the message must name), one row a problem
REFUSED = {
    "coco_not_json.json": [("not_json", "line 2, column 1")],
    "coco_missing_images.json": [("missing_key", "'images'")],
    "coco_missing_categories.json": [("missing_key", "'categories'")],
    "coco_unknown_category.json": [("unknown_category", "annotation 2: category_id 99")],
    "coco_unknown_image.json": [("unknown_image", "annotation 2: image_id 77")],
    "coco_duplicate_ids.json": [("duplicate_id", "image 1"), ("duplicate_id", "annotation 1")],
    "coco_nan_box.json": [("box_not_finite", "image 1, annotation 2: box [x, y, width, height] = [120.0, nan")],
    "coco_negative_wh.json": [("box_negative", "annotation 2: box [x, y, width, height] = [180.0, 90.0, -60.0, -50.0]")],
    "coco_missing_file.json": [("missing_file", "image 2: image file")],
    "coco_path_escape.json": [("path_escape", "'../../outside.jpg'")],
    "coco_string_ids.json": [("wrong_type", "expected `int`, got `str`; the value is '")] * 7,
}
ACCEPTED = {
    "coco_valid.json": [],
    "coco_zero_area.json": [("box_zero_area", "annotation 2")],
    "coco_box_outside.json": [("box_outside", "annotation 3"), ("box_partly_outside", "annotation 2")],
    "coco_wrong_size.json": [],  # only reading the image shows it
}


@pytest.mark.parametrize("name", sorted(REFUSED | ACCEPTED))
def test_bad_files(bad_inputs: Path, name: str) -> None:
    expected = (REFUSED | ACCEPTED)[name]
    _, log = coco.scan_files(bad_inputs / name, bad_inputs)
    assert [problem.kind for problem in log] == [kind for kind, _ in expected]
    for problem, (_, words) in zip(log, expected, strict=True):
        assert name in str(problem)
        assert words in str(problem)
    if name in REFUSED:
        with pytest.raises(InputError, match=name):
            load_source("coco", bad_inputs, name)
    else:
        load_source("coco", bad_inputs, name)


def test_accepted_boxes_are_left_out_or_cut(bad_inputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    zero = load_source("coco", bad_inputs, "coco_zero_area.json").annotations
    assert zero.boxes.tolist() == [[20, 30, 100, 120], [10, 10, 110, 70]]
    outside = load_source("coco", bad_inputs, "coco_box_outside.json").annotations
    assert outside.boxes.tolist() == [[20, 30, 100, 120], [300, 208, 320, 228]]
    assert "1 × box_outside: left out" in caplog.text
    assert "1 × box_partly_outside: cut to the image" in caplog.text


def test_wrong_size_stops_when_the_image_is_read(bad_inputs: Path) -> None:
    source = load_source("coco", bad_inputs, "coco_wrong_size.json")
    with pytest.raises(InputError, match=r"ok_1\.jpg: the annotation says 999×888 .* the file has 320×228"):
        source.read_image(0)


def test_a_turned_photo_says_which_switch_helps(coco_with: Callable[..., Path]) -> None:
    root = coco_with("exif_rotated_6.jpg", sizes={1: (320, 213)})
    with pytest.raises(InputError, match=r"data\.exif=false"):
        load_source("coco", root, "train").read_image(0)
    assert load_source("coco", root, "train", exif=False).read_image(0).shape == (320, 213, 3)


@pytest.mark.parametrize(
    "text", ["[]", "3", '{"images": 3, "annotations": [], "categories": []}', '{"images": [3], "annotations": [null], "categories": [{}]}']
)
def test_other_json_is_refused_in_words(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"odd\.json"):
        load_source("coco", tmp_path, "odd.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[" * 100_000, "nested too deeply|cut off"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b"[" + b"1" * 5000 + b"]", "cannot be read"),
    ],
)
def test_json_that_pythons_parser_gives_up_on(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "odd.json").write_bytes(b'{"images": [], "categories": [], "annotations": ' + text + b"}")
    with pytest.raises(InputError, match=words):
        load_source("coco", tmp_path, "odd.json")


def test_an_absent_root_says_how_to_get_coco(tmp_path: Path, coco_mini: Path) -> None:
    with pytest.raises(InputError, match=r"no such folder.*cocodataset\.org.*train2017.*data\.root"):
        load_source("coco", tmp_path / "nowhere", "train2017")
    with pytest.raises(InputError, match="cocodataset"):
        load_source("coco", None, "train2017")
    with pytest.raises(InputError, match=r"did you mean 'instances_val2017\.json'"):
        load_source("coco", coco_mini, "val2071")
    with pytest.raises(InputError, match=r"data\.images"):
        load_source("coco", coco_mini, "val2017", images="elsewhere")


def test_unknown_kinds_and_options(coco_mini: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'coco'"):
        load_source("cocoo", coco_mini, "val2017")
    with pytest.raises(InputError, match="no module 'nobodys'"):
        load_source("nobodys.format", coco_mini, "val2017")
    with pytest.raises(InputError, match="has no load"):
        load_source("os.path", coco_mini, "val2017")
    with pytest.raises(InputError, match="did you mean 'masks'"):
        load_source("coco", coco_mini, "val2017", mask=True)


def test_a_format_of_ones_own_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coco_mini: Path) -> None:
    package = tmp_path / "my_project"
    package.mkdir()
    (package / "my_format.py").write_text(
        "from detection.data import coco\n\n\n"
        "def load(root, split, *, masks=False):\n    return coco.load(root, split + '2017', masks=masks)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(load_source("my_project.my_format", coco_mini, "val").annotations) == 41


def test_missing_areas_are_those_of_the_boxes(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    objects: list[dict] = [
        {"bbox": [1, 1, 0, 4], "area": 70.0},  # left out: no area
        {"bbox": [2, 2, 5, 4]},
        {"bbox": [3, 3, 5, 5], "area": 12.5, "iscrowd": 1},
        {"bbox": [90, 40, 10.5, 5]},  # cut to the image
    ]
    content = {
        "images": [{"id": 3, "file_name": "a.jpg", "height": 50, "width": 100}],
        "annotations": [{"id": number, "image_id": 3, "category_id": 9, **one} for number, one in enumerate(objects)],
        "categories": [{"id": 9, "name": "thing"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    annotations = load_source("coco", tmp_path, "a.json", images="images").annotations
    assert annotations.areas.tolist() == [20.0, 12.5, 50.0]
    assert annotations.ignore.tolist() == [False, True, False]
    content["annotations"] = []
    (tmp_path / "a.json").write_text(json.dumps(content))
    none = load_source("coco", tmp_path, "a.json", images="images").annotations
    assert none.boxes.shape == (0, 4)
    assert none.areas.shape == none.labels.shape == none.ignore.shape == (0,)


@pytest.mark.parametrize("name", ["..", "", ".", "sub\\..\\..\\a.jpg", "../images/a.jpg"])
def test_a_name_that_leaves_the_folder_is_refused_even_where_it_is_listed(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jpg").touch()
    if "\\" in name:
        (folder / name).touch()  # one file's name on Linux, a way out on Windows
    log = ProblemLog()
    assert check_file_names(["a.jpg", name, "./a.jpg"], folder, log, file="a.json", ids=[1, 2, 3]) == [True, False, True]
    assert [(one.kind, one.image) for one in log] == [("path_escape", 2)]
