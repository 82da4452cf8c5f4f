"""The pictures of a run: views, curves, the map of features, single samples.

Drawn on matplotlib's Figure objects directly: no window, no global state, safe beside a user's own matplotlib.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

# Colours that stand out from white and from near-black paper alike, told apart also by colour-blind readers as far as
# ten colours can be; more classes reuse them with another marker.
COLOURS = ("#3b7dd8", "#e07b1f", "#2e9e62", "#d1495b", "#8a63d2", "#a0714f", "#d667a8", "#7d8590", "#a8a12b", "#22a5b8")
MARKERS = ("o", "^", "s", "D", "v")
NO_LABEL = "#8c939c"

# Becomes the colour of the page's text in an inline SVG, so that the drawing follows light and dark.
INK = "#010203"

POINTS_OF_A_CURVE = 200
POINTS_OF_A_SERIES = 1000


@contextmanager
def _drawing() -> Iterator[None]:
    """Draw names as they are: a dollar sign is no formula, a letter that the font lacks is no warning."""
    with matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


@_drawing()
def views_picture(originals: Tensor, views: Sequence[Tensor], kind: str, names: Sequence[str] | None = None) -> bytes:
    """Give a PNG with one row a sample: the original first, then what each view made of it.

    Args:
        originals: (N, C, H, W) in [0, 1], or (N, C, L) with NaN where nothing was observed; one row for each.
        views: V tensors of N samples; sizes may differ from the originals' and from each other.
        kind: "image" or "series".
        names: N titles for the rows, or None for none.
    """
    columns = [originals, *views]
    rows = len(originals)
    wide, high = (1.15, 1.15) if kind == "image" else (2.3, 1.15)
    figure = Figure(figsize=(wide * len(columns) + 0.1, (high + (0.2 if names else 0.0)) * rows + 0.55), dpi=150)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for row in range(rows):
        samples = [column[row].detach().cpu().float().numpy() for column in columns]
        for place, sample in zip(grid[row], samples, strict=True):
            if kind == "image":
                place.imshow(_pixels(sample), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            else:
                _draw_series(place, sample)
            place.set(xticks=[], yticks=[])
            place.spines[:].set(color="#c5cad1", linewidth=0.6)
        if names is not None:
            grid[row, 0].set_title(
                shortened(names[row], 18 if kind == "image" else 40), fontsize=8, loc="left", pad=2, color="#444444"
            )
    for place, title in zip(grid[0], _column_titles(len(views)), strict=True):
        place.annotate(
            title,
            (0.5, 1),
            xytext=(0, 16 if names else 6),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            fontsize=9,
            fontweight="bold",
            color="#222222",
        )
    if remark := channels_remark(originals.shape[1], kind):
        figure.supxlabel(remark, fontsize=7, color="#444444")
    return _png(figure)


@_drawing()
def curve(
    step: Array, value: Array, *, name: str, label: str, y_label: str, y_range: tuple[float, float] | None = None
) -> str:
    """Give an inline SVG of a value over the steps; long records as means with a band from lowest to highest.

    Args:
        step: (n,) steps, ascending.
        value: (n,) the values; NaN leaves a gap.
        name: a word that no other picture of the page has: it makes the ids inside unique.
        label: what the picture shows, for people who cannot see it.
        y_label: what the value is, at the axis.
        y_range: lowest and highest of the axis; None fits the values.
    """
    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    place = figure.subplots()
    if len(step) > 2 * POINTS_OF_A_CURVE:
        parts = np.array_split(np.arange(len(step)), POINTS_OF_A_CURVE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a part of NaN only is a gap, not a problem
            middle, low, high = (
                np.array([reduce(value[part]) for part in parts]) for reduce in (np.nanmean, np.nanmin, np.nanmax)
            )
        step, value = np.array([step[part].mean() for part in parts]), middle
        place.fill_between(step, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    place.plot(step, value, color=COLOURS[0], linewidth=1.6, marker="o" if len(step) <= 40 else None, markersize=3)
    place.set_xlabel("step")
    place.set_ylabel(y_label)
    if y_range is not None:
        place.set_ylim(*y_range)
    place.grid(color=INK, alpha=0.12, linewidth=0.6)
    place.spines[["top", "right"]].set_visible(False)
    return _svg(figure, name=name, label=label)


@_drawing()
def epoch_curves(
    epoch: Array, values: Mapping[str, Array], *, name: str, label: str, y_label: str, marked: tuple[float, str] | None
) -> str:
    """Give an inline SVG of several values over the epochs, each named at its line.

    Args:
        epoch: (n,) epochs, ascending.
        values: name -> (n,) its values.
        name: a word that no other picture of the page has.
        label: what the picture shows, for people who cannot see it.
        y_label: what the values are, at the axis.
        marked: an epoch to mark by a line, and the word beside it.
    """
    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    place = figure.subplots()
    for (one, value), colour in zip(values.items(), COLOURS[1:], strict=False):
        few = len(epoch) <= 40
        place.plot(epoch, value, color=colour, linewidth=1.6, marker="o" if few else None, markersize=3, label=one)
    if marked is not None:
        place.axvline(marked[0], color=INK, alpha=0.5, linewidth=0.8, linestyle="--")
        place.annotate(
            marked[1],
            (marked[0], 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -3),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color=INK,
        )
    place.set_xlabel("epoch")
    place.set_ylabel(y_label)
    place.set_ylim(bottom=0)
    place.legend(frameon=False, fontsize=8, labelcolor=INK)
    place.grid(color=INK, alpha=0.12, linewidth=0.6)
    place.spines[["top", "right"]].set_visible(False)
    return _svg(figure, name=name, label=label)


@dataclass(frozen=True)
class FeatureMap:
    """A drawn map of features, its legend and how it was made.

    Args:
        svg: the inline SVG.
        legend: for each class that is on the map its name, colour, marker's sign and number of points.
        method: a phrase for the caption ("t-SNE after PCA to 50 dimensions, ...").
        points: how many samples are on the map.
    """

    svg: str
    legend: list[tuple[str, str, str, int]]
    method: str
    points: int


@_drawing()
def feature_map(
    features: Array, target: Array, classes: Sequence[str], *, name: str = "map", points: int = 2000, seed: int = 0
) -> FeatureMap | None:
    """Give features in the plane: unit length, PCA to at most 50 dimensions, then t-SNE; None where there is no shape.

    Args:
        features: (n, F) float; rows with NaN are left out.
        target: (n,) the class of each row, -1 for none.
        classes: names of the classes.
        name: makes the ids inside the SVG unique.
        points: at most this many rows, drawn by `seed`.
        seed: of the draw and of t-SNE.
    """
    kept = np.flatnonzero(np.isfinite(features).all(axis=1))
    if len(kept) > points:
        kept = np.sort(np.random.default_rng(seed).choice(kept, points, replace=False))
    placed = _in_the_plane(_unit(features[kept]), seed)
    if placed is None:
        return None
    position, method = placed
    target = target[kept]
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    place = figure.subplots()
    legend = []
    present = [number for number in np.unique(target).tolist() if number >= 0]
    if (target < 0).any():
        here = target < 0
        place.scatter(position[here, 0], position[here, 1], s=7, c=NO_LABEL, alpha=0.5, linewidths=0)
        legend.append(("no label", NO_LABEL, "●", int(here.sum())))
    for number in present:
        here = target == number
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number // len(COLOURS) % len(MARKERS)]
        place.scatter(position[here, 0], position[here, 1], s=11, c=colour, marker=marker, alpha=0.75, linewidths=0)
        sign = dict(zip(MARKERS, "●▲■◆▼", strict=True))[marker]
        legend.append((_class_name(classes, number), colour, sign, int(here.sum())))
    if len(present) <= 2 * len(COLOURS):
        for number in present:
            x, y = np.median(position[target == number], axis=0)
            place.text(
                x,
                y,
                shortened(_class_name(classes, number), 18),
                ha="center",
                va="center",
                fontsize=9,
                fontweight="bold",
                color=INK,
            )
    place.set_aspect("equal", adjustable="datalim")
    place.set(xticks=[], yticks=[])
    place.spines[:].set_visible(False)
    svg = _svg(figure, name=name, label=f"Map of {len(kept)} samples in two dimensions, coloured by label")
    return FeatureMap(svg, legend, method, len(kept))


@_drawing()
def sample_picture(sample: Array, kind: str) -> bytes:
    """Give one sample as a PNG: an image pixel by pixel, a series as lines on a clear ground.

    Args:
        sample: (C, H, W) in [0, 1], or (C, L) with NaN where nothing was observed.
        kind: "image" or "series".
    """
    if kind == "image":
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray((_pixels(sample) * 255).round().astype(np.uint8)).save(file, "PNG", optimize=True)
        return file.getvalue()
    figure = Figure(figsize=(1.9, 0.95), dpi=130)
    FigureCanvasAgg(figure)
    place = figure.add_axes((0.01, 0.02, 0.98, 0.96))
    _draw_series(place, sample)
    place.set_axis_off()
    return _png(figure, transparent=True)


def channels_remark(channels: int, kind: str) -> str:
    """Say how a picture shows more or fewer channels than a screen has; nothing where it shows them as they are."""
    if kind == "series" or channels in (1, 3):
        return ""
    return "Two channels, drawn as red and green." if channels == 2 else f"The first three of {channels} channels."


def shortened(text: str, letters: int) -> str:
    """Give the end of a long name: paths differ there."""
    return text if len(text) <= letters else "…" + text[-letters + 1 :]


def thinned(series: Array, points: int = POINTS_OF_A_SERIES) -> Array:
    """Give a series that looks the same in a picture with at most `points` steps: each part's lowest and highest.

    Args:
        series: (C, L) float; NaN where nothing was observed.
        points: even.
    """
    length = series.shape[-1]
    if length <= points:
        return series
    parts = np.array_split(series, points // 2, axis=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a part of NaN only stays NaN
        pairs = [np.stack([np.nanmin(part, axis=-1), np.nanmax(part, axis=-1)], axis=-1) for part in parts]
    return np.concatenate(pairs, axis=-1)


def _draw_series(place: Any, sample: Array) -> None:
    thin = thinned(sample)
    step = np.linspace(0, sample.shape[-1] - 1, thin.shape[-1])
    many = len(thin) > 3
    for channel, values in enumerate(thin):
        place.plot(step, values, color=COLOURS[channel % len(COLOURS)], linewidth=0.8 if many else 1.1, alpha=0.9)
        # An observation between two gaps has no line to either side: without a dot it would not be seen.
        seen = np.isfinite(np.concatenate([[np.nan], values, [np.nan]]))
        alone = seen[1:-1] & ~seen[:-2] & ~seen[2:]
        place.plot(step[alone], values[alone], ".", color=COLOURS[channel % len(COLOURS)], markersize=2)
    place.set_xlim(0, max(sample.shape[-1] - 1, 1))


def _pixels(image: Array) -> Array:
    """Give (C, H, W) as (H, W) grey or (H, W, 3) colour in [0, 1]."""
    image = np.clip(np.nan_to_num(image.astype(np.float64)), 0, 1)
    if len(image) == 2:
        image = np.concatenate([image, np.zeros_like(image[:1])])
    last = np.moveaxis(image[:3], 0, -1)
    return last.squeeze(-1) if len(image) == 1 else last


def _unit(features: Array) -> Array:
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


def _column_titles(views: int) -> list[str]:
    return ["original", *(f"view {number + 1}" for number in range(views))]


def _class_name(classes: Sequence[str], number: int) -> str:
    return str(classes[number]) if number < len(classes) else str(number)


def _png(figure: Figure, *, transparent: bool = False) -> bytes:
    file = io.BytesIO()
    if not transparent:
        figure.tight_layout(pad=0.6, h_pad=0.4, w_pad=0.4)
    figure.savefig(file, format="png", transparent=transparent, metadata={"Software": None})
    return file.getvalue()


def _svg(figure: Figure, *, name: str, label: str) -> str:
    from markupsafe import escape

    for place in figure.axes:
        place.tick_params(colors=INK, labelsize=9)
        place.xaxis.label.set(color=INK, fontsize=10)
        place.yaxis.label.set(color=INK, fontsize=10)
        place.spines[:].set_color(INK)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format")))
    text = file.getvalue()
    text = text[text.index("<svg") :]  # the XML prologue names an address outside the file
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Several drawings share one page, so their ids need the drawing's name.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text).replace("url(#", f"url(#{name}-")
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", text)  # HTML knows the names; nothing here looks like a link
    text = text.replace(INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
