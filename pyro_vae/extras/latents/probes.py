"""How well codes serve: what a linear classifier and k-means find in them.

Both are fitted to the codes of training data and judged on those of test data, for every kind of
code alike. The classifier standardises its codes, for the scales that an encoder happens to choose
are no part of what it can tell. K-means takes codes as they are: standardised, a collapsed unit of
a VAE would count as much as an active one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from pyro_vae.data import Seed, as_seed
from pyro_vae.results import Result, label, make_result, sha256_of

__all__ = [
    "FeatureSets",
    "feature_quality",
    "kmeans_clusters",
    "linear_probe",
    "matched_clusters",
]

FeatureSets = Sequence[tuple[Any, Any]]
"""(training codes, test codes) for each time that an encoder was trained; arrays or tensors."""

_MAX_ITERATIONS = 5000
_KMEANS_STARTS = 10


def linear_probe(
    train_codes: Float[np.ndarray, "train code"],
    train_labels: Int[np.ndarray, " train"],
    test_codes: Float[np.ndarray, "test code"],
) -> Int[np.ndarray, " test"]:
    """The classes that a logistic regression on training codes gives to test codes.

    Codes are standardised; the penalty is scikit-learn's default (C = 1) for all.

    References:
        Alain & Bengio (2017), Understanding intermediate layers using linear classifier probes,
        arXiv:1610.01644.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_MAX_ITERATIONS))
    return np.asarray(probe.fit(train_codes, train_labels).predict(test_codes))


def kmeans_clusters(
    train_codes: Float[np.ndarray, "train code"],
    test_codes: Float[np.ndarray, "test code"],
    num_clusters: int,
    *,
    seed: Seed = 0,
) -> Int[np.ndarray, " test"]:
    """The clusters of test codes, by k-means on training codes without labels."""
    seed = as_seed(seed)
    from sklearn.cluster import KMeans

    kmeans = KMeans(num_clusters, n_init=_KMEANS_STARTS, random_state=seed)
    return np.asarray(kmeans.fit(train_codes).predict(test_codes))


