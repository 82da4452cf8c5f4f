"""The losses need only torch, numpy and the standard library; shown in processes of their own."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

DEPENDENCIES_OF_TORCH = {
    "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec", "typing_extensions"
}  # fmt: skip
"""What torch itself imports when it is first used."""

USE = f"""
import json, sys
import numpy, torch

allowed = {{"contrast", "torch", "numpy", *{DEPENDENCIES_OF_TORCH}, *sys.stdlib_module_names}}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in allowed:
            raise ModuleNotFoundError("refused: " + name, name=name)

before = set(sys.modules)
sys.meta_path.insert(0, Refuse())

from contrast.losses import (
    AMCL, CACR, CWCL, BadPairs, DecoupledInfoNCE, HardContrastive, HardNegative, InfoNCE, SigLIP
)
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
added = sorted({{name.split(".")[0] for name in set(sys.modules) - before}})

try:
    import pandas
except ModuleNotFoundError as error:
    refusal = str(error)
print(json.dumps([added, refusal]))
"""
IMPORT = """
import json, sys
import numpy, torch

before = set(sys.modules)
import contrast, contrast.losses
of_losses = sorted({name.split(".")[0] for name in set(sys.modules) - before})
has_compiler = "torch._dynamo" in sys.modules
import contrast.models.backbones, contrast.models.heads, contrast.views.views, contrast.data.loader
assert contrast.data.SOURCES and contrast.data.loader.SAMPLERS and contrast.views.views.RECIPES
print(json.dumps([of_losses, has_compiler, sorted(sys.modules)]))
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def imported():
    """The modules that the losses add, whether torch's compiler is imported, and all modules after the registries."""
    return json.loads(run(IMPORT))


def test_every_loss_runs_with_torch_and_numpy_only():
    """Every other package is refused by an import hook."""
    added, refusal = json.loads(run(USE))
    assert refusal == "refused: pandas"
    assert set(added) - sys.stdlib_module_names <= {"contrast", "torch", "numpy"} | DEPENDENCIES_OF_TORCH


def test_importing_the_losses_adds_modules_of_contrast_and_the_standard_library_only(imported):
    of_losses, _, _ = imported
    assert set(of_losses) - sys.stdlib_module_names - {"torch", "numpy"} == {"contrast"}


def test_importing_the_losses_does_not_import_the_compiler_of_torch(imported):
    """torch._dynamo takes a second to import."""
    _, has_compiler, _ = imported
    assert not has_compiler


def test_importing_the_registries_of_the_trainer_imports_no_library_of_an_extra(imported):
    """`contrast list` reads these modules; each of the libraries takes up to seconds to import."""
    _, _, modules = imported
    assert not {"torchvision", "timm", "sklearn", "pandas", "aeon", "scipy", "PIL", "torch._dynamo"} & set(modules)


@pytest.mark.long
def test_importing_the_losses_takes_little_time_beyond_torch(capsys):
    """The bound is a requirement: the median of five processes."""
    code = (
        "import time, numpy, torch\nstart = time.perf_counter()\n"
        "from contrast.losses import InfoNCE\nprint(time.perf_counter() - start)"
    )
    seconds = statistics.median(float(run(code)) for _ in range(5))
    with capsys.disabled():
        print(f" {seconds:.3f} s beyond torch")
    assert seconds < 0.3
