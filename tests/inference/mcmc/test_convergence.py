"""Split R-hat and bulk ESS against ArviZ, whichever major version is installed."""

from importlib.metadata import version

import numpy as np
import pytest
import torch

from pyro_vae.inference.mcmc import bulk_ess
from pyro_vae.inference.mcmc.convergence import split_rhat


def arviz_of(draws):
    """R-hat and bulk ESS of one quantity, `[chains, draws]`, as ArviZ has them."""
    if int(version("arviz").split(".")[0]) < 1:
        import arviz

        return arviz.rhat(draws), arviz.ess(draws, method="bulk")
    from arviz_stats.base import array_stats

    return array_stats.rhat(draws), array_stats.ess(draws, method="bulk")


def autoregressive(correlation, chains, length, quantities):
    x = torch.randn(chains, length, quantities)
    for t in range(1, length):
        x[:, t] = correlation * x[:, t - 1] + (1 - correlation**2) ** 0.5 * x[:, t]
    return x


@pytest.mark.parametrize("correlation", [-0.8, -0.3, 0.0, 0.5, 0.95, 0.995])
@pytest.mark.parametrize(
    ("chains", "length"), [(4, 100), (2, 37), (4, 8), (3, 11), (4, 5), (2, 500)]
)
def test_equal_to_arviz(correlation, chains, length):
    draws = autoregressive(correlation, chains, length, 3)
    draws[0] += 0.3
    rhat, ess = split_rhat(draws), bulk_ess(draws)
    for i in range(3):
        expected = arviz_of(draws[..., i].numpy())
        np.testing.assert_allclose([rhat[i], ess[i]], expected, rtol=1e-8)


def test_ties_have_average_ranks():
    draws = torch.randint(0, 4, (3, 40)).double()
    np.testing.assert_allclose(
        [split_rhat(draws), bulk_ess(draws)], arviz_of(draws.numpy()), rtol=1e-8
    )


def test_chains_that_differ_are_seen_and_chains_that_agree_pass():
    mixed = torch.randn(4, 500, 2)
    assert (split_rhat(mixed) < 1.02).all()
    apart = mixed.clone()
    apart[0, :, 0] += 3
    assert split_rhat(apart)[0] > 1.2
    scaled = mixed.clone()
    scaled[0, :, 1] *= 4  # the same mean: only the folded part sees it
    assert split_rhat(scaled)[1] > 1.1
    assert (bulk_ess(mixed) > 1500).all()
    assert bulk_ess(apart)[0] < 50


def test_chains_that_never_move_have_an_answer_all_the_same():
    still = torch.ones(3, 10, 2)
    assert split_rhat(still).tolist() == [1.0, 1.0]
    still[0, :, 1] = 2.0
    assert split_rhat(still)[0] == 1.0
    assert split_rhat(still)[1] == float("inf")
    assert bulk_ess(still).isfinite().all()


def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match="at least 4 draws"):
        split_rhat(torch.randn(2, 3))
