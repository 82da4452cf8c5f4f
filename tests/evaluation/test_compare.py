from dataclasses import replace

import pytest

from contrast.core.registry import InputError
from contrast.evaluation.compare import comparisons, markdown, paired_difference, table
from contrast.evaluation.results import Result


def result(model, values, protocol="few_labels", labels="10 a class"):
    several = len(values) > 1
    return Result(
        model=model,
        protocol=protocol,
        protocol_version="v1",
        protocol_hash="0",
        split="test",
        labels=labels,
        metric="accuracy",
        value=sum(values) / len(values),
        spread=0.0125 if several else None,
        spread_kind="standard deviation over draws" if several else "none",
        n=len(values),
        values=values,
        seeds=list(range(len(values))),
        selected_on="",
        saw_test=False,
    )


def test_a_difference_is_the_mean_over_shared_draws():
    found = paired_difference(result("pretrained", [0.9, 0.8, 0.7]), result("raw", [0.8, 0.8, 0.5]))
    # Differences 0.1, 0, 0.2: mean 0.1, standard deviation 0.1.
    assert found.mean == pytest.approx(0.1)
    assert found.standard_error == pytest.approx(0.1 / 3**0.5)
    assert found.n == 3 and not found.clear


def test_clear_means_more_than_twice_the_standard_error():
    raw = result("raw", [0.5, 0.6, 0.7, 0.8])
    better = result("pretrained", [0.61, 0.69, 0.81, 0.89])
    assert paired_difference(better, raw).clear
    assert "other way round" in str(paired_difference(raw, better))
    assert not paired_difference(raw, raw).clear


@pytest.mark.parametrize(
    "other", [{"protocol_hash": "1"}, {"seeds": [7, 8]}, {"metric": "auroc"}, {"protocol": "linear"}]
)
def test_only_what_was_measured_alike_is_compared(other):
    ours = result("pretrained", [0.9, 0.8])
    with pytest.raises(InputError, match="measured alike"):
        paired_difference(ours, replace(result("raw", [0.1, 0.2]), **other))


def test_one_number_has_no_standard_error():
    with pytest.raises(InputError, match="at least two draws"):
        paired_difference(result("pretrained", [0.9]), result("raw", [0.8]))


ROWS = [
    result("pretrained", [0.97], "knn", "all"),
    result("pretrained", [0.9, 0.92]),
    result("raw", [0.95], "knn", "all"),
    result("raw", [0.8, 0.81]),
    result("off_the_shelf", [0.9], "knn", "all"),
]


def test_the_table_is_aligned_in_the_order_of_the_ladder():
    assert table(ROWS, ["a note."]).splitlines() == [
        "features       k-NN    linear, 10 labels a class",
        "-------------  ------  -------------------------",
        "raw input      0.9500  0.8050 ± 0.0125 (2 draws)",
        "pretrained     0.9700  0.9100 ± 0.0125 (2 draws)",
        "off the shelf  0.9000  -",
        "",
        "accuracy on the test split, which no choice has seen.",
        "± is the standard deviation over label draws; every model gets the same draws.",
        (
            "10 labels a class, same draws: pretrained - raw input = +0.1050 ± 0.0050 (standard error over 2 draws): "
            "clear, more than twice its standard error."
        ),
        "a note.",
    ]


def test_markdown_has_the_same_cells():
    assert markdown(ROWS).splitlines()[:3] == [
        "| features | k-NN | linear, 10 labels a class |",
        "|---|---|---|",
        "| raw input | 0.9500 | 0.8050 ± 0.0125 (2 draws) |",
    ]


def test_without_a_pretrained_encoder_nothing_is_compared():
    assert comparisons([row for row in ROWS if row.model != "pretrained"]) == []
