"""Optimisers by name, and the schedule of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from contrast.core.registry import Registry

OPTIMIZERS = Registry("optimizer")
"""Optimisers by name."""


@dataclass(frozen=True)
class Optimizer:
    """What every optimiser has: a learning rate that warms up and falls along a cosine to zero.

    Args:
        lr: the highest learning rate; it is not scaled by the batch size behind your back.
        weight_decay: shrinks weights; biases and the parameters of normalisation layers are left alone.
        warmup: the share of the budget in which the learning rate rises from zero, in [0, 1).

    Raises:
        ValueError: for a value out of its range.
    """

    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup: float = 0.05

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0; got {self.lr}.")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be 0 or more; got {self.weight_decay}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(
                f"warmup is a share of the budget, in [0, 1); got {self.warmup}. "
                f"For {self.warmup:g} epochs write {self.warmup:g} / the budget's epochs."
            )

    def learning_rate(self, progress: float) -> float:
        """Give the learning rate once this share of the budget, in [0, 1], is spent."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))

    def build(self, modules: Iterable[nn.Module]) -> torch.optim.Optimizer:
        """Make the torch optimiser over the parameters of `modules` that take a gradient."""
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.ndim > 1]
        vectors = [p for p in parameters if p.ndim <= 1]
        return self.over(
            [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        )

    def over(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        """Make the torch optimiser over these parameter groups."""
        raise NotImplementedError


@OPTIMIZERS.register("adamw", aliases=("adam",))
@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017, arXiv:1711.05101).

    Args:
        betas: decay of the running mean and of the running square of the gradient.
    """

    betas: tuple[float, float] = (0.9, 0.999)

    def over(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        """Make torch's AdamW."""
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas)


@OPTIMIZERS.register("sgd")
@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum.

    Args:
        momentum: share of the last step that is kept, in [0, 1).
        nesterov: whether to look ahead.
    """

    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_momentum(self.momentum, nesterov=self.nesterov)

    def over(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        """Make torch's SGD."""
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


@OPTIMIZERS.register("lars")
@dataclass(frozen=True)
class LARS(Optimizer):
    """Layer-wise adaptive rates for large batches (You et al. 2017, arXiv:1708.03888), timm's implementation.

    Args:
        momentum: share of the last step that is kept, in [0, 1).
        trust: the step of a layer relative to the size of its weights.
    """

    lr: float = 0.3
    weight_decay: float = 1e-6
    momentum: float = 0.9
    trust: float = field(default=0.001)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_momentum(self.momentum)

    def over(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        """Make timm's Lars; biases and normalisation layers take plain steps."""
        from timm.optim.lars import Lars

        made: torch.optim.Optimizer = Lars(groups, lr=self.lr, momentum=self.momentum, trust_coeff=self.trust)
        return made


def _check_momentum(momentum: float, *, nesterov: bool = False) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is the share of the last step that is kept, in [0, 1); got {momentum}.")
    if nesterov and momentum == 0:
        raise ValueError("nesterov looks ahead along the momentum, which is 0; give a momentum, or leave nesterov out.")
