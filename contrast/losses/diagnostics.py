"""Measurements of pairs for logging: similarities, counts, false negatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from contrast.core.embeddings import Embeddings
from contrast.core.pairs import Pairs
from contrast.core.reductions import Rule

SIDES: tuple[Literal["positive", "negative"], ...] = ("positive", "negative")


@torch.no_grad()
def similarities(pairs: Pairs, valid: Tensor) -> dict[str, Tensor]:
    """Compute the number of valid anchors, and the mean similarity and number of their positives and negatives.

    Args:
        pairs: N anchors and their candidates.
        valid: (N,) bool.
    """
    count_valid = valid.sum().clamp(min=1)
    measured = {"anchors": valid.sum().to(pairs.candidates[0].z.dtype)}
    for over in SIDES:
        mean, count = pairs.mean(over), pairs.count(over)
        if mean.ndim == 2:
            mean = mean.mean(dim=0)
        measured[f"{over}_similarity"] = torch.where(valid, mean, 0).sum() / count_valid
        measured[f"{over}s"] = torch.where(valid, count if count.ndim == 1 else count[0], 0).sum() / count_valid
    return measured


@torch.no_grad()
def false_negative_rates(prepared: Sequence[Pairs], labels: Tensor) -> dict[str, Tensor]:
    """Compute how many negatives have the anchor's label, which the loss does not use; {} without pairs.

    - "false_negatives": the share of the negatives, before any rule, that have the anchor's label;
    - "false_negatives_removed": the share of these that a rule leaves out;
    - "true_negatives_removed": the share of the other negatives that a rule leaves out.

    All are means over heads. Negatives without a label are not counted; a share of nothing is 0.

    Args:
        prepared: the pairs of one call.
        labels: (samples,) int64 by sample index, -1 for none.
    """
    if not prepared:
        return {}
    total = torch.zeros(2, 2, dtype=torch.float64, device=labels.device)
    for pairs in prepared:
        before = _false_and_true(pairs.without_rules(), labels)
        total += torch.stack([before, _false_and_true(pairs, labels) if pairs.rules else before])
    (false, true), (false_remaining, true_remaining) = total
    return {
        "false_negatives": false / (false + true).clamp(min=1),
        "false_negatives_removed": (false - false_remaining) / false.clamp(min=1),
        "true_negatives_removed": (true - true_remaining) / true.clamp(min=1),
    }


def _false_and_true(pairs: Pairs, labels: Tensor) -> Tensor:
    """Count the negatives that have the anchor's label, and the others: (2,) float64, averaged over heads."""
    totals = []
    for same in (True, False):
        # (N,), or (H, N) where a rule reads the heads' similarities.
        counts: Tensor = torch.atleast_2d(pairs.ignoring(_ignore_label(labels, same=not same)).count("negative"))  # type: ignore[no-untyped-call]
        totals.append(counts.double().mean(dim=0).sum())
    return torch.stack(totals).to(labels.device)


def _ignore_label(labels: Tensor, *, same: bool) -> Rule:
    """Return the rule that ignores candidates with the anchor's label (or with another one), and without a label."""

    def label_of(sample: Tensor) -> Tensor:
        known = (sample >= 0) & (sample < len(labels))
        return torch.where(known, labels.to(sample.device)[sample.clamp(0, len(labels) - 1)], -1)

    def rule(anchor: Embeddings, candidate: Embeddings, similarity: Tensor) -> Tensor:  # noqa: ARG001
        own, other = label_of(anchor.sample)[:, None], label_of(candidate.sample)
        return ((own == other) == same) | (own < 0) | (other < 0)

    return rule
