"""The page of a run: one HTML file that needs nothing outside itself."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from contrast.core.text import format_bytes, format_duration
from contrast.evaluation.features import health
from contrast.evaluation.results import title
from contrast.report.glossary import GLOSSARY
from contrast.report.pictures import (
    POINTS_OF_A_CURVE,
    channels_remark,
    curve,
    epoch_curves,
    feature_map,
    sample_picture,
    shortened,
)
from contrast.report.record import RunRecord, flat, moment, read_run
from contrast.report.tables import (
    Table,
    number,
    paired_sentences,
    per_class_table,
    read_results,
    results_tables,
    spread_sentence,
    summary,
)

LARGEST_PICTURE = 800_000  # bytes; views.png beyond it is made smaller, so that the page stays below 3 MB


def write_report(run: Path, *, samples: bool = True) -> Path:
    """Write `report.html` into a run's folder from the files there, and give its path.

    Args:
        run: the folder of a run, finished or not.
        samples: False leaves out every sample: no pictures of views or neighbours, no names of items. The map stays,
            since it shows features only.

    Raises:
        InputError: where the folder is no run's, or one of its files is damaged.
    """
    record = read_run(run)
    page = run / "report.html"
    draft = run / ".report.html.part"
    draft.write_text(render(record, samples=samples), encoding="utf-8")
    draft.replace(page)  # whoever has the old page open never reads half a new one
    return page


def render(record: RunRecord, *, samples: bool = True) -> str:
    """Give the page as text."""
    words, facts = _Words(), _facts(record)
    environment = Environment(
        loader=PackageLoader("contrast", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(word=words.mention, number=number, title=title)
    kind = str(record.arrays["kind"]) if "kind" in record.arrays else ""
    tables = results_tables(read_results(record.results.get("results") or []))
    first = tables[0] if tables else None
    text = environment.get_template("page.html.jinja").render(
        record=record,
        kind=kind,
        samples=samples,
        summary=_summary(record, first, kind),
        notes=_notes(record, samples=samples),
        status=str(record.state.get("state") or _of_run(record, "status") or "unknown"),
        in_short=[
            shortened(value, 48) for term, value in facts if term in ("Config", "Data", "Device", "Training time")
        ],
        facts=facts,
        splits=_splits(record),
        environment=list(flat(record.environment)),
        table=first,
        other_tables=tables[1:],
        spread=spread_sentence(first) if first else "",
        differences=paired_sentences(first) if first else [],
        per_class=per_class_table(first) if first else None,
        curves=_curves(record),
        bad_pairs=_bad_pairs(record, kind, samples=samples),
        views=_views(record) if samples else None,
        map=_map(record),
        neighbours=_neighbours(record, kind) if samples else None,
        mentions=[word for word in ("temperature", "batch size") if word.replace(" ", "_") in record.config],
    )
    return text.replace("<!-- words -->", words.glossary())


class _Words:
    """Links the first mention of each word to its line in the glossary, and knows which were mentioned."""

    def __init__(self) -> None:
        self.mentioned: set[str] = set()

    def mention(self, word: str, text: str | None = None) -> Markup:
        """Give the word, or `text` in its place; a link at the first mention."""
        shown = escape(text or word)
        if word in self.mentioned or word not in GLOSSARY:
            return shown
        self.mentioned.add(word)
        return Markup('<a class="word" href="#{}" title="{}">{}</a>').format(_anchor(word), GLOSSARY[word], shown)

    def glossary(self) -> str:
        """Give the mentioned words with their lines, in alphabetical order."""
        return "\n".join(
            Markup('<div id="{}"><dt>{}</dt><dd>{}</dd></div>').format(_anchor(word), word, GLOSSARY[word])
            for word in sorted(self.mentioned, key=str.lower)
        )


def _anchor(word: str) -> str:
    return "word-" + re.sub(r"\W+", "-", word.lower())


def _summary(record: RunRecord, table: Table | None, kind: str) -> str:
    if table is not None and (sentence := summary(table, kind)):
        return sentence
    step, loss = record.series("loss")
    if not len(step):
        return "No training step and no result is on record yet."
    trained = f"The encoder was trained for {step[-1]:,.0f} steps; the loss went from {loss[0]:.3g} to {loss[-1]:.3g}."
    return f"{trained} There are no results: without labels, or before an evaluation, nothing can be measured."


def _notes(record: RunRecord, *, samples: bool) -> list[tuple[str, str]]:
    """Give what a reader must know before the numbers: kind of note (info, warning) and sentence."""
    notes = []
    state, step = record.state.get("state"), record.state.get("step")
    at_step = f" at step {step:,}" if isinstance(step, int) else ""
    if state == "running":
        last = moment(record.state.get("heartbeat"))
        seen = f" Its last sign of life was {last}." if last else ""
        notes.append(
            ("info", f"This run is not finished{at_step}: it is still going, or its process was killed.{seen}")
        )
    elif state == "stopped":
        notes.append(("info", f"This run was stopped{at_step} and saved. To go on: contrast resume {record.name}"))
    elif state == "failed":
        # What went wrong may name an item.
        reason = (samples and record.state.get("why")) or "The file log.txt in the run's folder says why."
        notes.append(("warning", f"This run failed{at_step}. {reason}"))
    step_of, loss = record.series("loss")
    broken = np.flatnonzero(~np.isfinite(loss))
    if len(broken):
        notes.append(("warning", f"The loss was no number (NaN or infinite) from step {step_of[broken[0]]:,.0f} on."))
    warnings = [str(warning) for warning in record.results.get("warnings") or ()]
    features = record.arrays.get("features")
    if not warnings and features is not None and len(features) > 1:  # without labels nobody has looked at them yet
        verdict = health(torch.from_numpy(features), "the pretrained encoder")
        warnings += [] if verdict.well else [verdict.sentence]
    notes += [("warning", warning[:1].upper() + warning[1:]) for warning in warnings]
    return notes


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """Give what was run, as terms and values; what is not on record is left out."""
    _, spent = record.series("seconds")
    seconds = _first(_of_run(record, "seconds"), float(spent[-1]) if len(spent) else None)
    peak = _of_run(record, "peak_bytes")
    step = _of_run(record, "steps") or record.state.get("step")
    device = _of_run(record, "device") or record.environment.get("device")
    facts = {
        "Config": _setting(record.config, "name"),
        "Data": _source(record),
        "Device": device,
        "Processes": _of_run(record, "processes"),
        "Precision": _of_run(record, "precision"),
        "Batch size": _of_run(record, "batch_size") or _setting(record.config, "batch_size"),
        "Budget": _setting(record.config, "budget"),
        "Steps": f"{step:,}" if isinstance(step, int) else step,
        "Training time": format_duration(seconds) if isinstance(seconds, int | float) else None,
        "Peak memory": format_bytes(peak) if isinstance(peak, int | float) else None,
        "Seed": _first(_of_run(record, "seed"), _setting(record.config, "seed")),
        "Config hash": _of_run(record, "config_hash"),
        "Commit": _commit(record),
    }
    return [(term, str(value)) for term, value in facts.items() if value not in (None, "")]


def _commit(record: RunRecord) -> str:
    commit = _first(_of_run(record, "commit"), record.environment.get("commit"))
    dirty = _first(_of_run(record, "dirty"), record.environment.get("dirty"))
    return f"{str(commit)[:12]}{', with changes' if dirty else ''}" if commit else ""


def _of_run(record: RunRecord, key: str) -> Any:
    run = record.results.get("run")
    return run.get(key) if isinstance(run, Mapping) else None


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _setting(config: str, key: str) -> str | None:
    """Give a top-level setting of the config's text."""
    found = re.search(rf"^{key}:[ \t]*(\S.*?)[ \t]*$", config, flags=re.MULTILINE)
    return found.group(1).strip("'\"") if found and found.group(1) != "null" else None


