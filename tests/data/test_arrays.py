import numpy as np
import pytest
import torch

from contrast.core.registry import InputError
from contrast.data import open_data
from tests.data.writing import waves


def save(tmp_path, **arrays):
    path = tmp_path / "set.npz"
    np.savez(path, **arrays)
    return str(path)


def pixels(count, *shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (count, *shape)).astype(dtype)


Y = np.arange(20) % 2


@pytest.mark.parametrize(
    ("x", "kind", "shape"),
    [
        (pixels(20, 6, 7), "image", (1, 6, 7)),
        (pixels(20, 6, 7, dtype=np.uint16), "image", (1, 6, 7)),
        (pixels(20, 6, 7, 3), "image", (3, 6, 7)),
        (pixels(20, 5, 16, 16, dtype=np.float64), "image", (5, 16, 16)),
        (pixels(20, 6, 7, dtype=np.int16), "series", (6, 7)),
        (pixels(20, 6, 7, dtype=np.float16), "series", (6, 7)),
        (pixels(20, 7), "series", (1, 7)),
    ],
)
def test_the_kind_of_an_array_follows_from_shape_and_dtype(tmp_path, x, kind, shape):
    data = open_data(save(tmp_path, x=x, y=Y))
    assert (data.kind, data.shape) == (kind, shape)
    assert torch.equal(data.train.x().flatten(1).double(), torch.from_numpy(flat(x, kind)[data.train.sample]))


def flat(x, kind):
    last = kind == "image" and x.ndim == 4 and x.shape[-1] == 3
    return (x.transpose(0, 3, 1, 2) if last else x).reshape(len(x), -1).astype(np.float64)


@pytest.mark.parametrize("name", ["{base}_{split}", "{split}_{base}"])
def test_arrays_named_by_split_are_the_official_split_and_further_arrays_are_columns(tmp_path, name):
    arrays = {}
    for split, count in (("train", 6), ("val", 4), ("test", 5)):
        for base, array in (
            ("images", pixels(count, 4, 4)),
            ("labels", (np.arange(count) % 2)[:, None]),
            ("rec", np.array([f"{split}{index // 2}" for index in range(count)])),
        ):
            arrays[name.format(base=base, split=split)] = array
    data = open_data(save(tmp_path, **arrays, classes=np.array(["no", "yes"]), rate=np.array(8.0)), split_by="rec")
    assert (len(data.train), data.validation.sum(), len(data.test)) == (10, 4, 5)
    assert data.classes == ("no", "yes")
    assert data.test.columns["rec"].tolist() == ["test0", "test0", "test1", "test1", "test2"]
    assert data.test.names[3] == "images_test[3]"
    assert sorted([*data.train.sample, *data.test.sample]) == list(range(15))
    assert set(data.fingerprint) == {"train", "validation", "test"}


def test_another_array_can_be_the_label(tmp_path):
    path = save(tmp_path, x=waves(20), y=Y, beat=np.array(list("NVFS") * 5))
    assert open_data(path, target="beat").classes == ("F", "N", "S", "V")
    assert open_data(path, labels="beat").classes == ("F", "N", "S", "V")


def test_minus_one_is_no_label_if_two_other_classes_exist(tmp_path):
    data = open_data(save(tmp_path, x=waves(20), y=np.array([-1, 0, 1, 2] * 5)))
    assert data.classes == ("0", "1", "2")
    assert (data.train.target == -1).sum() == 5
    assert open_data(save(tmp_path, x=waves(20), y=np.array([-1, 1] * 10))).classes == ("-1", "1")


def test_one_hot_labels_are_converted_to_classes(tmp_path):
    data = open_data(save(tmp_path, x=waves(20), y=np.eye(4)[np.arange(20) % 4]))
    assert data.classes == ("0", "1", "2", "3")


def test_classes_sort_as_numbers(tmp_path):
    data = open_data(save(tmp_path, x=waves(22), y=np.array([str(index) for index in range(11)] * 2)))
    assert data.classes == tuple(str(index) for index in range(11))


def test_an_npy_file_is_input_without_labels(tmp_path):
    np.save(tmp_path / "x.npy", waves(4, 2))
    data = open_data(str(tmp_path / "x.npy"))
    assert (data.shape, data.classes, len(data.train)) == ((2, 12), (), 4)


def test_series_of_unequal_length_are_padded_over_the_splits(tmp_path):
    data = open_data(save(tmp_path, x_train=waves(8), y_train=Y[:8], x_test=waves(8, length=9), y_test=Y[:8]))
    assert data.shape == (1, 12)
    assert torch.isnan(data.test.x()[:, :, 9:]).all()
    assert any("9 to 12 steps long" in note for note in data.notes)


