from __future__ import annotations

import importlib.util
import io

import numpy as np
import pytest
from PIL import Image

from jaxmodels.config import Augment
from jaxmodels.data import pixels, transforms
from jaxmodels.errors import UserError

FAST = all(importlib.util.find_spec(name) for name in ("cv2", "simplejpeg"))
needs_opencv = pytest.mark.skipif(not FAST, reason="needs the extra opencv")
either = pytest.mark.parametrize("library", ["pillow", pytest.param("opencv", marks=needs_opencv)])


def smooth(size):
    """An image of (width, height) in which neighbors differ little."""
    small = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def grainy(size):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))


def jpeg(image, **more):
    file = io.BytesIO()
    image.save(file, "JPEG", **more)
    return file.getvalue()


def resized(value, size, channels=3, box=None, library="pillow"):
    return pixels.as_array(pixels.resized(pixels.decode(value, library), size, channels, box, library))


UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}
"""By EXIF's number of what is done to the stored pixels."""


def photo(tags, size=(48, 32)):
    """A JPEG with EXIF tags as bytes, and its pixels as they are stored."""
    data = jpeg(smooth(size), quality=95, exif=tags)
    return data, np.asarray(Image.open(io.BytesIO(data)))


@either
@pytest.mark.parametrize("number", UPRIGHT)
def test_a_photo_is_turned_as_its_exif_says(number, library):
    exif = Image.Exif()
    exif[0x0112] = number
    data, stored = photo(exif)
    expected = UPRIGHT[number](stored)
    np.testing.assert_array_equal(resized(data, expected.shape[:2], library=library), expected)


@pytest.mark.parametrize("tags", [b"", b"Exif\0\0no such header", Image.Exif().tobytes()])
def test_a_photo_whose_exif_says_nothing_stays_as_it_is_stored_and_is_not_read_too_soon(tags):
    data, stored = photo(tags)
    assert pixels.decode(data).draft("RGB", (24, 16)), "not read yet, so that it may be read at half the size"
    np.testing.assert_array_equal(resized(data, stored.shape[:2]), stored)


@either
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(7, 9), (5, 4)])
def test_any_kind_of_image_becomes_gray_or_rgb(mode, channels, size, library):
    file = io.BytesIO()
    Image.new(mode, (9, 7)).save(file, "JPEG" if mode == "CMYK" else "PNG")
    out = resized(file.getvalue(), size, channels, library=library)
    assert out.shape == (*size, channels) and out.dtype == np.uint8


def test_a_large_jpeg_is_decoded_at_few_more_pixels_than_needed():
    image = pixels.decode(jpeg(smooth((1200, 800)), quality=95))
    out = pixels.as_array(pixels.resized(image, (100, 100), 3))
    assert image.size == (150, 100)
    exact = resized(np.asarray(smooth((1200, 800))), (100, 100))
    assert np.abs(out.astype(int) - exact).mean() < 2


ENCODED = {
    "4:2:0": {},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
    "coarse": {"quality": 20},
    "comment": {"comment": "of a camera"},
    "profile": {"icc_profile": bytes(300)},
    "RGB": {"keep_rgb": True},
}


@needs_opencv
@pytest.mark.parametrize("encoded", ENCODED)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_either_library_decodes_a_jpeg_to_the_same_pixels(encoded, channels, factor):
    size = 104 // factor, 136 // factor
    for image in (grainy((136, 104)), grainy((136, 104)).convert("L")):
        data = jpeg(image, **ENCODED[encoded])
        ours, theirs = (resized(data, size, channels, library=name) for name in ("opencv", "pillow"))
        np.testing.assert_array_equal(ours, theirs)


@needs_opencv
@pytest.mark.parametrize("box", [None, (20.0, 10.0, 120.0, 90.0), (0.0, 0.0, 33.0, 40.0), (100.4, 70.6, 136.0, 104.0)])
@pytest.mark.parametrize("size", [(24, 30), (60, 50), (150, 130)])
@pytest.mark.parametrize("stored", [jpeg, np.asarray])
def test_either_library_sees_the_same_part_of_a_smooth_image(box, size, stored):
    value = stored(smooth((136, 104)))
    ours, theirs = (resized(value, size, 3, box, name).astype(int) for name in ("opencv", "pillow"))
    error = np.abs(ours - theirs)
    assert error.mean() < 2.5 and error.max() < 16, "a box of whole pixels is up to half a pixel off"