def _source(record: RunRecord) -> str | None:
    for split in _splits(record):
        if split["source"]:
            return str(split["source"])
    found = re.search(r"^data:[ \t]*(\S.*)$", record.config, flags=re.MULTILINE) or re.search(
        r"^data:.*\n(?:[ \t]+.*\n)*?[ \t]+source:[ \t]*(.*)$", record.config, flags=re.MULTILINE
    )
    return found.group(1).strip("'\" ") if found else None


def _splits(record: RunRecord) -> list[dict[str, str]]:
    data = record.results.get("data")
    if not isinstance(data, Mapping):
        return []
    keys = ("source", "samples", "split_by", "fingerprint")
    return [
        {"split": str(name), **{key: str(split.get(key) or "") for key in keys}}
        for name, split in data.items()
        if isinstance(split, Mapping)
    ]


def _curves(record: RunRecord) -> dict[str, Any]:
    drawn: dict[str, Any] = {}
    step, loss = record.series("loss")
    if len(step):
        label = f"Loss over {step[-1]:,.0f} steps, from {loss[0]:.3g} to {loss[-1]:.3g}"
        drawn["binned"] = len(step) > 2 * POINTS_OF_A_CURVE
        drawn["loss"] = Markup(curve(step, loss, name="loss", label=label, y_label="loss"))
    step, accuracy = record.series("probe_accuracy")
    if len(step):
        label = f"Accuracy of the online probe over {step[-1]:,.0f} steps, {accuracy[-1]:.3f} at the end"
        drawn["probe"] = Markup(curve(step, accuracy, name="probe", label=label, y_label="accuracy"))
    return drawn


