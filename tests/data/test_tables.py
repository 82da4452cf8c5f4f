import numpy as np
import pytest

from contrast.core.registry import InputError
from contrast.data.tables import match_table, read_labels, read_values
from tests.data.writing import write_lines

FILES = ["a/1.png", "a/2.png", "b/1.png", "b/3.png"]


def table(tmp_path, *lines):
    return write_lines(tmp_path / "labels.csv", *lines)


@pytest.mark.parametrize("item", ["b/3.png", "b/3", "3.png", "3", "./b/3.png", "b\\3.png"])
def test_an_item_is_any_unique_end_of_a_path(tmp_path, item):
    columns, label, notes = match_table(table(tmp_path, "item,target", f"{item},cat"), FILES, target=None)
    assert columns["target"].tolist() == ["", "", "", "cat"]
    assert label == "target"
    assert notes == ["labels.csv does not list 3 of 4 files; they are unlabelled."]


def test_a_complete_path_is_unambiguous_even_if_others_end_with_it(tmp_path):
    files = ["1.png", "a/1.png"]
    columns, _, _ = match_table(table(tmp_path, "item,target", "1.png,cat"), files, target=None)
    assert columns["target"].tolist() == ["cat", ""]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_detected(tmp_path, separator):
    path = table(tmp_path, separator.join(("item", "target", "slide")), separator.join(("007", "cat", "s 1")))
    assert {name: column.tolist() for name, column in read_labels(path).items()} == {
        "item": ["007"],
        "target": ["cat"],
        "slide": ["s 1"],
    }


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ("item,target", "9.png,x", "8.png,y"),
            "every 'item' must be a file of the folder; 2 of 2 are not there, .*'9",
        ),
        (("item,target", "1.png,x"), "'1.png' in the column 'item' is the end of several paths"),
        (("item,target", "2.png,x", "a/2,y"), "expected one row per item; 1 items have several, the first '2.png'"),
        (("item", "2.png"), "expected a column 'item' and others such as 'target'; got 'item' only"),
        (("item,target,target", "2.png,x,y"), "two are called 'target'"),
        (("item,target",), "expected rows below the header item, target; there are none"),
        (("item,target", "2.png,x", "3.png,y,z"), "expected the same columns in every row"),
        ((), "the file is empty"),
    ],
)
def test_a_label_table_that_cannot_be_used_is_an_error_with_its_name(tmp_path, lines, message):
    path = table(tmp_path, *lines)
    with pytest.raises(InputError, match=message) as error:
        match_table(path, FILES, target=None)
    assert str(path) in str(error.value)


def test_text_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_bytes("item,target\na,Bär\n".encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        read_labels(path)


@pytest.mark.parametrize(
    ("first", "header"),
    [
        ("a,b,c", True),
        ("0,1,label", True),
        ("0,1,2", True),
        ("0.5,1.5,cat", False),
        ("1,0.5,2.5", False),
        ("1,,2.5", False),
    ],
)
def test_a_header_is_distinguished_from_a_first_row(tmp_path, first, header):
    path = table(tmp_path, first, "0.25,3.5,4" if header else "0.25,3.5,dog" if "cat" in first else "2,3.5,4")
    assert read_values(path)[1] is header


def test_a_decimal_comma_is_read_if_cells_are_separated_by_semicolons(tmp_path):
    columns, _ = read_values(table(tmp_path, "a;b", "0,5;1,25", "1;2,5"))
    assert columns["a"].tolist() == [0.5, 1.0]
    assert columns["b"].tolist() == [1.25, 2.5]


def test_missing_words_become_nan_among_numbers_only(tmp_path):
    columns, _ = read_values(table(tmp_path, "a,b", "1.5,cat", "?,dog", "NA,cat"))
    assert np.isnan(columns["a"]).tolist() == [False, True, True]
    assert columns["b"].tolist() == ["cat", "dog", "cat"]
