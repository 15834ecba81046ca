"""Box coding and box operations against torchvision and against arithmetic done by hand."""

from __future__ import annotations

import math

import peers
import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

from detection.boxes import REGION_WEIGHTS, UNIT_WEIGHTS, clip_to_image, decode, encode, intersection_over_area, is_large


@pytest.mark.parametrize("weights", [UNIT_WEIGHTS, REGION_WEIGHTS])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_coding_equals_torchvision(count, weights):
    boxes, anchors = peers.random_boxes(count), peers.random_boxes(count, seed=1)
    coder = BoxCoder(weights)
    deltas = coder.encode_single(boxes, anchors)
    assert torch.equal(encode(boxes, anchors, weights), deltas)
    wild = torch.randn((count, 4), generator=torch.Generator().manual_seed(0)) * 10  # beyond the cut of log scales
    for codes in (deltas, wild):
        assert torch.equal(decode(codes, anchors, weights), coder.decode_single(codes, anchors))


def test_decode_inverts_encode():
    boxes, anchors = peers.random_boxes(20), peers.random_boxes(20, seed=1)
    torch.testing.assert_close(decode(encode(boxes, anchors, REGION_WEIGHTS), anchors, REGION_WEIGHTS), boxes, atol=1e-4, rtol=0)


def test_encode_by_hand():
    # From a 10×20 box centred on (15, 20) to a 20×20 one centred on (20, 20).
    deltas = encode(torch.tensor([[10.0, 10.0, 30.0, 30.0]]), torch.tensor([[10.0, 10.0, 20.0, 30.0]]))
    torch.testing.assert_close(deltas, torch.tensor([[0.5, 0.0, math.log(2), 0.0]]))


def test_decode_takes_any_leading_dimensions_and_half_precision():
    anchors, deltas = peers.random_boxes(6), torch.randn((2, 3, 4), generator=torch.Generator().manual_seed(0))
    flat = decode(deltas.reshape(6, 4), anchors)
    assert torch.equal(decode(deltas, anchors.view(2, 3, 4)), flat.view(2, 3, 4))
    assert decode(deltas.bfloat16(), anchors.view(2, 3, 4)).dtype == torch.float32


@pytest.mark.parametrize("count", [0, 30])
def test_clip_and_size_equal_torchvision(count):
    boxes = peers.random_boxes(count, size=(200, 200), min_side=0.0) - 50
    clipped = clip_to_image(boxes, (80, 120))
    assert torch.equal(clipped, clip_boxes_to_image(boxes, (80, 120)))
    assert torch.equal(torch.nonzero(is_large(clipped, 1.0)).flatten(), remove_small_boxes(clipped, 1.0))


def test_intersection_over_area():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 0.0, 15.0, 10.0], [20.0, 20.0, 30.0, 30.0], [3.0, 3.0, 3.0, 9.0]])
    regions = torch.tensor([[0.0, 0.0, 10.0, 100.0], [0.0, 0.0, 10.0, 5.0]])
    wanted = torch.tensor([[1.0, 0.5], [0.5, 0.25], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(intersection_over_area(boxes, regions), wanted)
    assert intersection_over_area(boxes[:0], regions).shape == (0, 2)
    assert intersection_over_area(boxes, regions[:0]).shape == (4, 0)
