"""Pictures in whatever form they come: each is read right, or refused by one error that names it."""

from __future__ import annotations

import io
import random
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import ImageOps

from hooked_vlm.processing import ImageError, load_image, load_images
from tests.processors import processor

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
PICTURE = PIL.Image.fromarray(RGB)
GREY = RGB[..., 0]


def pixels_of(image: Any) -> np.ndarray:
    picture = load_image(image)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def saved(picture: PIL.Image.Image, path: Path, **options: Any) -> Path:
    picture.save(path, **options)
    return path


# Forms that mean the same picture -------------------------------------------------------------------------------------


FORMS = {
    "PIL": PICTURE,
    "array": RGB,
    "array, channels first": RGB.transpose(2, 0, 1),
    "array, reversed strides": RGB[::-1][::-1],
    "float array": RGB / 255,
    "float32 array": (RGB / 255).astype(np.float32),
    "tensor": torch.from_numpy(RGB),
    "tensor, channels first": torch.from_numpy(RGB).permute(2, 0, 1),
    "float tensor, channels first": torch.from_numpy(RGB).permute(2, 0, 1) / 255,
    "tensor with a gradient": (torch.from_numpy(RGB) / 255).requires_grad_(),
    "opaque array": np.dstack([RGB, np.full_like(GREY, 255)]),
    "opaque tensor, channels first": torch.from_numpy(np.dstack([RGB, np.full_like(GREY, 255)])).permute(2, 0, 1),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_picture(form: str) -> None:
    assert np.array_equal(pixels_of(FORMS[form]), RGB)


def test_a_bfloat16_tensor_is_as_near_as_it_can_be() -> None:
    values = (torch.from_numpy(RGB) / 255).bfloat16()
    assert np.abs(pixels_of(values).astype(int) - RGB).max() <= 1


@pytest.mark.parametrize("shaped", [GREY, GREY[..., None], GREY[None], torch.from_numpy(GREY), GREY / 255])
def test_grey_arrays_have_three_equal_channels(shaped: Any) -> None:
    assert np.array_equal(pixels_of(shaped), grey(GREY))


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.ppm", "noextension", "a.jpg.png"])
@pytest.mark.parametrize("as_path", [str, Path])
def test_a_file_is_the_same_picture(name: str, as_path: type, tmp_path: Path) -> None:
    path = tmp_path / name
    PICTURE.save(path, format="PNG" if path.suffix == "" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        assert np.array_equal(pixels_of(as_path(path)), RGB)


def test_lists_and_batches_of_pictures(tmp_path: Path) -> None:
    path = saved(PICTURE, tmp_path / "a.png")
    for images in (
        [PICTURE, RGB],
        (path, str(path)),
        [torch.from_numpy(RGB)] * 2,
        np.stack([RGB, RGB]),
        torch.from_numpy(RGB).permute(2, 0, 1).expand(2, 3, 20, 30),
        iter([PICTURE, PICTURE]),
    ):
        assert [np.array_equal(np.asarray(picture), RGB) for picture in load_images(images)] == [True, True]
    for image in (PICTURE, path, str(path), RGB, GREY, torch.from_numpy(RGB)):
        assert len(load_images(image)) == 1


def test_pictures_are_left_as_they_were() -> None:
    array, picture = RGB.copy(), PICTURE.convert("RGBA")
    before = picture.tobytes()
    load_images([array, picture])
    assert np.array_equal(array, RGB)
    assert (picture.mode, picture.tobytes()) == ("RGBA", before)


# Modes ----------------------------------------------------------------------------------------------------------------


def with_alpha(mode: str) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.dstack([RGB, GREY])).convert(mode)


def palette_with_transparency() -> PIL.Image.Image:
    file = io.BytesIO()
    PICTURE.quantize(16).save(file, "PNG", transparency=3)
    return PIL.Image.open(file)


def on_white(picture: PIL.Image.Image) -> np.ndarray:
    rgba = np.asarray(picture.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize(
    "picture", [with_alpha("RGBA"), with_alpha("LA"), palette_with_transparency()], ids=["RGBA", "LA", "P"]
)
def test_transparency_is_put_on_white_as_hf_does(picture: PIL.Image.Image) -> None:
    assert np.abs(pixels_of(picture) - on_white(picture)).max() <= 1
    theirs, ours = (processor().image_processor(image, return_tensors="pt") for image in (picture, load_image(picture)))
    assert torch.equal(theirs.pixel_values, ours.pixel_values)


def test_transparency_that_is_premultiplied_is_put_on_white_too() -> None:
    assert np.abs(pixels_of(with_alpha("RGBA").convert("RGBa")) - on_white(with_alpha("RGBA"))).max() <= 3


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_are_what_hf_makes_of_them(mode: str) -> None:
    picture = PIL.Image.new("LAB", (30, 20), (150, 120, 130)) if mode == "LAB" else PICTURE.convert(mode)
    theirs, ours = (processor().image_processor(image, return_tensors="pt") for image in (picture, load_image(picture)))
    assert torch.equal(theirs.pixel_values, ours.pixel_values)


def test_sixteen_bits_of_grey_become_eight(tmp_path: Path) -> None:
    picture = PIL.Image.fromarray(GREY.astype(np.uint16) * 257)
    assert np.array_equal(pixels_of(picture), grey(GREY))
    assert np.array_equal(pixels_of(saved(picture, tmp_path / "deep.png")), grey(GREY))
    assert np.array_equal(pixels_of(saved(picture, tmp_path / "deep.tif")), grey(GREY))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bits_of_grey_are_refused(dtype: type, tmp_path: Path) -> None:
    path = saved(PIL.Image.fromarray(GREY.astype(dtype)), tmp_path / "deep.tif")
    with pytest.raises(ImageError, match=r"image .*deep.tif has 32 bits of grey \(mode [IF]\).*give 8 or 16 bits"):
        load_image(path)


def test_a_cmyk_jpeg_is_read(tmp_path: Path) -> None:
    path = saved(PIL.Image.new("CMYK", (30, 20), (0, 255, 255, 0)), tmp_path / "a.jpg")
    with PIL.Image.open(path) as opened:
        assert opened.mode == "CMYK"
    assert np.abs(pixels_of(path).astype(int) - [255, 0, 0]).max() < 3


def test_one_pixel_is_a_picture() -> None:
    assert pixels_of(PIL.Image.new("RGB", (1, 1), "red")).tolist() == [[[255, 0, 0]]]
    assert pixels_of(np.zeros((1, 1), dtype=np.uint8)).shape == (1, 1, 3)


def test_of_several_frames_the_first_is_taken(tmp_path: Path) -> None:
    frames = [PIL.Image.new("RGB", (5, 5), color) for color in ("red", "blue")]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert pixels_of(path)[0, 0].tolist() == [255, 0, 0]


def test_a_progressive_jpeg_is_read(tmp_path: Path) -> None:
    path = saved(PICTURE, tmp_path / "a.jpg", progressive=True)
    with PIL.Image.open(path) as opened:
        assert "progressive" in opened.info
        assert np.array_equal(pixels_of(path), np.asarray(opened))


@pytest.mark.reference_data
def test_photographs_are_read(reference_data: Path) -> None:
    photographs = sorted((reference_data / "photos").glob("*.jpg"))
    assert photographs
    for path in photographs:
        assert np.array_equal(pixels_of(path), np.asarray(PIL.Image.open(path).convert("RGB")))


# Orientation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_a_picture_is_turned_as_its_camera_says(orientation: int, suffix: str, tmp_path: Path) -> None:
    """A red corner is at the top left of every upright picture."""
    upright = PIL.Image.new("RGB", (48, 32), "blue")
    upright.paste("red", (0, 0, 16, 16))
    turns = PIL.Image.Transpose
    stored = {
        1: None,
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_90,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_270,
    }[orientation]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    turned = upright if stored is None else upright.transpose(stored)
    path = saved(turned, tmp_path / f"a.{suffix}", exif=exif)
    for image in (path, PIL.Image.open(path)):
        found = pixels_of(image).astype(int)
        assert found.shape == (32, 48, 3)
        assert np.abs(found[4:12, 4:12] - [255, 0, 0]).max() < 40
        assert np.abs(found[24:, 40:] - [0, 0, 255]).max() < 40


def test_damaged_exif_does_not_spoil_a_good_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(_image: PIL.Image.Image) -> None:
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(ImageOps, "exif_transpose", damaged)
    assert np.array_equal(pixels_of(saved(PICTURE, tmp_path / "a.png")), RGB)


# What cannot be read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif", "webp"])
@pytest.mark.parametrize("kept", [0.3, 0.7])
def test_a_truncated_file_is_named(suffix: str, kept: float, tmp_path: Path) -> None:
    path = saved(PIL.Image.fromarray(np.tile(RGB, (8, 8, 1))), tmp_path / f"half.{suffix}")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ImageError, match=rf"^image .*half.{suffix} cannot be read"):
        load_image(path)
    with pytest.raises(ImageError, match=rf"^image 1 .*half.{suffix} cannot be read"):
        load_images([PICTURE, path])


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.jpg", "empty.png", ""):
        with pytest.raises(ImageError, match=f"^image 0 {re.escape(str(tmp_path / name))} cannot be read as a picture"):
            load_images([tmp_path / name])
    for name in ("nothing.jpg", "https://example.org/a.jpg", "what color is it ?", "a" * 5000):
        with pytest.raises(ImageError, match=f"^image {re.escape(name)} "):
            load_image(name)
    with pytest.raises(ImageError, match=r"nothing\.jpg does not exist"):
        load_image(tmp_path / "nothing.jpg")


@pytest.mark.parametrize("limit", [500, 200])
def test_a_decompression_bomb_is_refused(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns above its limit, and refuses above twice that."""
    path = saved(PICTURE, tmp_path / "bomb.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match=r"bomb.png is too large to be safe .*600 pixels.*MAX_IMAGE_PIXELS"):
        load_image(path)


def refusal_of(path: Path) -> str:
    """What is said of a picture; of one that is read nevertheless, its path alone."""
    try:
        assert load_image(path).mode == "RGB"
    except ImageError as error:
        return str(error)
    return str(path)


def test_no_damage_gives_another_error(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    rng = random.Random(0)
    refusals = 0
    for suffix in ("png", "jpg", "gif", "webp", "bmp", "ppm", "tga", "pcx"):
        whole = saved(PICTURE, tmp_path / f"a.{suffix}").read_bytes()
        for _ in range(60):
            damaged = bytearray(whole[: rng.randrange(1, len(whole))] if rng.random() < 0.3 else whole)
            for _ in range(rng.randrange(1, 6)):
                damaged[rng.randrange(min(len(damaged), 150))] = rng.randrange(256)
            path = tmp_path / f"b.{suffix}"
            path.write_bytes(damaged)
            refusal = refusal_of(path)
            assert str(path) in refusal
            refusals += refusal != str(path)
    assert refusals > 50
    capfd.readouterr()


BAD_IMAGES: list[tuple[Any, str]] = [
    (np.zeros((6, 5, 2), dtype=np.uint8), r"has shape \(6, 5, 2\); give \[height width 3\], \[3 height width\]"),
    (np.zeros((5,), dtype=np.uint8), r"has shape \(5,\)"),
    (np.zeros((), dtype=np.uint8), r"has shape \(\)"),
    (np.zeros((0, 5, 3), dtype=np.uint8), r"has shape \(0, 5, 3\)"),
    (np.zeros((2, 2, 4, 5, 3), dtype=np.uint8), r"image 0 has shape \(2, 4, 5, 3\)"),
    (RGB.astype(float), "holds floats outside 0..1; give uint8, or floats in 0..1"),
    (RGB / 255 - 0.5, "holds floats outside 0..1"),
    (np.full((4, 5, 3), np.nan), "holds floats outside 0..1"),
    (RGB.astype(np.int64), "has dtype int64; give uint8, or floats in 0..1"),
    (RGB.astype(np.uint16), "has dtype uint16"),
    (GREY > 100, "has dtype bool"),
    (PIL.Image.new("RGB", (0, 5)), "is empty: 0x5 pixels"),
    ([], "no images were given"),
    (np.zeros((0, 4, 5, 3), dtype=np.uint8), "no images were given"),
    (None, "images are a NoneType; give PIL images, paths or arrays"),
    (7, "images are a int"),
    ([PICTURE, None], "image 1 is a NoneType; give a PIL image, a path or an array"),
    ([PICTURE, [PICTURE]], "image 1 is a list"),
    ([[1, 2], [3, 4]], "image 0 is a list"),
    (b"\x89PNG", "image 0 is a int"),
]  # fmt: skip


@pytest.mark.parametrize(("images", "message"), BAD_IMAGES)
def test_what_is_no_image_is_refused_by_one_error(images: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load_images(images)
    assert "\n" not in str(caught.value)


def test_a_picture_that_was_closed_is_refused(tmp_path: Path) -> None:
    opened = PIL.Image.open(saved(PICTURE, tmp_path / "a.png"))
    opened.close()
    with pytest.raises(ImageError, match="image 0 cannot be read"):
        load_images([opened])
