import numpy as np
import pytest
import torch

from contrast.core.registry import InputError
from contrast.data import open_data
from tests.data.writing import waves, write_lines


def row_of(values):
    return [f"{value:.6g}" for value in values]


def write_wide(path, x, *, labels=None, first=False, header=None, separator=","):
    rows = []
    for index, one in enumerate(x[:, 0]):
        label = [] if labels is None else [str(labels[index])]
        rows.append(separator.join(label + row_of(one) if first else row_of(one) + label))
    return write_lines(path, *([separator.join(header)] if header else []), *rows)


def everything(data):
    """Return raw inputs and class names in the order of the source."""
    x = torch.cat([data.train.x(), data.test.x()])
    target = np.concatenate([data.train.target, data.test.target])
    order = np.argsort(np.concatenate([data.train.sample, data.test.sample]))
    return x[torch.from_numpy(order)].numpy(), [data.classes[label] if label >= 0 else None for label in target[order]]


X = waves(12, length=6)
LABELS = ["cat", "dog"] * 6


@pytest.mark.parametrize(
    ("ending", "options"),
    [
        (".csv", {"labels": LABELS}),
        (".csv", {"labels": LABELS, "header": [*"abcdef", "label"]}),
        (".csv", {"labels": LABELS, "header": [*"012345", "kind"]}),
        (".csv", {"labels": LABELS, "header": ["class", *"abcdef"], "first": True, "separator": ";"}),
        (".tsv", {"labels": LABELS, "first": True, "separator": "\t"}),
        (".txt", {"labels": LABELS, "first": True, "separator": "  "}),
    ],
)
def test_a_wide_table_has_one_series_per_row(tmp_path, ending, options):
    data = open_data(str(write_wide(tmp_path / f"x{ending}", X, **options)))
    x, labels = everything(data)
    np.testing.assert_allclose(x, X, rtol=1e-5)
    assert labels == LABELS


@pytest.mark.parametrize(("ending", "first"), [(".tsv", True), (".csv", False), (".csv", True)])
def test_a_first_or_last_column_with_few_distinct_integers_is_the_label(tmp_path, ending, first):
    numbers = [1, 2, 3] * 4
    separator = "\t" if ending == ".tsv" else ","
    path = write_wide(tmp_path / f"x{ending}", X, labels=numbers, first=first, separator=separator)
    x, labels = everything(open_data(str(path)))
    np.testing.assert_allclose(x, X, rtol=1e-5)
    assert labels == [str(number) for number in numbers]


def test_a_wide_table_without_labels_has_values_only(tmp_path):
    data = open_data(str(write_wide(tmp_path / "x.csv", X)))
    assert (data.shape, data.classes) == ((1, 6), ())


def test_with_target_none_the_label_column_is_not_used_as_a_step(tmp_path):
    path = write_wide(tmp_path / "x.tsv", X, labels=[1, 2] * 6, first=True, separator="\t")
    data = open_data(str(path), target="none")
    assert (data.shape, data.classes) == ((1, 6), ())


def test_columns_other_than_the_values_are_not_steps(tmp_path):
    header = "id,patient,age,t0,t1,t2,diagnosis"
    rows = [f"s{index},{index // 3},{40 + index // 3},{index},0.5,,{'ab'[index % 2]}" for index in range(30)]
    path = write_lines(tmp_path / "x.csv", header, *rows)
    data = open_data(str(path), split_by="patient", target="diagnosis")
    assert data.shape == (1, 3)
    assert torch.isnan(data.train.x()[:, 0, 2]).all()
    assert data.train.names[0].startswith("s")
    assert set(data.train.columns) == {"patient", "age", "diagnosis"}
    assert not set(data.train.columns["patient"]) & set(data.test.columns["patient"])


def test_a_train_file_is_read_with_its_test_file_and_vice_versa(tmp_path):
    for word, rows in (("TRAIN", slice(0, 8)), ("TEST", slice(8, 12))):
        write_wide(tmp_path / f"Set_{word}.tsv", X[rows], labels=[1, 2] * (4 if word == "TRAIN" else 2), first=True)
    one, other, folder = (open_data(str(tmp_path / name)) for name in ("Set_TRAIN.tsv", "Set_TEST.tsv", ""))
    assert (len(one.train), len(one.test)) == (8, 4)
    assert one.fingerprint == other.fingerprint == folder.fingerprint
    assert one.test.names[0] == "Set_TEST.tsv[0]"


def test_a_column_called_split_is_the_split(tmp_path):
    rows = [f"{index},{index + 0.5},{index % 2},{'test' if index > 5 else 'train'}" for index in range(9)]
    data = open_data(str(write_lines(tmp_path / "x.csv", "a0,a1,label,split", *rows)))
    assert (len(data.train), len(data.test)) == (6, 3)


def test_a_long_table_has_one_step_per_row_and_channels_in_columns(tmp_path):
    lengths = [4, 6, 5, 6]
    rows = [
        f"s{series},{step},{series + step / 10},{-step},{'ab'[series % 2]},{series // 2}"
        for step in range(6)
        for series in range(4)
        if step < lengths[series]
    ]
    path = write_lines(tmp_path / "x.csv", "id,time,left,right,label,patient", *rows)
    data = open_data(str(path), splits={"test": 0}, positives="patient")
    assert data.shape == (2, 6)
    assert data.train.names == ["s0", "s1", "s2", "s3"]
    x, labels = everything(data)
    assert labels == ["a", "b", "a", "b"]
    for series, length in enumerate(lengths):
        np.testing.assert_allclose(x[series, 0, :length], series + np.arange(length) / 10, rtol=1e-6)
        np.testing.assert_allclose(x[series, 1, :length], -np.arange(length))
        assert np.isnan(x[series, :, length:]).all()
    assert data.train.group.tolist() == [0, 0, 1, 1]


