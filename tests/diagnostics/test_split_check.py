"""Split predictive checks: uniform under the right model, where classical p-values are not."""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_vae import predictive_check, split_check

SETS = 40  # data sets
RNG = np.random.default_rng(5)


def model(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def posterior(x: Tensor) -> Any:
    precision = 1 / 9 + len(x)

    def guide(_: Tensor) -> None:
        pyro.sample("mu", dist.Normal(x.sum() / precision, precision**-0.5))

    return guide


def check(x: np.ndarray, seed: int = 0, **settings: Any) -> Any:
    data = torch.tensor(x)
    return split_check(
        model, posterior(data), data, refit=lambda part: (model, posterior(part)), num_draws=59,
        seed=seed, statistics={"mean": torch.mean, "sd": torch.std}, **settings,
    )  # fmt: skip


def test_p_values_are_uniform_where_classical_ones_crowd() -> None:
    """Kolmogorov-Smirnov at 1e-4 for each of two statistics: it fails at a rate of 2e-4."""
    found = [
        check(RNG.normal(RNG.normal(0.0, 3.0), 1.0, 24), seed).p_value.values
        for seed in range(SETS)
    ]
    split, classical = np.moveaxis(np.array(found), 1, 0)
    for column in split.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    # The mean of replicates is the posterior's, so the data's own mean is in the middle.
    assert (classical[:, 0] > 0.3).all()
    assert stats.kstest(classical[:, 0], "uniform").pvalue < 1e-10


def test_a_wrong_model_is_found_by_both() -> None:
    """Data of thrice the scale: their sd is 12 +- 3 sds of a replicate's of 20 data away."""
    found = check(RNG.normal(1.0, 3.0, 40)).sel(statistic="sd")
    assert float(found.p_value.sel(kind="split")) == pytest.approx(1 / 30)  # the least of 59 draws
    assert float(found.discrepancy.sel(kind="split")) > 4
    assert found.replicated.shape == (2, 59)
    assert found.kind.values.tolist() == ["split", "posterior"]


def test_a_drift_is_found_by_data_held_out_alone() -> None:
    """The mean moved between the parts; each part has the model's own spread."""
    old, new = (torch.tensor(RNG.normal(loc, 1.0, 30)) for loc in (0.0, 1.5))
    found = predictive_check(
        model, posterior(old), old, test=new, statistics={"mean": torch.mean}, seed=0
    )
    assert found.kind.values.tolist() == ["held_out"]
    assert found.p_value.item() < 0.02
    expected = 1.5 / np.sqrt(1 / 30 + 1 / 30)
    assert found.discrepancy.item() == pytest.approx(expected, abs=3)
    assert found.observed.item() == pytest.approx(float(new.mean()))
    assert "likelihood_p_value" not in found
    assert "held-out predictive does not reproduce mean" in str(found)
    same = predictive_check(
        model, posterior(old), old, test=old[:7], statistics={"mean": torch.mean}, seed=0
    )
    assert same.p_value.item() > 0.02


def test_latents_of_new_data_come_from_their_prior() -> None:
    """Without global latents, and with a plate of another size: x ~ N(3, 2)."""

    def local(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(3.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def alone(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + 3.0) / 2, 0.5**0.5))

    train = torch.tensor(RNG.normal(3.0, 2**0.5, 9))
    test = torch.full((400,), 8.0, dtype=torch.float64)
    found = predictive_check(
        local, alone, train, test=test, statistics={"mean": torch.mean}, num_draws=400, seed=0
    )
    assert float(found.replicated.mean()) == pytest.approx(3.0, abs=4.5 * (2 / 400 / 400) ** 0.5)
    assert float(found.replicated.std()) == pytest.approx((2 / 400) ** 0.5, rel=0.18)
    whole = split_check(local, alone, train, refit=lambda _: (local, alone), num_draws=20)
    assert whole.sizes["kind"] == 2


def test_what_cannot_be_split_is_refused() -> None:
    x = torch.zeros(5, dtype=torch.float64)
    with pytest.raises(ValueError, match="share is between 0 and 1"):
        split_check(model, posterior(x), x, share=1.5)
    with pytest.raises(ValueError, match="leaves no part of 5 data"):
        split_check(model, posterior(x), x, share=0.01)
    with pytest.raises(ValueError, match="test is for posterior predictive checks"):
        predictive_check(model, posterior(x), x, test=x, kind="both")
