import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from contrast.core.registry import InputError
from contrast.data.dataset import ArrayItems
from contrast.evaluation.features import raw_input
from contrast.evaluation.linear import draw_labels
from contrast.evaluation.protocols import PROTOCOLS, FewLabels, Linear, NearestNeighbours, evaluate, protocol_hash
from contrast.evaluation.results import Result


def flat(x):
    return x.flatten(1)


def half(x):
    return x.flatten(1)[:, :8]


def accuracies(found):
    return {(row.model, row.protocol): row for row in found.results if row.metric == "accuracy"}


def test_every_model_has_every_metric_with_its_draws_and_spread(make_data):
    data = make_data()
    found = evaluate({"raw": raw_input(data), "pretrained": half}, data, draws=3, labels_per_class=5)
    assert len(found.results) == 2 * 3 * 4
    for row in found.results:
        assert 0 <= row.value <= 1 and row.value == pytest.approx(np.mean(row.values))
        assert row.n == len(row.values) == len(row.seeds)
        assert row.split == "test" and not row.saw_test and row.seconds > 0
        assert (row.per_class is not None) == (row.metric == "accuracy")
        assert Result.from_row(json.loads(json.dumps(row.row(), allow_nan=False))) == row
    few = accuracies(found)["pretrained", "few_labels"]
    assert few.labels == "5 per class" and few.n == 3
    assert few.spread == pytest.approx(np.std(few.values, ddof=1))
    assert few.spread_kind == "standard deviation over draws"
    assert accuracies(found)["raw", "linear"].value > 0.8
    assert found.features["pretrained"].shape == (30, 8)
    assert found.health["raw"].usable and found.warnings == []


def test_the_accuracy_is_that_of_the_predictions(make_data):
    data = make_data(noise=3.0)
    found = evaluate({"raw": flat}, data)
    for protocol in ("knn", "linear"):
        said = found.predictions[protocol]["raw"]
        assert said.sample.tolist() == data.test.sample.tolist()
        assert said.predicted.tolist() == said.probabilities.argmax(1).tolist()
        right = float((said.predicted == data.test.target).mean())
        assert accuracies(found)["raw", protocol].value == right
    said = found.predictions["few_labels"]["raw"]
    assert accuracies(found)["raw", "few_labels"].values[0] == float((said.predicted == said.target).mean())


class SpyItems(ArrayItems):
    log: list

    def read(self, rows):
        self.log.append(("read", tuple(rows.tolist())))
        return super().read(rows)


def test_test_items_are_read_once_per_model_after_every_fit(make_data, monkeypatch):
    log = []
    monkeypatch.setattr(SpyItems, "log", log, raising=False)
    for protocol in (NearestNeighbours, Linear, FewLabels):
        fit = protocol.fit
        monkeypatch.setattr(protocol, "fit", lambda *given, fit=fit: (fit(*given), log.append(("fitted", ())))[0])
    data = make_data(items=SpyItems)
    evaluate({"raw": flat, "pretrained": half}, data, batch_size=8)
    read_test = [i for i, (what, rows) in enumerate(log) if what == "read" and any(row >= 90 for row in rows)]
    fitted = [i for i, (what, _) in enumerate(log) if what == "fitted"]
    assert len(fitted) == 6
    assert max(fitted) < min(read_test)
    rows = [row for i in read_test for row in log[i][1]]
    assert sorted(rows) == sorted(2 * list(range(90, 120)))


def parameters(found):
    """Return every number of a fit."""
    return [
        (protocol, model, fitted.chosen, fitted.seeds, [vars(classifier) for classifier in fitted.classifiers])
        for protocol, models in found.fitted.items()
        for model, fitted in models.items()
    ]


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


def test_shuffled_test_labels_change_no_fitted_parameter(make_data):
    data, shuffled = make_data(), make_data()
    shuffled.test.target[:] = np.random.default_rng(1).permutation(shuffled.test.target)
    honest, other = (evaluate({"raw": flat}, each, draws=2) for each in (data, shuffled))
    assert_same(parameters(honest), parameters(other))
    assert accuracies(honest)["raw", "linear"].value != accuracies(other)["raw", "linear"].value


def test_shuffled_training_labels_change_the_fit(make_data):
    data, shuffled = make_data(), make_data()
    shuffled.train.target[:] = np.random.default_rng(1).permutation(shuffled.train.target)
    honest, other = (evaluate({"raw": flat}, each, protocols=["linear"]) for each in (data, shuffled))
    with pytest.raises(AssertionError):
        assert_same(parameters(honest), parameters(other))


def test_the_same_seed_gives_equal_numbers_and_another_seed_other_draws(make_data):
    data = make_data(noise=3.0)
    first, again, other = (
        accuracies(evaluate({"raw": flat}, data, protocols=["few_labels"], seed=seed, labels_per_class=3))
        for seed in (0, 0, 1)
    )
    assert first["raw", "few_labels"].values == again["raw", "few_labels"].values
    assert set(first["raw", "few_labels"].seeds).isdisjoint(other["raw", "few_labels"].seeds)


def test_more_draws_start_with_the_same_draws(make_data):
    data = make_data(noise=3.0)
    few, many = (
        accuracies(evaluate({"raw": flat}, data, protocols=["few_labels"], draws=draws))["raw", "few_labels"]
        for draws in (2, 4)
    )
    assert many.values[:2] == few.values and many.seeds[:2] == few.seeds


