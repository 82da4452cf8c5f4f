"""The page of a run: one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from contrast.core.text import format_bytes, format_duration
from contrast.evaluation.features import health
from contrast.evaluation.results import Result, title
from contrast.evaluation.tables import Table, format_score, results_tables
from contrast.report.glossary import GLOSSARY
from contrast.report.pictures import shortened
from contrast.report.record import RunRecord, dotted_texts, format_time, is_number
from contrast.report.sections import (
    findings_sections,
    map_section,
    neighbours_section,
    training_curves,
    views_address,
)
from contrast.report.tables import recall_table, summary


def render(record: RunRecord, *, samples: bool = True) -> str:
    """Return the page of a run as HTML.

    Args:
        record: what is known of the run, finished or not.
        samples: False leaves out every sample: no pictures of views, findings or neighbours, no names of items. The map
            stays, since it shows features only.

    Example:
        >>> from contrast.report import RunRecord, render
        >>> "No training step" in render(RunRecord("digits-simclr-001"))
        True
    """
    links, facts = _GlossaryLinks(), _run_facts(record)
    environment = Environment(
        loader=PackageLoader("contrast", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(word=links.link, format_score=format_score, title=title)
    tables = results_tables([Result.from_row(row) for row in record.results.get("results") or ()])
    table = tables[0] if tables else None
    text = environment.get_template("page.html.jinja").render(
        record=record,
        samples=samples,
        summary=_summary(record, table),
        notes=_status_notes(record, samples=samples),
        status=str(record.state.get("state") or record.run.get("status") or "unknown"),
        header_facts=[
            shortened(facts[key], 48) for key in ("Config", "Data", "Device", "Training time") if key in facts
        ],
        facts=facts,
        environment=dict(dotted_texts(record.environment)),
        table=table,
        other_tables=tables[1:],
        recalls=recall_table(table) if table else None,
        curves=training_curves(record),
        findings=findings_sections(record, samples=samples),
        views=views_address(record) if samples else None,
        map=map_section(record),
        neighbours=neighbours_section(record) if samples else None,
        config_words=[word for word in ("temperature", "batch size") if word.replace(" ", "_") in record.config_text],
    )
    return text.replace("<!-- glossary -->", links.glossary())


class _GlossaryLinks:
    """Links the first mention of each word to its line in the glossary."""

    def __init__(self) -> None:
        self.mentioned: set[str] = set()

    def link(self, word: str, text: str | None = None) -> Markup:
        """Return `text`, by default the word; as a link at the first mention of a word of the glossary."""
        shown = escape(text or word)
        if word in self.mentioned or word not in GLOSSARY:
            return shown
        self.mentioned.add(word)
        return Markup('<a class="word" href="#{}" title="{}">{}</a>').format(_anchor(word), GLOSSARY[word], shown)

    def glossary(self) -> str:
        """Return the mentioned words with their lines, in alphabetical order."""
        return "\n".join(
            Markup('<div id="{}"><dt>{}</dt><dd>{}</dd></div>').format(_anchor(word), word, GLOSSARY[word])
            for word in sorted(self.mentioned, key=str.lower)
        )


def _anchor(word: str) -> str:
    return "word-" + re.sub(r"\W+", "-", word.lower())


def _summary(record: RunRecord, table: Table | None) -> str:
    if table is not None and (sentence := summary(table, record.kind)):
        return sentence
    step, loss = record.series("loss")
    if not len(step):
        return "No training step and no result is recorded yet."
    trained = f"The encoder was trained for {step[-1]:,.0f} steps; the loss went from {loss[0]:.3g} to {loss[-1]:.3g}."
    return f"{trained} There are no results: the features were not evaluated, or the data have no labels."


def _status_notes(record: RunRecord, *, samples: bool) -> list[tuple[str, str]]:
    """Return what a reader must know before the numbers: kind of note (info, warning) and sentence."""
    notes = []
    state, step = record.state.get("state"), record.state.get("step")
    at_step = f" at step {step:,}" if isinstance(step, int) else ""
    if state == "running":
        last = format_time(record.state.get("heartbeat"))
        seen = f" Its last heartbeat was {last}." if last else ""
        notes.append(
            ("info", f"This run is not finished{at_step}: it is still running, or its process was killed.{seen}")
        )
    elif state == "stopped":
        notes.append(("info", f"This run was stopped{at_step} and saved. To continue: contrast resume {record.name}"))
    elif state == "failed":
        # The reason may name an item.
        reason = (samples and record.state.get("why")) or "The file log.txt in the run's folder has the reason."
        notes.append(("warning", f"This run failed{at_step}. {reason}"))
    step_of, loss = record.series("loss")
    broken = np.flatnonzero(~np.isfinite(loss))
    if len(broken):
        notes.append(("warning", f"The loss was NaN or infinite from step {step_of[broken[0]]:,.0f} on."))
    warnings = [str(warning) for warning in record.results.get("warnings") or ()]
    features = record.arrays.get("features")
    if not warnings and features is not None and len(features) > 1:  # without labels no evaluation has checked them
        verdict = health(torch.from_numpy(features), "the pretrained encoder")
        warnings += [] if verdict.usable else [verdict.sentence]
    return notes + [("warning", warning[:1].upper() + warning[1:]) for warning in warnings]


def _run_facts(record: RunRecord) -> dict[str, str]:
    """Return what was run, as terms and values; unknown values are left out."""
    known = {
        key: value
        for source in (record.config, record.environment, record.run)
        for key, value in source.items()
        if value is not None
    }
    _, elapsed = record.series("seconds")
    seconds = known.get("seconds", elapsed[-1] if len(elapsed) else None)
    steps, commit = known.get("steps", record.state.get("step")), str(known.get("commit", ""))[:12]
    facts = {
        "Config": known.get("name"),
        "Data": _source(record),
        "Device": known.get("device"),
        "Processes": known.get("processes"),
        "Precision": known.get("precision"),
        "Batch size": known.get("batch_size"),
        "Budget": known.get("budget"),
        "Steps": f"{steps:,}" if is_number(steps) else steps,
        "Training time": None if seconds is None else format_duration(seconds),
        "Peak memory": format_bytes(known["peak_bytes"]) if "peak_bytes" in known else None,
        "Seed": known.get("seed"),
        "Config hash": known.get("config_hash"),
        "Commit": f"{commit}, with changes" if commit and known.get("dirty") else commit,
    }
    return {term: str(value) for term, value in facts.items() if value not in (None, "")}


def _source(record: RunRecord) -> Any:
    data = record.config.get("data")
    configured = data.get("source") if isinstance(data, dict) else data
    return next((split["source"] for split in record.splits.values() if split.get("source")), configured)
