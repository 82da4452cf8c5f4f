"""The losses need torch, numpy and the standard library: shown in processes where everything else is missing."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TORCH_NEEDS = {"sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec", "typing_extensions"}
"""What torch brings and imports of itself when it is first used."""

ALONE = f"""
import sys
import numpy, torch

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {{"contrast", "torch", "numpy", *{TORCH_NEEDS}, *sys.stdlib_module_names}}:
            raise ModuleNotFoundError("refused: " + name, name=name)

before = set(sys.modules)
sys.meta_path.insert(0, Refuse())
"""
USE = """
from contrast.losses import (
    AMCL, CACR, CWCL, BadPairs, DecoupledInfoNCE, HardContrastive, HardNegative, InfoNCE, SigLIP
)
from contrast.losses import LOSSES
import contrast

z = torch.randn(2, 200, 8, requires_grad=True)
index = torch.arange(200)
for loss in (
    InfoNCE(), DecoupledInfoNCE(), HardNegative(), HardContrastive(), CACR(), CWCL(), SigLIP(), AMCL(dim=8),
    BadPairs(InfoNCE(), samples=200),
):
    loss(*z, sample=index, group=index % 5).backward()
    assert loss.metrics
    loss.end_epoch()
with contrast.local():
    InfoNCE()(*z, extra=[torch.randn(9, 8)])
"""
ADDED = """
import json
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


def run(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_loss_runs_where_all_but_torch_and_numpy_raises():
    answer = run(ALONE + USE + ADDED)
    assert answer.returncode == 0, answer.stderr
    ours = set(json.loads(answer.stdout)) - sys.stdlib_module_names
    assert ours <= {"contrast", "torch", "numpy"} | TORCH_NEEDS


def test_the_import_hook_refuses_other_packages():
    answer = run(ALONE + "import pandas")
    assert "refused: pandas" in answer.stderr


def test_importing_the_losses_adds_modules_of_contrast_and_the_standard_library_only():
    code = "import sys, numpy, torch\nbefore = set(sys.modules)\nimport contrast, contrast.losses\n" + ADDED
    answer = run(code)
    assert answer.returncode == 0, answer.stderr
    assert set(json.loads(answer.stdout)) - sys.stdlib_module_names - {"torch", "numpy"} == {"contrast"}


def test_importing_the_losses_does_not_import_the_compiler_of_torch():
    """torch._dynamo takes a second to import."""
    answer = run("import sys, contrast.losses\nassert 'torch._dynamo' not in sys.modules")
    assert answer.returncode == 0, answer.stderr


def test_importing_the_registries_of_the_trainer_imports_no_library_of_an_extra():
    """`contrast list` answers from these modules; each of the libraries takes up to seconds to import."""
    code = (
        "import sys, contrast.models.backbones, contrast.models.heads, contrast.views.views, contrast.data.loader\n"
        "assert contrast.data.SOURCES and contrast.data.loader.SAMPLERS and contrast.views.views.RECIPES\n"
        "heavy = {'torchvision', 'timm', 'sklearn', 'pandas', 'aeon', 'scipy', 'PIL', 'torch._dynamo'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    answer = run(code)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.long
def test_importing_the_losses_takes_little_time_beyond_torch(capsys):
    """A bound of the product, not a comparison: the median of five processes."""
    code = (
        "import time, numpy, torch\nstart = time.perf_counter()\n"
        "from contrast.losses import InfoNCE\nprint(time.perf_counter() - start)"
    )
    seconds = statistics.median(float(run(code).stdout) for _ in range(5))
    with capsys.disabled():
        print(f" {seconds:.3f} s beyond torch")
    assert seconds < 0.3
