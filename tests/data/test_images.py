import numpy as np
import pytest
import torch
from PIL import Image

from contrast.core.registry import InputError
from contrast.data import images, open_data
from tests.data.writing import write_flat, write_image


@pytest.mark.parametrize(
    ("mode", "channels", "dtype"),
    [("L", 1, torch.uint8), ("RGB", 3, torch.uint8), ("RGBA", 4, torch.uint8), ("I;16", 1, torch.uint16)],
)
def test_pixels_are_read_unchanged(tmp_path, mode, channels, dtype):
    written = [write_image(tmp_path / f"{index}.png", index, mode=mode) for index in range(3)]
    x = open_data(str(tmp_path)).train.x()
    assert (x.dtype, x.shape) == (dtype, (3, channels, 8, 8))
    for pixels, expected in zip(x.numpy(), written, strict=True):
        assert np.array_equal(pixels, expected[None] if expected.ndim == 2 else expected.transpose(2, 0, 1))


def test_the_range_of_sixteen_bits_is_the_smallest_power_of_two_above_all_values(tmp_path):
    write_flat(tmp_path, 3, mode="I;16")
    data = open_data(str(tmp_path))
    assert data.value_range == (0, 4095)
    assert 0.4 < data.mean[0] < 0.6


def test_pages_of_a_tiff_are_channels(tmp_path):
    pages = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 7), dtype=np.uint8)
    for index, own in enumerate(pages):
        first, *rest = (Image.fromarray(page) for page in own)
        first.save(tmp_path / f"{index}.tif", save_all=True, append_images=rest)
    assert np.array_equal(open_data(str(tmp_path)).train.x().numpy(), pages)


def test_images_of_one_small_size_are_not_resized_and_others_are_cropped_to_a_square(tmp_path):
    write_flat(tmp_path / "same", 2, width=12, height=6)
    assert open_data(str(tmp_path / "same")).shape == (1, 6, 12)
    for index, (width, height) in enumerate([(20, 10), (12, 30), (16, 16)]):
        write_image(tmp_path / "other" / f"{index}.png", index, width=width, height=height)
    data = open_data(str(tmp_path / "other"))
    assert data.shape == (1, 12, 12)
    assert any("shorter side is 12 and cropped in the centre to 12 x 12" in note for note in data.notes)


def test_large_images_are_read_at_224_pixels_unless_size_is_given(tmp_path):
    write_flat(tmp_path, 2, width=300, height=280)
    assert open_data(str(tmp_path)).shape == (1, 224, 224)
    assert open_data(str(tmp_path), size=10).shape == (1, 10, 10)


def test_the_crop_is_the_centre(tmp_path):
    pixels = np.zeros((4, 12), dtype=np.uint8)
    pixels[:, 4:8] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (open_data(str(tmp_path), size=4).train.x() == 200).all()


def test_the_exif_orientation_is_applied(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(open_data(str(tmp_path)).train.x()[0, 0], np.rot90(pixels, -1))


def test_grey_images_among_colour_images_are_converted_to_colour(tmp_path):
    write_image(tmp_path / "a.png", 0)
    write_image(tmp_path / "b.png", 1, mode="RGB")
    data = open_data(str(tmp_path))
    assert data.shape == (3, 8, 8)
    assert any("differ in channels (1 with 1, 1 with 3); all become 3" in note for note in data.notes)
    assert open_data(str(tmp_path), channels=1).shape == (1, 8, 8)


def test_images_of_different_depths_are_refused(tmp_path):
    write_image(tmp_path / "a.png", 0)
    write_image(tmp_path / "b.png", 1, mode="I;16")
    with pytest.raises(InputError, match=r"images of one depth; got uint16 \(b.png\) and uint8 \(a.png\)"):
        open_data(str(tmp_path))


def test_reading_lazily_changes_nothing_but_the_fingerprint(tmp_path, monkeypatch):
    write_flat(tmp_path, 6)
    cached = open_data(str(tmp_path))
    monkeypatch.setattr(images, "CACHE_BYTES", 0)
    lazy = open_data(str(tmp_path))
    assert torch.equal(lazy.train.x(), cached.train.x())
    assert np.array_equal(lazy.mean, cached.mean)
    assert lazy.value_range == cached.value_range
    assert set(lazy.fingerprint) == {"train"}
    assert any("too many to keep in memory" in note for note in lazy.notes)


@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_a_truncated_image_is_found_before_it_is_read_lazily(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(images, "CACHE_BYTES", 0)
    for index in range(2):
        write_image(tmp_path / f"{index}.{ending}", index, width=64, height=64)
    open_data(str(tmp_path))
    content = (tmp_path / f"1.{ending}").read_bytes()
    (tmp_path / f"1.{ending}").write_bytes(content[: len(content) - 1000])
    with pytest.raises(InputError, match=f"1 file is broken, '1.{ending}'"):
        open_data(str(tmp_path))


@pytest.mark.parametrize(
    ("shape", "arranged"),
    [
        ((5, 8, 9), (5, 1, 8, 9)),
        ((5, 8, 9, 3), (5, 3, 8, 9)),
        ((5, 3, 8, 9), (5, 3, 8, 9)),
        ((5, 16, 16, 12), (5, 12, 16, 16)),
        ((5, 12, 16, 16), (5, 12, 16, 16)),
    ],
)
def test_the_channel_axis_is_detected_as_first_or_last(shape, arranged):
    x, _ = images.arrange_array(np.zeros(shape, dtype=np.uint8), size=None, channels=None, where="x")
    assert x.shape == arranged


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_resizing_an_array_agrees_with_pillow(dtype):
    x = np.random.default_rng(0).integers(0, 256, (1, 1, 20, 30)).astype(dtype)
    resized, _ = images.arrange_array(x, size=10, channels=None, where="x")
    expected = Image.fromarray(x[0, 0].astype(np.float32)).resize((15, 10), Image.Resampling.BILINEAR)
    assert resized.dtype == dtype
    tolerance = 1e-3 if dtype == np.float32 else 0.51  # integers are rounded
    assert np.abs(resized[0, 0] - np.asarray(expected)[:, 2:12]).max() < tolerance


def test_pixels_that_are_not_finite_are_refused():
    x = np.zeros((3, 1, 4, 4), dtype=np.float32)
    x[2, 0, 1, 1] = np.nan
    with pytest.raises(InputError, match="1 images contain NaN or infinite values, the first is number 2"):
        images.arrange_array(x, size=None, channels=None, where="x")
