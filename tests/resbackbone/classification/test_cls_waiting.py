"""What a classifier's training step computes asks a GPU for nothing; see tests/detection/test_waiting.py."""

from __future__ import annotations

import torch
from as_if_on_a_gpu import as_if_on_a_gpu
from torch import nn

from resbackbone import create_backbone
from resbackbone.classification.recipe import Normalizer, classification_loss


def test_a_step_asks_a_gpu_for_nothing() -> None:
    """Without MixUp and CutMix, which draw on the host what the tensors here have no values for."""
    net = create_backbone("resnet20_cifar", num_classes=10).train()
    normalizer = Normalizer(mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2), input_range=1.0)
    with as_if_on_a_gpu(nn.ModuleList([net, normalizer])):
        images, labels = torch.zeros((4, 3, 32, 32), dtype=torch.uint8, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
        loss = classification_loss(net(normalizer(images)), labels, label_smoothing=0.1)
        assert (loss.device.type, loss.shape) == ("cuda", ())
