"""A PASCAL VOC devkit as it lies on disk: its counts, its pixel convention, years joined, and each kind of damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from detection.data import load_source, voc
from resbackbone.errors import InputError

# shared data's README: objects per class in train and in test, not difficult
TRAINVAL = {"aeroplane": 90, "bicycle": 81, "bottle": 146, "person": 1279, "tvmonitor": 90}
TEST = {"aeroplane": 68, "bicycle": 47, "bottle": 55, "person": 647, "tvmonitor": 47}


@pytest.mark.parametrize(
    ("split", "images", "objects", "difficult", "counts"),
    [
        ("VOC2012/trainval", 1500, 3642, 887, TRAINVAL),
        (("VOC2012/train", "VOC2012/val"), 1500, 3642, 887, TRAINVAL),
        ("test", 800, 1901, 321, TEST),
    ],
)
def test_counts_are_the_published_ones(voc_root: Path, split: object, images: int, objects: int, difficult: int, counts: dict) -> None:
    annotations = load_source("voc", voc_root, split).annotations
    assert (len(annotations), int((~annotations.ignore).sum()), int(annotations.ignore.sum())) == (images, objects, difficult)
    per_class = np.bincount(annotations.labels[~annotations.ignore], minlength=21)
    assert {name: per_class[annotations.classes.index(name) + 1] for name in counts} == counts
    sizes = annotations.sizes[np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))]
    assert (annotations.boxes >= 0).all()
    assert (annotations.boxes[:, 2:] <= sizes[:, ::-1]).all()


def test_images_have_the_stated_size_and_ids(voc_root: Path) -> None:
    source = load_source("voc", voc_root, "VOC2012/test")
    assert source.metric == "voc"
    assert source.annotation_file is None
    for index in range(0, 800, 160):
        assert source.read_image(index).shape == (*source.annotations.sizes[index].tolist(), 3)
    assert isinstance(source.annotations.image_id(0), str)
    truth = source.annotations.to_coco()
    assert truth["images"][0]["id"] == 1
    assert truth["images"][799]["id"] == 800


def test_pixels_from_one_become_continuous(devkit_with: Callable[..., Path]) -> None:
    annotations = load_source("voc", devkit_with("voc_valid.xml"), "VOC2012/trainval").annotations
    assert annotations.boxes.tolist() == [[19, 29, 100, 120], [120, 40, 180, 90]]
    assert annotations.labels.tolist() == [voc.VOC_CLASSES.index("person") + 1, voc.VOC_CLASSES.index("car") + 1]
    assert annotations.areas.tolist() == [81 * 91, 60 * 50]


def test_difficult_is_read(devkit_with: Callable[..., Path]) -> None:
    root = devkit_with("voc_valid.xml")
    path = root / "VOCdevkit/VOC2012/Annotations/2008_000001.xml"
    path.write_text(path.read_text().replace("<difficult>0", "<difficult>1", 1))
    annotations = load_source("voc", root, "trainval").annotations
    assert annotations.ignore.tolist() == [True, False]
    assert annotations.num_objects().tolist() == [1]


@pytest.mark.parametrize("root_is", ["parent", "devkit", "year"])
def test_root_may_be_the_devkit_or_a_year(devkit_with: Callable[..., Path], root_is: str) -> None:
    parent = devkit_with("voc_valid.xml", "voc_no_objects.xml")
    root = {"parent": parent, "devkit": parent / "VOCdevkit", "year": parent / "VOCdevkit/VOC2012"}[root_is]
    source = load_source("voc", root, "VOC2012/trainval")
    assert source.annotations.num_objects().tolist() == [2, 0]
    assert source.read_image(1).shape == (228, 320, 3)


def test_years_are_joined_and_must_not_overlap(devkit_with: Callable[..., Path]) -> None:
    root = devkit_with("voc_valid.xml")
    year = root / "VOCdevkit/VOC2012"
    other = shutil.copytree(year, year.parent / "VOC2007")
    with pytest.raises(InputError, match="listed twice"):
        load_source("voc", root, ("VOC2007/trainval", "VOC2012/trainval"))
    for folder, suffix in (("Annotations", "xml"), ("JPEGImages", "jpg")):
        (other / folder / f"2008_000001.{suffix}").rename(other / folder / f"000005.{suffix}")
    (other / "ImageSets/Main/trainval.txt").write_text("000005 1\n\n")
    source = load_source("voc", root, ("VOC2007/trainval", "VOC2012/trainval"))
    assert source.annotations.image_ids.tolist() == ["000005", "2008_000001"]
    assert source.read_image(0).shape == (228, 320, 3)
    with pytest.raises(InputError, match="say which: VOC2007/trainval"):
        load_source("voc", root, "trainval")


# file -> (kind, what the message must name)
REFUSED = {
    "voc_missing_bndbox.xml": ("missing_key", "annotation 2: object 2 (car) has no <bndbox>"),
    "voc_swapped_corners.xml": ("box_negative", "annotation 2: box [xmin, ymin, xmax, ymax] = [180.0, 90.0, 121.0, 41.0]"),
    "voc_unknown_class.xml": ("unknown_category", "annotation 2: the class 'unicorn'"),
    "voc_not_xml.xml": ("not_xml", "not valid XML"),
    "entity_bomb.xml": ("unsafe_xml", "declares XML entities"),
}
ACCEPTED = {
    "voc_valid.xml": (None, [[19, 29, 100, 120], [120, 40, 180, 90]]),
    "voc_no_objects.xml": (None, []),
    "voc_zero_based.xml": ("box_zero_based", [[19, 29, 100, 120], [0, 0, 60, 50]]),
    "voc_float_coords.xml": ("box_fractional", [[19, 29, 100, 120], [119.7, 39.25, 180.5, 89.999]]),
    "voc_box_outside.xml": ("box_partly_outside", [[19, 29, 100, 120], [299, 207, 320, 228]]),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_files(devkit_with: Callable[..., Path], name: str) -> None:
    root = devkit_with(name, "voc_valid.xml")
    kind, words = REFUSED[name]
    source, log = voc.scan(root, "trainval")
    assert [problem.kind for problem in log] == [kind]
    assert words in str(log.found[0])
    assert "2008_000001.xml" in str(log.found[0])
    assert source.annotations.num_objects()[-1] == 2, "the sound file is still read"
    with pytest.raises(InputError, match=r"2008_000001\.xml"):
        load_source("voc", root, "trainval")


@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_accepted_files(devkit_with: Callable[..., Path], name: str) -> None:
    kind, boxes = ACCEPTED[name]
    source, log = voc.scan(devkit_with(name), "trainval")
    assert [problem.kind for problem in log] == ([kind] if kind else [])
    assert np.allclose(source.annotations.boxes, np.array(boxes, dtype=np.float32).reshape(-1, 4))


def test_missing_files_are_named(devkit_with: Callable[..., Path]) -> None:
    root = devkit_with("voc_valid.xml", "voc_valid.xml", "voc_valid.xml")
    year = root / "VOCdevkit/VOC2012"
    (year / "JPEGImages/2008_000001.jpg").unlink()
    (year / "Annotations/2008_000002.xml").unlink()
    (year / "ImageSets/Main/trainval.txt").write_text("2008_000001\n2008_000002\n2008_000003\n../../etc/passwd\n")
    source, log = voc.scan(root, "trainval")
    assert sorted(problem.kind for problem in log) == ["missing_file", "missing_file", "path_escape"]
    assert source.annotations.image_ids.tolist() == ["2008_000003"]


def test_an_absent_root_says_how_to_get_voc(tmp_path: Path, devkit_with: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"robots\.ox\.ac\.uk.*VOCdevkit/VOC2012.*data\.root"):
        load_source("voc", tmp_path / "nowhere", "VOC2012/trainval")
    with pytest.raises(InputError, match="no VOCdevkit"):
        load_source("voc", tmp_path, "VOC2012/trainval")
    root = devkit_with("voc_valid.xml")
    with pytest.raises(InputError, match="did you mean 'VOC2012'"):
        load_source("voc", root, "VOC2021/trainval")
    with pytest.raises(InputError, match="did you mean 'trainval'"):
        load_source("voc", root, "VOC2012/trainva")
    with pytest.raises(InputError, match=r"model\.mask=false"):
        load_source("voc", root, "VOC2012/trainval", masks=True)


def test_classes_of_ones_own(devkit_with: Callable[..., Path]) -> None:
    root = devkit_with("voc_unknown_class.xml")
    annotations = load_source("voc", root, "trainval", classes=("person", "unicorn")).annotations
    assert annotations.labels.tolist() == [1, 2]
    assert annotations.classes == ("person", "unicorn")
