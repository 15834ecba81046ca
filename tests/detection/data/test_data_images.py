"""Image files of every kind come out as upright RGB uint8, broken ones as an error that names them; sizes follow torchvision's rule."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detection.data import images as images_module
from detection.data.image_header import MAX_PIXELS, is_cut_off, read_header
from detection.data.images import UnreadableImage, image_header, image_size, read_image, resize_image, resized_size
from resbackbone.errors import InputError


def pil_rgb(path: Path) -> np.ndarray:
    """The independent reader."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I;16"):
        return np.repeat(np.rint(np.asarray(image) / 257)[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("ok_1.jpg", 1),
        ("ok_2.jpg", 1),
        ("cmyk.jpg", 2),
        ("gray.jpg", 1),
        ("exif_rotated_6.jpg", 1),
        ("gray16.png", 0),
        ("palette_alpha.png", 0),
        ("rgba.png", 0),
        ("one_pixel.png", 0),
        ("upright.png", 0),
    ],
)
def test_every_kind_of_image_equals_pil(bad_inputs: Path, name: str, tolerance: int) -> None:
    ours, theirs = read_image(bad_inputs / name), pil_rgb(bad_inputs / name)
    assert ours.dtype == np.uint8
    assert ours.flags.c_contiguous
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= tolerance
    assert image_size(bad_inputs / name) == ours.shape[:2]


def test_exif_orientation_is_applied_unless_switched_off(bad_inputs: Path) -> None:
    upright = read_image(bad_inputs / "upright.png")
    turned = read_image(bad_inputs / "exif_rotated_6.jpg")
    stored = read_image(bad_inputs / "exif_rotated_6.jpg", exif=False)
    assert turned.shape == (213, 320, 3)
    assert np.abs(turned.astype(int) - upright).max() <= 1, "upright.png has exactly the pixels after turning"
    assert stored.shape == (320, 213, 3)
    assert image_size(bad_inputs / "exif_rotated_6.jpg", exif=False) == (320, 213)
    assert np.array_equal(np.rot90(stored, -1), turned)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_all_eight_orientations(tmp_path: Path, orientation: int, kind: str) -> None:
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8], pixels[:8, 8:], pixels[8:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{kind}"
    Image.fromarray(pixels).save(path, exif=exif, quality=98)
    expected = pil_rgb(path)
    assert np.abs(read_image(path).astype(int) - expected).max() <= 1
    assert image_size(path) == expected.shape[:2]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize("how", [{"format": "tiff"}, {"format": "tiff", "compression": "tiff_lzw"}, {"format": "webp", "lossless": True}])
def test_stored_pixels_of_what_opencv_turns(tmp_path: Path, orientation: int, mode: str, how: dict[str, Any]) -> None:
    pixels = np.random.default_rng(orientation).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    stored, exif, path = Image.fromarray(pixels).convert(mode), Image.Exif(), tmp_path / "turned"
    exif[0x0112] = orientation
    stored.save(path, exif=exif, **how)
    raw = stored.convert("RGB")
    raw.getexif()[0x0112] = orientation
    assert np.array_equal(read_image(path, exif=False), np.asarray(raw))
    assert np.array_equal(read_image(path), np.asarray(ImageOps.exif_transpose(raw)))
    assert image_size(path, exif=False) == (16, 24)
    assert image_size(path) == ((24, 16) if orientation >= 5 else (16, 24))


@pytest.mark.parametrize("suffix", ["bmp", "webp", "tiff", "gif"])
def test_other_formats(tmp_path: Path, suffix: str, bad_inputs: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.open(bad_inputs / "ok_2.jpg").save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert np.abs(read_image(path).astype(int) - pil_rgb(path)).max() <= 1
    assert image_size(path) == (213, 320)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("truncated.jpg", "cut off"),
        ("zero_bytes.jpg", "empty"),
        ("html_named.jpg", "web page"),
        ("huge_header.png", "60000×60000"),
    ],
)
def test_unreadable_images_are_named(bad_inputs: Path, name: str, words: str) -> None:
    with pytest.raises(UnreadableImage, match=words) as caught:
        read_image(bad_inputs / name)
    assert name in str(caught.value)


