"""Labelled images from folders, ILSVRC as downloaded and CIFAR-10; every way in which they can be wrong."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from resbackbone.classification.sources import ArraySource, FileSource, check_same_classes, load_source
from resbackbone.errors import InputError

WNIDS = {1: "n02", 2: "n03", 3: "n01"}  # ILSVRC's own ids aren't in the order of the WordNet ids


def write_ilsvrc(root: Path, photos: Path, ids: list[int]) -> None:
    """A small ILSVRC 2012: three classes and one inner node in meta.mat, `ids` as the labels of the val images."""
    from scipy.io import savemat

    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    (root / "ILSVRC2012_img_val").mkdir()
    pictures = sorted((photos / "val").rglob("*.jpg"))
    for number in range(len(ids)):
        shutil.copy(pictures[number], root / "ILSVRC2012_img_val" / f"ILSVRC2012_val_{number + 1:08d}.JPEG")
        shutil.copytree(photos / "train" / "red", root / "ILSVRC2012_img_train" / f"n0{number % 3 + 1}", dirs_exist_ok=True)
    rows = [(number, wnid, 0) for number, wnid in WNIDS.items()] + [(4, "n00", 3)]
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    savemat(data / "meta.mat", {"synsets": np.array(rows, dtype=fields).reshape(-1, 1)})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{one}\n" for one in ids))


def test_folders(tiny_photos: Path) -> None:
    source = load_source("folder", tiny_photos, "train")
    assert isinstance(source, FileSource)
    assert source.classes == ("blue", "green", "red")
    assert np.bincount(source.labels).tolist() == [13, 12, 12]
    for index in (0, 13, 36):
        path = Path(source.name(index))
        assert path.parent.name == source.classes[source.labels[index]]
        assert source.read(index) == path.read_bytes()


def test_ilsvrc_as_downloaded(tiny_photos: Path, tmp_path: Path) -> None:
    write_ilsvrc(tmp_path, tiny_photos, [3, 1, 2, 2, 3])
    train, val = load_source("ilsvrc", tmp_path, "train"), load_source("ilsvrc", tmp_path, "val")
    assert train.classes == val.classes == ("n01", "n02", "n03")
    assert [val.classes[label] for label in val.labels] == ["n01", "n02", "n03", "n03", "n01"]
    assert val.name(2).endswith("ILSVRC2012_val_00000003.JPEG")


def test_ilsvrc_with_its_classes_still_packed(tiny_photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mkdir .*ILSVRC2012_img_train && tar -xf ILSVRC2012_img_train\.tar -C"):
        load_source("ilsvrc", tmp_path, "train")
    write_ilsvrc(tmp_path, tiny_photos, [3, 1])
    folder = tmp_path / "ILSVRC2012_img_train"
    (folder / "n01.tar").touch()  # unpacked beside
    assert len(load_source("ilsvrc", tmp_path, "train").labels) == 24
    (folder / "n09.tar").touch()
    with pytest.raises(InputError, match=r"1 tars that are not unpacked, the first n09\.tar.*for t in \*\.tar; do mkdir -p \$\{t%\.tar\}"):
        load_source("ilsvrc", tmp_path, "train")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("3\n1\n2\n2\n", "5 images.*4 labels"),
        ("3\n1\nx\n2\n3\n", "line 3: 'x'.*1 to 3"),
        ("3\n1\n2\n2\n4\n", "line 5: '4'"),
        (None, "not there"),
    ],
)
def test_a_wrong_label_file(lines: str | None, words: str, tiny_photos: Path, tmp_path: Path) -> None:
    write_ilsvrc(tmp_path, tiny_photos, [3, 1, 2, 2, 3])
    file = tmp_path / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    file.unlink() if lines is None else file.write_text(lines)
    with pytest.raises(InputError, match=words):
        load_source("ilsvrc", tmp_path, "val")


def test_a_wrong_development_kit(tiny_photos: Path, tmp_path: Path) -> None:
    write_ilsvrc(tmp_path, tiny_photos, [3, 1])
    meta = tmp_path / "ILSVRC2012_devkit_t12/data/meta.mat"
    meta.write_bytes(b"no matlab file" * 20)
    with pytest.raises(InputError, match=r"meta\.mat"):
        load_source("ilsvrc", tmp_path, "val")
    meta.unlink()
    with pytest.raises(InputError, match="devkit_t12"):
        load_source("ilsvrc", tmp_path, "val")
    with pytest.raises(InputError, match="did you mean 'val'"):
        load_source("ilsvrc", tmp_path, "vall")
    with pytest.raises(InputError, match="ILSVRC2012_img_train"):
        load_source("ilsvrc", tmp_path / "ILSVRC2012_img_val", "train")


def write_cifar(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Six files of three images each: (images uint8 [18, 32, 32, 3], labels), the last three of them the test images."""
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (18, 32, 32, 3), dtype=np.uint8), draw.integers(0, 10, 18, dtype=np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    for number, name in enumerate(names):
        rows = [bytes([labels[one]]) + images[one].transpose(2, 0, 1).tobytes() for one in range(3 * number, 3 * number + 3)]
        (folder / name).write_bytes(b"".join(rows))
    return images, labels


def test_cifar10(tmp_path: Path) -> None:
    images, labels = write_cifar(tmp_path / "cifar-10-batches-bin")
    train, test = load_source("cifar10", tmp_path, "train"), load_source("cifar10", tmp_path / "cifar-10-batches-bin", "test")
    assert isinstance(train, ArraySource)
    assert np.array_equal(train.pixels, images[:15])
    assert np.array_equal(test.read(1), images[16])
    assert train.labels.tolist() == labels[:15].tolist()
    assert "test" in test.name(1)


def test_wrong_cifar10(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"test_batch\.bin"):
        load_source("cifar10", tmp_path, "train")
    write_cifar(tmp_path)
    with pytest.raises(InputError, match="did you mean 'train'"):
        load_source("cifar10", tmp_path, "trian")
    broken = tmp_path / "data_batch_2.bin"
    broken.write_bytes(broken.read_bytes()[:-7])
    with pytest.raises(InputError, match=r"data_batch_2\.bin.*cut off"):
        load_source("cifar10", tmp_path, "train")
    broken.unlink()
    with pytest.raises(InputError, match=r"no data_batch_2\.bin"):
        load_source("cifar10", tmp_path, "train")
    (tmp_path / "test_batch.bin").write_bytes(bytes([77]) * 3073)
    with pytest.raises(InputError, match="77"):
        load_source("cifar10", tmp_path, "test")


def test_wrong_folders(tiny_photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.root is not set"):
        load_source("folder", None, "train")
    with pytest.raises(InputError, match="is not a folder"):
        load_source("folder", tmp_path / "nowhere", "train")
    with pytest.raises(InputError, match="did you mean 'train'"):
        load_source("folder", tiny_photos, "trian")
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match="one for each class"):
        load_source("folder", tmp_path, "train")
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: this class has no images"):
        load_source("folder", tmp_path, "train")
    with pytest.raises(InputError, match="differ in cat"):
        check_same_classes(("cat", "dog"), ("dog",))


def test_without_scipy_the_extra_is_named(tiny_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ilsvrc(tmp_path, tiny_photos, [3, 1])
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(InputError, match=r"resbackbone\[ilsvrc\]"):
        load_source("ilsvrc", tmp_path, "val")
