"""torch 0.1's tar files against a writer of their layout, against torch's own reader, and against the sizes of torchvision's files."""

from __future__ import annotations

import json
import math
import pickle
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch_tar_writer import FIRST_ADDRESS, NAMES, SYSTEM, TarWriter, members_of, write_tar

from resbackbone import create_classifier, load_weights
from resbackbone.errors import InputError
from resbackbone.weights.torch_tar import is_torch_tar, read_torch_tar


def assorted() -> OrderedDict[str, Tensor]:
    """All dtypes, and every relation of a tensor to its storage."""
    torch.manual_seed(0)
    tensors = OrderedDict((f"all.{name}", (100 * torch.rand(3, 5)).to(dtype)) for dtype, name in NAMES.items())
    whole = torch.rand(4, 6)
    tensors |= {
        "whole": whole,
        "row": whole[2],
        "column": whole[:, 1],
        "transposed": torch.nn.Parameter(torch.rand(2, 3, 4).permute(2, 0, 1)),
        "channels_last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "weight": torch.nn.Parameter(torch.rand(7)),
    }
    return tensors


def bits(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.detach().contiguous().numpy().tobytes()


@pytest.mark.parametrize("python2", [False, True])
def test_all_dtypes_and_layouts_are_read_as_torch_reads_them(python2: bool, tmp_path: Path) -> None:
    written = assorted()
    path = TarWriter(python2=python2).save(written, tmp_path / "w.pth")
    assert is_torch_tar(path)
    read, witness = read_torch_tar(path), torch.load(path, weights_only=False)
    assert list(read) == list(written) == list(witness)
    for name, tensor in read.items():
        assert bits(tensor) == bits(written[name]) == bits(witness[name]), name
        assert type(tensor) is Tensor
    read["whole"][2] = -1
    assert (read["row"] == -1).all(), "tensors that shared a storage share it again"
    assert read["column"][2] == -1


def test_a_storage_that_is_part_of_another(tmp_path: Path) -> None:
    writer = TarWriter()
    numbers = torch.arange(10.0)
    content = OrderedDict(all=numbers, part=torch.zeros(3))
    writer.value(content)
    root, part = (writer.storages[tensor.untyped_storage().data_ptr()][0] for tensor in content.values())
    writer.parts.append((part, root, 4, 5))
    writer.tensors.clear()
    path = writer.save(content, tmp_path / "w.pth")
    for read in (read_torch_tar(path), torch.load(path, weights_only=False)):
        assert read["part"].tolist() == [4.0, 5.0, 6.0]
        assert read["part"].untyped_storage().data_ptr() - read["all"].untyped_storage().data_ptr() in (0, 16)
    writer.parts[0] = (part, root, 6, 5)
    with pytest.raises(InputError, match="not a whole torch"):
        read_torch_tar(writer.save(content, path, storages=writer.storages_member()))


@pytest.mark.parametrize("place", ["state_dict", "model"])
def test_a_checkpoints_state_dict_is_found(place: str, tmp_path: Path) -> None:
    path = TarWriter().save({"epoch": 3, "loss": 0.5, place: OrderedDict(w=torch.ones(2)), "best": None}, tmp_path / "w.pth")
    assert read_torch_tar(path)["w"].tolist() == [1, 1]
    for content in ({"epoch": 3}, {}, [1, 2]):
        with pytest.raises(InputError, match="state dict"):
            read_torch_tar(TarWriter().save(content, path))


def header(shared_data: Path) -> dict[str, Any]:
    return json.loads((shared_data / "weights" / "torchvision_resnet18_original_header.json").read_text())


@pytest.mark.parametrize(("file", "name"), [("resnet18-5c106cde.pth", "resnet18"), ("resnet50-19c8e357.pth", "resnet50")])
def test_torchvisions_first_files(file: str, name: str, shared_data: Path, tmp_path: Path) -> None:
    facts = header(shared_data)[file]
    genuine = load_file(shared_data / "weights" / "torchvision_fragments.safetensors")
    torch.manual_seed(0)
    written: OrderedDict[str, Tensor] = OrderedDict()
    for key, fact in facts["keys"].items():
        values = genuine.get(f"{name}/{key}", torch.rand(fact["shape"]))
        assert (list(values.shape), fact["type"]) == (fact["shape"], "FloatTensor")
        written[key] = torch.nn.Parameter(values) if fact["parameter"] else values
    path = TarWriter().save(written, tmp_path / file)
    sizes = {member: len(data) for member, data in members_of(path).items()}
    assert sizes.items() >= {key: size for key, size in facts["members"].items() if key != "pickle"}.items()
    tensors = read_torch_tar(path)
    assert all(torch.equal(tensor, written[key]) for key, tensor in tensors.items())
    for key, values in genuine.items():
        if key.startswith(f"{name}/"):
            assert torch.equal(tensors[key.removeprefix(f"{name}/")], values), key
    with torch.device("meta"):  # its initial values are not wanted
        net = create_classifier(name)
    report = load_weights(net.to_empty(device="cpu"), tensors)
    assert (report.loaded, report.total, report.problems()) == (facts["n_keys"], facts["n_keys"], "")
    assert {key: list(tensor.shape) for key, tensor in tensors.items()} == {key: fact["shape"] for key, fact in facts["keys"].items()}


def small(path: Path) -> Path:
    return TarWriter().save(OrderedDict(w=torch.nn.Parameter(torch.rand(3, 4)), b=torch.rand(3)), path)


def test_a_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    content = small(tmp_path / "whole.pth").read_bytes()
    path = tmp_path / "cut.pth"
    for kept in [*range(0, 600, 7), *range(600, len(content), 101), len(content) - 1]:
        path.write_bytes(content[:kept])
        with pytest.raises(InputError, match="download it again"):
            read_torch_tar(path)
    path.write_bytes(content)
    assert read_torch_tar(path).keys() == {"w", "b"}


def message_of(path: Path) -> str:
    """Why it was refused; "" if it wasn't. Whatever isn't an InputError comes through."""
    try:
        read_torch_tar(path)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("member", ["sys_info", "pickle", "tensors", "storages"])
def test_a_cut_or_changed_member_is_refused_or_read_but_never_worse(member: str, tmp_path: Path) -> None:
    members = members_of(small(tmp_path / "whole.pth"))
    path, refused = tmp_path / "broken.pth", 0
    for kept in range(0, len(members[member]), 2):
        write_tar(path, members | {member: members[member][:kept]})
        with pytest.raises(InputError):
            read_torch_tar(path)
    for position in range(0, len(members[member]), 2):
        for byte in (0, 0xFF):
            changed = bytearray(members[member])
            changed[position] = byte
            write_tar(path, members | {member: bytes(changed)})
            message = message_of(path)
            refused += bool(message)
            assert not message or str(path) in message
    assert refused > len(members[member]) // 4
    del members[member]
    write_tar(path, members)
    with pytest.raises(InputError, match=member):
        read_torch_tar(path)


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((13,), (1,), 0),
        ((12,), (1,), 1),
        ((3, 4), (4, 2), 0),
        ((2**62, 2**62), (1, 1), 0),
        ((2**40,), (0,), 0),
        ((-3,), (1,), 0),
        ((3,), (-1,), 5),
        ((3,), (1,), -1),
        ((1,), (2**63 - 1,), 2**63 - 1),
        ((0,), (1,), 13),
        ((1,) * 65, (1,) * 65, 0),
    ],
)
def test_tensors_beyond_their_storage_are_refused(size: tuple[int, ...], stride: tuple[int, ...], offset: int, tmp_path: Path) -> None:
    writer = TarWriter()
    content = OrderedDict(w=torch.arange(12.0))
    path = writer.save(content, tmp_path / "w.pth")
    start = members_of(path)["tensors"][: -struct.calcsize("<iiqqq")]
    tensors = start + struct.pack(f"<ii{2 * len(size) + 1}q", len(size), 0, *size, *stride, offset)
    writer.tensors.clear()
    with pytest.raises(InputError, match="not a whole torch"):
        read_torch_tar(writer.save(content, path, tensors=tensors))


