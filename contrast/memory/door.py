"""The door of a memory: what it is given fits, and knows whose it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrast.core.embeddings import REMEMBERED, Embeddings, normalise


class Width(NamedTuple):
    """What one remembered embedding is made of.

    Args:
        dim: D.
        heads: H, None for plain (N, D) embeddings.
        reference_dim: R of the frozen tower's vectors, None where they are not remembered.
    """

    dim: int
    heads: int | None = None
    reference_dim: int | None = None

    @property
    def bytes(self) -> int:
        """Bytes of an embedding and its reference, in float32."""
        return 4 * (self.dim * (self.heads or 1) + (self.reference_dim or 0))

    def zeros(self, rows: int) -> dict[str, Tensor]:
        """Give room for so many."""
        heads = () if self.heads is None else (self.heads,)
        held = {"z": torch.zeros(*heads, rows, self.dim)}
        if self.reference_dim is not None:
            held["reference"] = torch.zeros(rows, self.reference_dim)
        return held

    def check(self) -> None:
        """Refuse widths that nothing has."""
        for name, width in self._asdict().items():
            if width is not None and width < 1:
                raise ValueError(f"{name} must be 1 or more; got {width}.")

    def embeddings(
        self,
        embeddings: Embeddings | Tensor,
        sample: Tensor | None,
        group: Tensor | None,
        reference: Tensor | None,
    ) -> Embeddings:
        """Give this process's rows as they will be remembered, checked at the door."""
        if isinstance(embeddings, Embeddings):
            if sample is not None or group is not None or reference is not None:
                raise ValueError("Embeddings bring their sample, group and reference; give these with plain tensors.")
            made = embeddings.detach()
        else:
            made = _named(embeddings, sample, group, reference)
        z, given = made.z, made.reference
        heads = z.shape[0] if z.ndim == 3 else None
        if (z.shape[-1], heads) != (self.dim, self.heads):
            raise ValueError(f"this memory holds {self._words(self.dim, self.heads)}; got {tuple(z.shape)}.")
        if self.reference_dim is not None and (given is None or given.shape[1] != self.reference_dim):
            raise ValueError(
                f"this memory holds reference vectors (N, {self.reference_dim}); got "
                f"{'none: give update(..., reference=...)' if given is None else tuple(given.shape)}."
            )
        if z.device.type == "cpu" and len(made):
            if made.sample.min() < 0:
                raise ValueError(
                    "a memory knows its entries by their samples: update(z, sample=index) takes indices in the data "
                    f"set, from 0; got {int(made.sample.min())}."
                )
            if not torch.isfinite(z).all():
                raise ValueError("embeddings to remember hold values that are not finite (NaN or inf).")
        return Embeddings(
            z.float(),
            made.sample,
            made.group,
            torch.full_like(made.view, REMEMBERED),
            None if given is None or self.reference_dim is None else given.detach().float(),
        )

    @staticmethod
    def _words(dim: int, heads: int | None) -> str:
        return f"(N, {dim}) embeddings" if heads is None else f"({heads}, N, {dim}) embeddings"


def _named(z: Tensor, sample: Tensor | None, group: Tensor | None, reference: Tensor | None) -> Embeddings:
    if not isinstance(z, Tensor) or not z.is_floating_point() or z.ndim not in (2, 3):
        got = f"{z.dtype} of shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"update takes Embeddings, or a floating (N, D) or (H, N, D) tensor; got {got}.")
    if sample is None:
        raise ValueError(
            "a memory knows its entries by their samples: call update(z, sample=index) with indices in the data set."
        )
    sample = sample.to(z.device)
    group = sample if group is None else group.to(z.device)
    reference = None if reference is None else normalise(reference.detach())
    return Embeddings(normalise(z.detach()), sample, group, torch.full_like(sample, REMEMBERED), reference)


def refuse_unknown(anchor: Embeddings, *, first: bool) -> None:
    """Refuse anchors without real sample indices, whose own remembered entries would be their negatives.

    Args:
        anchor: the anchors.
        first: whether nothing was remembered yet; later, looking would make every step wait for another device.
    """
    if torch.compiler.is_compiling() or not (first or anchor.z.device.type == "cpu"):
        return
    if bool(((anchor.sample < 0) & (anchor.view >= 0)).any()):
        raise ValueError(
            "a memory must know whose anchors these are, or their own entries become their negatives: call "
            "loss(..., sample=index, extra=[memory]) with indices in the data set."
        )


def refuse_other(expected: dict[str, Any], state: dict[str, Any], what: str) -> None:
    """Refuse the state of a memory that was made with other arguments."""
    for name, value in expected.items():
        if state.get(name) != value:
            raise ValueError(
                f"this {what} has {name} {value} and the checkpoint's has {state.get(name)}; make it with the same."
            )
