"""What `contrast show --explain KEY` prints."""

import dataclasses

import pytest

from contrast.core.registry import InputError, schema
from contrast.experiment import config as configuration
from contrast.experiment.config import SECTIONS, Config
from contrast.experiment.explain import explain, fields_of
from contrast.experiment.parts import KINDS
from contrast.views.views import VIEWS


@pytest.mark.parametrize("owner", [Config, *SECTIONS.values()])
def test_every_field_of_the_config_has_its_sentence(owner):
    assert [field.name for field in dataclasses.fields(owner)] == list(fields_of(owner))


REGISTRIES = [*(kind.registry for kind in KINDS.values()), VIEWS]
PARTS = {f"{registry.kind} {name}": part for registry in REGISTRIES for name, part in registry.items()}


@pytest.mark.parametrize("name", PARTS)
def test_every_argument_of_a_part_has_its_sentence(name):
    assert set(schema(PARTS[name])) <= set(fields_of(PARTS[name])), "document the argument under Args:"


def test_a_key_is_explained_with_its_type_default_value_and_origin(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("loss: {name: info_nce, temperature: 0.3}\n")
    text = explain(configuration.load(str(file)), "loss.temperature")
    assert text.splitlines() == [
        f"loss.temperature = 0.3  ({file})",
        "  tau > 0, divides the cosine similarity.",
        "  a number; default: 0.1; of the loss 'info_nce'",
    ]


@pytest.mark.parametrize(
    ("key", "overrides", "expected"),
    [
        ("budget", [], ["budget = auto  (default)", "how long to train"]),
        ("data", [], ["what to read and how to split it", "a section"]),
        ("data.split_by", [], ["never on two sides of a split", "text or nothing"]),
        ("encoder.momentum", [], ["encoder.momentum = null", "in [0, 1]"]),
        ("loss", [], ["what is minimised", "  info_nce ", "  cacr "]),
        ("loss.name", [], ["loss.name = info_nce", "  cacr "]),
        (
            "loss.loss.temperature",
            ["loss={name: bad_pairs, loss: info_nce}"],
            ["0.1", "of the loss 'info_nce'"],
        ),
        ("loss.samples", ["loss={name: bad_pairs, loss: info_nce}"], ["filled in from the data and the run"]),
        ("optimizer.warmup", [], ["default: 0.05", "of the optimizer 'adamw'"]),
        ("memory.size", ["memory=[bank, {name: queue, size: 64}]"], ["memory[1].size = 64", "of the memory 'queue'"]),
        ("memory[1].size", ["memory=[bank, {name: queue, size: 64}]"], ["memory[1].size", "of the memory 'queue'"]),
        ("evaluate.protocols[0].neighbours", [], ["evaluate.protocols[0].neighbours", "of the protocol 'knn'"]),
        ("encoder.backbone.width", ["encoder.backbone=resnet1d"], ["of the backbone 'resnet1d'"]),
        ("views.count", ["views=series"], ["of the recipe 'series'"]),
    ],
)
def test_every_kind_of_key_is_explained(key, overrides, expected):
    text = explain(configuration.load(None, overrides), key)
    for words in expected:
        assert words in text


def test_an_argument_of_lightning_s_trainer_is_explained():
    assert "of Lightning's Trainer" in explain(configuration.load(), "trainer.precision")


def test_every_key_that_show_prints_is_explained():
    for config in ("moco_v2", "nnclr", "cacr", "neighbour_batches"):
        loaded = configuration.load(config)
        for key in configuration.resolved(loaded.config):
            assert explain(loaded, key).startswith(f"{key} = ")


@pytest.mark.parametrize(
    ("config", "key", "origin"),
    [
        ("moco_v2", "loss.learn_temperature", "default"),
        ("moco_v2", "loss.temperature", "moco_v2"),
        ("moco_v2", "memory[0].size", "moco_v2"),
        ("moco_v2", "plugins", "default"),
        ("nnclr", "encoder.predictor.layers", "nnclr"),
        ("nnclr", "encoder.predictor.batch_norm", "default"),
    ],
)
def test_the_origin_is_where_the_value_is_written(config, key, origin):
    assert explain(configuration.load(config), key).splitlines()[0].endswith(f"({origin})")


@pytest.mark.parametrize("key", ["memory[0]size", "loss[0].temperature", "loss..temperature", "trainer.max_epochs"])
def test_a_key_that_no_config_may_have_is_refused(key):
    with pytest.raises(InputError, match="--explain: the config has no key"):
        explain(configuration.load("moco_v2"), key)


@pytest.mark.parametrize(
    ("key", "meant"), [("buget", "budget"), ("data.sorce", "data.source"), ("loss.temprature", "loss.temperature")]
)
def test_an_unknown_key_is_answered_with_the_most_similar(key, meant):
    with pytest.raises(InputError, match=rf"--explain: the config has no key '{key}'\. Did you mean '{meant}'"):
        explain(configuration.load(), key)
