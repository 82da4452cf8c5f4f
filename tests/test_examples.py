"""The examples in the docstrings of the core and the losses run, and print what they say."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import contrast
from contrast import core, losses
from contrast.core.embeddings import Embeddings, normalise
from contrast.core.pairs import Pairs
from contrast.core.reductions import LogSumExp, Mean, backend
from contrast.losses import InfoNCE

NAMES = {
    "contrast": contrast,
    "torch": torch,
    "Embeddings": Embeddings,
    "normalise": normalise,
    "Pairs": Pairs,
    "LogSumExp": LogSumExp,
    "Mean": Mean,
    "backend": backend,
    "loss": InfoNCE(),
    "z_a": torch.randn(4, 8),
    "z_b": torch.randn(4, 8),
    **{name: getattr(losses, name) for name in losses.__all__},
}
MODULES = [
    importlib.import_module(found.name)
    for package in (core, losses)
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]
EXAMPLES = {
    example.name: example
    for module in MODULES
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__, extraglobs=NAMES)
    if example.examples
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_it_says(name):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(EXAMPLES[name]).failed == 0


def test_the_core_has_examples():
    assert {"contrast.core.pairs.Pairs", "contrast.core.embeddings.Embeddings"} <= EXAMPLES.keys()
