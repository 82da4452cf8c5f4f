"""The typed config: one YAML file and overrides, checked completely before any data is read."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from contrast.core.registry import InputError, Registry, check_arguments, did_you_mean, schema
from contrast.experiment.parts import KINDS, Kind, Part, import_plugins
from contrast.models.backbones import BACKBONES
from contrast.views.views import VIEWS

Override = str | tuple[str, Any]
"""One value over those of the file: the text "loss.temperature=0.2", or the pair ("loss.temperature", 0.2)."""


@dataclass(frozen=True)
class DataSettings:
    """What to read and how to split it; see `contrast.data.open_data`.

    Args:
        source: a path, "digits", "torchvision:NAME" or "aeon:NAME" (`contrast list data`).
        labels: a table next to an image folder, one row per image; for other sources the same as `target`.
        target: the column or array that has the labels; "none" reads no labels.
        split_by: a column (patient, slide, recording); items with equal values are never on two sides of a split.
        positives: which items are positives of each other: "sample" (only views of the same item), "label" (equal
            labels), or a column (equal values).
        splits: shares {test: 0.2, validation: 0.2} where the source has no split; validation is a share of train.
        size: height and width in pixels to which images are resized and cropped; null: chosen from the images.
        channels: 1, 3 or 4 channels to which images are converted; null: chosen from the images.
        workers: processes that read items ahead; 0: the training process reads them itself.
    """

    source: str = ""
    labels: str | None = None
    target: str | None = None
    split_by: str | None = None
    positives: str = "sample"
    splits: Mapping[str, Any] | None = None
    size: int | None = None
    channels: int | None = None
    workers: int = 0


@dataclass(frozen=True)
class EncoderSettings:
    """The network that is trained.

    Args:
        backbone: from inputs to features; `pretrained: true` starts from published weights, `pretrained: PATH` from a
            file.
        head: from features to the embeddings that the loss compares; it is dropped after pretraining.
        momentum: decay of the momentum encoder's moving average per step, in [0, 1]; null: no momentum encoder.
        predictor: a further head after the head of the trained encoder only (BYOL, SimSiam, MoCo v3); null: none.
        joint: true encodes all views of equal shape in one batch; false encodes them one by one, so that batch
            normalisation uses the statistics of one view (SimSiam, MoCo).
        reference: a frozen network, named as MODEL of `contrast evaluate`; losses such as cwcl and false_negatives
            with guide use the similarities of its features.
    """

    backbone: Part = "auto"
    head: Part = "mlp"
    momentum: float | None = None
    predictor: Part | None = None
    joint: bool = True
    reference: str | None = None


@dataclass(frozen=True)
class ProbeSettings:
    """The online probe: a linear classifier on frozen features, fitted at intervals during training.

    Args:
        every: steps between two probes; null: a twentieth of the run.
        items: maximum number of labelled items for fitting, and the same number for testing; 0: no online probe.
    """

    every: int | None = None
    items: int = 1000


@dataclass(frozen=True)
class EvaluateSettings:
    """What is measured after training.

    Args:
        protocols: a list of protocols; empty: nothing is measured.
        draws: random draws of labels, where a protocol has draws and does not say how many.
        labels_per_class: labels per class, where a protocol has few labels and does not say how many.
    """

    protocols: Sequence[Part] = ("knn", "linear", "few_labels")
    draws: int = 5
    labels_per_class: int = 10


@dataclass(frozen=True)
class ReportSettings:
    """The page of the run.

    Args:
        samples: false leaves out all pictures and names of items.
    """

    samples: bool = True


@dataclass(frozen=True)
class Config:
    """The settings of a run. "auto" is chosen from the data; the choice is written into the run's own config.yaml.

    Args:
        version: the version of the config format.
        seed: decides every random number of the run.
        name: the name of the run, used in its folder's name; empty: the name of the config file or of the loss.
        plugins: `.py` files or modules that register parts of your own.
        data: what to read and how to split it.
        views: a recipe, or a list of operations, or one list of operations per view.
        encoder: backbone, head, momentum encoder, predictor.
        loss: what is minimised.
        memory: sources of further candidates or of other positives; a list.
        sampler: the order in which items are drawn.
        optimizer: the optimiser and its arguments, such as lr, weight_decay and warmup.
        batch_size: items per step over all processes together.
        budget: how long to train: "200 epochs", "50000 steps", "8h" or "auto"; the schedule ends there.
        trainer: arguments of Lightning's Trainer, such as devices and precision.
        probe: the online probe.
        evaluate: what is measured after training.
        report: the page of the run.
        logger: where metrics go besides metrics.jsonl: "tensorboard" or "none".
    """

    version: Literal[1] = 1
    seed: int = 0
    name: str = ""
    plugins: Sequence[str] = ()
    data: DataSettings = field(default_factory=DataSettings)
    views: Part | Sequence[Any] = "auto"
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    loss: Part = "info_nce"
    memory: Sequence[Part] = ()
    sampler: Part = "shuffled"
    optimizer: Part = "adamw"
    batch_size: int | Literal["auto"] = "auto"
    budget: str = "auto"
    trainer: Mapping[str, Any] = field(default_factory=dict)
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    logger: Literal["tensorboard", "none"] = "tensorboard"


SECTIONS: dict[str, type] = {
    "data": DataSettings,
    "encoder": EncoderSettings,
    "probe": ProbeSettings,
    "evaluate": EvaluateSettings,
    "report": ReportSettings,
}
"""The sections of the config, by key."""
_AT_LEAST = {
    "seed": 0,
    "data.workers": 0,
    "probe.every": 1,
    "probe.items": 0,
    "evaluate.draws": 1,
    "evaluate.labels_per_class": 1,
}
_ORIGINS = {"command line": "on the command line", "call": "in the call"}
_BUDGET_DECIDES = ("max_epochs", "max_steps", "max_time", "min_epochs", "min_steps")
_SET_BY_CONTRAST = (
    "callbacks",
    "logger",
    "default_root_dir",
    "enable_checkpointing",
    "enable_progress_bar",
    "profiler",
)


@dataclass(frozen=True)
class Loaded:
    """A checked config and where each of its values came from.

    Args:
        config: the settings.
        origins: dotted key -> "command line", "call" or a file; what is not in it has its default.
    """

    config: Config
    origins: Mapping[str, str]


# ------------------------------------------------------------------------------------------------------------- loading


def load(config: str | None = None, overrides: Sequence[Override] = (), *, by: str = "command line") -> Loaded:
    """Read a config and apply overrides.

    Args:
        config: a shipped name, a `.yaml` file, or None for the defaults.
        overrides: in order, later ones win.
        by: where the overrides were written: "command line", or "call" for a call in Python.

    Raises:
        InputError: naming the file and the key, for the first thing that does not fit.
    """
    tree = defaults()
    origins: dict[str, str] = {}
    if config is not None:
        file = find(config)
        content = _read_yaml(file)
        if "plugins" in content:
            content["plugins"] = [_next_to(file, plugin) for plugin in _plugins(content)]
        for key, value in content.items():
            _override(tree, [key], value, origins, str(config))
        try:
            import_plugins(_plugins(tree))  # an override may reach into a part of theirs
        except InputError as error:
            raise InputError(with_origin(str(error), origins)) from None
    for override in overrides:
        key, value = _parsed(override, by) if isinstance(override, str) else override
        if "[" in key:
            outer = key.partition("[")[0]
            raise InputError(f"{_ORIGINS[by]}: {key}: {outer} is a list; write all of it, {outer}=[...].")
        _override(tree, key.split("."), _plain_values(value), origins, by)
    try:
        return Loaded(check(tree), origins)
    except InputError as error:
        raise InputError(with_origin(str(error), origins)) from None


def defaults() -> dict[str, Any]:
    """Return the defaults as a tree."""
    tree: dict[str, Any] = dataclasses.asdict(Config())
    for key in KINDS:
        parent, name = _parent(tree, key.split("."))
        if isinstance(parent[name], str) and parent[name] != "auto":
            parent[name] = {"name": parent[name]}
    return tree


def shipped() -> dict[str, Path]:
    """Return the configs that come with the package, by name."""
    inside = Path(__file__).parents[1] / "configs"
    folder = inside if inside.is_dir() else Path(__file__).parents[2] / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find(config: str) -> Path:
    """Return the file of a shipped name or of a path.

    Raises:
        InputError: where there is no such config.
    """
    known = shipped()
    if config in known:
        return known[config]
    file = Path(config)
    if file.suffix not in (".yaml", ".yml"):
        raise InputError(f"there is no config '{config}'.{did_you_mean(config, known)} Shipped: {', '.join(known)}.")
    if not file.is_file():
        raise InputError(f"there is no file {config}; give a .yaml file or a shipped config: {', '.join(known)}.")
    return file


def is_config(text: str) -> bool:
    """True if an argument of the command line names a config."""
    return text in shipped() or text.endswith((".yaml", ".yml"))


def is_override(text: str) -> bool:
    """True if an argument of the command line is `key=value`."""
    # os.path.exists, unlike Path.exists, answers for text that is too long to be a path.
    return re.match(r"[A-Za-z_][\w.\[\]]*=", text) is not None and not os.path.exists(text)  # noqa: PTH110


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as YAML: {_first_line(error)}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{file} must have `key: value` lines; it has a {type(tree).__name__}.")
    return {str(key): value for key, value in tree.items()}


def _plugins(tree: Mapping[str, Any]) -> list[Any]:
    """Return the plugins of a tree of settings; a single one may be given without the list."""
    plugins = tree.get("plugins") or []
    if isinstance(plugins, str):
        return [plugins]
    if not isinstance(plugins, list | tuple):
        raise InputError(f"plugins must be a list of .py files or module names; got {plugins!r}.")
    return list(plugins)


def _next_to(config: Path, plugin: Any) -> Any:
    """Return the path of a plugin in the folder of the config that names it; anything else unchanged."""
    file = config.parent / str(plugin)
    return str(file.resolve()) if str(plugin).endswith(".py") and file.is_file() else plugin


def _parsed(override: str, by: str) -> tuple[str, Any]:
    """Parse "key=value". The value is YAML; for a key that is text, it is that text: a folder may be called 2024."""
    key, _, text = override.partition("=")
    section, _, name = key.rpartition(".")
    owner = SECTIONS.get(section) if section else Config
    annotation = schema(owner)[name][0] if owner and name in schema(owner) else None
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if annotation in (str, str | None) and text not in ("", "null") and not quoted:
        return key, text
    try:
        return key, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise InputError(f"{_ORIGINS[by]}: {override}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return " ".join(str(error).replace('in "<unicode string>", ', "").split())[:300]


# ----------------------------------------------------------------------------------------------------------- overrides


def _override(tree: dict[str, Any], path: list[str], value: Any, origins: dict[str, str], origin: str) -> None:
    """Put one value into the tree; a mapping is merged, and a part without a name keeps the name that it has."""
    key = ".".join(path)
    parent, name = _parent(tree, path)
    current = parent.get(name)
    is_part = _registry_at(tree, path) is not None
    replaces = is_part and isinstance(value, Mapping) and "name" in value
    if is_part and isinstance(value, Mapping) and isinstance(current, str) and not replaces:
        current = parent[name] = {"name": current}
    if isinstance(value, Mapping) and isinstance(current, dict) and not replaces:
        for inner, one in value.items():
            _override(tree, [*path, str(inner)], one, origins, origin)
        return
    if path[-1] == "name" and _registry_at(tree, path[:-1]) is not None and parent.get("name") != value:
        for other in [other for other in parent if other != "name"]:
            del parent[other]  # another part does not take the arguments of the first
    if isinstance(value, str) and is_part and value != "auto":
        value = {"name": value}
    parent[name] = dict(value) if isinstance(value, Mapping) else value
    for outdated in [one for one in origins if one.startswith(f"{key}.")]:
        del origins[outdated]
    for inner, _ in _flatten(value, key):
        origins[inner] = origin
    origins[key] = origin


def _parent(tree: dict[str, Any], path: list[str]) -> tuple[dict[str, Any], str]:
    """Return the mapping that has the last name of the path, and that name; missing mappings are created."""
    root = tree
    for number, name in enumerate(path[:-1]):
        inner = tree.get(name)
        if isinstance(inner, str) and _registry_at(root, path[: number + 1]) is not None:
            inner = {"name": inner}
        elif inner is None:
            inner = {}
        elif not isinstance(inner, dict):
            key, outer = ".".join(path), ".".join(path[: number + 1])
            if isinstance(inner, list | tuple):
                raise InputError(f"{key}: {outer} is a list; write all of it, {outer}={to_text(inner)}.")
            raise InputError(f"{key}: {outer} is {inner!r} and has no keys.")
        tree[name] = inner
        tree = inner
    return tree, path[-1]


def _registry_at(tree: Mapping[str, Any], path: Sequence[str]) -> Registry | None:
    """Return the registry of the single part that belongs at this path, also of a part inside a part."""
    registry, parent = None, tree
    for number, name in enumerate(path):
        kind = KINDS.get(".".join(path[: number + 1]))
        if kind is not None:
            registry = None if kind.many else kind.registry
        elif registry is not None and not registry.takes_part(str(parent.get("name")), name):
            registry = None
        inner = parent.get(name)
        parent = inner if isinstance(inner, Mapping) else {"name": inner}
    return registry


# ------------------------------------------------------------------------------------------------------------ checking


def check(tree: Mapping[str, Any]) -> Config:
    """Return the typed config of a tree of settings, with every part checked against its signature.

    Raises:
        InputError: naming the key, for the first thing that does not fit.
    """
    tree = {**tree, "plugins": _plugins(tree)}
    import_plugins(tree["plugins"])
    config = Config(**_arguments(Config, {key: _checked(key, value) for key, value in tree.items()}, "the config"))
    values = flat(config)
    for key, least in _AT_LEAST.items():
        if values[key] is not None and values[key] < least:
            raise InputError(f"{key} must be {least} or more; got {values[key]}.")
    _check_trainer(config.trainer)
    for kind in KINDS.values():
        if kind.constructed_early:
            for where, part in parts_of(config, kind):
                _construct(kind, part, where)
    names = [part["name"] if isinstance(part, Mapping) else part for part in config.evaluate.protocols]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"evaluate.protocols: '{twice[0]}' is given twice; give each protocol once.")
    return config


def _construct(kind: Kind, part: Part, where: str) -> bool:
    """Construct a part for the values that its constructor refuses; return False where it, or a part inside, needs a
    fact of the run. The parts inside are constructed first.
    """
    name, arguments = kind.registry.check(part, where=where)
    kind.registry.check_complete(name, {*arguments, *kind.facts}, where=where)
    ready = not any(fact in schema(kind.registry[name]) and fact not in arguments for fact in kind.facts)
    for key, value in arguments.items():
        inner = {f"{where}.{key}": value}
        if kind.registry.takes_parts(name, key) and isinstance(value, list):
            inner = {f"{where}.{key}[{number}]": one for number, one in enumerate(value)}
        elif not kind.registry.takes_part(name, key):
            inner = {}
        for place, one in inner.items():
            ready &= not isinstance(one, Mapping) or _construct(kind, one, place)
    if ready:
        kind.build(part, where=where)
    return ready


def parts_of(config: Config, kind: Kind) -> Iterator[tuple[str, Part]]:
    """Iterate over the parts of one kind as (key, part); the parts of a list have keys such as `memory[0]`."""
    value: Any = config
    for name in kind.key.split("."):
        value = getattr(value, name)
    if kind.many:
        yield from ((f"{kind.key}[{number}]", part) for number, part in enumerate(value))
    elif isinstance(value, str | Mapping):
        yield kind.key, value


def _arguments(owner: type, settings: Mapping[str, Any], name: str, where: str = "") -> dict[str, Any]:
    return check_arguments(owner, settings, where=where, owner=name)


def _checked(key: str, value: Any) -> Any:
    """Return the value of a key once it fits: a section, a part, a list of parts, or a plain value."""
    if key in SECTIONS:
        section = SECTIONS[key]
        if not isinstance(value, Mapping):
            raise InputError(f"{key} must be a mapping with some of {', '.join(schema(section))}; got {value!r}.")
        inner = {name: _checked(f"{key}.{name}", one) for name, one in value.items()}
        return section(**_arguments(section, inner, f"'{key}'", key))
    if key not in KINDS:
        return value
    kind = KINDS[key]
    if kind.many:
        return kind.registry.check_list([] if value is None else value, where=key)
    if value is None and key == "encoder.predictor":
        return None
    if value == "auto" or (isinstance(value, Mapping) and value.get("name") == "auto"):
        return _checked_auto(kind, value)
    if key == "views" and isinstance(value, list | tuple):
        return _checked_operations(key, value)
    if key == "encoder.backbone":
        return _checked_backbone(key, value)
    name, arguments = kind.registry.check(value, where=key)
    return {"name": name, **arguments}


def _checked_auto(kind: Kind, value: str | Mapping[str, Any]) -> str | Mapping[str, Any]:
    arguments = [] if isinstance(value, str) else [name for name in value if name != "name"]
    for name in arguments:
        if (kind.key, name) != ("views", "count"):
            raise InputError(
                f"{kind.key}.{name}: 'auto' does not take it; give {kind.key}.name, one of {', '.join(kind.registry)}."
            )
    return value if arguments else "auto"


def _checked_operations(key: str, value: Sequence[Any]) -> list[Any]:
    """Check a list of view operations, or a list of lists, one per view."""
    checked: list[Any] = []
    for number, one in enumerate(value):
        where = f"{key}[{number}]"
        if isinstance(one, list | tuple):
            checked.append(_checked_operations(where, one))
        else:
            name, arguments = VIEWS.check(one, where=where)
            checked.append({"name": name, **arguments})
    return checked


def _checked_backbone(key: str, value: Any) -> Any:
    """Check a backbone of ours against its signature; a timm or torchvision name is checked when it is built."""
    part = {"name": value} if isinstance(value, str) else value
    if not isinstance(part, Mapping) or not isinstance(part.get("name"), str):
        raise InputError(f"{key} must be a name or {{name: ..., ...}}; got {value!r}.")
    if part["name"] not in BACKBONES:
        return dict(part)
    own = {name: one for name, one in part.items() if name != "pretrained"}
    name, arguments = BACKBONES.check(own, where=key)
    weights = {"pretrained": part["pretrained"]} if "pretrained" in part else {}
    return {"name": name, **arguments, **weights}


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    for name in trainer:
        if name in _BUDGET_DECIDES:
            raise InputError(
                f'trainer.{name}: the budget decides that; write budget: "200 epochs", "50000 steps" or "8h".'
            )
        if name in _SET_BY_CONTRAST:
            raise InputError(f"trainer.{name} is set by contrast; leave it out.")
    if trainer:
        import lightning  # takes seconds, and most configs do not need it here

        check_arguments(lightning.Trainer, trainer, where="trainer", owner="Lightning's Trainer")


def trainer_arguments() -> list[str]:
    """Return the arguments of Lightning's Trainer that a config may give."""
    import lightning

    return [name for name in schema(lightning.Trainer) if name not in (*_BUDGET_DECIDES, *_SET_BY_CONTRAST)]


