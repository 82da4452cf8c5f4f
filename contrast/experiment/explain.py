"""What a key of the config means: its type, its value, its default and the sentence about it."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from contrast.core.registry import InputError, describe, did_you_mean, schema
from contrast.experiment.config import SECTIONS, Config, Loaded, parts_of, resolved, to_text, with_defaults
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
    values = resolved(loaded.config)
    for kind in KINDS.values():
        for where, part in parts_of(loaded.config, kind) if kind.many else ():
            values |= {f"{where}.{name}": value for name, value in with_defaults(kind, part).items()}
    shown = []
    for one in _explanations(loaded.config, key):
        value = to_text(values[one.key]) if one.key in values else ""
        shown.append(one.text(value, origin_of(one.key, loaded.origins)))
    if not shown:
        known = [*_keys(), *values]
        raise InputError(f"--explain: the config has no key {key!r}.{did_you_mean(key, known)}")
    return "\n".join(shown)


def origin_of(key: str, origins: Mapping[str, str]) -> str:
    """Return where the value of a key was written: a file, "command line", "call" or "default"."""
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
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
        rest = key.removeprefix(kind.key)
        place = re.match(r"\[\d+\]", rest)
        for where, part in parts_of(config, kind):
            if not kind.many or place is None or where == f"{kind.key}{place[0]}":
                inner = rest[place.end() :] if place else rest
                yield from _inside_part(kind, part, where, inner.lstrip(".").split("."))
    elif key in _keys():
        section, _, name = key.rpartition(".")
        owner = SECTIONS[section] if section else Config
        kind = KINDS.get(key)
        yield _of_argument(owner, key, name, "", choices=described(kind.registry) if kind else None)
    elif key.startswith("trainer."):
        import lightning

        name = key.removeprefix("trainer.")
        if name in schema(lightning.Trainer):
            yield _of_argument(lightning.Trainer, key, name, "Lightning's Trainer")


def _inside_part(kind: Kind, part: Any, where: str, path: list[str]) -> Iterator[Explanation]:
    name = str(part.get("name") if isinstance(part, Mapping) else part)
    argument, *further = path
    if argument == "name" and not further:
        choices = described(kind.registry)
        yield Explanation(f"{where}.name", "text", "", f"which {kind.registry.kind}.", choices=choices)
    elif name in kind.registry and argument in schema(kind.registry[name]):
        if further and isinstance(part, Mapping) and kind.registry.takes_part(name, argument):
            yield from _inside_part(kind, part.get(argument), f"{where}.{argument}", further)
        elif not further:
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
    return Explanation(key, type_of(key, annotation), text, sentence[:1].upper() + sentence[1:], owner, choices)
