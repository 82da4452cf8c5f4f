"""From the folder of a run to its page."""

from __future__ import annotations

from pathlib import Path

from contrast.experiment.folder import COMMAND, CONFIG, ENVIRONMENT, REPORT, RESULTS, SAMPLES, STATE, VIEWS, RunFolder
from contrast.report import RunRecord, render


def read_record(folder: RunFolder) -> RunRecord:
    """Return what the files of a run say; a missing file is empty.

    Raises:
        InputError: where a file is damaged.
    """
    views = folder.path / VIEWS
    return RunRecord(
        name=folder.path.resolve().name,
        config=folder.read_config(),
        config_text=folder.read_text(CONFIG),
        command=folder.read_text(COMMAND).strip(),
        environment=folder.read_json(ENVIRONMENT),
        state=folder.read_json(STATE),
        metrics=list(folder.metrics()),
        results=folder.read_json(RESULTS),
        views=views.read_bytes() if views.is_file() else None,
        arrays=folder.read_arrays(SAMPLES),
    )


def write_report(folder: RunFolder, *, samples: bool = True) -> Path:
    """Write the page of a run, finished or not, and return its path.

    Args:
        folder: the run.
        samples: False leaves out every picture and name of a sample.

    Raises:
        InputError: where a file of the run is damaged.
    """
    return folder.write(REPORT, render(read_record(folder), samples=samples))
