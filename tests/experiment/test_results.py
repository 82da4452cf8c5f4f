"""`results.json`."""

import json
import logging

import numpy as np
import pytest
import torch

from contrast.data import open_data
from contrast.experiment.folder import RESULTS, RunFolder
from contrast.experiment.results import clean_findings, write_results
from contrast.losses.loss import Loss


class Finding(Loss):
    """A loss that returns the given findings, or raises them."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def findings(self, names):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_a_finding_that_is_not_finite_costs_no_results(tmp_path):
    rows = [{"sample": 1, "mean loss": float("nan")}, {"sample": 2, "mean loss": 0.5}]
    findings = clean_findings(Finding({"Noisy": rows}), [])
    write_results(RunFolder(tmp_path), {"seed": 3}, open_data("digits"), None, findings=findings)
    written = json.loads((tmp_path / RESULTS).read_text())
    assert written["run"] == {"seed": 3}
    assert written["findings"] == {"Noisy": [{"sample": 1, "mean loss": None}, {"sample": 2, "mean loss": 0.5}]}


@pytest.mark.parametrize(
    ("value", "clean"),
    [
        (np.float32(1.5), 1.5),
        (np.float64("inf"), None),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array(2), 2),
        (torch.tensor(1.5), 1.5),
        (torch.tensor(float("nan")), None),
        (10**400, None),
        (None, None),
        ("text", "text"),
        ([float("nan"), 1], "[nan, 1]"),
        (np.arange(2), "[0 1]"),
    ],
)
def test_values_of_findings_are_plain_numbers_and_texts(value, clean):
    (row,) = clean_findings(Finding({"title": [{7: value}]}), [])["title"]
    assert row == {"7": clean}
    assert type(row["7"]) is type(clean)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (None, "all findings left out (TypeError: expected a mapping from title to rows; got NoneType)"),
        ([{"a": 1}], "all findings left out (TypeError: expected a mapping from title to rows; got list)"),
        (RuntimeError("two\nlines"), "all findings left out (RuntimeError: two lines)"),
        ({"odd": None}, "'odd' left out (TypeError: expected a list of rows; got NoneType)"),
        ({"odd": [1]}, "'odd' left out (TypeError: expected a mapping from column to value in each row; got int)"),
        ({"odd": (1 / 0 for _ in range(1))}, "'odd' left out (ZeroDivisionError: division by zero)"),
    ],
)
def test_findings_of_another_shape_are_left_out_with_one_warning(found, reason, caplog):
    caplog.set_level(logging.WARNING, logger="contrast")
    more = {"fine": ({"a": number} for number in range(2))} if isinstance(found, dict) else {}
    clean = clean_findings(Finding(found | more if more else found), [])
    assert clean == ({"fine": [{"a": 0}, {"a": 1}]} if more else {})
    assert [record.getMessage() for record in caplog.records] == [f"Finding.findings: {reason}"]
