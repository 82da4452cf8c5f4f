"""What the command does, as functions: check, pretrain, resume, evaluate, load."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contrast import config as configuration
from contrast.build import Experiment, build, build_encoder_for, pick_steps, read_data
from contrast.config import Config, Loaded
from contrast.data import Data, duplicates, leaks
from contrast.evaluate.compare import table
from contrast.evaluate.features import extract, raw_input
from contrast.evaluate.protocols import Evaluation
from contrast.evaluate.protocols import evaluate as measure
from contrast.models import Encoder, build_backbone, load_backbone, save_backbone
from contrast.registry import InputError
from contrast.report.page import write_report
from contrast.report.pictures import views_picture
from contrast.train.results_file import write_evaluations, write_results
from contrast.report.samples import save_samples
from contrast.train.budget import Budget
from contrast.train.callbacks import TrainingFailure, latest_step
from contrast.train.fit import Outcome, fit
from contrast.train.module import Pretraining
from contrast.train.rehearsal import Rehearsal, rehearse
from contrast.train.run_folder import RunFolder

log = logging.getLogger("contrast")

_RUN = "CONTRAST_RUN"
"""Names the run's folder to the further processes that Lightning starts."""


class Stopped(RuntimeError):
    """A signal stopped the run; everything is saved."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        path: its folder.
        evaluation: what was measured; None without labels or protocols.
        report: the page.
    """

    path: Path
    evaluation: Evaluation | None
    report: Path

    def table(self) -> str:
        """Give the table of results as text."""
        return "" if self.evaluation is None else table(self.evaluation.results, self.evaluation.warnings)


def pretrain(
    data: str | None = None, *, config: str | None = None, out: str | Path | None = None, **settings: Any
) -> Run:
    """Pretrain on a data set, evaluate and report; the keys are those of the command.

    Args:
        data: a path, "torchvision:NAME", "aeon:NAME" or "digits"; or `data={"source": ...}` in `config`.
        config: a shipped config or a .yaml file.
        out: the run's folder; the next free one under `runs/` where it is not given.
        **settings: of the config, a section as a mapping: `loss="cacr"`, `budget="2h"`, `optimizer={"lr": 1e-3}`.

    Raises:
        InputError: for anything that does not fit, before anything is written.
        Stopped: where a signal ended training.
    """
    words = [f"{key}={_word(value)}" for key, value in _dotted(settings)]
    if data is not None:
        words.insert(0, f"data.source={data}")
    return run(configuration.load(config, words), out=Path(out) if out is not None else None)


def run(loaded: Loaded, *, out: Path | None = None, name: str | None = None) -> Run:
    """Train, evaluate and report an experiment in a new folder.

    Args:
        loaded: the experiment.
        out: the folder; the next free one under `runs/` where it is not given.
        name: what the config is called, for the folder's name.
    """
    data = read_data(loaded.config)
    for note in data.notes:
        log.info("data: %s", note)
    experiment, budget, rehearsal = prepare(loaded.config, data)
    config = experiment.config
    _say_what_was_picked(experiment)
    log.info(
        "%s: %s, %s; training for %s in batches of %s, about %s here",
        data.source,
        _counted(data),
        "x".join(map(str, data.shape)),
        budget,
        config.batch_size,
        _duration(rehearsal.seconds_per_step * budget.steps if budget.steps else budget.seconds or 0),
    )
    folder = _folder(config, data, out, name)
    if "LOCAL_RANK" not in os.environ:
        folder.describe()
        folder.write("config.yaml", configuration.to_yaml(config))
        _write_views(folder, experiment, rehearsal)
        folder.set_state("running", 0)
    return _train_and_measure(experiment, budget, folder)


