"""Every registered loss in its main forms, with inputs for it; a loss without an explicit case gets a default one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from contrast.losses import LOSSES

DIMS = 4


@dataclass(frozen=True)
class Case:
    """A loss, the arguments of its constructor, and the inputs that it needs.

    Args:
        name: the loss in the registry.
        arguments: of its constructor.
        targets: True if it needs targets.
        extra: True if it needs extra candidates.
        sample: True if it needs indices in the data set.
        derivative: True if its gradient is the derivative of its value, as it is not with detached weights.
        pairs: True if it is defined on pairs; otherwise it has no anchors, labels, targets, extras or rows.
        rows: True if each anchor has a loss of its own.
        two_views: True if it takes exactly two views.
        plain_extra: True if extra candidates may be plain tensors.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    targets: bool = False
    extra: bool = False
    sample: bool = False
    derivative: bool = True
    pairs: bool = True
    rows: bool = True
    two_views: bool = False
    plain_extra: bool = True

    def __str__(self):
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.arguments.items())])

    def make(self):
        return LOSSES.build({"name": self.name, **self.arguments})

    def inputs(self, samples=5, views=2, *, seed=0, dtype=torch.float64, heads=None, **given):
        """Return `views` random tensors (two, if the loss takes no more) and the keyword arguments that it needs."""
        views = 2 if self.two_views else views
        generator = torch.Generator().manual_seed(seed)
        shape = (samples, DIMS) if heads is None else (heads, samples, DIMS)

        def random(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

        tensors = [random(*shape).requires_grad_() for _ in range(views)]
        if self.sample:
            given.setdefault("sample", torch.arange(samples))
        if self.targets:
            given.setdefault("targets", tuple(random(*shape) for _ in range(views)))
        if self.extra:
            given.setdefault("extra", [random(6, DIMS)])
        return tensors, given


_EXPLICIT = [
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
    Case("cacr", {"positive_prior": 0.1}),
    Case("cacr_multi_crop", {"temperature": 0.5}, targets=True, derivative=False),
    Case("cacr_multi_crop", {"cost": "euclidean"}, targets=True, derivative=False),
    Case("cacr_queue", targets=True, derivative=False),
    Case("cacr_queue", {"constant_weights": "all"}, targets=True, derivative=False),
    Case("cacr_queue", {"constant_weights": "none"}, targets=True),
    Case("cacr_rbf", rows=False),
    Case("cacr_rbf", {"cost_scale": 0.5, "repulsion_weight": 2.0}, targets=True, rows=False),
    Case("cwcl", {"temperature": 0.3}, two_views=True, plain_extra=False, derivative=False),
    Case("cwcl", {"learn_temperature": True}, two_views=True, plain_extra=False, derivative=False),
    Case("decoupled"),
    Case("decoupled", {"temperature": 0.3}, targets=True, extra=True),
    Case("decoupled", {"weighting": "von_mises_fisher"}, derivative=False),
    Case("hard_negative"),
    Case("hard_negative", {"temperature": 0.2, "hardness": 0.0, "positive_prior": 0.05}),
    Case("hard_negative", {"hardness": 2.0, "positive_prior": 0.0}, targets=True, extra=True),
    Case("hard_contrastive"),
    Case("hard_contrastive", {"temperature": 0.2, "hardest": 3}, targets=True, extra=True),
    Case("hard_contrastive", {"hardest": 0.5, "form": "simple"}),
    Case("siglip"),
    Case("siglip", {"scale": 5.0, "bias": -2.0, "learn": False}, targets=True, extra=True),
    Case("amcl", {"dim": DIMS, "hidden": 3}),
    Case("amcl", {"dim": DIMS, "form": "logsumexp", "network": "inner_product", "hidden": 3}),
    Case(
        "amcl",
        {
            "dim": DIMS,
            "form": "logsumexp",
            "hidden": 3,
            "regulariser_weight": 0.0,
            "positive_in_denominator": True,
        },
    ),
    Case("amcl", {"dim": DIMS, "network": "constant"}, targets=True, extra=True),
    Case("amcl_cosine", {"dim": DIMS, "hidden": 3}, targets=True),
    Case("amcl_barlow", {"dim": DIMS, "hidden": 3}, pairs=False, rows=False, two_views=True, plain_extra=False),
    Case("bad_pairs", {"loss": {"name": "info_nce"}, "samples": 64}, sample=True),
    Case(
        "bad_pairs",
        {
            "loss": {"name": "info_nce", "temperature": 0.2, "candidates": "across"},
            "samples": 64,
            "warmup_epochs": 0,
        },
        targets=True,
        sample=True,
    ),
    Case("false_negatives", {"loss": {"name": "info_nce"}, "relative_margin": 0.3}),
    Case("false_negatives", {"loss": {"name": "decoupled"}, "above": 0.2, "top": 1}, targets=True, extra=True),
    Case("false_negatives", {"loss": {"name": "siglip"}, "margin": 0.2}),
    Case("negative_cosine", targets=True),
]
_explicit_names = {case.name for case in _EXPLICIT}
CASES = [*_EXPLICIT, *(Case(name) for name in LOSSES if name not in _explicit_names)]
