import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from contrast.evaluation import linear
from contrast.evaluation.linear import (
    STRENGTHS,
    choose_by_folds,
    choose_on_validation,
    draw_labels,
    fit_probe,
    stratified_folds,
)


def clouds(items: int, seed: int = 0, noise: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(items) % 3
    centres = torch.randn(3, 6, generator=torch.Generator().manual_seed(99))
    features = centres[target] + noise * torch.randn(items, 6, generator=generator)
    return features * torch.tensor([1.0, 100.0, 0.01, 1.0, 5.0, 1.0]) + 7, target


def test_a_probe_is_standardisation_and_logistic_regression():
    features, target = clouds(200)
    probe = fit_probe(features, target, 3, strength=10.0)
    scaler = StandardScaler().fit(features.double().numpy())
    reference = LogisticRegression(C=0.1, tol=1e-9, max_iter=10_000)
    reference.fit(scaler.transform(features.double().numpy()), target.numpy())
    unseen, _ = clouds(50, seed=1)
    expected = reference.predict_proba(scaler.transform(unseen.double().numpy()))
    np.testing.assert_allclose(probe.probabilities(unseen).numpy(), expected, atol=1e-4)
    assert probe.converged


def test_a_constant_feature_has_no_influence():
    features, target = clouds(60)
    # Constant up to rounding: without the rule, dividing by that deviation would make a feature of the noise.
    rounding = 1e-8 * torch.arange(60).remainder(2).view(-1, 1)
    features = torch.cat([features, torch.full((60, 1), 0.1) + rounding], 1)
    assert features[:, -1].unique().numel() == 2
    probe = fit_probe(features, target, 3, strength=1.0)
    moved = features.clone()
    moved[:, -1] = 1e6
    assert torch.equal(probe.probabilities(features), probe.probabilities(moved))


def test_a_class_that_was_not_fitted_has_probability_zero():
    features, target = clouds(60)
    probe = fit_probe(features, target * 2, 6, strength=1.0)
    probability = probe.probabilities(features)
    assert probability.shape == (60, 6)
    assert probability[:, [1, 3, 5]].eq(0).all()
    torch.testing.assert_close(probability.sum(1), torch.ones(60, dtype=torch.float64))


def test_the_strength_has_the_smallest_log_loss_on_held_out_items():
    features, target = clouds(120, noise=8.0)
    held_out = torch.arange(120) % 4 == 0
    strength, losses = choose_on_validation(features, target, held_out, STRENGTHS, seed=0)
    probe = fit_probe(features[~held_out], target[~held_out], 3, strength)
    likely = probe.probabilities(features[held_out]).gather(1, target[held_out][:, None])
    assert losses[strength] == min(losses.values())
    assert losses[strength] == pytest.approx(float(-likely.log().mean()), abs=1e-3)
    assert 0.1 < strength < 1e5
    # It stopped after the first rise: the weakest strength tried is the only one below the chosen one.
    assert sorted(losses)[1] == strength and len(losses) < len(STRENGTHS)


def test_folds_choose_by_the_log_loss_of_held_out_items():
    features, target = clouds(30, noise=3.0)
    strength, losses = choose_by_folds(features, target, STRENGTHS, seed=3)
    fold = stratified_folds(target.numpy(), 5, seed=3)
    x = StandardScaler().fit_transform(features.double().numpy())
    total = 0.0
    for number in range(5):
        reference = LogisticRegression(C=1 / strength, tol=1e-9, max_iter=10_000)
        reference.fit(x[fold != number], target.numpy()[fold != number])
        log = reference.predict_log_proba(x[fold == number])
        total -= log[np.arange(len(log)), target.numpy()[fold == number]].sum()
    assert set(losses) == set(STRENGTHS)
    assert losses[strength] == min(losses.values()) == pytest.approx(total / 30, abs=1e-3)


def test_one_label_per_class_leaves_none_to_choose_on():
    features, target = clouds(3)
    assert choose_by_folds(features, target, STRENGTHS, seed=0) == (100.0, {})


def test_folds_are_even_within_every_class():
    target = np.repeat([0, 1, 2, 3], [10, 7, 1, 2])
    fold = stratified_folds(target, 5, seed=0)
    assert np.bincount(fold[:10], minlength=5).tolist() == [2] * 5
    assert np.bincount(fold[10:17], minlength=5).max() == 2
    assert fold[17] == -1
    assert len(set(fold[18:])) == 2


def test_a_draw_has_a_number_of_labels_per_class_or_all_of_them():
    target = np.array([0] * 20 + [1] * 4 + [-1] * 50 + [2] * 15)
    draw = draw_labels(target, 10, seed=5)
    assert np.bincount(target[draw]).tolist() == [10, 4, 10]
    assert (target[draw] >= 0).all() and len(set(draw)) == 24
    assert draw.tolist() == draw_labels(target, 10, seed=5).tolist()
    assert draw.tolist() != draw_labels(target, 10, seed=6).tolist()


def test_a_large_train_split_is_subsampled_for_the_choice_only(monkeypatch):
    features, target = clouds(120, noise=3.0)
    seen = []
    whole = linear.prepare
    monkeypatch.setattr(linear, "MOST_FOR_CHOICE", 40)
    monkeypatch.setattr(linear, "prepare", lambda x: seen.append(len(x)) or whole(x))
    choose_on_validation(features, target, torch.arange(120) % 4 == 0, STRENGTHS, seed=0)
    choose_by_folds(features, target, STRENGTHS, seed=0)
    fit_probe(features, target, 3, 1.0)
    assert seen == [40, 40, 120]
