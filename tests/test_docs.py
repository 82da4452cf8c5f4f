"""What the README and the pages in docs/ show, runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from contrast.experiment import config as configuration
from contrast.losses import LOSSES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python\n" in page.read_text()], ids=lambda page: page.name
)
def test_every_python_block_of_a_page_runs_in_order(page):
    names, losses = {}, dict(LOSSES._parts)
    try:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            exec(compile(block, page.name, "exec"), names)
    finally:
        LOSSES._parts = losses


@pytest.mark.parametrize(("name", "count"), [("ddp", 2), ("mesh", 4)])
def test_the_page_s_scripts_for_several_processes_run(tmp_path, name, count):
    """As the page says: torchrun and the script."""
    (script,) = re.findall(rf"```python {name}\n(.*?)```", (ROOT / "docs" / "in_your_loop.md").read_text(), re.DOTALL)
    train = tmp_path / "train.py"
    # Without the interpreter's farewell, in which gloo's threads now and then end a process that is done.
    train.write_text(script + "\nimport os, sys\n\nsys.stdout.flush()\nos._exit(0)\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(train)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    answer = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr
    assert float(answer.stdout) > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readme_names_every_loss_and_only_keys_that_exist():
    text = (ROOT / "README.md").read_text()
    for loss in LOSSES.values():
        assert f"`{loss.__name__}`" in text
    known = {key.split(".")[0] for key in configuration.flat(configuration.Config())}
    for key in re.findall(r"(\w+)\.\w+=", text):
        assert key in known
    for config in ("simclr", "supcon", "cacr", "moco_v3", "simsiam"):
        assert config in configuration.shipped()


def test_the_page_of_the_config_is_up_to_date():
    command = [sys.executable, "-c", "from tools.config_page import page; print(page(), end='')"]
    written = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "config.md").read_text() == written, "run: python tools/config_page.py"
