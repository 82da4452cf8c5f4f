"""The layers of the package: which part may import which, read from the source of every file."""

import ast
import sys
from pathlib import Path

import pytest

from contrast.losses import LOSSES

PACKAGE = Path(__file__).parents[1] / "contrast"

LOWEST = {"core.autograd", "core.distributed", "core.registry", "core.seeding", "core.text"}
CORE = LOWEST | {"core.embeddings", "core.reductions", "core.pairs"}
RETRIEVAL = {"retrieval", "retrieval.search", "retrieval.indices", "retrieval.kmeans"}
FOUNDATION = CORE | RETRIEVAL
ALONE = {"losses", "memory", "models", "data", "views"}
UNDER_TRAIN = FOUNDATION | ALONE | {"evaluation"}
UNDER_EXPERIMENT = UNDER_TRAIN | {"train", "report"}
COMMAND = {"experiment", "api", "cli"}

MAY_IMPORT = {
    **dict.fromkeys(LOWEST, frozenset()),
    "core": frozenset(),
    "core.embeddings": LOWEST,
    "core.reductions": LOWEST | {"core.embeddings"},
    "core.pairs": LOWEST | {"core.embeddings", "core.reductions"},
    "retrieval": RETRIEVAL,
    "retrieval.search": {"core.registry"},
    "retrieval.indices": {"core.registry", "retrieval.search"},
    "retrieval.kmeans": {"core.registry", "retrieval.search"},
    **dict.fromkeys(ALONE, FOUNDATION),
    "evaluation": FOUNDATION | {"models", "data"},
    "train": UNDER_TRAIN,
    "report": UNDER_TRAIN,
    "experiment": UNDER_EXPERIMENT,
    "api": UNDER_EXPERIMENT | {"experiment"},
    "cli": UNDER_EXPERIMENT | {"experiment", "api", "__init__"},
    "__main__": {"cli"},
    # `import contrast` is as light as `import contrast.losses`: all else is imported when it is first used.
    "__init__": FOUNDATION | {"losses", "memory"},
}
"""For each file or folder of the package, which others it may import besides itself."""

ONLY_IN = {
    "torch.distributed": {"core.distributed"},
    "faiss": {"retrieval.indices"},
    "lightning": COMMAND | {"train", "report"},
    "omegaconf": COMMAND,
}
"""Where a library may be imported."""

LIGHT = FOUNDATION | {"core", "losses", "memory", "__init__"}
"""What needs only torch and numpy."""

MAY_LACK = {"core.reductions": {"triton"}, "retrieval.indices": {"faiss"}}
"""Libraries that a light part uses where they are installed, and works without."""


def part_of(path):
    """Return the file or folder of the package that contains the path."""
    return module_of([part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts])


def module_of(names):
    """Return the part of the package that a dotted name belongs to: its first name; in core and retrieval the file."""
    file = ".".join(names[:2])
    return file if (names[0] == "core" and names[1:2] != ["__init__"]) or file in MAY_IMPORT else names[0]


FILES = sorted(PACKAGE.rglob("*.py"))


def imported(source):
    """Return every module that a source imports, with the imported names, except for imports for type checking only."""
    found = []

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            children = node.orelse
        else:
            children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)
        for child in children:
            visit(child)

    visit(ast.parse(source))
    return found


def wrong_imports(part, source):
    """Return a sentence for every import that the layers forbid."""
    wrong = []
    for module in imported(source):
        first, *rest = module.split(".")
        if first == "contrast":
            target = module_of(rest) if rest else "__init__"
            if target not in MAY_IMPORT[part] | {part}:
                wrong.append(f"{part} may not import {module}")
        for library, places in ONLY_IN.items():
            if f"{module}.".startswith(f"{library}.") and part not in places:
                wrong.append(f"{module} belongs in {', '.join(sorted(places))}")
        if part in LIGHT and first not in (
            {"contrast", "torch", "numpy", *sys.stdlib_module_names} | MAY_LACK.get(part, set())
        ):
            wrong.append(f"{part} needs only torch and numpy, not {module}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_layer_allows(path):
    part = part_of(path)
    assert part in MAY_IMPORT, f"add contrast/{part} to MAY_IMPORT"
    assert wrong_imports(part, path.read_text()) == []


LOSS_NAMES = {word for name, loss in LOSSES.items() for word in (name, loss.__name__)}

MAY_NAME_LOSSES = {"experiment/config.py"}
"""Files of the layers above the losses that name one: the default of the config."""


def losses_named(source):
    """Return the losses that a source names: as an identifier, an attribute, in an import, or as a text of its own."""
    fields = [field for node in ast.walk(ast.parse(source)) for field in ast.iter_fields(node)]
    return {word for _, text in fields if isinstance(text, str) for word in text.split(".")} & LOSS_NAMES


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if part_of(path) in ("train", "report", "experiment", "api", "cli")],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_a_file_above_the_losses_names_none(path):
    """What a loss needs and finds reaches training and the page of a run through the members of `Loss`."""
    if str(path.relative_to(PACKAGE)) not in MAY_NAME_LOSSES:
        assert losses_named(path.read_text()) == set()


