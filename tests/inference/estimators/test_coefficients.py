"""Rows of the table by hand: where a term has mean zero, no test of expectations sees it."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp

from pyro_vae.inference.estimators import make_estimator

LOG_WEIGHTS = np.array([[-1.3, 0.4], [0.2, -2.0], [1.1, 0.9], [-0.6, 0.3]])  # [particles, batch]
K = len(LOG_WEIGHTS)
ONES, ZEROS = np.ones_like(LOG_WEIGHTS), np.zeros_like(LOG_WEIGHTS)


def log_mean_exp(log_weights: np.ndarray) -> np.ndarray:
    return logsumexp(log_weights, axis=0) - math.log(len(log_weights))


def softmax(log_weights: np.ndarray) -> np.ndarray:
    return np.exp(log_weights - logsumexp(log_weights, axis=0))


def less_the_others() -> np.ndarray:
    """(log w_k - mean of the others) / K, Kool et al. (2019), one particle after another."""
    others = np.stack([np.delete(LOG_WEIGHTS, k, 0).mean(0) for k in range(K)])
    return (LOG_WEIGHTS - others) / K


def within_groups() -> np.ndarray:
    return np.concatenate([softmax(LOG_WEIGHTS[:2]), softmax(LOG_WEIGHTS[2:])]) / 2


W, MEAN, BOUND = softmax(LOG_WEIGHTS), LOG_WEIGHTS.mean(0), log_mean_exp(LOG_WEIGHTS)
GROUPED = (log_mean_exp(LOG_WEIGHTS[:2]) + log_mean_exp(LOG_WEIGHTS[2:])) / 2
B = 0.2
BETWEEN = B * ONES / K + (1 - B) * W
# Name, options: value, theta, path, score.
ROWS = {
    ("PathwiseELBO", ""): (MEAN, ONES / K, ONES / K, -ONES / K),
    ("StickingTheLanding", ""): (MEAN, ONES / K, ONES / K, ZEROS),
    ("ScoreFunction", ""): (MEAN, ONES / K, None, ZEROS),
    ("LeaveOneOut", ""): (MEAN, ONES / K, None, ZEROS),
    ("WakeSleep", ""): (MEAN, ONES / K, None, ZEROS),
    ("ImportanceWeighted", ""): (BOUND, W, W, -W),
    ("DReG", ""): (BOUND, W, W**2, ZEROS),
    ("VIMCO", ""): (BOUND, W, None, -W),
    ("ReweightedWakeSleep", ""): (BOUND, W, None, W),
    ("WakeDReG", ""): (BOUND, W, W - W**2, ZEROS),
    ("PIWAE", ""): (BOUND, W, within_groups(), -within_groups()),
    ("MIWAE", ""): (GROUPED, within_groups(), within_groups(), -within_groups()),
    ("CIWAE", "beta"): (B * MEAN + (1 - B) * BOUND, BETWEEN, BETWEEN, -BETWEEN),
}
REINFORCE = {
    "ScoreFunction": LOG_WEIGHTS / K,
    "LeaveOneOut": less_the_others(),
    "PathwiseELBO": less_the_others(),
    "StickingTheLanding": less_the_others(),
}


@pytest.mark.parametrize(("name", "option"), ROWS)
def test_rows_are_those_of_the_table(name: str, option: str) -> None:
    options = {option: B} if option else {}
    row = make_estimator(name, K, **options).coefficients(torch.from_numpy(LOG_WEIGHTS))
    for found, expected in zip(row, ROWS[name, option], strict=False):
        if expected is None:
            assert found is None
        else:
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-14)
    if name in REINFORCE:
        np.testing.assert_allclose(row.reinforce.numpy(), REINFORCE[name], rtol=1e-12)


def test_of_a_single_particle_the_bound_itself_is_the_score() -> None:
    one = torch.tensor([[-1.5, 0.7, 2.0]])
    for name in ("ImportanceWeighted", "ScoreFunction", "PathwiseELBO"):
        assert torch.equal(make_estimator(name, 1).coefficients(one).reinforce, one), name


def test_the_loss_is_minus_the_evidence_of_all_data_where_the_guide_is_exact() -> None:
    """x = z + noise, both standard normal: log p(x) = log N(x; 0, 2), times N/B = 10/3."""
    x = torch.tensor([0.3, -1.0, 2.5])

    def model(x):
        with pyro.plate("data", 10, subsample=torch.arange(3)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def exact(x):
        with pyro.plate("data", 10, subsample=torch.arange(3)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    evidence = float(dist.Normal(0.0, 2.0**0.5).log_prob(x).sum())
    for name in ("PathwiseELBO", "ImportanceWeighted"):
        found = make_estimator(name, 2).loss(model, exact, x)
        assert found == pytest.approx(-10 / 3 * evidence, rel=1e-12)
