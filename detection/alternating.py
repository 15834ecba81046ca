"""4-step alternating training of the RPN and the detector (Ren et al. 2015, §3.2), beside joint training, which train.py alone does.

1. The RPN learns, from ImageNet weights.
2. A detector of its own learns, from ImageNet weights, on the proposals of step 1.
3. The RPN's own layers learn anew on step 2's backbone, which stays as it is from here on.
4. The region head goes on from step 2's, on the proposals of step 3: one backbone serves both.

Each step is a whole run of `train.steps`: three in OUTPUT/step_1 … step_3, the last in OUTPUT itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from detection.build import chosen_steps
from detection.config import DetectionConfig, load_detection_config
from detection.faster_rcnn import Encoded, FasterRCNN, check_boxes
from detection.predict import config_from_weights, load_detector, read_detector_file
from detection.steps import SteppedRCNN, Steps
from detection.structures import Target
from detection.train import TrainResult, train
from resbackbone.errors import InputError
from resbackbone.runtime.config import changed_settings
from resbackbone.runtime.output import refuse_taken

Part = Literal["rpn", "regions"]
Prepare = Callable[[FasterRCNN], FasterRCNN]
# No weight hangs on these, so a finished step may have had others; the norms' epsilon is written there as the weights decided it.
FREE = (
    *("model.backbone.norm_eps", "model.test.", "data.workers", "train.device", "train.log_every", "train.save_every"),
    *("train.keep_checkpoints", "eval."),
)


class HalfRCNN(SteppedRCNN):
    """A Faster R-CNN of which one half learns: its losses are that half's, and the other half gets no gradients."""

    def __init__(
        self,
        whole: FasterRCNN,
        *,
        learns: Part,
        backbone_stays: bool = False,
        proposer: FasterRCNN | None = None,
        steps: Steps = Steps(),  # noqa: B008 (frozen)
    ) -> None:
        """whole: whose modules these are. proposer: where the regions' proposals come from; None: its own RPN."""
        super().__init__(whole.backbone, whole.rpn, whole.roi_head, whole.preprocess, mask_head=whole.mask_head, steps=steps)
        self.learns, self.backbone_stays = learns, backbone_stays
        self._proposer = (proposer or self,)  # in a tuple: it is no part of what is trained and saved
        resting = [self.rpn] if learns == "regions" else [self.roi_head, *([self.mask_head] if self.mask_head else [])]
        for module in [*resting, *([self.backbone] if backbone_stays else [])]:
            module.requires_grad_(False)
        self.train(whole.training)

    def train(self, mode: bool = True) -> HalfRCNN:
        """Also keeps the statistics of a backbone that stays."""
        super().train(mode)
        if self.backbone_stays:
            self.backbone.eval()
        return self

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """rpn_objectness and rpn_box, or roi_class, roi_box (and mask)."""
        check_boxes(targets)
        (proposer,) = self._proposer
        encoded = self.encode(images) if proposer is self else self._encode_beside(proposer, images)
        if self.learns == "rpn":
            return self.rpn_losses(encoded, targets, self.generators(targets, encoded), across_processes=True)
        with torch.no_grad():
            proposals = proposer.rpn.propose(encoded.predictions, encoded.sizes, proposer.rpn.train_limits)
        return self.region_losses(encoded, proposals, targets, self.generators(targets, encoded), across_processes=True)

    def _encode_beside(self, proposer: FasterRCNN, images: Sequence[Tensor]) -> Encoded:
        """The features are our own, what an RPN says is the proposer's."""
        with torch.no_grad():
            predictions = proposer.encode(images).predictions
        features, sizes, _ = self.extract(images)
        return Encoded(features, predictions, sizes)


def train_alternating(config: DetectionConfig, output: Path, *, resume: str | None = None) -> TrainResult:
    """The four steps; returns the last one's result. Arguments and errors as of `train`; resume: None or "auto".

    A step that has left its weights is not repeated, so a stopped training goes on in the step where it was. Raises InputError also where
    such a step had other settings.
    """
    if resume not in (None, "auto"):
        raise InputError(f"--resume {resume}: alternating training is four runs with checkpoints of their own; give --resume auto")
    refuse_taken(output, resume=resume)  # the last step finds it too, three trainings later
    if (output / "config.yaml").is_file():
        _check_settings(output, config)
    once = dataclasses.replace(config.train, eval_every=0, early_stop=None)
    unseen = dataclasses.replace(config.eval, samples=0, report=False)  # half a detector's boxes tell nothing; its loss does
    early = dataclasses.replace(config, train=once, eval=unseen)
    folders = [output / f"step_{number}" for number in (1, 2, 3)]
    weights = [folder / "model_final.safetensors" for folder in folders]
    prepared = _preparations(config, weights)
    for folder, final, prepare in zip(folders, weights, prepared[:3], strict=True):
        if resume == "auto" and final.is_file():
            _check_settings(folder, early)
        else:
            train(early, folder, resume=resume, prepare=prepare)
    return train(config, output, resume=resume, prepare=prepared[3])


def _check_settings(folder: Path, config: DetectionConfig) -> None:
    """Raises InputError where the finished step in `folder` had other settings, of those that its weights hang on."""
    changes = changed_settings(load_detection_config(folder / "config.yaml"), config)
    changes = [one for one in changes if one.startswith("model.test.context:") or not one.startswith(FREE)]
    if changes:
        raise InputError(
            f"{folder} holds a run with other settings: {'; '.join(changes[:4])}. Go on with those it had, give another "
            "--output, or remove it and the steps after it"
        )


def _preparations(config: DetectionConfig, weights: Sequence[Path]) -> list[Prepare]:
    """What each step makes of a new detector, given the files of the first three."""
    steps = chosen_steps(config)

    def second(new: FasterRCNN) -> FasterRCNN:
        proposer, _ = load_detector(config_from_weights(weights[0]), weights[0], device=next(new.parameters()).device)
        return HalfRCNN(new, learns="regions", proposer=proposer.requires_grad_(False), steps=steps)

    def third(new: FasterRCNN) -> FasterRCNN:
        _take(new, weights[1], but="rpn.")
        return HalfRCNN(new, learns="rpn", backbone_stays=True, steps=steps)

    def fourth(new: FasterRCNN) -> FasterRCNN:
        _take(new, weights[2])
        return HalfRCNN(new, learns="regions", backbone_stays=True, steps=steps)

    return [lambda new: HalfRCNN(new, learns="rpn", steps=steps), second, third, fourth]


def _take(detector: FasterRCNN, weights: Path, *, but: str | None = None) -> None:
    """Load a step's weights, those whose names begin with `but` left as they are."""
    tensors, ours = read_detector_file(weights).tensors, detector.state_dict()
    detector.load_state_dict({name: ours[name] if but and name.startswith(but) else value for name, value in tensors.items()})
