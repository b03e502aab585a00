"""One object for a pair, data in any form, and values that are not finite, in every tool."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.utils.data import TensorDataset

from pyro_vae import (
    VAE,
    Autoencoder,
    GaussianMixture,
    LinearGaussian,
    calibrate,
    compare_estimators,
    draw_posterior,
    elbo_gap,
    fit,
    fit_em,
    log_evidence,
    log_weights,
    posterior_quality,
    predictive_check,
    sample_posterior,
)
from pyro_vae.inference.predictive import draw_prior
from pyro_vae.inference.programs import ProgramError
from pyro_vae.inference.refit import refit_guide

ROWS = np.random.default_rng(0).normal(size=(20, 3))


@pytest.fixture
def pair():
    return LinearGaussian(3, 2)


TOOLS = {
    "fit": lambda *a, **k: fit(*a, epochs=1, progress=False, **k),
    "log_weights": lambda *a, **k: log_weights(*a, 4, seed=0),
    "log_evidence": lambda *a, **k: log_evidence(*a, num_particles=4, progress=False, **k),
    "elbo_gap": lambda *a, **k: elbo_gap(*a, num_particles=4, max_steps=2, progress=False),
    "posterior_quality": lambda *a, **k: posterior_quality(*a, num_particles=20, progress=False),
    "compare_estimators": lambda *a, **k: compare_estimators(
        *a, ["PathwiseELBO"], num_particles=[1], repeats=3, progress=False
    ),
    "draw_posterior": lambda *a, **k: draw_posterior(*a, num_draws=3),
    "predictive_check": lambda *a, **k: predictive_check(*a, num_draws=5),
    "refit_guide": lambda *a, **k: refit_guide(*a, max_steps=2, progress=False),
    "calibrate": lambda *a, **k: calibrate(*a, num_simulations=20, num_draws=9, progress=False),
}


@pytest.mark.parametrize("name", TOOLS)
def test_values_that_are_not_finite_are_refused(pair, name):
    x = torch.from_numpy(ROWS).clone()
    x[17, 1], x[18, 0] = np.nan, np.inf
    says = r"site 'x' observes 2 values .* \(1 NaN, 1 infinite\), the first at \[17, 1\]: remove"
    with pytest.raises(ProgramError, match=says):
        TOOLS[name](pair, x)


def test_one_object_is_its_two_programs(pair):
    x = torch.from_numpy(ROWS)
    split = log_weights(pair.model, pair.guide, x, 5, seed=3)
    assert torch.equal(log_weights(pair, x, 5, seed=3), split)
    assert torch.equal(log_weights(pair, x=x, num_particles=5, seed=3), split)
    assert torch.equal(
        log_weights(model=pair.model, guide=pair.guide, x=x, num_particles=5, seed=3), split
    )
    reached = fit(pair, ROWS, epochs=1, progress=False)  # which is a pair itself
    apart = log_evidence(reached.model, reached.guide, ROWS, num_particles=5)
    assert apart.log_evidence.equals(log_evidence(reached, ROWS, num_particles=5).log_evidence)
    # The exact guide makes every weight the evidence.
    exact = log_weights(pair.model, pair.exact_guide, ROWS, seed=1)[0]
    assert torch.allclose(exact, pair.log_evidence(x), atol=1e-10)
    assert len(draw_prior(pair, ROWS, num_draws=2, seed=0).values["x"]) == 2


def test_a_chain_takes_the_pair_with_its_guide(pair):
    settings = {"num_chains": 1, "num_warmup": 5, "num_samples": 4, "progress": False}
    one = sample_posterior(pair, ROWS, **settings)
    two = sample_posterior(pair.model, torch.from_numpy(ROWS), guide=pair.guide, **settings)
    assert torch.equal(one.draws["z"], two.draws["z"])


def test_what_is_no_pair_is_refused(pair):
    with pytest.raises(TypeError, match="method has neither, and a Tensor is no guide"):
        log_weights(pair.model, torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"missing .*required .*argument: 'x'"):
        log_weights(pair)


@pytest.mark.parametrize(
    "form",
    [ROWS.astype(np.float32), pd.DataFrame(ROWS), ROWS.tolist(), TensorDataset(torch.tensor(ROWS))],
)
def test_data_in_any_form_give_the_same_numbers(pair, form):
    single = pair.float()
    expected = log_weights(single, torch.from_numpy(ROWS).float(), 3, seed=0)
    assert torch.equal(log_weights(single, form, 3, seed=0), expected)


def test_models_take_arrays_themselves():
    images = (ROWS > 0).astype(np.uint8)
    x = torch.from_numpy(images)
    for module in (VAE(3, 2, (4,)).float(), Autoencoder(3, 2, hidden=(4,)).float()):
        assert torch.equal(module.reconstruct(images), module.reconstruct(x.float()))
        assert fit(module, images, epochs=1, progress=False).status == "finished"
        assert fit(module, x, epochs=1, progress=False).status == "finished"
    mixture = GaussianMixture(2, 3)
    fit_em(mixture, pd.DataFrame(ROWS), sample_weights=np.ones(20), max_iterations=3)
    assert torch.equal(mixture.score_samples(ROWS), mixture.score_samples(torch.from_numpy(ROWS)))
    assert mixture.bic(ROWS.tolist()) == mixture.bic(torch.from_numpy(ROWS))
    best = LinearGaussian.ppca_optimum(ROWS, 1)
    total = LinearGaussian.ppca_log_likelihood(pd.DataFrame(ROWS), 1)
    assert torch.allclose(best.log_evidence(ROWS).sum(), total)


def test_a_data_set_with_labels_is_not_cut_silently(pair):
    both = TensorDataset(torch.tensor(ROWS), torch.arange(20))
    with pytest.raises(ProgramError, match=r"an item of TensorDataset has 2 parts, .*stack"):
        log_weights(pair, both)


def masked_pair(x):
    seen = x.isfinite()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.nan_to_num(x))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.nan_to_num(x) / 2, 0.5**0.5))

    return model, guide


def test_what_a_mask_takes_out_may_be_anything():
    x = torch.tensor([0.5, torch.nan, 2.0])
    weights = log_weights(*masked_pair(x), x, seed=0)
    expected = torch.distributions.Normal(0.0, 2**0.5).log_prob(x[[0, 2]])
    assert torch.allclose(weights[0, [0, 2]], expected)


def test_a_guide_that_passes_nan_on_is_named():
    x = torch.tensor([0.5, torch.nan, 2.0])
    model, _ = masked_pair(x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    with pytest.raises(ProgramError, match="latent 'z' is not finite because of them"):
        log_weights(model, guide, x)


def test_a_generator_is_a_seed(pair):
    x = torch.from_numpy(ROWS)
    one, two = np.random.default_rng(5), np.random.default_rng(5)
    first = log_weights(pair, x, seed=one)
    assert torch.equal(first, log_weights(pair, x, seed=two))
    assert not torch.equal(first, log_weights(pair, x, seed=two))
    result = log_evidence(pair, x, num_particles=3, seed=torch.Generator().manual_seed(1))
    assert isinstance(result.provenance["seed"], int)
