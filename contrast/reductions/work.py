"""What every road is given: the tensors, the identities, and a place for the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from contrast import distributed
from contrast.embeddings import Embeddings
from contrast.reductions.asked import Reduction
from contrast.reductions.identity import Identity


@dataclass(eq=False)
class Work:
    """One call of `reduce`: N anchors, their candidates in parts, and what is asked of them.

    Args:
        anchor: N embeddings; z (N, D) or (H, N, D).
        candidates: the parts, z (M_k, D) or (H, M_k, D).
        across: whether candidates of the anchor's own view do not count.
        rules: what `Pairs.ignoring` added.
        identity: what the identities say.
        mirrored: how many of the first parts, one after the other, are the anchors themselves; 0 where they are not.
        asked: the reductions, their tensors without history.
        wanted: whether a gradient is wanted of the anchors, of each part, and of each (reduction, argument).
    """

    anchor: Embeddings
    candidates: Sequence[Embeddings]
    across: bool
    rules: tuple[tuple[Callable[..., Tensor], tuple[Tensor, ...]], ...]
    identity: Identity
    mirrored: int
    asked: list[Reduction]
    wants_anchor: bool = False
    wants_part: list[bool] = field(default_factory=list)
    wants_argument: set[tuple[int, str]] = field(default_factory=set)

    @property
    def x(self) -> Tensor:
        """The anchors' vectors."""
        return self.anchor.z

    @cached_property
    def heads(self) -> tuple[int, ...]:
        """(H,), or () without heads."""
        return tuple(self.x.shape[:-2])

    @cached_property
    def starts(self) -> list[int]:
        """Where each part starts among all candidates, and where the last one ends."""
        starts = [0]
        for part in self.candidates:
            starts.append(starts[-1] + len(part))
        return starts

    @property
    def wants_gradient(self) -> bool:
        """Whether there will be a backward pass."""
        return self.wants_anchor or any(self.wants_part) or bool(self.wants_argument)

    def new_rows(self, *more: int) -> Tensor:
        """Give zeros, (*more, N) or (*more, H, N)."""
        return self.x.new_zeros(*more, *self.heads, len(self.anchor))


class Gradients:
    """The gradients that the roads add to; each is made when it is first needed.

    Args:
        work: whose gradients.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self.anchor: Tensor | None = torch.zeros_like(work.x) if work.wants_anchor else None
        self.parts: list[Tensor | None] = [
            torch.zeros_like(part.z) if wanted else None
            for part, wanted in zip(work.candidates, work.wants_part, strict=True)
        ]
        self.arguments: dict[tuple[int, str], Tensor] = {
            (number, name): torch.zeros_like(getattr(work.asked[number], name)) for number, name in work.wants_argument
        }
        self.parameters: dict[int, Tensor] = {}

    def of_head(self, head: int, work: Work) -> Gradients:
        """Give the places of one head's gradients, as views; `work` is that of the head."""
        made = Gradients(
            replace(work, wants_anchor=False, wants_part=[False] * len(work.candidates), wants_argument=set())
        )
        made.anchor = self.anchor if self.anchor is None or self.anchor.ndim == 2 else self.anchor[head]
        made.parts = [part if part is None or part.ndim == 2 else part[head] for part in self.parts]
        return made

    def add_argument(self, number: int, name: str, gradient: Tensor, rows: slice, columns: slice) -> None:
        """Add the gradient of a tile of an argument, (..., n, m), to the rows and columns of it that were read."""
        place = spanned(self.arguments[number, name], rows, columns)
        place += gradient.sum_to_size(place.shape) if gradient.ndim >= place.ndim else gradient

    def add_parameter(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add the gradient of a parameter of a PairFunction."""
        known = self.parameters.get(id(parameter))
        self.parameters[id(parameter)] = gradient if known is None else known + gradient


def spanned(value: Tensor, rows: slice, columns: slice) -> Tensor:
    """Give the rows and columns of an argument that spans at most one of N and M, as a view of it."""
    if value.ndim and value.shape[-1] > 1:
        value = value[..., columns]
    if value.ndim > 1 and value.shape[-2] > 1:
        value = value[..., rows, :]
    return value


def nothing(dtype: torch.dtype) -> float:
    """Give the log-sum-exp over nothing."""
    return torch.finfo(dtype).min / 2


def learned(module: nn.Module) -> list[Tensor]:
    """Give what a PairFunction learns: its parameters, and tensors it holds that have a gradient of their own."""
    held = (value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor))
    return [value for value in (*module.parameters(), *held) if value.requires_grad]


def shared(tensor: Tensor) -> Tensor:
    """Give a learned tensor with its gradient averaged over the processes, if it is a parameter of a PairFunction."""
    return distributed.shared(tensor) if isinstance(tensor, nn.Parameter) else tensor
