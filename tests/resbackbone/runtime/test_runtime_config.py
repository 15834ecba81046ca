"""Every way to get a config wrong, and the one sentence the user reads; and that what is saved loads back the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from resbackbone.errors import InputError
from resbackbone.runtime.config import dump_config, load_config, load_config_text, parse_config, save_config


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float = 0.01
    steps: int = 100
    clip_norm: float | None = None
    milestones: tuple[int, ...] = (60, 80)
    compile: bool = False
    schedule: Literal["step", "cosine", "off"] = "step"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps={self.steps} should be 1 or more")


@dataclass(frozen=True, kw_only=True)
class Extra:
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Run:
    train: Optimizer = field(default_factory=Optimizer)
    name: str = "run"
    weights: str | None = None
    splits: tuple[str, ...] = ("a",)
    sizes: int | tuple[int, ...] = 800
    pair: tuple[float, float] = (0.5, 2.0)
    extra: Extra | None = None
    options: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Needs:
    root: str


def load(text: str, *overrides: str) -> Run:
    return load_config_text(Run, text, source="run.yaml", overrides=overrides)


def test_defaults_are_the_schema_s() -> None:
    assert load_config(Run, None) == Run()
    assert load("") == Run()
    assert load("# only a comment\n") == Run()


@pytest.mark.parametrize(
    ("text", "override", "path", "expected"),
    [
        ("train: {lr: 1e-4}", "train.lr=1e-4", "train.lr", 1.0e-4),
        ("train: {lr: '1e-4'}", "train.lr='1e-4'", "train.lr", 1.0e-4),
        ("train: {lr: 2}", "train.lr=2", "train.lr", 2.0),
        ("train: {steps: 90_000}", "train.steps=90_000", "train.steps", 90000),
        ("train: {clip_norm: null}", "train.clip_norm=null", "train.clip_norm", None),
        ("train: {clip_norm: 3}", "train.clip_norm=3", "train.clip_norm", 3.0),
        ("train: {milestones: []}", "train.milestones=[]", "train.milestones", ()),
        ("train: {milestones: [1, 2]}", "train.milestones=[1,2]", "train.milestones", (1, 2)),
        ("train: {compile: true}", "train.compile=true", "train.compile", True),
        ("train: {schedule: 'off'}", "train.schedule=off", "train.schedule", "off"),
        ("name: '2012'", "name=2012", "name", "2012"),
        ("weights: a/b.pth", "weights=a/b.pth", "weights", "a/b.pth"),
        ("weights: null", "weights=null", "weights", None),
        ("splits: VOC2012/test", "splits=VOC2012/test", "splits", ("VOC2012/test",)),
        ("splits: [x, y]", "splits=[x, y]", "splits", ("x", "y")),
        ("splits: ['2012']", "splits=2012", "splits", ("2012",)),
        ("sizes: 600", "sizes=600", "sizes", 600),
        ("sizes: [480, 600]", "sizes=[480,600]", "sizes", (480, 600)),
        ("pair: [1, 2]", "pair=[1,2]", "pair", (1.0, 2.0)),
        ("extra: {weight: 3}", "extra.weight=3", "extra.weight", 3.0),
        ("extra: null", "extra=null", "extra", None),
        ("options: {a: 1}", "options={a: 1}", "options", {"a": 1}),
    ],
)
def test_values_from_file_and_command_line(text: str, override: str, path: str, expected: object) -> None:
    for config in (load(text), load("", override)):
        value: object = config
        for name in path.split("."):
            value = getattr(value, name)
        assert value == expected
        assert type(value) is type(expected)


def test_command_line_beats_file_and_keeps_its_neighbours() -> None:
    config = load("train: {lr: 0.5, steps: 7}\nname: mine", "train.lr=0.25")
    assert (config.train.lr, config.train.steps, config.name) == (0.25, 7, "mine")


def test_an_alias_is_not_changed_through_its_twin() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Two:
        a: Extra = field(default_factory=Extra)
        b: Extra = field(default_factory=Extra)

    Two.__annotations__.update(a=Extra, b=Extra)
    config = load_config_text(Two, "a: &x {weight: 2}\nb: *x", source="two.yaml", overrides=["a.weight=9"])
    assert (config.a.weight, config.b.weight) == (9.0, 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  lrr: 0.1", "run.yaml:2: train.lrr=0.1 is not a setting of train; did you mean 'lr'?"),
        ("lr: 0.1", "run.yaml:1: lr=0.1 is not a setting of the config; did you mean 'train.lr'?"),
        ("zzzzzz: 1", "run.yaml:1: zzzzzz=1 is not a setting of the config; it has: train, name"),
        ("3: 1", "run.yaml:1: 3=1 is not a setting of the config;"),
        ("train: {lr: fast}", "run.yaml:1: train.lr='fast' should be a number"),
        ("train: {lr: .nan}", "train.lr=nan should be a finite number"),
        ("train: {lr: true}", "train.lr=True should be a number"),
        ("train: {steps: 2.5}", "train.steps=2.5 should be a whole number"),
        ("train: {steps: 1e5}", "train.steps='1e5' should be a whole number; write 100000"),
        ("train: {steps: true}", "train.steps=True should be a whole number"),
        ("train: {steps: null}", "train.steps=None should be a whole number"),
        ("train: {compile: 1}", "train.compile=1 should be true or false"),
        ("train: {schedule: cosin}", "train.schedule='cosin' is not one of step, cosine, off; did you mean 'cosine'?"),
        ("train: {schedule: off}", "train.schedule=False is not one of step, cosine, off; choose one of these"),
        ("train: {milestones: [1, x]}", "train.milestones=[1, 'x'] should be a whole number (value 2 of 2)"),
        ("train: {clip_norm: none}", "train.clip_norm='none' should be a number, or write null"),
        ("train: 5", "run.yaml:1: train=5 should be a group of settings, such as lr, steps"),
        ("train:", "run.yaml:1: train=None should be a group of settings"),
        ("name: 2012", "name=2012 should be text; YAML reads it as int, so put it in quotes"),
        ("name: no", "name=False should be text; YAML reads it as bool, so put it in quotes"),
        ("name: [a]", "name=['a'] should be text"),
        ("pair: [1]", "pair=[1] should be a list of 2 values"),
        ("splits: null", "splits=None should be a list, such as [a, b]"),
        ("options: 1", "options=1 should be a group of settings"),
        ("train:\n  lr: 1\n  steps: 0", "run.yaml:3: train: steps=0 should be 1 or more"),
        ("name: a\nname: b", "run.yaml:2: name was already set in line 1; keep one of the two"),
        ("train: {lr: 1\nname: x", "run.yaml:2: broken YAML"),
        ("name: a\n\tx: 1", "run.yaml:2: broken YAML"),
        ("- a\n- b", "run.yaml: a config is `key: value` lines, but this holds ['a', 'b']"),
        ("just words", "a config is `key: value` lines"),
        ("name: !!python/object/apply:os.system ['touch /tmp/owned']", "run.yaml:1: broken YAML: could not determine a constructor"),
        ("a: &a [1]\nb: &b [*a,*a]\nname: [*b,*b]", "run.yaml:1: a=[1] is not a setting"),
        ("name: a\x00b", "run.yaml: broken YAML"),
    ],
)
def test_what_the_user_reads_for_a_wrong_file(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=0.1", "command line: train.lrr=0.1 is not a setting of train; did you mean 'lr'?"),
        ("trian.lr=0.1", "command line: trian.lr=0.1 is not a setting of the config; did you mean 'train'?"),
        ("train.lr=quick", "command line: train.lr=quick should be a number"),
        ("train.lr.x=1", "command line: train.lr is a single value, not a group of settings; write train.lr=VALUE"),
        ("train=1", "command line: train=1 should be a group of settings"),
        ("train.lr", "command line: 'train.lr' is not of the form key.path=value"),
        ("--lr=3", "options come before it, as --name VALUE"),
        (".lr=3", "'.lr=3' is not of the form key.path=value"),
        ("train.milestones=[1,2", "train.milestones=[1,2 should be a whole number"),
        ("train.steps=0", "command line: train: steps=0 should be 1 or more"),
        ("train.schedule=stepp", "train.schedule=stepp is not one of step, cosine, off; did you mean 'step'?"),
    ],
)
def test_what_the_user_reads_for_a_wrong_override(override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load("train: {lr: 0.5}", override)
    assert message in str(caught.value)


@pytest.mark.parametrize("twice", ["[*{0}, *{0}]", "{{x: *{0}, y: *{0}}}"])
def test_nested_aliases_do_not_explode(twice: str) -> None:
    # 2^60 values if any part of the loader or of the message followed each alias.
    lines = ["a0: &a0 {z: 1}"] + [f"a{i}: &a{i} " + twice.format(f"a{i - 1}") for i in range(1, 60)]
    with pytest.raises(InputError, match="is not a setting of the config"):
        load("\n".join(lines))


def test_a_required_setting() -> None:
    assert load_config_text(Needs, "root: x", source="n.yaml").root == "x"
    with pytest.raises(InputError, match="root is required and not set; add it to the file or pass root=VALUE"):
        load_config(Needs, None)


def test_a_mapping_can_be_checked_too() -> None:
    assert parse_config(Run, {"name": "x"}, "metadata of w.safetensors") == Run(name="x")
    with pytest.raises(InputError, match=r"metadata of w\.safetensors: nme='x' is not a setting of the config; did you mean 'name'\?"):
        parse_config(Run, {"nme": "x"}, "metadata of w.safetensors")


def test_dump_loads_back_equal(tmp_path: Path) -> None:
    config = Run(
        train=Optimizer(lr=1e-7, clip_norm=None, milestones=()),
        name="1e5: [ü",
        weights="no",
        splits=("x", "2012"),
        sizes=(1, 2),
        extra=Extra(),
    )
    save_config(config, tmp_path / "deep" / "config.yaml")
    assert load_config(Run, tmp_path / "deep" / "config.yaml") == config
    assert load_config_text(Run, dump_config(config), source="again") == config


@pytest.mark.parametrize("name", ["missing.yaml", "run.yml", "folder", "binary.yaml", "run.yaml/x"])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "run.yaml").write_text("name: x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(InputError) as caught:
        load_config(Run, tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert name != "run.yml" or f"did you mean '{tmp_path / 'run.yaml'}'?" in str(caught.value)
