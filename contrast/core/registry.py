"""Names for parts: a decorator and a name, and the constructor's signature as the schema."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union

Part = TypeVar("Part", bound=Callable[..., Any])


class InputError(ValueError):
    """What a user typed or passed is wrong; the message is one clear sentence.

    Example:
        >>> contrast.LOSSES.build("info_nse")
        Traceback (most recent call last):
        contrast.core.registry.InputError: ... Did you mean 'info_nce'? ...
    """


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the most similar of `words`, or nothing where none is similar."""
    known = {other.lower(): other for other in words}
    similar = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f" Did you mean '{known[similar[0]]}'?" if similar else ""


class Registry(Mapping[str, Callable[..., Any]]):
    """The parts of one kind by name: losses, backbones, heads, views.

    Args:
        kind: what the parts are, as messages call it ("loss").

    Example:
        >>> poolings = contrast.Registry("pooling")
        >>> @poolings.register("mean")
        ... def mean(dim: int = -1):
        ...     return lambda x: x.mean(dim)
        >>> poolings.build({"name": "mean", "dim": 0})(torch.ones(2, 3))
        tensor([1., 1., 1.])
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._parts: dict[str, Callable[..., Any]] = {}
        self._aliases: dict[str, str] = {}

    def register(self, name: str, *, aliases: Sequence[str] = ()) -> Callable[[Part], Part]:
        """Return the decorator that enters a class or function under `name`.

        An alias is not a second name: it is answered with an error that says the right one.
        """

        def enter(part: Part) -> Part:
            if name in self._parts:
                raise InputError(f"two parts are registered as the {self.kind} '{name}'; rename one of them.")
            self._parts[name] = part
            self._aliases.update({_letters_and_digits(alias): name for alias in (name, *aliases)})
            return part

        return enter

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """Return the part called `name`; an unknown name raises an InputError with the most similar one."""
        if name in self._parts:
            return self._parts[name]
        if (right := self._aliases.get(_letters_and_digits(name))) is not None:
            raise InputError(f"the {self.kind} '{name}' is called '{right}' here.")
        raise InputError(
            f"there is no {self.kind} '{name}'.{did_you_mean(name, self._parts)} "
            f"Known: {', '.join(sorted(self._parts))}."
        )

    def __contains__(self, name: object) -> bool:
        """True if a part has this very name; aliases do not count."""
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in alphabetical order."""
        return iter(sorted(self._parts))

    def __len__(self) -> int:
        """Count the parts."""
        return len(self._parts)

    def build(self, part: str | Mapping[str, Any], *, where: str = "", **facts: Any) -> Any:
        """Make a part from its name, or from {"name": ..., its constructor's arguments}.

        Args:
            part: a name or a mapping, as in a config.
            where: the key of the config, for messages ("loss").
            **facts: what only the run knows (samples, dim, ...); each fills the constructor's parameter of that name,
                where there is one and `part` does not give it. The parts inside `part`, which are built first, get
                them too.

        Raises:
            InputError: for an unknown name or argument, a wrong type, a missing one, or a value that the constructor
                refuses.
        """
        where = where or self.kind
        name, arguments = self.check(part, where=where)
        build = self[name]
        for key, value in arguments.items():
            if self._is_part(name, key, value):
                arguments[key] = self.build(value, where=f"{where}.{key}", **facts)
            elif value is not None and self.takes_parts(name, key):
                arguments[key] = [
                    self.build(one, where=f"{where}.{key}[{number}]", **facts) if _names_part(one) else one
                    for number, one in enumerate(value)
                ]
        known = schema(build)
        filled = {key: value for key, value in facts.items() if key in known and key not in arguments} | arguments
        self.check_complete(name, filled, where=where)
        try:
            return build(**filled)
        except InputError:
            raise
        except (ValueError, TypeError) as error:
            raise InputError(f"{where} '{name}': {error}") from error

    def check(self, part: str | Mapping[str, Any], *, where: str) -> tuple[str, dict[str, Any]]:
        """Return the name and the arguments of a part once both fit its signature, without building it.

        An argument that is itself a part, or a list of parts, is checked as such, and returned as
        {"name": ..., its arguments}; a single part is accepted as a list of one.
        """
        if isinstance(part, str):
            part = {"name": part}
        if not isinstance(part, Mapping) or not isinstance(part.get("name"), str):
            raise InputError(f"{where} must be a name or a mapping with a name, {{name: ..., ...}}; got {part!r}.")
        arguments = {str(key): value for key, value in part.items() if key != "name"}
        try:
            build = self[part["name"]]
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        name, owner = part["name"], f"{self.kind} '{part['name']}'"
        checked: dict[str, Any] = {}
        for key, value in arguments.items():
            if self._is_part(name, key, value):
                checked[key] = self._named(value, where=f"{where}.{key}")
            elif value is not None and self.takes_parts(name, key):
                checked[key] = self.check_list(value, where=f"{where}.{key}")
            else:
                checked |= check_arguments(build, {key: value}, where=where, owner=owner)
        return name, checked

    def check_complete(self, name: str, given: Collection[str], *, where: str) -> None:
        """Raise an InputError where the part called `name` has an argument without default that is not given."""
        for key, (annotation, default) in schema(self[name]).items():
            if default is inspect.Parameter.empty and key not in given:
                expected = describe(annotation)
                if self.takes_part(name, key):
                    expected = f"a {self.kind}"
                elif self.takes_parts(name, key):
                    expected = f"a list, each a {self.kind}"
                raise InputError(f"{where} '{name}': {key} is missing; give {where}.{key}, {expected}.")

    def check_list(self, parts: Any, *, where: str) -> list[Any]:
        """Return a list of parts, each checked and as {"name": ..., its arguments}; objects stay as they are.

        Args:
            parts: a list, or one part, which stands for a list of one.
            where: the key of the config, for messages; an entry is `where[0]`.
        """
        listed = [parts] if _names_part(parts) else parts
        if not isinstance(listed, list | tuple):
            raise InputError(f"{where} must be a list, each a {self.kind}: [{{name: ..., ...}}, ...]; got {parts!r}.")
        return [
            one if self._is_instance(one) else self._named(one, where=f"{where}[{number}]")
            for number, one in enumerate(listed)
        ]

    def _named(self, part: Any, *, where: str) -> dict[str, Any]:
        name, arguments = self.check(part, where=where)
        return {"name": name, **arguments}

    def takes_part(self, name: str, argument: str) -> bool:
        """True if this argument of a part is itself a part of this registry: its annotation is their class."""
        return any(self._is_kind(option) for option in _options(self._annotation(name, argument)))

    def takes_parts(self, name: str, argument: str) -> bool:
        """True if this argument is a list of parts of this registry, `Sequence[...]` or `list[...]` of their class."""
        return any(
            typing.get_origin(option) in (list, tuple, Sequence)
            and any(self._is_kind(kind) for one in typing.get_args(option)[:1] for kind in _options(one))
            for option in _options(self._annotation(name, argument))
        )

    def _annotation(self, name: str, argument: str) -> Any:
        return schema(self._parts[name]).get(argument, (None, None))[0] if name in self._parts else None

    def _is_kind(self, annotation: Any) -> bool:
        """True for a class of which some part of this registry is a subclass."""
        if not inspect.isclass(annotation) or annotation is object or getattr(annotation, "_is_protocol", False):
            return False
        return any(inspect.isclass(part) and issubclass(part, annotation) for part in self._parts.values())

    def _is_instance(self, value: Any) -> bool:
        return any(inspect.isclass(part) and isinstance(value, part) for part in self._parts.values())

    def _is_part(self, name: str, argument: str, value: Any) -> bool:
        return _names_part(value) and self.takes_part(name, argument)


