"""Pickles of arrays: those of every writer are read, and nothing in any is run, nor made larger than the file."""

from __future__ import annotations

import collections
import json
import os
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from measured_reading import Cost, measure
from python2_pickles import call, python2_array, python2_dict, python2_file, text

from resbackbone.errors import InputError
from resbackbone.weights.detectron2 import read_detectron2

ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "float16": np.linspace(0, 1, 5, dtype=np.float16),
    "float64": np.linspace(-1, 1, 7).reshape(7, 1),
    "big endian": np.arange(6, dtype=">f4").reshape(3, 2),
    "fortran": np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4)),
    "int64": np.arange(4),
    "bool": np.array([True, False]),
    "no axes": np.array(3.5),
    "scalar": np.float32(2.5),
    "large": np.random.default_rng(0).random((40, 50), np.float32),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("envelope", ["bare", "model", "blobs", "ordered"])
def test_arrays_of_every_kind_are_read(protocol: int, envelope: str, tmp_path: Path) -> None:
    content = {"model": ARRAYS, "__author__": "me", "matching_heuristics": True} if envelope == "model" else ARRAYS
    content = {"blobs": ARRAYS, "cfg": "text"} if envelope == "blobs" else content
    content = collections.OrderedDict(ARRAYS) if envelope == "ordered" else content
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_detectron2(tmp_path / "a.pkl")
    assert found.keys() == ARRAYS.keys()
    for name, values in ARRAYS.items():
        assert found[name].dtype == (torch.float32 if values.dtype.kind == "f" else torch.int64)
        np.testing.assert_array_equal(found[name].numpy(), values.astype(found[name].numpy().dtype), strict=True)


def test_ordered_dicts_of_python_2_are_read(tmp_path: Path) -> None:
    pair = b"](" + text(b"a") + python2_array(np.ones(3, np.float32)) + b"e"
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02" + call("collections", "OrderedDict", b"](" + pair + b"e") + b".")
    assert torch.equal(read_detectron2(tmp_path / "a.pkl")["a"], torch.ones(3))


class Harm:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def test_code_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    array = np.ones(2, np.float32)
    for protocol in (2, 4):
        for harm, name in (
            (Harm(os.system, f"touch {mark}"), "system"),
            (Harm(eval, f"open({str(mark)!r}, 'w')"), "eval"),
            (Harm(getattr, array, "tofile"), "getattr"),
            (Harm(np.save, str(mark), array), "save"),
        ):
            (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {"w": array, "x": harm}}, protocol=protocol))
            with pytest.raises(InputError, match=rf"asks for [\w.]*{name}; nothing in it is run"):
                read_detectron2(tmp_path / "a.pkl")
    assert not mark.exists()


RECONSTRUCT, NDARRAY, DTYPE = b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"
HUGE = b"\x8a\x06" + (10**12).to_bytes(6, "little")  # LONG1
LONG_TEXT = b"X" + struct.pack("<i", 10_000) + b"a" * 10_000
ENCODE_OFTEN = b"](c_codecs\nencode\nq\x01(" + LONG_TEXT + text(b"latin1") + b"tq\x02R" + b"h\x01h\x02R" * 20_000 + b"e"
DICT_PAIRS = b"](" + b"".join(b"](" + text(b"%05d" % number) + b"K\x01e" for number in range(2000)) + b"e"
DICT_OFTEN = b"](ccollections\nOrderedDict\nq\x01(" + DICT_PAIRS + b"tq\x02R" + b"h\x01h\x02R" * 5000 + b"e"
ARRAY_OFTEN = b"](" + python2_array(np.ones(999), data=text(np.ones(999).tobytes()) + b"q\x05")
ARRAY_OFTEN += python2_array(np.ones(999), data=b"h\x05") * 200 + b"e"
BOMBS = {
    "ndarray called for a huge one": NDARRAY + b"(" + HUGE + b"\x85" + text(b"f8") + b"tR",
    "a huge shape to begin with": RECONSTRUCT + b"(" + NDARRAY + HUGE + b"\x85" + text(b"b") + b"tR",
    "a huge shape": python2_array(np.ones(4, np.float32), shape=(1 << 30, 1 << 30)),
    "a negative shape": python2_array(np.ones(4, np.float32), shape=(-2, -2)),
    "an empty shape": python2_array(np.ones(4, np.float32), shape=(0, 4)),
    "an array without numbers": RECONSTRUCT + b"(" + NDARRAY + b"K\x00\x85" + text(b"b") + b"tR",
    "objects": python2_array(np.ones(4)).replace(b"f8", b"O8"),
    "records": DTYPE + b"(" + text(b"V8") + b"K\x00K\x01tR",
    "bytes made again and again": ENCODE_OFTEN,
    "dicts made again and again": DICT_OFTEN,
    "arrays made again and again": ARRAY_OFTEN,
    "a function changed": NDARRAY + b"}(" + text(b"__setstate__") + b"K\x01ub",
    "an array's type changed": b"cnumpy.core.multiarray\nscalar\nN}(" + text(b"__code__") + b"K\x01u\x86b",
    "what is no function": text(b"os.system") + b"(" + text(b"true") + b"tR",
    "another function of numpy's": b"cnumpy\nload\n(" + text(b"x") + b"tR",
    "a method of an allowed type": b"\x8c\x05numpy\x8c\x0endarray.tofile\x93",
    "an instance": b"(" + text(b"true") + b"iposix\nsystem\n",
    "an object": b"(cposix\nsystem\n" + text(b"true") + b"o",
    "a new object": NDARRAY + b"(" + HUGE + b"t\x81",
    "a persistent object": b"Pnumpy\n",
    "an extension": b"\x82\x01",
    "a huge memo": b"K\x01r\xff\xff\xff\x7f",
    "a huge text": b"\x8e" + (1 << 40).to_bytes(8, "little") + b"x",
    "a huge number": b"\x8b" + struct.pack("<i", 1 << 30) + b"x",
    "a huge frame": b"\x95" + (1 << 60).to_bytes(8, "little") + b"K\x01",
    "keys that hash for ever": b"}" + b")" + b"2\x86" * 60 + b"K\x01s",
    "an unhashable key": b"}]K\x01s",
    "a value that isn't there": b"h\x09",
    "an empty stack": b"R",
    "a mark that isn't there": b"t",
    "a number": b"K\x01",
    "text for an array": text(b"weights"),
    "itself": b"]q\x01h\x01a",
}


