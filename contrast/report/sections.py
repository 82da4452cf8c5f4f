"""The sections of the page that have pictures: each function returns what the template prints, or None."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from contrast.report.feature_map import feature_map
from contrast.report.pictures import POINTS_OF_A_CURVE, channels_remark, curve, sample_picture, shortened
from contrast.report.record import RunRecord, is_number

LARGEST_PICTURE = 800_000
"""Bytes; a larger picture of the views is reduced, so that the page stays below 3 MB."""
LARGEST_DRAWN = 1e300


def training_curves(record: RunRecord) -> dict[str, Any]:
    """Return the curves of the loss and of the online probe, those that the metrics contain."""
    curves: dict[str, Any] = {}
    step, loss = record.series("loss")
    if len(step):
        label = f"Loss over {step[-1]:,.0f} steps, from {loss[0]:.3g} to {loss[-1]:.3g}"
        curves["binned"] = len(step) > 2 * POINTS_OF_A_CURVE
        curves["loss"] = Markup(curve(step, loss, name="loss", label=label, y_label="loss"))
    step, accuracy = record.series("probe_accuracy")
    if len(step):
        label = f"Accuracy of the online probe over {step[-1]:,.0f} steps, {accuracy[-1]:.3f} at the end"
        curves["probe"] = Markup(curve(step, accuracy, name="probe", label=label, y_label="accuracy"))
    return curves


def findings_sections(record: RunRecord, *, samples: bool) -> list[dict[str, Any]]:
    """Return one section per title of the loss's findings: its items, curves over the epochs, and other rows."""
    return [
        _findings_section(record, f"finding-{number}", title, rows)
        for number, (title, rows) in enumerate(record.findings(samples=samples).items(), start=1)
    ]


def _findings_section(record: RunRecord, name: str, title: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    items = [row for row in rows if "sample" in row]
    without_sample = [row for row in rows if "sample" not in row]
    course = [row for row in without_sample if _columns_to_draw(row)]
    others = [row for row in without_sample if not _columns_to_draw(row)]
    columns = list(dict.fromkeys(key for row in others for key in row))
    return {
        "id": name,
        "title": title,
        "items": [_finding_item(record, row) for row in items],
        "pixelated": _pixelated(record, "found_x"),
        "curves": _course_curves(name, title, course),
        "columns": columns,
        "rows": [[_finding_text(row.get(key, "")) for key in columns] for row in others],
    }


def _finding_item(record: RunRecord, row: Mapping[str, Any]) -> dict[str, Any]:
    found = np.flatnonzero(record.arrays.get("found_sample", np.empty(0)) == row["sample"])
    name = str(row.get("name", f"sample {row['sample']}"))
    return {
        "picture": _png_address(sample_picture(record.arrays["found_x"][found[0]], record.kind))
        if len(found)
        else None,
        "name": name,
        "short": shortened(name, 30),
        "values": [(key, _finding_text(value)) for key, value in row.items() if key not in ("sample", "name")],
    }


def _course_curves(name: str, title: str, course: Sequence[Mapping[str, Any]]) -> list[Markup]:
    columns = dict.fromkeys(column for row in course for column in _columns_to_draw(row))
    curves = []
    for number, column in enumerate(columns, start=1):
        rows = [row for row in course if column in _columns_to_draw(row)]
        epoch, value = (np.array([float(row[key]) for row in rows]) for key in ("epoch", column))
        label = f"{title}: {column} over the epochs, {value[-1]:.3g} at the end"
        svg = curve(epoch, value, name=f"{name}-{number}", label=label, x_label="epoch", y_label=column)
        curves.append(Markup(svg))
    return curves


def _columns_to_draw(row: Mapping[str, Any]) -> list[str]:
    """Return the columns of a row that are points over its epoch; larger numbers would overflow in the drawing."""
    columns = [key for key, value in row.items() if is_number(value) and abs(value) < LARGEST_DRAWN]
    return [key for key in columns if key != "epoch"] if "epoch" in columns else []


def _finding_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if value is None:
        return "not finite"
    return f"{value:,}" if is_number(value) else str(value)


def map_section(record: RunRecord) -> dict[str, Any] | None:
    """Return the map of the features with its legend."""
    if not {"features", "target", "classes"} <= set(record.arrays):
        return None
    classes = [str(name) for name in record.arrays["classes"]]
    drawn = feature_map(record.arrays["features"], record.arrays["target"], classes)
    if drawn is None:
        return None
    return vars(drawn) | {"svg": Markup(drawn.svg), "split": str(record.arrays.get("split", "test"))}


def views_address(record: RunRecord) -> str | None:
    """Return the picture of the views as a data address, reduced where it is large."""
    if record.views is None:
        return None
    if len(record.views) <= LARGEST_PICTURE:
        return _png_address(record.views)
    from PIL import Image

    with Image.open(io.BytesIO(record.views)) as picture:
        small = picture.convert("RGB")
    small.thumbnail((1200, 2400))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=82)
    return _data_address(file.getvalue(), "jpeg")


def neighbours_section(record: RunRecord) -> dict[str, Any] | None:
    """Return each query with its nearest training items."""
    arrays = record.arrays
    if not {"x", "neighbours", "similarity", "x_target", "x_name", "classes", "channels", "split"} <= set(arrays):
        return None
    classes = [str(name) for name in arrays["classes"]]

    def item(row: int) -> dict[str, Any]:
        target, name = int(arrays["x_target"][row]), str(arrays["x_name"][row])
        return {
            "picture": _png_address(sample_picture(arrays["x"][row], record.kind)),
            "label": classes[target] if 0 <= target < len(classes) else "no label",
            "name": name,
            "short": shortened(name, 30),
            "target": target,
        }

    rows = []
    for (query, *nearest), similarity in zip(arrays["neighbours"].tolist(), arrays["similarity"], strict=True):
        sample = item(query)
        found = [item(row) | {"similarity": f"{value:.2f}"} for row, value in zip(nearest, similarity, strict=True)]
        same = sum(other["target"] == sample["target"] for other in found) if sample["target"] >= 0 else None
        rows.append({"query": sample, "nearest": found, "same": same})
    return {
        "rows": rows,
        "remark": channels_remark(int(arrays["channels"]), record.kind),
        "pixelated": _pixelated(record, "x"),
        "split": str(arrays["split"]),
    }


def _pixelated(record: RunRecord, key: str) -> bool:
    """True for images that a browser would blur when it enlarges them."""
    return record.kind == "image" and key in record.arrays and max(record.arrays[key].shape[-2:]) <= 64


def _png_address(content: bytes) -> str:
    return _data_address(content, "png")


def _data_address(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