def with_origin(message: str, origins: Mapping[str, str]) -> str:
    """Return the message of an error, preceded by where its key was written: a file or the command line.

    Args:
        message: begins with the dotted key.
        origins: as of `Loaded`.
    """
    key = re.split(r"[:\s]", message, maxsplit=1)[0].lstrip(".")
    while key and key not in origins:
        key, _, _ = key.rpartition("[") if key.endswith("]") else key.rpartition(".")
    origin = origins.get(key)
    message = message.lstrip(".")
    return message if origin is None else f"{_ORIGINS.get(origin, origin)}: {message}"


# ------------------------------------------------------------------------------------------------------------- writing


def to_yaml(config: Config) -> str:
    """Return the complete config as YAML that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(_plain_values(dataclasses.asdict(config)))))


def to_text(value: Any) -> str:
    """Return a value as YAML on one line, which an override reads back; a part without arguments as its name."""
    value = _plain_values(value)
    if isinstance(value, dict) and set(value) == {"name"}:
        value = value["name"]
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("...\n").strip()


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes anything that YAML does not know as its text."""


_Dumper.add_multi_representer(object, lambda dumper, value: dumper.represent_str(str(value)))
# OmegaConf, unlike PyYAML, reads 1e5 as a number: a text like that is written in quotes.
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)?\.?\d[\d_]*([eE][-+]?\d+)$"), list("-+0123456789.")
)