@needs_opencv
def test_a_box_of_less_than_a_pixel_is_one_pixel():
    value = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert (resized(value, (2, 2), 3, (1.2, 1.2, 1.4, 1.4), "opencv") == value[1, 1]).all()
    assert (resized(value, (2, 2), 3, (3.6, 3.7, 4.0, 4.0), "opencv") == value[3, 3]).all()


@needs_opencv
def test_opencv_averages_what_shrinks_to_half_or_less():
    chequered = np.where(np.indices((96, 96)).sum(0) % 2, 255, 0).astype(np.uint8)[..., None].repeat(3, -1)
    for side in (48, 24, 30):
        out = resized(chequered, (side, side), library="opencv")
        assert np.abs(out.astype(int) - 127.5).max() < 30


@either
def test_a_jpeg_that_ends_too_soon_is_unreadable(library):
    data = jpeg(grainy((64, 48)))
    with pytest.raises(pixels.Unreadable, match="truncated"):
        resized(data[: len(data) // 2], (24, 32), library=library)


@needs_opencv
def test_a_damaged_jpeg_that_pillow_reads_is_read_as_pillow_does():
    data = jpeg(grainy((64, 48)))
    half = len(data) // 2
    damaged = data[:half] + bytes(40) + data[half + 40 :]
    ours, theirs = (resized(damaged, (48, 64), library=name) for name in ("opencv", "pillow"))
    np.testing.assert_array_equal(ours, theirs)
    assert (ours != resized(data, (48, 64))).any()


@needs_opencv
@pytest.mark.parametrize("channels", [1, 3])
def test_all_changes_follow_either_library_alike(channels):
    changes = Augment(crop=0.3, flip=True, shift=2, rotate=10, colour=0.2, randaugment=1, cutout=5)
    for cfg in (Augment(crop=0.3, flip=True), changes):
        rows = transforms.draws(0, np.zeros(40), np.arange(40), transforms.needed(cfg))
        shape, value = (40, 50, channels), jpeg(smooth((136, 104)), quality=95)
        for row in rows:
            ours, theirs = (
                transforms.augment(pixels.decode(value, name), cfg, shape, row, name).astype(int)
                for name in ("opencv", "pillow")
            )
            assert ours.shape == shape and np.abs(ours - theirs).mean() < 6


def test_opencv_is_asked_for_by_name_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    pixels.check_library("pillow")
    with pytest.raises(UserError, match=r"got no package opencv-python-headless, .* try pip install"):
        pixels.check_library("opencv")


def stored(mode, kind, values, **more):
    file = io.BytesIO()
    order = ">u2" if mode.endswith("B") else None
    image = Image.frombytes(mode, values.shape[::-1], values.astype(order or values.dtype).tobytes())
    image.save(file, kind, **more)
    return file.getvalue()


RAMP = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)


@either
@pytest.mark.parametrize("mode, kind", [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF")])
def test_gray_of_16_bits_keeps_its_upper_ones(mode, kind, library):
    for channels in (1, 3):
        found = resized(stored(mode, kind, RAMP), (16, 16), channels, library=library)
        np.testing.assert_array_equal(found, np.repeat((RAMP >> 8).astype(np.uint8)[..., None], channels, -1))


@pytest.mark.parametrize("dtype, mode", [(np.float32, "F"), (np.int32, "I")])
def test_an_image_that_does_not_say_what_white_is_cannot_be_read(dtype, mode):
    with pytest.raises(pixels.Unreadable, match=f"has pixels of the kind {mode}, expected 8 or 16 bits"):
        resized(stored(mode, "TIFF", RAMP.astype(dtype)), (16, 16))


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK"])
def test_other_kinds_of_pixels_keep_their_brightness(mode):
    gray = Image.fromarray(np.where(np.arange(64).reshape(8, 8) % 3, 255, 0).astype(np.uint8))
    image, file = gray.convert("RGB").convert(mode) if mode != "LA" else gray.convert("LA"), io.BytesIO()
    if mode in ("LA", "RGBA"):
        image.putalpha(7)  # what lies behind is not blended in
    image.save(file, "TIFF" if mode == "CMYK" else "PNG")
    np.testing.assert_array_equal(resized(file.getvalue(), (8, 8), 1)[..., 0], np.asarray(gray))


def test_of_a_moving_picture_the_first_frame_is_read():
    frames, file = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (0, 255)], io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert resized(file.getvalue(), (4, 4)).max() == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 30000), (30000, 1)])
def test_pictures_of_any_shape_are_resized(size):
    assert (resized(np.full((*size, 3), 9, np.uint8), (8, 8)) == 9).all()
