"""What every road is given: the tensors, the identities, and a place for the gradients."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from contrast.core import distributed
from contrast.core.embeddings import Embeddings
from contrast.core.reductions.asked import Reduction

if TYPE_CHECKING:
    from contrast.core.pairs import Pairs


WIDEST = {torch.float32: 75.0, torch.float64: 650.0}
"""exp(x), and sums of a hundred thousand of them, are normal numbers for |x| up to this."""


CHANGED = (
    "a candidate changed between the loss and its backward pass: call a memory's update(...) after loss.backward()."
)


class Once:
    """Whether a way back was gone, after which its history may be free.

    Args:
        held: tensors that must not be written to before.
    """

    def __init__(self, held: Sequence[Tensor] = ()) -> None:
        self.used = False
        self._held = [(tensor, tensor._version) for tensor in held]

    def use(self) -> None:
        """Go back.

        Raises:
            RuntimeError: where a tensor was written to since.
        """
        self.used = True
        if any(tensor._version != version for tensor, version in self._held):
            raise RuntimeError(CHANGED)


class Work:
    """One call of `reduce`: N anchors, their candidates in parts, and what is asked of them.

    Args:
        pairs: who meets whom.
        asked: the reductions, their tensors without history.
        x: the anchors' vectors, (N, D) or (H, N, D), without history, in float32 or better.
        parts: those of each part, (M_k, D) or (H, M_k, D).
        wants: whether a gradient is wanted of the anchors and of each part.
        wants_argument: the (reduction, argument) of which a gradient is wanted.
    """

    def __init__(
        self,
        pairs: Pairs,
        asked: list[Reduction],
        x: Tensor,
        parts: Sequence[Tensor],
        wants: Sequence[bool],
        wants_argument: set[tuple[int, str]],
    ) -> None:
        self.pairs, self.asked = pairs, asked
        self.x, self.parts = x, parts
        self.across, self.rules, self.identity = pairs.across, pairs.rules, pairs.identity
        self.heads = tuple(x.shape[:-2])
        self.mirrored = pairs.mirrored
        self.wants_anchor, self.wants_part, self.wants_argument = wants[0], list(wants[1:]), wants_argument
        self.wants_part[: self.mirrored] = [self.wants_anchor] * self.mirrored
        self.starts = list(itertools.accumulate((part.shape[-2] for part in parts), initial=0))

    @property
    def unit(self) -> bool:
        """Whether no vector is known to be longer than 1, so that no similarity is beyond 1, but for rounding."""
        return self.pairs.anchor.unit and all(part.unit for part in self.pairs.candidates)

    @cached_property
    def anchor(self) -> Embeddings:
        """The anchors without history."""
        return self.pairs.anchor.holding(self.x, direct=None)

    @cached_property
    def candidates(self) -> list[Embeddings]:
        """The parts without history."""
        return [part.holding(z, direct=None) for part, z in zip(self.pairs.candidates, self.parts, strict=True)]

    def fixed(self, start: int, stop: int) -> bool:
        """Say whether nobody asks for the gradient of these anchors, known where they are the candidates too."""
        parts = zip(self.pairs.candidates[: self.mirrored], self.starts, strict=False)
        met = [part.fixed for part, first in parts if first < stop and first + len(part) > start]
        return bool(met) and all(met)

    def new_rows(self, *more: int) -> Tensor:
        """Give zeros, (*more, N) or (*more, H, N)."""
        return self.x.new_zeros(*more, *self.x.shape[:-1])


class Gradients:
    """The gradients that the roads add to; each is made when it is first needed.

    Args:
        work: whose gradients.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self.anchor: Tensor | None = None
        if work.wants_anchor:
            # What nobody asks for is not written to; of these zeros only what is takes memory.
            sparse = work.x.device.type == "cpu" and any(part.fixed for part in work.pairs.candidates[: work.mirrored])
            self.anchor = untouched_zeros(work.x) if sparse else torch.zeros_like(work.x)
        self.arguments: dict[tuple[int, str], Tensor] = {
            (number, name): torch.zeros_like(getattr(work.asked[number], name)) for number, name in work.wants_argument
        }
        self.parameters: dict[int, Tensor] = {}

    @cached_property
    def parts(self) -> list[Tensor | None]:
        """The gradients of the parts that somebody asks for; anchors' that are candidates are views of their own."""
        work = self._work
        made: list[Tensor | None] = []
        for k, (part, wanted) in enumerate(zip(work.parts, work.wants_part, strict=True)):
            if k < work.mirrored and self.anchor is not None:
                own = self.anchor[..., work.starts[k] : work.starts[k + 1], :]
                made.append(None if work.pairs.candidates[k].fixed else own)
            else:
                made.append(torch.zeros_like(part) if wanted else None)
        return made

    def of_head(self, head: int | None) -> Gradients:
        """Give the places of one head's gradients, as views."""
        if head is None:
            return self
        made = copy.copy(self)
        made.anchor = None if self.anchor is None else self.anchor[head]
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


def untouched_zeros(like: Tensor) -> Tensor:
    """Give zeros, as `like`, that the system provides where they are first read or written."""
    return torch.from_numpy(np.zeros(like.shape, torch.empty(0, dtype=like.dtype).numpy().dtype))


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


def saved(ctx: Any) -> tuple[Tensor, ...]:
    """Give what the forward pass saved.

    Raises:
        RuntimeError: where a candidate was written to since.
    """
    try:
        found: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(CHANGED) from error
    return found


def shared(tensor: Tensor) -> Tensor:
    """Give a learned tensor with its gradient averaged over the processes, if it is a parameter of a PairFunction."""
    return distributed.shared(tensor) if isinstance(tensor, nn.Parameter) else tensor


def first_only(
    function: Callable[..., tuple[Tensor | None, ...]], inputs: Sequence[Tensor], *upstream: Tensor
) -> tuple[Tensor | None, ...]:
    """Give the gradients that `function` makes of `upstream`; who asks for their derivative reads a sentence.

    Args:
        function: the gradients, from those of the outputs.
        inputs: what the gradients depend on besides.
        *upstream: the gradients of the outputs.
    """
    if not torch.is_grad_enabled():
        return function(*upstream)
    found: tuple[Tensor | None, ...] = _FirstOnly.apply(function, len(inputs), *inputs, *upstream)
    return found


class _FirstOnly(torch.autograd.Function):
    @staticmethod
    def forward(function: Callable[..., Any], count: int, *tensors: Tensor) -> Any:
        return function(*tensors[count:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept: there is no way back."""

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        raise RuntimeError(
            "the reductions of Pairs have first derivatives only; for a second one (a gradient penalty, MAML) compute "
            "the loss inside `with contrast.core.reductions.road('dense'):`."
        )
