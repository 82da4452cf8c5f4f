"""The command `contrast`: arguments in, one sentence or a table out."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from contrast.core.registry import InputError, did_you_mean

if TYPE_CHECKING:
    from contrast.experiment.config import Loaded
    from contrast.experiment.run import Run

# OpenMP's threads wait for each other by spinning; next to another busy process that makes every step several times
# slower. It is read when torch is loaded, which no import above does.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 130

_EPILOGUE = """\
CONFIG: a shipped name (contrast list configs) or a .yaml file. DATA: a path, digits, torchvision:NAME or aeon:NAME.
MODEL: a run, a weights file, timm:NAME, torchvision:NAME or module:function.
Everything of the experiment is key=value: loss.temperature=0.2, budget="2h", data.labels=labels.csv.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 failed, 2 wrong input, 130 stopped by the user and saved.

    Args:
        arguments: those of the command line where they are not given.
    """

    def command() -> int:
        parsed, rest = _parser().parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
        # argparse ends a list of arguments at the first flag; those after it are in the rest.
        takes_more = hasattr(parsed, "arguments")
        if unknown := [one for one in rest if one.startswith("-")] or ([] if takes_more else rest):
            raise InputError(
                f"`contrast {parsed.command}` does not take {unknown[0]}; see `contrast {parsed.command} --help`."
            )
        if rest:
            parsed.arguments = [*parsed.arguments, *rest]
        return int(parsed.run(parsed) or DONE)

    return answer(command)


def entry() -> NoReturn:
    """Run the command as a program, and exit without being disturbed by a late Ctrl-C."""
    status = main()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)


def answer(command: Callable[[], int]) -> int:
    """Run a program and return its exit status; an error of the user becomes one sentence on standard error."""
    handler = _log_to_terminal()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return command()
    except InputError as error:
        return _fail(error, WRONG_INPUT)
    except KeyboardInterrupt:
        return _fail("stopped.", STOPPED)
    except BrokenPipeError:
        sys.stderr.close()
        return DONE
    except ModuleNotFoundError as error:
        install = 'this command needs more than the losses: pip install "contrast-learning[train]"'
        return _fail(f"the package '{error.name}' is missing; {install}", FAILED)
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), FAILED)
    except Exception as error:
        from contrast.experiment.run import Stopped
        from contrast.train.callbacks import TrainingFailure

        if isinstance(error, Stopped):
            return _fail(error, STOPPED)
        if isinstance(error, TrainingFailure):
            return _fail(error, FAILED)
        raise
    finally:
        logging.getLogger("contrast").removeHandler(handler)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="contrast",
        allow_abbrev=False,
        description="Contrastive representation learning for images and time series.",
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int | None], summary: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(
            name,
            allow_abbrev=False,
            help=summary,
            description=summary,
            epilog=_EPILOGUE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.set_defaults(run=run)
        return subparser

    check = command(
        "check", _check, "All of pretrain except training: counts, duplicates, leaks, a picture of the views."
    )
    check.add_argument("arguments", nargs="*", metavar="CONFIG|DATA|key=value")
    check.add_argument("--out", type=Path, help="the file of the picture of the views (default: views.png)")
    pretrain = command("pretrain", _pretrain, "Pretrain on a data set, evaluate and report.")
    pretrain.add_argument("arguments", nargs="*", metavar="CONFIG|DATA|key=value")
    pretrain.add_argument("--out", type=Path, help="the run's folder (default: the next free one under runs/)")
    resume = command("resume", _resume, "Continue a run; only budget, trainer.* and data.workers may change.")
    resume.add_argument("run_folder", metavar="RUN")
    resume.add_argument("arguments", nargs="*", metavar="key=value")
    evaluate = command("evaluate", _evaluate, "Measure a model by the named protocols; DATA defaults to the run's own.")
    evaluate.add_argument("model", metavar="MODEL")
    evaluate.add_argument("arguments", nargs="*", metavar="DATA|key=value")
    evaluate.add_argument("--out", type=Path, help="where results are written (default: into the run)")
    show = command("show", _show, "Every resolved value and where it came from; with --explain, what a key means.")
    show.add_argument("arguments", nargs="*", metavar="CONFIG|RUN|MODEL|key=value")
    show.add_argument("--explain", metavar="KEY", help="print what this key means, such as loss.temperature")
    listing = command(
        "list",
        _list,
        "Print what is available: losses, memory, backbones, heads, views, samplers, optimizers, protocols, configs, "
        "data; with plugins=FILE, parts of your own too.",
    )
    listing.add_argument("arguments", nargs="*", metavar="WHAT|plugins=FILE")
    return parser


def _version() -> str:
    from importlib import metadata

    import contrast

    return f"contrast {contrast.__version__} (torch {metadata.version('torch')}, Python {sys.version.split()[0]})"


def _pretrain(parsed: argparse.Namespace) -> None:
    loaded, name = _experiment(parsed.arguments)
    from contrast.experiment import run as runs

    _print_run(runs.start(loaded, out=parsed.out, name=name))


def _resume(parsed: argparse.Namespace) -> None:
    from contrast.experiment import config as configuration

    for one in parsed.arguments:
        if not configuration.is_override(one):
            raise InputError(f"{one!r} is not key=value.")
    from contrast.experiment import run as runs

    _print_run(runs.resume(parsed.run_folder, parsed.arguments))


def _check(parsed: argparse.Namespace) -> None:
    loaded, _ = _experiment(parsed.arguments)
    from contrast.experiment.check import check

    print(check(loaded, out=parsed.out))


def _evaluate(parsed: argparse.Namespace) -> None:
    from contrast.experiment import config as configuration

    overrides = [one for one in parsed.arguments if configuration.is_override(one)]
    data = [one for one in parsed.arguments if not configuration.is_override(one)]
    if len(data) > 1:
        raise InputError(f"one DATA at a time: got {data[0]} and {data[1]}.")
    from contrast import api
    from contrast.evaluation.tables import text_table

    found = api.evaluate(parsed.model, data[0] if data else None, out=parsed.out, overrides=overrides)
    print(text_table(found.results, found.warnings))


def _show(parsed: argparse.Namespace) -> None:
    from contrast.experiment import config as configuration
    from contrast.experiment.explain import explain, origin_of
    from contrast.experiment.folder import RunFolder, is_run

    first, *rest = parsed.arguments or [""]
    if not first and parsed.explain is None:
        raise InputError("contrast show: name a CONFIG, a RUN or a MODEL, or give --explain KEY.")
    if not configuration.is_override(first) and is_run(first):
        loaded = configuration.load(str(RunFolder(Path(first)).config), rest)
    elif _is_model(first):
        return _show_model(first)
    else:
        loaded, _ = _experiment(parsed.arguments)
    if parsed.explain is not None:
        print(explain(loaded, parsed.explain))
        return None
    values, written = configuration.resolved(loaded.config), configuration.flat(loaded.config)
    width = max(len(key) for key in values)
    for key, value in values.items():
        origin = origin_of(key, loaded.origins) if key in written else "default"
        print(f"{key:<{width}}  {configuration.to_text(value):<40}  {origin}")
    return None


def _is_model(text: str) -> bool:
    from contrast.models.weights import DESCRIPTION

    path = Path(text)
    return (path / DESCRIPTION).is_file() or path.suffix in (".safetensors", ".json")


def _show_model(path: str) -> None:
    from contrast.models.weights import read_description

    for key, value in read_description(path).items():
        print(f"{key:<10}  {value}")


def _list(parsed: argparse.Namespace) -> None:
    from contrast.data import SOURCES
    from contrast.experiment import config as configuration
    from contrast.experiment.parts import listing

    overrides = [one for one in parsed.arguments if configuration.is_override(one)]
    if unknown := next((one for one in overrides if not one.startswith("plugins=")), None):
        raise InputError(f"`contrast list` takes plugins=FILE only; got {unknown}.")
    configuration.load(None, overrides)
    configs = {name: _first_comment(file) for name, file in configuration.shipped().items()}
    lists = {**listing(), "configs": configs, "data": dict(SOURCES)}
    titles = [one for one in parsed.arguments if one not in overrides]
    for title in titles:
        if title not in lists:
            raise InputError(f"there is no list of {title!r}.{did_you_mean(title, lists)} Known: {', '.join(lists)}.")
    for title in titles or lists:
        if len(titles) != 1:
            print(f"{title}:")
        width = max(map(len, lists[title]), default=0)
        for name, line in lists[title].items():
            print(f"  {name:<{width}}  {line}")


def _first_comment(file: Path) -> str:
    first = file.read_text().partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def _experiment(arguments: Sequence[str]) -> tuple[Loaded, str | None]:
    """Sort arguments into a config, data and overrides, in any order, and load them; the config's name comes second."""
    from contrast.experiment import config as configuration

    config: str | None = None
    data: str | None = None
    overrides = []
    for argument in arguments:
        if configuration.is_override(argument):
            overrides.append(argument)
        elif config is None and configuration.is_config(argument):
            config = argument
        elif data is None:
            data = argument
        else:
            for one in (data, argument):
                _check_data(one)
            given = ", ".join(filter(None, (config, data)))
            raise InputError(f"one CONFIG and one DATA at a time: got {given} and {argument}.")
    if data is not None:
        _check_data(data)
        overrides.insert(0, f"data.source={data}")
    return configuration.load(config, overrides), Path(config).stem if config else None


def _check_data(argument: str) -> None:
    """Check that an argument can name data: a path, or the name of a set."""
    from contrast.experiment import config as configuration

    names_data = Path(argument).exists() or argument == "digits" or any(sign in argument for sign in ":/.")
    if not names_data and not configuration.is_config(argument):
        shipped = configuration.shipped()
        raise InputError(
            f"'{argument}' is no file or folder here, and no shipped config.{did_you_mean(argument, shipped)} "
            f"Shipped: {', '.join(shipped)}."
        )


def _print_run(run: Run) -> None:
    if run.evaluation is not None:
        print(run.table())
    print(f"run: {run.path}\nreport: {run.report}")


def _log_to_terminal() -> logging.Handler:
    """Send the package's progress to standard error; of several processes only the first one reports it."""

    def is_reported(record: logging.LogRecord) -> bool:
        from contrast.core import distributed

        return record.levelno >= logging.ERROR or distributed.is_first_process()

    logger = logging.getLogger("contrast")
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(is_reported)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return handler


def _interrupt(number: int, frame: Any) -> NoReturn:  # noqa: ARG001
    raise KeyboardInterrupt


def _fail(message: object, status: int) -> int:
    print(f"contrast: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    entry()
