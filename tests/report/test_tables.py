import pytest

from contrast.evaluation.results import Result
from contrast.evaluation.tables import results_tables
from contrast.report.tables import recall_table, summary
from tests.evaluation.rows import result
from tests.report.fake_runs import results

NUMBERS = {"pretrained": (0.986, 0.989, 0.972), "raw": (0.961, 0.952, 0.881), "untrained": (0.958, 0.971, 0.918)}


@pytest.fixture
def accuracy():
    rows = results(["cat", "dog"], NUMBERS, "digits")["results"]
    return results_tables([Result.from_row(row) for row in rows])[0]


def test_the_summary_reports_few_labels(accuracy):
    assert summary(accuracy, "image") == (
        "From the features of the pretrained encoder, 0.97 of the test images are classified correctly by a probe with "
        "10 labels per class, compared with 0.88 for raw pixels and 0.92 for the untrained encoder."
    )


def test_the_summary_has_a_third_decimal_where_two_would_hide_a_difference():
    text = summary(results_tables([result("pretrained", [0.972, 0.972]), result("raw", [0.968, 0.968])])[0], "series")
    assert "0.972" in text
    assert "0.968 for raw series" in text


def test_without_a_pretrained_result_there_is_no_summary():
    assert summary(results_tables([result("raw", [0.9, 0.8])])[0], "image") == ""


def test_classes_have_a_recall_for_each_model(accuracy):
    found = recall_table(accuracy)
    assert found.models == ["raw", "untrained", "pretrained"]
    assert found.rows[1] == ("dog", 37, pytest.approx([0.868, 0.905, 0.959]))


def test_without_recalls_there_is_no_table():
    assert recall_table(results_tables([result("raw", [0.9, 0.8])])[0]) is None
