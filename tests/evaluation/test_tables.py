import math
from dataclasses import replace

import pytest

from contrast.core.registry import InputError
from contrast.evaluation.results import Result
from contrast.evaluation.tables import (
    Column,
    format_score,
    join_with_and,
    markdown_table,
    results_tables,
    text_table,
)
from tests.evaluation.rows import result

ROWS = [
    result("mine", [0.9], "knn", "all"),
    result("pretrained", [0.9, 0.92]),
    result("pretrained", [0.97], "knn", "all"),
    result("raw", [0.95], "knn", "all"),
    result("raw", [0.8, 0.81]),
    result("raw", [0.7, 0.71], metric="macro_f1"),
]


def test_the_text_is_aligned_in_the_order_of_protocols_and_models():
    assert text_table(ROWS, ["a note."]).splitlines() == [
        "model       k-NN           linear probe, 10 labels per class",
        "----------  -------------  ---------------------------------",
        "raw input   0.950 ± 0.006  0.805 ± 0.013",
        "pretrained  0.970 ± 0.006  0.910 ± 0.013",
        "mine        0.900 ± 0.006  \N{EN DASH}",
        "",
        "Accuracy on the test split, which was used for no choice.",
        (
            "± is the standard error over test items for k-NN; the standard deviation over draws for linear probe, "
            "10 labels per class (2 draws, the same for every model)."
        ),
        (
            "linear probe, 10 labels per class, same draws: pretrained - raw input = +0.105 ± 0.005 (standard error "
            "over 2 draws): more than twice its standard error."
        ),
        "a note.",
    ]


def test_markdown_has_the_same_cells_and_sentences():
    text, markdown = text_table(ROWS, ["a note."]).splitlines(), markdown_table(ROWS, ["a note."]).splitlines()
    assert markdown[:3] == [
        "| model | k-NN | linear probe, 10 labels per class |",
        "|---|---|---|",
        "| raw input | 0.950 ± 0.006 | 0.805 ± 0.013 |",
    ]
    assert markdown[6:] == [f"- {line}" for line in text[6:]]


def test_there_is_one_table_per_metric_accuracy_first():
    assert [table.metric for table in results_tables(ROWS[::-1])] == ["accuracy", "macro-F1"]


def test_more_labels_come_first():
    labels = ["1 per class", "all", "20 per class"]
    (table,) = results_tables([result("raw", [0.9], "linear", each) for each in labels])
    assert [column.labels for column in table.columns] == ["all", "20 per class", "1 per class"]
    assert [column.title for column in table.columns][::2] == [
        "linear probe, all labels",
        "linear probe, 1 label per class",
    ]


def test_another_protocol_has_its_own_name_as_heading():
    assert Column("cross_validation", "all").title == "cross validation"
    assert Column("knn", "5 per class").title == "k-NN, 5 labels per class"


def test_the_main_column_has_few_labels_where_there_are_some():
    assert results_tables(ROWS)[0].main == Column("few_labels", "10 per class")
    assert results_tables(ROWS[2:4])[0].main == Column("knn", "all")


def test_other_draws_are_not_compared():
    pair = [result("pretrained", [0.5, 0.6]), result("raw", [0.7, 0.8], seeds=[7, 8])]
    assert results_tables(pair)[0].comparisons == []


def test_without_a_pretrained_encoder_nothing_is_compared():
    assert results_tables([row for row in ROWS if row.model != "pretrained"])[0].comparisons == []


def test_other_splits_are_shown_only_without_test_results():
    other = result("pretrained", [0.9, 0.9], split="validation")
    column = Column("few_labels", "10 per class")
    (table,) = results_tables([result("pretrained", [0.5, 0.6]), other])
    assert table.results(column)["pretrained"].value == pytest.approx(0.55)
    assert results_tables([other])[0].caption == "Accuracy on the validation split."


def test_a_value_that_is_no_number_is_in_no_table():
    assert text_table([replace(ROWS[0], value=math.nan)], ["a note."]) == "a note."


def test_a_missing_score_is_a_dash():
    assert [format_score(value) for value in (0.98765, None)] == ["0.988", "\N{EN DASH}"]


def test_parts_are_joined_as_in_a_sentence():
    assert [join_with_and(list("abc")[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


def test_a_row_without_its_keys_is_refused_and_a_new_key_is_ignored():
    row = ROWS[0].row()
    assert Result.from_row({**row, "of a later version": 1}) == ROWS[0]
    del row["value"]
    with pytest.raises(InputError, match=r"missing: .*value"):
        Result.from_row(row)