def matched_clusters(
    labels: Shaped[np.ndarray, " data"], clusters: Shaped[np.ndarray, " data"]
) -> Bool[np.ndarray, " data"]:
    """Whether each datum's cluster is the one matched with its class.

    Clusters are matched one to one with classes so that most data agree (Hungarian method); their
    share is the clustering accuracy.

    Example:
        >>> matched_clusters(np.array([5, 5, 7, 7]), np.array([1, 1, 0, 1])).tolist()
        [True, True, True, False]
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics.cluster import contingency_matrix

    table = contingency_matrix(labels, clusters)
    _, places = np.unique(labels, return_inverse=True)
    _, groups = np.unique(clusters, return_inverse=True)
    matched = np.full(table.shape[1], -1)
    rows, columns = linear_sum_assignment(-table)
    matched[columns] = rows
    return np.asarray(matched[groups] == places)


def feature_quality(
    features: Mapping[str, FeatureSets],
    train_labels: Any,
    test_labels: Any,
    *,
    num_bootstrap: int = 200,
    seed: Seed = 0,
) -> Result:
    """Probes codes of several kinds with a linear classifier and with k-means.

    Args:
        features: For each kind the codes of training and test data, once for every time its encoder
            was trained; the rows are the same data in all.
        train_labels: Classes of the training data; whole numbers, an array or a tensor.
        test_labels: Classes of the test data.
        num_bootstrap: Resamples of the test data for the standard errors.
        seed: Seeds k-means and the resampling.

    Returns:
        Along `features`, all without a unit or bound:

        ==================  ======================================================================
        name                meaning
        ==================  ======================================================================
        `probe_accuracy`    share of test data that a linear classifier of the codes gets right
        `cluster_accuracy`  share of test data in the cluster matched with their class, one to one
        `adjusted_rand`     adjusted Rand index of clusters and classes
        `probe_gain`        `probe_accuracy` less that of the first kind
        `cluster_gain`      `cluster_accuracy` less that of the first kind
        `code_dim`          numbers in a code
        `trainings`         how often the encoder was trained
        ==================  ======================================================================

        The scores are means over trainings. Standard errors `*_se`, of all but the last two, hold
        the draw of the test data (bootstrap) and, where a kind was trained more than once, of the
        training; those of gains come from the same resamples.

    Raises:
        ValueError: If a kind has no codes, or codes and labels differ in number.
    """
    seed = as_seed(seed)
    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    _check(features, len(train_labels), len(test_labels))
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(test_labels), size=(num_bootstrap, len(test_labels)))
    measured = {
        name: _measure(sets, train_labels, test_labels, draws, seed)
        for name, sets in features.items()
    }
    first = next(iter(measured.values()))
    columns: dict[str, list[float]] = {}
    for found in measured.values():
        for name, (value, resampled, spread) in found.items():
            columns.setdefault(name, []).append(value)
            columns.setdefault(f"{name}_se", []).append(math.hypot(resampled.std(), spread))
        for kind in ("probe", "cluster"):
            value, resampled, spread = found[f"{kind}_accuracy"]
            value_0, resampled_0, spread_0 = first[f"{kind}_accuracy"]
            itself = found is first
            error = 0.0 if itself else math.hypot((resampled - resampled_0).std(), spread, spread_0)
            columns.setdefault(f"{kind}_gain", []).append(value - value_0)
            columns.setdefault(f"{kind}_gain_se", []).append(error)
    sizes = [np.shape(sets[0][0])[1] for sets in features.values()]
    return _result(columns, features, sizes, test_labels, num_bootstrap, seed)


def _check(features: Mapping[str, FeatureSets], num_train: int, num_test: int) -> None:
    for name, sets in features.items():
        if not sets:
            raise ValueError(f"{name!r} has no codes: give those of at least one training")
        for train, test in sets:
            if (len(train), len(test)) != (num_train, num_test):
                raise ValueError(
                    f"{name!r} has codes of {len(train)} training and {len(test)} test data, but "
                    f"there are {num_train} and {num_test} labels: encode the labelled data"
                )


Measured = dict[str, tuple[float, Float[np.ndarray, " draws"], float]]


def _measure(
    sets: FeatureSets,
    train_labels: Int[np.ndarray, " train"],
    test_labels: Int[np.ndarray, " test"],
    draws: Int[np.ndarray, "draws test"],
    seed: int,
) -> Measured:
    """For each score its mean over trainings, that mean in each resample, and its error by them."""
    from sklearn.metrics import adjusted_rand_score

    values: dict[str, list[float]] = {}
    resampled: dict[str, list[np.ndarray]] = {}
    for train, test in sets:
        train, test = (np.asarray(codes, dtype=np.float64) for codes in (train, test))
        right = linear_probe(train, train_labels, test) == test_labels
        clusters = kmeans_clusters(train, test, len(np.unique(train_labels)), seed=seed)
        matched = matched_clusters(test_labels, clusters)
        rand = [adjusted_rand_score(test_labels[i], clusters[i]) for i in draws]
        for name, value, again in (
            ("probe_accuracy", right.mean(), right[draws].mean(1)),
            ("cluster_accuracy", matched.mean(), matched[draws].mean(1)),
            ("adjusted_rand", adjusted_rand_score(test_labels, clusters), np.array(rand)),
        ):
            values.setdefault(name, []).append(float(value))
            resampled.setdefault(name, []).append(again)
    count = len(sets)
    return {
        name: (
            float(np.mean(values[name])),
            np.mean(resampled[name], axis=0),
            float(np.std(values[name], ddof=1)) / math.sqrt(count) if count > 1 else 0.0,
        )
        for name in values
    }


def _result(
    columns: Mapping[str, Sequence[float]],
    features: Mapping[str, FeatureSets],
    sizes: Sequence[int],
    test_labels: Int[np.ndarray, " test"],
    num_bootstrap: int,
    seed: int,
) -> Result:
    first = next(iter(features))
    texts = {
        "probe_accuracy": "share of test data that a linear classifier of the codes gets right",
        "cluster_accuracy": "share of test data in the cluster matched with their class",
        "adjusted_rand": "adjusted Rand index of clusters and classes; 0 by chance, 1 if equal",
        "probe_gain": f"probe accuracy less that of {first}",
        "cluster_gain": f"cluster accuracy less that of {first}",
    }
    variables: dict[str, Any] = {
        name: (
            "features",
            np.array(values),
            label(
                unit="none",
                reduction="none",
                bound="none",
                description=texts[name.removesuffix("_se")],
            ),
        )
        for name, values in columns.items()
    }
    variables["code_dim"] = ("features", np.array(sizes), {})
    variables["trainings"] = ("features", np.array([len(sets) for sets in features.values()]), {})
    notes = [
        "standard errors hold the draw of the test data by bootstrap, and that of the training "
        "where there are several; the match of clusters is that of all test data."
    ]
    return make_result(
        variables,
        function="feature_quality",
        config={"num_bootstrap": num_bootstrap},
        seed=seed,
        data_sha256=sha256_of(test_labels),
        coords={"features": list(features)},
        notes=notes,
    )
