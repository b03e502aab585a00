"""Pareto k-hat and smoothing against ArviZ, and what they must and must not flag."""

import importlib
import math

import numpy as np
import pytest
import torch

from pyro_vae.inference.log_weights import khat_threshold, pareto_khat
from pyro_vae.inference.log_weights.pareto import pareto_tail, smoothed_log_weights


def arviz_khat(log_weights: torch.Tensor) -> np.ndarray:
    """ArviZ's own k-hat, wherever the installed major keeps it."""
    rows = log_weights.T.contiguous().numpy()
    try:
        stats = importlib.import_module("arviz_stats.base").array_stats
    except ImportError:
        return np.asarray(importlib.import_module("arviz").psislw(rows)[1])
    return np.asarray(stats.psislw(-rows)[1])  # ArviZ 1 takes log likelihoods, not log weights


# Sizes whose tails, min(S/5, 3 sqrt(S)), are whole numbers: ArviZ 0 rounds them up, ArviZ 1 down.
@pytest.mark.parametrize("num_particles", [30, 400, 2500, 10_000])
def test_khat_equals_arviz_on_light_and_heavy_tails(num_particles):
    spread = torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0, 30.0, 200.0])
    log_weights = torch.randn(num_particles, 7) * spread - 1000.0
    assert pareto_khat(log_weights).numpy() == pytest.approx(arviz_khat(log_weights), abs=1e-8)


def test_khat_equals_arviz_where_weights_below_the_tail_are_tied():
    log_weights = torch.randn(200, 3)
    log_weights[:100, 1] = -5.0
    assert pareto_khat(log_weights).numpy() == pytest.approx(arviz_khat(log_weights), abs=1e-8)


def test_khat_does_not_depend_on_other_data_or_on_a_constant():
    log_weights = torch.randn(150, 300) * 2
    together = pareto_khat(log_weights)
    alone = torch.cat([pareto_khat(log_weights[:, n : n + 1] + n) for n in (0, 7, 299)])
    torch.testing.assert_close(together[[0, 7, 299]], alone, rtol=1e-9, atol=1e-9)


def test_khat_is_the_shape_of_a_pareto_tail():
    # Weights u^-k have a generalised Pareto tail of shape k; scatter at 4000 draws is about 0.2.
    uniform = torch.rand(4000, 50)
    for shape in (0.2, 0.9):
        mean = pareto_khat(-shape * uniform.log()).mean()
        assert abs(mean - shape) < 4 * 0.2 / math.sqrt(50)
        assert abs(mean - (1.1 - shape)) > 4 * 0.2 / math.sqrt(50)


def test_equal_weights_have_no_tail_and_few_draws_have_none_to_fit():
    assert pareto_khat(torch.full((100, 2), -3.0)).tolist() == [-math.inf] * 2
    assert pareto_khat(torch.randn(10, 2)).tolist() == [math.inf] * 2
    assert pareto_khat(torch.randn(1, 3)).tolist() == [math.inf] * 3


def test_a_tail_of_ties_is_bounded_and_rounding_in_it_is_no_shape():
    draws = torch.randint(3, (2000, 1))
    discrete = torch.tensor([0.1, 0.7, 1.2])[draws].log()
    truncated = torch.where(torch.rand(1000, 4) < 0.3, -math.inf, -20.0)
    assert pareto_khat(discrete).tolist() == [-math.inf]
    assert pareto_khat(truncated + 1e-14 * torch.randn(1000, 4)).tolist() == [-math.inf] * 4
    # A value that only three draws have tells nothing of what is above it.
    rare = discrete.clone()
    rare[:3] = 3.0
    assert pareto_khat(rare).tolist() == [math.inf]
    assert pareto_khat(discrete + 0.01 * torch.randn(2000, 1)).isfinite().all()


def test_infinite_and_missing_weights_are_said():
    log_weights = torch.randn(100, 4)
    log_weights[3, 0] = math.inf
    log_weights[3, 1] = math.nan
    log_weights[:, 2] = -math.inf
    khat = pareto_khat(log_weights)
    assert khat[0] == math.inf
    assert khat[1].isnan()
    assert khat[2].isnan()
    assert khat[3].isfinite()


def test_threshold_is_that_of_psis():
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(10_000) == 0.7
    assert khat_threshold(1000) == pytest.approx(2 / 3)


def arviz_smoothed(log_weights: torch.Tensor) -> np.ndarray:
    rows = log_weights.T.contiguous().numpy()
    try:
        stats = importlib.import_module("arviz_stats.base").array_stats
    except ImportError:
        return np.asarray(importlib.import_module("arviz").psislw(rows)[0]).T
    return np.asarray(stats.psislw(-rows)[0]).T


def test_smoothed_weights_equal_arviz():
    log_weights = torch.randn(400, 5) * torch.tensor([0.1, 1.0, 2.0, 5.0, 30.0]) - 1000.0
    smoothed = smoothed_log_weights(log_weights, pareto_tail(log_weights))
    expected = arviz_smoothed(log_weights)
    expected = expected - np.log(np.exp(expected).sum(0))  # ArviZ 1 leaves this to the caller
    assert smoothed.numpy() == pytest.approx(expected, abs=1e-8)
    raw = log_weights - log_weights.logsumexp(0)
    assert not torch.allclose(smoothed, raw, atol=1e-3)


def test_weights_without_a_tail_are_not_smoothed():
    log_weights = torch.zeros(100, 2)
    log_weights[:, 1] = -math.inf
    log_weights[:3, 1] = torch.tensor([0.0, 1.0, 2.0])
    smoothed = smoothed_log_weights(log_weights, pareto_tail(log_weights))
    assert torch.allclose(smoothed, log_weights - log_weights.logsumexp(0))


@pytest.mark.parametrize(("num_particles", "room"), [(400, 0.2), (1000, 0.15)])
def test_the_standard_error_is_the_scatter_over_replications(num_particles, room):
    # 500 replications tell a standard deviation to 3.2 % (one standard error).
    replications = 500
    noise = 3.3 / math.sqrt(2 * replications)  # failure rate 1e-3 a comparison
    for shape in (0.2, 0.7, 1.0):
        tail = pareto_tail(-shape * torch.rand(num_particles, replications).log())
        ratio = tail.khat_se.mean() / tail.khat.std()
        assert abs(float(ratio) - 1) < room + noise
    # A normal spread of log weights, as of a Gaussian guide that is off by one sd.
    tail = pareto_tail(torch.randn(num_particles, replications))
    assert abs(float(tail.khat_se.mean() / tail.khat.std()) - 1) < room + noise
    without_prior = (1 + tail.khat) / tail.size.double().sqrt()
    if num_particles == 400:  # the naive formula is too large, by the weight of the prior
        assert float(without_prior.mean() / tail.khat.std()) - 1 > 0.1


def test_the_standard_error_is_unknown_where_there_is_no_fit():
    log_weights = torch.zeros(100, 3)
    log_weights[0, 1] = math.inf
    log_weights[0, 2] = math.nan
    assert pareto_tail(log_weights).khat_se.isnan().all()
    few = pareto_tail(torch.randn(10, 2))
    assert few.khat_se.isnan().all()
    assert pareto_tail(torch.randn(1, 2)).khat_se.isnan().all()
