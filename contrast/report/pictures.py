"""The pictures of a run: views, curves, single samples.

Drawn on matplotlib's Figure objects directly: no window and no global state that a user's own matplotlib would share.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

# Visible on white and on near-black, and as distinct for colour-blind readers as ten colours can be; further classes
# reuse them with another marker.
COLOURS = ("#3b7dd8", "#e07b1f", "#2e9e62", "#d1495b", "#8a63d2", "#a0714f", "#d667a8", "#7d8590", "#a8a12b", "#22a5b8")

INK = "#010203"
"""Replaced by the colour of the page's text in an inline SVG, so that a drawing is legible on light and dark."""

POINTS_OF_A_CURVE = 200
POINTS_OF_A_SERIES = 1000


@contextmanager
def drawing() -> Iterator[None]:
    """Draw text literally: a dollar sign starts no formula, and a letter that the font lacks gives no warning."""
    with matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


@drawing()
def views_picture(originals: Tensor, views: Sequence[Tensor], kind: str, names: Sequence[str] | None = None) -> bytes:
    r"""Return a PNG with one row per sample: the original, then its views.

    Args:
        originals: (N, C, H, W) in [0, 1], or (N, C, L) with NaN where nothing was observed.
        views: V tensors of N samples; sizes may differ from the originals' and from each other.
        kind: "image" or "series".
        names: N titles of the rows, or None for none.

    Example:
        >>> from contrast.report import views_picture
        >>> x = torch.rand(2, 3, 16, 16)
        >>> views_picture(x, [x.flip(-1), 0.5 * x], "image")[:4]
        b'\x89PNG'
    """
    columns = [originals, *views]
    rows = len(originals)
    wide, high = (1.15, 1.15) if kind == "image" else (2.3, 1.15)
    figure = Figure(figsize=(wide * len(columns) + 0.1, (high + (0.2 if names else 0.0)) * rows + 0.55), dpi=150)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for row in range(rows):
        samples = [column[row].detach().cpu().float().numpy() for column in columns]
        for axes, sample in zip(grid[row], samples, strict=True):
            if kind == "image":
                axes.imshow(_pixels(sample), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            else:
                _draw_series(axes, sample)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color="#c5cad1", linewidth=0.6)
        if names is not None:
            grid[row, 0].set_title(
                shortened(names[row], 18 if kind == "image" else 40), fontsize=8, loc="left", pad=2, color="#444444"
            )
    for axes, title in zip(grid[0], ["original", *(f"view {number + 1}" for number in range(len(views)))], strict=True):
        axes.annotate(
            title, (0.5, 1), (0, 16 if names else 6), xycoords="axes fraction", textcoords="offset points", ha="center",
            fontsize=9, fontweight="bold", color="#222222",
        )  # fmt: skip
    if remark := channels_remark(originals.shape[1], kind):
        figure.supxlabel(remark, fontsize=7, color="#444444")
    return _png(figure)