def _bad_pairs(record: RunRecord, kind: str, *, samples: bool) -> dict[str, Any] | None:
    """Give what bad-pair mining held to be noisy and faulty: shares over the epochs, and some of the samples."""
    step, noisy = record.series("noisy_samples")
    _, faulty = record.series("faulty_samples")
    _, counts = record.series("bad_pairs_count")
    if not len(step):
        return None
    epochs = np.arange(1, len(step) + 1)
    weighed = np.flatnonzero(counts > 0)
    marked = (float(epochs[weighed[0]]), "weighed from here") if len(weighed) and weighed[0] else None
    label = f"Shares of samples held to be noisy and faulty over {len(epochs)} epochs"
    svg = epoch_curves(
        epochs, {"noisy": noisy, "faulty": faulty}, name="bad", label=label, y_label="share of samples", marked=marked
    )
    arrays = record.arrays
    shown: dict[str, list[dict[str, str]]] = {}
    if samples and {"bad_x", "bad_kind", "bad_name", "bad_loss"} <= set(arrays):
        for row, word in enumerate(arrays["bad_kind"].tolist()):
            name = str(arrays["bad_name"][row])
            picture = _data_address(sample_picture(arrays["bad_x"][row], kind), "png")
            loss = f"{arrays['bad_loss'][row]:.3g}"
            shown.setdefault(word, []).append(
                {"picture": picture, "name": name, "short": shortened(name, 30), "loss": loss}
            )
    return {"svg": Markup(svg), "noisy": float(noisy[-1]), "faulty": float(faulty[-1]), "shown": shown}


def _map(record: RunRecord) -> dict[str, Any] | None:
    if not {"features", "target", "classes"} <= set(record.arrays):
        return None
    classes = [str(name) for name in record.arrays["classes"]]
    drawn = feature_map(record.arrays["features"], record.arrays["target"], classes)
    if drawn is None:
        return None
    split = str(record.arrays.get("split", "test"))
    legend = [{"name": n, "colour": c, "sign": s, "count": k} for n, c, s, k in drawn.legend]
    return {"svg": Markup(drawn.svg), "legend": legend, "method": drawn.method, "points": drawn.points, "split": split}


def _views(record: RunRecord) -> str | None:
    if record.views is None:
        return None
    if len(record.views) <= LARGEST_PICTURE:
        return _data_address(record.views, "png")
    from PIL import Image

    with Image.open(io.BytesIO(record.views)) as picture:
        small = picture.convert("RGB")
    small.thumbnail((1200, 2400))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=82)
    return _data_address(file.getvalue(), "jpeg")


def _neighbours(record: RunRecord, kind: str) -> dict[str, Any] | None:
    arrays = record.arrays
    if not {"x", "neighbours", "x_target", "x_name", "classes"} <= set(arrays):
        return None
    classes = [str(name) for name in arrays["classes"]]
    similarity = arrays.get("similarity")

    def cell(row: int) -> dict[str, Any]:
        target = int(arrays["x_target"][row])
        label = classes[target] if 0 <= target < len(classes) else "no label"
        picture = _data_address(sample_picture(arrays["x"][row], kind), "png")
        name = str(arrays["x_name"][row])
        return {"picture": picture, "label": label, "name": name, "short": shortened(name, 30), "target": target}

    rows = []
    for place, (query, *near) in enumerate(arrays["neighbours"].tolist()):
        sample = cell(query)
        found = [
            cell(row) | {"similarity": "" if similarity is None else f"{similarity[place][rank]:.2f}"}
            for rank, row in enumerate(near)
        ]
        same = sum(other["target"] == sample["target"] for other in found) if sample["target"] >= 0 else None
        rows.append({"query": sample, "near": found, "same": same})
    channels = int(arrays["channels"]) if "channels" in arrays else arrays["x"].shape[1]
    remark = channels_remark(channels, kind)
    small = kind == "image" and max(arrays["x"].shape[-2:]) <= 64
    split = str(arrays.get("split", "test"))
    return {"rows": rows, "remark": remark, "small": small, "split": split}


def _data_address(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
