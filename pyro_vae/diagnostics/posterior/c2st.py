"""The classifier two-sample test: how well can draws be told from those of a reference?"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pyro_vae.data import Seed, as_seed
from pyro_vae.diagnostics.posterior.pairs import check_two_samples, finite_data

__all__ = ["C2ST", "classifier_two_sample"]

_DRAWS_PER_FEATURE = 4  # below it, products of latents cost more noise than they show
# Variance of the right answers of all folds, over that of as many independent ones, if nothing is
# to be told. The answers in two folds are correlated, for each fold helps to train the classifier
# of the other: what a fold adds to the classifier explains 2/pi of the variance of its own answers,
# where decision values are normal, whatever the number of folds and features.
_SHARED_DRAWS = 1 + 2 / math.pi


class C2ST(NamedTuple):
    """Accuracy, p-value and error of each datum; nan where a draw is not finite."""

    accuracy: Float64[Tensor, " batch"]
    """Share of left-out draws that were told right: 0.5 if the samples are alike."""
    p_value: Float64[Tensor, " batch"]
    """Of the hypothesis that both have the same distribution."""
    accuracy_se: Float64[Tensor, " batch"]
    """Standard error of the accuracy where the samples are alike; less where they are not."""


def classifier_two_sample(
    sample: Float[Tensor, "draws batch dim"],
    reference: Float[Tensor, "others batch dim"],
    *,
    folds: int = 5,
    seed: Seed = 0,
    kind: str = "quadratic",
) -> C2ST:
    r"""Trains a classifier for each datum to tell a sample from a reference.

    Its accuracy is that on draws left out in cross-validation with classes of equal size: of the
    larger sample, a random part is used.

    `"quadratic"` is a logistic regression on the latents, their squares and their products. It sees
    differences in means, scales and correlations, and what goes along with them, such as a missing
    mode; for Gaussians, its form is that of the best classifier. Where draws are fewer than 4 for
    each such feature, the products are left out, and with them the correlations. `"mlp"` is the
    network of Lueckmann et al. (2021), which sees any difference, and takes seconds a datum.

    Args:
        sample: Draws to judge, at least as many as `folds`.
        reference: Draws to trust, at least as many as `folds`.
        folds: Parts of the cross-validation.
        seed: Of the choice of draws, the folds and the network's start.
        kind: The classifier.

    Returns:
        Accuracy and p-value of each datum. The p-value is one-sided, that of a normal count of
        right answers with chance 1/2, whose variance is 1 + 2/pi times that of independent answers.

    Raises:
        ValueError: If there are fewer draws than folds, or an option is none of the above.

    Note: the answers of one cross-validation share their training draws. A binomial p-value, which
        forgets it, was below 0.05 for 7 to 10 % of equal samples; with the larger variance, which
        is near an upper bound, it was for 1 to 4 %. Draws of a
        Markov chain must be thinned to independent ones. An accuracy of 0.5 says that this
        classifier saw nothing; near 1, it no longer says how large the difference is.

    References:
        Lopez-Paz & Oquab (2017), Revisiting classifier two-sample tests; Lueckmann,
        Boelts, Greenberg, Goncalves & Macke (2021), Benchmarking simulation-based inference.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> a, b = torch.randn(2, 100, 1, 3, generator=draw)
        >>> bool(classifier_two_sample(a, b + 20).accuracy > 0.99)
        True
    """
    seed = as_seed(seed)
    if kind not in _MAKERS:
        raise ValueError(f"kind is 'quadratic' or 'mlp', not {kind!r}")
    if folds < 2:
        raise ValueError(f"folds must be at least 2, not {folds}")
    check_two_samples(sample, reference, least=folds)
    size = min(len(sample), len(reference))
    generator = torch.Generator().manual_seed(seed)
    x, y = (
        draws.detach().cpu().double()[torch.randperm(len(draws), generator=generator)[:size]]
        for draws in (sample, reference)
    )
    pooled = torch.cat([x, y]).movedim(1, 0).numpy()
    labels = np.repeat([0, 1], size)
    finite = finite_data(sample, reference).tolist()
    right = np.full(len(pooled), math.nan)
    for n, draws in enumerate(pooled):
        if finite[n]:
            right[n] = _right_answers(draws, labels, folds, seed, kind)
    count = torch.from_numpy(right).to(sample.device)
    sd = math.sqrt(_SHARED_DRAWS * size / 2)
    accuracy, p = count / (2 * size), torch.special.ndtr(-(count - 0.5 - size) / sd)
    error = torch.full_like(accuracy, sd / (2 * size)).masked_fill(accuracy.isnan(), math.nan)
    return C2ST(accuracy, p, error)


def _right_answers(draws: Any, labels: Any, folds: int, seed: int, kind: str) -> int:
    """How many draws are told right by the classifier that was trained without their fold."""
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import StandardScaler

    # Without the labels, scaling on all draws tells nothing about those left out.
    features = StandardScaler().fit_transform(draws)
    make = _MAKERS[kind]
    if kind == "quadratic":
        features = StandardScaler().fit_transform(_quadratic(features))
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    right = 0
    for train, test in split.split(features, labels):
        classifier = make(draws.shape[1], seed).fit(features[train], labels[train])
        right += int((classifier.predict(features[test]) == labels[test]).sum())
    return right


def _quadratic(draws: Any) -> Any:
    dim = draws.shape[1]
    i, j = np.triu_indices(dim)
    if len(draws) < _DRAWS_PER_FEATURE * (dim + len(i)):
        i = j = np.arange(dim)
    return np.concatenate([draws, draws[:, i] * draws[:, j]], axis=1)


def _logistic_regression(dim: int, seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(solver="newton-cholesky")


def _network(dim: int, seed: int) -> Any:
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier((10 * dim, 10 * dim), max_iter=10_000, random_state=seed)


_MAKERS: dict[str, Callable[[int, int], Any]] = {
    "quadratic": _logistic_regression,
    "mlp": _network,
}
