"""Regressions: with a hierarchy of groups, of binary responses, of counts with random effects."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_vae.models.statistics.entry import Example, Simulated, make_global_guide

__all__ = ["HIERARCHICAL", "LOGISTIC", "POISSON"]


# --- hierarchical regression ----------------------------------------------------------------------

NUM_GROUPS = 12


def hierarchical_regression(
    group: Int[Tensor, " batch"], predictor: Float[Tensor, " batch"], y: Float[Tensor, " batch"]
) -> None:
    """One slope, and an intercept for each group, drawn from a population of intercepts."""
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    spread = pyro.sample("spread", dist.HalfNormal(2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    noise = pyro.sample("noise", dist.HalfNormal(2.0))
    with pyro.plate("groups", NUM_GROUPS):
        intercept = pyro.sample("intercept", dist.Normal(mean, spread))
    with pyro.plate("data", len(y)):
        loc = intercept[..., group] + slope * predictor
        pyro.sample("y", dist.Normal(loc, noise), obs=y)


def pooled_regression(
    group: Int[Tensor, " batch"],
    predictor: Float[Tensor, " batch"],
    y: Float[Tensor, " batch"],
) -> None:
    """One intercept for all groups."""
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    noise = pyro.sample("noise", dist.HalfNormal(2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean + slope * predictor, noise), obs=y)


def simulate_hierarchical(seed: int) -> Simulated:
    """240 data in 12 groups of unequal sizes."""
    random = torch.Generator().manual_seed(seed)
    mean, spread, slope, noise = map(torch.tensor, (1.0, 0.8, -0.5, 0.6))
    intercept = mean + spread * torch.randn(NUM_GROUPS, generator=random)
    shares = torch.arange(1.0, 1.0 + NUM_GROUPS)
    group = torch.multinomial(shares, 240, replacement=True, generator=random)
    predictor = torch.randn(240, generator=random)
    y = intercept[group] + slope * predictor + noise * torch.randn(240, generator=random)
    truth = {"mean": mean, "spread": spread, "slope": slope, "noise": noise, "intercept": intercept}
    return Simulated((group, predictor, y), truth)


HIERARCHICAL = Example(
    title="hierarchical regression",
    model=hierarchical_regression,
    simulate=simulate_hierarchical,
    make_guide=lambda: make_global_guide(hierarchical_regression),
    simpler=pooled_regression,
    make_simpler_guide=lambda: make_global_guide(pooled_regression),
    lacks="groups",
    batch_size=60,
)


# --- logistic regression --------------------------------------------------------------------------

NUM_PREDICTORS = 4


def logistic_regression(
    predictors: Float[Tensor, "batch predictors"], y: Float[Tensor, " batch"]
) -> None:
    """Success or failure, by an intercept and a coefficient for each predictor."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.5))
    coefficients = pyro.sample(
        "coefficients", dist.Normal(torch.zeros(NUM_PREDICTORS), 2.5).to_event(1)
    )
    with pyro.plate("data", len(y)):
        logits = intercept + (coefficients * predictors).sum(-1)
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def constant_probability(
    predictors: Float[Tensor, "batch predictors"],
    y: Float[Tensor, " batch"],
) -> None:
    """The same probability for all."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=intercept), obs=y)


def simulate_logistic(seed: int) -> Simulated:
    """400 data with two correlated predictors out of four."""
    random = torch.Generator().manual_seed(seed)
    intercept, coefficients = torch.tensor(-0.5), torch.tensor([1.0, -0.7, 0.0, 0.4])
    predictors = torch.randn(400, NUM_PREDICTORS, generator=random)
    predictors[:, 1] = 0.8 * predictors[:, 0] + 0.6 * predictors[:, 1]
    probability = (intercept + predictors @ coefficients).sigmoid()
    y = torch.bernoulli(probability, generator=random)
    return Simulated((predictors, y), {"intercept": intercept, "coefficients": coefficients})


LOGISTIC = Example(
    title="logistic regression",
    model=logistic_regression,
    simulate=simulate_logistic,
    make_guide=lambda: make_global_guide(logistic_regression),
    simpler=constant_probability,
    make_simpler_guide=lambda: make_global_guide(constant_probability),
    lacks="predictors",
    batch_size=100,
)


# --- Poisson random effects -----------------------------------------------------------------------


def poisson_effects(counts: Float[Tensor, "batch visits"]) -> None:
    """Counts of several visits to each site, whose log rates are drawn from a population."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("data", len(counts)):
        log_rate = pyro.sample("log_rate", dist.Normal(mean, spread))
        rates = log_rate.exp()[..., None].expand(*log_rate.shape, counts.shape[-1])
        pyro.sample("counts", dist.Poisson(rates).to_event(1), obs=counts)


def make_poisson_guide() -> Callable[..., Any]:
    """A normal over the population, and for each site the normal of highest ELBO given it."""
    population = make_global_guide(poisson_effects, "log_rate", "counts")

    def guide(counts: Float[Tensor, "batch visits"]) -> None:
        drawn = population(counts)
        total, visits = counts.sum(-1), counts.shape[-1]
        mean, precision = drawn["mean"], drawn["spread"] ** -2
        seen = total + 0.5  # the precision of a log rate by its counts alone
        variance = 1 / (precision + seen)
        loc = (mean * precision + (seen / visits).log() * seen) * variance
        for _ in range(6):  # Newton's method, from close by
            rate = visits * (loc + variance / 2).exp()  # its mean under the normal
            variance = 1 / (rate + precision)
            loc = loc + (total - rate - (loc - mean) * precision) * variance
        with pyro.plate("data", len(counts)):
            pyro.sample("log_rate", dist.Normal(loc, variance.sqrt()))

    return guide


def one_poisson_rate(counts: Float[Tensor, "batch visits"]) -> None:
    """The same rate for all sites."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(counts)):
        rates = mean.exp()[..., None].expand(*mean.shape, counts.shape[-1])
        pyro.sample("counts", dist.Poisson(rates).to_event(1), obs=counts)


def simulate_poisson(seed: int) -> Simulated:
    """50 sites, three visits each."""
    random = torch.Generator().manual_seed(seed)
    mean, spread = torch.tensor(0.7), torch.tensor(0.6)
    log_rate = mean + spread * torch.randn(50, generator=random)
    counts = torch.poisson(log_rate.exp()[:, None].expand(50, 3), generator=random)
    return Simulated(counts, {"mean": mean, "spread": spread})


POISSON = Example(
    title="Poisson random effects",
    model=poisson_effects,
    simulate=simulate_poisson,
    make_guide=make_poisson_guide,
    simpler=one_poisson_rate,
    make_simpler_guide=lambda: make_global_guide(one_poisson_rate),
    lacks="random effects",
    batch_size=25,
)
