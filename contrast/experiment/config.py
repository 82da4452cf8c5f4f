"""The typed experiment: one YAML file and `key=value` words, checked whole before any data is touched."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from contrast.core.registry import InputError, Registry, check_arguments, did_you_mean, schema
from contrast.data.loader import SAMPLERS
from contrast.evaluation.protocols import PROTOCOLS
from contrast.losses import LOSSES
from contrast.memory import MEMORIES
from contrast.models.backbones import BACKBONES
from contrast.models.heads import HEADS
from contrast.train.optimizers import OPTIMIZERS
from contrast.views.views import RECIPES, VIEWS

Part = Mapping[str, Any] | str
"""{name: ..., its constructor's arguments}, or a bare name."""


@dataclass(frozen=True)
class DataSettings:
    """What to read and how to split it; see `contrast.data.source.open_data`."""

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
    """Backbone and head; `momentum` adds a momentum twin, `predictor` a second head on the online side.

    `joint: false` sends each view through on its own, so that batch normalisation sees one view at a time.
    `reference` names a frozen network, as `contrast evaluate` takes it: its features say how alike samples are, for the
    losses that ask (cwcl, false_negatives with guide).
    """

    backbone: Part = "auto"
    head: Part = "mlp"
    momentum: float | None = None
    predictor: Part | None = None
    joint: bool = True
    reference: str | None = None


@dataclass(frozen=True)
class ProbeSettings:
    """The online probe: how often (steps; null: twenty times a run) and on how many items; 0 items: never."""

    every: int | None = None
    items: int = 1000


@dataclass(frozen=True)
class EvaluateSettings:
    """What follows training; an empty list of protocols: nothing."""

    protocols: Sequence[str] = ("knn", "linear", "few_labels")
    draws: int = 5
    labels_per_class: int = 10


@dataclass(frozen=True)
class ReportSettings:
    """The report; `samples: false` leaves every sample out."""

    samples: bool = True


@dataclass(frozen=True)
class Config:
    """An experiment, version 1. "auto" is chosen by the data and written into the run's own config."""

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
PARTS: dict[str, Registry] = {
    "views": RECIPES,
    "encoder.backbone": BACKBONES,
    "encoder.head": HEADS,
    "encoder.predictor": HEADS,
    "loss": LOSSES,
    "sampler": SAMPLERS,
    "optimizer": OPTIMIZERS,
}
LOSS_FACTS = {"samples": 1, "dim": 1, "epochs": 1}
"""What only the run knows of a loss: `build.py` fills it in, here stands what does for a check."""
MEMORY_FACTS = ("samples", "dim", "heads", "reference_dim", "bank", "store", "seed")
"""What only the run knows of a memory."""
_AT_LEAST = {
    "seed": 0,
    "data.workers": 0,
    "probe.every": 1,
    "probe.items": 0,
    "evaluate.draws": 1,
    "evaluate.labels_per_class": 1,
}
"""The keys of the experiment itself that count something; parts look after their own arguments."""
_WHERE = {"command line": "on the command line", "call": "in the call"}
_BUDGET_SAYS = ("max_epochs", "max_steps", "max_time", "min_epochs", "min_steps")
_OURS = ("callbacks", "logger", "default_root_dir", "enable_checkpointing", "enable_progress_bar", "profiler")


@dataclass(frozen=True)
class Loaded:
    """A checked config and where each of its values came from.

    Args:
        config: the experiment.
        origins: dotted key -> "default", "command line", a file, or "picked".
    """

    config: Config
    origins: Mapping[str, str]


def load(config: str | None = None, words: Sequence[str] = (), *, by: str = "command line") -> Loaded:
    """Read a config and lay `key=value` words over it.

    Args:
        config: a shipped name, a `.yaml` file, or nothing for the defaults.
        words: "loss.temperature=0.2", later ones win.
        by: where the words were written: "command line", or "call" for a call in Python.

    Raises:
        InputError: naming the file and the key, for the first thing that does not fit.
    """
    tree = defaults()
    origins: dict[str, str] = {}
    if config is not None:
        file = find(config)
        written = _read_yaml(file)
        if isinstance(written.get("plugins"), list):
            written["plugins"] = [_beside(file, plugin) for plugin in written["plugins"]]
        for key, value in written.items():
            _lay(tree, [str(key)], value, origins, str(config))
        try:
            _plugins(tree["plugins"])  # a word may reach into a part of theirs
        except InputError as error:
            raise InputError(with_origin(str(error), origins)) from None
    for word in words:
        key, _, text = word.partition("=")
        _lay(tree, key.split("."), _value(word, key, text, by), origins, by)
    try:
        return Loaded(check(tree), origins)
    except InputError as error:
        raise InputError(with_origin(str(error), origins)) from None


def check(tree: Mapping[str, Any]) -> Config:
    """Give the typed experiment of a tree of settings, every part of it checked against its signature."""
    _plugins(tree.get("plugins", ()))
    settings = {key: _checked(key, value) for key, value in tree.items()}
    config = Config(**check_arguments(Config, settings, where="", owner="the config"))
    values = flat(config)
    for key, least in _AT_LEAST.items():
        if values[key] is not None and values[key] < least:
            raise InputError(f"{key} must be {least} or more; got {values[key]}.")
    for number, protocol in enumerate(config.evaluate.protocols):
        PROTOCOLS.check(protocol, where=f"evaluate.protocols[{number}]")
    _check_trainer(config.trainer)
    # What needs no data is built once and forgotten, for the values that its constructor refuses.
    LOSSES.build(config.loss, where="loss", **LOSS_FACTS)
    OPTIMIZERS.build(config.optimizer, where="optimizer")
    SAMPLERS.build(config.sampler, where="sampler")
    return config


def _checked(key: str, value: Any) -> Any:
    """Check what stands at a key of the first level, where it is a section or made of parts."""
    if key in SECTIONS:
        return _section(key, value)
    if key == "memory":
        return memories(value)
    return part(key, value) if key in PARTS else value


def part(key: str, value: Any) -> Any:
    """Give a part as {name: ..., arguments}, checked against its constructor; lists of views and "auto" as they are."""
    registry = PARTS[key]
    if value is None or value == "auto" or (isinstance(value, Mapping) and value.get("name") == "auto"):
        if value is None and key != "encoder.predictor":
            raise InputError(f"{key} must be a name or {{name: ..., ...}}; got nothing.")
        taken = ["name", "count"] if key == "views" else ["name"]
        if isinstance(value, Mapping) and (odd := [name for name in value if name not in taken]):
            raise InputError(f"{key}.{odd[0]}: 'auto' does not take it; give {key}.name, one of {', '.join(registry)}.")
        return value if value is None or (isinstance(value, Mapping) and len(value) > 1) else "auto"
    if key == "views" and isinstance(value, list | tuple):
        return _operations(key, value)
    if key == "encoder.backbone":
        return _backbone(key, value)
    name, arguments = registry.check(value, where=key)
    return {"name": name, **arguments}


def memories(value: Any) -> list[dict[str, Any]]:
    """Give the memories, each checked against its constructor; one may stand alone, without the list."""
    listed = [value] if isinstance(value, str | Mapping) else [] if value is None else value
    if not isinstance(listed, list | tuple):
        raise InputError(f"memory must be a list of memories, [{{name: queue, size: 4096}}]; got {value!r}.")
    checked = (MEMORIES.check(one, where=f"memory[{number}]") for number, one in enumerate(listed))
    return [{"name": name, **arguments} for name, arguments in checked]


def defaults() -> dict[str, Any]:
    """Give the defaults as a tree."""
    tree: dict[str, Any] = dataclasses.asdict(Config())
    for key in PARTS:
        parent, name = _parent(tree, key.split("."))
        if isinstance(parent[name], str) and parent[name] != "auto":
            parent[name] = {"name": parent[name]}
    return tree


def to_yaml(config: Config) -> str:
    """Give the whole config as YAML that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(dataclasses.asdict(config))))


def flat(config: Config) -> dict[str, Any]:
    """Give every value by its dotted key."""
    return dict(_flatten(_plain(dataclasses.asdict(config))))


def resolved(config: Config) -> dict[str, Any]:
    """Give every value by its dotted key, also the defaults of the parts' own arguments; facts of the run are left out.

    A part inside a part has keys of its own: `loss.loss.temperature`.
    """
    values = flat(config)
    parts = list(PARTS.items())
    for key, registry in parts:
        name = str(values.get(f"{key}.name"))
        if name in registry:
            for argument, (_, default) in schema(registry[name]).items():
                if registry.takes_part(name, argument):
                    parts.append((f"{key}.{argument}", registry))
                elif default is not inspect.Parameter.empty and not (registry is LOSSES and argument in LOSS_FACTS):
                    values.setdefault(f"{key}.{argument}", default)
    if config.memory:
        values["memory"] = [_with_defaults(one) for one in config.memory]
    order = [field.name for field in dataclasses.fields(Config)]
    return dict(sorted(values.items(), key=lambda item: order.index(item[0].split(".")[0])))


def _with_defaults(memory: Part) -> dict[str, Any]:
    """Give a memory with the defaults of its arguments; facts of the run are left out."""
    name, arguments = MEMORIES.check(memory, where="memory")
    known = schema(MEMORIES[name])
    free = {key: default for key, (_, default) in known.items() if key not in MEMORY_FACTS}
    left = {key: default for key, default in free.items() if default is not inspect.Parameter.empty}
    return {"name": name, **left, **arguments}


def shipped() -> dict[str, Path]:
    """Give the configs that come with the package, by name."""
    inside = Path(__file__).parents[1] / "configs"
    folder = inside if inside.is_dir() else Path(__file__).parents[2] / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find(config: str) -> Path:
    """Give the file of a shipped name or of a path."""
    known = shipped()
    if config in known:
        return known[config]
    file = Path(config)
    if file.suffix not in (".yaml", ".yml"):
        raise InputError(f"there is no config '{config}'.{did_you_mean(config, known)} Shipped: {', '.join(known)}.")
    if not file.is_file():
        raise InputError(f"there is no file {config}; give a .yaml file or a shipped config: {', '.join(known)}.")
    return file


def is_config(word: str) -> bool:
    """Tell whether a word of the command line names a config."""
    return word in shipped() or word.endswith((".yaml", ".yml"))


def is_setting(word: str) -> bool:
    """Tell whether a word of the command line is `key=value`."""
    return re.match(r"[A-Za-z_][\w.]*=", word) is not None and not Path(word).exists()


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as YAML: {_first_line(error)}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{file} must hold `key: value` lines; it holds a {type(tree).__name__}.")
    return {str(key): value for key, value in tree.items()}


def _value(word: str, key: str, text: str, by: str) -> Any:
    """Read what stands behind `key=` as YAML; where the key wants text, as it stands: a folder may be called 2024."""
    section, _, name = key.rpartition(".")
    owner = SECTIONS.get(section) if section else Config
    annotation = schema(owner)[name][0] if owner and name in schema(owner) else None
    if annotation in (str, str | None) and text not in ("", "null"):
        return text
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise InputError(f"{_WHERE[by]}: {word}: {_first_line(error)}") from None


def _lay(tree: dict[str, Any], path: list[str], value: Any, origins: dict[str, str], origin: str) -> None:
    """Lay one value over the tree; a mapping goes into the one below, a part without a name keeps the one it has."""
    key = ".".join(path)
    parent, name = _parent(tree, path)
    below = parent.get(name)
    part_here = _registry_at(tree, path) is not None
    renamed = isinstance(value, Mapping) and "name" in value and part_here
    if isinstance(value, Mapping) and isinstance(below, str) and part_here and not renamed:
        below = parent[name] = {"name": below}
    if isinstance(value, Mapping) and isinstance(below, dict) and not renamed:
        for inner, one in value.items():
            _lay(tree, [*path, str(inner)], one, origins, origin)
        return
    if path[-1] == "name" and _registry_at(tree, path[:-1]) is not None and parent.get("name") != value:
        for other in [other for other in parent if other != "name"]:
            del parent[other]
    if isinstance(value, str) and part_here and value != "auto":
        value = {"name": value}
    parent[name] = dict(value) if isinstance(value, Mapping) else value
    for stale in [one for one in origins if one.startswith(f"{key}.")]:
        del origins[stale]
    for inner, _ in _flatten(value, key):
        origins[inner] = origin
    origins[key] = origin


def _parent(tree: dict[str, Any], path: list[str]) -> tuple[dict[str, Any], str]:
    """Walk to the mapping that holds the last word of the path, making what is missing."""
    root = tree
    for number, word in enumerate(path[:-1]):
        below = tree.get(word)
        if isinstance(below, str) and _registry_at(root, path[: number + 1]) is not None:
            below = {"name": below}
        elif below is None:
            below = {}
        elif not isinstance(below, dict):
            key, above = ".".join(path), ".".join(path[: number + 1])
            if isinstance(below, list | tuple):
                raise InputError(f"{key}: {above} is a list; write it whole, {above}={in_words(below, whole=True)}.")
            raise InputError(f"{key}: {above} is {below!r} and has nothing inside.")
        tree[word] = below
        tree = below
    return tree, path[-1]


def _registry_at(tree: Mapping[str, Any], path: Sequence[str]) -> Registry | None:
    """Give the registry of the part that belongs at this path: one of PARTS, or a part inside such a part."""
    registry, above = None, tree
    for number, word in enumerate(path):
        if (known := PARTS.get(".".join(path[: number + 1]))) is not None:
            registry = known
        elif registry is not None and not registry.takes_part(str(above.get("name")), word):
            registry = None
        below = above.get(word)
        above = below if isinstance(below, Mapping) else {"name": below}
    return registry


def _section(key: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise InputError(f"{key} must be a mapping with some of {', '.join(_names(SECTIONS[key]))}; got {value!r}.")
    inner = {name: part(f"{key}.{name}", one) if f"{key}.{name}" in PARTS else one for name, one in value.items()}
    return SECTIONS[key](**check_arguments(SECTIONS[key], inner, where=key, owner=f"'{key}'"))


def _backbone(key: str, value: Any) -> Any:
    """Check a backbone: one of ours by its signature; a timm or torchvision name is checked when it is built."""
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise InputError(f"{key} must be a name or {{name: ..., ...}}; got {value!r}.")
    if given["name"] not in BACKBONES:
        return dict(given)
    ours = {name: one for name, one in given.items() if name != "pretrained"}
    name, arguments = BACKBONES.check(ours, where=key)
    kept = {"pretrained": given["pretrained"]} if "pretrained" in given else {}
    return {"name": name, **arguments, **kept}


def _operations(key: str, value: Sequence[Any]) -> list[Any]:
    """Check a list of view operations, or a list of lists, one a view."""
    checked: list[Any] = []
    for number, one in enumerate(value):
        where = f"{key}[{number}]"
        if isinstance(one, list | tuple):
            checked.append(_operations(where, one))
        else:
            name, arguments = VIEWS.check(one, where=where)
            checked.append({"name": name, **arguments})
    return checked


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    for name in trainer:
        if name in _BUDGET_SAYS:
            raise InputError(
                f'trainer.{name}: the budget says that; write budget: "200 epochs", "50000 steps" or "8h".'
            )
        if name in _OURS:
            raise InputError(f"trainer.{name} is set by contrast; leave it out.")
    check_arguments(lightning.Trainer, trainer, where="trainer", owner="Lightning's Trainer")


def _plugins(files: Any) -> None:
    """Import the user's own parts, which register themselves: a `.py` file or a module's name each."""
    if not isinstance(files, list | tuple):
        raise InputError(f"plugins must be a list of .py files or module names; got {files!r}.")
    for file in files:
        name, path = str(file), Path(str(file)).resolve()
        is_file = name.endswith(".py")
        if is_file:
            # Files in two folders may have one name.
            name = f"contrast_plugin_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
        if name in sys.modules:
            continue
        try:
            if is_file:
                _import_file(name, path)
            else:
                importlib.import_module(name)
        except (FileNotFoundError, ModuleNotFoundError) as error:
            raise InputError(f"plugins: {file} cannot be imported: {error}.") from None


def _import_file(name: str, path: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _beside(config: Path, plugin: Any) -> Any:
    """Give the path of a plugin that stands beside the config that names it; all else as it is."""
    beside = config.parent / str(plugin)
    return str(beside.resolve()) if str(plugin).endswith(".py") and beside.is_file() else plugin


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def with_origin(message: str, origins: Mapping[str, str]) -> str:
    """Put where a key was written, a file or the command line, before a message that begins with that key."""
    key = re.split(r"[:\s]", message, maxsplit=1)[0].lstrip(".")
    while key and key not in origins:
        key, _, _ = key.rpartition("[") if key.endswith("]") else key.rpartition(".")
    origin = origins.get(key)
    message = message.lstrip(".")
    if origin is None:
        return message
    return f"{_WHERE.get(origin, origin)}: {message}"


def _names(section: Callable[..., Any]) -> list[str]:
    return [one.name for one in dataclasses.fields(section)]  # type: ignore[arg-type]


def _first_line(error: Exception) -> str:
    return " ".join(str(error).replace('in "<unicode string>", ', "").split())[:300]


def in_words(value: Any, *, whole: bool = False) -> str:
    """Say a value as it stands in YAML on one line; a part without arguments by its name, unless `whole`."""
    if isinstance(value, Mapping):
        if set(value) == {"name"} and not whole:
            return str(value["name"])
        return "{" + ", ".join(f"{key}: {in_words(one, whole=whole)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(in_words(one, whole=whole) for one in value) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
