"""The two commands of the README print one sentence where the machine cannot run them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.test_docs import ROOT


@pytest.fixture
def clone(tmp_path):
    """A copy of what the commands need, in a folder with a space, without an environment."""
    folder = tmp_path / "a clone"
    shutil.copytree(ROOT / "tools", folder / "tools")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def program(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def answer(clone, command, path, **variables):
    environment = {"PATH": path, "HOME": str(clone), "TMPDIR": str(clone), **variables}
    return subprocess.run(
        [str(clone / "tools" / command)], cwd="/", env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("command", ["demo", "test"])
def test_an_old_python_is_named_with_what_to_do(clone, command):
    for name in ("python3", "python", "python3.11", "python3.12", "python3.13", "python3.14"):
        program(clone / "bin", name, 'if [ "$1" = --version ]; then echo Python 3.9.2; else exit 1; fi')
    said = answer(clone, command, f"{clone / 'bin'}:/usr/bin:/bin")
    assert said.returncode == 1
    assert said.stderr == (
        "Python 3.11 or newer with venv is needed; found Python 3.9.2. "
        "Install it (on Debian: python3 and python3-venv) and run this again.\n"
    )
    assert not (clone / ".venv").exists()


def test_a_full_disk_is_named_before_anything_is_installed(clone):
    program(clone / "bin", "df", "printf 'head\\n/dev/x 100 90 1048576 90%% /\\n'")
    said = answer(clone, "demo", f"{clone / 'bin'}:{os.environ['PATH']}")
    assert said.returncode == 1
    assert "GB on this disk and 1 GB are free; make room" in said.stderr
    assert not (clone / ".venv").exists()


def test_a_missing_network_is_named_without_a_traceback(clone):
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    said = answer(clone, "demo", os.environ["PATH"], **nowhere)
    assert said.returncode == 1
    assert "The package index could not be reached: is there a network?" in said.stderr
    assert "Traceback" not in said.stderr
    assert not (clone / ".venv" / "contrast-ready").exists()


def test_ci_does_nothing_but_the_test_command():
    lines = [line for line in Path(ROOT, ".ci", "run").read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ['exec "$(dirname -- "${BASH_SOURCE[0]}")/../tools/test"']
