"""Table 1 of our networks against the paper's and an independent count."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from resbackbone import create_backbone, create_classifier, list_backbones
from resbackbone.analysis import PAPER_MULTIPLY_ADDS, describe, describe_network
from resbackbone.errors import InputError

OUTPUT_SIDES = (112, 56, 28, 14, 7)  # the paper's Table 1, second column


def literal_count(depths: tuple[int, ...], bottleneck: bool) -> int:
    """Table 1 by hand: side^2 * kernel^2 * channels in * channels out of every layer, stride in the first 1x1 (v1)."""
    total, channels = 112**2 * 49 * 3 * 64, 64
    for stage, depth in enumerate(depths):
        width, side = 64 * 2**stage, 56 // 2**stage
        out = width * (4 if bottleneck else 1)
        for block in range(depth):
            if bottleneck:
                total += side**2 * (channels * width + 9 * width**2 + width * out)
            else:
                total += side**2 * (9 * channels * width + 9 * width**2)
            if block == 0 and channels != out:
                total += side**2 * channels * out
            channels = out
    return total + channels * 1000


@pytest.mark.parametrize(
    ("name", "depths", "bottleneck"),
    [
        ("resnet18", (2, 2, 2, 2), False),
        ("resnet34", (3, 4, 6, 3), False),
        ("resnet50", (3, 4, 6, 3), True),
        ("resnet101", (3, 4, 23, 3), True),
        ("resnet152", (3, 8, 36, 3), True),
    ],
)
def test_multiply_adds_are_the_papers(name: str, depths: tuple[int, ...], bottleneck: bool) -> None:
    with torch.device("meta"):
        table = describe_network(create_classifier(name, variant="v1"), (224, 224))
    assert table.multiply_adds == literal_count(depths, bottleneck)
    assert abs(table.multiply_adds / 1e9 - PAPER_MULTIPLY_ADDS[name]) < 0.07
    assert [row.output[-1] for row in table.rows] == [*OUTPUT_SIDES, 1000]


def test_parameters_of_the_stages_add_up() -> None:
    for name in ("resnet50", "vgg16"):
        with torch.device("meta"):
            net = create_classifier(name)
        table = describe_network(net, (224, 224))
        assert table.parameters == sum(p.numel() for p in net.parameters())
        assert all(row.parameters > 0 for row in table.rows)


def test_odd_sizes_and_dilation() -> None:
    with torch.device("meta"):
        net = create_backbone("resnet18", output_stride=16)
    rows = {row.name: row.output for row in describe_network(net, (65, 97)).rows}
    assert rows["conv5_x"] == (512, 5, 7)


def test_the_network_itself_is_left_alone() -> None:
    net = create_backbone("resnet18").train()
    describe_network(net, (64, 64))
    assert net.training
    assert net.conv1.weight.device.type == "cpu"
    assert net.bn1.num_batches_tracked == 0


def test_describe_says_it_all() -> None:
    text = describe("resnet50")
    for part in (
        "25,557,032",
        "3,857,973,248",
        "2048 x 7 x 7",
        "3.86 x 10^9",
        "paper's Table 1 says 3.8",
        "conv4_x (1024 channels, stride 16)",
    ):
        assert part in text, part
    assert "4,089,184,256" in describe("resnet50", variant="v1.5")
    assert "128 x 16 x 16" in describe("resnet18", input_size=128)


def test_describe_knows_every_network() -> None:
    for name in list_backbones():
        text = describe(name)
        size = "32 x 32" if name.endswith("_cifar") else "224 x 224"
        assert text.splitlines()[0].endswith(f"one image of {size}")
        assert "multiply-adds\nfeature maps: conv" in text
    assert "paper's Table 6 says 19.4 million parameters" in describe("resnet1202_cifar")
    assert "paper's Table 6" not in describe("resnet110_cifar", shortcut="B")
    assert "shortcut C" in describe("resnet18", shortcut="C")
    assert "v2" in describe("resnet50", variant="v2")


def test_docs_say_the_same(repository: Path) -> None:
    """The table of docs/networks.md, row by row."""
    rows = re.findall(
        r"^\| (\w+)(?:, (v[\d.]+))? \| (?:([ABC])? ?\| )?([\d,]+) \| ([\d,]+) \|", (repository / "docs/networks.md").read_text(), re.M
    )
    assert len(rows) == 18
    for name, variant, shortcut, parameters, multiply_adds in rows:
        text = describe(name, variant=variant or "v1", shortcut=shortcut or None)
        assert f"{parameters}  {multiply_adds}" in re.sub(" +", "  ", text), name


def test_describe_checks_weights(tmp_path: Path) -> None:
    state = create_classifier("resnet18", num_classes=7).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    text = describe("resnet18", weights=tmp_path / "w.safetensors")
    assert "loaded 122/122" in text
    assert "classifier  7 " in text
    save_file({k: v for k, v in state.items() if not k.startswith("fc.")}, tmp_path / "b.safetensors")
    assert "loaded 120/120" in describe("resnet18", weights=tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="does not fit resnet34"):
        describe("resnet34", weights=tmp_path / "w.safetensors")


def test_describe_another_librarys_network() -> None:
    text = describe("torchvision:resnet18")
    assert "1,813,561,344" in text  # ours without the classifier's 512,000
    assert "paper's Table 1 says" not in text


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["resnet18", "--input-size", "64"], 0, "11,689,512"),
        (["resnet81"], 1, "did you mean 'resnet18'"),
        (["resnet18", "--input-size", "0"], 1, "at least 1"),
        (["resnet18", "--weights", "missing.safetensors"], 1, "missing.safetensors does not exist"),
        (["resnet18", "--input-size", "big"], 2, "invalid int"),
    ],
)
def test_the_tool(arguments: list[str], code: int, said: str, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(repository / "tools" / "describe.py"))["main"]
    if code == 2:
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
    else:
        assert main(arguments) == code
    output = capsys.readouterr()
    assert said in (output.err if code else output.out)
    assert "Traceback" not in output.err


def test_the_tool_from_the_command_line(repository: Path) -> None:
    command = [sys.executable, str(repository / "tools" / "describe.py"), "resnet18", "--input-size", "64"]
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=repository, env=environment, check=True)
    assert "11,689,512" in run.stdout