def test_the_range_of_floats_outside_zero_to_one_is_that_of_the_values(tmp_path):
    x = np.linspace(-2, 6, 20 * 16).reshape(20, 1, 4, 4)
    assert open_data(save(tmp_path, x=x)).value_range == (-2, 6)
    assert open_data(save(tmp_path, x=(x + 2) / 8)).value_range == (0, 1)


def test_mean_and_std_are_those_of_train(tmp_path):
    x = 1e6 + waves(20, 2)
    x[:, 1, 7:] = np.nan
    data = open_data(save(tmp_path, x=x, y=Y))
    own = x[data.train.sample].astype(np.float64)
    np.testing.assert_allclose(data.mean, np.nanmean(own, axis=(0, 2)), rtol=1e-6)
    np.testing.assert_allclose(data.std, np.nanstd(own, axis=(0, 2)), rtol=1e-5)


def test_a_constant_channel_has_std_one(tmp_path):
    assert open_data(save(tmp_path, x=np.full((4, 1, 5), 0.1))).std.tolist() == [1]


def objects():
    x = np.empty(2, dtype=object)
    x[:] = [np.zeros(3), np.zeros(4)]
    return x


def waves_with(value, row=3):
    x = waves(20)
    x[row] = value
    return x


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"x": waves(20), "y": Y[:19]}, {}, r"expected 20 labels in y, one per item of x; got \(19,\)"),
        ({"x": objects()}, {}, "it contains Python objects"),
        ({"a": waves(3), "b": waves(3)}, {}, r"expected an array x .* got a \(3, 1, 12\) float32, b"),
        ({"y": Y}, {}, "expected an array x"),
        ({}, {}, "the file contains none"),
        ({"x": np.array(["a", "b"])}, {}, "expected numbers in x; got <U1"),
        ({"x": np.zeros((4, 3), dtype=complex)}, {}, "expected numbers in x; got complex128"),
        ({"x": np.zeros(4)}, {}, "got 1 axes"),
        ({"x": np.zeros((0, 4))}, {}, "expected items in x"),
        ({"x": waves_with(np.nan)}, {}, r"1 contain NaN only, the first is x\[3\]"),
        ({"x": waves_with(np.inf)}, {}, r"1 series contain infinite values .* the first is x\[3\]"),
        ({"x": waves(20, length=1)}, {}, "series of two steps or more; got 1"),
        ({"x": waves(20), "y": Y * 0}, {}, "expected two or more classes in 'y'; every label is '0'"),
        ({"x": waves(20), "y": Y + 0.5}, {}, "must be classes.* got the number 0.5"),
        ({"x": waves(20), "y": Y * 5, "classes": np.array(["a", "b"])}, {}, "'classes' names 2 classes.* got 5"),
        (
            {"x_train": waves(9), "x_test": waves(9, 2)},
            {},
            r"items of one shape; got x_train \(1, 12\) and x_test \(2, 12\)",
        ),
        ({"x": waves(20), "patient": Y}, {"split_by": "patien"}, "data.split_by: .* Did you mean 'patient'?"),
        ({"x": waves(20), "y": Y}, {"size": 32}, "data.size is for images"),
        ({"x": waves(20)}, {"positives": "label"}, "data.positives: 'label' needs labels"),
        ({"x": waves(20), "y": Y, "p": Y * 0}, {"split_by": "p"}, "no member of 'p' .* can be held out for test"),
        (
            {"x_train": waves(4), "x_test": waves(4), "rec_train": Y[:4], "rec_test": Y[1:5] + 1},
            {"split_by": "rec"},
            r"has 1 in both \(train and test\), the first '1'",
        ),
        (
            {"x_train": waves(4), "y_train": Y[:4], "x_test": waves(4), "y_test": Y[:4]},
            {"splits": {"test": 0.3}},
            "has its own test split",
        ),
    ],
)
def test_arrays_that_cannot_be_used_are_an_error_that_says_why(tmp_path, arrays, options, message):
    path = save(tmp_path, **arrays)
    with pytest.raises(InputError, match=message):
        open_data(path, **options)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"text"])
def test_a_broken_archive_is_an_error_with_its_name(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.npz"):
        open_data(str(tmp_path / "x.npz"))


def test_a_text_file_called_npz_has_its_own_error(tmp_path):
    (tmp_path / "notes.npz").write_text("hello")
    with pytest.raises(InputError, match=r"notes\.npz: expected arrays that numpy saved"):
        open_data(str(tmp_path / "notes.npz"))
