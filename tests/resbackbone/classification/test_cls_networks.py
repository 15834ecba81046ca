"""Weights files and checkpoints become the networks they were: their images, their moving average, their head; and networks that vote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from resbackbone import create_classifier
from resbackbone.classification.config import ClassificationConfig, load_classification_config
from resbackbone.classification.evaluate import evaluate_files
from resbackbone.classification.networks import build_classifier, load_trained
from resbackbone.classification.train import train
from resbackbone.errors import InputError
from resbackbone.runtime.checkpoint import save_weights
from tools import eval_cls

RUN = ["train.steps=2", "train.samples=0"]
CIFAR_MEAN_255 = pytest.approx([255 * value for value in (0.4914, 0.4822, 0.4465)])


def run_of(tiny_photos: Path, tiny_settings: list[str], output: Path, *extra: str) -> Path:
    train(load_classification_config(None, [*tiny_settings, f"data.root={tiny_photos}", *RUN, *extra]), output)
    return output


@pytest.fixture(scope="module")
def finished(tiny_photos: Path, tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tiny_photos, tiny_settings, tmp_path_factory.mktemp("networks") / "run", "train.ema=0.5")


def last_checkpoint(output: Path) -> Path:
    return max((output / "checkpoints").glob("step_*"))


# ---------------------------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_is_judged_as_the_weights_it_delivers(finished: Path, tmp_path: Path) -> None:
    whole, checkpoint = evaluate_files([finished / "model_final.safetensors"], None, []), last_checkpoint(finished)
    assert whole == json.loads((finished / "eval/metrics.json").read_text())
    renamed = tmp_path / "renamed.pth"
    renamed.write_bytes((checkpoint / "state.pt").read_bytes())
    for given, config in (
        (checkpoint, None),
        (checkpoint / "state.pt", None),
        (checkpoint / "state.pt", finished / "config.yaml"),
        (renamed, None),
    ):
        assert evaluate_files([given], config, []) == whole


def test_a_checkpoint_brings_images_classes_and_the_moving_average(finished: Path) -> None:
    trained = load_trained(last_checkpoint(finished), None, [])
    assert trained.classes == ("blue", "green", "red")
    assert (trained.net.preprocessing.input_range, trained.net.preprocessing.std) == (255.0, (1.0, 1.0, 1.0))
    assert trained.net.preprocessing.mean == CIFAR_MEAN_255
    saved = torch.load(last_checkpoint(finished) / "state.pt", weights_only=True)
    weight = trained.net.state_dict()["conv1.weight"]
    assert torch.equal(weight, saved["ema"]["module.conv1.weight"])
    assert not torch.equal(weight, saved["model"]["conv1.weight"])


def test_a_checkpoint_of_a_run_that_began_with_weights(finished: Path, tiny_photos: Path, tiny_settings: list[str], tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    start.write_bytes((finished / "model_final.safetensors").read_bytes())
    # What the weights say of images rules, whatever the config of the new run has.
    output = run_of(tiny_photos, tiny_settings, tmp_path / "run", f"model.weights={start}", "data.normalize=mean_std")
    assert evaluate_files([last_checkpoint(output)], None, []) == evaluate_files([output / "model_final.safetensors"], None, [])
    assert load_trained(last_checkpoint(output), None, []).net.preprocessing.mean == CIFAR_MEAN_255
    start.unlink()
    with pytest.raises(InputError, match=r"what images it expects .*model\.weights=.*start\.safetensors.*does not exist"):
        load_trained(last_checkpoint(output), None, [])


def test_checkpoints_that_are_not_taken(finished: Path, tmp_path: Path) -> None:
    state = last_checkpoint(finished) / "state.pt"
    saved = torch.load(state, weights_only=True)
    torch.save({**saved, "tool": "train_det"}, tmp_path / "detector.pt")
    with pytest.raises(InputError, match=r"train_det\.py, not of a classifier"):
        load_trained(tmp_path / "detector.pt", None, [])
    folder = tmp_path / "step_00000004"
    folder.mkdir()
    (folder / "checkpoint.json").write_bytes(state.with_name("checkpoint.json").read_bytes())
    (folder / "state.pt").write_bytes(state.read_bytes()[:-100])
    with pytest.raises(InputError, match="cut off"):
        load_trained(folder, None, [])


# ------------------------------------------------------------------------------------------------------------------------- bare weights


def config_file(path: Path, **settings: object) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


def test_bare_weights_see_images_as_most_networks_do(tmp_path: Path) -> None:
    """Such as torchvision's files: data.normalize says what a network is trained on from scratch."""
    bare = tmp_path / "bare.safetensors"
    save_weights(bare, create_classifier("resnet20_cifar", num_classes=3).state_dict(), {})
    config = config_file(tmp_path / "c.yaml", model={"name": "resnet20_cifar"}, data={"normalize": "mean"})
    trained = load_trained(bare, config, [])
    assert trained.net.preprocessing == create_classifier("resnet20_cifar", num_classes=3).preprocessing
    assert "does not say which images it expects" in trained.net.load_report
    save_weights(bare, trained.net.state_dict(), {"mean": "0.1,0.2,0.3", "std": "0.4,0.5,0.6"})
    assert load_trained(bare, config, []).net.preprocessing.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(("name", "head"), [("resnet20_cifar", "fc"), ("vgg16", "classifier.6")])
