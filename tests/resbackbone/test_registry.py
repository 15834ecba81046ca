"""Names, options and how a new backbone comes in."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn

from resbackbone import FeatureInfo, create_backbone, create_classifier, list_backbones, register_backbone, registry
from resbackbone.backbone import Backbone, StagedBackbone
from resbackbone.errors import InputError
from resbackbone.fpn import FeaturePyramid


@pytest.fixture
def own_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations of a test end with it."""
    monkeypatch.setattr(registry, "BACKBONES", dict(registry.BACKBONES))


def staged(in_channels: int = 3) -> StagedBackbone:
    stages, channels = {}, in_channels
    for number, name in enumerate(("conv1", "conv2_x", "conv3_x"), 1):
        stages[name] = (nn.Conv2d(channels, 4 * number, 3, stride=2, padding=1), FeatureInfo(4 * number, 2**number))
        channels = 4 * number
    return StagedBackbone(stages)


def test_the_papers_networks_are_there() -> None:
    assert {"resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "vgg16"} <= set(list_backbones())
    assert list_backbones("resnet1*") == ["resnet101", "resnet110_cifar", "resnet1202_cifar", "resnet152", "resnet18"]
    assert list_backbones("nothing*") == []


@pytest.mark.usefixtures("own_backbones")
def test_a_new_backbone_is_one_registered_function() -> None:
    register_backbone("own")(staged)
    net = create_backbone("own", in_channels=1, freeze_at=1, out_features=("conv3_x",))
    assert "own" in list_backbones()
    assert net(torch.rand(1, 1, 16, 16))["conv3_x"].shape == (1, 12, 2, 2)
    assert not net.conv1.weight.requires_grad
    assert list(FeaturePyramid(create_backbone("own"))(torch.rand(1, 3, 32, 32))) == ["p2", "p3", "p4"]


@pytest.mark.usefixtures("own_backbones")
def test_an_option_the_builder_does_not_have_is_refused() -> None:
    register_backbone("own")(staged)
    with pytest.raises(InputError, match="no option norm; leave it at 'batch'"):
        create_backbone("own", norm="frozen")
    with pytest.raises(InputError, match="no option num_classes"):
        create_classifier("own")
    with pytest.raises(InputError, match="exists already"):
        register_backbone("own")(staged)
    with pytest.raises(InputError, match="exists already"):
        register_backbone("timm:own")(staged)


@pytest.mark.usefixtures("own_backbones")
def test_a_module_of_the_users_is_imported_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from torch import nn\nfrom resbackbone import FeatureInfo, register_backbone\nfrom resbackbone.backbone import StagedBackbone\n"
        "@register_backbone('mine')\ndef mine():\n    return StagedBackbone({'conv1': (nn.Conv2d(3, 4, 3, 2, 1), FeatureInfo(4, 2))})\n"
    )
    (tmp_path / "module_of_a_user.py").write_text(code)
    (tmp_path / "module_that_needs_more.py").write_text("import a_package_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    assert create_backbone("module_of_a_user:mine").feature_info == {"conv1": FeatureInfo(4, 2)}
    assert create_backbone("module_of_a_user:mine").architecture == "module_of_a_user:mine"
    with pytest.raises(InputError, match="did you mean 'mine'"):
        create_backbone("module_of_a_user:mina")
    with pytest.raises(InputError, match="PYTHONPATH"):
        create_backbone("no_such_module:mine")
    with pytest.raises(ModuleNotFoundError, match="nobody_has"):
        create_backbone("module_that_needs_more:mine")
    sys.modules.pop("module_of_a_user", None)


def test_installed_packages_add_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("plugged", f"{Path(__file__).stem}:staged", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == registry.ENTRY_POINTS else [])
    monkeypatch.setitem(sys.modules, Path(__file__).stem, sys.modules[__name__])
    assert "plugged" in list_backbones("plug*")
    assert isinstance(create_backbone("plugged"), Backbone)


@pytest.mark.usefixtures("own_backbones")
def test_a_package_that_is_installed_adds_its_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an installer leaves it: the package beside its metadata, with the lines of docs/swapping.md and docs/architecture.md."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    said = tomllib.loads(re.search(r"```toml\n(.*?)^```", (docs / "swapping.md").read_text(), re.MULTILINE | re.DOTALL)[1])
    (points,) = said["project"]["entry-points"].items()
    assert points == (registry.ENTRY_POINTS, {"tiny": "my_networks.tiny:tiny"})
    source = re.search(r"<!-- file: my_networks/tiny.py -->\n```python\n(.*?)^```", (docs / "architecture.md").read_text(), re.M | re.S)[1]
    metadata = tmp_path / "my_networks-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-networks\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\ntiny = my_networks.tiny:tiny\n")
    (tmp_path / "my_networks").mkdir()
    (tmp_path / "my_networks" / "tiny.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert list_backbones("tiny") == ["tiny"]
    with pytest.raises(InputError, match=r"did you mean 'tiny'.*entry-point group resbackbone\.backbones"):
        create_backbone("tinny")
    assert "my_networks.tiny" not in sys.modules
    assert create_backbone("tiny", in_channels=1, freeze_at=2).feature_info["conv5_x"] == FeatureInfo(40, 32)
    sys.modules.pop("my_networks.tiny", None)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet5O", {}, "did you mean 'resnet50'"),
        ("resnet50", {"norm": "frosen"}, "did you mean 'frozen'"),
        ("resnet50", {"variant": "v15"}, "did you mean 'v1.5'"),
        ("resnet50", {"output_stride": 4}, "8, 16 or 32"),
        ("resnet50", {"dilation_rule": "detectron"}, "did you mean 'detectron2'"),
        ("resnet50", {"norm_eps": -1.0}, "norm_eps=-1.0"),
        ("resnet50", {"weights": "timm"}, "timm:resnet50"),
        ("resnet18", {"norm": "frozen"}, "norm 'frozen' or 'eval' needs weights"),
        ("resnet18", {"norm": "eval"}, "needs weights"),
        ("vgg16_bn", {"norm": "frozen"}, "needs weights"),
        ("vgg16", {"output_stride": 8}, "16 or 32"),
    ],
)
def test_wrong_options_are_explained(name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_backbone(name, **options)


def test_frozen_statistics_without_weights_can_be_allowed() -> None:
    create_backbone("resnet18", norm="frozen", allow_random_frozen=True)
    create_backbone("vgg16", norm="frozen")  # it has no norms, so nothing is random and frozen


def test_wrong_classifiers_are_explained() -> None:
    for arguments, message in (({"num_classes": 0}, "at least 1"), ({"norm": "frozen"}, "needs weights"), ({"variant": "v3"}, "v1")):
        with pytest.raises(InputError, match=message):
            create_classifier("resnet18", **arguments)
    with pytest.raises(InputError, match="create_backbone"):
        create_classifier("timm:resnet18")
