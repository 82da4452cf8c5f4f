import numpy as np
import pytest

from contrast.core.registry import InputError
from contrast.data import duplicates, leaks, open_data
from tests.data.writing import waves


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digit", "no file or folder 'digit'. Did you mean 'digits'?"),
        ("{root}/sett.npz", "no file or folder .* Did you mean 'set.npz'?"),
        ("aoen:OSULeaf", "'aoen:' is no known kind of source. Did you mean 'aeon'?"),
        ("{root}/set.pdf", "files of the type '.pdf' are not read"),
        ("{root}/set.png", "this is one. Name the folder"),
    ],
)
def test_a_missing_or_unsupported_source_is_an_error_that_says_why(tmp_path, source, message):
    for name in ("set.npz", "set.pdf", "set.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=message):
        open_data(source.format(root=tmp_path))


def test_a_folder_with_several_sets_is_ambiguous(tmp_path):
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, x=waves(3))
    with pytest.raises(InputError, match=r"expected images or one data file; got 2 \(a.npz, b.npz"):
        open_data(str(tmp_path))


@pytest.fixture
def source(tmp_path):
    x = waves(60)
    patient = np.arange(60) // 4
    x[1], x[59] = x[0], x[0]
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(60) % 3, patient=patient)
    return str(tmp_path / "x.npz")


def test_samples_are_unique_over_the_splits_and_by_default_their_own_groups(source):
    data = open_data(source)
    sample = np.concatenate([data.train.sample, data.test.sample])
    assert sorted(sample) == list(range(60))
    assert np.array_equal(data.train.group, data.train.sample)
    assert (len(data.test), data.validation.sum()) == (12, 10)


def test_with_labels_as_positives_each_unlabelled_item_is_its_own_group(tmp_path):
    y = np.array([-1, 0, 1, 2] * 6)
    np.savez(tmp_path / "x.npz", x=waves(24), y=y)
    data = open_data(str(tmp_path / "x.npz"), positives="label", splits={"test": 0})
    assert np.array_equal(data.train.group[y >= 0], y[y >= 0])
    unlabelled = data.train.group[y < 0]
    assert len(set(unlabelled)) == 6
    assert not set(unlabelled) & {0, 1, 2}


def test_no_member_of_split_by_is_in_two_splits(source):
    data = open_data(source, split_by="patient")
    patient = data.train.columns["patient"]
    splits = [set(patient[~data.validation]), set(patient[data.validation]), set(data.test.columns["patient"])]
    assert all(splits)
    assert sum(map(len, splits)) == 15
    assert data.split_by == "patient"


def test_unlabelled_members_of_a_test_group_are_not_used(tmp_path):
    y = np.where(np.arange(40) % 4 == 3, np.nan, np.arange(40) % 2)
    np.savez(tmp_path / "x.npz", x=waves(40), y=y, patient=np.arange(40) // 4)
    data = open_data(str(tmp_path / "x.npz"), split_by="patient")
    assert not set(data.train.columns["patient"]) & set(data.test.columns["patient"])
    assert (data.test.target >= 0).all()
    assert len(data.train) + len(data.test) < 40
    assert any("share a 'patient' with test and are not used" in note for note in data.notes)


def test_split_and_fingerprint_are_functions_of_the_seed(source):
    one, again, other = (open_data(source, seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint == again.fingerprint
    assert one.fingerprint["test"] != other.fingerprint["test"]


def test_one_changed_value_changes_the_fingerprint(tmp_path, source):
    arrays = dict(np.load(source))
    arrays["x"][5, 0, 0] += 1e-3
    np.savez(tmp_path / "other.npz", **arrays)
    assert open_data(source).fingerprint != open_data(str(tmp_path / "other.npz")).fingerprint


def test_exact_duplicates_are_found_across_the_splits_first(tmp_path):
    x, test = waves(6), waves(3, seed=1)
    x[4], test[2], test[1] = x[1], x[0], test[0]
    np.savez(tmp_path / "x.npz", x_train=x, x_test=test)
    data = open_data(str(tmp_path / "x.npz"))
    assert leaks(data) == [("x_train[0]", "x_test[2]")]
    assert duplicates(data) == [
        ("x_train[0]", "x_test[2]"),
        ("x_train[1]", "x_train[4]"),
        ("x_test[0]", "x_test[1]"),
    ]


def test_a_test_split_without_labels_is_replaced_by_one_from_train(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=waves(20), y_train=np.arange(20) % 2, x_test=waves(5))
    data = open_data(str(tmp_path / "x.npz"))
    assert (len(data.train), len(data.test)) == (16, 4)
    assert (data.test.target >= 0).all()
    assert any("5 test items without a label are not used" in note for note in data.notes)


def test_a_validation_split_is_the_test_split_if_there_is_no_other(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=waves(20), y_train=np.arange(20) % 2, x_val=waves(6), y_val=np.arange(6) % 2)
    data = open_data(str(tmp_path / "x.npz"))
    assert (len(data.train), len(data.test), data.validation.sum()) == (20, 6, 4)
