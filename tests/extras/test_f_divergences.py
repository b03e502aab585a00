"""The table of f-divergences against its definitions, by quadrature and numerical suprema."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from pyro_vae.extras.f_divergence.divergences import F_DIVERGENCES, divergence_bound, get_divergence

STANDARD_ERRORS = 5  # a two-sided failure rate of 6e-7 a number
GRID = torch.linspace(-14, 14, 20_001, dtype=torch.float64)
# P = N(0, 1) and Q = N(0.7, 1.2^2), for which the integral of p^2 / q is finite.
LOC, SCALE = 0.7, 1.2


def log_normal(x, loc, scale):
    return -0.5 * ((x - loc) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


LOG_P, LOG_Q = log_normal(GRID, 0, 1), log_normal(GRID, LOC, SCALE)


def integral(values):
    return float(torch.trapezoid(values, GRID))


def closed_forms():
    """Of the two normals above; Jensen-Shannon by quadrature of its definition."""
    var = SCALE**2
    middle = torch.logaddexp(LOG_P, LOG_Q) - math.log(2)
    shannon = integral(LOG_P.exp() * (LOG_P - middle)) + integral(LOG_Q.exp() * (LOG_Q - middle))

    # The integral of p^2 / q, a Gaussian integral with 2 var - 1 in place of a variance.
    square = var / math.sqrt(2 * var - 1) * math.exp(LOC**2 / (2 * var - 1))
    affinity = math.sqrt(2 * SCALE / (1 + var)) * math.exp(-(LOC**2) / (4 * (1 + var)))
    return {
        "kl": math.log(SCALE) + (1 + LOC**2) / (2 * var) - 0.5,
        "reverse_kl": -math.log(SCALE) + (var + LOC**2) / 2 - 0.5,
        "pearson_chi2": square - 1,
        "squared_hellinger": 2 - 2 * affinity,
        "jensen_shannon": shannon,
        "gan": shannon - math.log(4),
    }


def test_every_row_has_an_oracle():
    assert closed_forms().keys() == F_DIVERGENCES.keys()
    assert all(name == row.name for name, row in F_DIVERGENCES.items())


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_f_gives_the_divergence(name):
    row, wanted = F_DIVERGENCES[name], closed_forms()[name]
    found = integral(LOG_Q.exp() * row.f((LOG_P - LOG_Q).exp()))
    assert found == pytest.approx(wanted, abs=1e-9)
    turned = integral(LOG_P.exp() * row.f((LOG_Q - LOG_P).exp()))
    symmetric = name in ("squared_hellinger", "jensen_shannon", "gan")
    assert (abs(turned - wanted) < 1e-9) == symmetric


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_f_is_convex_and_has_the_stated_value_at_equal_laws_and_at_most(name):
    row = F_DIVERGENCES[name]
    u = torch.logspace(-3, 3, 500)
    middle = row.f((u[1:] + u[:-1]) / 2)
    assert (middle < (row.f(u[1:]) + row.f(u[:-1])) / 2).all()
    assert float(row.f(torch.ones(()))) == pytest.approx(-math.log(4) if name == "gan" else 0)
    # D_f of disjoint laws is f(0) + lim f(u) / u.
    ends = [float(row.f(torch.tensor(1e-12))), float(row.f(torch.tensor(1e12))) / 1e12]
    if math.isinf(row.maximum):
        assert max(ends) > 20
    else:
        assert sum(ends) == pytest.approx(row.maximum, abs=1e-5)


@pytest.mark.parametrize("name", F_DIVERGENCES)
@pytest.mark.parametrize("v", [-1.7, -0.4, 0.3, 1.1])
def test_the_conjugate_is_the_supremum(name, v):
    row = F_DIVERGENCES[name]
    t = float(row.activation(torch.tensor(v)))

    def below(log_u):
        u = torch.tensor(math.exp(log_u))
        return float(row.f(u) - t * u)

    found = minimize_scalar(below, bounds=(-30, 10), method="bounded", options={"xatol": 1e-10})
    assert float(row.conjugate(torch.tensor(t))) == pytest.approx(-found.fun, abs=1e-8)


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_the_penalty_is_the_conjugate_of_the_activation_and_outlives_it(name):
    row = F_DIVERGENCES[name]
    v = torch.linspace(-6, 6, 99)
    torch.testing.assert_close(row.penalty(v), row.conjugate(row.activation(v)))
    assert (row.activation(v).diff() > 0).all()
    far = torch.tensor([-80.0, 80.0])
    assert row.penalty(far).isfinite().all()
    assert row.activation(far).isfinite().all()


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_the_optimal_critic_is_the_slope_of_f_and_attains_the_divergence(name):
    row, wanted = F_DIVERGENCES[name], closed_forms()[name]
    log_ratio = torch.linspace(-2, 2, 41, requires_grad=True)
    ratio = log_ratio.exp()
    (slope,) = torch.autograd.grad(row.f(ratio).sum(), ratio)
    torch.testing.assert_close(row.activation(row.optimal_critic(log_ratio)), slope)

    def attained(critic):
        on_data, on_samples = row.activation(critic), row.penalty(critic)
        # Where a density is 0 to the last digit, the other's critic may be infinite.
        return integral((LOG_P.exp() * on_data).nan_to_num(posinf=0, neginf=0)) - integral(
            (LOG_Q.exp() * on_samples).nan_to_num(posinf=0, neginf=0)
        )

    best = row.optimal_critic(LOG_P - LOG_Q)
    assert attained(best) == pytest.approx(wanted, abs=1e-9)
    assert attained(best + 0.1) < wanted - 1e-4
    assert attained(best * 0.8) < wanted - 1e-4


def quantiles(loc, scale, num):
    """Points that stand for the law: sums over them are a quadrature."""
    return torch.distributions.Normal(loc, scale).icdf((torch.arange(num) + 0.5) / num)[:, None]


class Quadratic(nn.Module):
    """The best critic of two normals is one wherever it is a multiple of log p / q."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x):
        return self.linear(torch.cat([x, x.square()], -1))


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_a_trained_critic_comes_near_the_divergence_and_never_exceeds_it(name):
    row, wanted = F_DIVERGENCES[name], closed_forms()[name]
    perceptron = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1))
    critic = perceptron if name == "pearson_chi2" else Quadratic()
    x, y = quantiles(0.0, 1.0, 2000), quantiles(LOC, SCALE, 2000)
    optimizer = torch.optim.LBFGS(critic.parameters(), max_iter=80, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -divergence_bound(name, critic(x), critic(y))
        value.backward()
        return value

    def expected():
        """The expectation of the bound, by a quadrature that training did not see."""
        with torch.no_grad():
            v = critic(GRID[:, None])[:, 0]
        return integral(LOG_P.exp() * row.activation(v)) - integral(LOG_Q.exp() * row.penalty(v))

    before = expected()
    optimizer.step(loss)
    assert before < wanted - 0.02
    assert wanted - 1e-3 < expected() < wanted  # seen: 5e-4 or less


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_the_estimate_is_unbiased_for_a_critic_that_saw_nothing(name):
    row = F_DIVERGENCES[name]

    def critic(x):
        return 0.5 * torch.cos(x) - 0.3 * x

    v = critic(GRID)
    wanted = integral(LOG_P.exp() * row.activation(v)) - integral(LOG_Q.exp() * row.penalty(v))
    x, y = torch.randn(500, 60), LOC + SCALE * torch.randn(500, 40)
    found = [float(divergence_bound(name, critic(a), critic(b))) for a, b in zip(x, y, strict=True)]
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - wanted) < STANDARD_ERRORS * error
    assert abs(np.mean(found) - wanted - 0.2) > STANDARD_ERRORS * error
    assert np.mean(found) - STANDARD_ERRORS * error < closed_forms()[name]


def test_unknown_divergences_are_refused():
    with pytest.raises(ValueError, match="squared_hellinger"):
        get_divergence("hellinger")
    with pytest.raises(ValueError, match="jensen_shannon"):
        divergence_bound("wasserstein", torch.zeros(2), torch.zeros(3))
