"""The recipe does what the paper says: what decays, when the rate falls, how warm-up ends; batch norm's statistics anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resbackbone import create_classifier
from resbackbone.classification.config import TrainConfig, load_classification_config
from resbackbone.classification.recipe import BatchMixer, Normalizer, Plateau, classification_loss, parameter_groups, rate_factor
from resbackbone.classification.statistics import recompute_statistics
from resbackbone.errors import InputError


def factor(settings: TrainConfig, step: int, ended: int | None = None) -> float:
    return rate_factor(settings, step, plateau=Plateau(patience=1, threshold=0.0), warmup_ended_at=ended)


def test_the_paper_decays_every_parameter() -> None:
    net = create_classifier("resnet20_cifar")
    (group,) = parameter_groups(net, weight_decay=1e-4, decay_norms_and_biases=True)
    assert group["weight_decay"] == 1e-4
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in net.parameters()}


def test_a_modern_recipe_decays_weights_alone() -> None:
    net = create_classifier("resnet20_cifar")
    net.conv1.requires_grad_(False)
    decayed, spared = parameter_groups(net, weight_decay=1e-4, decay_norms_and_biases=False)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert {names[id(parameter)] for parameter in spared["params"]} == {
        name for name in names.values() if ".bn" in name or name.startswith("bn") or name == "fc.bias"
    }
    assert {names[id(parameter)] for parameter in decayed["params"]} == {
        name for name in names.values() if (".conv" in name or name == "fc.weight") and name != "conv1.weight"
    }
    assert (decayed["weight_decay"], spared["weight_decay"]) == (1e-4, 0.0)


def test_the_fixed_steps_of_cifar() -> None:
    settings = load_classification_config(None, ["train.schedule=step", "train.steps=64000", "train.milestones=[32000,48000]"]).train
    rates = [settings.lr * factor(settings, step) for step in (0, 31999, 32000, 47999, 48000, 63999)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_the_warm_up_of_resnet110_ends_with_its_error() -> None:
    settings = TrainConfig(
        schedule="step", steps=64000, milestones=(32000, 48000), warmup="constant", warmup_steps=2000, warmup_until_error=0.8
    )
    assert [factor(settings, step) for step in (0, 400, 1999, 2000)] == pytest.approx([0.1, 0.1, 0.1, 1.0])
    assert [factor(settings, step, ended=400) for step in (399, 400, 40000)] == pytest.approx([0.1, 1.0, 0.1])


def test_a_linear_warm_up_before_a_cosine() -> None:
    settings = TrainConfig(schedule="cosine", steps=1100, warmup_steps=100)
    assert [factor(settings, step) for step in (0, 50, 100, 600, 1099)] == pytest.approx([0.001, 0.5005, 1.0, 0.5, 0.0], abs=1e-5)


@pytest.mark.parametrize("patience", [0, 2])
def test_plateau_detection_is_torchs(patience: int) -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    options = {"factor": 0.1, "patience": patience, "threshold": 0.01, "threshold_mode": "abs", "eps": 0.0}
    peer = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)
    ours = Plateau(patience=patience, threshold=0.01)
    torch.manual_seed(0)
    divisions = 0
    for number in range(60):
        error = 1.0 / (1 + number // 12) + 0.004 * torch.randn(()).item()
        divisions += ours.observe(error)
        peer.step(error)
        assert ours.factor == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), number
        again = Plateau(patience=patience, threshold=0.01)
        again.load_state_dict(ours.state_dict())
        ours = again
    assert divisions >= 2


def test_the_plateaus_factor_reaches_the_rate() -> None:
    plateau = Plateau(patience=0, threshold=0.002)
    settings = TrainConfig()
    found = []
    for error in (0.9, 0.5, 0.499, 0.3, 0.3):
        plateau.observe(error)
        found.append(rate_factor(settings, 7, plateau=plateau, warmup_ended_at=None))
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_the_normalizer_is_its_formula() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    shifts = torch.randn(2, 3) / 10
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    for input_range in (1.0, 255.0):
        net = Normalizer(mean=tuple(input_range * m for m in mean), std=tuple(input_range * s for s in std), input_range=input_range)
        per_channel = [torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std)]
        expected = (images / 255 + shifts[:, :, None, None] - per_channel[0]) / per_channel[1]
        assert torch.allclose(net(images, shifts), expected, atol=1e-5)
        assert torch.allclose(net(images), (images / 255 - per_channel[0]) / per_channel[1], atol=1e-5)


def test_mixing_is_a_function_of_seed_and_batch() -> None:
    mix = BatchMixer(TrainConfig(mixup=0.2, cutmix=1.0, seed=3), num_classes=5)
    images, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 5
    before = torch.get_rng_state()
    results = [mix(images, labels, number=number) for number in (0, 1, 0)]
    assert torch.equal(torch.get_rng_state(), before), "the training's own randomness is untouched"
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))
    assert not torch.equal(results[0][1], results[1][1])
    assert all(torch.allclose(mixed.sum(1), torch.ones(6)) for _, mixed in results)
    same = BatchMixer(TrainConfig(), num_classes=5)(images, labels, number=0)
    assert same[0] is images
    assert same[1] is labels


def test_the_loss_takes_numbers_and_probabilities() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    smooth = torch.full((4, 3), 0.1 / 3).scatter_(1, labels[:, None], 0.9 + 0.1 / 3)
    literal = -(smooth * logits.log_softmax(1)).sum(1).mean()
    assert classification_loss(logits, labels, label_smoothing=0.1) == pytest.approx(literal.item(), rel=1e-5)
    assert classification_loss(logits, smooth, label_smoothing=0.0) == pytest.approx(literal.item(), rel=1e-5)


def test_statistics_are_those_of_all_inputs() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)).eval()
    batches = [torch.randn(count, 3, 6, 6) * scale + scale for count, scale in ((4, 1.0), (4, 3.0), (2, 0.5))]
    seen: dict[int, list[torch.Tensor]] = {1: [], 4: []}
    handles = [net[place].register_forward_pre_hook(lambda _, inputs, place=place: seen[place].append(inputs[0])) for place in seen]
    assert recompute_statistics(net, batches) == 10
    for handle in handles:
        handle.remove()
    for place, inputs in seen.items():
        values = torch.cat([part.transpose(0, 1).flatten(1) for part in inputs], 1).double()
        assert torch.allclose(net[place].running_mean.double(), values.mean(1), atol=1e-6)
        assert torch.allclose(net[place].running_var.double(), values.var(1), rtol=1e-5)
    assert not net.training
    # The second norm saw what the first one, normalising by its batch, passes on.
    first = nn.functional.batch_norm(net[0](batches[1]), None, None, net[1].weight, net[1].bias, training=True)
    assert torch.allclose(seen[4][1], net[3](first.relu()), atol=1e-5)
    assert recompute_statistics(nn.Sequential(nn.Conv2d(3, 4, 3)), batches) == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.shorter_side=[480,256]", "range"),
        ("data.shorter_side=[200,480]", "data.size=224"),
        ("data.area=[0.1,1.5]", "range"),
        ("train.eval_every=0", "plateau"),
        ("train.milestones=[5,2]", "rise"),
        ("train.label_smoothing=1", "label_smoothing"),
        ("train.bn_images=-2", "bn_images"),
        ("eval.crop=300", "eval.shorter_side=256"),
        ("eval.scales=[]", "eval.scales"),
        ("data.lanes=0", "data.lanes"),
        ("train.batch_size=0", "train.batch_size"),
    ],
)
def test_wrong_settings_are_explained(override: str, words: str) -> None:
    extra = ["train.schedule=step"] if "milestones" in override else []
    with pytest.raises(InputError, match=words):
        load_classification_config(None, [*extra, override])
