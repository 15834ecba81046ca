"""The machine alone: what Python's pickle writes is read, and no short pickle makes much or takes long."""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from measured_reading import Cost, measure
from torch_tar_writer import FIRST_ADDRESS, TarWriter

from resbackbone.errors import InputError
from resbackbone.weights.pickle_machine import Dialect, Global, check_key, make_dict, unpickle
from resbackbone.weights.reading import DAMAGE, find_state_dict, refusal

CONTENT = {"a": [1, -2, 2**70, 1.5, None, True, False], "b": {"c": (), "d": (1,), "e": (1, 2), "f": (1, 2, 3), "g": (1, 2, 3, 4)}, 5: "ä"}
ORDERED_DICT = b"ccollections\nOrderedDict\n"


def find_global(name: str) -> Global:
    if name not in ("collections.OrderedDict", "a.type"):
        raise refusal(f"names {name}")
    return Global(name, make_dict if name == "collections.OrderedDict" else None)


def set_state(target: Any, state: tuple[Any, ...]) -> None:
    if not isinstance(target, dict):
        raise ValueError("a state")
    target["state"] = state


def run(code: bytes, protocol: int = 5, persistent: Mapping[str, Any] | None = None) -> Any:
    return unpickle(io.BytesIO(code), Dialect(find_global, set_state, protocol), persistent)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_of_every_protocol_is_read(protocol: int) -> None:
    twice = {"x": 1}
    content = CONTENT | {"first": twice, "second": twice, "ordered": OrderedDict(x=1)}
    if protocol < 2:  # which has no instruction for bytes and a helper for objects
        del content["ordered"]
    read = run(pickle.dumps(content, protocol), protocol)
    assert read == content
    assert read["first"] is read["second"]
    if protocol > 2:
        assert run(pickle.dumps([b"bytes", b"b" * 300], protocol), protocol) == [b"bytes", b"b" * 300]


def test_several_pickles_in_one_file_states_and_references() -> None:
    source = io.BytesIO(b"raw" + pickle.dumps(1) + pickle.dumps([2]) + b"raw")
    source.seek(3)
    dialect = Dialect(find_global, set_state, 5)
    assert [unpickle(source, dialect), unpickle(source, dialect), source.read()] == [1, [2], b"raw"]
    assert run(b"}K\x01K\x02\x86b.") == {"state": (1, 2)}
    assert run(b"}](K\x01K\x02eb.") == {"state": ()}, "only tuples are states"
    assert run(b"U\x017Q.", persistent={"7": "seven"}) == run(b"K\x07Q.", persistent={"7": "seven"}) == "seven"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"cos\nsystem\n.", r"names os\.system; nothing in it is run"),
        (b"\x8c\x02os\x8c\x06system\x93.", r"names os\.system"),
        (b"ca\ntype\n)R.", r"calls a\.type"),
        (b"K\x01)R.", "calls a int"),
        *((code, "instruction") for code in (b"(ios\nsystem\n.", b"(o.", b"\x82\x01.", b"K\x010.", b"K\x012.", b"P1\n.")),
    ],
)
def test_more_than_data_is_refused(code: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(code)


def test_later_protocols_are_refused_where_the_format_has_none() -> None:
    with pytest.raises(InputError, match="instruction SHORT_BINUNICODE"):
        run(pickle.dumps("text", 4)[:2] + b"\x8c\x01a.", 2)


@pytest.mark.parametrize(
    "code",
    [
        *(b"", b".", b"K\x01", b"t.", b"h\x01.", b"K\x01Q.", b"]Q.", b"]K\x01\x93.", b"K\x01K\x02a.", b"]K\x01K\x02s.", b"}(K\x01u."),
        *(b"}]K\x01s.", b"})K\x01s.", b"}G" + bytes(8) + b"K\x01s.", b"K\x01)b.", b"ca\n.", b"\xff."),
        *(ORDERED_DICT + b"K\x01R.", ORDERED_DICT + b"K\x01\x85R."),
    ],
)
def test_broken_pickles_are_damage(code: bytes) -> None:
    with pytest.raises(DAMAGE) as caught:
        run(code)
    assert not isinstance(caught.value, InputError)


def test_keys_are_short() -> None:
    for key in ("a" * 4096, "", 0, -(2**63), 2**64 - 1):
        assert check_key(key) == key
    for wrong in ("a" * 4097, 2**64, 1.5, None, (), b"a"):
        with pytest.raises(ValueError, match="key"):
            check_key(wrong)


LONG_LIST = b"](" + b"](K\x01K\x02e" * 5000 + b"eq\x01"
LONG_NUMBER = b"\x8b" + struct.pack("<i", 300_000) + b"\x7f" * 300_000 + b"q\x01"
NESTED_TUPLE = b")q\x01" + b"h\x01h\x01\x86q\x01" * 60
SCALAR = b"cnumpy.core.multiarray\nscalar\n"
EMPTY_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n)R"
LISTED_STATE = b"](K\x01K\x01\x85cnumpy\ndtype\nU\x02u1\x85R\x89U\x01xeq\x01"
TENSOR = b"U\x08%d" % FIRST_ADDRESS + b"Qq\x01"
REBUILD = b"ctorch._utils\n_rebuild_tensor\nq\x02"
BOMBS = {
    "dicts of one list": LONG_LIST + ORDERED_DICT + b"q\x02" + b"](" + b"h\x02h\x01\x85R" * 20_000 + b"e",
    "calls with many arguments": b"(" + b"K\x01" * 5000 + b"tq\x01" + ORDERED_DICT + b"q\x02](" + b"h\x02h\x01R" * 20_000 + b"e",
    "long numbers as keys": LONG_NUMBER + b"}(" + b"h\x01K\x01" * 20_000 + b"u",
    "tuples as keys": NESTED_TUPLE + b"}h\x01K\x01s",
    "tuples as names": NESTED_TUPLE + SCALAR + b"cnumpy\ndtype\nh\x01\x85RU\x01x\x86R",
    "tuples as sizes": NESTED_TUPLE + REBUILD + b"(" + TENSOR + b"K\x00h\x01h\x01tR",
    "states in lists": LISTED_STATE + EMPTY_ARRAY + b"h\x01b",
    "a tensor of dicts": TENSOR + ORDERED_DICT + b"h\x01\x85R",
    "a tensor of arguments": TENSOR + REBUILD + b"h\x01R",
    "a list as a storage": REBUILD + b"(](K\x01eK\x00))tR",
    "long sizes": LONG_NUMBER + REBUILD + b"(" + TENSOR.replace(b"q\x01", b"") + b"K\x00(" + b"h\x01" * 60 + b"tq\x03h\x03tR",
}