def _names_part(value: Any) -> bool:
    return isinstance(value, str | Mapping)


def _options(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself."""
    return typing.get_args(annotation) if typing.get_origin(annotation) in (Union, UnionType) else (annotation,)


def schema(build: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Return each argument's annotation and default (`inspect.Parameter.empty` where it has none)."""
    target = build.__init__ if inspect.isclass(build) else build
    hints = typing.get_type_hints(target)
    open_ended = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {
        name: (hints.get(name, Any), parameter.default)
        for name, parameter in inspect.signature(build).parameters.items()
        if parameter.kind not in open_ended
    }


def check_arguments(
    build: Callable[..., Any], arguments: Mapping[str, Any], *, where: str, owner: str
) -> dict[str, Any]:
    """Return `arguments` as the signature of `build` wants them, or raise an InputError that names the key."""
    known = schema(build)
    accepts_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(build).parameters.values())
    checked = {}
    for key, value in arguments.items():
        if key not in known:
            if accepts_any:
                checked[key] = value
                continue
            near, takes = (
                did_you_mean(key, known),
                f" It takes: {', '.join(known)}." if known else " It takes no arguments.",
            )
            raise InputError(
                f"{where}.{key}: {owner} has no such argument.{near}{takes if not near or len(known) < 12 else ''}"
            )
        checked[key] = convert(value, known[key][0], where=f"{where}.{key}")
    return checked


def convert(value: Any, annotation: Any, *, where: str) -> Any:
    """Return `value` as the annotated type (an int where a float is wanted becomes one), or raise an InputError."""
    fits, converted = _fit(value, annotation)
    if not fits:
        raise InputError(f"{where} must be {describe(annotation)}; got {'nothing' if value is None else repr(value)}.")
    return converted


def _fit(value: Any, annotation: Any) -> tuple[bool, Any]:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True, value
    if origin in (Union, UnionType):
        return next(((True, fitted) for option in inner for fits, fitted in [_fit(value, option)] if fits), (False, 0))
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in inner), value
    if annotation in (None, NoneType):
        return value is None, value
    if annotation is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number, float(value) if number else value
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        if not isinstance(value, list | tuple) or len(value) != len(inner):
            return False, value
        parts = [_fit(item, kind) for item, kind in zip(value, inner, strict=True)]
        return all(fits for fits, _ in parts), tuple(item for _, item in parts)
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            return False, value
        parts = [_fit(item, inner[0] if inner else Any) for item in value]
        kind = list if origin is list else tuple
        return all(fits for fits, _ in parts), kind(item for _, item in parts)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping), value
    kind = origin or annotation
    return not inspect.isclass(kind) or isinstance(value, kind), value


def describe(annotation: Any) -> str:
    """Describe an annotation in words: "a number", "one of all, across", "a whole number or nothing"."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(describe(option) for option in inner))
    if origin is Literal:
        return ("one of " if len(inner) > 1 else "") + ", ".join(str(option) for option in inner)
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        NoneType: "nothing (null)",
        None: "nothing (null)",
    }
    if annotation in words:
        return words[annotation]
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)}: " + ", ".join(describe(kind) for kind in inner)
    if origin in (list, tuple, Sequence):
        return "a list" + (f" of {describe(inner[0])}" if inner and inner[0] is not Any else "")
    if origin in (dict, Mapping):
        return "a mapping"
    return f"a {getattr(annotation, '__name__', annotation)}"


def _letters_and_digits(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
