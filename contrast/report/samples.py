"""The arrays of the page: test features, and some samples with their nearest training items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad

from contrast.data.dataset import Samples
from contrast.report.pictures import thinned

LARGEST_IMAGE = 96
MOST_CHANNELS = 16
MOST_FOUND = 48


def page_arrays(
    *,
    kind: str,
    classes: Sequence[str],
    test: Samples,
    test_features: Tensor,
    train: Samples,
    train_features: Tensor,
    prepare: Callable[[Tensor], Tensor],
    samples: bool = True,
    found: Samples | None = None,
    queries: int = 6,
    neighbours: int = 5,
    points: int = 2000,
    seed: int = 0,
) -> dict[str, NDArray[Any]]:
    """Return features for the map, and samples drawn over the classes with their nearest training items.

    Where `test` is empty (data without labels) the train split replaces it: its features are the map, and a query's
    neighbours are other training items. Neighbours are those of the highest cosine similarity of features.

    =========== ================= ===========================================================================
    kind        () str            "image" or "series"
    split       () str            "test", or "train" where there is no test
    classes     (C,) str          names of the classes
    features    (n, F) float32    features of at most `points` samples of the split
    target      (n,) int64        their labels, -1 for none
    x           (u, C, H, W)      float32 in [0, 1], at most 96 pixels per side, at most three channels
                (u, C, L)         or float32 with NaN, at most 1,000 steps and 16 channels; only with `samples`
    channels    () int64          how many channels the samples had before; only with `samples`
    x_target    (u,) int64        labels of x; only with `samples`
    x_name      (u,) str          names of x; only with `samples`
    neighbours  (q, 1 + K) int64  rows of x: the query, then its neighbours, nearest first; only with `samples`
    similarity  (q, K) float32    the cosine similarities of the neighbours; only with `samples`
    found_x     as x              training items that the loss found; only with `samples` and where there are any
    found_sample (b,) int64       their sample indices
    =========== ================= ===========================================================================

    Args:
        kind: "image" or "series".
        classes: names of the classes, may be empty.
        test: the test split, may be empty.
        test_features: (N, F) features of the pretrained encoder, row i of `test`'s sample i.
        train: the train split, or a subset of it.
        train_features: (M, F), row i of `train`'s sample i.
        prepare: makes raw batches ready to draw: images in [0, 1] (`Encoder.prepare`).
        samples: False leaves out every picture and name.
        found: training items of the loss's findings; the first 48 are drawn.
        queries: how many samples are shown with neighbours.
        neighbours: K.
        points: the most features that are stored.
        seed: of the draws.

    Example:
        >>> from contrast.report import page_arrays
        >>> from contrast.data import open_data
        >>> data = open_data("digits")
        >>> arrays = page_arrays(
        ...     kind=data.kind, classes=data.classes, prepare=lambda raw: raw / 16,
        ...     test=data.test, test_features=data.test.x().flatten(1).float(),
        ...     train=data.train, train_features=data.train.x().flatten(1).float(),
        ... )
        >>> arrays["neighbours"].shape
        (6, 6)
    """
    no_test = len(test) == 0
    split, features = (train, train_features) if no_test else (test, test_features)
    features = features.detach().float().cpu()
    random = np.random.default_rng(seed)
    target = np.asarray(split.target, dtype=np.int64)
    on_map = np.sort(random.choice(len(split), min(points, len(split)), replace=False))
    arrays: dict[str, NDArray[Any]] = {
        "kind": np.array(kind),
        "split": np.array("train" if no_test else "test"),
        "classes": np.array([str(name) for name in classes], dtype=np.str_),
        "features": features.numpy()[on_map],
        "target": target[on_map],
    }
    if not samples:
        return arrays
    finite = torch.isfinite(features).all(dim=1).numpy()
    if finite.any() and len(train) > (1 if no_test else 0):
        query = _spread_over_classes(target, np.flatnonzero(finite), queries, random)
        nearest, similarity = _nearest_items(features[query], train_features, neighbours, query if no_test else None)
        shown, rows = np.unique(nearest, return_inverse=True)
        x_query, x_shown = _drawable(prepare(split.x(query)), kind), _drawable(prepare(train.x(shown)), kind)
        if kind == "series":  # the longest series of the splits may differ
            longest = max(x_query.shape[-1], x_shown.shape[-1])
            x_query, x_shown = (pad(x, (0, longest - x.shape[-1]), value=torch.nan) for x in (x_query, x_shown))
        names = [split.names[i] for i in query.tolist()] + [train.names[i] for i in shown.tolist()]
        arrays |= {
            "x": _reduced(torch.cat([x_query, x_shown]), kind),
            "channels": np.array(split.x(query[:1]).shape[1], dtype=np.int64),
            "x_target": np.concatenate([target[query], np.asarray(train.target, dtype=np.int64)[shown]]),
            "x_name": np.array([str(name) for name in names], dtype=np.str_),
            "neighbours": np.concatenate(
                [np.arange(len(query))[:, None], len(query) + rows.reshape(nearest.shape)], axis=1
            ),
            "similarity": similarity,
        }
    if found is not None and len(found):
        found = found.subset(np.arange(min(len(found), MOST_FOUND)))
        arrays |= {
            "found_x": _reduced(_drawable(prepare(found.x()), kind), kind),
            "found_sample": np.asarray(found.sample, dtype=np.int64),
        }
    return arrays


def _spread_over_classes(
    target: NDArray[np.int64], allowed: NDArray[np.int64], count: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """Return `count` random positions, one of each class in turn; unlabelled samples only where all are unlabelled."""
    if (target[allowed] >= 0).any():
        allowed = allowed[target[allowed] >= 0]
    turns: list[tuple[int, float, int]] = []
    for label in np.unique(target[allowed]).tolist():
        members = random.permutation(allowed[target[allowed] == label])
        first = random.random()  # the order of the classes, where there are more of them than `count`
        turns += [(turn, first, int(member)) for turn, member in enumerate(members[:count])]
    chosen = [member for _, _, member in sorted(turns)[:count]]
    return np.array(sorted(chosen, key=lambda member: (target[member], member)), dtype=np.int64)


def _nearest_items(
    query: Tensor, train: Tensor, count: int, itself: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return rows of `train` and cosine similarities, (q, K) each, without each query's own row `itself` (q,)."""
    train = train.detach().float().cpu()
    similarity = (normalize(query, dim=1) @ normalize(train, dim=1).T).nan_to_num(-2.0)
    if itself is not None:
        similarity[torch.arange(len(query)), torch.from_numpy(itself)] = -torch.inf
    value, row = similarity.topk(min(count, len(train) - (itself is not None)), dim=1)
    return row.numpy(), value.numpy()


def _drawable(x: Tensor, kind: str) -> Tensor:
    return x.detach().float().cpu()[:, : 3 if kind == "image" else MOST_CHANNELS]


def _reduced(x: Tensor, kind: str) -> NDArray[np.float32]:
    """Return samples in the size of a small picture."""
    if kind == "series":
        return np.stack([thinned(sample) for sample in x.numpy()])
    largest = max(x.shape[-2:])
    if largest > LARGEST_IMAGE:
        size = [max(1, round(side * LARGEST_IMAGE / largest)) for side in x.shape[-2:]]
        x = interpolate(x, size=size, mode="area")
    return x.clamp(0, 1).numpy()