@pytest.mark.parametrize(
    "source",
    [
        "from contrast.losses import BadPairs",
        "from contrast.losses.bad_pairs import MAX_REPORTED",
        "import contrast.losses.siglip as one",
        "isinstance(loss, losses.CACR)",
        "if config.loss == 'info_nce': pass",
        "def f(bad_pairs): pass",
        "f(cacr=1)",
    ],
)
def test_a_named_loss_is_found(source):
    assert losses_named(source)


def test_torch_distributed_is_named_in_one_file_only():
    for path in FILES:
        if part_of(path) != "core.distributed":
            assert "torch.distributed" not in path.read_text(), path


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("losses", "from contrast.train import module"),
        ("losses", "import timm"),
        ("losses", "def f():\n    import sklearn.metrics"),
        ("core.pairs", "import torch.distributed as dist"),
        ("models", "from torch import distributed"),
        ("models", "from torch.distributed import get_rank"),
        ("models", "from contrast.losses import CACR"),
        ("models", "from contrast import losses"),
        ("views", "import contrast.losses.cacr"),
        ("data", "from contrast.models.encoder import Encoder"),
        ("evaluation", "import lightning.pytorch as pl"),
        ("evaluation", "from contrast.losses import LOSSES"),
        ("train", "from omegaconf import OmegaConf"),
        ("train", "from contrast.experiment.config import Experiment"),
        ("memory", "import faiss"),
        ("retrieval", "import faiss"),
        ("retrieval.search", "def f():\n    import faiss"),
        ("retrieval.search", "from contrast.retrieval.indices import build_index"),
        ("retrieval.kmeans", "from contrast.retrieval import build_index"),
        ("retrieval.indices", "import sklearn"),
        ("core.embeddings", "from contrast.core.pairs import Pairs"),
        ("core.registry", "from contrast.core import distributed"),
        ("experiment", "from contrast.cli import main"),
        ("__init__", "from contrast.data import open_data"),
    ],
)
def test_a_forbidden_import_is_found(part, source):
    assert wrong_imports(part, source)


@pytest.mark.parametrize(
    ("part", "source"),
    [
        (
            "core.reductions",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from contrast.core.pairs import Pairs",
        ),
        ("losses", "import math\nimport numpy as np\nfrom contrast.core import distributed"),
        ("evaluation", "from contrast.data.dataset import Samples"),
        ("core.distributed", "import torch.distributed as dist"),
        ("retrieval.indices", "import faiss.contrib.torch_utils"),
        ("memory", "from contrast.retrieval import exact_search"),
        ("train", "import lightning"),
    ],
)
def test_an_allowed_import_passes(part, source):
    assert wrong_imports(part, source) == []


def drawing():
    """Return the layers as lines: number, part, and the parts that it imports, as they are in the source today."""
    imports = {}
    for path in FILES:
        names = [module.split(".")[1] for module in imported(path.read_text()) if module.startswith("contrast.")]
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        imports.setdefault(part, set()).update({name for name in names if (PACKAGE / name).is_dir() or name == "api"})
    layers = {}

    def layer_of(part):
        if part not in layers:
            layers[part] = 1 + max((layer_of(other) for other in imports[part] - {part}), default=-1)
        return layers[part]

    parts = sorted(imports.keys() - {"__init__", "__main__"}, key=lambda part: (layer_of(part), part))
    return "".join(f"{layers[part]}  {part:<10}  {' '.join(sorted(imports[part] - {part}))}\n" for part in parts)


def test_the_page_draws_the_layers_as_they_are(capsys):
    with capsys.disabled():
        print(f"\n{drawing()}", end="")
    page = (PACKAGE.parent / "docs" / "layout.md").read_text()
    assert f"```\n{drawing()}```" in page


def test_the_files_of_the_core_import_each_other_in_one_direction():
    """Also for the type checker alone: a circle means that two files are one."""
    imports = {}
    for path in sorted((PACKAGE / "core").rglob("*.py")):
        name = ".".join(["contrast", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        imports[name] = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names} | {
            node.module for node in nodes
        }
    assert "contrast.core.pairs" in imports
    done = []

    def visit(name, above):
        assert name not in above, f"a circle: {' -> '.join([*above, name])}"
        if name not in done:
            # A package is imported by its own files too, which is no circle: it comes last.
            for other in sorted((imports[name] & imports.keys()) - {name, name.rpartition(".")[0]}):
                visit(other, [*above, name])
            done.append(name)

    for name in imports:
        visit(name, [])
