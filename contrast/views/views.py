"""Views of a batch: a sequence of operations per view, built from a recipe's name or from lists.

This file has the registries, the base class of operations and the builder; the operations are in images.py and
series.py, the recipes in recipes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from contrast.core.registry import InputError, Registry

VIEWS = Registry("view operation")
"""The operations by name."""

RECIPES = Registry("recipe")
"""The recipes by name; `recipe` registers one."""

RECIPE_KINDS: dict[str, frozenset[str]] = {}
"""The kinds of data per recipe; for a recipe that is not in here, its operations decide."""

IMAGE = frozenset({"image"})
SERIES = frozenset({"series"})

Recipe = TypeVar("Recipe", bound=Callable[..., "Views"])


class Operation(nn.Module):
    """One random change of a batch, drawn independently per sample on the batch's device.

    An operation does not modify its input, draws from the given generator only and never synchronises with the device.

    Example:
        >>> class Shift(Operation):
        ...     kinds = SERIES
        ...     def forward(self, x, generator):
        ...         return x + torch.randn(len(x), 1, 1, generator=generator)
        >>> Shift()(torch.zeros(4, 2, 10), torch.Generator()).shape
        torch.Size([4, 2, 10])
    """

    kinds: ClassVar[frozenset[str]]
    """The supported kinds of data: "image" (N, C, H, W) in [0, 1], "series" (N, C, L) with NaN = not observed."""

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the changed batch, float32; the generator is on x's device."""
        raise NotImplementedError

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of one changed sample for that of one sample; raise an InputError if it does not fit."""
        return shape


class Compose(nn.Module):
    """Operations applied one after the other.

    Args:
        operations: in the order in which they are applied.

    Example:
        >>> from contrast.views import images
        >>> compose = Compose([images.RandomResizedCrop(size=16), images.HorizontalFlip()])
        >>> compose(torch.rand(4, 3, 32, 32), torch.Generator().manual_seed(0)).shape
        torch.Size([4, 3, 16, 16])
    """

    def __init__(self, operations: Sequence[Operation]) -> None:
        super().__init__()
        self.operations = nn.ModuleList(operations)

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the batch after all operations."""
        for operation in self.operations:
            x = operation(x, generator)
        return x

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of one sample after all operations."""
        for operation in self.operations:
            if isinstance(operation, Operation):
                shape = operation.output_shape(shape)
        return shape


class Views(nn.Module):
    """Several views of every sample, each by its own sequence of operations.

    Args:
        views: one `Compose` per view; the same one may be used for several views, which are drawn independently.

    Example:
        >>> from contrast.views import series
        >>> views = Views([Compose([series.Jitter(0.1)]), Compose([])])
        >>> first, second = views(torch.ones(4, 2, 10), torch.Generator().manual_seed(0))
        >>> len(views), bool((first == 1).all()), bool((second == 1).all())
        (2, False, True)
    """

    def __init__(self, views: Sequence[Compose]) -> None:
        super().__init__()
        self.views = nn.ModuleList(views)

    def __len__(self) -> int:
        """Return the number of views."""
        return len(self.views)

    @torch.no_grad()
    def forward(self, x: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Return the V views of a batch in float32, also under autocast; no view shares memory with x."""
        with torch.autocast(x.device.type, enabled=False):
            views = [view(x, generator) for view in self.views]
        return [view.clone() if view is x else view for view in views]

    def output_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the shape of one sample in each view; raise an InputError if the operations do not fit it."""
        return [view.output_shape(shape) for view in self.views if isinstance(view, Compose)]


def recipe(name: str, *kinds: str, aliases: Sequence[str] = ()) -> Callable[[Recipe], Recipe]:
    """Return the decorator that registers a function as the recipe `name` for these kinds of data.

    The function returns `Views`; its keyword arguments are the schema of `views:` in a config. `shape`, the shape of
    one sample, and `kind` are filled in if the function has arguments of these names.

    Args:
        name: of the recipe.
        *kinds: "image", "series" or both.
        aliases: names that are answered with the right one.

    Example:
        >>> from contrast.views import recipes  # where @recipe("none", "image", "series") decorates the function none
        >>> RECIPES["none"] is recipes.none, sorted(RECIPE_KINDS["none"])
        (True, ['image', 'series'])
    """
    RECIPE_KINDS[name] = frozenset(kinds)
    return RECIPES.register(name, aliases=aliases)


def build_views(
    part: str | Mapping[str, Any] | Sequence[Any], shape: tuple[int, ...], kind: str, *, where: str = "views"
) -> Views:
    """Return the views that a config describes.

    Args:
        part: a recipe's name; {name: recipe, its arguments}; a list of operations, which makes two views; or a list of
            such lists, one per view.
        shape: the shape of one sample, (C, H, W) or (C, L).
        kind: "image" or "series".
        where: the key of the config, for messages.

    Raises:
        InputError: for unknown names and arguments, for a recipe or operation of another kind of data, and for an
            output size above the input's.

    Example:
        >>> views = build_views(["horizontal_flip", {"name": "solarise", "p": 0.5}], shape=(3, 32, 32), kind="image")
        >>> [view.shape for view in views(torch.rand(4, 3, 32, 32), torch.Generator())]
        [torch.Size([4, 3, 32, 32]), torch.Size([4, 3, 32, 32])]
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
            _check_operation_kind(operation, kind, where)
    views.output_shapes(shape)
    return views


