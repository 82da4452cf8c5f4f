import io
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from contrast.report.feature_map import feature_map
from contrast.report.pictures import channels_remark, curve, sample_picture, thinned, views_picture


def opened(png):
    return Image.open(io.BytesIO(png)).convert("RGB")


@pytest.mark.parametrize("channels", [1, 2, 3, 7])
def test_views_of_images_are_drawn_with_any_number_of_channels(channels):
    x = torch.rand(3, channels, 9, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png = views_picture(x, [x, x[..., :6, :6]], "image", ["a", "b", "目" * 50])
    assert opened(png).width > 300


def test_the_original_and_its_views_are_in_one_row():
    colours = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 8, 8)  # red, green, blue
    picture = np.asarray(opened(views_picture(colours[:1], [colours[1:2], colours[2:]], "image")))
    place = {}
    for name, colour in (("original", (255, 0, 0)), ("first", (0, 255, 0)), ("second", (0, 0, 255))):
        rows, columns = np.nonzero((picture == colour).all(axis=2))
        place[name] = (rows.mean(), columns.mean())
    assert place["original"][1] < place["first"][1] < place["second"][1]
    assert place["original"][0] == pytest.approx(place["second"][0], abs=1)


def test_a_gap_in_a_series_is_left_blank():
    whole = torch.zeros(1, 1, 100)
    gap = whole.clone()
    gap[..., 20:80] = torch.nan
    inked = [
        (np.asarray(Image.open(io.BytesIO(sample_picture(x[0].numpy(), "series"))))[..., 3] > 128).sum()
        for x in (whole, gap)
    ]
    assert 0.3 < inked[1] / inked[0] < 0.5


def test_an_isolated_observation_between_gaps_is_drawn():
    series = np.full((1, 50), np.nan)
    series[0, 25] = 1.0
    assert (np.asarray(Image.open(io.BytesIO(sample_picture(series, "series"))))[..., 3] > 128).any()


def test_a_series_of_only_gaps_is_drawn():
    assert sample_picture(np.full((2, 50), np.nan), "series").startswith(b"\x89PNG")


def test_a_picture_of_an_image_has_its_pixels():
    image = np.random.default_rng(0).random((3, 5, 4))
    pixels = np.asarray(opened(sample_picture(image, "image")))
    assert pixels == pytest.approx(np.moveaxis(image, 0, -1) * 255, abs=0.51)


def test_only_unusual_channels_are_remarked():
    assert [channels_remark(c, "image") for c in (1, 3)] == ["", ""]
    assert "first three of 7" in channels_remark(7, "image")
    assert channels_remark(7, "series") == ""


def test_thinning_keeps_the_extremes_and_the_gaps():
    series = np.random.default_rng(0).normal(size=(2, 10_000))
    series[1, 5000:] = np.nan
    thin = thinned(series, 100)
    assert thin.shape == (2, 100)
    assert thin[0].max() == series[0].max()
    assert thin[0].min() == series[0].min()
    assert np.isnan(thin[1, 50:]).all()
    assert np.isfinite(thin[1, :50]).all()


@pytest.mark.parametrize("count", [1, 30, 5000])
def test_a_curve_is_well_formed_and_small(count):
    value = np.linspace(5, 1, count)
    value[count // 2] = np.nan
    svg = curve(np.arange(count), value, name="loss", label='loss & "more"', y_label="loss")
    ElementTree.fromstring(svg)
    assert len(svg) < 40_000
    assert "http" not in svg


def test_a_map_separates_the_classes_and_names_its_method():
    random = np.random.default_rng(0)
    target = np.arange(60) % 3
    target[:2] = -1
    features = 5 * np.eye(3)[target % 3] @ random.normal(size=(3, 80)) + 0.1 * random.normal(size=(60, 80))
    features[5] = np.nan
    drawn = feature_map(features, target, ["a<b", "c & d", "$e$"])
    ElementTree.fromstring(drawn.svg)
    assert drawn.points == 59
    assert [(entry.name, entry.count) for entry in drawn.legend] == [
        ("no label", 2), ("a<b", 19), ("c & d", 19), ("$e$", 19),
    ]  # fmt: skip
    assert "PCA to 50" in drawn.method
    assert "t-SNE" in drawn.method
    assert "c &amp; d" in drawn.svg
    assert "$e$" in drawn.svg
    assert drawn == feature_map(features, target, ["a<b", "c & d", "$e$"])


def test_a_map_has_a_largest_number_of_points():
    assert feature_map(np.random.default_rng(0).normal(size=(90, 4)), np.zeros(90, int), ["a"], points=30).points == 30


@pytest.mark.parametrize("features", [np.ones((40, 8)), np.zeros((40, 8)), np.full((40, 8), np.nan), np.ones((2, 3))])
def test_equal_or_too_few_features_have_no_map(features):
    assert feature_map(features, np.zeros(len(features), dtype=int), ["a"]) is None
