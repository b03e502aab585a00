"""Pareto k-hat and smoothing against ArviZ, and what they must and must not flag."""

import importlib
import math

import numpy as np
import pytest
import torch

from pyro_vae.inference.log_weights import (
    effective_sample_size,
    importance_bound,
    importance_bound_error,
    khat_threshold,
    pareto_khat,
    pareto_tail,
)
from pyro_vae.inference.log_weights.pareto import smoothed_log_weights


def arviz_khat(log_weights: torch.Tensor) -> np.ndarray:
    """ArviZ's own k-hat, wherever the installed major keeps it."""
    rows = log_weights.T.contiguous().numpy()
    try:
        stats = importlib.import_module("arviz_stats.base").array_stats
    except ImportError:
        with np.errstate(over="ignore"):  # in weights of its own that it then sets to 0
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


# --- errors of a log-mean-exp: replications against a known mean weight ---------------------------


def normal(sd):
    """Log weights N(0, sd^2), and the log of their mean."""
    return lambda *shape: sd * torch.randn(shape), sd**2 / 2


def bounded(sd, shape):
    """Minus a gamma of this shape and sd: weights of at most 1."""
    scale = sd / shape**0.5
    gamma = torch.distributions.Gamma(shape, 1 / scale)
    return lambda *size: -gamma.sample(size), -shape * math.log1p(scale)


def pareto(sd, k):
    """A gamma of scale k and this sd: weights whose tail has the Pareto shape k."""
    gamma = torch.distributions.Gamma((sd / k) ** 2, 1 / k)
    return lambda *size: gamma.sample(size), -((sd / k) ** 2) * math.log1p(-k)


def delta_method(log_weights):
    return (1 / effective_sample_size(log_weights) - 1 / len(log_weights)).sqrt()


REPLICATIONS = 1200


def coverage_of(draw, truth, count, *, fitted):
    """How often 1.96 errors hold the truth: by the delta method, and now; and the last errors."""
    log_weights = draw(count, REPLICATIONS)
    error = importance_bound_error(log_weights, pareto_tail(log_weights) if fitted else None)
    missed = (importance_bound(log_weights) - truth).abs()
    both = (delta_method(log_weights), error.se)
    covered = [float((missed <= 1.96 * se).double().mean()) for se in both]
    return *covered, error, missed > 1.96 * error.se


# Of 1200 replications a coverage of 0.9 is known to 0.9 %; three of that is the room (rate 1e-3).
NOISE = 0.027


@pytest.mark.parametrize(
    ("weights", "count", "least", "most_by_delta"),
    [
        (normal(0.5), 4, 0.93, 0.88),  # Student's factor counts: 0.88 hold without it
        (normal(0.5), 8, 0.93, 0.9),
        (normal(1.0), 16, 0.92, 0.88),
        (normal(2.0), 16, 0.88, 0.68),  # what annealing is run with, and often gives
        (normal(3.0), 16, 0.86, 0.38),
        (normal(2.0), 64, 0.93, 0.79),
        (bounded(2.0, 1.0), 16, 0.95, 0.95),
        (bounded(2.0, 4.0), 64, 0.95, 0.95),
        (pareto(1.0, 0.3), 64, 0.90, 0.87),
    ],
)
def test_two_errors_of_few_heavy_weights_hold_the_truth(weights, count, least, most_by_delta):
    by_delta, covered, error, _ = coverage_of(*weights, count, fitted=False)
    assert covered > least - NOISE
    assert by_delta < most_by_delta + NOISE
    assert float(error.se.median()) < 3.5  # nats: no error is right by being endless


@pytest.mark.parametrize(
    ("weights", "least", "most_by_delta"),
    [
        (normal(1.0), 0.95, 0.95),
        (normal(2.0), 0.95, 0.88),
        (pareto(0.5, 0.6), 0.94, 0.86),
        (pareto(1.0, 0.6), 0.92, 0.77),
    ],
)
def test_with_a_fitted_tail_two_errors_hold_where_weights_are_heavier(
    weights, least, most_by_delta
):
    by_delta, covered, _, _ = coverage_of(*weights, 1000, fitted=True)
    assert covered > least - NOISE
    assert by_delta < most_by_delta + NOISE


