"""Labelled images by number: a folder per class, ILSVRC 2012 as downloaded, CIFAR-10's binary version.

Labels and paths are flat arrays: a million Python strings would be copied into every worker the first time it touches them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from resbackbone.classification.files import UnreadableImage
from resbackbone.errors import InputError, nearest

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_FILES = {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)}
_CIFAR_SIDE = 32
_CIFAR_RECORD = 1 + 3 * _CIFAR_SIDE**2
ILSVRC_VAL_IMAGES = 50_000
ILSVRC_DEVKIT = "ILSVRC2012_devkit_t12/data"


class Source(Protocol):
    """`labels`: int64 [N], numbers in `classes`. `read(i)`: an encoded file's bytes, or uint8 RGB [H, W, 3]. `name(i)`: for people."""

    classes: tuple[str, ...]
    labels: np.ndarray

    def read(self, index: int) -> bytes | np.ndarray: ...

    def name(self, index: int) -> str: ...


class FileSource:
    """Images in files below one folder."""

    def __init__(self, folder: Path, files: Sequence[str], labels: Iterable[int], classes: Sequence[str]) -> None:
        self.folder, self.classes = folder, tuple(classes)
        self.labels = np.fromiter(labels, dtype=np.int64)
        encoded = [name.encode() for name in files]
        self._text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        assert len(self._ends) == len(self.labels), f"{len(self._ends)} files, {len(self.labels)} labels"

    def name(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return str(self.folder / self._text[start : self._ends[index]].tobytes().decode())

    def read(self, index: int) -> bytes:
        path = self.name(index)
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise UnreadableImage(f"{path}: cannot be read ({error.strerror}); is the disk still there?") from None


class ArraySource:
    """Images in memory: uint8 [N, H, W, 3]."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, classes: Sequence[str], *, label: str) -> None:
        self.pixels, self.labels, self.classes, self.label = pixels, labels.astype(np.int64), tuple(classes), label

    def name(self, index: int) -> str:
        return f"{self.label}, image {index}"

    def read(self, index: int) -> np.ndarray:
        return self.pixels[index]


def load_folder(root: Path, split: str) -> FileSource:
    """ROOT/SPLIT/CLASS/*.jpg (or .png …), also deeper; classes in the order of their names. Raises InputError."""
    folder = _folder_of_split(root, split)
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise InputError(f"{folder} holds no folders; it must hold one for each class, with the class's images inside")
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(path.relative_to(folder).as_posix() for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not found:
            raise InputError(f"{folder / name}: this class has no images ({', '.join(sorted(SUFFIXES))}); fill it, or remove the folder")
        files += found
        labels += [label] * len(found)
    return FileSource(folder, files, labels, classes)


def load_ilsvrc(root: Path, split: str) -> FileSource:
    """ILSVRC 2012 as its tars unpack: ILSVRC2012_img_train/WNID/, ILSVRC2012_img_val/*.JPEG and the development kit t12.

    `split` is train or val; ROOT/train and ROOT/val are taken as well. A val folder that has been sorted into classes needs no kit.
    Classes are in the order of their WordNet ids, as torchvision and every published network number them. Raises InputError.
    """
    if split not in ("train", "val"):
        raise InputError(f"data.{split}: ILSVRC has the splits train and val;{nearest(split, ('train', 'val'))}")
    folder = next((root / name for name in (f"ILSVRC2012_img_{split}", split) if (root / name).is_dir()), None)
    if folder is None:
        raise InputError(
            f"data.root={root} has no ILSVRC2012_img_{split}/; unpack ILSVRC2012_img_{split}.tar there: "
            f"mkdir {root}/ILSVRC2012_img_{split} && tar -xf ILSVRC2012_img_{split}.tar -C {root}/ILSVRC2012_img_{split}"
        )
    _refuse_packed_classes(folder)
    if split == "train" or any(entry.is_dir() for entry in folder.iterdir()):
        return load_folder(root, folder.name)
    classes, wnid_of_id = _read_synsets(root / ILSVRC_DEVKIT / "meta.mat")
    ids = _read_ground_truth(root / ILSVRC_DEVKIT / "ILSVRC2012_validation_ground_truth.txt", last=len(classes))
    files = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(files) != len(ids):
        raise InputError(
            f"{folder} has {len(files)} images, ILSVRC2012_validation_ground_truth.txt has {len(ids)} labels; both must be whole "
            f"({ILSVRC_VAL_IMAGES} in ILSVRC 2012): unpack the val tar again"
        )
    number = {wnid: position for position, wnid in enumerate(classes)}
    return FileSource(folder, files, (number[wnid_of_id[one]] for one in ids), classes)


def _refuse_packed_classes(folder: Path) -> None:
    """ILSVRC2012_img_train.tar holds a tar for each class, whose images lie in no folder of their own."""
    packed = [path.name for path in sorted(folder.glob("*.tar")) if not path.with_suffix("").is_dir()]
    if packed:
        raise InputError(
            f"{folder} holds {len(packed)} tars that are not unpacked, the first {packed[0]}, each the images of a class; run: "
            f"cd {folder} && for t in *.tar; do mkdir -p ${{t%.tar}} && tar -xf $t -C ${{t%.tar}} && rm $t; done"
        )


def load_cifar10(root: Path, split: str) -> ArraySource:
    """CIFAR-10's binary version: data_batch_1.bin … data_batch_5.bin (`train`) and test_batch.bin (`test`), here or one folder deeper."""
    if split not in CIFAR10_FILES:
        raise InputError(f"data split {split!r}: CIFAR-10 has the splits train and test;{nearest(split, CIFAR10_FILES)}")
    folder = next((place for place in (root, root / "cifar-10-batches-bin") if (place / "test_batch.bin").is_file()), None)
    if folder is None:
        raise InputError(f"data.root={root} has no test_batch.bin; give the folder of CIFAR-10's binary version (cifar-10-batches-bin)")
    parts = []
    for name in CIFAR10_FILES[split]:
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}; unpack CIFAR-10's binary version again")
        content = np.fromfile(folder / name, dtype=np.uint8)
        if not len(content) or len(content) % _CIFAR_RECORD:
            raise InputError(f"{folder / name}: {len(content)} bytes are no whole number of images of {_CIFAR_RECORD}; it is cut off")
        parts.append(content.reshape(-1, _CIFAR_RECORD))
    records = np.concatenate(parts)
    if records[:, 0].max() >= len(CIFAR10_CLASSES):
        raise InputError(f"{folder}: a label is {records[:, 0].max()}, CIFAR-10's are 0 to 9; this is another file")
    pixels = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE).transpose(0, 2, 3, 1))
    return ArraySource(pixels, records[:, 0], CIFAR10_CLASSES, label=f"{folder} {split}")


LOADERS: dict[str, Callable[[Path, str], Source]] = {"folder": load_folder, "ilsvrc": load_ilsvrc, "cifar10": load_cifar10}


def load_source(kind: str, root: str | Path | None, split: str) -> Source:
    """The images of one split. Raises InputError for a root or split that isn't there, an empty class, wrong label files."""
    if root is None:
        raise InputError(f"data.root is not set; data.kind={kind} needs the folder that holds {split}")
    if not Path(root).is_dir():
        raise InputError(f"data.root={root} is not a folder; give the one that holds {split}")
    return LOADERS[kind](Path(root), split)


def check_same_classes(train: Sequence[str], val: Sequence[str]) -> None:
    """Raise InputError where two splits number their classes differently: the figures would be meaningless."""
    if tuple(train) != tuple(val):
        only = [name for name in (*train, *val) if (name in train) != (name in val)]
        raise InputError(
            f"the training split has {len(train)} classes, the validation split {len(val)}, and they differ in "
            f"{', '.join(only[:5])}; both need the same class folders"
        )


def _folder_of_split(root: Path, split: str) -> Path:
    folder = root / split
    if not folder.is_dir():
        there = [entry.name for entry in root.iterdir() if entry.is_dir()]
        raise InputError(f"data.root={root} has no folder {split};{nearest(split, there)} it has {', '.join(sorted(there)[:6]) or 'none'}")
    return folder


def _read_synsets(path: Path) -> tuple[list[str], dict[int, str]]:
    """(WordNet ids in order, ILSVRC id -> WordNet id) of the thousand classes, from the development kit's meta.mat."""
    if not path.is_file():
        raise InputError(f"{path} is not there; unpack ILSVRC2012_devkit_t12.tar.gz in data.root, or sort val/ into class folders")
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise InputError('the development kit is a MATLAB file, which SciPy reads: pip install "resbackbone[ilsvrc]"') from error
    try:
        rows = loadmat(str(path), squeeze_me=True)["synsets"]
        wnid_of_id = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows if int(row["num_children"]) == 0}
    except (ValueError, KeyError, TypeError, NotImplementedError, OSError) as error:
        raise InputError(f"{path} is not ILSVRC 2012's meta.mat ({error}); unpack the development kit again") from None
    return sorted(wnid_of_id.values()), wnid_of_id


def _read_ground_truth(path: Path, *, last: int) -> list[int]:
    """ILSVRC ids 1 … `last`, one a line, in the order of the image names."""
    if not path.is_file():
        raise InputError(f"{path} is not there; unpack ILSVRC2012_devkit_t12.tar.gz in data.root")
    ids = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if not line.strip().isdigit() or not 1 <= int(line) <= last:
            raise InputError(f"{path}, line {number}: {line.strip()[:40]!r} is not a class from 1 to {last}; this is another label file")
        ids.append(int(line))
    return ids
