"""Every registered loss in the forms that matter, with inputs that fit; a new loss gets a case without being named."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from contrast.losses import LOSSES

DIMS = 4


@dataclass(frozen=True)
class Case:
    """A loss, its arguments, and what its inputs must hold.

    Args:
        name: the loss in the registry.
        arguments: its constructor's.
        targets: whether it asks for targets.
        extra: whether it asks for extra candidates.
        derivative: whether its gradient is the derivative of its value, which detached weights are not.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    targets: bool = False
    extra: bool = False
    derivative: bool = True

    def __str__(self):
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.arguments.items())])

    def make(self):
        return LOSSES.build({"name": self.name, **self.arguments})

    def inputs(self, samples=5, views=2, *, seed=0, dtype=torch.float64, heads=None, **given):
        """Give `views` random tensors and the keywords that this loss asks for, besides those given."""
        generator = torch.Generator().manual_seed(seed)
        shape = (samples, DIMS) if heads is None else (heads, samples, DIMS)

        def random(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

        tensors = [random(*shape).requires_grad_() for _ in range(views)]
        if self.targets:
            given.setdefault("targets", tuple(random(*shape) for _ in range(views)))
        if self.extra:
            given.setdefault("extra", [random(6, DIMS)])
        return tensors, given


_KNOWN = [
    Case("info_nce"),
    Case("info_nce", {"temperature": 0.5, "positives": "inside"}),
    Case("info_nce", {"temperature": 0.5, "positives": "alone"}),
    Case("info_nce", {"temperature": 0.2, "learn_temperature": True}),
    Case("info_nce", {"temperature": 0.2, "candidates": "across"}),
    Case("info_nce", {"temperature": 0.2, "candidates": "across", "learn_temperature": True}, targets=True),
    Case("info_nce", {"temperature": 0.2, "candidates": "memory"}, targets=True, extra=True),
    Case("info_nce", {"temperature": 0.2, "candidates": "memory", "positives": "alone"}, extra=True),
    Case("cacr"),
    Case("cacr", {"attraction_scale": 2.0, "repulsion_scale": 3.0, "repulsion": "all"}),
    Case("cacr", {"attraction_weight": 0.7, "repulsion_weight": 1.3}, targets=True),
    Case("cacr", {"detach_weights": True}, derivative=False),
    Case("negative_cosine", targets=True),
]
_named = {case.name for case in _KNOWN}
CASES = [*_KNOWN, *(Case(name) for name in LOSSES if name not in _named)]
