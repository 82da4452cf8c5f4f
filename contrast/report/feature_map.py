"""The map of features: t-SNE in two dimensions, coloured by label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from contrast.report.pictures import COLOURS, INK, Array, drawing, shortened, svg_text

MARKERS = {"o": "●", "^": "▲", "s": "■", "D": "◆", "v": "▼"}
"""matplotlib's markers and how the legend prints them."""

NO_LABEL = "#8c939c"
MOST_NAMES = 20
"""With more classes the map has no names, only the legend has."""


@dataclass(frozen=True)
class LegendEntry:
    """A class on the map: its name, colour, printed marker and number of points."""

    name: str
    colour: str
    sign: str
    count: int


@dataclass(frozen=True)
class FeatureMap:
    """A drawn map of features.

    Args:
        svg: the inline SVG.
        legend: the classes on the map.
        method: how the positions were computed, as a phrase.
        points: how many samples are on the map.
    """

    svg: str
    legend: list[LegendEntry]
    method: str
    points: int


@drawing()
def feature_map(
    features: Array, target: Array, classes: Sequence[str], *, name: str = "map", points: int = 2000, seed: int = 0
) -> FeatureMap | None:
    """Return unit-length features in the plane: PCA to at most 50 dimensions, then t-SNE; None where all are equal.

    Args:
        features: (n, F) float; rows with NaN are left out.
        target: (n,) the class of each row, -1 for none.
        classes: names of the classes.
        name: makes the ids inside the SVG unique.
        points: at most this many rows, drawn by `seed`.
        seed: of the draw and of t-SNE.
    """
    rows = np.flatnonzero(np.isfinite(features).all(axis=1))
    if len(rows) > points:
        rows = np.sort(np.random.default_rng(seed).choice(rows, points, replace=False))
    placed = _in_the_plane(_unit_length(features[rows]), seed)
    if placed is None:
        return None
    position, method = placed
    target = np.maximum(target[rows], -1)
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.subplots()
    legend = []
    labels = np.unique(target).tolist()
    for label in labels:
        x, y = position[target == label].T
        if label < 0:
            title, colour, marker = "no label", NO_LABEL, "o"
        else:
            title = str(classes[label]) if label < len(classes) else str(label)
            colour, marker = COLOURS[label % len(COLOURS)], list(MARKERS)[label // len(COLOURS) % len(MARKERS)]
        axes.scatter(x, y, s=11, c=colour, marker=marker, alpha=0.5 if label < 0 else 0.75, linewidths=0)
        legend.append(LegendEntry(title, colour, MARKERS[marker], len(x)))
        if label >= 0 and len(labels) <= MOST_NAMES:
            axes.text(
                np.median(x), np.median(y), shortened(title, 18), ha="center", va="center", fontsize=9,
                fontweight="bold", color=INK,
            )  # fmt: skip
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    svg = svg_text(figure, name=name, label=f"Map of {len(rows)} samples in two dimensions, coloured by label")
    return FeatureMap(svg, legend, method, len(rows))


def _unit_length(features: Array) -> Array:
    length = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(np.divide(features, length, out=np.zeros(features.shape), where=length > 0))


def _in_the_plane(features: Array, seed: int) -> tuple[Array, str] | None:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(features) < 3 or features.shape[1] < 2 or features.std(axis=0).max() < np.finfo(np.float32).eps:
        return None
    width = min(50, *features.shape)
    reduced: Array = PCA(width, random_state=seed).fit_transform(features)
    if len(features) < 20:
        return np.asarray(reduced[:, :2]), "PCA to 2 dimensions of the unit-length features"
    perplexity = min(30.0, (len(features) - 1) / 3)
    embedding: Array = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    method = (
        f"PCA to {width} dimensions of the unit-length features, then t-SNE (perplexity {perplexity:.3g}, seed {seed})"
    )
    return embedding, method
