"""Writes docs/config.md from the config's own dataclasses and the table of kinds of parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contrast.core.registry import schema
from contrast.experiment.config import SECTIONS, Config, to_text
from contrast.experiment.explain import fields_of, type_of
from contrast.experiment.parts import KINDS

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
FIRST = """\
# Every key of the config

A config is one YAML file that has only what differs from the defaults below; on the command line every key is
`key=value`, and from Python `contrast.pretrain(data, key=value)`, sections as mappings. `contrast show CONFIG` prints
every resolved value and where it came from, `contrast show --explain KEY` what a key means, also inside a part:
`contrast show cacr --explain loss.repulsion_scale`.

This page is written by `python tools/config_page.py`.
"""
PARTS = """\
## Parts

A part is `{name: ..., its constructor's arguments}`; a bare name is short for `{name: it}`. A list of parts may mix
both forms. An argument that is a fact of the run is filled in where the config does not give it. `contrast list` prints
the parts, `contrast list losses plugins=mine.py` also your own.

| key | `contrast list` | facts of the run that its constructor may ask for |
|---|---|---|
"""


def page() -> str:
    """Return the content of docs/config.md."""
    tables = [_table("", Config), *(_table(f"{name}.", section) for name, section in SECTIONS.items())]
    parts = [
        f"| `{kind.key}`{', a list' if kind.many else ''} | `{kind.title}` | {', '.join(kind.facts)} |\n"
        for kind in KINDS.values()
    ]
    return "\n".join([FIRST, *tables, PARTS + "".join(parts)])


def _table(prefix: str, section: Callable[[], Any]) -> str:
    heading = f"## {prefix.removesuffix('.') or 'The first level'}\n\n" + (section.__doc__ or "").partition("\n")[0]
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    sentences = fields_of(section)
    for (name, (annotation, _)), default in zip(schema(section).items(), asdict(section()).values(), strict=True):
        inner = prefix + name in SECTIONS
        value = "" if inner else f"`{to_text(default)}`"
        rows.append(f"| `{prefix}{name}` | {type_of(prefix + name, annotation)} | {value} | {sentences[name]} |")
    return "\n".join([heading, "", *rows, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
