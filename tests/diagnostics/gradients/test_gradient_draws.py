"""Single gradients and learning curves against closed forms."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from pyro_vae import LinearGaussian, fit
from pyro_vae.diagnostics.gradients import gradient_draws, learning_curves
from pyro_vae.inference.em import MonteCarloEM
from pyro_vae.inference.estimators import PathwiseELBO, WakeSleep

MU, SIGMA = 1.5, 0.7
DRAWS, MANY = 100, 40  # gradients, and particles of which one is a mean
ERRORS, CHANCE = 5.0, 1e-6  # each number fails by chance once in 5e5, the test once in 7e4


def model(x: Tensor) -> None:
    """Log p(x, z) is -z^2 and a constant at x = 0."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([9.0, MU]))[1]
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(mu, SIGMA))


def closed_form() -> dict[str, tuple[float, float]]:
    """Mean and variance of d/dmu E[-z^2] by both estimators, from the moments of a normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)  # exact for these polynomials
    weights = weights / weights.sum()
    z = MU + SIGMA * nodes
    log_weight = -(z**2) - math.log(2 * math.pi) + nodes**2 / 2 + math.log(SIGMA)
    log_weight = log_weight + 0.5 * math.log(2 * math.pi)
    single = {"PathwiseELBO": -2 * z, "ScoreFunction": log_weight * nodes / SIGMA}
    return {
        name: (float(weights @ g), float(weights @ g**2 - (weights @ g) ** 2))
        for name, g in single.items()
    }


def test_reparameterised_and_score_gradients_have_the_moments_of_the_textbook() -> None:
    exact = closed_form()
    assert exact["PathwiseELBO"] == pytest.approx((-2 * MU, 4 * SIGMA**2))
    assert exact["ScoreFunction"][0] == pytest.approx(-2 * MU)
    assert exact["ScoreFunction"][1] > 10 * exact["PathwiseELBO"][1]
    names = [*exact, "LeaveOneOut"]
    result = gradient_draws(
        model, guide, torch.zeros(1), names, (1, MANY), parameter="mu", entry=1, num_draws=DRAWS
    )
    # With MANY particles both are nearly normal, so that sums of squares are chi-squared.
    low, high = (chi2.ppf(p, DRAWS - 1) / (DRAWS - 1) for p in (CHANCE, 1 - CHANCE))
    for name, (mean, variance) in exact.items():
        row = result.sel(estimator=name, num_particles=MANY)
        assert abs(row["mean"] - mean) < ERRORS * math.sqrt(variance / MANY / DRAWS)
        assert low < row["variance"] * MANY / variance < high
        assert row["mean"].item() == pytest.approx(row["gradient"].values.mean())
        squares = row["variance"].item() * math.sqrt(2 / (DRAWS - 1))
        assert row["variance_se"].item() == pytest.approx(squares, rel=0.5)
    path = result.sel(estimator="PathwiseELBO", num_particles=1)
    assert low < path["variance"] / exact["PathwiseELBO"][1] < high
    assert path["variance"] / exact["ScoreFunction"][1] < low  # another estimator's is refused
    assert bool(result["gradient"].sel(estimator="LeaveOneOut", num_particles=1).isnull().all())
    assert bool(result["gradient"].sel(estimator="LeaveOneOut", num_particles=MANY).notnull().all())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"parameter": "mu", "entry": 2}, "entry must lie between 0 and 1"),
        ({"parameter": "nu"}, "no parameter matches 'nu'; there are mu"),
        ({"parameter": "mu", "num_draws": 7}, "num_draws must be an integer from 8"),
    ],
)
def test_what_is_no_number_of_the_programs_is_refused(settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        gradient_draws(model, guide, torch.zeros(1), **settings)


class WithExactGuide:
    """The bound is log p(x) at every draw."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.linear = LinearGaussian(data_dim=3, latent_dim=2)
        self.model, self.guide = self.linear.model, self.linear.exact_guide


def test_curves_are_the_evidence_of_one_training_stopped_on_its_way() -> None:
    x, test = 2 + torch.randn(20, 3), torch.randn(7, 3)
    options = {"batch_size": 10, "learning_rate": 0.05, "seed": 3, "progress": False}
    found = learning_curves(
        {"two": WithExactGuide},
        x,
        test,
        {"AEVB": PathwiseELBO()},
        epochs=(1, 3),
        max_train=5,
        **options,
    )
    assert found.samples.values.tolist() == [20, 60]
    straight = WithExactGuide(3)
    fit(
        straight.model,
        straight.guide,
        x,
        loss=PathwiseELBO(),
        epochs=3,
        evaluate_every=3,
        **options,
    )
    row = found.sel(model="two", algorithm="AEVB", samples=60)
    for split, data in (("train", x[:5]), ("test", test)):
        exact = float(straight.linear.log_evidence(data).mean().detach())
        for name in ("elbo", "log_evidence"):
            assert float(row[name].sel(split=split)) == pytest.approx(exact, abs=1e-9)
            before = found[name].sel(model="two", algorithm="AEVB", samples=20, split=split)
            assert abs(float(before) - exact) > 1e-3
    with pytest.raises(ValueError, match="rising whole numbers"):
        learning_curves({}, x, test, {}, epochs=(3, 1))


def test_evidence_without_a_guide_is_had_for_monte_carlo_em() -> None:
    x = 2 + torch.randn(12, 3)
    found = learning_curves(
        {"two": WithExactGuide},
        x,
        x[:4],
        {"MCEM": MonteCarloEM(num_steps=3, num_leapfrog=3), "wake-sleep": WakeSleep()},
        epochs=(1, 12),
        evidence={"method": "exact"},
        learning_rate=0.1,
        progress=False,
    )
    assert "elbo" not in found
    rise = found.log_evidence.sel(split="train").values[0]
    assert (rise[:, 1] > rise[:, 0] + 0.5).all()
    assert abs(rise[0] - rise[1])[1] > 1e-4  # each has its own training