def test_huge_header_is_refused_before_anything_is_allocated(bad_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it was handed to the decoder"))
    with pytest.raises(UnreadableImage, match=f"{MAX_PIXELS:,}"):
        read_image(bad_inputs / "huge_header.png")
    with pytest.raises(UnreadableImage):
        image_size(bad_inputs / "huge_header.png")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such image file"):
        read_image(tmp_path / "nothing.jpg")
    with pytest.raises(UnreadableImage, match=r"cannot be read \(Is a directory\)"):
        read_image(tmp_path)


def test_what_the_disk_fails_to_read_is_unreadable(tmp_path: Path) -> None:
    if not Path("/proc/self/mem").exists():
        pytest.skip("nothing here opens but fails to be read")
    (tmp_path / "a.jpg").symlink_to("/proc/self/mem")
    for read in (read_image, image_header, image_size):
        with pytest.raises(UnreadableImage, match=r"a\.jpg: cannot be read \(Input/output error\)"):
            read(tmp_path / "a.jpg")


def test_a_process_without_descriptors_blames_no_image(bad_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(images_module, "open", full, raising=False)
    for read in (read_image, image_header):
        with pytest.raises(InputError, match="ulimit -n") as caught:
            read(bad_inputs / "ok_1.jpg")
        assert not isinstance(caught.value, UnreadableImage), "it would be skipped, and the run go on without"


def test_files_cut_off_anywhere_never_pass_for_whole(bad_inputs: Path, tmp_path: Path) -> None:
    for name in ("ok_2.jpg", "rgba.png"):
        data, path = (bad_inputs / name).read_bytes(), tmp_path / name
        for length in np.linspace(0, len(data) - 4, 40).astype(int):
            path.write_bytes(data[:length])
            with pytest.raises(UnreadableImage):
                read_image(path)


def test_damaged_files_never_raise_anything_else(bad_inputs: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged"
    for name in ("exif_rotated_6.jpg", "cmyk.jpg", "rgba.png", "palette_alpha.png"):
        whole = np.frombuffer((bad_inputs / name).read_bytes(), dtype=np.uint8)
        for _ in range(40):
            data = whole.copy()
            data[rng.integers(0, 700, size=6)] = rng.integers(0, 256, size=6)
            path.write_bytes(data.tobytes())
            with contextlib.suppress(UnreadableImage):
                image = read_image(path)
                assert image.dtype == np.uint8
                assert image.shape[2] == 3


def test_a_thumbnail_end_marker_does_not_hide_a_cut(bad_inputs: Path) -> None:
    data = (bad_inputs / "ok_1.jpg").read_bytes()
    with_thumbnail = data[:2] + b"\xff\xe2\x00\x06\xff\xd9\x00\x00" + data[2:]
    header = read_header(with_thumbnail)
    assert not is_cut_off(with_thumbnail, header)
    assert is_cut_off(with_thumbnail[: len(data) // 2], header)


def test_decoders_agree_bit_for_bit(coco_mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    paths = sorted((coco_mini / "val2017").glob("*.jpg"))[:12]
    fast = [read_image(path) for path in paths]
    monkeypatch.setattr(images_module, "_simplejpeg", lambda: None)
    for path, image in zip(paths, fast, strict=True):
        assert np.array_equal(read_image(path), image), "a run must not depend on which decoder is installed"


def test_header_further_back_than_the_first_read(bad_inputs: Path, tmp_path: Path) -> None:
    data = (bad_inputs / "ok_1.jpg").read_bytes()
    profile = b"\xff\xe2\xff\xff" + bytes(65533)
    path = tmp_path / "long.jpg"
    path.write_bytes(data[:2] + profile * 5 + data[2:])
    assert image_size(path) == (228, 320)


def test_oddities_are_told(bad_inputs: Path) -> None:
    told = {
        name: image_header(bad_inputs / name).oddities for name in ("cmyk.jpg", "gray16.png", "rgba.png", "ok_1.jpg", "exif_rotated_6.jpg")
    }
    assert told["ok_1.jpg"] == []
    assert told["cmyk.jpg"] == ["CMYK"]
    assert "16 bits" in told["gray16.png"][0]
    assert "alpha" in told["rgba.png"][0]
    assert "orientation 6" in told["exif_rotated_6.jpg"][0]


def test_resized_size_is_torchvisions() -> None:
    generator = torch.Generator().manual_seed(0)
    for min_size, max_size in ((800, 1333), (600, 1000), (64, 100)):
        transform = GeneralizedRCNNTransform(min_size, max_size, [0.0] * 3, [1.0] * 3)
        for height, width in torch.randint(16, 220, (40, 2), generator=generator).tolist():
            if min_size == 800:
                height, width = height * 4, width * 4
            expected = transform.resize(torch.zeros(3, height, width), None)[0].shape[-2:]
            assert resized_size(height, width, min_size=min_size, max_size=max_size) == tuple(expected)
    assert resized_size(1, 4000, min_size=800, max_size=1333) == (1, 1333), "never an empty side"


def test_resize_to_enlarge_and_to_shrink(bad_inputs: Path) -> None:
    image = read_image(bad_inputs / "ok_1.jpg")
    assert resize_image(image, image.shape[:2]) is image
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    for size in ((300, 400), (100, 150), (100, 400)):
        ours = resize_image(image, size)
        reference = torch.nn.functional.interpolate(planes, size=size, mode="bilinear", antialias=size[0] < 228)[0].permute(1, 2, 0)
        assert ours.shape == (*size, 3)
        assert ours.flags.c_contiguous
        assert np.abs(ours - reference.numpy()).max() <= 1.01


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_png_mode_equals_pil(tmp_path: Path, mode: str) -> None:
    pixels = np.arange(48 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(48, 64, 3)
    path = tmp_path / f"{mode}.png"
    Image.fromarray(pixels).convert("RGBA").convert(mode).save(path)
    assert np.array_equal(read_image(path), pil_rgb(path))
