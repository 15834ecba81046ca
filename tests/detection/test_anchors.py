"""Anchor grids against torchvision's AnchorGenerator."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from detection.anchors import AnchorGrid, anchor_grid
from resbackbone.errors import InputError

PYRAMID = {f"p{level}": SimpleNamespace(channels=256, stride=2**level) for level in range(2, 7)}
ONE_MAP = {"conv4_x": SimpleNamespace(channels=1024, stride=16)}


def _theirs(sizes: tuple, image_size: tuple[int, int], grids: list[tuple[int, int]]) -> torch.Tensor:
    images = ImageList(torch.zeros((1, 3, *image_size)), [image_size])
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return generator(images, [torch.zeros((1, 1, *grid)) for grid in grids])[0]


@pytest.mark.parametrize("image_size", [(96, 160), (256, 64), (32, 32)])
def test_pyramid_equals_torchvision(image_size):
    grids = [(-(-image_size[0] // stride), -(-image_size[1] // stride)) for stride in (4, 8, 16, 32, 64)]
    ours = anchor_grid(PYRAMID)(image_size, grids)
    assert [len(level) for level in ours] == [3 * rows * columns for rows, columns in grids]
    assert torch.equal(torch.cat(ours), _theirs(((32,), (64,), (128,), (256,), (512,)), image_size, grids))


@pytest.mark.parametrize("sizes", [(32, 64, 128, 256, 512), (24, 57)])
@pytest.mark.parametrize("grid", [(6, 10), (1, 1)])
def test_one_map_equals_torchvision(grid, sizes):
    image_size = (16 * grid[0], 16 * grid[1])
    ours = anchor_grid(ONE_MAP, sizes=sizes)
    assert torch.equal(ours(image_size, [grid])[0], _theirs((sizes,), image_size, [grid]))


def test_an_empty_map_has_no_anchors():
    assert anchor_grid(ONE_MAP)((16, 0), [(1, 0)])[0].shape == (0, 4)


def test_by_hand():
    (anchors,) = AnchorGrid([(16,)], ratios=(1.0,))((32, 32), [(2, 2)])
    assert anchors.tolist() == [[-8, -8, 8, 8], [8, -8, 24, 8], [-8, 8, 8, 24], [8, 8, 24, 24]]


def test_anchors_are_no_part_of_the_weights():
    assert not anchor_grid(PYRAMID).state_dict()


def test_wrong_number_of_sizes():
    with pytest.raises(InputError, match=r"3 anchor sizes .* 5 levels"):
        anchor_grid(PYRAMID, sizes=(8, 16, 32))
    with pytest.raises(InputError, match="as many anchor sizes"):
        AnchorGrid([(32,), (64, 128)])