def test_a_draw_uses_only_its_own_labels(make_data):
    data = make_data()
    found = evaluate({"raw": flat}, data, protocols=["few_labels"], draws=1, labels_per_class=4)
    drawn = draw_labels(data.train.target, 4, found.fitted["few_labels"]["raw"].seeds[0])
    changed = make_data()
    outside = np.setdiff1d(np.arange(len(changed.train)), drawn)
    x = changed.train.items.array
    x[outside] = -x[outside] + 3
    again = evaluate({"raw": flat}, changed, protocols=["few_labels"], draws=1, labels_per_class=4)
    assert_same(parameters(found), parameters(again))


def test_items_without_a_label_are_neither_fitted_nor_scored(make_data):
    data = make_data()
    data.train.target[::2] = -1
    data.validation[::2] = False
    data.test.target[:10] = -1
    found = evaluate({"raw": flat}, data)
    assert accuracies(found)["raw", "linear"].settings["items"] == 45
    said = found.predictions["linear"]["raw"]
    assert said.sample.tolist() == list(range(100, 120))
    own = found.fitted["linear"]["raw"].classifiers[0].probabilities(flat(data.test.x())[10:])
    np.testing.assert_allclose(said.probabilities, own.numpy())
    assert len(found.features["raw"]) == 30


def test_an_encoder_with_nan_features_has_a_warning_and_no_results(make_data):
    found = evaluate({"raw": flat, "pretrained": lambda x: flat(x) * torch.nan}, make_data(), protocols=["knn"])
    assert {row.model for row in found.results} == {"raw"}
    assert "the pretrained encoder gives NaN" in found.warnings[0]


def test_nan_among_only_the_test_features_is_a_warning_too(make_data):
    data = make_data()
    data.test.items.array[95, 0, 0, 0] = np.nan
    found = evaluate({"raw": flat}, data, protocols=["knn"])
    assert found.results == [] and "1 of 30 items" in found.warnings[0]


def test_a_collapsed_encoder_has_a_warning_and_chance_results(make_data):
    found = evaluate({"pretrained": lambda x: torch.ones(len(x), 4)}, make_data(), draws=2)
    assert "the pretrained encoder has collapsed" in found.warnings[0]
    assert accuracies(found)["pretrained", "linear"].value == pytest.approx(1 / 3)


def test_all_labels_of_a_rare_class_are_used_and_the_settings_name_it(make_data):
    data = make_data()
    data.train.target[np.flatnonzero(data.train.target == 1)[4:]] = -1
    data.validation[data.train.target < 0] = False
    row = accuracies(evaluate({"raw": flat}, data, protocols=["few_labels"]))["raw", "few_labels"]
    assert row.settings["classes_with_fewer_labels"] == {"class 1": 4}
    assert row.settings["items"] == 24


def test_classes_without_test_items_are_named(make_data):
    data = make_data()
    data.test.target[data.test.target == 2] = -1
    found = evaluate({"raw": flat}, data, protocols=["knn"])
    assert found.results[0].settings["classes_left_out"] == ["class 2"]
    assert found.notes == ["no labelled test item for: class 2; left out of every mean over classes."]


def test_without_validation_items_folds_choose_the_strength(make_data):
    data = make_data()
    row = evaluate({"raw": flat}, replace(data, validation=np.zeros(90, dtype=bool)), protocols=["linear"]).results[0]
    assert "cross-validation" in row.selected_on


def test_the_hash_names_version_and_settings():
    assert protocol_hash(NearestNeighbours()) == protocol_hash(NearestNeighbours(neighbours=20))
    assert len({protocol_hash(NearestNeighbours(k)) for k in (1, 20, 200)} | {protocol_hash(Linear())}) == 4


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_is_built_by_its_own_name(name):
    protocol = PROTOCOLS.build(name)
    assert protocol.name == name and protocol.version == "v1"


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("kn", "there is no protocol 'kn'"),
        ({"name": "knn", "neighbors": 5}, "Did you mean 'neighbours'"),
        ({"name": "knn", "neighbours": 0}, "neighbours must be at least 1"),
        ({"name": "few_labels", "draws": 0}, "draws must be at least 1"),
        ({"name": "linear", "strengths": [0.0]}, "strengths must be"),
    ],
)
def test_a_wrong_protocol_is_refused_in_a_sentence(part, sentence, make_data):
    with pytest.raises(InputError, match=sentence):
        evaluate({"raw": flat}, make_data(), protocols=[part])


def test_a_protocol_takes_settings(make_data):
    found = evaluate({"raw": flat}, make_data(), protocols=[{"name": "few_labels", "labels_per_class": 2, "draws": 2}])
    assert found.results[0].labels == "2 per class" and found.results[0].n == 2


def test_a_protocol_of_the_user_gets_the_number_of_classes(make_data, monkeypatch):
    monkeypatch.setattr(PROTOCOLS, "_parts", dict(PROTOCOLS._parts))
    monkeypatch.setattr(PROTOCOLS, "_aliases", dict(PROTOCOLS._aliases))

    @PROTOCOLS.register("mine")
    class Mine(NearestNeighbours):
        name = "mine"

        def __init__(self, classes: int) -> None:
            super().__init__(neighbours=classes)

    data = make_data()
    found = evaluate({"flat": flat}, data, protocols=["mine"])
    assert found.results[0].settings["neighbours"] == len(data.classes)


def test_missing_labels_are_refused_before_any_encoding(make_data):
    data = make_data()
    data.test.target[:] = -1
    with pytest.raises(InputError, match="evaluation needs labelled test items; clouds has 30 test items"):
        evaluate({"raw": flat}, data)
    data = make_data()
    data.train.target[:] = 0
    with pytest.raises(InputError, match="at least two classes; clouds has 90 labelled training items of 1 class"):
        evaluate({"raw": flat}, data)