BOMBS_WITHIN = {("whole", fault): code for fault, code in BOMBS.items()}
BOMBS_WITHIN |= {("entry", fault): python2_dict({"conv1_w": code}) for fault, code in BOMBS.items()}


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Cost]:
    """What each bomb cost to refuse, as the whole file and as an entry of its dict."""
    root = tmp_path_factory.mktemp("bombs")
    paths = [root / f"bomb{number}.pkl" for number in range(len(BOMBS_WITHIN))]
    for path, code in zip(paths, BOMBS_WITHIN.values(), strict=True):
        path.write_bytes(b"\x80\x04" + code + b"." + bytes(9))
    return dict(zip(BOMBS_WITHIN, measure("resbackbone.weights.detectron2:read_detectron2", paths), strict=True))


@pytest.mark.parametrize(("place", "fault"), BOMBS_WITHIN)
def test_allowed_things_cannot_be_abused(place: str, fault: str, costs: dict[tuple[str, str], Cost]) -> None:
    cost = costs[place, fault]
    assert cost.refusal is not None
    assert re.search(r"bomb\d+\.pkl", cost.refusal)
    assert cost.peak < 4e6 + 40 * len(BOMBS_WITHIN[place, fault])


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    blobs = {key: ARRAYS[key] for key in ("float32", "fortran", "scalar", "int64")}
    files = [pickle.dumps({"model": blobs, "__author__": "me"}, protocol=protocol) for protocol in (2, 4, 5)]
    files.append(python2_file({"blobs": python2_dict({key: python2_array(np.asarray(value)) for key, value in blobs.items()})}))
    path = tmp_path / "cut.pkl"
    for whole in files:
        for size in [*range(300), *range(300, len(whole), 7), len(whole) - 1]:
            path.write_bytes(whole[:size])
            with pytest.raises(InputError, match=r"cut\.pkl"):
                read_detectron2(path)


def test_flipped_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    whole = pickle.dumps({"model": ARRAYS}, protocol=4)
    generator, path, wrong = np.random.default_rng(0), tmp_path / "flipped.pkl", 0
    for _ in range(800):
        broken = bytearray(whole)
        for place in generator.integers(len(whole) - 8100 if generator.random() < 0.9 else len(whole), size=2):
            broken[place] = generator.integers(256)
        path.write_bytes(broken)
        try:
            read_detectron2(path)
        except InputError:
            wrong += 1
    assert wrong > 250


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.pkl does not exist"):
        read_detectron2(tmp_path / "none.pkl")
    for content in (
        json.dumps({"model": 1}).encode(),
        b"\x89PNG\r\n\x1a\n" + bytes(50),
        b"",
        pickle.dumps({"model": {}}),
        pickle.dumps([1, 2, 3]),
    ):
        (tmp_path / "a.pkl").write_bytes(content)
        with pytest.raises(InputError, match=r"a\.pkl"):
            read_detectron2(tmp_path / "a.pkl")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {"conv1_w": "a text", "x": 1}}))
    with pytest.raises(InputError, match="entry 'conv1_w' is a str"):
        read_detectron2(tmp_path / "a.pkl")
