"""The recipe's parts that are rules rather than loops: what decays, when the rate falls, how long warm-up lasts, batch mixing, the loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resbackbone.classification.config import TrainConfig
from resbackbone.runtime.random_state import item_seed
from resbackbone.runtime.schedule import lr_factor

PLATEAU_GAMMA = 0.1  # "divided by 10" (§3.4)


def parameter_groups(model: nn.Module, *, weight_decay: float, decay_norms_and_biases: bool) -> list[dict[str, Any]]:
    """Parameter groups for SGD. The paper's recipe decays every parameter, Caffe's scales and biases too.

    Without `decay_norms_and_biases`, those of fewer than two dimensions (scales and shifts of norms, biases) make a group with decay 0,
    as torchvision's and timm's modern recipes have it.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if decay_norms_and_biases:
        return [{"params": parameters, "weight_decay": weight_decay}]
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]


class Plateau:
    """Divides the learning rate by 10 when the error stops falling; its state goes into checkpoints.

    patience: evaluations in a row without an error lower than the best by `threshold`; the next of them divides the rate.
    """

    def __init__(self, *, patience: int, threshold: float) -> None:
        self.patience, self.threshold = patience, threshold
        self.factor, self.best, self.waited = 1.0, float("inf"), 0

    def observe(self, error: float) -> bool:
        """Take the validation error (a share of 1) of an evaluation; True where it divides the rate."""
        if error < self.best - self.threshold:
            self.best, self.waited = error, 0
            return False
        self.waited += 1
        if self.waited <= self.patience:
            return False
        self.factor, self.waited = self.factor * PLATEAU_GAMMA, 0
        return True

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` takes."""
        return {"factor": self.factor, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another left off."""
        self.factor, self.best, self.waited = float(state["factor"]), float(state["best"]), int(state["waited"])


def rate_factor(settings: TrainConfig, step: int, *, plateau: Plateau, warmup_ended_at: int | None) -> float:
    """What `train.lr` is multiplied by in step number `step` (from 0).

    warmup_ended_at: the step at which a warm-up by error ended, None while it lasts.
    """
    factor = lr_factor(
        step,
        steps=settings.steps,
        warmup_steps=settings.warmup_steps if settings.warmup == "linear" else 0,
        schedule="constant" if settings.schedule == "plateau" else settings.schedule,
        milestones=settings.milestones,
    )
    if settings.schedule == "plateau":
        factor *= plateau.factor
    if settings.warmup == "constant" and step < settings.warmup_steps and (warmup_ended_at is None or step < warmup_ended_at):
        factor *= settings.warmup_factor
    return factor


class BatchMixer:
    """torchvision's MixUp and CutMix, one of them a batch where both are asked for; nothing where none is.

    Its draws are a function of (seed, batch number), the same in every process; each process mixes its own images.
    """

    def __init__(self, settings: TrainConfig, num_classes: int) -> None:
        self.seed, self.transforms = settings.seed, []
        if settings.mixup > 0 or settings.cutmix > 0:
            from torchvision.transforms import v2

            kinds = ((v2.MixUp, settings.mixup), (v2.CutMix, settings.cutmix))
            self.transforms = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]

    def __call__(self, images: Tensor, labels: Tensor, *, number: int) -> tuple[Tensor, Tensor]:
        """float [N, 3, S, S] and int64 [N] -> mixed images, and labels as they are or float [N, K]."""
        if not self.transforms:
            return images, labels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(item_seed(self.seed, number))
            chosen = self.transforms[int(torch.randint(len(self.transforms), ()))]
            return chosen(images, labels)


def classification_loss(logits: Tensor, labels: Tensor, *, label_smoothing: float) -> Tensor:
    """Mean cross-entropy, in float32; labels: numbers [N], or probabilities [N, K]."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


class Normalizer(nn.Module):
    """uint8 images [N, 3, H, W] (and colour shifts [N, 3] in 0 … 1) -> what the network expects, on the device, in channels-last memory.

    (x * range / 255 + shift * range - mean) / std is one multiplication and one addition; they run over whole rows of pixels, because an
    innermost dimension of three leaves a CPU's vector units empty.
    """

    scale: Tensor
    offset: Tensor
    shift_scale: Tensor

    def __init__(self, *, mean: tuple[float, ...], std: tuple[float, ...], input_range: float) -> None:
        super().__init__()
        deviation = torch.tensor(std, dtype=torch.float32)
        self.register_buffer("scale", input_range / 255 / deviation)
        self.register_buffer("offset", -torch.tensor(mean, dtype=torch.float32) / deviation)
        self.register_buffer("shift_scale", input_range / deviation)

    def forward(self, images: Tensor, shifts: Tensor | None = None) -> Tensor:
        count, channels, height, width = images.shape
        offset = self.offset[None] if shifts is None else self.offset + shifts * self.shift_scale
        rows = images.permute(0, 2, 3, 1).reshape(count, height, width * channels).float()
        rows = torch.addcmul(offset.repeat(1, width)[:, None], rows, self.scale.repeat(width))
        return rows.view(count, height, width, channels).permute(0, 3, 1, 2)

    def undo(self, images: Tensor) -> Tensor:
        """Float [N, 3, H, W] as the network takes it -> uint8 RGB; a colour shift stays in, and is cut off at black and white."""
        pixels = (images.float() - self.offset[:, None, None]) / self.scale[:, None, None]
        return pixels.round().clamp(0, 255).byte()
