import numpy as np
import pytest
from sklearn import metrics as reference

from contrast.evaluation.metrics import mean_per_class, score


def predictions(items: int, classes: int, seed: int = 0):
    generator = np.random.default_rng(seed)
    target = generator.integers(0, classes, items)
    logits = generator.normal(size=(items, classes)) + 1.5 * np.eye(classes)[target]
    probability = np.exp(logits)
    # One decimal: equal scores are frequent, which AUROC must count half.
    probability = np.round(probability / probability.sum(1, keepdims=True), 1) + 1e-3
    return target, probability / probability.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 4])
def test_scores_are_those_of_scikit_learn(classes):
    target, probability = predictions(200, classes)
    found = score(target, probability, [str(label) for label in range(classes)])
    predicted = probability.argmax(1)
    assert found.values["accuracy"] == pytest.approx(reference.accuracy_score(target, predicted))
    assert found.values["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(target, predicted))
    assert found.values["macro_f1"] == pytest.approx(reference.f1_score(target, predicted, average="macro"))
    area = (
        reference.roc_auc_score(target, probability[:, 1])
        if classes == 2
        else reference.roc_auc_score(target, probability, multi_class="ovr", average="macro")
    )
    assert found.values["auroc"] == pytest.approx(area)
    precision, recall, f1, support = reference.precision_recall_fscore_support(target, predicted)
    for label in range(classes):
        own = found.per_class[str(label)]
        assert own["precision"] == pytest.approx(precision[label])
        assert own["recall"] == pytest.approx(recall[label])
        assert own["f1"] == pytest.approx(f1[label])
        assert own["support"] == support[label]


def test_a_class_without_items_is_left_out_and_named():
    target, probability = predictions(100, 4)
    kept = target != 2
    target, probability = target[kept], probability[kept]
    found = score(target, probability, ["a", "b", "c", "d"])
    present = [0, 1, 3]
    predicted = probability.argmax(1)
    assert found.absent == ("c",) and "c" not in found.per_class
    assert (predicted == 2).any()
    f1 = reference.f1_score(target, predicted, labels=present, average="macro")
    recall = reference.recall_score(target, predicted, labels=present, average="macro")
    area = np.mean([reference.roc_auc_score(target == label, probability[:, label]) for label in present])
    assert found.values["macro_f1"] == pytest.approx(f1)
    assert found.values["balanced_accuracy"] == pytest.approx(recall)
    assert found.values["auroc"] == pytest.approx(area)


def test_a_single_class_has_no_auroc():
    found = score(np.zeros(5, dtype=np.int64), np.tile([0.9, 0.1], (5, 1)), ["a", "b"])
    assert found.values == {"accuracy": 1.0, "balanced_accuracy": 1.0, "macro_f1": 1.0}


def test_a_class_without_predictions_has_precision_zero():
    found = score(np.array([0, 1]), np.array([[0.9, 0.1], [0.8, 0.2]]), ["a", "b"])
    assert found.per_class["b"] == {"recall": 0.0, "precision": 0.0, "f1": 0.0, "support": 1}


def test_the_standard_error_of_the_accuracy_is_the_binomial_one():
    target = np.array([0, 0, 0, 1])
    probability = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    # Three of four right; recall 2/3 over three items and 1 over one.
    errors = score(target, probability, ["a", "b"]).errors
    assert errors["accuracy"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert errors["balanced_accuracy"] == pytest.approx(((2 / 3) * (1 / 3) / 3) ** 0.5 / 2)


def test_each_class_is_averaged_over_predictions():
    target = np.array([0, 1])
    right, wrong = np.eye(2), np.eye(2)[::-1]
    both = [score(target, probability, ["a", "b"]) for probability in (right, wrong)]
    assert mean_per_class(both)["a"] == {"recall": 0.5, "precision": 0.5, "f1": 0.5, "support": 1.0}