@drawing()
def curve(step: Array, value: Array, *, name: str, label: str, y_label: str, x_label: str = "step") -> str:
    """Return an inline SVG of a value over the steps; many values as means with a band from lowest to highest.

    Args:
        step: (n,) steps, ascending.
        value: (n,) the values; NaN leaves a gap.
        name: unique on the page: it makes the ids inside the SVG unique.
        label: what the picture shows, for people who cannot see it.
        y_label: what the value is, at the axis.
        x_label: what the steps are, at the axis.
    """
    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    axes = figure.subplots()
    if len(step) > 2 * POINTS_OF_A_CURVE:
        parts = np.array_split(np.arange(len(step)), POINTS_OF_A_CURVE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a part with only NaN is a gap, not a problem
            middle, low, high = (
                np.array([reduce(value[part]) for part in parts]) for reduce in (np.nanmean, np.nanmin, np.nanmax)
            )
        step, value = np.array([step[part].mean() for part in parts]), middle
        axes.fill_between(step, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    axes.plot(step, value, color=COLOURS[0], linewidth=1.6, marker="o" if len(step) <= 40 else None, markersize=3)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return svg_text(figure, name=name, label=label)


@drawing()
def sample_picture(sample: Array, kind: str) -> bytes:
    """Return one sample as a PNG: an image pixel by pixel, a series as lines on a transparent background.

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
    axes = figure.add_axes((0.01, 0.02, 0.98, 0.96))
    _draw_series(axes, sample)
    axes.set_axis_off()
    return _png(figure, transparent=True)


def channels_remark(channels: int, kind: str) -> str:
    """Return how a picture shows an image of neither one nor three channels; "" for all others."""
    if kind == "series" or channels in (1, 3):
        return ""
    return "Two channels, drawn as red and green." if channels == 2 else f"The first three of {channels} channels."


def shortened(text: str, letters: int) -> str:
    """Return at most the last `letters` letters of a name: paths differ at their end."""
    return text if len(text) <= letters else "…" + text[-letters + 1 :]


def thinned(series: Array, points: int = POINTS_OF_A_SERIES) -> Array:
    """Return a series of at most `points` steps that looks the same in a picture: the extremes of equal parts.

    Args:
        series: (C, L) float; NaN where nothing was observed.
        points: even.
    """
    length = series.shape[-1]
    if length <= points:
        return series
    parts = np.array_split(series, points // 2, axis=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a part with only NaN stays NaN
        pairs = [np.stack([np.nanmin(part, axis=-1), np.nanmax(part, axis=-1)], axis=-1) for part in parts]
    return np.concatenate(pairs, axis=-1)


def _draw_series(axes: Any, sample: Array) -> None:
    thin = thinned(sample)
    step = np.linspace(0, sample.shape[-1] - 1, thin.shape[-1])
    for channel, values in enumerate(thin):
        colour = COLOURS[channel % len(COLOURS)]
        axes.plot(step, values, color=colour, linewidth=0.8 if len(thin) > 3 else 1.1, alpha=0.9)
        # An observation between two gaps has no line on either side: only a dot makes it visible.
        observed = np.isfinite(np.concatenate([[np.nan], values, [np.nan]]))
        isolated = observed[1:-1] & ~observed[:-2] & ~observed[2:]
        axes.plot(step[isolated], values[isolated], ".", color=colour, markersize=2)
    axes.set_xlim(0, max(sample.shape[-1] - 1, 1))


def _pixels(image: Array) -> Array:
    """Return (C, H, W) as (H, W) grey or (H, W, 3) colour in [0, 1]."""
    image = np.clip(np.nan_to_num(image.astype(np.float64)), 0, 1)
    if len(image) == 2:
        image = np.concatenate([image, np.zeros_like(image[:1])])
    last = np.moveaxis(image[:3], 0, -1)
    return last.squeeze(-1) if len(image) == 1 else last


def _png(figure: Figure, *, transparent: bool = False) -> bytes:
    file = io.BytesIO()
    if not transparent:
        figure.tight_layout(pad=0.6, h_pad=0.4, w_pad=0.4)
    figure.savefig(file, format="png", transparent=transparent, metadata={"Software": None})
    return file.getvalue()


def svg_text(figure: Figure, *, name: str, label: str) -> str:
    """Return a figure as an inline SVG, with ids that start with `name` and `label` for people who cannot see it."""
    from markupsafe import escape

    for axes in figure.axes:
        axes.tick_params(colors=INK, labelsize=9)
        axes.xaxis.label.set(color=INK, fontsize=10)
        axes.yaxis.label.set(color=INK, fontsize=10)
        axes.spines[:].set_color(INK)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format")))
    text = file.getvalue()
    text = text[text.index("<svg") :]  # the XML prologue contains an address outside the file
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Several drawings are on one page, and their ids must differ.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text).replace("url(#", f"url(#{name}-")
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", text)  # HTML needs no declaration; nothing here looks like a link
    text = text.replace(INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
