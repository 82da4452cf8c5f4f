"""The `contrast` command: words in, one sentence or a table out."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from contrast.core.registry import InputError, did_you_mean

# OpenMP's threads wait for each other by spinning; beside another busy process that makes every step several times
# slower. It is read when torch is loaded, which no import above does.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

_TRAIN = 'this command needs more than the losses: pip install "contrast-learning[train]"'

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 130

_EPILOGUE = """\
CONFIG: a shipped name (contrast list configs) or a .yaml file. DATA: a path, digits, torchvision:NAME or aeon:NAME.
Everything of the experiment is key=value: loss.temperature=0.2, budget="2h", data.labels=labels.csv.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and give its exit status: 0 done, 1 failed, 2 wrong input, 130 stopped by the user and saved."""

    def command() -> int:
        words, left = _parser().parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
        # argparse ends a list of words at the first flag; the words behind it are left over.
        if unknown := [word for word in left if word.startswith("-")] or (left if not hasattr(words, "words") else []):
            raise InputError(
                f"`contrast {words.command}` does not take {unknown[0]}; see `contrast {words.command} --help`."
            )
        if left:
            words.words = [*words.words, *left]
        return int(words.run(words) or DONE)

    return answer(command)


def entry() -> NoReturn:
    """Be the `contrast` command: run it, then leave without minding a late Ctrl-C."""
    status = main()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)


def answer(command: Callable[[], int]) -> int:
    """Run a program and give its exit status; what goes wrong becomes one sentence on standard error."""
    voice = _talk()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return command()
    except InputError as error:
        return _say(error, WRONG_INPUT)
    except KeyboardInterrupt:
        return _say("stopped.", STOPPED)
    except BrokenPipeError:
        sys.stderr.close()
        return DONE
    except ModuleNotFoundError as error:
        return _say(f"the package '{error.name}' is missing; {_TRAIN}", FAILED)
    except OSError as error:
        return _say(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), FAILED)
    except Exception as error:
        from contrast.experiment.run import Stopped
        from contrast.train.callbacks import TrainingFailure

        if isinstance(error, Stopped):
            return _say(error, STOPPED)
        if isinstance(error, TrainingFailure):
            return _say(error, FAILED)
        raise
    finally:
        logging.getLogger("contrast").removeHandler(voice)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="contrast",
        allow_abbrev=False,
        description="Contrastive representation learning for images and time series.",
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int | None], words: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            allow_abbrev=False,
            help=words,
            description=words,
            epilog=_EPILOGUE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run)
        return made

    check = command(
        "check", _check, "All of pretrain except training: counts, duplicates, leaks, a picture of the views."
    )
    check.add_argument("words", nargs="*", metavar="CONFIG|DATA|key=value")
    check.add_argument("--out", type=Path, help="where the picture of the views goes (default: views.png)")
    pretrain = command("pretrain", _pretrain, "Pretrain on a data set, evaluate and report.")
    pretrain.add_argument("words", nargs="*", metavar="CONFIG|DATA|key=value")
    pretrain.add_argument("--out", type=Path, help="the run's folder (default: the next free one under runs/)")
    resume = command(
        "resume", _resume, "Take a stopped run up again; only budget, trainer.* and data.workers may change."
    )
    resume.add_argument("run_folder", metavar="RUN")
    resume.add_argument("words", nargs="*", metavar="key=value")
    evaluate = command("evaluate", _evaluate, "Measure a model by the named protocols; DATA defaults to the run's own.")
    evaluate.add_argument("model", metavar="MODEL")
    evaluate.add_argument("words", nargs="*", metavar="DATA|key=value")
    evaluate.add_argument("--out", type=Path, help="where results go (default: into the run)")
    show = command("show", _show, "Every resolved value and where it came from.")
    show.add_argument("words", nargs="+", metavar="CONFIG|RUN|MODEL|key=value")
    listing = command(
        "list",
        _list,
        "What there is: losses, memory, backbones, heads, views, samplers, optimizers, protocols, configs, data.",
    )
    listing.add_argument("what", metavar="WHAT", nargs="?")
    return parser


def _pretrain(words: argparse.Namespace) -> None:
    from contrast.experiment import run as runs

    loaded, name = _experiment(words.words)
    _print_run(runs.start(loaded, out=words.out, name=name))


def _resume(words: argparse.Namespace) -> None:
    from contrast.experiment import run as runs

    for word in words.words:
        _need_setting(word)
    _print_run(runs.resume(words.run_folder, words.words))


def _check(words: argparse.Namespace) -> None:
    from contrast.experiment.check import check

    loaded, _ = _experiment(words.words)
    print(check(loaded, out=words.out))


def _evaluate(words: argparse.Namespace) -> None:
    from contrast import api
    from contrast.evaluation.compare import table

    data, settings = None, []
    for word in words.words:
        if _is_setting(word):
            settings.append(word)
        elif data is None:
            data = word
        else:
            raise InputError(f"one DATA at a time: got {data} and {word}.")
    found = api.evaluate(words.model, data, out=words.out, words=settings)
    print(table(found.results, found.warnings))


def _show(words: argparse.Namespace) -> None:
    from contrast.experiment import config as configuration
    from contrast.experiment.folder import RunFolder, is_run

    first, *rest = words.words
    if is_run(first):
        loaded = configuration.load(str(RunFolder(Path(first)).config), rest)
    elif _is_model(first):
        return _show_model(first)
    else:
        loaded, _ = _experiment(words.words)
    values, written = configuration.resolved(loaded.config), configuration.flat(loaded.config)
    width = max(len(key) for key in values)
    for key, value in values.items():
        origin = _origin(key, loaded.origins) if key in written else "default"
        print(f"{key:<{width}}  {configuration.in_words(value):<40}  {origin}")
    return None


def _show_model(path: str) -> None:
    from contrast.models.weights import read_description

    for key, value in read_description(path).items():
        print(f"{key:<10}  {value}")


def _list(words: argparse.Namespace) -> None:
    from contrast.data import SOURCES
    from contrast.data.loader import SAMPLERS
    from contrast.evaluation.protocols import PROTOCOLS
    from contrast.experiment import config as configuration
    from contrast.losses import LOSSES
    from contrast.memory import MEMORIES
    from contrast.models import BACKBONES, HEADS
    from contrast.train.optimizers import OPTIMIZERS
    from contrast.views.views import RECIPES, VIEWS

    lists: dict[str, dict[str, str]] = {
        "losses": _described(LOSSES),
        "memory": _described(MEMORIES),
        "backbones": {
            **_described(BACKBONES),
            "timm:NAME": "any network of timm",
            "torchvision:NAME": "any classification network of torchvision",
            "module:function": "your own",
        },
        "heads": _described(HEADS),
        "views": {
            **_described(RECIPES),
            **{f"- {name}": words for name, words in _described(VIEWS).items()},
        },
        "samplers": _described(SAMPLERS),
        "optimizers": _described(OPTIMIZERS),
        "protocols": _described(PROTOCOLS),
        "configs": {name: _first_comment(file) for name, file in configuration.shipped().items()},
        "data": dict(SOURCES),
    }
    if words.what is not None and words.what not in lists:
        raise InputError(
            f"there is no list of {words.what!r}.{did_you_mean(words.what, lists)} Known: {', '.join(lists)}."
        )
    for what in [words.what] if words.what else lists:
        if not words.what:
            print(f"{what}:")
        width = max(map(len, lists[what]), default=0)
        for name, line in lists[what].items():
            print(f"  {name:<{width}}  {line}")


def _experiment(words: Sequence[str]) -> tuple[Any, str | None]:
    """Sort words into a config, data and settings, in any order, and load them."""
    from contrast.experiment import config as configuration

    config: str | None = None
    data: str | None = None
    settings = []
    for word in words:
        if _is_setting(word):
            settings.append(word)
        elif config is None and configuration.is_config(word):
            config = word
        elif data is None:
            data = word
        else:
            for one in (data, word):
                _need_data(one)
            raise InputError(
                f"one CONFIG and one DATA at a time: got {', '.join(filter(None, (config, data)))} and {word}."
            )
    if data is not None:
        _need_data(data)
        settings.insert(0, f"data.source={data}")
    return configuration.load(config, settings), Path(config).stem if config else None


def _need_data(word: str) -> None:
    from contrast.experiment import config as configuration

    if not _is_data(word) and not configuration.is_config(word):
        raise InputError(
            f"'{word}' is no file or folder here, and no shipped config.{did_you_mean(word, configuration.shipped())} "
            f"Shipped: {', '.join(configuration.shipped())}."
        )


def _is_data(word: str) -> bool:
    return Path(word).exists() or ":" in word or word == "digits" or "/" in word or "." in word


def _is_model(word: str) -> bool:
    from contrast.models.weights import DESCRIPTION

    path = Path(word)
    return (path / DESCRIPTION).is_file() or path.suffix in (".safetensors", ".json")


def _is_setting(word: str) -> bool:
    from contrast.experiment import config as configuration

    return configuration.is_setting(word)


def _need_setting(word: str) -> None:
    if not _is_setting(word):
        raise InputError(f"{word!r} is not key=value.")


def _print_run(run: Any) -> None:
    if run.evaluation is not None:
        print(run.table())
    print(f"run: {run.path}\nreport: {run.report}")


def _origin(key: str, origins: Any) -> str:
    while key:
        if key in origins:
            return str(origins[key])
        key = key.rpartition(".")[0]
    return "default"


def _described(registry: Any) -> dict[str, str]:
    return {name: (registry[name].__doc__ or "").strip().splitlines()[0] for name in registry}


def _first_comment(file: Path) -> str:
    first = file.read_text().splitlines()[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def _talk() -> logging.Handler:
    """Send what the package says about its progress to standard error; of several processes the first one speaks."""
    logger = logging.getLogger("contrast")
    voice = logging.StreamHandler(sys.stderr)
    voice.setLevel(logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.ERROR)
    logger.addHandler(voice)
    logger.setLevel(logging.INFO)
    return voice


def _interrupt(number: int, frame: Any) -> NoReturn:  # noqa: ARG001
    raise KeyboardInterrupt


def _say(message: object, status: int) -> int:
    print(f"contrast: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    entry()
