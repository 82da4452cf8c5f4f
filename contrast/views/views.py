"""Views of a batch: operations in a row, one row a view, built from a recipe's name or from lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from contrast.core.registry import InputError, Registry

VIEWS = Registry("view operation")
RECIPES = Registry("recipe")
KINDS: dict[str, frozenset[str]] = {}
"""The kinds of data that a recipe is made for; a recipe that is not in here is judged by its operations."""

IMAGE = frozenset({"image"})
SERIES = frozenset({"series"})

Recipe = TypeVar("Recipe", bound=Callable[..., "Views"])


class Operation(nn.Module):
    """One random change of a batch, drawn anew for every sample on the batch's device.

    An operation leaves its input as it is, draws from the given generator only and never waits for the device.
    """

    kinds: ClassVar[frozenset[str]]
    """The kinds of data it is made for: "image" (N, C, H, W) in [0, 1], "series" (N, C, L) with NaN = not observed."""

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Give the changed batch, float32; the generator lives on x's device."""
        raise NotImplementedError

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Give the shape of one changed sample, for a sample of the given shape; raise where that cannot be."""
        return shape


class Compose(nn.Module):
    """Operations, one after the other."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        super().__init__()
        self.operations = nn.ModuleList(operations)

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Give the batch after all operations."""
        for operation in self.operations:
            x = operation(x, generator)
        return x

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Give the shape of one sample after all operations."""
        for operation in self.operations:
            if isinstance(operation, Operation):
                shape = operation.output_shape(shape)
        return shape


class Views(nn.Module):
    """Several views of every sample, each by its own row of operations.

    Args:
        views: one `Compose` a view; the same one may stand for several views, which are drawn independently.
    """

    def __init__(self, views: Sequence[Compose]) -> None:
        super().__init__()
        self.views = nn.ModuleList(views)

    def __len__(self) -> int:
        """Count the views."""
        return len(self.views)

    @torch.no_grad()
    def forward(self, x: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Give the V views of a batch in float32, also under autocast; no view shares memory with x."""
        with torch.autocast(x.device.type, enabled=False):
            views = [view(x, generator) for view in self.views]
        return [view.clone() if view is x else view for view in views]

    def output_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Give the shape of one sample in each view; raise an InputError where the operations do not fit it."""
        return [view.output_shape(shape) for view in self.views if isinstance(view, Compose)]


def recipe(name: str, *kinds: str, aliases: Sequence[str] = ()) -> Callable[[Recipe], Recipe]:
    """Give the decorator that enters a function under `name`, as a recipe for these kinds of data.

    The function gives `Views`; its keyword arguments are the schema of `views:` in a config. `shape`, the shape of one
    sample, and `kind` are filled in where the function has arguments of these names.
    """
    KINDS[name] = frozenset(kinds)
    return RECIPES.register(name, aliases=aliases)


def build_views(
    part: str | Mapping[str, Any] | Sequence[Any], shape: tuple[int, ...], kind: str, *, where: str = "views"
) -> Views:
    """Make the views of a config.

    Args:
        part: a recipe's name; {name: recipe, its arguments}; a list of operations, which makes two views; or a list of
            such lists, one a view.
        shape: the shape of one sample, (C, H, W) or (C, L).
        kind: "image" or "series".
        where: the key of the config, for messages.

    Raises:
        InputError: for unknown names and arguments, for what is made for another kind of data, and for an output size
            above the input's.
    """
    if isinstance(part, str | Mapping):
        views = _from_recipe(part, shape, kind, where)
    elif isinstance(part, Sequence) and part:
        views = _from_lists(part, kind, where)
    else:
        raise InputError(
            f"{where} must be a recipe's name, a mapping with a name, or a list of operations with at least one "
            f"entry (the recipe 'none' changes nothing); got {part!r}."
        )
    for view in views.views:
        for operation in view.operations if isinstance(view, Compose) else ():
            _check_kind(operation, kind, where)
    views.output_shapes(shape)
    return views


def _from_recipe(part: str | Mapping[str, Any], shape: tuple[int, ...], kind: str, where: str) -> Views:
    name = part if isinstance(part, str) else part.get("name")
    if name in VIEWS and name not in RECIPES:
        raise InputError(f"{where}: '{name}' is an operation, not a recipe; write a list of operations, [{name}, ...].")
    RECIPES.check(part, where=where)
    if kind not in KINDS.get(str(name), {kind}):
        fitting = [other for other in RECIPES if kind in KINDS.get(other, ())]
        raise InputError(
            f"{where}: the recipe '{name}' is for {_words(KINDS[str(name)])}, but the data are {_words({kind})}. "
            f"Recipes that fit: {', '.join(fitting)}."
        )
    views: Views = RECIPES.build(part, where=where, shape=shape, kind=kind)
    return views


def _from_lists(part: Sequence[Any], kind: str, where: str) -> Views:
    nested = [isinstance(entry, Sequence) and not isinstance(entry, str) for entry in part]
    if any(nested) != all(nested):
        raise InputError(f"{where} mixes operations and lists of operations; give one list, or one list for each view.")

    def compose(operations: Sequence[Any], where: str) -> Compose:
        built = []
        for index, operation in enumerate(operations):
            built.append(VIEWS.build(operation, where=f"{where}[{index}]"))
            _check_kind(built[-1], kind, f"{where}[{index}]")
        return Compose(built)

    if all(nested):
        return Views([compose(operations, f"{where}[{index}]") for index, operations in enumerate(part)])
    return Views([compose(part, where)] * 2)


def _check_kind(operation: nn.Module, kind: str, where: str) -> None:
    kinds = getattr(operation, "kinds", frozenset({kind}))
    if kind not in kinds:
        name = next((name for name, part in VIEWS.items() if part is type(operation)), type(operation).__name__)
        fitting = [name for name, part in VIEWS.items() if kind in getattr(part, "kinds", ())]
        raise InputError(
            f"{where}: the operation '{name}' is for {_words(kinds)}, but the data are {_words({kind})}. "
            f"Operations that fit: {', '.join(fitting)}."
        )


def _words(kinds: frozenset[str] | set[str]) -> str:
    return " and ".join({"image": "images"}.get(kind, kind) for kind in sorted(kinds))
