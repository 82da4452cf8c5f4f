"""What the trainer keeps for the page: test features, and a few samples with their nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
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


def save_samples(
    path: Path,
    *,
    kind: str,
    classes: Sequence[str],
    test: Samples,
    test_features: Tensor,
    train: Samples,
    train_features: Tensor,
    prepare: Callable[[Tensor], Tensor],
    samples: bool = True,
    held_bad: Mapping[str, tuple[Samples, NDArray[np.float32]]] | None = None,
    queries: int = 6,
    neighbours: int = 5,
    points: int = 2000,
    seed: int = 0,
) -> None:
    """Write `report.npz`: features for the map, and samples drawn over the classes with their nearest train neighbours.

    Where `test` is empty (data without labels) the train split stands in: its features are the map, and a query's
    neighbours are other train samples. Nearness is cosine similarity of features.

    The file's arrays (none of them pickled):

    ========== ================= ===========================================================================
    kind       () str            "image" or "series"
    split      () str            "test", or "train" where there is no test
    classes    (k,) str          names of the classes
    features   (n, F) float32    features of at most `points` samples of the split
    target     (n,) int64        their labels, -1 for none
    x          (u, C, H, W)      float32 in [0, 1], at most 96 pixels a side, at most three channels
               (u, C, L)         or float32 with NaN, at most 1,000 steps and 16 channels; only with `samples`
    channels   () int64          how many channels the samples had before; only with `samples`
    x_target   (u,) int64        labels of x; only with `samples`
    x_name     (u,) str          names of x; only with `samples`
    neighbours (q, 1 + m) int64  rows of x: the query, then its neighbours, nearest first; only with `samples`
    similarity (q, m) float32    the cosine similarities of the neighbours; only with `samples`
    bad_x      as x              training samples that bad-pair mining flagged; these four only where it did
    bad_kind   (b,) str          "noisy" or "faulty"
    bad_name   (b,) str          their names
    bad_loss   (b,) float32      their mean loss over the epochs
    ========== ================= ===========================================================================

    Args:
        path: the file to write.
        kind: "image" or "series".
        classes: names of the classes, may be empty.
        test: the test split, may be empty.
        test_features: (n, F) features of the pretrained encoder, row i of `test`'s sample i.
        train: the train split, or a subset of it.
        train_features: (M, F), row i of `train`'s sample i.
        prepare: makes raw batches fit to be drawn: images in [0, 1] (`Encoder.prepare`).
        samples: False leaves out every picture and name.
        held_bad: "noisy" and "faulty" -> training samples that bad-pair mining flagged, and their mean losses.
        queries: how many samples are shown with neighbours.
        neighbours: how many neighbours each has.
        points: how many features are kept at most.
        seed: of the draws.
    """
    alone = len(test) == 0
    split, features = (train, train_features) if alone else (test, test_features)
    features = features.detach().float().cpu()
    random = np.random.default_rng(seed)
    target = np.asarray(split.target, dtype=np.int64)
    kept = np.sort(random.choice(len(split), min(points, len(split)), replace=False))
    arrays: dict[str, Any] = {
        "kind": np.array(kind),
        "split": np.array("train" if alone else "test"),
        "classes": np.array([str(name) for name in classes], dtype=np.str_),
        "features": features.numpy()[kept],
        "target": target[kept],
    }
    finite = torch.isfinite(features).all(dim=1).numpy()
    if samples and finite.any() and len(train) > (1 if alone else 0):
        query = _spread_over_classes(target, np.flatnonzero(finite), queries, random)
        near, similarity = _nearest(features[query], train_features, neighbours, query if alone else None)
        wanted, rows = np.unique(near, return_inverse=True)
        queried, found = _drawable(prepare(split.x(query)), kind), _drawable(prepare(train.x(wanted)), kind)
        longest = max(queried.shape[-1], found.shape[-1])
        if kind == "series":  # splits of unequal longest series
            queried, found = (pad(x, (0, longest - x.shape[-1]), value=torch.nan) for x in (queried, found))
        named = [split.names[i] for i in query.tolist()] + [train.names[i] for i in wanted.tolist()]
        arrays |= {
            "x": _small(torch.cat([queried, found]), kind),
            "channels": np.array(split.x(query[:1]).shape[1], dtype=np.int64),
            "x_target": np.concatenate([target[query], np.asarray(train.target, dtype=np.int64)[wanted]]),
            "x_name": np.array([str(name) for name in named], dtype=np.str_),
            "neighbours": np.concatenate(
                [np.arange(len(query))[:, None], len(query) + rows.reshape(near.shape)], axis=1
            ),
            "similarity": similarity,
        }
    if samples and held_bad:
        arrays |= _bad(held_bad, prepare, kind)
    np.savez_compressed(path, allow_pickle=False, **arrays)


def _bad(
    held_bad: Mapping[str, tuple[Samples, NDArray[np.float32]]], prepare: Callable[[Tensor], Tensor], kind: str
) -> dict[str, Any]:
    """Give the arrays of the samples that bad-pair mining flagged."""
    some = {word: flagged for word, flagged in held_bad.items() if len(flagged[0])}
    if not some:
        return {}
    drawn = [_drawable(prepare(samples.x()), kind) for samples, _ in some.values()]
    return {
        "bad_x": _small(torch.cat(drawn), kind),
        "bad_kind": np.repeat(list(some), [len(samples) for samples, _ in some.values()]),
        "bad_name": np.array([str(name) for samples, _ in some.values() for name in samples.names], dtype=np.str_),
        "bad_loss": np.concatenate([loss for _, loss in some.values()]),
    }


def _spread_over_classes(
    target: NDArray[np.int64], allowed: NDArray[np.int64], count: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """Draw `count` samples, one of each class in turn; unlabelled ones only where there are no others."""
    if (target[allowed] >= 0).any():
        allowed = allowed[target[allowed] >= 0]
    turns: list[tuple[int, float, int]] = []
    for number in np.unique(target[allowed]).tolist():
        members = random.permutation(allowed[target[allowed] == number])
        first = random.random()  # which classes come first when there are more of them than places
        turns += [(turn, first, int(member)) for turn, member in enumerate(members[:count])]
    chosen = [member for _, _, member in sorted(turns)[:count]]
    return np.array(sorted(chosen, key=lambda member: (target[member], member)), dtype=np.int64)


def _nearest(
    query: Tensor, train: Tensor, count: int, itself: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Give rows of `train` and cosine similarities (q, m); `itself` (q,) are rows that are no neighbours of theirs."""
    train = train.detach().float().cpu()
    similarity = (normalize(query, dim=1) @ normalize(train, dim=1).T).nan_to_num(-2.0)
    if itself is not None:
        similarity[torch.arange(len(query)), torch.from_numpy(itself)] = -torch.inf
    value, row = similarity.topk(min(count, len(train) - (itself is not None)), dim=1)
    return row.numpy(), value.numpy()


def _drawable(x: Tensor, kind: str) -> Tensor:
    return x.detach().float().cpu()[:, : 3 if kind == "image" else MOST_CHANNELS]


def _small(x: Tensor, kind: str) -> NDArray[np.float32]:
    """Give samples in the size of a small picture."""
    if kind == "series":
        return np.stack([thinned(sample) for sample in x.numpy()])
    largest = max(x.shape[-2:])
    if largest > LARGEST_IMAGE:
        size = [max(1, round(side * LARGEST_IMAGE / largest)) for side in x.shape[-2:]]
        x = interpolate(x, size=size, mode="area")
    return x.clamp(0, 1).numpy()
