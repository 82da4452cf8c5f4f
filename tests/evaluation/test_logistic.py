import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from contrast.evaluation import logistic
from contrast.evaluation.logistic import prepare, solve


def problem(items: int, width: int, classes: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(items, width, generator=generator) @ torch.randn(width, width, generator=generator)
    x = ((mixed - mixed.mean(0)) / mixed.std(0)).double()
    logits = x @ torch.randn(width, classes, generator=generator, dtype=torch.float64)
    noisy = logits + torch.randn(items, classes, generator=generator)
    target = noisy.argmax(1)
    target[:classes] = torch.arange(classes)
    return x, target


@pytest.mark.parametrize(("items", "width", "classes"), [(300, 12, 3), (40, 90, 4), (200, 10, 2)])
@pytest.mark.parametrize("strength", [1.0, 100.0])
def test_the_minimum_is_that_of_scikit_learn(items, width, classes, strength):
    x, target = problem(items, width, classes)
    found = solve(prepare(x), target, classes, torch.tensor([strength]))
    # scikit-learn fits one vector for two classes, which is penalised twice as hard as two of half its length.
    reference = LogisticRegression(C=(1 if classes > 2 else 2) / strength, tol=1e-9, max_iter=20_000)
    reference.fit(x.numpy(), target.numpy())
    probability = (x @ found.weight[0] + found.bias[0]).softmax(1)
    np.testing.assert_allclose(probability.numpy(), reference.predict_proba(x.numpy()), atol=1e-4)
    weight = found.weight[0] if classes > 2 else found.weight[0][:, 1:] - found.weight[0][:, :1]
    np.testing.assert_allclose(weight.T.numpy(), reference.coef_, atol=1e-4)
    assert found.converged.all()


def test_problems_solved_together_have_the_solutions_of_each_problem():
    x, target = problem(120, 8, 3)
    strengths = torch.tensor([0.1, 10.0, 1e4])
    kept = torch.rand(3, 120, generator=torch.Generator().manual_seed(1)) < 0.7
    together = solve(prepare(x), target, 3, strengths, kept)
    for i in range(3):
        alone = solve(prepare(x[kept[i]]), target[kept[i]], 3, strengths[i : i + 1])
        torch.testing.assert_close(together.weight[i], alone.weight[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.bias[i], alone.bias[0], atol=1e-4, rtol=1e-4)


def test_large_problems_reach_the_same_minimum(monkeypatch):
    x, target = problem(150, 10, 3)
    strengths = torch.tensor([0.1, 1.0, 10.0])
    expected = solve(prepare(x), target, 3, strengths)
    monkeypatch.setattr(logistic, "LARGE", 0)
    monkeypatch.setattr(logistic, "LARGE_FINE", 1e-7)
    monkeypatch.setattr(logistic, "ELEMENTS", 150 * 3)
    found = solve(prepare(x), target, 3, strengths)
    assert found.converged.all()
    torch.testing.assert_close(found.weight, expected.weight, atol=1e-4, rtol=1e-4)


def test_separable_classes_converge_for_the_weakest_strength():
    x = torch.cat([torch.randn(50, 5, generator=torch.Generator().manual_seed(0)).double() + 20 * i for i in range(3)])
    target = torch.arange(3).repeat_interleave(50)
    found = solve(prepare((x - x.mean(0)) / x.std(0)), target, 3, torch.tensor([0.1]))
    assert found.converged.all()
    assert ((x - x.mean(0)) / x.std(0) @ found.weight[0] + found.bias[0]).argmax(1).equal(target)


def test_two_fits_are_equal_bit_for_bit():
    x, target = problem(100, 6, 3)
    first, second = (solve(prepare(x), target, 3, torch.tensor([0.1, 1.0])) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