def test_a_long_table_with_a_channel_column_has_gaps_as_nan(tmp_path):
    rows = ["b,1,x,1", "b,1,y,2", "b,3,x,3", "b,2,y,4", "a,1,x,5", "a,2,x,6", "a,3,x,7", "a,3,y,8"]
    data = open_data(str(write_lines(tmp_path / "x.csv", "id,time,channel,value", *rows)))
    nan = np.nan
    np.testing.assert_array_equal(data.train.x()[0], [[1, nan, 3], [2, 4, nan]])
    np.testing.assert_array_equal(data.train.x()[1], [[5, 6, 7], [nan, nan, 8]])


def test_numbers_that_are_constant_per_series_are_no_channel(tmp_path):
    rows = [f"{series},{step},{series * step},{30 + series}" for series in (1, 2, 3) for step in range(4)]
    data = open_data(str(write_lines(tmp_path / "x.csv", "id,time,value,age", *rows)))
    assert data.shape == (1, 4)
    assert data.train.columns["age"].tolist() == [31, 32, 33]


def test_dates_are_the_order_of_the_steps_of_a_long_table(tmp_path):
    rows = ["a,2024-01-02,2", "a,2024-01-01,1", "a,2024-01-09,3", "b,2024-05-01,1", "b,2024-05-02,2"]
    data = open_data(str(write_lines(tmp_path / "x.csv", "id,date,value", *rows)))
    np.testing.assert_array_equal(data.train.x()[:, 0], [[1, 2, 3], [1, 2, np.nan]])


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (
            ["id,time,value,label", "a,1,1,x", "a,2,2,y", "b,1,1,y"],
            {},
            "one 'label' per series; series 'a' has 'x' and 'y'",
        ),
        (
            ["id,time,value", "a,1,1", "a,1,2", "b,1,1"],
            {},
            "one row per 'id' and 'time'; 1 have several, .* 'a' at 1",
        ),
        (["id,time,kind", "a,1,x", "a,2,y", "b,1,z"], {}, "expected a column of numbers, such as 'value'"),
        (["id,time,value", "a,soon,1", "a,2,2"], {}, "expected numbers or dates"),
        (["id,time,value", "a,1,", "a,2,", "b,1,1"], {}, "1 contain NaN only, the first is a"),
        (["p,q,a0,a1", "x,y,1,2", "z,y,3,4"], {}, "expected one column of labels .* 2 columns of words: p, q"),
        (["a0,a1,kind", "1,2,x", "3,4,y"], {"target": "knid"}, "no column 'knid'. Did you mean 'kind'?"),
        (["name,kind", "a,x", "b,y"], {}, "expected two or more columns of numbers"),
        (["a0,a1", "1,2", "inf,4"], {}, r"infinite values.* the first is x.csv\[1\]"),
        (["a0,a1,kind", "1,2,x", "3,4,x"], {}, "expected two or more classes in 'kind'; every label is 'x'"),
    ],
)
def test_tables_that_cannot_be_used_are_an_error_that_says_why(tmp_path, lines, options, message):
    path = write_lines(tmp_path / "x.csv", *lines)
    with pytest.raises(InputError, match=message):
        open_data(str(path), **options)


def test_a_test_file_with_other_columns_is_refused(tmp_path):
    write_lines(tmp_path / "x_train.csv", "a0,a1,y", "1,2,0", "2,3,1")
    write_lines(tmp_path / "x_test.csv", "a0,b1,y", "1,2,0")
    with pytest.raises(InputError, match=r"expected the columns of x_train.csv; they differ, for instance in 'a1'"):
        open_data(str(tmp_path / "x_train.csv"))


TS = """@problemName Two
@timestamps false
@missing true
@univariate false
@equalLength false
@classLabel true up down
@data
"""


def test_ts_files_of_a_set_are_read_with_gaps_and_unequal_lengths(tmp_path):
    (tmp_path / "Two_TRAIN.ts").write_text(TS + "1,2,3:4,?,6:up\n1,2:4,5:down\n1,2:4,7:down\n2,2:4,7:up\n")
    (tmp_path / "Two_TEST.ts").write_text(TS + "1,2,3,4:4,5,6,7:down\n1,2:3,4:up\n")
    for name in ("Two_TRAIN.ts", "Two_TEST.ts"):
        data = open_data(str(tmp_path / name))
        assert (data.shape, data.classes, len(data.train), len(data.test)) == ((2, 4), ("down", "up"), 4, 2)
        np.testing.assert_array_equal(data.train.x()[0], [[1, 2, 3, np.nan], [4, np.nan, 6, np.nan]])
        assert data.test.target.tolist() == [0, 1]


@pytest.mark.parametrize("text", ["", "no header", TS, TS.replace("@data", "")])
def test_a_broken_ts_file_is_an_error_with_its_name(tmp_path, text):
    (tmp_path / "x.ts").write_text(text)
    with pytest.raises(InputError, match=r"x\.ts: expected series"):
        open_data(str(tmp_path / "x.ts"))