def _escaped(value: Any) -> Any:
    """Return a value whose texts contain no interpolation: `${x}` in them is not a reference to the key x."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", value)
    return value


def flat(config: Config) -> dict[str, Any]:
    """Return every value by its dotted key."""
    return dict(_flatten(_plain_values(dataclasses.asdict(config))))


def resolved(config: Config) -> dict[str, Any]:
    """Return every value by its dotted key, with the defaults of the parts' arguments; without facts of the run.

    A part inside a part has keys of its own: `loss.loss.temperature`.
    """
    values = flat(config)
    for kind in KINDS.values():
        complete = [(where, with_defaults(kind, part)) for where, part in parts_of(config, kind)]
        if kind.many:
            values[kind.key] = [part for _, part in complete]
        for where, part in () if kind.many else complete:
            if isinstance(part, Mapping):
                values.pop(where, None)
                values |= dict(_flatten(part, where))
    order = [one.name for one in dataclasses.fields(Config)]
    return dict(sorted(values.items(), key=lambda item: order.index(item[0].split(".")[0])))


def with_defaults(kind: Kind, part: Any) -> Any:
    """Return a part with the defaults of its arguments; facts of the run are left out where they are not given."""
    part = {"name": part} if isinstance(part, str) else part
    if not isinstance(part, Mapping) or part.get("name") not in kind.registry:
        return part
    name = str(part["name"])
    complete = dict(part)
    for argument, (_, default) in schema(kind.registry[name]).items():
        if default is not inspect.Parameter.empty and argument not in kind.facts:
            complete.setdefault(argument, default)
        if kind.registry.takes_part(name, argument) and isinstance(complete.get(argument), Mapping | str):
            complete[argument] = with_defaults(kind, complete[argument])
        elif kind.registry.takes_parts(name, argument) and isinstance(complete.get(argument), list | tuple):
            complete[argument] = [with_defaults(kind, one) for one in complete[argument]]
    return complete


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _plain_values(value: Any) -> Any:
    """Return a value with dictionaries, lists, text and Python's numbers in place of similar types."""
    if isinstance(value, Mapping):
        return {str(key): _plain_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_values(inner) for inner in value]
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return value.tolist()
    return str(value) if isinstance(value, Path) else value
