import pytest

from contrast.experiment.folder import RunFolder
from contrast.experiment.record import write_report
from tests.report.fake_runs import image_run, series_run


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    return image_run(tmp_path_factory.mktemp("report") / "digits-simclr-001")


@pytest.fixture(scope="session")
def series_folder(tmp_path_factory):
    return series_run(tmp_path_factory.mktemp("report") / "aeon-series-001")


@pytest.fixture(scope="session")
def pages(image_folder, series_folder):
    """Return the written page of each kind of run."""
    return {"image": write_report(RunFolder(image_folder)), "series": write_report(RunFolder(series_folder))}
