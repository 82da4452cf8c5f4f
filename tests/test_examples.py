"""The examples in the docstrings of the package run and print what they say, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import contrast
from contrast import losses
from contrast.core import embeddings, pairs, reductions
from contrast.losses import InfoNCE


def names():
    """Return what an example uses without importing it."""
    z_a, z_b = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    index = torch.arange(4)
    views = (
        embeddings.Embeddings(embeddings.normalise(z), index, index, torch.full_like(index, view))
        for view, z in enumerate((z_a, z_b))
    )
    return {
        "contrast": contrast,
        "torch": torch,
        "z_a": z_a,
        "z_b": z_b,
        "loss": InfoNCE(),
        "pairs": pairs.all_pairs(*views),
        **{name: getattr(embeddings, name) for name in ("Embeddings", "concatenate", "gather_all", "normalise")},
        **{name: getattr(pairs, name) for name in ("Pairs", "all_pairs", "cross_pairs", "two_sided")},
        **{name: getattr(reductions, name) for name in reductions.__all__},
        **{name: getattr(losses, name) for name in losses.__all__},
    }


NAMES = names()

MODULES = [contrast] + [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(contrast.__path__, "contrast.")
    if not found.name.endswith("__main__")
]
EXAMPLES = {
    example.name: example
    for module in MODULES
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__, extraglobs=NAMES)
    if example.examples
}


def public_objects():
    """Return the classes and functions that the package exports, by the name of the module that defines them.

    A name in an `__all__` that is neither a class nor a function is exempt, provided that its class, if that is the
    package's own (`Registry`, for example), has an example.
    """
    values = [getattr(module, name) for module in MODULES for name in getattr(module, "__all__", ())]
    values = [value if inspect.isclass(value) or inspect.isfunction(value) else type(value) for value in values]
    own = [value for value in values if value.__module__.partition(".")[0] == "contrast"]
    return {f"{value.__module__}.{value.__qualname__}": value for value in own}


PUBLIC = public_objects()


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run, for the examples that use one."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    return contrast.pretrain("digits", budget="2 steps", evaluate={"protocols": ["knn"]}, out=folder)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_it_says(name, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if any("run." in example.source for example in EXAMPLES[name].examples):
        EXAMPLES[name].globs["run"] = request.getfixturevalue("run")
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(EXAMPLES[name]).failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example(name):
    assert doctest.DocTestParser().get_examples(PUBLIC[name].__doc__ or "")