READERS = {"bomb.pkl": "resbackbone.weights.pickled_arrays:read_pickle", "bomb.pth": "resbackbone.weights.torch_tar:read_torch_tar"}


def bomb(fault: str) -> bytes:
    return b"\x80\x02}U\x01w" + BOMBS[fault] + b"s."


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Cost]:
    """What each bomb in each format cost."""
    root = tmp_path_factory.mktemp("bombs")
    content = OrderedDict(w=torch.zeros(50_000))
    for number, fault in enumerate(BOMBS):
        (root / str(number)).mkdir()
        (root / str(number) / "bomb.pkl").write_bytes(bomb(fault))
        writer = TarWriter()
        writer.save(content, root / str(number) / "bomb.pth")
        writer.save(content, root / str(number) / "bomb.pth", pickle=bomb(fault))
    found = {}
    for name, reader in READERS.items():
        measured = measure(reader, [root / str(number) / name for number in range(len(BOMBS))])
        found |= {(fault, name): cost for fault, cost in zip(BOMBS, measured, strict=True)}
    return found


@pytest.mark.parametrize("fault", BOMBS)
@pytest.mark.parametrize("name", READERS)
def test_bombs_are_refused_in_no_time_by_both_formats(name: str, fault: str, costs: dict[tuple[str, str], Cost]) -> None:
    cost = costs[fault, name]
    assert cost.refusal is not None
    assert name in cost.refusal
    assert cost.peak < 4e6 + 100 * len(bomb(fault))
    assert cost.seconds < 10


def test_state_dicts_are_found_within_checkpoints_but_not_for_ever() -> None:
    tensors = {"w": torch.ones(2)}
    for content in (tensors, {"model": tensors, "epoch": 3}, {"model": {"state_dict": tensors}}):
        assert find_state_dict(content) == tensors
    itself: dict[str, Any] = {}
    itself["model"] = itself
    for wrong, message in ((itself, "'model', which is no tensor"), ({}, "nothing where"), ([1], "a list"), ({5: torch.ones(1)}, "'5'")):
        with pytest.raises(InputError, match=message):
            find_state_dict(wrong)
