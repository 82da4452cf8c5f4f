"""What a key of the config means: its type, its value, its default and the sentence about it."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

from contrast.core.registry import InputError, describe, did_you_mean, schema
from contrast.experiment.config import (
    SECTIONS,
    Config,
    Loaded,
    flat,
    parts_of,
    resolved,
    to_text,
    trainer_arguments,
    with_defaults,
)
from contrast.experiment.parts import KINDS, Kind, described

FIELD = re.compile(r"^    (\w+): (.*)$")


@dataclass(frozen=True)
class Explanation:
    """What is known of one key.

    Args:
        key: with dots.
        type: what may be written there, in words.
        default: as YAML; empty where there is none.
        sentence: what it means.
        owner: the part that takes it; empty for a key of the config itself.
        choices: name -> first line, where the key names a part.
    """

    key: str
    type: str
    default: str
    sentence: str
    owner: str = ""
    choices: Mapping[str, str] | None = None

    def text(self, value: str = "", origin: str = "") -> str:
        """Return the explanation as lines for a terminal; with the key's value and where it was written, if given."""
        first = f"{self.key} = {value}  ({origin})" if value else self.key
        default = f"; default: {self.default}" if self.default else ""
        lines = [first, f"  {self.sentence}", f"  {self.type}{default}" + (f"; of {self.owner}" if self.owner else "")]
        width = max(map(len, self.choices or ()), default=0)
        lines += [f"    {name:<{width}}  {line}" for name, line in (self.choices or {}).items()]
        return "\n".join(lines)


def explain(loaded: Loaded, key: str) -> str:
    """Return what a key means, for `contrast show --explain KEY`.

    Args:
        loaded: the experiment, which says which parts are meant: `loss.temperature` is of its loss.
        key: with dots, also inside parts: "loss.loss.temperature", "memory.size", "trainer.devices".

    Raises:
        InputError: for a key that the config does not have.
    """
    values = dict(_with_lists(loaded.config, complete=True))
    written = dict(_with_lists(loaded.config, complete=False))

    def origin(of: str) -> str:
        return origin_of(of, loaded.origins) if of in written else "default"

    shown = [
        one.text(to_text(values[one.key]) if one.key in values else "", origin(one.key))
        for one in _explanations(loaded.config, key)
    ]
    if not shown and key in values:
        unknown = Explanation(key, "", "", "an argument of a part whose signature is not known here.")
        shown = [unknown.text(to_text(values[key]), origin(key)).rstrip()]
    if not shown:
        known = [*_keys(), *values]
        if key.startswith("trainer."):
            known = [f"trainer.{name}" for name in trainer_arguments()]
        raise InputError(f"--explain: the config has no key {key!r}.{did_you_mean(key, known)}")
    return "\n".join(shown)


def _with_lists(config: Config, *, complete: bool) -> Iterator[tuple[str, Any]]:
    """Iterate over (key, value), also of the parts in lists, `memory[0].size`; `complete`: with the defaults too."""
    yield from (resolved(config) if complete else flat(config)).items()
    for kind in KINDS.values():
        for where, part in parts_of(config, kind):
            given = {"name": part} if isinstance(part, str) else part
            yield from _inside(where, with_defaults(kind, given) if complete else given)


