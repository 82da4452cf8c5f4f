"""All of a run except training: the content of the data, a picture of the views, time and memory needed."""

from __future__ import annotations

from pathlib import Path

from contrast.core.text import format_bytes, format_duration
from contrast.data import Data, duplicates, leaks
from contrast.experiment import config as configuration
from contrast.experiment.build import read_data
from contrast.experiment.config import Loaded
from contrast.experiment.folder import VIEWS
from contrast.experiment.run import picture_of_views, prepare


def check(loaded: Loaded, *, out: Path | None = None, steps: int = 20) -> str:
    """Return what was found as text, and write the picture of the views.

    Args:
        loaded: the experiment.
        out: the picture's file; `views.png` in the current folder where it is not given.
        steps: timed steps.

    Raises:
        InputError: for anything that `pretrain` would refuse.
    """
    data = read_data(loaded.config)
    experiment, budget, trial = prepare(loaded, data, steps=steps)
    data = experiment.data
    picture = out or Path(VIEWS)
    picture.write_bytes(picture_of_views(trial, data))
    weights = sum(parameter.numel() for parameter in experiment.encoder.parameters() if parameter.requires_grad)
    seconds = trial.seconds_per_step * budget.steps if budget.steps else budget.seconds or 0
    per_step = (
        f"{trial.seconds_per_step * 1000:.0f} ms per step of {experiment.config.batch_size} items (median of {steps})"
    )
    epochs = f" = {budget.steps / experiment.sampler().steps_per_epoch:.1f} epochs" if budget.steps else ""
    facts = [
        (
            "data",
            f"{data.source}: {'images' if data.kind == 'image' else 'series'} of {'x'.join(map(str, data.shape))}",
        ),
        *(("", note) for note in data.notes),
        ("splits", _splits(data)),
        ("classes", _classes(data)),
        ("copies", _pairs(duplicates(data), "exact duplicate")),
        ("leaks", _pairs(leaks(data), "item of train that is also in test")),
        *(("chosen", f"{key}: {configuration.to_text(value)}") for key, value in experiment.chosen.items()),
        ("encoder", f"{weights:,} trainable parameters, {experiment.encoder.width} features"),
        ("views", f"{picture} shows what the encoder will see; look at it before you train"),
        ("time", f"{per_step}; {budget}{epochs}: about {format_duration(seconds)} here"),
        ("memory", f"{format_bytes(trial.peak_bytes)} at its highest"),
    ]
    return "\n".join(f"{name:<8} {fact}" for name, fact in facts)


def _splits(data: Data) -> str:
    held_out = int(data.validation.sum())
    by = f", split by {data.split_by}" if data.split_by else ""
    return f"{len(data.train):,} train ({held_out:,} of them for validation), {len(data.test):,} test{by}"


def _classes(data: Data) -> str:
    if not data.classes:
        return "no labels"
    counts = [f"{name} {int((data.train.target == place).sum()):,}" for place, name in enumerate(data.classes)]
    unlabelled = int((data.train.target < 0).sum())
    shown = ", ".join(counts[:20]) + (", ..." if len(counts) > 20 else "")
    return f"{len(counts)}: {shown}" + (f"; {unlabelled:,} without a label" if unlabelled else "")


def _pairs(pairs: list[tuple[str, str]], one: str) -> str:
    if not pairs:
        return f"no {one}"
    shown = "; ".join(f"{first} = {other}" for first, other in pairs[:3])
    return f"{len(pairs):,} x {one}: {shown}{'; ...' if len(pairs) > 3 else ''}"