def resume(path: str | Path, words: list[str] | None = None) -> Run:
    """Take a stopped run up again; only the budget, `trainer.*` and `data.workers` may change.

    Raises:
        InputError: where there is no run, no checkpoint, nothing left to do, or another key is given.
    """
    folder = RunFolder.open(path)
    for word in words or []:
        key = word.partition("=")[0]
        if key not in ("budget", "data.workers") and not key.startswith("trainer."):
            raise InputError(f"{key}: a resumed run goes on as it was; only budget, trainer.* and data.workers change.")
    config = configuration.load(str(folder.path / "config.yaml"), words or []).config
    data = read_data(config)
    if (known := folder.read_json("data.json")) and known != dict(data.fingerprint):
        raise InputError(
            f"{data.source} is no longer the data that {folder.path} was started on; give the run its data back."
        )
    if not folder.checkpoint.is_file():
        raise InputError(f"{folder.path} has no checkpoint to go on from; start it anew with `contrast pretrain`.")
    experiment = build(config, data)
    budget = Budget.parse(config.budget, steps_per_epoch=experiment.sampler().steps_per_epoch)
    start = latest_step(folder.checkpoint)
    log.info("%s: going on from step %s of %s", folder.path, f"{start:,}", budget)
    if words:
        folder.write("config.yaml", configuration.to_yaml(config))
    folder.forget_after(start)
    return _train_and_measure(experiment, budget, folder, start=start)


def check(loaded: Loaded, *, out: Path | None = None, steps: int = 20) -> str:
    """Do all of `pretrain` but training, and give what was found as text; writes the picture of the views.

    Args:
        loaded: the experiment.
        out: the picture's file; `views.png` in the current folder where it is not given.
        steps: timed steps.
    """
    data = read_data(loaded.config)
    experiment, budget, rehearsal = prepare(loaded.config, data, steps=steps)
    config, sampler = experiment.config, experiment.sampler()
    picture = out or Path("views.png")
    picture.write_bytes(views_picture(rehearsal.originals, rehearsal.views, data.kind, rehearsal.sample_names))
    found, leaked = duplicates(data), leaks(data)
    seconds = rehearsal.seconds_per_step * budget.steps if budget.steps else budget.seconds or 0
    weights = sum(parameter.numel() for parameter in experiment.encoder.parameters() if parameter.requires_grad)
    lines = [
        f"data      {data.source}: {_counted(data)}, {data.kind}s of {'x'.join(map(str, data.shape))}",
        *(f"          {note}" for note in data.notes),
        *([f"classes   {_class_counts(data)}"] if data.classes else []),
        f"copies    {_pairs(found, 'exact duplicate', 'exact duplicates')}",
        f"leaks     {_pairs(leaked, 'train item stands in test too', 'train items stand in test too')}",
        *(f"picked    {key}: {value}" for key, value in experiment.picked.items()),
        f"encoder   {weights:,} trained numbers, {experiment.encoder.width} features",
        f"views     {picture}: look at it before you train",
        f"time      {rehearsal.seconds_per_step * 1000:.0f} ms a step (median of {steps} steps of {config.batch_size}); "
        f"{budget} = {_epochs(budget, sampler.steps_per_epoch)}about {_duration(seconds)} here",
        f"memory    {rehearsal.peak_bytes / 2**30:.2f} GiB at its highest",
    ]
    return "\n".join(lines)


def evaluate(
    model: str | Path,
    data: str | None = None,
    *,
    out: str | Path | None = None,
    words: list[str] | None = None,
    **settings: Any,
) -> Evaluation:
    """Measure a model's frozen features by the named protocols.

    Args:
        model: a run's folder, a weights file, "timm:NAME", "torchvision:NAME", or "module:function".
        data: as for `pretrain`; the run's own where it is not given.
        out: where to write `evaluations/`; a run's own folder where it is not given.
        words: `key=value` settings.
        **settings: of the config's sections `data` and `evaluate`; `labels=`, `target=` and other keys of `data`
            may stand alone.

    Raises:
        InputError: for a model or data that cannot be had.
    """
    model = str(model)
    keys = {field.name for field in dataclasses.fields(configuration.DataSettings)}
    dotted = [(f"data.{key}" if key in keys else key, value) for key, value in _dotted(settings)]
    given = [*(words or []), *(f"{key}={_word(value)}" for key, value in dotted)]
    if data is not None:
        given.insert(0, f"data.source={data}")
    own = Path(model) / "config.yaml"
    loaded = configuration.load(str(own) if own.is_file() else None, given)
    opened = read_data(loaded.config)
    if own.is_file():
        stored = load_model(model)
        if _shape_differs(stored, opened):
            raise InputError(
                f"{model} reads {_items(str(stored.kind), stored.shape)}; "
                f"{opened.source} holds {_items(opened.kind, opened.shape)}."
            )
    found = measure(_models(model, loaded.config, opened), opened, **_measuring(loaded.config))
    target = Path(out) if out is not None else (Path(model) if own.is_file() else None)
    if target is not None:
        target.mkdir(parents=True, exist_ok=True)
        for folder in write_evaluations(RunFolder(target), opened, found):
            log.info("written: %s", folder)
    return found


