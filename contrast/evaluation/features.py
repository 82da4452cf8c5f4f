"""Frozen features in sample order, and whether they can be evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrast.core.registry import InputError
from contrast.evaluation.threads import threads_for

if TYPE_CHECKING:
    from contrast.data.dataset import Data, Samples

Encode = Callable[[Tensor], Tensor]

WIDEST = 4096
"""Raw inputs with more numbers than this are averaged over neighbouring pixels or steps."""

RANKED = 2000
"""The most items, evenly spaced, of which the effective rank is computed: it needs a decomposition."""


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Set evaluation mode inside the block; then restore the training flag of every submodule."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for part, flag in flags:
            part.training = flag


@torch.no_grad()
def extract(encode: Encode, samples: Samples, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Return every item's features and target, in the order of `samples`, without gradient.

    A module, or a module's method, is in evaluation mode meanwhile; any other callable must ensure that itself
    (`frozen`), since with batch norm in training mode an item's features depend on the other items.

    Args:
        encode: raw batch (N, C, H, W) or (N, C, L) -> (N, F), on any device.
        samples: one split.
        batch_size: items per batch.

    Returns:
        features (N, F) float32 on the CPU, and targets (N,) int64 (-1 = no label).

    Raises:
        InputError: where `samples` is empty, or `encode` does not return one vector per item.
    """
    if len(samples) == 0:
        raise InputError("the split has no items to compute features of; evaluation needs train and test items.")
    owner = encode if isinstance(encode, nn.Module) else getattr(encode, "__self__", None)
    features, targets = [], []
    with frozen(owner) if isinstance(owner, nn.Module) else nullcontext():
        for start in range(0, len(samples), batch_size):
            batch = samples.__getitems__(list(range(start, min(start + batch_size, len(samples)))))
            vectors = encode(batch.x)
            _check_vectors(vectors, len(batch.target))
            features.append(vectors.detach().to("cpu", torch.float32))
            targets.append(batch.target)
    return torch.cat(features), torch.cat(targets)


def _check_vectors(vectors: Any, items: int) -> None:
    if not isinstance(vectors, Tensor):
        raise InputError(f"an encoder must return a tensor (items, features); got {type(vectors).__name__}.")
    if vectors.ndim != 2 or len(vectors) != items:
        raise InputError(
            f"an encoder must return one vector per item, ({items}, features); got {tuple(vectors.shape)}. "
            "Pool over space or time inside the encoder."
        )


@dataclass(frozen=True)
class Health:
    """The state of a set of features: whether they can be evaluated, and if not, why.

    Args:
        name: whose features, as the subject of a sentence ("the pretrained encoder").
        items: how many vectors there are.
        width: features of each.
        broken: items with NaN or infinity among their features.
        collapsed: True if every feature is equal for all items, up to rounding.
        rank: the effective rank, exp of the entropy of the normalised singular values, from 1 to `width`
            (RankMe, Garrido et al. 2023, arXiv:2210.02885, over at most 2,000 items); NaN where not finite.
    """

    name: str
    items: int
    width: int
    broken: int
    collapsed: bool
    rank: float

    @property
    def finite(self) -> bool:
        """True if every feature is finite."""
        return self.broken == 0

    @property
    def usable(self) -> bool:
        """True if the features are finite and not collapsed."""
        return self.finite and not self.collapsed

    @property
    def sentence(self) -> str:
        """The verdict as a sentence."""
        if not self.finite:
            return (
                f"{self.name} gives NaN or infinite features for {self.broken:,} of {self.items:,} items: "
                "it has no results. Check its training loss, its learning rate and the values of the data."
            )
        if self.collapsed:
            return (
                f"{self.name} has collapsed: all {self.items:,} items have the same {self.width:,} features, "
                "up to rounding; its results are those of chance."
            )
        return f"{self.name}: {self.width:,} features of effective rank {self.rank:.1f} over {self.items:,} items."


def health(features: Tensor, name: str = "the encoder") -> Health:
    """Check features (N, F)."""
    items, width = features.shape
    broken = int((~features.isfinite()).any(1).sum())
    if broken:
        return Health(name, items, width, broken, collapsed=False, rank=math.nan)
    wide = features.double()
    # Rounding errors scale with the largest intermediate values, so the reference is the magnitude of all features, not
    # each feature's own; 100 units in the last place is more than the noise of a deep network.
    noise = 100 * torch.finfo(torch.float32).eps * wide.square().mean().sqrt()
    collapsed = items > 1 and bool((wide.std(0, correction=0) <= noise).all())
    return Health(name, items, width, 0, collapsed, effective_rank(wide))


def effective_rank(features: Tensor) -> float:
    """Return exp(entropy of the singular values of (N, F), normalised to sum 1); 1 where all features are zero."""
    some = features[torch.linspace(0, len(features) - 1, min(len(features), RANKED)).long()].double()
    gram = some @ some.T if len(some) < some.shape[1] else some.T @ some
    with threads_for(len(gram) ** 3 // 10):
        values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    if values.sum() == 0:
        return 1.0
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


@torch.no_grad()
def raw_features(x: Tensor) -> Tensor:
    """Return the input itself as features, (N, F) float32 with F of at most 4,096: the baseline of every encoder.

    Images (N, C, H, W) are flattened, integer types after division by the type's largest value. Standardised series
    (N, C, L) are flattened with 0, the mean, where nothing was observed. Inputs with more than 4,096 numbers are first
    averaged over neighbouring pixels or observed steps, per channel, to the finest even grid that fits.

    Raises:
        InputError: for a batch of another shape.
    """
    if x.ndim not in (3, 4):
        raise InputError(f"raw input must be images (N, C, H, W) or series (N, C, L); got shape {tuple(x.shape)}.")
    scale = 1.0 if x.is_floating_point() else float(torch.iinfo(x.dtype).max)
    values = x.to(torch.float32) / scale
    if x[0].numel() <= WIDEST:
        return values.nan_to_num(0.0).flatten(1) if x.ndim == 3 else values.flatten(1)
    if x.ndim == 4:
        return F.adaptive_avg_pool2d(values, _image_grid(x.shape[1:])).flatten(1)
    observed = ~values.isnan()
    length = min(x.shape[2], max(1, WIDEST // x.shape[1]))
    share = F.adaptive_avg_pool1d(observed.float(), length)
    total = F.adaptive_avg_pool1d(values.nan_to_num(0.0), length)
    return torch.where(share > 0, total / share.clamp(min=torch.finfo(share.dtype).tiny), 0.0).flatten(1)


def _image_grid(shape: torch.Size) -> tuple[int, int]:
    channels, height, width = shape
    shrink = min(1.0, math.sqrt(WIDEST / (channels * height * width)))
    return max(1, int(height * shrink)), max(1, int(width * shrink))


def raw_input(data: Data) -> Encode:
    """Return raw input as a model: images scaled by the value range of `data`, series standardised by train items."""
    low, high = data.value_range
    mean = torch.as_tensor(data.mean, dtype=torch.float32).view(1, -1, 1)
    std = torch.as_tensor(data.std, dtype=torch.float32).view(1, -1, 1)

    def encode(x: Tensor) -> Tensor:
        if data.kind == "image":
            return raw_features((x.to(torch.float32) - low) / (high - low))
        return raw_features((x.to(torch.float32) - mean) / torch.where(std > 0, std, 1.0))

    return encode
