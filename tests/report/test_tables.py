import pytest

from contrast.core.registry import InputError
from contrast.evaluation.results import Result
from contrast.report.tables import (
    paired_sentences,
    per_class_table,
    read_results,
    results_tables,
    spread_sentence,
    summary,
)
from tests.report.fake_runs import results

NUMBERS = {"pretrained": (0.986, 0.989, 0.972), "raw": (0.961, 0.952, 0.881), "untrained": (0.958, 0.971, 0.918)}


def tables(numbers=NUMBERS):
    return results_tables(read_results(results(["cat", "dog"], numbers, "digits")["results"]))


def few(model, values, seeds=None, metric="accuracy", split="test"):
    seeds = seeds or list(range(len(values)))
    return Result(
        model, "few_labels", "v1", "hash", split, "10 a class", metric, sum(values) / len(values), 0.01,
        "standard deviation over draws", len(values), values, seeds, "folds", False,
    )  # fmt: skip


def test_rows_and_columns_stand_in_the_order_of_the_page():
    accuracy, macro_f1 = tables()
    assert list(accuracy.rows) == ["raw", "untrained", "pretrained"]
    assert [column.title for column in accuracy.columns] == [
        "k-NN", "linear probe, all labels", "linear probe, 10 labels a class",
    ]  # fmt: skip
    assert (accuracy.metric, macro_f1.metric) == ("accuracy", "macro-F1")


def test_the_summary_says_the_numbers_of_few_labels():
    assert summary(tables()[0], "image") == (
        "The pretrained encoder reads 0.97 of the test images right from 10 labels a class; "
        "raw pixels reach 0.88 and the untrained encoder reaches 0.92."
    )


def test_the_summary_shows_a_third_decimal_where_two_would_hide_a_difference():
    said = summary(results_tables([few("pretrained", [0.972, 0.972]), few("raw", [0.968, 0.968])])[0], "series")
    assert "0.972" in said
    assert "0.968" in said


def test_no_pretrained_result_gives_no_summary():
    assert summary(results_tables([few("raw", [0.9, 0.8])])[0], "image") == ""


def test_a_difference_is_judged_draw_by_draw():
    # Differences 0.1, 0.1, 0.1, 0.2: mean 0.125, standard deviation 0.05, standard error 0.025.
    ours, other = few("pretrained", [0.6, 0.7, 0.8, 0.9]), few("raw", [0.5, 0.6, 0.7, 0.7])
    (sentence,) = paired_sentences(results_tables([ours, other])[0])
    assert "stands 0.125 above raw input in accuracy (standard error 0.025): more than twice" in sentence
    # Differences 0.1, -0.1, 0.1, 0: mean 0.025, standard deviation 0.0957, standard error 0.048.
    (sentence,) = paired_sentences(results_tables([ours, few("untrained", [0.5, 0.8, 0.7, 0.9])])[0])
    assert "(standard error 0.048): not more than twice" in sentence


def test_a_worse_encoder_is_said_to_stand_below():
    pair = [few("pretrained", [0.5, 0.5]), few("raw", [0.7, 0.8])]
    assert "0.250 below raw input" in paired_sentences(results_tables(pair)[0])[0]


def test_other_draws_are_not_compared():
    pair = [few("pretrained", [0.5, 0.6]), few("raw", [0.7, 0.8], seeds=[7, 8])]
    assert paired_sentences(results_tables(pair)[0]) == []


def test_numbers_of_other_splits_stay_out_where_there_are_test_results():
    rows = [few("pretrained", [0.5, 0.6]), few("pretrained", [0.9, 0.9], split="validation")]
    table = results_tables(rows)[0]
    assert table.under(table.main)["pretrained"].value == pytest.approx(0.55)


def test_the_spread_says_what_it_is_for_each_column():
    said = spread_sentence(tables()[0])
    assert "the standard error over test items for k-NN and linear probe, all labels" in said
    assert "the standard deviation over draws for linear probe, 10 labels a class (5 draws)" in said


def test_classes_have_a_recall_for_each_model():
    found = per_class_table(tables()[0])
    assert found.models == ["raw", "untrained", "pretrained"]
    assert found.rows[1] == ("dog", 37, pytest.approx([0.868, 0.905, 0.959]))


def test_a_row_without_its_keys_is_refused_and_a_new_key_is_not():
    row = few("raw", [0.5, 0.6]).row()
    assert read_results([{**row, "of a later version": 1}]) == [few("raw", [0.5, 0.6])]
    del row["value"]
    with pytest.raises(InputError, match="value"):
        read_results([row])