def _from_recipe(part: str | Mapping[str, Any], shape: tuple[int, ...], kind: str, where: str) -> Views:
    name = part if isinstance(part, str) else part.get("name")
    if name in VIEWS and name not in RECIPES:
        raise InputError(f"{where}: '{name}' is an operation, not a recipe; write a list of operations, [{name}, ...].")
    RECIPES.check(part, where=where)
    if kind not in RECIPE_KINDS.get(str(name), {kind}):
        fitting = [other for other in RECIPES if kind in RECIPE_KINDS.get(other, ())]
        raise InputError(
            f"{where}: the recipe '{name}' is for {_kind_text(RECIPE_KINDS[str(name)])}, but the data are "
            f"{_kind_text({kind})}. Recipes that fit: {', '.join(fitting)}."
        )
    views: Views = RECIPES.build(part, where=where, shape=shape, kind=kind)
    return views


def _from_lists(part: Sequence[Any], kind: str, where: str) -> Views:
    nested = [isinstance(entry, Sequence) and not isinstance(entry, str) for entry in part]
    if any(nested) != all(nested):
        raise InputError(f"{where} mixes operations and lists of operations; write one list, or one list per view.")

    def compose(operations: Sequence[Any], where: str) -> Compose:
        built = []
        for index, operation in enumerate(operations):
            built.append(VIEWS.build(operation, where=f"{where}[{index}]"))
            _check_operation_kind(built[-1], kind, f"{where}[{index}]")
        return Compose(built)

    if all(nested):
        return Views([compose(operations, f"{where}[{index}]") for index, operations in enumerate(part)])
    return Views([compose(part, where)] * 2)


def _check_operation_kind(operation: nn.Module, kind: str, where: str) -> None:
    kinds = getattr(operation, "kinds", frozenset({kind}))
    if kind not in kinds:
        name = next((name for name, part in VIEWS.items() if part is type(operation)), type(operation).__name__)
        fitting = [name for name, part in VIEWS.items() if kind in getattr(part, "kinds", ())]
        raise InputError(
            f"{where}: the operation '{name}' is for {_kind_text(kinds)}, but the data are {_kind_text({kind})}. "
            f"Operations that fit: {', '.join(fitting)}."
        )


def _kind_text(kinds: frozenset[str] | set[str]) -> str:
    return " and ".join({"image": "images"}.get(kind, kind) for kind in sorted(kinds))
