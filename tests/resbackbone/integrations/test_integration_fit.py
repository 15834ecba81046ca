"""What is said when a swap into torchvision does not fit: a table of levels and anchors, and a warning about images normalised twice."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from host_checks import photos
from safetensors.torch import save_file
from torchvision.models import detection
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.functional import normalize

from resbackbone import create_backbone
from resbackbone.errors import InputError
from resbackbone.integrations.torchvision import (
    anchor_generator,
    check_fit,
    fpn_backbone,
    levels_table,
    normalization,
    segmentation_model,
)

SMALL = {"min_size": 64, "max_size": 96}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_table_of_what_fits() -> None:
    backbone = fpn_backbone("resnet18", out_channels=8)
    assert check_fit(detection.FasterRCNN(backbone, 2)).splitlines() == [
        "level  channels  stride  anchors",
        "0      8         4       32",
        "1      8         8       64",
        "2      8         16      128",
        "3      8         32      256",
        "pool   8         64      512",
    ]
    assert levels_table(backbone.feature_info).splitlines()[-1] == "pool   8         64"


def test_another_number_of_levels_is_explained_and_the_advice_helps() -> None:
    backbone = fpn_backbone("resnet18", returned=("conv4_x", "conv5_x"), out_channels=32)
    model = detection.FasterRCNN(backbone, 2, **SMALL)
    with pytest.raises(AssertionError):  # torchvision's own words end here
        model.eval()(photos())
    with pytest.raises(InputError, match=r"(?s)3 levels and anchors for 5; pass rpn_anchor_generator=.*0 +32 +16 +32"):
        check_fit(model)
    fitting = detection.FasterRCNN(backbone, 2, rpn_anchor_generator=anchor_generator(backbone), **SMALL).eval()
    assert check_fit(fitting).splitlines()[1].split() == ["0", "32", "16", "128"]
    with torch.no_grad():
        fitting(photos())
    with pytest.raises(InputError, match=r"pass anchor_generator="):
        check_fit(detection.RetinaNet(backbone, 2))


def test_levels_that_no_region_is_pooled_from_are_named() -> None:
    backbone = fpn_backbone("resnet18", returned=("conv1", "conv2_x", "conv3_x", "conv4_x", "conv5_x"), extra=None, out_channels=8)
    options = {"rpn_anchor_generator": anchor_generator(backbone)}
    with pytest.raises(InputError, match=r"never from ..4..; pass box_roi_pool=MultiScaleRoIAlign"):
        check_fit(detection.FasterRCNN(backbone, 2, **options))
    pool = MultiScaleRoIAlign(["0", "1", "2", "3", "4"], 7, 2)
    assert "none" not in check_fit(detection.FasterRCNN(backbone, 2, box_roi_pool=pool, **options))


def test_a_model_of_others_is_refused() -> None:
    with torch.device("meta"):
        theirs = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    with pytest.raises(InputError, match="build one with fpn_backbone"):
        check_fit(theirs)


def test_maps_of_one_stride_are_listed() -> None:
    with pytest.raises(InputError, match=r"(?s)one map per stride.*conv4_x  256       16\nconv5_x  512       16"):
        fpn_backbone("resnet18", returned=("conv4_x", "conv5_x"), output_stride=16)


def test_images_normalised_twice_are_noticed_once() -> None:
    backbone = fpn_backbone("resnet18", out_channels=8)
    model = detection.FasterRCNN(backbone, 2, **SMALL, **normalization(backbone)).eval()
    twice = [normalize(image, MEAN, STD) for image in photos()]
    with torch.no_grad():
        with pytest.warns(UserWarning, match="normalised twice"):
            model(twice)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(twice)  # once is enough
            other = fpn_backbone("resnet18", out_channels=8)
            detection.FasterRCNN(other, 2, **SMALL).eval()(photos())


@pytest.mark.parametrize("build", [fpn_backbone, partial(segmentation_model, "fcn")])
@pytest.mark.parametrize("channels", [1, 3])
def test_weights_of_another_number_of_channels_are_explained(build: Any, channels: int, tmp_path: Path) -> None:
    """A first convolution of three channels fits any number; one of five channels, made for those five, fits no other."""
    five = tmp_path / "five.safetensors"
    save_file(create_backbone("resnet18", in_channels=5).state_dict(), five)
    with pytest.raises(InputError, match=rf"conv1.weight \[64, 5, 7, 7\] where \[64, {channels}, 7, 7\] belongs"):
        build("resnet18", in_channels=channels, weights=five)
    build("resnet18", in_channels=5, weights=five)
