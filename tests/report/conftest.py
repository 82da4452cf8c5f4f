import pytest

from contrast.report.page import write_report
from tests.report.fake_runs import image_run, series_run


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    return image_run(tmp_path_factory.mktemp("report") / "digits-simclr-001")


@pytest.fixture(scope="session")
def series_folder(tmp_path_factory):
    return series_run(tmp_path_factory.mktemp("report") / "aeon-series-001")


@pytest.fixture(scope="session")
def pages(image_folder, series_folder):
    """Give the written page of each kind of run."""
    return {"image": write_report(image_folder), "series": write_report(series_folder)}
