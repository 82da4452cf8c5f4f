"""`results.json`."""

import json

from contrast.data import open_data
from contrast.experiment.folder import RESULTS, RunFolder
from contrast.experiment.results import write_results


def test_a_finding_that_is_not_finite_costs_no_results(tmp_path):
    rows = [{"sample": 1, "mean loss": float("nan")}, {"sample": 2, "mean loss": 0.5}]
    write_results(RunFolder(tmp_path), {"seed": 3}, open_data("digits"), None, findings={"Noisy": rows})
    written = json.loads((tmp_path / RESULTS).read_text())
    assert written["run"] == {"seed": 3}
    assert written["findings"] == {"Noisy": [{"sample": 1, "mean loss": None}, {"sample": 2, "mean loss": 0.5}]}
