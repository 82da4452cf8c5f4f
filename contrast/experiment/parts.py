"""The kinds of parts: the config's key of each, its registry, and the facts of a run that its constructors may use.

A part is what a config names: a loss, a backbone, a view. A fact is a value that is known only when the run is built,
such as the number of samples. Config, builder, `contrast list` and the documentation read this one table.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contrast.core.registry import InputError, Registry
from contrast.data.loader import SAMPLERS
from contrast.evaluation.protocols import PROTOCOLS
from contrast.losses import LOSSES
from contrast.memory import MEMORIES
from contrast.models.backbones import BACKBONES
from contrast.models.heads import HEADS
from contrast.train.optimizers import OPTIMIZERS
from contrast.views.views import RECIPES, VIEWS

Part = Mapping[str, Any] | str
"""A part in a config: {name: ..., its constructor's arguments}, or a bare name."""


@dataclass(frozen=True)
class Kind:
    """One kind of parts.

    Args:
        key: the dotted key of the config that has a part of this kind.
        title: its heading in `contrast list`.
        registry: name -> class or function.
        many: whether the key has a list of parts.
        facts: names of values that are known only when the run is built. A constructor that has a parameter of such a
            name gets the value, unless the config gives one.
        constructed_early: True to construct the parts that need no fact when the config is checked, so that a value
            that a constructor refuses is found before any data is read.
    """

    key: str
    title: str
    registry: Registry
    many: bool = False
    facts: Sequence[str] = ()
    constructed_early: bool = False

    def build(self, part: Part, *, where: str = "", **facts: Any) -> Any:
        """Construct a part; of the facts, it gets those of its kind that its constructor has a parameter for.

        Args:
            part: a name, or {name: ..., its arguments}.
            where: the key for messages; that of the kind where it is not given.
            **facts: values by name.

        Raises:
            InputError: naming the key, for an unknown name, a wrong argument, or a value that is refused.
        """
        known = {name: value for name, value in facts.items() if name in self.facts}
        return self.registry.build(part, where=where or self.key, **known)


_OF_DATA = ("samples", "classes")

KINDS = {
    kind.key: kind
    for kind in (
        Kind("views", "views", RECIPES),
        Kind("encoder.backbone", "backbones", BACKBONES, facts=("channels", "shape")),
        Kind("encoder.head", "heads", HEADS, facts=("width",)),
        Kind("encoder.predictor", "heads", HEADS, facts=("width",)),
        Kind(
            "loss",
            "losses",
            LOSSES,
            facts=(*_OF_DATA, "dim", "epochs"),
            constructed_early=True,
        ),
        Kind(
            "memory",
            "memory",
            MEMORIES,
            many=True,
            facts=(*_OF_DATA, "dim", "heads", "reference_dim", "bank", "store", "seed"),
        ),
        Kind("sampler", "samplers", SAMPLERS, facts=_OF_DATA, constructed_early=True),
        Kind("optimizer", "optimizers", OPTIMIZERS, facts=("epochs",), constructed_early=True),
        Kind(
            "evaluate.protocols",
            "protocols",
            PROTOCOLS,
            many=True,
            facts=("classes", "draws", "labels_per_class"),
            constructed_early=True,
        ),
    )
}
"""Every kind of parts by its key."""

_FURTHER = {
    "backbones": {
        "timm:NAME": "any network of timm",
        "torchvision:NAME": "any classification network of torchvision",
        "module:function": "a function or class of your own that returns an nn.Module",
    }
}


def listing() -> dict[str, dict[str, str]]:
    """Return what `contrast list` prints of the parts: title -> name -> the first line of its docstring."""
    lists: dict[str, dict[str, str]] = {}
    for kind in KINDS.values():
        lists.setdefault(kind.title, described(kind.registry) | _FURTHER.get(kind.title, {}))
    lists["views"] |= {f"- {name}": line for name, line in described(VIEWS).items()}
    return lists


def described(registry: Registry) -> dict[str, str]:
    """Return the first line of each part's docstring by name."""
    return {name: (registry[name].__doc__ or "").strip().partition("\n")[0] for name in registry}


def import_plugins(files: Sequence[Any]) -> None:
    """Import the user's own parts, which register themselves.

    Args:
        files: `.py` files or names of modules; each is imported once.

    Raises:
        InputError: for what cannot be imported.
    """
    for file in map(str, files):
        try:
            if file.endswith(".py"):
                _import_file(Path(file).resolve())
            else:
                importlib.import_module(file)
        except (FileNotFoundError, ModuleNotFoundError) as error:
            raise InputError(f"plugins: {file} cannot be imported: {error}.") from None
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            place = "" if isinstance(error, SyntaxError) else f" in {Path(line.filename).name}, line {line.lineno}"
            reason = f"{type(error).__name__}{place}: {error}"
            raise InputError(f"plugins: {file} cannot be imported ({reason}).") from error


def _import_file(path: Path) -> None:
    # Files in two folders may have the same name.
    name = f"contrast_plugin_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
