"""The base classes of memories: what every memory can do, and what those that store embeddings share."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrast.core.embeddings import REMEMBERED, UNLABELLED, Embeddings, normalise
from contrast.core.registry import Registry
from contrast.retrieval import Found, Index, exact_search

MEMORIES = Registry("memory")
"""Every memory by name."""


class Memory(nn.Module):
    """A source of further candidates, or of other positives; `extra=` of a loss takes it, in any training loop.

    A subclass defines `candidates` or `positives`, and `update`. What a checkpoint has to contain of it are the tensors
    in `tensors` and the attributes named in `counters`; `state_dict()` contains them, and `load_state_dict()` restores
    them on the memory's device, or raises a ValueError where tensors differ in shape or type or an attribute named in
    `fixed` differs; a tensor without rows takes those of the checkpoint. The tensors are neither parameters nor
    buffers: they move with the module from device to device, but a cast does not change them and
    DistributedDataParallel does not broadcast them. A tensor or array in any other attribute, or a module in a
    container, which no checkpoint would contain, raises a TypeError on assignment, or in `state_dict()` if it was added
    to a container later; parameters and buffers are allowed.

    Attributes:
        tensors: the tensors of the memory by name.
        counters: names of attributes that change during training: numbers, texts, and lists or dicts of them. A
            subclass lists only its own; those of its base classes are added.
        fixed: names of attributes that must be the same in the memory that loads a checkpoint; as `counters`.
        updates: number of updates so far; a counter.

    Example:
        >>> class ClassMeans(contrast.memory.Memory):
        ...     def __init__(self, classes: int, dim: int) -> None:
        ...         super().__init__()
        ...         self.tensors["mean"] = torch.zeros(classes, dim)
        >>> list(ClassMeans(3, dim=8).state_dict()["_extra_state"]["tensors"])
        ['mean']
    """

    counters: ClassVar[tuple[str, ...]] = ("updates",)
    fixed: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        self.updates = 0

    def candidates(self, anchor: Embeddings) -> Embeddings:
        """Return M >= 0 candidates for these anchors, (M, D) or (H, M, D), the same on every process.

        Their view is REMEMBERED.
        """
        return anchor[:0].detach()

    def positives(self, anchor: Embeddings) -> Embeddings | None:  # noqa: ARG002
        """Return (N, D) stored vectors that become the anchors; None: keep the anchors.

        They have the anchors' sample, group and view; the encoder's own embeddings become their targets.
        """
        return None

    def update(
        self,
        embeddings: Embeddings | Tensor,
        *,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> None:
        """Store embeddings of one view; every process calls it, after the backward pass, with its own rows.

        Args:
            embeddings: (N, D) or (H, N, D), which are scaled to unit length, as losses do; or `Embeddings`, which are
                stored as they are. N may differ between processes and may be 0.
            sample: (N,) int64 >= 0, indices in the data set; with plain tensors only.
            group: (N,) int64, labels; negative or no `group` = unlabelled. Unlabelled rows get a group of their own and
                match no label.
            reference: (N, R), a frozen network's embeddings.

        Raises:
            ValueError: for another width, or without sample indices >= 0.
        """
        for store in self.stores():
            if store is self:
                raise NotImplementedError(f"{type(self).__name__} stores nothing: define update(), or stores().")
            store.update(embeddings, sample=sample, group=group, reference=reference)

    def end_epoch(self) -> None:
        """End an epoch: what is computed once per epoch is computed here."""

    def stores(self) -> Sequence[Memory]:
        """Return the memories that `update` writes to: this one, or the one that it searches."""
        return [self]

    @property
    def metrics(self) -> dict[str, Tensor | float]:
        """Values to be logged, by name."""
        return {}

    def move_to(self, device: torch.device) -> None:
        """Move the tensors to this device, that of the embeddings."""
        if any(tensor.device != device for tensor in self.tensors.values()):
            self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint contains: tensors, numbers and texts, as `torch.load(weights_only=True)` reads.

        Raises:
            TypeError: for a tensor, array or module in an attribute that is not saved, and for counters or fixed
                attributes other than numbers, texts, lists and dicts.
        """
        for name in self.__dict__.keys() - _OF_MODULES:
            self._refuse_tensor(name)
        values = {kind: {name: getattr(self, name) for name in self._declared(kind)} for kind in ("counters", "fixed")}
        for name, value in (values["counters"] | values["fixed"]).items():
            if not _is_savable(value):
                raise TypeError(
                    f"{type(self).__name__}.{name}, which a checkpoint is to contain, must consist of numbers, texts, "
                    f"lists and dicts; got {type(value).__name__}."
                )
        tensors = {name: self._saved(name, tensor) for name, tensor in self.tensors.items()}
        return {**copy.deepcopy(values), "tensors": tensors}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned, on this memory's device.

        Raises:
            ValueError: for the state of a memory that was made with other arguments; nothing has changed then.
        """
        for name in self._declared("fixed"):
            self._refuse_other(name, getattr(self, name), state.get("fixed", {}).get(name))
        counters = self._declared("counters")
        self._refuse_other("counters", counters, list(state.get("counters", {})))
        tensors = {name: self._restored(name, tensor) for name, tensor in state["tensors"].items()}
        for name, tensor in self.tensors.items():
            if not _has_grown(tensor, tensors.get(name)):
                self._refuse_other(name, _type_and_shape(tensor), _type_and_shape(tensors.get(name)))
        for name in counters:
            setattr(self, name, copy.deepcopy(state["counters"][name]))
        device = next((tensor.device for tensor in self.tensors.values()), None)
        self.tensors = {name: tensor.to(device or tensor.device, copy=True) for name, tensor in tensors.items()}

    def _saved(self, name: str, tensor: Tensor) -> Tensor:  # noqa: ARG002
        """Return the tensor called `name` as a checkpoint contains it."""
        return tensor.detach().clone()

    def _restored(self, name: str, tensor: Tensor) -> Tensor:  # noqa: ARG002
        """Return the tensor called `name` of a checkpoint as this memory stores it."""
        return tensor

    def _declared(self, kind: str) -> list[str]:
        """Return the names in `counters` or `fixed` of this class and its base classes."""
        return [name for owner in reversed(type(self).__mro__) for name in vars(owner).get(kind, ())]

    def _refuse_other(self, name: str, own: object, saved: object) -> None:
        if own != saved:
            raise ValueError(
                f"this {type(self).__name__} has {name} {own} and the checkpoint's has {saved}; make it with the same."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a TypeError for tensors that are neither parameters nor buffers nor in `tensors`."""
        super().__setattr__(name, value)
        try:
            self._refuse_tensor(name)
        except TypeError:
            del self.__dict__[name]
            raise

    def _refuse_tensor(self, name: str) -> None:
        if name != "tensors" and _contains_tensor(self.__dict__.get(name)):
            raise TypeError(
                f"{type(self).__name__}.{name} contains a tensor, an array, or a module in a container, which no "
                f"checkpoint would contain: write self.tensors[{name!r}] = ..., nn.ModuleList for modules, or "
                f"register_buffer({name!r}, ..., persistent=False) for what a resumed run does not need."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor.to(fn(tensor.new_empty(0)).device)
        return self


class EmbeddingStore(Memory):
    """What memories share that store embeddings themselves, rather than searching those of another one.

    Args:
        dim: D, the width of the embeddings.
        heads: H for (H, N, D) embeddings; None for (N, D).
        reference_dim: R, the width of a frozen network's vectors; None where they are not stored.

    Raises:
        ValueError: for widths below 1.
    """

    fixed: ClassVar[tuple[str, ...]] = ("dim", "heads", "reference_dim")

    def __init__(self, dim: int, heads: int | None, reference_dim: int | None) -> None:
        super().__init__()
        for name, width in {"dim": dim, "heads": heads, "reference_dim": reference_dim}.items():
            if width is not None and width < 1:
                raise ValueError(f"{name} must be 1 or more; got {width}.")
        self.dim, self.heads, self.reference_dim = dim, heads, reference_dim

    @property
    def bytes_per_row(self) -> int:
        """Bytes of an embedding and its reference, in float32."""
        return 4 * (self.dim * (self.heads or 1) + (self.reference_dim or 0))

    def zeros(self, rows: int) -> dict[str, Tensor]:
        """Return "z", (rows, D) or (H, rows, D), and with `reference_dim` "reference", (rows, R), both zero."""
        heads = () if self.heads is None else (self.heads,)
        tensors = {"z": torch.zeros(*heads, rows, self.dim)}
        if self.reference_dim is not None:
            tensors["reference"] = torch.zeros(rows, self.reference_dim)
        return tensors

    @torch.no_grad()
    def update(
        self,
        embeddings: Embeddings | Tensor,
        *,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> None:
        """Check this process's rows, gather those of every process, and store them, as `Memory.update` describes."""
        own = self._rows_to_store(embeddings, sample, group, reference)
        self.move_to(own.z.device)
        gathered = self.check_rows(own.gathered())
        self.updates += 1
        self.write(gathered)

    def check_rows(self, gathered: Embeddings) -> Embeddings:
        """Return the rows to write, (N, D) or (H, N, D); a subclass raises ValueError before anything is stored."""
        return gathered

    def write(self, gathered: Embeddings) -> None:
        """Write the rows of all processes, (N, D) or (H, N, D) in rank order."""
        raise NotImplementedError(f"{type(self).__name__} must define write(self, gathered).")

    def remembered(self, z: Tensor, sample: Tensor, group: Tensor, reference: Tensor | None) -> Embeddings:
        """Return stored rows as candidates: z (M, D) or (H, M, D), sample and group (M,), reference (M, R)."""
        return Embeddings(z, sample, group, torch.full_like(sample, REMEMBERED), reference)

    def _rows_to_store(
        self, embeddings: Embeddings | Tensor, sample: Tensor | None, group: Tensor | None, reference: Tensor | None
    ) -> Embeddings:
        """Return this process's rows as they are stored; ValueError for what does not fit."""
        if isinstance(embeddings, Embeddings):
            if sample is not None or group is not None or reference is not None:
                raise ValueError("Embeddings have a sample, group and reference; give these with plain tensors only.")
            rows = embeddings.detach()
        else:
            rows = _with_identities(embeddings, sample, group, reference)
        z, reference = rows.z, rows.reference
        heads = z.shape[0] if z.ndim == 3 else None
        if (z.shape[-1], heads) != (self.dim, self.heads):
            shape = f"(N, {self.dim})" if self.heads is None else f"({self.heads}, N, {self.dim})"
            raise ValueError(f"this memory stores {shape} embeddings; got {tuple(z.shape)}.")
        if self.reference_dim is not None and (reference is None or reference.shape[1] != self.reference_dim):
            raise ValueError(
                f"this memory stores reference vectors (N, {self.reference_dim}); got "
                f"{'none: give update(..., reference=...)' if reference is None else tuple(reference.shape)}."
            )
        if z.device.type == "cpu" and len(rows):
            if rows.sample.min() < 0:
                raise ValueError(
                    "a memory identifies its entries by their samples: update(z, sample=index) takes indices in the "
                    f"data set, from 0; got {int(rows.sample.min())}."
                )
            if not torch.isfinite(z).all():
                raise ValueError("embeddings to store contain values that are not finite (NaN or inf).")
        reference = None if reference is None or self.reference_dim is None else reference.detach().float()
        group = torch.where(rows.group < 0, UNLABELLED - rows.sample.long(), rows.group)
        return self.remembered(z.float(), rows.sample, group, reference)


@dataclass(frozen=True)
class SearchIndex:
    """Stored embeddings, prepared for searching.

    Args:
        stored: M embeddings.
        index: an index of their `as_vectors`; None to search exactly.
    """

    stored: Embeddings
    index: Index | None = None

    def search(self, anchor: Embeddings, k: int, *, own_group: bool = True) -> Found:
        """Return the k nearest stored embeddings of each of N anchors, (N, k).

        Excludes the anchor's own sample; with own_group=False also its group. Where there are fewer than k,
        similarities are -inf and positions -1.
        """
        exclude = [(anchor.sample, self.stored.sample)]
        if not own_group:
            exclude.append((anchor.group, self.stored.group))
        count = min(k, len(self.stored)) if len(anchor) else 0
        if not count:
            nothing = torch.zeros(len(anchor), 0, device=anchor.z.device)
            found = Found(nothing, nothing.long())
        elif self.index is not None:
            found = self.index.search(as_vectors(anchor), count, exclude=exclude)
        else:
            found = exact_search(as_vectors(anchor), as_vectors(self.stored), count, exclude=exclude)
        padding = (0, k - count)
        return Found(F.pad(found.similarity, padding, value=-torch.inf), F.pad(found.position, padding, value=-1))


def as_vectors(embeddings: Embeddings) -> Tensor:
    """Return one vector per embedding, (N, D) or (N, H D): similarities of heads are added."""
    z = embeddings.z.detach().float()
    return z if z.ndim == 2 else z.movedim(0, -2).flatten(start_dim=1)


def check_anchors(anchor: Embeddings, *, first: bool) -> None:
    """Check that anchors have sample indices >= 0: otherwise their own entries are negatives.

    Args:
        anchor: the anchors.
        first: True if nothing has been stored yet; later, reading the indices would wait for a GPU in every step.

    Raises:
        ValueError: for negative samples.
    """
    if torch.compiler.is_compiling() or not (first or anchor.z.device.type == "cpu"):
        return
    if bool(((anchor.sample < 0) & (anchor.view >= 0)).any()):
        raise ValueError(
            "a memory needs the samples of the anchors, or their own entries become their negatives: call "
            "loss(..., sample=index, extra=[memory]) with indices in the data set."
        )


def _with_identities(z: Tensor, sample: Tensor | None, group: Tensor | None, reference: Tensor | None) -> Embeddings:
    if not isinstance(z, Tensor) or not z.is_floating_point() or z.ndim not in (2, 3):
        got = f"{z.dtype} of shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"update takes Embeddings, or a floating (N, D) or (H, N, D) tensor; got {got}.")
    if sample is None:
        raise ValueError(
            "a memory identifies its entries by their samples: call update(z, sample=index) with indices in the data "
            "set."
        )
    sample = sample.to(z.device)
    group = torch.full_like(sample, -1, dtype=torch.int64) if group is None else group.to(z.device)
    reference = None if reference is None else normalise(reference.detach())
    return Embeddings(normalise(z.detach()), sample, group, torch.full_like(sample, REMEMBERED), reference)


_OF_MODULES = nn.Module().__dict__.keys()
"""The attributes of every module, in which torch itself stores tensors."""


def _contains_tensor(value: object) -> bool:
    """True for tensors, and for arrays and modules in containers: a module registers only those in attributes."""
    if isinstance(value, Tensor | np.ndarray | nn.Module):
        return True
    if is_dataclass(value) and not isinstance(value, type):
        return any(_contains_tensor(getattr(value, field.name, None)) for field in fields(value))
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    return isinstance(value, list | tuple | set | frozenset | deque) and any(map(_contains_tensor, value))


def _has_grown(own: Tensor, saved: Tensor | None) -> bool:
    """True if `own` has no rows and `saved` is the same with rows: a memory that stores more with every step."""
    if saved is None or own.shape[:1] != (0,):
        return False
    return (own.dtype, own.ndim, own.shape[1:]) == (saved.dtype, saved.ndim, saved.shape[1:])


def _is_savable(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_savable, (*value.keys(), *value.values())))
    if isinstance(value, list | tuple):
        return all(map(_is_savable, value))
    return value is None or type(value) in (bool, int, float, str)


def _type_and_shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
