"""Faster R-CNN, the story: images → features → proposals → regions → losses | detections (Ren et al. 2015; He et al. 2015, appendix A)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detection.mask_head import MaskHead
from detection.preprocess import Preprocess, Size
from detection.roi_head import RoIHead
from detection.rpn import Predictions, ProposalNetwork
from detection.structures import Detections, Target
from detection.waiting import is_asking_free
from resbackbone.errors import InputError

Generators = Sequence[torch.Generator | None]


@dataclass(frozen=True)
class Encoded:
    """A batch as both stages see it: features by level name, what the RPN says of each anchor, and each image's (height, width)."""

    features: dict[str, Tensor]
    predictions: Predictions
    sizes: list[Size]

    @property
    def device(self) -> torch.device:
        return self.predictions.anchors[0].device


class FasterRCNN(nn.Module):
    """A detector. `forward` always returns losses, so that DDP can wrap it; `detect` always returns detections."""

    def __init__(
        self,
        backbone: nn.Module,
        rpn: ProposalNetwork,
        roi_head: RoIHead,
        preprocess: Preprocess,
        *,
        mask_head: MaskHead | None = None,
    ) -> None:
        """backbone: (N, 3, H, W) → features by name, a pyramid included; the RPN reads all of them."""
        super().__init__()
        self.backbone, self.rpn, self.roi_head, self.preprocess, self.mask_head = backbone, rpn, roi_head, preprocess, mask_head

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """The loss terms rpn_objectness, rpn_box, roi_class, roi_box (and mask) of a batch; their sum is what one trains.

        images: RGB (3, h, w), uint8 or float in 0..1, of any sizes. Raises InputError for boxes without area, unless
        they are on a GPU already: call `check_boxes` before they go there, or the loss becomes infinite.
        """
        check_boxes(targets)
        encoded = self.encode(images)
        proposals = self.rpn.propose(encoded.predictions, encoded.sizes, self.rpn.train_limits)
        return self._losses(encoded, proposals, targets, across_processes=True)

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor]) -> list[Detections]:
        """What is in each image, in pixels of the image as it was given. Doesn't depend on which images share the call."""
        found: dict[int, Detections] = {}
        for group in self._groups(images):
            encoded = self.encode([images[i] for i in group])
            proposals = self.rpn.propose(encoded.predictions, encoded.sizes, self.rpn.test_limits)
            found |= zip(group, self._detections(encoded, proposals), strict=True)
        return [found[i] for i in range(len(images))]

    @torch.no_grad()
    def validate(self, images: Sequence[Tensor], targets: Sequence[Target]) -> tuple[dict[str, Tensor], list[Detections]]:
        """Losses, averaged over images, and `detect`'s detections, from one pass; proposals are those of testing for both."""
        found: dict[int, Detections] = {}
        losses: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        for group in self._groups(images):
            encoded = self.encode([images[i] for i in group])
            proposals = self.rpn.propose(encoded.predictions, encoded.sizes, self.rpn.test_limits)
            found |= zip(group, self._detections(encoded, proposals), strict=True)
            of_group = self._losses(encoded, proposals, [targets[i] for i in group], across_processes=False)
            losses |= {name: losses[name].to(value) + value * len(group) / len(images) for name, value in of_group.items()}
        return dict(losses), [found[i] for i in range(len(images))]

    def encode(self, images: Sequence[Tensor]) -> Encoded:
        """The backbone's and the RPN's part, for images padded to one size."""
        features, sizes, padded = self.extract(images)
        return Encoded(features, self.rpn(features, padded), sizes)

    def extract(self, images: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[Size], Size]:
        """The backbone's part alone: features of a padded batch, each image's size in it, and the padded one."""
        batch, sizes = self.preprocess(images)
        return self.backbone(batch), sizes, (batch.shape[-2], batch.shape[-1])

    def _losses(
        self, encoded: Encoded, proposals: Sequence[Tensor], targets: Sequence[Target], *, across_processes: bool
    ) -> dict[str, Tensor]:
        generators = self.generators(targets, encoded)
        losses = self.rpn_losses(encoded, targets, generators, across_processes=across_processes)
        return losses | self.region_losses(encoded, proposals, targets, generators, across_processes=across_processes)

    def rpn_losses(
        self, encoded: Encoded, targets: Sequence[Target], generators: Generators, *, across_processes: bool
    ) -> dict[str, Tensor]:
        """rpn_objectness and rpn_box."""
        return self.rpn.losses(encoded.features, encoded.predictions, targets, generators=generators, across_processes=across_processes)

    def region_losses(
        self, encoded: Encoded, proposals: Sequence[Tensor], targets: Sequence[Target], generators: Generators, *, across_processes: bool
    ) -> dict[str, Tensor]:
        """roi_class and roi_box (and mask) of regions sampled from the proposals."""
        features, sizes = encoded.features, encoded.sizes
        regions = self.roi_head.sample(proposals, targets, generators)
        losses = self.roi_head.losses(features, regions, sizes, targets=targets, across_processes=across_processes)
        if self.mask_head is not None:
            losses |= self.mask_head.losses(features, regions, sizes, targets=targets, across_processes=across_processes)
        return losses

    @staticmethod
    def generators(targets: Sequence[Target], encoded: Encoded) -> Generators:
        """What draws each image's anchors, and then its regions."""
        return [_generator(target.seed, encoded.device) for target in targets]

    def _detections(self, encoded: Encoded, proposals: Sequence[Tensor]) -> list[Detections]:
        found = self.roi_head.detect(encoded.features, proposals, encoded.sizes)
        return found if self.mask_head is None else self.mask_head.detect(encoded.features, found, encoded.sizes)

    def _groups(self, images: Sequence[Tensor]) -> Iterator[list[int]]:
        """Indices of images that have the same size once padded: batched together, none gets more padding than it would alone."""
        groups: dict[Size, list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            groups[self.preprocess.padded_size((image.shape[-2], image.shape[-1]))].append(index)
        yield from groups.values()


def _generator(seed: int | None, device: torch.device) -> torch.Generator | None:
    return None if seed is None else torch.Generator(device).manual_seed(seed)


def check_boxes(targets: Sequence[Target]) -> None:
    """Raises InputError for boxes without area. Those on a GPU aren't looked at, which would mean waiting: call this before they go."""
    boxes = torch.cat([target.boxes for target in targets])
    if not is_asking_free(boxes) or bool((boxes[:, 2:] > boxes[:, :2]).all()):
        return
    for target in targets:
        for number, box in enumerate(target.boxes.tolist()):
            if not (box[2] > box[0] and box[3] > box[1]):
                raise InputError(
                    f"image {target.image_id}: box {number} {box} has no area as (x1, y1, x2, y2); drop it from the annotations"
                )
