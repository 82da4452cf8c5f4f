"""Configs: what is read, where it came from, and one sentence for every mistake."""

from pathlib import Path

import numpy as np
import pytest
import torch

from contrast.core.registry import InputError, Registry
from contrast.experiment import config as configuration
from contrast.experiment.explain import explain
from contrast.experiment.parts import KINDS, Kind
from contrast.losses import LOSSES, BadPairs, InfoNCE, PairLoss


def written(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("name", sorted(configuration.shipped()))
def test_every_shipped_config_is_valid_and_says_what_it_is(name):
    configuration.load(name)
    assert configuration.shipped()[name].read_text().startswith("# ")


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    file = written(tmp_path, "seed: 3\nloss: {name: info_nce, temperature: 0.3}\n")
    loaded = configuration.load(file, ["loss.temperature=0.4"])
    assert loaded.config.seed == 3
    assert loaded.config.loss == {"name": "info_nce", "temperature": 0.4}
    assert loaded.origins["seed"] == file
    assert loaded.origins["loss.temperature"] == "command line"
    assert "batch_size" not in loaded.origins


def test_a_bare_name_is_short_for_a_part():
    assert configuration.load(None, ["loss=cacr"]).config.loss == {"name": "cacr"}


def test_another_part_leaves_the_arguments_of_the_first_behind(tmp_path):
    file = written(tmp_path, "loss: {name: info_nce, temperature: 0.3}\n")
    assert configuration.load(file, ["loss=cacr"]).config.loss == {"name": "cacr"}
    assert configuration.load(file, ["loss.name=cacr"]).config.loss == {"name": "cacr"}


def test_arguments_without_a_name_belong_to_the_part_that_stands_there():
    config = configuration.load(None, ["optimizer.lr=1e-2", "loss.temperature=1"]).config
    assert config.optimizer == {"name": "adamw", "lr": 0.01}
    assert config.loss == {"name": "info_nce", "temperature": 1}


def test_a_part_inside_a_part_is_reached_by_dotted_keys(tmp_path):
    file = written(tmp_path, "loss: {name: bad_pairs, loss: info_nce}\n")
    loaded = configuration.load(file, ["loss.loss.temperature=1"])
    assert loaded.config.loss == {"name": "bad_pairs", "loss": {"name": "info_nce", "temperature": 1.0}}
    assert loaded.origins["loss.loss.temperature"] == "command line"
    assert configuration.load(written(tmp_path, configuration.to_yaml(loaded.config))).config == loaded.config
    for words in (["loss.loss=cacr"], ["loss.loss.name=cacr"], ["loss.loss={name: cacr}"]):
        again = configuration.load(file, ["loss.loss.temperature=1", *words]).config
        assert again.loss == {"name": "bad_pairs", "loss": {"name": "cacr"}}
    merged = configuration.load(file, ["loss.loss={temperature: 0.5}", "loss.loss.candidates=across"]).config
    assert merged.loss["loss"] == {"name": "info_nce", "temperature": 0.5, "candidates": "across"}
    assert configuration.load(file, ["loss=cacr"]).config.loss == {"name": "cacr"}


def test_resolved_shows_the_defaults_of_an_inner_part_and_leaves_facts_of_the_run_out():
    values = configuration.resolved(configuration.load(None, ["loss={name: bad_pairs, loss: amcl}"]).config)
    assert (values["loss.loss.name"], values["loss.loss.form"], values["loss.noisy_width"]) == ("amcl", "max", 2.0)
    assert {"loss.samples", "loss.epochs", "loss.loss.dim", "loss.loss"}.isdisjoint(values)
    given = configuration.resolved(configuration.load(None, ["loss={name: bad_pairs, loss: cacr, samples: 7}"]).config)
    assert given["loss.samples"] == 7


def test_what_is_written_out_is_read_back_the_same(tmp_path):
    words = ["loss={name: cacr, repulsion_scale: 2}", "views=[{name: jitter, sigma: 0.1}]", "data.source=a b.npz"]
    config = configuration.load("moco_v3", words).config
    assert configuration.load(written(tmp_path, configuration.to_yaml(config))).config == config


def test_a_memory_may_stand_alone_or_in_a_list():
    queue = {"name": "queue", "size": 64}
    assert configuration.load(None, ["memory={name: queue, size: 64}"]).config.memory == (queue,)
    two = configuration.load(None, ["memory=[{name: queue, size: 64}, bank]"]).config
    assert two.memory == (queue, {"name": "bank"})
    assert configuration.load("moco_v2", ["memory=[]"]).config.memory == ()


def test_a_memory_of_a_file_is_named_by_its_file(tmp_path):
    file = written(tmp_path, "memory: [bank, {name: queue, sise: 4}]\n")
    with pytest.raises(InputError, match=rf"{file}: memory\[1\]\.sise: memory 'queue' has no such argument"):
        configuration.load(file)


def test_resolved_shows_a_memory_s_defaults_and_leaves_facts_of_the_run_out():
    config = configuration.load(None, ["memory={name: hard_negatives, neighbours: 4}"]).config
    assert configuration.resolved(config)["memory"] == [
        {"name": "hard_negatives", "refresh": "1 epochs", "index": "auto", "neighbours": 4}
    ]


def test_views_may_be_a_list_a_view():
    views = [[{"name": "jitter", "sigma": 0.1}], [{"name": "scaling"}, {"name": "time_mask"}]]
    config = configuration.load(None, ["views=[[{name: jitter, sigma: 0.1}], [scaling, time_mask]]"]).config
    assert config.views == tuple(views) or config.views == views


def test_protocols_may_be_parts_with_their_settings(tmp_path):
    file = written(tmp_path, "evaluate: {protocols: [{name: knn, neighbours: 5}, linear]}\n")
    config = configuration.load(file).config
    assert config.evaluate.protocols == ({"name": "knn", "neighbours": 5}, {"name": "linear"})
    assert configuration.load(written(tmp_path, configuration.to_yaml(config))).config == config
    assert configuration.load(None, ["evaluate.protocols=knn"]).config.evaluate.protocols == ({"name": "knn"},)
    assert configuration.load(None, ["evaluate.protocols=[]"]).config.evaluate.protocols == ()
    shown = configuration.resolved(config)["evaluate.protocols"]
    assert shown[0] == {"name": "knn", "neighbours": 5, "temperature": 0.1}


def test_a_loss_made_of_a_list_of_losses_is_checked_built_and_shown(tmp_path):
    (tmp_path / "mean.py").write_text(
        "from collections.abc import Sequence\n"
        "from contrast import LOSSES, PairLoss\n"
        "@LOSSES.register('mean_from_a_plugin')\n"
        "class Mean(PairLoss):\n"
        "    def __init__(self, losses: Sequence[PairLoss], samples: int,\n"
        "        further: list[PairLoss] | None = None) -> None:\n"
        "        super().__init__()\n"
        "        self.losses = losses\n"
    )
    text = "plugins: mean.py\nloss: {name: mean_from_a_plugin, losses: [info_nce, {name: bad_pairs, loss: cacr}]}\n"
    try:
        config = configuration.load(written(tmp_path, text)).config
        assert config.loss["losses"] == [{"name": "info_nce"}, {"name": "bad_pairs", "loss": {"name": "cacr"}}]
        built = KINDS["loss"].build(config.loss, samples=7, heads=2)
        assert [type(one) for one in built.losses] == [InfoNCE, BadPairs]
        assert built.losses[1].samples == 7
        assert configuration.resolved(config)["loss.losses"][0]["temperature"] == 0.1
        assert configuration.resolved(config)["loss.further"] is None
        text_of_key = explain(configuration.load(written(tmp_path, text)), "loss.losses[1].loss.repulsion_scale")
        assert text_of_key.startswith("loss.losses[1].loss.repulsion_scale = 1.0  (default)")
        text_of_key = explain(configuration.load(written(tmp_path, text)), "loss.losses[0].name")
        assert text_of_key.splitlines()[0].endswith("mine.yaml)")
        with pytest.raises(InputError, match=r"loss\.losses\[1\]\.temprature: .* Did you mean 'temperature'"):
            configuration.load(
                written(
                    tmp_path,
                    text.replace("{name: bad_pairs, loss: cacr}", "{name: cacr, temprature: 1}").replace(
                        "cacr,", "info_nce,"
                    ),
                )
            )
    finally:
        LOSSES._parts.pop("mean_from_a_plugin", None)


@pytest.mark.parametrize("key", KINDS)
def test_every_kind_of_parts_is_a_key_of_the_config(key):
    assert key in configuration.flat(configuration.Config())


def test_a_constructor_gets_the_facts_of_its_kind_that_it_names():
    kind = Kind("loss", "losses", Registry("thing"), facts=("samples",))

    @kind.registry.register("one")
    def one(samples: int, dim: int = 3) -> tuple[int, int]:
        return samples, dim

    assert kind.build("one", samples=7, dim=9) == (7, 3)
    assert kind.build({"name": "one", "samples": 1, "dim": 2}, samples=7) == (1, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "null"),
        ("name", "1e5"),
        ("encoder.backbone", {"name": "timm:resnet18", "pretrained": "w: 1.safetensors"}),
        ("data.source", "a=b, {c}: d"),
        ("data.splits", {"test": 0.25}),
        ("views", [{"name": "jitter", "sigma": 0.1}]),
        ("memory", [{"name": "queue", "size": 64}]),
        ("budget", "2h"),
        ("optimizer.lr", 1e-6),
        ("trainer", {}),
        ("name", "${x}"),
        ("encoder.backbone", {"name": "timm:resnet18", "pretrained": "1e5"}),
        ("name", "\\${oc.env:HOME}"),
        ("loss", {"name": "info_nce", "temperature": 0.25}),
    ],
)
def test_a_value_from_python_is_taken_as_it_is_and_its_text_is_read_back(key, value, tmp_path):
    """The text is what command.txt says, from which a run can be made again."""
    config = configuration.load(None, [(key, value)], by="call").config
    assert configuration.load(None, [f"{key}={configuration.to_text(value)}"]).config == config
    (tmp_path / "run.yaml").write_text(configuration.to_yaml(config))
    assert configuration.load(str(tmp_path / "run.yaml")).config == config
    found = config
    for name in key.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert (list(found) if isinstance(found, tuple) else found) == value


