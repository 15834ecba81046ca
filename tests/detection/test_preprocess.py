"""Normalising and padding against torchvision's transform."""

from __future__ import annotations

from dataclasses import replace

import peers
import pytest
import torch
import torchvision
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detection.preprocess import Preprocess
from resbackbone.backbone import Preprocessing
from resbackbone.errors import InputError

IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def _images() -> list[torch.Tensor]:
    return [peers.random_images(1, size=size)[0] for size in ((50, 70), (33, 96), (64, 31))]


@pytest.mark.parametrize("as_float", [False, True])
def test_equals_torchvision(as_float):
    images = _images()
    floats = [image / 255 for image in images]
    transform = GeneralizedRCNNTransform(50, 70, IMAGENET.mean, IMAGENET.std)
    wanted = transform.batch_images([transform.normalize(image) for image in floats])
    batch, sizes = Preprocess(IMAGENET)(floats if as_float else images)
    assert sizes == [(50, 70), (33, 96), (64, 31)]
    torch.testing.assert_close(batch, wanted, atol=1e-5, rtol=1e-5)
    assert not batch[2, :, :, 31:].any()  # exactly the mean colour


def test_colour_order_and_range():
    caffe = replace(IMAGENET, mean=(103.0, 116.0, 123.0), std=(1.0, 1.0, 1.0), color_order="BGR", input_range=255.0)
    red = torch.zeros((3, 32, 32), dtype=torch.uint8)
    red[0] = 200
    batch, _ = Preprocess(caffe)([red])
    torch.testing.assert_close(batch[0, :, 0, 0], torch.tensor([-103.0, -116.0, 200.0 - 123.0]))
    torch.testing.assert_close(Preprocess(caffe)([red / 255])[0], batch, atol=1e-4, rtol=0)


def test_padding_follows_the_divisor():
    batch, _ = Preprocess(IMAGENET, divisor=16)([torch.zeros((3, 17, 16), dtype=torch.uint8)])
    assert batch.shape == (1, 3, 32, 16)


def test_nothing_of_it_is_in_the_weights():
    assert not Preprocess(IMAGENET).state_dict()


@pytest.mark.parametrize("wrong", ["normalised", "0 to 255"])
def test_an_image_that_was_normalised_already_is_refused(wrong):
    image = _images()[0] / 255
    bad = torchvision.transforms.functional.normalize(image, IMAGENET.mean, IMAGENET.std) if wrong == "normalised" else image * 255
    with pytest.raises(InputError, match="not normalised"):
        Preprocess(IMAGENET)([image, bad])
    Preprocess(IMAGENET)([image * 1.2 - 0.1])  # noise and sharpening may leave 0..1 a little