@pytest.mark.parametrize(("dimensions", "numel"), [(-1, 12), (2**31 - 1, 12), (1, 2**60), (1, -1), (1, 13)])
def test_claims_beyond_the_file_are_refused(dimensions: int, numel: int, tmp_path: Path) -> None:
    members = members_of(TarWriter().save(OrderedDict(w=torch.arange(12.0)), tmp_path / "w.pth"))
    place = len(members["tensors"]) - 32
    members["tensors"] = members["tensors"][:place] + struct.pack("<i", dimensions) + members["tensors"][place + 4 :]
    members["storages"] = members["storages"].replace(struct.pack("<q", 12), struct.pack("<q", numel), 1)
    write_tar(tmp_path / "w.pth", members)
    with pytest.raises(InputError, match="not a whole torch"):
        read_torch_tar(tmp_path / "w.pth")


def dict_with_a_slow_key() -> bytes:
    """The key is a tuple of twice the same tuple, and so on, a hundred deep."""
    return b"K\x01q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(100)) + b"}hdK\x01s."


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"cposix\nsystem\nX\x04\x00\x00\x00true\x85R.", r"names posix\.system"),
        (b"cbuiltins\neval\n.", r"names builtins\.eval"),
        (b"ctorch\nload\n.", r"names torch\.load"),
        (b"ctorch.storage\nFloatStorage\n.", r"names torch\.storage\.FloatStorage"),
        (b"ctorchvision.models.resnet\nResNet\n)\x81.", r"names torchvision\.models\.resnet\.ResNet.*state_dict"),
        (b"(cos\nsystem\no.", r"names os\.system"),
        (b"(ios\nsystem\n.", "instruction INST"),
        (b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.", "instruction STACK_GLOBAL"),
        (b"\x82\x01.", "instruction EXT1"),
        (b"ctorch\nFloatTensor\nK\x05\x85R.", r"calls torch\.FloatTensor"),
        (b"X\x06\x00\x00\x00systemK\x05\x85R.", "calls a str"),
        (b"B\xff\xff\xff\x7fabc.", "instruction BINBYTES|not a whole"),
        (b"X\xff\xff\xff\x7fabc.", "not a whole"),
        (b"}r\xff\xff\xff\xff.", "nothing where"),
        (b"}}K\x01s.", "not a whole"),
        (b"0.", "instruction POP"),
        (b".", "not a whole"),
        (b"h\x05.", "not a whole"),
        (b"u.", "not a whole"),
        (b"K\x05Q.", "not a whole"),
        (b"K\x05}b.", "not a whole"),
        (b"ccollections\nOrderedDict\nK\x05R.", "not a whole"),
        (b"ctorch._utils\n_rebuild_tensor\nK\x05K\x00))tR.", "not a whole"),
        (b"}q\x00X\x05\x00\x00\x00modelh\x00s.", "holds 'model', which is no tensor"),
        (dict_with_a_slow_key(), "not a whole"),
    ],
)
def test_a_pickle_that_is_more_than_tensors_is_refused_unexecuted(
    code: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = members_of(small(tmp_path / "w.pth"))

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the pickle module was used")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    for member in ("pickle", "tensors", "storages", "sys_info"):
        write_tar(tmp_path / "bad.pth", members | {member: b"\x80\x02" + code})
        began = time.monotonic()
        with pytest.raises(InputError, match=message if member == "pickle" or "names" in message else "bad"):
            read_torch_tar(tmp_path / "bad.pth")
        assert time.monotonic() - began < 5


def test_functions_that_torch_pickled_tensors_with(tmp_path: Path) -> None:
    writer = TarWriter()
    content = OrderedDict(w=torch.arange(12.0))
    path = writer.save(content, tmp_path / "w.pth")
    storage, tensor = (writer.text(str(address)) + b"Q" for address in (FIRST_ADDRESS, 2 * FIRST_ADDRESS + 64))
    view = storage + b"K\x02K\x02K\x03\x86K\x04K\x01\x86"
    hooks = b"ccollections\nOrderedDict\n)R"
    calls = {
        "v1": b"ctorch._utils\n_rebuild_tensor\n(" + view + b"tR",
        "v2": b"ctorch._utils\n_rebuild_tensor_v2\n(" + view + b"\x89" + hooks + b"tR",
        "parameter": b"ctorch._utils\n_rebuild_parameter\n" + tensor + b"\x88" + hooks + b"\x87R",
        "reduced": b"ctorch.nn.parameter\nParameter\n" + tensor + b"\x85R\x88\x89" + hooks + b"\x87b",
        "hooked": b"ctorch.nn.parameter\nParameter\n)\x81(" + tensor + b"N" + hooks + b"\x88\x89tb",
    }
    code = b"\x80\x02}(" + b"".join(writer.text(name) + call for name, call in calls.items()) + b"u."
    writer.tensors.clear()
    writer.save(content, path, pickle=code)
    read, witness = read_torch_tar(path), torch.load(path, weights_only=False)
    assert read.keys() == calls.keys()
    for name, tensor_read in read.items():
        assert bits(tensor_read) == bits(witness[name]), name
    assert read["v1"].tolist() == [[2, 3, 4], [6, 7, 8]]


def tampered(change: Callable[[bytearray], object]) -> Callable[[bytes], bytes]:
    def apply(content: bytes) -> bytes:
        array = bytearray(content)
        change(array)
        return bytes(array)

    return apply


def set_size(content: bytearray, field: bytes) -> None:
    """Give the first header another size field and a checksum that agrees."""
    content[124:136] = field
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])


