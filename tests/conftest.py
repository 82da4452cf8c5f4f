"""Options of the test suite: long tests run with --all only."""

import os

import pytest
from hypothesis import settings

# One core per process, also in the processes that the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run long tests, and more examples of properties")


def pytest_configure(config):
    settings.register_profile("short", deadline=None, max_examples=100, derandomize=True)
    settings.register_profile("all", deadline=None, max_examples=200, derandomize=True)
    settings.load_profile("all" if config.getoption("--all") else "short")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="long: runs with --all"))


@pytest.fixture(scope="session", params=[2, pytest.param(4, marks=pytest.mark.long)], ids=lambda world: f"{world}ranks")
def processes(request):
    """Two gloo processes for the session; four with --all."""
    from tests.gloo import Processes

    started = Processes(request.param)
    yield started
    started.close()
