"""Evaluation: averages over views and networks written out, figures by hand, and the known accuracies of the ImageNet weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resbackbone import create_classifier
from resbackbone.backbone import Backbone, FeatureInfo, Preprocessing
from resbackbone.classification.config import ClassificationConfig, load_classification_config
from resbackbone.classification.evaluate import Evaluator, Split, evaluate_files
from resbackbone.classification.networks import dense_logits
from resbackbone.classification.sources import ArraySource
from resbackbone.errors import InputError
from resbackbone.runtime.checkpoint import save_weights
from resbackbone.runtime.distributed import Process
from resbackbone.runtime.precision import Precision

CPU = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
CLASSES = tuple("abcdefg")


class Linear(Backbone):
    """Logits linear in the image's mean colour."""

    def __init__(self, seed: int, classes: int = 7) -> None:
        super().__init__({"conv1": FeatureInfo(3, 1)}, preprocessing=Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)))
        self.head = nn.Linear(3, classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(classes, 3, generator=generator))

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(images.mean((2, 3)))


@pytest.fixture(scope="module")
def source() -> ArraySource:
    draw = np.random.default_rng(0)
    return ArraySource(draw.integers(0, 256, (23, 40, 52, 3), dtype=np.uint8), draw.integers(0, 7, 23), CLASSES, label="noise")


def figures(source: ArraySource, nets: list[Backbone], *overrides: str) -> dict[str, float]:
    config = load_classification_config(None, ["data.workers=0", "eval.shorter_side=40", "eval.crop=32", "eval.batch_size=5", *overrides])
    return Evaluator(config, Split(data=source), process=CPU, precision=Precision("fp32", "cpu")).evaluate(nets)


def literal_scores(source: ArraySource, net: Backbone, windows: list[tuple[slice, slice, bool]]) -> Tensor:
    """Softmax scores of each image, averaged over windows of it."""
    rows = []
    for pixels in source.pixels:
        scores = []
        for top, left, mirrored in windows:
            view = pixels[:, ::-1] if mirrored else pixels
            colour = torch.from_numpy(view[top, left].astype(np.float64)).mean((0, 1)) / 255
            normal = (colour - torch.tensor(net.preprocessing.mean)) / torch.tensor(net.preprocessing.std)
            scores.append(net.head(normal.float()).double().softmax(0))  # type: ignore[operator]
        rows.append(torch.stack(scores).mean(0))
    return torch.stack(rows).detach()


def expected(scores: Tensor, labels: np.ndarray) -> dict[str, float]:
    order = scores.argsort(1, descending=True).numpy()
    top1 = float(np.mean(order[:, 0] == labels))
    loss = float(-scores[range(len(labels)), labels].log().mean())
    return {"top1": top1, "top5": float((order[:, :5] == labels[:, None]).any(1).mean()), "error": 1 - top1, "loss": loss}


CENTRE = [(slice(4, 36), slice(10, 42), False)]
TEN = [
    (rows, columns, mirrored)
    for mirrored in (False, True)
    for rows, columns in [
        *((rows, columns) for rows in (slice(0, 32), slice(8, 40)) for columns in (slice(0, 32), slice(20, 52))),
        (slice(4, 36), slice(10, 42)),
    ]
]


@pytest.mark.parametrize(("mode", "windows"), [("1crop", CENTRE), ("10crop", TEN)])
def test_figures_are_those_of_the_windows(source: ArraySource, mode: str, windows: list) -> None:
    net = Linear(0)
    assert figures(source, [net], f"eval.mode={mode}") == pytest.approx(
        expected(literal_scores(source, net, windows), source.labels), abs=1e-5
    )


def test_an_ensemble_averages_scores(source: ArraySource) -> None:
    nets = [Linear(0), Linear(1), Linear(2)]
    mean = torch.stack([literal_scores(source, net, CENTRE) for net in nets]).mean(0)
    assert figures(source, nets) == pytest.approx(expected(mean, source.labels), abs=1e-5)


def test_scales_are_averaged(source: ArraySource) -> None:
    net = Linear(0)
    one = figures(source, [net], "eval.mode=multiscale", "eval.scales=[40]", "eval.flip=true")
    whole = [(slice(None), slice(None), False)]
    assert one == pytest.approx(expected(literal_scores(source, net, whole), source.labels), abs=1e-5)
    # A mean colour hardly depends on the scale, so five scales score like one.
    assert figures(source, [net], "eval.mode=multiscale")["loss"] == pytest.approx(one["loss"], abs=0.01)


def test_classes_among_more_outputs(source: ArraySource) -> None:
    net, numbers = Linear(0, classes=20), [3, 19, 0, 7, 11, 12, 5]
    mapping = "data.class_numbers={" + ", ".join(f"{name}: {number}" for name, number in zip(CLASSES, numbers, strict=True)) + "}"
    found = figures(source, [net], mapping)
    scores = literal_scores(source, net, CENTRE)
    wanted = expected(scores, np.array(numbers)[source.labels])
    wanted["among_classes"] = expected(scores[:, numbers], source.labels)["top1"]
    assert found == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(InputError, match="which output b"):
        figures(source, [net], "data.class_numbers={a: 3}")
    with pytest.raises(InputError, match="only 5 outputs"):
        figures(source, [Linear(0, classes=5)])


