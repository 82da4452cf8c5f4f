import ast
import io
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from contrast.core.registry import InputError
from contrast.experiment import folder as names
from contrast.experiment.folder import CHECKPOINT, CONFIG, METRICS, REPORT, RESULTS, SAMPLES, RunFolder, is_run
from contrast.experiment.record import read_record
from contrast.models.checkpoints import WEIGHTS
from contrast.models.weights import DESCRIPTION

PACKAGE = Path(__file__).parents[2] / "contrast"

IN_A_RUN = {
    part
    for key, name in vars(names).items()
    if key.isupper() and isinstance(name, str)
    for part in name.split("/")
    if part != "tensorboard"  # also a value of the key `logger`
} | {WEIGHTS, DESCRIPTION}

DEFINED_IN = {"experiment/folder.py", "models/weights.py", "models/checkpoints.py"}


def paths_in(source):
    """Return the strings of a source that are a path to a file of a run; sentences may name the files."""
    tree = ast.parse(source)
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in texts if not {*text.split("/")}.isdisjoint(IN_A_RUN)]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_file_names_of_a_run_are_in_one_file(path):
    if str(path.relative_to(PACKAGE)) not in DEFINED_IN:
        assert paths_in(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('Path(run) / "config.yaml"', True),
        ('f"{folder}/result.json"', True),
        ('run.write("checkpoints/last.ckpt", b"")', True),
        ('raise InputError("there is no config.yaml here")', False),
        ('def f():\n    """Write `results.json`."""', False),
    ],
)
def test_a_path_is_told_from_a_sentence(source, found):
    assert bool(paths_in(source)) is found


def test_a_folder_with_a_config_is_a_run(tmp_path):
    assert not is_run(tmp_path) and not is_run(tmp_path / "missing")
    with pytest.raises(InputError, match="is not a run: it has no config"):
        RunFolder.open(tmp_path)
    with pytest.raises(InputError, match="there is no run"):
        RunFolder.open(tmp_path / "missing")
    (tmp_path / CONFIG).write_text("version: 1\n")
    assert is_run(str(tmp_path))
    assert RunFolder.open(str(tmp_path)).path == tmp_path


def test_new_folders_are_numbered_and_used_ones_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(RunFolder.create("a b").path) for _ in range(2)] == ["runs/a-b-001", "runs/a-b-002"]
    Path("used").mkdir()
    assert RunFolder.create("x", out=Path("used")).path == Path("used")
    Path("used/file").touch()
    with pytest.raises(InputError, match="exists and is not empty"):
        RunFolder.create("x", out=Path("used"))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    run = RunFolder(tmp_path)
    run.write_json(RESULTS, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.write_json(RESULTS, {"a": float("nan")})
    full = mock.patch.object(Path, "replace", side_effect=OSError("no space left"))
    with full, pytest.raises(OSError, match="no space left"):
        run.write(RESULTS, "{")
    assert run.read_json(RESULTS) == {"a": 1}
    run.write(RESULTS, "{}")
    assert [path.name for path in tmp_path.iterdir()] == [RESULTS]


def test_a_missing_file_is_empty(tmp_path):
    run = RunFolder(tmp_path)
    assert (run.read_text(CONFIG), run.read_json(RESULTS), run.read_config(), run.read_arrays(SAMPLES)) == (
        "",
        {},
        {},
        {},
    )
    assert list(run.metrics()) == []


@pytest.mark.parametrize("content", ["{", "[1, 2]", '"text"'])
def test_a_damaged_file_is_one_sentence(tmp_path, content):
    run = RunFolder(tmp_path)
    for name, read in ((RESULTS, lambda: run.read_json(RESULTS)), (CONFIG, run.read_config)):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=rf"{name} should be .*Restore or remove it\.$"):
            read()


def test_pickled_objects_are_not_loaded(tmp_path):
    np.savez(tmp_path / SAMPLES, x=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="without pickled objects"):
        RunFolder(tmp_path).read_arrays(SAMPLES)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda whole: b"", "it is empty, truncated or not"),
        (lambda whole: whole[:-100], "it is empty, truncated or not"),
        (lambda whole: b"text", "it is empty, truncated or not"),
        (lambda whole: whole, "it has no loops, optimizer_states, state_dict"),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, content, reason):
    run = RunFolder(tmp_path)
    file = io.BytesIO()
    torch.save({"global_step": 3, "weights": torch.zeros(100)}, file)
    run.write(CHECKPOINT, content(file.getvalue()))
    with pytest.raises(InputError, match=rf"last\.ckpt is damaged \(.*{reason}.*\); restore it, or start") as caught:
        run.checkpoint_step()
    assert "\n" not in str(caught.value)


def test_text_that_is_no_unicode_can_be_written(tmp_path):
    assert RunFolder(tmp_path).write(REPORT, "a\ud800b").read_bytes() == b"a?b"


def test_metrics_skip_an_unfinished_line_and_drop_repeated_steps(tmp_path):
    run = RunFolder(tmp_path)
    for step in range(1, 5):
        run.append_metrics({"step": step, "loss": 0.5 * step})
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": "2"}\n{"step": null}\n{"step": NaN}\n{"step": 5, "lo')
    assert [row["step"] for row in run.metrics()][:6] == [1, 2, 3, 4, "2", None]
    run.drop_metrics_after(2)
    assert [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()] == [
        {"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0},
    ]  # fmt: skip


def test_a_record_has_what_the_files_say(tmp_path):
    run = RunFolder(tmp_path / "a-001")
    run.write(CONFIG, "name: simclr\ndata: {source: digits}\n")
    run.describe("contrast pretrain simclr digits")
    run.set_state("stopped", 3)
    run.append_metrics({"step": 3, "loss": 1.5})
    run.write_arrays(SAMPLES, {"kind": np.array("image")})
    record = read_record(run)
    assert (record.name, record.kind, record.views) == ("a-001", "image", None)
    assert record.config == {"name": "simclr", "data": {"source": "digits"}}
    assert record.command == "contrast pretrain simclr digits"
    assert record.state["state"] == "stopped" and record.state["step"] == 3
    assert record.series("loss")[1].tolist() == [1.5]
    assert "torch" in record.environment["versions"]