def test_the_flag_speaks_where_the_error_does_not_hold():
    """Of annealed weights with an sd of 1.5, ESS < K/4 let 73 % pass, 20 % of all wrongly."""
    _, _, error, missed = coverage_of(*normal(1.5), 16, fitted=False)
    assert float((missed & error.reliable).double().mean()) < 0.1
    assert float(error.reliable.double().mean()) < 0.4
    assert float(importance_bound_error(3 * torch.randn(16, 500)).reliable.double().mean()) < 0.03
    light = importance_bound_error(0.2 * torch.randn(16, 500))
    assert light.reliable.all()


def test_khat_counts_with_its_own_error():
    """Neal's funnel in ten dimensions: evidence 1, and a normal guide that never sees its neck."""
    log_weights = funnel_weights(1000, 200)
    tail = pareto_tail(log_weights)
    error = importance_bound_error(log_weights, tail)
    missed = importance_bound(log_weights).abs()
    by_khat = tail.khat <= khat_threshold(1000)
    wrong_before = (missed > 1.96 * delta_method(log_weights)) & by_khat
    wrong = (missed > 1.96 * error.se) & error.reliable
    assert float(wrong_before.double().mean()) > 0.15
    assert float(wrong.double().mean()) < 0.08 + 4.5 * 0.02
    assert not bool((error.reliable & ~by_khat).any())


def funnel_weights(count, replications, dim=10):
    """Log weights, of mean 1, of v ~ N(0, 1), y_i ~ N(0, e^v) and the normal nearest to it."""
    variance = 1 / (1 + dim / 2)  # of v under the guide, whose y_i are N(0, e^(-variance / 2))
    v = variance**0.5 * torch.randn(count, replications)
    squares = torch.distributions.Chi2(torch.tensor(float(dim))).sample((count, replications))
    y = math.exp(-variance / 2) * squares
    joint = -(v**2) / 2 - dim * v / 2 - y * (-v).exp() / 2
    guide = -(v**2) / variance / 2 - squares / 2 - (math.log(variance) - dim * variance / 2) / 2
    return joint - guide


def test_the_estimated_bias_is_that_of_replications():
    # Noise averages out over data, bias does not, so it is what the error of a mean is made of.
    cases = ((normal(1.0), 16), (normal(1.0), 64), (normal(2.0), 1000), (bounded(1.0, 1.0), 16))
    for weights, count in cases:
        draw, truth = weights
        log_weights = draw(count, REPLICATIONS)
        bias = importance_bound(log_weights) - truth
        estimate = importance_bound_error(log_weights).bias
        noise = float((bias - estimate).std()) / REPLICATIONS**0.5
        assert abs(float((bias - estimate).mean())) < 4.5 * noise + 0.035


def test_errors_of_equal_weights_of_one_and_of_impossible_ones():
    equal = importance_bound_error(torch.full((5, 2), -7.0))
    assert equal.se.tolist() == pytest.approx([0.0, 0.0], abs=1e-7)
    assert equal.reliable.all()
    one = importance_bound_error(torch.zeros(1, 2))
    assert one.se.isnan().all()
    assert not one.reliable.any()
    log_weights = torch.zeros(200, 4)
    log_weights[:50, 0] = -math.inf  # a quarter of the draws are impossible: binomial
    log_weights[:, 1] = -math.inf
    log_weights[1:, 2] = -math.inf
    log_weights[0, 3] = math.inf
    found = importance_bound_error(log_weights, pareto_tail(log_weights))
    assert float(found.se[0]) == pytest.approx((0.25 / 0.75 / 200) ** 0.5, rel=0.02)
    assert found.se[1:].isnan().all()
    assert found.reliable.tolist() == [True, False, False, False]