def test_vgg_is_applied_densely() -> None:
    torch.manual_seed(0)
    net = create_classifier("vgg16", num_classes=4).eval()
    with torch.no_grad():
        for layer in net.classifier:  # type: ignore[union-attr]
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        same = torch.randn(1, 3, 224, 224)
        assert torch.allclose(dense_logits(net, same), net(same), atol=1e-4)
        wide = torch.randn(1, 3, 224, 256)
        features = net.features[-1](Backbone.forward(net, wide)["conv5"])  # type: ignore[index, operator]
        assert features.shape[-2:] == (7, 8)
        by_hand = torch.stack([net.classifier(features[..., left : left + 7].flatten(1)) for left in (0, 1)]).mean(0)  # type: ignore[operator]
        assert torch.allclose(dense_logits(net, wide), by_hand, atol=1e-4)
        small = torch.randn(1, 3, 96, 96)
        assert torch.allclose(dense_logits(net, small), net(small))


@pytest.fixture
def trained(tiny_photos: Path, tmp_path: Path) -> list[Path]:
    """Two random networks' files, of the tiny photos' classes."""
    from resbackbone.classification.networks import build_classifier, classifier_metadata

    settings = [f"data.root={tiny_photos}", "model.name=resnet20_cifar", "data.workers=0", "eval.shorter_side=36", "eval.crop=32"]
    config: ClassificationConfig = load_classification_config(None, [*settings, "train.precision=fp32"])
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = build_classifier(config, 3)
        nn.init.normal_(net.fc.weight, std=1e-4)  # type: ignore[arg-type, union-attr]  # scores that differ, not zeros and ones
        paths.append(tmp_path / f"{seed}.safetensors")
        save_weights(paths[-1], net.state_dict(), classifier_metadata(config, net, ("blue", "green", "red")))
    return paths


def test_the_tool(trained: list[Path], repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("eval_cls", repository / "tools/eval_cls.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    names = [str(path) for path in trained]
    options = ["--mode", "all", "--output", str(tmp_path / "out")]
    assert tool.main(["--weights", *names, "eval.scales=[32,40]", *options]) == 0
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines()[:3]] == ["1crop", "10crop", "multiscale"]
    written = json.loads((tmp_path / "out/eval/metrics.json").read_text())
    assert f"top1 {written['10crop']['top1']:.4f}" in said
    alone = [evaluate_files([path], None, [])["loss"] for path in trained]
    assert len({written["1crop"]["loss"], *alone}) == 3
    assert tool.main(["--weights", names[0], "data.val=vall"]) == 1
    assert "did you mean 'val'" in capsys.readouterr().err


def test_files_that_do_not_fit(trained: list[Path], tmp_path: Path) -> None:
    net = create_classifier("resnet20_cifar", num_classes=3)
    save_weights(tmp_path / "bare.safetensors", net.state_dict(), {})
    with pytest.raises(InputError, match="does not carry a config"):
        evaluate_files([tmp_path / "bare.safetensors"], None, [])
    with pytest.raises(InputError, match="no such config"):
        evaluate_files([tmp_path / "bare.safetensors"], tmp_path / "none.yaml", [])
    headless = {name: value for name, value in net.state_dict().items() if not name.startswith("fc.")}
    (tmp_path / "c.yaml").write_text("model: {name: resnet20_cifar}\n")
    save_weights(tmp_path / "headless.safetensors", headless, {})
    with pytest.raises(InputError, match="only a backbone"):
        evaluate_files([tmp_path / "headless.safetensors"], tmp_path / "c.yaml", [])
    other = tmp_path / "other.safetensors"
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(trained[0], framework="pt") as file:
        metadata = file.metadata()
    save_weights(other, load_file(trained[0]), metadata | {"classes": json.dumps(["x", "y", "z"])})
    with pytest.raises(InputError, match="other classes apart"):
        evaluate_files([trained[0], other], None, [])
    with pytest.raises(InputError, match=r"data\.class_numbers"):
        evaluate_files([other], None, [])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_known_accuracies_on_imagenette(name: str, repository: Path, shared_data: Path, unpacked_data: Path, tmp_path: Path) -> None:
    file = f"{name}_imagenet1k_fp16.safetensors"
    known = json.loads((shared_data / "weights" / "expected_imagenet.json").read_text())[file]["fp32"]
    # ResNet-50's figures are of the first photos of each class in the archive's order.
    archive = shared_data / "imagenette" / "imagenette160.tar"
    root = _first_photos(archive, unpacked_data / "imagenette", known["n"] // 10, tmp_path)
    config = repository / "configs/imagenette/imagenet_weights.yaml"
    overrides = [f"model.name={name}", f"data.root={root}", "data.workers=0"]
    found = evaluate_files([unpacked_data / "weights" / file], config, overrides)
    ours = {"top1": found["top1"], "top5": found["top5"], "ten_way": found["among_classes"]}
    assert ours == pytest.approx({key: known[key] for key in ours}, abs=6e-5)  # they are given to four decimals


def _first_photos(archive: Path, unpacked: Path, per_class: int, folder: Path) -> Path:
    import tarfile
    from collections import Counter

    taken: Counter[str] = Counter()
    with tarfile.open(archive) as file:
        names = [Path(member.name) for member in file if member.isfile() and Path(member.name).parts[-3] == "val"]
    for name in names:
        wnid = name.parts[-2]
        if taken[wnid] < per_class:
            taken[wnid] += 1
            (folder / "val" / wnid).mkdir(parents=True, exist_ok=True)
            (folder / "val" / wnid / name.name).symlink_to(unpacked.resolve() / "val" / wnid / name.name)
    return folder