def test_numbers_of_numpy_and_paths_are_taken_from_python():
    values = [("batch_size", np.int64(64)), ("optimizer.lr", np.float32(0.5)), ("data.source", Path("a") / "b")]
    config = configuration.load(None, values, by="call").config
    assert (config.batch_size, config.optimizer["lr"], config.data.source) == (64, 0.5, str(Path("a/b")))
    assert [type(value) for value in (config.batch_size, config.optimizer["lr"])] == [int, float]


def test_arrays_and_tensors_from_python_are_taken_as_numbers_and_lists():
    loss = {"name": "info_nce", "temperature": np.array(0.5)}
    protocols = [{"name": "linear", "strengths": torch.tensor([1.0, 2.0])}]
    config = configuration.load(None, [("loss", loss), ("evaluate.protocols", protocols)], by="call").config
    assert config.loss["temperature"] == 0.5
    assert config.evaluate.protocols[0]["strengths"] == (1.0, 2.0)


def test_a_long_override_is_no_path():
    strengths = [0.1 * number for number in range(1, 100)]
    override = f"evaluate.protocols={configuration.to_text([{'name': 'linear', 'strengths': strengths}])}"
    assert len(override) > 255
    assert configuration.is_override(override)


def test_a_value_that_depends_on_a_fact_of_the_run_is_not_refused_before_it_is_known(monkeypatch):
    monkeypatch.setattr(LOSSES, "_parts", dict(LOSSES._parts))
    monkeypatch.setattr(LOSSES, "_aliases", dict(LOSSES._aliases))

    @LOSSES.register("grouped")
    class Grouped(PairLoss):
        def __init__(self, dim: int, groups: int = 7) -> None:
            super().__init__()
            if dim % groups:
                raise ValueError("dim must be a multiple of groups")

    assert configuration.load(None, ["loss=grouped"]).config.loss == {"name": "grouped"}
    assert configuration.load(None, ["loss={name: bad_pairs, loss: grouped}"])
    with pytest.raises(InputError, match="dim must be a multiple of groups"):
        KINDS["loss"].build("grouped", dim=8)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def (:\n", "SyntaxError: invalid syntax"),
        ("x = 1\n1 / 0\n", "ZeroDivisionError in broken.py, line 2"),
        ("from contrast import Nope\n", "ImportError"),
    ],
)
def test_a_broken_plugin_is_one_sentence_with_the_line(text, reason, tmp_path):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(InputError, match=r"broken\.py cannot be imported") as raised:
        configuration.load(None, [("plugins", str(tmp_path / "broken.py"))])
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_plugins_from_python_may_have_any_name(tmp_path):
    file = tmp_path / "my, plugin: [1].py"
    file.write_text("LOADED = True\n")
    for plugins in ([str(file)], str(file)):
        config = configuration.load(None, [("plugins", plugins)], by="call").config
        assert list(config.plugins) == [str(file)]