class Model(torch.nn.Module):
    """A frozen pretrained encoder, ready for raw data.

    Args:
        encoder: with its input statistics.
        about: what `backbone.json` says.
    """

    def __init__(self, encoder: Encoder, about: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder = encoder
        self.kind = about.get("kind")
        self.shape = tuple(about.get("shape", ()))
        self.classes = tuple(about.get("classes", ()))
        self.eval()

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Give (N, F) features of raw data: (N, C, H, W) images, or (N, C, L) series with NaN where unobserved."""
        return self.encoder.encode(x)

    forward = features


def load(path: str | Path) -> Model:
    """Load a run, or its `backbone.safetensors`, for `model.features(x)`; no code in the files is executed."""
    return load_model(path)


def load_model(path: str | Path) -> Model:
    """Give the model of a run or of a weights file with its description."""
    from contrast.models.weights import read_description

    return Model(load_backbone(path), read_description(path))


def prepare(config: Config, data: Data, *, steps: int = 3) -> tuple[Experiment, Budget, Rehearsal]:
    """Build everything, take a few steps on copies, and settle the budget, before anything is written."""
    experiment = build(config, data)
    rehearsal = rehearse(
        experiment.encoder,
        experiment.loss,
        experiment.views,
        experiment.optimizer,
        data,
        experiment.sampler(),
        steps=steps,
    )
    if config.budget == "auto":
        chosen = f"{pick_steps(experiment, rehearsal.seconds_per_step)} steps"
        experiment = replace(
            experiment,
            config=replace(experiment.config, budget=chosen),
            picked={**experiment.picked, "budget": chosen},
        )
    budget = Budget.parse(experiment.config.budget, steps_per_epoch=experiment.sampler().steps_per_epoch)
    return experiment, budget, rehearsal


def _train_and_measure(experiment: Experiment, budget: Budget, folder: RunFolder, *, start: int = 0) -> Run:
    config, data = experiment.config, experiment.data
    sampler = experiment.sampler(start)
    file = logging.FileHandler(folder.path / "log.txt") if "LOCAL_RANK" not in os.environ else logging.NullHandler()
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(file)
    module = Pretraining(
        experiment.encoder,
        experiment.loss,
        experiment.views,
        experiment.optimizer,
        budget,
        steps_per_epoch=sampler.steps_per_epoch,
        seed=config.seed,
    )
    resumed = folder.checkpoint.is_file()
    try:
        if not resumed:
            folder.write_json("data.json", dict(data.fingerprint))
        outcome = fit(
            module,
            data,
            sampler,
            folder,
            resume=resumed,
            trainer=config.trainer,
            tensorboard=config.logger == "tensorboard",
            workers=config.data.workers,
            probe_every=config.probe.every,
            probe_items=config.probe.items,
        )
        if not outcome.main:
            sys.exit(0)
        if not outcome.finished:
            folder.set_state("stopped", outcome.step)
            raise Stopped(
                f"stopped at step {outcome.step:,} of {budget} and saved; go on with: "
                f"contrast resume {shlex.quote(str(folder.path))}"
            )
        log.info("trained %s steps in %s", f"{outcome.step:,}", _duration(outcome.seconds))
        made = _measure(experiment, folder, outcome)
        folder.set_state("done", outcome.step)
        return made
    except KeyboardInterrupt:
        folder.set_state("stopped", module.global_step)
        raise Stopped(f"stopped; what was saved is kept: contrast resume {shlex.quote(str(folder.path))}") from None
    except (Exception, SystemExit) as error:
        if not isinstance(error, Stopped | SystemExit):
            folder.set_state("failed", module.global_step, why=str(error))
        raise
    finally:
        log.removeHandler(file)
        file.close()


def _measure(experiment: Experiment, folder: RunFolder, outcome: Outcome) -> Run:
    """Save the backbone, evaluate it beside raw input and where it started, and write results and report."""
    config, data = experiment.config, experiment.data
    encoder = experiment.encoder.cpu().eval()
    save_backbone(
        encoder,
        folder.path,
        {
            "backbone": config.encoder.backbone,
            "kind": data.kind,
            "shape": list(experiment.views.output_shapes(data.shape)[0]),
            "classes": list(data.classes),
        },
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models: dict[str, Callable[[Tensor], Tensor]] = {
        "raw": raw_input(data),
        **_before_training(experiment, device),
        "pretrained": _encode(encoder, device),
    }
    start = time.monotonic()
    evaluation = None
    if config.evaluate.protocols and len(data.test) and len(data.classes) > 1:
        evaluation = measure(models, data, **_measuring(config))
        for warning in evaluation.warnings:
            log.warning("%s", warning)
    else:
        log.info("no labels to probe: %s was pretrained only", data.source)
    shown = data.train.subset(_evenly(len(data.train), 5000))
    near, _ = extract(models["pretrained"], shown)
    test = (
        evaluation.features["pretrained"]
        if evaluation is not None and "pretrained" in evaluation.features
        else extract(models["pretrained"], data.test)[0]
        if len(data.test)
        else near[:0]
    )
    save_samples(
        folder.path / "report.npz",
        kind=data.kind,
        classes=data.classes,
        test=data.test,
        test_features=test,
        train=shown,
        train_features=near,
        prepare=encoder.prepare,
        samples=config.report.samples,
    )
    environment = folder.read_json("environment.json")
    about = {
        "command": (folder.path / "command.txt").read_text().strip(),
        "config_hash": _hash(config),
        "commit": environment.get("commit"),
        "dirty": environment.get("dirty"),
        "seed": config.seed,
        "status": "done",
        "device": outcome.device,
        "processes": outcome.processes,
        "precision": outcome.precision,
        "batch_size": config.batch_size,
        "steps": outcome.step,
        "seconds": round(outcome.seconds, 2),
        "evaluation_seconds": round(time.monotonic() - start, 2),
        "peak_bytes": _peak(device),
    }
    write_results(folder, about, data, evaluation)
    folder.set_state("done", outcome.step)
    report = write_report(folder.path, samples=config.report.samples)
    return Run(folder.path, evaluation, report)


def _before_training(experiment: Experiment, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Give the encoder as it started: untrained, and off the shelf where it started from somebody's weights."""
    config, data, views = experiment.config, experiment.data, experiment.views
    started = {"untrained": build_encoder_for(config, data, views, pretrained=False)}
    backbone = config.encoder.backbone
    if isinstance(backbone, Mapping) and backbone.get("pretrained"):
        started["off_the_shelf"] = build_encoder_for(config, data, views)
    return {name: _encode(encoder, device) for name, encoder in started.items()}


def _models(model: str, config: Config, data: Data) -> dict[str, Callable[[Tensor], Tensor]]:
    """Give raw input and the model that was named."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models: dict[str, Callable[[Tensor], Tensor]] = {"raw": raw_input(data)}
    if Path(model).exists():
        if Path(model).is_dir() or (Path(model).parent / "backbone.json").is_file():
            return {**models, "pretrained": _encode(load_model(model).encoder, device)}
        if config.encoder.backbone == "auto":
            raise InputError(
                f"{model} does not say which network it is; name it: encoder.backbone=timm:resnet18, for example."
            )
        part = config.encoder.backbone
        part = {**part, "pretrained": model} if isinstance(part, Mapping) else {"name": part, "pretrained": model}
        return {**models, "off_the_shelf": _encode(_wrap(build_backbone(part, data.shape, data.kind), data), device)}
    if model.startswith(("timm:", "torchvision:")):
        part = {"name": model, "pretrained": True}
        return {**models, "off_the_shelf": _encode(_wrap(build_backbone(part, data.shape, data.kind), data), device)}
    if ":" in model:
        module, _, function = model.partition(":")
        try:
            sys.path.insert(0, str(Path.cwd()))
            encode = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise InputError(f"{model} cannot be imported: {error}.") from None
        finally:
            sys.path.pop(0)
        return {**models, function: encode}
    raise InputError(
        f"there is no model {model}: give a run's folder, a weights file, timm:NAME, torchvision:NAME or module:function."
    )


def _wrap(backbone: torch.nn.Module, data: Data) -> Encoder:
    from contrast.models import ImageInputs, SeriesInputs

    inputs = (
        ImageInputs(data.value_range, data.mean, data.std)
        if data.kind == "image"
        else SeriesInputs(data.mean, data.std)
    )
    return Encoder(backbone, torch.nn.Identity(), inputs=inputs)


def _encode(encoder: Encoder, device: torch.device) -> Callable[[Tensor], Tensor]:
    encoder = encoder.to(device).eval()

    def encode(raw: Tensor) -> Tensor:
        with torch.inference_mode():
            return encoder.encode(raw.to(device)).float()

    return encode


def _measuring(config: Config) -> dict[str, Any]:
    return {
        "protocols": config.evaluate.protocols,
        "seed": config.seed,
        "draws": config.evaluate.draws,
        "labels_per_class": config.evaluate.labels_per_class,
        "progress": lambda line: log.info("%s", line),
    }


def _folder(config: Config, data: Data, out: Path | None, name: str | None) -> RunFolder:
    """Make the run's folder once, in the first process; the others are told, or write nothing."""
    if "LOCAL_RANK" in os.environ:
        return RunFolder(Path(os.environ.get(_RUN) or tempfile.mkdtemp()))
    source = Path(data.source).stem if Path(data.source).exists() else data.source
    default = f"{source}-{config.name or name or _name(config)}"
    folder = RunFolder.create(default, out=out)
    os.environ[_RUN] = str(folder.path.resolve())
    return folder


def _name(config: Config) -> str:
    return str(config.loss["name"]) if isinstance(config.loss, Mapping) else config.loss


def _write_views(folder: RunFolder, experiment: Experiment, rehearsal: Rehearsal) -> None:
    if experiment.config.report.samples:
        picture = views_picture(rehearsal.originals, rehearsal.views, experiment.data.kind, rehearsal.sample_names)
        folder.write("views.png", picture)


def _say_what_was_picked(experiment: Experiment) -> None:
    for key, value in experiment.picked.items():
        log.info("picked %s: %s", key, configuration.in_words(value))


def _counted(data: Data) -> str:
    counts = f"{len(data.train):,} training items"
    if data.validation.any():
        counts += f" ({int(data.validation.sum()):,} of them for validation)"
    return f"{counts}, {len(data.test):,} for test, {len(data.classes)} classes"


def _class_counts(data: Data) -> str:
    counts = [(name, int((data.train.target == place).sum())) for place, name in enumerate(data.classes)]
    shown = ", ".join(f"{name} {count:,}" for name, count in counts[:20])
    unlabelled = int((data.train.target < 0).sum())
    return shown + (", ..." if len(counts) > 20 else "") + (f"; {unlabelled:,} without a label" if unlabelled else "")


def _pairs(pairs: list[tuple[str, str]], one: str, many: str) -> str:
    if not pairs:
        return f"no {many}"
    shown = "; ".join(f"{first} = {other}" for first, other in pairs[:3])
    return f"{len(pairs):,} {one if len(pairs) == 1 else many}: {shown}{'; ...' if len(pairs) > 3 else ''}"


def _epochs(budget: Budget, steps_per_epoch: int) -> str:
    return f"{budget.steps / steps_per_epoch:.1f} epochs, " if budget.steps else ""


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _items(kind: str, shape: tuple[int, ...]) -> str:
    return f"{kind}s of {'x'.join(map(str, shape))}"


def _shape_differs(model: Model, data: Data) -> bool:
    return model.kind != data.kind or model.shape[:1] != data.shape[:1]


def _evenly(count: int, most: int) -> Any:
    return torch.linspace(0, count - 1, min(count, most)).round().long().numpy()


def _hash(config: Config) -> str:
    return hashlib.blake2b(configuration.to_yaml(config).encode(), digest_size=8).hexdigest()


def _peak(device: torch.device) -> int:
    from contrast.train.rehearsal import _peak_bytes

    return _peak_bytes(device)


def _dotted(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Give `key: value` for each setting, a mapping's keys with dots."""
    pairs: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and "name" not in value:
            pairs += [(f"{key}.{inner}", one) for inner, one in _dotted(value)]
        else:
            pairs.append((key, value))
    return pairs


def _word(value: Any) -> str:
    """Give a value as it would stand on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_word(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_word(one) for one in value) + "]"
    return str(value)


__all__ = ["Model", "Run", "Stopped", "TrainingFailure", "check", "evaluate", "load", "pretrain", "resume", "run"]