@pytest.mark.parametrize(
    "change",
    [
        tampered(lambda content: set_size(content, b"77777777777\0")),
        tampered(lambda content: set_size(content, b"\xff" * 12)),  # -1 in the format's other notation
        tampered(lambda content: set_size(content, b"\x80" + b"\xff" * 11)),
        tampered(lambda content: set_size(content, b"not a size\0\0")),
        tampered(lambda content: content.__setitem__(0, 0x41)),
        tampered(lambda content: content.extend(b"more")),
        lambda _: b"",
        lambda _: b"\0" * 10240,
        lambda _: b"PK\x03\x04" + b"\0" * 600,
        lambda content: content[512:],
    ],
)
def test_files_that_are_no_such_tar_are_refused(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = small(tmp_path / "w.pth")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=r"w\.pth is not a whole torch 0\.1 tar"):
        read_torch_tar(path)


def test_other_systems_and_types_are_refused(tmp_path: Path) -> None:
    members = members_of(small(tmp_path / "w.pth"))
    for replaced, message in (
        ({"sys_info": pickle.dumps(SYSTEM | {"little_endian": False}, 2)}, "big-endian"),
        ({"sys_info": pickle.dumps(SYSTEM | {"protocol_version": 1001}, 2)}, "version 1000"),
        ({"storages": members["storages"].replace(b"FloatStorage", b"FlatStorage")}, r"type torch\.FlatStorage; known are"),
    ):
        write_tar(tmp_path / "w.pth", members | replaced)
        with pytest.raises(InputError, match=message):
            read_torch_tar(tmp_path / "w.pth")


def test_other_files_are_not_taken_for_tars(tmp_path: Path) -> None:
    torch.save({"w": torch.rand(2)}, tmp_path / "zip.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    assert not is_torch_tar(tmp_path / "zip.pth")
    assert not is_torch_tar(tmp_path / "empty.pth")
    assert math.isfinite(read_torch_tar(small(tmp_path / "w.pth"))["w"].sum())