def _inside(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield f"{key}.{name}", one
            yield from _inside(f"{key}.{name}", one)
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from _inside(f"{key}[{number}]", one)


def origin_of(key: str, origins: Mapping[str, str]) -> str:
    """Return where the value of a key was written: a file, "command line", "call" or "default"."""
    while key:
        if key in origins:
            return origins[key]
        key, _, _ = key.rpartition("[") if key.endswith("]") else key.rpartition(".")
    return "default"


def fields_of(owner: Callable[..., Any]) -> dict[str, str]:
    """Return the sentence about each argument of a class or function, from the `Args:` of its docstrings.

    An argument that a class inherits is documented by the class that it inherits from.
    """
    sentences: dict[str, str] = {}
    for build in owner.__mro__ if inspect.isclass(owner) else (owner,):
        for documented in (build, getattr(build, "__init__", None)):
            for name, sentence in _arguments_in(inspect.getdoc(documented) or "").items():
                sentences.setdefault(name, sentence)
    return sentences


def type_of(key: str, annotation: Any) -> str:
    """Return in words what may be written at a key of the config."""
    if key in SECTIONS:
        return "a section"
    if key in KINDS:
        expected = "a list of parts" if KINDS[key].many else "a part"
        return f"{expected} or nothing (null)" if NoneType in typing.get_args(annotation) else expected
    return describe(annotation)


def _arguments_in(docstring: str) -> dict[str, str]:
    """Parse the section `Args:`, whose entries are indented once and whose further lines are indented twice."""
    section = docstring.partition("\nArgs:\n")[2]
    sentences: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        if (entry := FIELD.match(line)) is not None:
            name = entry[1]
            sentences[name] = entry[2].strip()
        elif line.strip() and name:
            sentences[name] = f"{sentences[name]} {line.strip()}".strip()
    return sentences


def _keys() -> Iterator[str]:
    for name in schema(Config):
        yield name
        if name in SECTIONS:
            yield from (f"{name}.{inner}" for inner in schema(SECTIONS[name]))


def _explanations(config: Config, key: str) -> Iterator[Explanation]:
    """Iterate over what the key may mean: one thing, or for a key inside a list of parts one per part that has it."""
    kind = next((kind for kind in KINDS.values() if key.startswith((f"{kind.key}.", f"{kind.key}["))), None)
    if kind is not None:
        inside = re.fullmatch(r"(\[\d+\])?\.(.+)", key.removeprefix(kind.key))
        for where, part in parts_of(config, kind) if inside else ():
            if inside is not None and inside[1] in (None, where.removeprefix(kind.key)):
                yield from _inside_part(kind, part, where, inside[2].split("."))
    elif key in _keys():
        section, _, name = key.rpartition(".")
        owner = SECTIONS[section] if section else Config
        kind = KINDS.get(key)
        yield _of_argument(owner, key, name, "", choices=described(kind.registry) if kind else None)
    elif key.startswith("trainer."):
        import lightning

        name = key.removeprefix("trainer.")
        if name in trainer_arguments():
            one = _of_argument(lightning.Trainer, key, name, "Lightning's Trainer")
            yield replace(one, default="")  # contrast sets defaults of its own


def _inside_part(kind: Kind, part: Any, where: str, path: list[str]) -> Iterator[Explanation]:
    name = str(part.get("name") if isinstance(part, Mapping) else part)
    first, *further = path
    index = re.fullmatch(r"(\w+)\[(\d+)\]", first)
    argument = index[1] if index else first
    if argument == "name" and not further:
        choices = described(kind.registry)
        yield Explanation(f"{where}.name", "text", "", f"which {kind.registry.kind}.", choices=choices)
    elif name in kind.registry and argument in schema(kind.registry[name]):
        if further and isinstance(part, Mapping) and kind.registry.takes_part(name, argument):
            yield from _inside_part(kind, part.get(argument), f"{where}.{argument}", further)
        elif further and isinstance(part, Mapping) and kind.registry.takes_parts(name, argument):
            for number, one in enumerate(part.get(argument) or ()):
                if index is None or int(index[2]) == number:
                    yield from _inside_part(kind, one, f"{where}.{argument}[{number}]", further)
        elif not (further or index):
            owner = f"the {kind.registry.kind} '{name}'"
            if argument in kind.facts:
                owner += "; filled in from the data and the run where it is not given"
            yield _of_argument(kind.registry[name], f"{where}.{argument}", argument, owner)


def _of_argument(
    build: Callable[..., Any], key: str, name: str, owner: str, choices: Mapping[str, str] | None = None
) -> Explanation:
    annotation, default = schema(build)[name]
    factory = not isinstance(default, str | int | float | bool | list | tuple | dict | None)
    sentence = fields_of(build).get(name, "")
    text = "" if default is inspect.Parameter.empty or factory else to_text(default)
    return Explanation(key, type_of(key, annotation), text, sentence, owner, choices)
