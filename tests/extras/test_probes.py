"""Classifiers of codes against codes whose worth is known."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from pyro_vae.extras.latents import feature_quality
from pyro_vae.extras.latents.probes import kmeans_clusters, linear_probe, matched_clusters


def blobs(
    count: int, distance: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Three classes of unequal size around the corners of a triangle, in 2 dimensions."""
    labels = generator.choice(3, size=count, p=[0.5, 0.3, 0.2])
    corners = distance * np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.9]])
    return corners[labels] + generator.normal(size=(count, 2)), labels


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(5)


# --- the parts


def test_classes_far_apart_are_told_by_both(generator: np.random.Generator) -> None:
    (train, train_labels), (test, test_labels) = (blobs(n, 30.0, generator) for n in (60, 41))
    assert (linear_probe(train, train_labels, test) == test_labels).all()
    clusters = kmeans_clusters(train, test, 3)
    assert matched_clusters(test_labels, clusters).all()
    assert adjusted_rand_score(test_labels, clusters) == 1.0


def test_scales_tell_a_classifier_nothing(generator: np.random.Generator) -> None:
    (train, train_labels), (test, _) = (blobs(n, 4.0, generator) for n in (60, 41))
    scales = np.array([1e-3, 50.0])
    np.testing.assert_array_equal(
        linear_probe(train, train_labels, test),
        linear_probe(train * scales + 7, train_labels, test * scales + 7),
    )


def test_a_collapsed_unit_moves_no_cluster(generator: np.random.Generator) -> None:
    (train, _), (test, test_labels) = (blobs(n, 9.0, generator) for n in (80, 51))
    noise = generator.normal(size=(80, 3)), generator.normal(size=(51, 3))
    collapsed, loud = (
        [np.hstack([train, scale * noise[0]]), np.hstack([test, scale * noise[1]])]
        for scale in (1e-3, 100.0)
    )
    assert matched_clusters(test_labels, kmeans_clusters(*collapsed, 3)).all()
    assert matched_clusters(test_labels, kmeans_clusters(*loud, 3)).mean() < 0.9


def test_the_match_is_the_best_of_all(generator: np.random.Generator) -> None:
    labels, clusters = generator.integers(4, size=50), generator.integers(4, size=50)
    best = max((np.array(p)[clusters] == labels).sum() for p in permutations(range(4)))
    assert matched_clusters(labels, clusters).sum() == best


def test_clusters_without_a_class_match_nothing() -> None:
    matched = matched_clusters(np.array([3, 3, 3, 8]), np.array([0, 0, 1, 2]))
    assert matched.tolist() == [True, True, False, True]


# --- the whole


def test_worth_is_measured_with_its_errors(generator: np.random.Generator) -> None:
    (train, train_labels), (test, test_labels) = (blobs(n, 2.0, generator) for n in (300, 200))
    empty_train, empty_test = generator.normal(size=(300, 4)), generator.normal(size=(200, 4))
    result = feature_quality(
        {"blobs": [(train, test)], "noise": [(empty_train, empty_test)]},
        torch.as_tensor(train_labels),
        test_labels,
        num_bootstrap=400,
    )
    accuracy, error = result["probe_accuracy"].values, result["probe_accuracy_se"].values
    right = linear_probe(train, train_labels, test) == test_labels
    assert accuracy[0] == right.mean()
    # The bootstrap of a share: binomial, itself sure to 1 / sqrt(2 x 400), a 28th; 4 of these.
    assert error[0] == pytest.approx(math.sqrt(accuracy[0] * (1 - accuracy[0]) / 200), rel=0.15)
    assert accuracy[1] < accuracy[0] - 4 * error[0]
    assert result["adjusted_rand"].values[0] > 0.15
    assert abs(result["adjusted_rand"].values[1]) < 4 * result["adjusted_rand_se"].values[1]
    assert result["code_dim"].values.tolist() == [2, 4]
    assert result["probe_gain"].values == pytest.approx(accuracy - accuracy[0])
    assert result["probe_gain_se"].values[0] == 0


def test_gains_are_paired_and_codes_alike_gain_nothing(generator: np.random.Generator) -> None:
    (train, train_labels), (test, test_labels) = (blobs(n, 2.0, generator) for n in (90, 70))
    result = feature_quality(
        {"once": [(train, test)], "again": [(3 * train, 3 * test)]},
        train_labels,
        test_labels,
        num_bootstrap=50,
    )
    for name in ("probe", "cluster"):
        assert result[f"{name}_gain"].values[1] == 0
        assert result[f"{name}_gain_se"].values[1] == 0
        assert result[f"{name}_accuracy_se"].values[1] > 0


def test_the_spread_of_trainings_enters_the_error(generator: np.random.Generator) -> None:
    (train, train_labels), (test, test_labels) = (blobs(n, 3.0, generator) for n in (200, 150))
    useless = generator.normal(size=(200, 2)), generator.normal(size=(150, 2))
    sets = [(train, test), (train, test), useless]
    result = feature_quality(
        {"first": sets[:1], "all": sets}, train_labels, test_labels, num_bootstrap=100
    )
    each = [(linear_probe(a, train_labels, b) == test_labels).mean() for a, b in sets]
    assert result["probe_accuracy"].values[1] == pytest.approx(np.mean(each))
    spread = np.std(each, ddof=1) / math.sqrt(3)
    found = result["probe_accuracy_se"].values[1]
    assert spread < found < math.hypot(spread, 2 * result["probe_accuracy_se"].values[0])
    assert result["trainings"].values.tolist() == [1, 3]
    assert result["probe_gain_se"].values[1] > spread


def test_codes_of_other_data_than_the_labels_are_refused() -> None:
    codes = np.zeros((5, 2)), np.zeros((4, 2))
    with pytest.raises(ValueError, match="encode the labelled data"):
        feature_quality({"codes": [codes]}, np.arange(5), np.arange(3))
    with pytest.raises(ValueError, match="at least one training"):
        feature_quality({"codes": []}, np.arange(5), np.arange(4))