MISTAKES = {
    "temprature": (["loss.temprature=0.2"], "on the command line: loss.temprature: ", "Did you mean 'temperature'?"),
    "section": (["evalute.draws=3"], "evalute", "Did you mean 'evaluate'?"),
    "section key": (["data.sorce=x"], "data.sorce", "Did you mean 'source'?"),
    "loss": (["loss=info_nec"], "loss: there is no loss 'info_nec'.", "Did you mean 'info_nce'?"),
    "inner loss": (["loss={name: bad_pairs, loss: info_nec}"], "loss.loss: there is no loss", "mean 'info_nce'?"),
    "inner key": (
        ["loss={name: bad_pairs, loss: info_nce}", "loss.loss.temprature=1"],
        "on the command line: loss.loss.temprature: loss 'info_nce'",
        "Did you mean 'temperature'?",
    ),
    "inner type": (
        ["loss={name: bad_pairs, loss: {name: info_nce, temperature: warm}}"],
        "loss.loss.temperature must be a number",
        "'warm'",
    ),
    "inner value": (
        ["loss={name: bad_pairs, loss: {name: info_nce, temperature: -1}}"],
        "loss.loss 'info_nce': temperature must be a positive number",
        "-1",
    ),
    "outer value": (
        ["loss={name: false_negatives, top: -1, loss: info_nce}"],
        "on the command line: loss 'false_negatives': top",
        "-1",
    ),
    "no inner loss": (["loss=bad_pairs"], "loss 'bad_pairs': loss is missing; give loss.loss, a loss", ""),
    "nameless inner loss": (["loss=bad_pairs", "loss.loss.temperature=1"], "loss.loss must be a name", "1"),
    "alias": (["loss=simclr"], "loss", "is called 'info_nce' here"),
    "type": (["loss.temperature=warm"], "loss.temperature must be a number", "'warm'"),
    "whole number": (["seed=1.5"], "seed must be a whole number", "1.5"),
    "choice": (["loss.candidates=everyone"], "loss.candidates must be one of all, across, memory", "'everyone'"),
    "budget": (["trainer.max_steps=3"], "trainer.max_steps: the budget decides that", "50000 steps"),
    "trainer": (["trainer.presision=16"], "trainer.presision", "Did you mean 'precision'?"),
    "protocol": (["evaluate.protocols=[knm]"], "evaluate.protocols[0]", "Did you mean 'knn'?"),
    "protocol's setting": (
        ["evaluate.protocols=[{name: knn, neigbours: 5}]"],
        "protocols[0].neigbours",
        "'neighbours'?",
    ),
    "protocol's value": (
        ["evaluate.protocols=[{name: knn, neighbours: 0}]"],
        "protocols[0] 'knn': neighbours must",
        "0",
    ),
    "view": (["views=[{name: jiter}]"], "views[0]: there is no view operation 'jiter'.", "Did you mean 'jitter'?"),
    "inside a value": (["seed.inner=1"], "seed.inner: seed is 0", "no keys"),
    "not yaml": (["loss={name: cacr"], "on the command line: loss={name: cacr", ""),
    "auto": (["views={name: auto, strength: 2}"], "views.strength: 'auto' does not take it", "simclr"),
    "seed": (["seed=-1"], "on the command line: seed must be 0 or more", "-1"),
    "draws": (["evaluate.draws=0"], "evaluate.draws must be 1 or more", "0"),
    "labels a class": (["evaluate.labels_per_class=-1"], "evaluate.labels_per_class must be 1 or more", "-1"),
    "probe": (["probe.items=-1"], "probe.items must be 0 or more", "-1"),
    "workers": (["data.workers=-1"], "data.workers must be 0 or more", "-1"),
    "version": (["version=2"], "version must be 1; got 2", "2"),
}