def test_other_classes_get_a_new_head(name: str, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "vgg16":
        monkeypatch.setattr("resbackbone.vgg.FC_WIDTH", 8)  # 4096 make half a gigabyte
    source = tmp_path / "ten.safetensors"
    ten = create_classifier(name, num_classes=10)
    save_weights(source, ten.state_dict(), {})
    config = load_classification_config(None, [f"model.name={name}", f"model.weights={source}"])
    net = build_classifier(config, 3)
    assert "its head tells 10 classes apart, so that of 3 starts anew" in net.load_report
    assert net.get_submodule(head).weight.shape[0] == 3
    given, taken = ten.state_dict(), net.state_dict()
    assert given.keys() == taken.keys()
    assert [key for key in given if given[key].shape != taken[key].shape] == [f"{head}.weight", f"{head}.bias"]
    assert all(torch.equal(given[key], taken[key]) for key in given if not key.startswith(head))
    del given["conv1.weight" if name == "resnet20_cifar" else "features.0.weight"]
    save_weights(source, given, {})
    with pytest.raises(InputError, match="1 missing"):
        build_classifier(config, 3)


# ----------------------------------------------------------------------------------------------------------------------------- ensembles


def ensemble(tiny_photos: Path, tmp_path: Path, *members: tuple[str, int], shortcut: str = "A") -> tuple[list[Path], Path]:
    """Bare files of CIFAR networks, and a config for the first, with shortcut A."""
    paths = []
    for number, (name, classes) in enumerate(members):
        torch.manual_seed(number)
        paths.append(tmp_path / f"{number}.safetensors")
        net = create_classifier(name, num_classes=classes, shortcut=shortcut)
        torch.nn.init.normal_(net.fc.weight, std=1e-4)  # type: ignore[arg-type, union-attr]  # scores that differ, not zeros and ones
        save_weights(paths[-1], net.state_dict(), {})
    data = {"root": str(tiny_photos), "workers": 0}
    judged = {"shorter_side": 36, "crop": 32}
    return paths, config_file(tmp_path / "c.yaml", model={"name": members[0][0]}, data=data, eval=judged, train={"precision": "fp32"})


def test_bare_networks_of_several_kinds_vote_under_one_config(tiny_photos: Path, tmp_path: Path) -> None:
    paths, config = ensemble(tiny_photos, tmp_path, ("resnet20_cifar", 3), ("resnet32_cifar", 3), shortcut="B")
    assert [load_trained(path, config, []).net.architecture for path in paths] == ["resnet20_cifar", "resnet32_cifar"]
    alone = [evaluate_files([path], config, [])["loss"] for path in paths]
    assert len({*alone, evaluate_files(paths, config, [])["loss"]}) == 3


def test_files_with_configs_keep_their_networks_under_another(finished: Path, tiny_photos: Path, tmp_path: Path) -> None:
    (bare,), config = ensemble(tiny_photos, tmp_path, ("resnet32_cifar", 3))
    trained = load_trained(finished / "model_final.safetensors", config, [])
    assert trained.net.architecture == trained.config.model.name == "resnet20_cifar"
    assert trained.config.eval.shorter_side == 36, "judged as --config says"
    assert evaluate_files([bare, finished / "model_final.safetensors"], config, [])["loss"] > 0


def test_networks_of_other_numbers_of_classes_cannot_vote(tiny_photos: Path, tmp_path: Path) -> None:
    paths, config = ensemble(tiny_photos, tmp_path, ("resnet20_cifar", 3), ("resnet20_cifar", 5))
    with pytest.raises(InputError, match=r"1\.safetensors tells 5 classes apart, .*0\.safetensors 3"):
        evaluate_files(paths, config, [])


def test_class_numbers_count_from_0() -> None:
    with pytest.raises(InputError, match="a: -1; a network's outputs are numbered from 0"):
        load_classification_config(None, ["data.class_numbers={a: -1, b: 2}"])


# ------------------------------------------------------------------------------------------------------------------------------ the tool


def test_settings_where_weights_belong_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        eval_cls.main(["--weights", "data.root=x"])
    assert stopped.value.code == 2
    assert "names no file, only settings (data.root=x)" in capsys.readouterr().err


def test_statistics_are_recomputed_for_weights_that_exist(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    source, target = finished / "model_final.safetensors", tmp_path / "anew.safetensors"
    command = ["--weights", str(source), "--recompute-bn", str(target)]
    assert eval_cls.main(command) == 1
    assert "train.bn_images=0 leaves the statistics as they are" in capsys.readouterr().err
    assert eval_cls.main([*command, "train.bn_images=16"]) == 0
    assert f"weights {target}" in capsys.readouterr().out
    before, after = load_file(source), load_file(target)
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    config: ClassificationConfig = load_trained(target, None, []).config
    assert config.train.bn_images == 16
    again = tmp_path / "again.safetensors"
    assert eval_cls.main(["--weights", str(target), "--recompute-bn", str(again)]) == 0
    repeated = {name: value for name, value in load_file(again).items() if not name.endswith("num_batches_tracked")}
    assert all(torch.equal(value, after[name]) for name, value in repeated.items()), "they follow from weights and images"
    assert eval_cls.main(["--weights", str(source), str(target), "--recompute-bn", str(again)]) == 1
    assert "writes one file" in capsys.readouterr().err
