"""Shared by the autograd functions of the core: full precision, saved tensors, first derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def full_precision(z: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off inside the block, on the device of `z`, if it is on."""
    device = z.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def product(a: Tensor, b: Tensor) -> Tensor:
    """Compute a b^T, (..., n, m), in full precision also where `backward()` is called inside an autocast block."""
    result: Tensor = _Product.apply(a, b)
    return result


class _Product(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gradient, (a, b) = gradients[0], saved(ctx)
        with full_precision(gradient):
            to_a = (gradient @ b).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None
            if not ctx.needs_input_grad[1]:
                return to_a, None
            if b.ndim == 2:  # broadcast over a: one product sums over the batch
                gradient, a = gradient.flatten(0, -2), a.flatten(0, -2)
            return to_a, (gradient.mT @ a).sum_to_size(b.shape)


CHANGED = (
    "a candidate changed between the loss and its backward pass, or a memory was updated: "
    "call a memory's update(...) after loss.backward()."
)


def saved(ctx: Any) -> tuple[Tensor, ...]:
    """Return the tensors that the forward pass saved.

    Raises:
        RuntimeError: if one of them was overwritten since then.
    """
    try:
        tensors: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(CHANGED) from error
    return tensors


def first_derivative(
    function: Callable[..., tuple[Tensor | None, ...]], inputs: Sequence[Tensor], *upstream: Tensor
) -> tuple[Tensor | None, ...]:
    """Return `function(*upstream)`, whose own derivative raises an error.

    torch's `once_differentiable` raises one too, but does not say what to do instead.

    Args:
        function: computes the gradients of the inputs from those of the outputs.
        inputs: the other tensors that the gradients depend on. They are passed so that a second derivative with
            respect to them raises, and is not silently 0.
        *upstream: the gradients of the outputs.

    Raises:
        RuntimeError: when the result is differentiated.
    """
    if not torch.is_grad_enabled():
        return function(*upstream)
    gradients: tuple[Tensor | None, ...] = _FirstDerivative.apply(function, len(inputs), *inputs, *upstream)
    return gradients


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(function: Callable[..., Any], count: int, *tensors: Tensor) -> Any:
        return function(*tensors[count:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save nothing: the backward pass raises."""

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        raise RuntimeError(
            "the reductions of Pairs have first derivatives only; for a second one (a gradient penalty, MAML) compute "
            "the loss inside `with contrast.core.reductions.backend('dense'):`."
        )