@pytest.mark.parametrize(("words", "names", "helps"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_that_names_the_key_and_helps(words, names, helps):
    with pytest.raises(InputError) as raised:
        configuration.load(None, words)
    sentence = str(raised.value)
    assert names in sentence
    assert helps in sentence
    assert "\n" not in sentence


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    file = written(tmp_path, "loss: {name: info_nce, temprature: 0.3}\n")
    with pytest.raises(InputError, match=r"mine\.yaml: loss\.temprature: .*Did you mean 'temperature'"):
        configuration.load(file)


def test_a_broken_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"mine\.yaml cannot be read as YAML"):
        configuration.load(written(tmp_path, "loss: {name: info_nce\n"))
    with pytest.raises(InputError, match=r"mine\.yaml must have"):
        configuration.load(written(tmp_path, "- a\n- b\n"))


@pytest.mark.parametrize("source", ["2024", "a: b", "[x", "1e5", "on"])
def test_a_path_is_taken_as_it_stands(source, tmp_path):
    config = configuration.load(None, [f"data.source={source}", "data.target=0"]).config
    assert (config.data.source, config.data.target) == (source, "0")
    assert configuration.load(written(tmp_path, configuration.to_yaml(config))).config == config


def test_an_unknown_config_is_told_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'simclr'"):
        configuration.load("simcrl")


def test_a_plugin_brings_its_own_loss(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from contrast import LOSSES, PairLoss\n"
        "@LOSSES.register('mine_from_a_plugin')\n"
        "class Mine(PairLoss):\n"
        "    def __init__(self, weight: float = 1.0) -> None:\n"
        "        super().__init__()\n"
        "        self.weight = weight\n"
        "    def per_anchor(self, pairs):\n"
        "        return -self.weight * pairs.mean('positive')\n"
    )
    config = written(tmp_path, f"plugins: ['{tmp_path / 'mine.py'}']\nloss: {{name: mine_from_a_plugin, weight: 2}}\n")
    try:
        assert configuration.load(config).config.loss == {"name": "mine_from_a_plugin", "weight": 2}
    finally:
        LOSSES._parts.pop("mine_from_a_plugin", None)


def test_a_word_reaches_into_a_part_inside_a_plugins_part(tmp_path):
    (tmp_path / "around.py").write_text(
        "from contrast import LOSSES, PairLoss\n"
        "@LOSSES.register('around_from_a_plugin')\n"
        "class Wrapper(PairLoss):\n"
        "    def __init__(self, loss: PairLoss) -> None:\n"
        "        super().__init__()\n"
        "        self.loss = loss\n"
    )
    text = f"plugins: ['{tmp_path / 'around.py'}']\nloss: {{name: around_from_a_plugin, loss: info_nce}}\n"
    try:
        config = configuration.load(written(tmp_path, text), ["loss.loss.temperature=1"]).config
        assert config.loss["loss"] == {"name": "info_nce", "temperature": 1.0}
    finally:
        LOSSES._parts.pop("around_from_a_plugin", None)


LATER = """
from __future__ import annotations
from dataclasses import dataclass
from contrast import LOSSES, PairLoss

@dataclass
class Settings:
    weight: float = 1.0

@LOSSES.register("NAME")
class Own(PairLoss):
    def per_anchor(self, pairs):
        return Settings().weight * pairs.mean("negative")
"""


def test_plugins_of_one_name_stand_beside_their_configs(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    names = ["first_from_a_plugin", "second_from_a_plugin"]
    try:
        for name in names:
            (tmp_path / name).mkdir()
            (tmp_path / name / "own.py").write_text(LATER.replace("NAME", name))
            loaded = configuration.load(written(tmp_path / name, f"plugins: [own.py]\nloss: {name}\n"))
            assert loaded.config.loss == {"name": name}
            assert list(loaded.config.plugins) == [str(tmp_path / name / "own.py")]
    finally:
        for name in names:
            LOSSES._parts.pop(name, None)


def test_a_plugin_that_cannot_be_imported_is_named(tmp_path):
    with pytest.raises(InputError, match=r"mine\.yaml: plugins: elsewhere\.py cannot be imported"):
        configuration.load(written(tmp_path, "plugins: [elsewhere.py]\n"))
    with pytest.raises(InputError, match=r"plugins: nowhere\.py cannot be imported"):
        configuration.load(None, ["plugins=[nowhere.py]"])
