"""`fit` against closed forms, against loops written by hand, and against hostile users."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from types import FunctionType

import jaxtyping
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_vae import (
    VAE,
    LinearGaussian,
    draw_posterior,
    elbo_gap,
    fit,
    log_evidence,
    log_weights,
)
from pyro_vae.extras.f_divergence import fit_divergence
from pyro_vae.extras.f_divergence.generation import prior_predictive
from pyro_vae.inference.estimators import make_estimator
from pyro_vae.inference.predictive import draw_prior
from pyro_vae.inference.programs import ProgramError, UnfittedWarning
from pyro_vae.inference.svi import CheckpointError, TrainingError, load_tensors, loop
from pyro_vae.results import files

NUM_DATA, DATA_DIM, LATENT_DIM = 47, 5, 2


def linear_data(num_data=NUM_DATA, seed=3):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(DATA_DIM, LATENT_DIM, generator=torch.Generator().manual_seed(1))
    z = torch.randn(num_data, LATENT_DIM, generator=generator)
    return z @ weight.T + 0.5 * torch.randn(num_data, DATA_DIM, generator=generator) + 1.0


def grey_data(num_data=NUM_DATA):
    return torch.rand(num_data, DATA_DIM, generator=torch.Generator().manual_seed(5))


def linear(seed=0):
    torch.manual_seed(seed)
    return LinearGaussian(DATA_DIM, LATENT_DIM)


def vae(seed=0):
    torch.manual_seed(seed)
    return VAE(DATA_DIM, LATENT_DIM, hidden=(7,))


def binarise(x, generator):
    return torch.bernoulli(x, generator=generator)


def weights(module):
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).clone()


def rows(found, *, seconds=False):
    """The history as plain numbers."""
    names = [n for n in found.history.data_vars if seconds or n != "seconds"]
    return {n: found.history[n].values.tolist() for n in names}


# --- it reaches what can be reached ---------------------------------------------------------------


def test_a_linear_vae_reaches_the_likelihood_of_ppca():
    """Tipping & Bishop (1999); Lucas et al. (2019): the bound is tight at the optimum."""
    x = linear_data()
    best = LinearGaussian.ppca_log_likelihood(x, LATENT_DIM).item() / NUM_DATA

    def distance(epochs):
        module = linear()
        fit(
            module.model,
            module.guide,
            x,
            loss=TraceMeanField_ELBO(num_particles=4, vectorize_particles=True),
            learning_rate=lambda epoch: 0.06 * 0.003 ** (epoch / epochs),
            epochs=epochs,
            batch_size=NUM_DATA,
            evaluate_every=epochs,
        )
        q = module.amortized_posterior(x)
        bound = module.elbo(x, q.mean, torch.diag_embed(q.variance)).mean().item()
        assert bound < best
        return best - bound

    assert distance(600) < 1e-3
    assert distance(30) > 1e-2  # must reject: the optimum is not met by every fit


class Recorder:
    """A transform that changes nothing and remembers the batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, generator):
        self.batches.append(x.clone())
        return x


@pytest.mark.parametrize("loss", [Trace_ELBO(max_plate_nesting=1), None])
def test_the_steps_are_those_of_a_loop_written_by_hand(loss):
    x = linear_data()
    ours, theirs, third = linear(), linear(), linear()
    recorder = Recorder()
    fit(
        ours.model, ours.guide, x, loss=loss, learning_rate=0.01, epochs=2, batch_size=20, seed=4,
        transform=recorder,
    )  # fmt: skip
    shuffled = training_batches(recorder.batches, x, 2)
    stream = torch.cat(shuffled)
    places = torch.tensor([int((x == row).all(1).nonzero()[0, 0]) for row in stream])
    for epoch in (places[:NUM_DATA], places[NUM_DATA:]):
        assert torch.equal(epoch.sort().values, torch.arange(NUM_DATA))
    assert not torch.equal(places[:NUM_DATA], places[NUM_DATA:])

    def by_hand(module, seed):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        optim = pyro.optim.Adam({"lr": 0.01})
        svi = SVI(module.model, module.guide, optim, Trace_ELBO(max_plate_nesting=1))
        for batch in shuffled:
            svi.step(batch)
        return weights(module)

    expected, other = by_hand(theirs, 4), by_hand(third, 5)
    torch.testing.assert_close(weights(ours), expected, rtol=0, atol=1e-12)
    assert (weights(ours) - other).abs().max() > 1e-4  # must reject: other draws


def training_batches(seen, x, epochs):
    """Of all batches seen those of training: three in a row that hold every datum once."""
    found = []
    for i in range(len(seen) - 2):
        if [len(b) for b in seen[i : i + 3]] == [20, 20, 7]:
            whole = torch.cat(seen[i : i + 3])
            if torch.equal(whole.sort(0).values, x.sort(0).values):
                found += seen[i : i + 3]
    assert len(found) == 3 * epochs
    return found


def test_the_default_batch_is_128_of_shuffled_data():
    x = linear_data(150)
    module = linear()
    found = fit(module.model, module.guide, x, epochs=1)
    assert found.config["fit"]["batch_size"] == 128


# --- any loss, any optimizer ----------------------------------------------------------------------

LOSSES = [
    Trace_ELBO(),
    TraceGraph_ELBO(),
    TraceMeanField_ELBO(),
    RenyiELBO(alpha=0.0, num_particles=3, vectorize_particles=True),
    ReweightedWakeSleep(num_particles=2, vectorize_particles=True),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_every_loss_of_pyro_trains(loss):
    module, start = linear(), weights(linear())
    before = vars(loss).copy()
    x = linear_data()
    found = fit(
        module.model, module.guide, x, loss=loss, learning_rate=0.02, epochs=25, batch_size=20
    )
    assert found.history.bound[-1] > found.history.bound[0] + 1.0
    assert (weights(module) != start).all()
    assert found.config["fit"]["loss"] == type(loss).__name__
    assert vars(loss) == before
    # The bound is the ELBO whatever was minimised: closed form, 4 standard errors over data.
    q = module.amortized_posterior(x)
    exact = module.elbo(x, q.mean, torch.diag_embed(q.variance)).mean().item()
    assert abs(float(found.history.bound[-1]) - exact) < 4 * float(found.history.bound_se[-1])
    last = found.history.isel(epoch=-1)
    assert math.isclose(last.reconstruction - last.kl, last.bound, rel_tol=1e-12)


def mixture(x):
    """A Gaussian mixture as Pyro users write it."""
    mix = pyro.param("mix", torch.ones(3) / 3, constraint=dist.constraints.simplex)
    locs = pyro.param("locs", lambda: torch.randn(3, DATA_DIM))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(mix), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[k], 1.0).to_event(1), obs=x)


def nothing(x):
    """The guide where every latent is summed out."""


def mixture_log_likelihood(x, mix, locs):
    log_p = -0.5 * ((x[:, None] - locs) ** 2).sum(-1) - DATA_DIM / 2 * math.log(2 * math.pi)
    return (log_p + mix.log()).logsumexp(1)


def test_an_enumerated_mixture():
    x = linear_data()
    found = fit(mixture, nothing, x, loss=TraceEnum_ELBO(), learning_rate=0.05, epochs=40)
    exact = mixture_log_likelihood(x, found.parameters["mix"], found.parameters["locs"])
    assert math.isclose(found.history.bound[-1], exact.mean().item(), rel_tol=1e-10)
    assert found.history.bound[-1] > found.history.bound[0] + 0.5
    assert "kl" not in found.history
    assert found.history.bound.attrs["bound"] == "lower"
    with pytest.raises(ProgramError, match="'k' is missing from the guide"):
        fit(mixture, nothing, x, loss=Trace_ELBO())


@pytest.mark.parametrize("batch_size", [None, 7])
def test_latents_that_the_guide_leaves_to_be_summed_out_are(batch_size, caplog):
    x, options = linear_data(), {"batch_size": batch_size, "epochs": 2}
    asked = fit(mixture, nothing, x, loss=TraceEnum_ELBO(), **options)
    with caplog.at_level("INFO", "pyro_vae"):
        chosen = fit(mixture, nothing, x, **options)
    assert chosen.history.loss.values.tolist() == asked.history.loss.values.tolist()
    assert "TraceEnum_ELBO(), which sums over k" in caplog.text


def test_a_pyro_optimizer_of_the_user():
    x = linear_data()
    ours, theirs = linear(), linear()
    given = pyro.optim.Adam({"lr": 0.01})
    fit(ours.model, ours.guide, x, optimizer=given, epochs=3, batch_size=NUM_DATA, patience=9,
        validation=x)  # fmt: skip
    fit(theirs.model, theirs.guide, x, learning_rate=0.01, epochs=3, batch_size=NUM_DATA)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="learning-rate function needs a torch optimizer"):
        fit(ours.model, ours.guide, x, optimizer=given, learning_rate=lambda epoch: 0.1)
    with pytest.raises(ValueError, match="PyroOptim cannot be written"):
        fit(ours.model, ours.guide, x, optimizer=given, checkpoint="nowhere")


def test_a_factory_and_a_learning_rate_for_each_epoch():
    """SGD at rate 0 stands still; the schedule is asked once an epoch, from 0."""
    x, module = linear_data(), linear()
    asked, seen = [], []

    def rate(epoch):
        asked.append(epoch)
        seen.append(weights(module))
        return 0.0 if epoch == 1 else 1e-3

    sgd = partial(torch.optim.SGD, lr=9.0)
    fit(module.model, module.guide, x, optimizer=sgd, learning_rate=rate, epochs=3, batch_size=20)
    assert asked == [0, 1, 2]
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[2], weights(module))


# --- KL warm-up -----------------------------------------------------------------------------------


def test_warmup_optimises_the_beta_elbo():
    r"""With p(z) = N(0, 1), p(x|z) = N(z, 1) and one x the optimum is closed form:
    q = N(x / (1 + beta), beta / (1 + beta))."""
    x = torch.tensor([1.5])

    def model(x):
        with pyro.plate("data", 1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(1))
        scale = pyro.param("scale", torch.ones(1), constraint=dist.constraints.positive)
        with pyro.plate("data", 1):
            pyro.sample("z", dist.Normal(loc, scale))

    epochs, warmup = 400, 1000
    beta = epochs / warmup  # where training stops
    for loss in (
        TraceMeanField_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1),
        Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1),
    ):
        with pytest.warns(UserWarning, match="full bound is never optimised"):
            found = fit(model, guide, x, loss=loss, learning_rate=0.05, epochs=epochs,
                        warmup_epochs=warmup, evaluate_every=epochs)  # fmt: skip
        variance = found.parameters["scale"].item() ** 2
        assert abs(variance - beta / (1 + beta)) < 0.05  # 0.286; must reject 1/2, the full bound's
        assert abs(found.parameters["loc"].item() - 1.5 / (1 + beta)) < 0.1  # 1.07, not 0.75


def test_the_weight_of_the_kl_rises_and_is_1_in_the_end():
    x, module = linear_data(), linear()
    scales = []

    class Look(poutine.messenger.Messenger):
        def _pyro_post_sample(self, msg):
            if msg["name"] in "zx":
                scales.append((msg["name"], float(msg["scale"])))

    def guide(x):
        module.guide(x)

    def model(x):
        module.model(x)

    with Look():
        fit(model, guide, x, epochs=4, warmup_epochs=2, batch_size=NUM_DATA, evaluate_every=9)
    latent = sorted({scale for name, scale in scales if name == "z"})
    assert latent == [1e-3, 0.5, 1.0]
    assert {scale for name, scale in scales if name == "x"} == {1.0}


@pytest.mark.parametrize("loss", [RenyiELBO(alpha=0.5), JitTrace_ELBO(), ReweightedWakeSleep()])
def test_warmup_is_refused_where_it_is_wrong(loss):
    module = linear()
    with pytest.raises(ValueError, match="KL warm-up scales sites, which is wrong inside"):
        fit(module.model, module.guide, linear_data(), loss=loss, warmup_epochs=1, epochs=2)


def test_warmup_of_summed_out_latents_is_refused():
    with pytest.raises(ProgramError, match="KL warm-up"):
        fit(mixture, nothing, linear_data(), loss=TraceEnum_ELBO(), warmup_epochs=1, epochs=2)


# --- patience, evaluation, transform --------------------------------------------------------------


def test_patience_stops_and_goes_back_to_the_best():
    """A rate that jumps up spoils the fit after epoch 4."""
    x, held_out = linear_data(), linear_data(31, seed=9)
    module, seen = linear(), []

    def rate(epoch):
        seen.append(weights(module))
        return 0.01 if epoch < 4 else 1.0

    found = fit(module.model, module.guide, x, learning_rate=rate, epochs=50, batch_size=20,
                validation=held_out, patience=3)  # fmt: skip
    bounds = found.history.validation_bound.values
    best = int(bounds.argmax())
    assert found.status == "stopped early"
    assert len(bounds) == best + 1 + 3
    assert torch.equal(weights(module), seen[best + 1])
    assert f"back to epoch {best + 1}" in found.summary()
    assert f"validation bound {bounds[best]:.2f}" in found.summary()


def test_evaluation_moves_nothing():
    x = grey_data()

    def train(**options):
        module = vae()
        fit(module.model, module.guide, x, epochs=5, batch_size=20, transform=binarise, **options)
        return weights(module)

    plain = train()
    held_out = torch.bernoulli(x)
    assert torch.equal(plain, train(evaluate_every=3))
    assert torch.equal(plain, train(validation=held_out))
    assert torch.equal(plain, train(validation=held_out, evaluate_every=2, patience=None))
    assert not torch.equal(plain, train(seed=1))


def test_evaluate_every_leaves_out_rows_but_not_the_last():
    module = linear()
    found = fit(module.model, module.guide, linear_data(), epochs=5, evaluate_every=2)
    assert found.history.epoch.values.tolist() == [2, 4, 5]
    assert found.history.data_passes.values.tolist() == [2.0, 4.0, 5.0]


def test_the_bound_is_measured_on_the_same_draws():
    """At learning rate 0 every row is the same, and equals the mean of the log weights."""
    x, module = linear_data(), linear()
    found = fit(module.model, module.guide, x, epochs=3, batch_size=20, validation=x[:31],
                optimizer=partial(torch.optim.SGD, lr=0.0))  # fmt: skip
    for name in ("bound", "validation_bound", "bound_se"):
        assert len(set(found.history[name].values.tolist())) == 1
    by_hand = log_weights(module.model, module.guide, x, seed=0)[0]
    assert math.isclose(found.history.bound[0], by_hand.mean().item(), rel_tol=1e-12)
    error = by_hand.std().item() / math.sqrt(NUM_DATA)
    assert math.isclose(found.history.bound_se[0], error, rel_tol=1e-12)
    assert len(set(found.history.loss.values.tolist())) == 3  # fresh draws


def test_binarisation_draws_afresh_each_batch():
    x, module, drawn = grey_data(), vae(), []

    def transform(x, generator):
        drawn.append((x, torch.bernoulli(x, generator=generator)))
        return drawn[-1][1]

    fit(module.model, module.guide, x, epochs=3, batch_size=NUM_DATA, transform=transform)
    full = [b for _, b in drawn if len(b) == NUM_DATA]
    assert len({tuple(b.reshape(-1).tolist()) for b in full}) >= 3
    assert all(((grey > 0) | (b == 0)).all() for grey, b in drawn)


def test_only_the_first_tensor_is_transformed():
    seen = []

    def model(x, y):
        seen.append((x.clone(), y.clone()))
        scale = pyro.param("s", torch.ones(()), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + x.sum(1), scale), obs=y)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("l", torch.zeros(())), 1.0))

    x = linear_data()
    for data in ((x, x[:, 0]), {"x": x, "y": x[:, 0]}):
        seen.clear()
        fit(model, guide, data, epochs=2, batch_size=20, transform=lambda a, generator: a + 100)
        # The look at the programs mixes rows of different data; the training does not.
        assert all(torch.isin(b, x[:, 0]).all() for _, b in seen)
        assert all(torch.isin(a[:, 0], x[:, 0] + 100).all() for a, _ in seen)
        assert all((a[:, 0] == b + 100).all() for a, b in seen[-6:])


# --- global latents, point guides, subsampling ----------------------------------------------------


def regression(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(DATA_DIM), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * weight).sum(-1), 0.5), obs=y)


def regression_data():
    x = linear_data()
    y = x @ torch.linspace(-1, 1, DATA_DIM)
    return x, y + 0.5 * torch.randn(NUM_DATA, generator=torch.Generator().manual_seed(8))


def exact_regression(x, y):
    """Bishop (2006): mean and covariance of the weights."""
    precision = torch.eye(DATA_DIM) + x.T @ x / 0.25
    return torch.linalg.solve(precision, x.T @ y / 0.25), torch.linalg.inv(precision)


def test_bayesian_regression_on_all_data():
    x, y = regression_data()
    mean, covariance = exact_regression(x, y)
    evidence = (
        dist.MultivariateNormal(torch.zeros(NUM_DATA), 0.25 * torch.eye(NUM_DATA) + x @ x.T)
        .log_prob(y)
        .item()
    )
    found = fit(
        regression,
        AutoMultivariateNormal(regression, init_loc_fn=lambda site: torch.zeros(DATA_DIM)),
        (x, y),
        loss=Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1),
        learning_rate=lambda epoch: 0.05 * 0.01 ** (epoch / 800),
        epochs=800,
        evaluate_every=800,
    )
    assert found.config["fit"]["batch_size"] == NUM_DATA
    deviation = covariance.diagonal().sqrt()
    assert ((found.guide.get_posterior().mean - mean).abs() / deviation).max() < 0.2
    # At the exact posterior one draw gives the evidence; here q is near it: within 0.5 nats in all.
    assert abs(found.history.bound[-1] * NUM_DATA - evidence) < 0.5


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_mini_batches_of_a_regression(guide):
    """The posterior of all data; batches of 20 that counted once would leave it far too wide."""
    x, y = regression_data()
    mean, covariance = exact_regression(x, y)
    found = fit(regression, guide(regression), (x, y), batch_size=20, epochs=60,
                learning_rate=lambda epoch: 0.1 * 0.93**epoch, evaluate_every=60)  # fmt: skip
    deviation = covariance.diagonal().sqrt()
    name = "AutoNormal.locs.weight" if guide is AutoNormal else "AutoDelta.weight"
    assert ((found.parameters[name] - mean).abs() < 2 * deviation).all()
    if guide is AutoNormal:  # mean field: 1 / sqrt(precision)
        sd = (1 + (x**2).sum(0) / 0.25) ** -0.5
        assert ((found.parameters["AutoNormal.scales.weight"] / sd).log().abs() < 0.4).all()


def test_a_point_guide_finds_the_mode():
    x, y = regression_data()
    found = fit(regression, AutoDelta(regression), (x, y), learning_rate=0.05, epochs=800,
                evaluate_every=800)  # fmt: skip
    mode, _ = exact_regression(x, y)
    torch.testing.assert_close(found.parameters["AutoDelta.weight"], mode, rtol=0, atol=1e-5)
    prior = dist.Normal(0.0, 1.0).log_prob(mode).sum()
    joint = prior + dist.Normal(x @ mode, 0.5).log_prob(y).sum()
    assert math.isclose(found.history.bound[-1], joint.item() / NUM_DATA, rel_tol=1e-9)
    assert set(found.history.data_vars) == {"seconds", "data_passes", "loss", "bound"}
    assert found.history.bound.attrs["bound"] == "objective"


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None].expand(x.shape), 1.0).to_event(1), obs=x)


def guide_for_each_datum(x):
    loc = pyro.param("loc", torch.zeros(len(x)))
    scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, scale))


@pytest.mark.parametrize("automatic", [True, False])
def test_a_posterior_for_each_datum_sees_all_data(automatic):
    """Unless mini-batches are asked for: the rows of each are then found (test_mini_batches)."""
    x = linear_data(150)
    guide = AutoNormal(local) if automatic else guide_for_each_datum
    found = fit(local, guide, x, learning_rate=0.05, epochs=400, evaluate_every=400)
    loc = found.parameters["AutoNormal.locs.z" if automatic else "loc"]
    # The exact posterior has mean sum(x) / (D + 1) and variance 1 / (D + 1).
    assert ((loc - x.sum(1) / (DATA_DIM + 1)).abs() < 0.5).all()
    guide = AutoNormal(local) if automatic else guide_for_each_datum
    with pytest.raises(ProgramError, match="a posterior or parameter for each"):
        fit(local, guide, x, epochs=1, validation=linear_data(150, seed=9))


def test_models_that_subsample():
    """The loss speaks for all data, so per datum it is divided by all; passes are counted."""
    x = linear_data()[:, 0]

    def inside(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=10) as index:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[index])

    def outside(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", NUM_DATA, subsample=x) as batch:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=batch)

    mean = x.sum() / (NUM_DATA + 1)
    for model, options in ((inside, {"epochs": 600}), (outside, {"epochs": 120, "batch_size": 10})):
        found = fit(model, AutoNormal(model), x, evaluate_every=options["epochs"],
                    learning_rate=lambda epoch: 0.05 * 0.99**epoch, **options)  # fmt: skip
        assert abs(found.parameters["AutoNormal.locs.loc"] - mean) < 0.2
        joint = dist.Normal(mean, 1.0).log_prob(x).mean().item()
        assert abs(found.history.loss[-1] + joint) < 0.3  # of size 2; 10 where divided by the batch
        passes = options["epochs"] * (10 / NUM_DATA if model is inside else 1)
        assert math.isclose(found.history.data_passes[-1], passes)


def sequences(first):
    """A sequence's level z ~ N(0, 1), x_t ~ N(z, s): data along the first axis, or the second."""

    def rows(x):
        return x.T if first == "time" else x

    def model(x, lengths):
        x = rows(x)
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            seen = torch.arange(x.shape[1]) < lengths[:, None]
            steps = dist.Normal(z[..., None], scale.expand(x.shape)).mask(seen)
            pyro.sample("x", steps.to_event(1), obs=x)

    def guide(x, lengths):
        slope, bias = pyro.param("slope", torch.zeros(())), pyro.param("bias", torch.zeros(()))
        with pyro.plate("data", len(rows(x))):
            pyro.sample("z", dist.Normal(slope * rows(x).mean(1) + bias, 0.5))

    return model, guide


@pytest.mark.parametrize(("steps", "batch_size"), [(3, 4), (9, 4), (12, 9)])
def test_time_may_come_first(steps, batch_size):
    """Mini-batches are of sequences, not of steps: all is as with the data along the first axis."""
    x, lengths = torch.randn(9, steps), torch.arange(9) % steps + 1
    found = {}
    for first, data in {"data": (x, lengths), "time": (x.T.contiguous(), lengths)}.items():
        held_out = (data[0] + 1, lengths)
        found[first] = fit(
            *sequences(first),
            data,
            batch_size=batch_size,
            epochs=3,
            learning_rate=0.1,
            validation=held_out,
        )
    for name, value in found["data"].parameters.items():
        torch.testing.assert_close(found["time"].parameters[name], value, rtol=1e-10, atol=1e-10)
    for name in ("loss", "bound", "validation_bound", "data_passes"):
        torch.testing.assert_close(*(torch.tensor(f.history[name].values) for f in found.values()))
    assert found["time"].config["fit"]["num_data"] == 9


def test_programs_that_bring_their_data_speak_of_their_plate():
    x = linear_data(150)[:, 0]

    def model():
        bare_model(x)

    def guide():
        bare_guide(x)

    found, expected = (
        fit(m, g, data, epochs=2, batch_size=size)
        for m, g, data, size in ((model, guide, (), None), (bare_model, bare_guide, x, 150))
    )
    assert found.config["fit"]["num_data"] == 150
    for name in ("loss", "bound"):
        assert found.history[name].values == pytest.approx(expected.history[name].values)
    with pytest.raises(ProgramError, match=r"20 vs 150\); write .*pass batch_size=None"):
        fit(model, guide, (), epochs=1, batch_size=20)


def test_programs_of_a_fixed_size_and_without_arguments():
    x = linear_data(150)

    def model(*_):
        with pyro.plate("data", 150):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None].expand(x.shape), 1.0).to_event(1), obs=x)

    def guide(*_):
        with pyro.plate("data", 150):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

    for data in (x, ()):
        found = fit(model, guide, data, epochs=2)
        assert found.parameters["loc"] != 0


# --- parameters and modules -----------------------------------------------------------------------


def bare_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(pyro.param("prior", torch.zeros(())), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def bare_guide(x):
    slope = pyro.param("slope", torch.zeros(()))
    scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, scale))


def test_bare_parameters_live_in_the_fit():
    x = linear_data()[:, 0]
    one = fit(bare_model, bare_guide, x, learning_rate=0.1, epochs=30)
    two = fit(bare_model, bare_guide, x, learning_rate=0.1, epochs=2)
    assert dict(pyro.get_param_store().items()) == {}
    assert one.parameters.keys() == {"prior", "slope", "scale"}
    assert one.parameters["slope"] > two.parameters["slope"] > 0
    for found in (one, two):
        trace = poutine.trace(found.guide).get_trace(x)
        assert torch.equal(trace.nodes["z"]["fn"].scale[0], found.parameters["scale"])
    assert pyro.get_param_store().keys() == set()

    before = {name: value.clone() for name, value in one.parameters.items()}
    third = fit(one.model, one.guide, x, learning_rate=0.1, epochs=1)
    assert 0 < (third.parameters["slope"] - before["slope"]).abs() < 1.0
    scale = poutine.trace(one.guide).get_trace(x).nodes["z"]["fn"].scale[0]
    assert torch.equal(scale, before["scale"])


def test_the_callers_store_is_a_start_and_stays():
    x = linear_data()[:, 0]
    pyro.param("slope", torch.tensor(0.25))
    pyro.param("of another model", torch.ones(7), constraint=dist.constraints.positive)
    found = fit(bare_model, bare_guide, x, learning_rate=1e-9, epochs=1)
    assert abs(found.parameters["slope"] - 0.25) < 1e-6
    assert "of another model" not in found.parameters
    found = fit(bare_model, bare_guide, x, learning_rate=0.1, epochs=1)
    store = pyro.get_param_store()
    assert set(store.keys()) == {"slope", "of another model"}
    assert store["slope"] == 0.25
    assert (store["of another model"] == 1).all()


def copies():
    """The bare programs as functions that nothing has fitted yet."""
    return [FunctionType(f.__code__, globals(), f.__name__) for f in (bare_model, bare_guide)]


MEASURES = {
    "log_weights": log_weights,
    "log_evidence": partial(log_evidence, num_particles=10),
    "quadrature": lambda model, guide, x: log_evidence(model, None, x, method="quadrature"),
    "elbo_gap": partial(elbo_gap, num_particles=10, max_steps=1),
    "draw_posterior": partial(draw_posterior, num_draws=2),
    "draw_prior": lambda model, guide, x: draw_prior(model, x, num_draws=2),
    "prior_predictive": lambda model, guide, x: prior_predictive(model, x),
    "partial": lambda model, guide, x: log_weights(partial(model), guide, x),
    "handled": lambda model, guide, x: log_weights(poutine.scale(model, scale=1.0), guide, x),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_a_fitted_program_measured_without_its_values_is_said(measure):
    """Bare parameters live in the Fit: whoever drops it would measure the initial values."""
    x, programs = linear_data()[:5, 0], copies()
    measure(*programs, x)  # never fitted, so nothing to say
    fit(*programs, x, epochs=1)
    with pytest.warns(UnfittedWarning, match="unfitted 'bare_model'.*'prior'.*fit.model"):
        measure(*programs, x)


def test_a_store_that_holds_the_initial_values_does_not_hide_it():
    x, (model, guide) = linear_data()[:, 0], copies()
    model(x)  # to look at it
    found = fit(model, guide, x, learning_rate=0.1, epochs=2)
    guide(x)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            initial = log_weights(model, guide, x, seed=1)
    assert [w.filename for w in said] == [__file__]  # once at this line
    fitted = log_weights(found.model, found.guide, x, seed=1)
    assert not torch.allclose(initial, fitted)
    for name, value in found.parameters.items():
        pyro.get_param_store()[name] = value
    assert torch.allclose(log_weights(model, guide, x, seed=1), fitted)


def test_training_again_is_no_measurement_and_other_values_are_meant():
    x, (model, guide) = linear_data()[:, 0], copies()
    found = fit(model, guide, x, epochs=1)
    again = fit(model, guide, x, epochs=1)  # starts anew: the same to the bit
    assert all(torch.equal(v, again.parameters[n]) for n, v in found.parameters.items())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), make_estimator("PathwiseELBO"))
    svi.step(x)
    log_weights(model, guide, x)  # the store has what SVI reached


def test_methods_and_generators_are_watched_too():
    class Programs:
        def model(self, x):
            bare_model(x)

        def guide(self, x):
            bare_guide(x)

    x, one, other = linear_data()[:, 0], Programs(), Programs()
    found = fit(one.model, one.guide, x, epochs=1)
    log_weights(found.model, found.guide, x)
    log_weights(other.model, other.guide, x)  # never fitted
    with pytest.warns(UnfittedWarning, match="unfitted 'guide': .* values of 'scale', 'slope'"):
        log_weights(found.model, one.guide, x)
    model, _ = copies()
    fit_divergence(model, x, epochs=1)
    with pytest.warns(UnfittedWarning, match="'bare_model'"):
        prior_predictive(model, x)


def test_two_programs_with_modules_of_one_name_both_train():
    torch.manual_seed(0)
    down, up = nn.Linear(1, DATA_DIM), nn.Linear(DATA_DIM, 1)

    def model(x):
        net = pyro.module("net", down)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x):
        net = pyro.module("net", up)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 0.5).to_event(1))

    before = weights(down), weights(up)
    found = fit(model, guide, linear_data(), epochs=2)
    assert (weights(down) != before[0]).all()
    assert (weights(up) != before[1]).all()
    assert sum(v.numel() for v in found.parameters.values()) == 16
    log_w = log_weights(found.model, found.guide, linear_data(), seed=0).mean().item()
    assert math.isclose(log_w, found.history.bound[-1], rel_tol=1e-12)


class Posterior(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Linear](1, 1)
        self.scale = PyroParam(torch.ones(()), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x[:, None])[:, 0], self.scale))


def test_pyro_modules_as_guides():
    guide, x = Posterior(), linear_data()[:, 0]
    before = guide.scale.item(), weights(guide.net)
    found = fit(bare_model, guide, x, learning_rate=0.05, epochs=3)
    assert guide.scale.item() != before[0]
    assert (weights(guide.net) != before[1]).all()
    assert found.parameters["scale"].item() == guide.scale.item()
    again = fit(bare_model, Posterior(), x, learning_rate=1e-9, epochs=1)
    assert abs(again.parameters["scale"] - 1) < 1e-6  # another module of the same names is another


def test_pyro_modules_whose_names_collide_are_refused():
    class Holder(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = PyroParam(torch.ones(()))

        def forward(self, x):
            return self.scale

    with pytest.raises(ProgramError, match="two PyroModules both have a parameter 'scale'"):
        fit(Holder(), Posterior(), linear_data()[:, 0])


class WithModes:
    """Keeps its modules where only running it shows them: it is no module itself."""

    def __init__(self):
        torch.manual_seed(0)
        self.nets = {
            "up": nn.Sequential(
                nn.Linear(DATA_DIM, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)
            ),
            "down": nn.Linear(1, DATA_DIM),
        }
        self.modes = []
        self.nets["up"][1].register_forward_hook(lambda m, i, o: self.modes.append(m.training))

    def model(self, x):
        net = pyro.module("down", self.nets["down"])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        loc, scale = pyro.module("up", self.nets["up"])(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def test_modules_train_in_training_mode_and_are_measured_in_evaluation_mode():
    programs, x = WithModes(), linear_data(40)
    norm = programs.nets["up"][1]
    found = fit(programs.model, programs.guide, x, epochs=3, batch_size=20, evaluate_every=1)
    assert norm.num_batches_tracked == 6  # the steps, and nothing else
    assert sum(programs.modes) == 6
    assert len(programs.modes) >= 9
    assert all(m.training for net in programs.nets.values() for m in net.modules())
    other = WithModes()
    fit(other.model, other.guide, x, epochs=3, batch_size=20, evaluate_every=3, validation=x[:9])
    for name in ("up", "down"):
        theirs = other.nets[name].state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in programs.nets[name].state_dict().items())
    for net in programs.nets.values():
        net.eval()
    log_w = log_weights(found.model, found.guide, x, seed=0).mean().item()
    assert math.isclose(log_w, found.history.bound[-1], rel_tol=1e-12)


def test_modes_come_back_after_an_error():
    programs = WithModes()
    with pytest.raises(RuntimeError):
        fit(programs.model, programs.guide, linear_data()[:, :3], epochs=1)
    assert all(m.training for net in programs.nets.values() for m in net.modules())


def test_frozen_modules_stay():
    module = linear()
    module.generative.requires_grad_(False)
    before = weights(module.generative), weights(module.recognition)
    fit(module.model, module.guide, linear_data(), epochs=1)
    assert torch.equal(weights(module.generative), before[0])
    assert not torch.equal(weights(module.recognition), before[1])


def test_gradients_of_before_do_not_count():
    clean, soiled = linear(), linear()
    for p in soiled.parameters():
        p.grad = torch.full_like(p, 1e3)
    for module in (clean, soiled):
        fit(module.model, module.guide, linear_data(), epochs=1)
    assert torch.equal(weights(clean), weights(soiled))
    assert all(p.grad is None for p in soiled.parameters())


@pytest.mark.float32
def test_the_dtype_is_that_of_the_module():
    module, x = linear().double(), linear_data().double()
    found = fit(module.model, module.guide, x, epochs=1)
    assert {v.dtype for v in found.parameters.values()} == {torch.float64}
    assert found.config["fit"]["dtype"] == "float64"


# --- refusals -------------------------------------------------------------------------------------


def test_a_forgotten_registration_is_named():
    net = nn.Linear(1, 1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("prior", torch.zeros(())), 1.0))
            pyro.sample("x", dist.Normal(net(z[..., None])[..., 0], 1.0), obs=x)

    with pytest.raises(ProgramError, match=r"weight \(1, 1\).*pyro.module"):
        fit(model, bare_guide, linear_data()[:, 0])


@pytest.mark.parametrize("validated", [True, False])
def test_a_latent_that_the_guide_lacks_is_named(validated):
    with (
        pyro.validation_enabled(validated),
        pytest.raises(ProgramError, match="'z' is missing from the guide"),
    ):
        fit(bare_model, nothing, linear_data()[:, 0])


def test_programs_without_parameters_are_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ProgramError, match="neither model nor guide has a parameter"):
        fit(model, guide, linear_data()[:, 0])


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", [None, pyro.optim.Adam({"lr": 0.01})])
def test_numbers_that_are_not_finite_stop_it_in_time(spoilt, optimizer):
    """The third step goes wrong; the parameters are those after the second."""
    module, seen = linear(), []

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value * math.nan if spoilt == "loss" else value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.nan

    def guide(x):
        with pyro.plate("data", len(x)):
            posterior = pyro.module("recognition", module.recognition)(x)
            if torch.is_grad_enabled() and module.training and training[0]:
                seen.append(weights(module))
                if len(seen) == 3:
                    loc = Spoil.apply(posterior.base_dist.loc)
                    posterior = dist.Normal(loc, posterior.base_dist.scale, validate_args=False)
                    posterior = posterior.to_event(1)
            pyro.sample("z", posterior)

    training = [False]

    def transform(x, generator):
        training[0] = True
        return x

    with pytest.raises((TrainingError, ValueError)) as caught:
        fit(module.model, guide, linear_data(), epochs=5, batch_size=NUM_DATA, transform=transform,
            optimizer=optimizer)  # fmt: skip
    if caught.type is TrainingError:
        assert ("gradient of" if spoilt == "gradient" else "loss is nan") in str(caught.value)
    assert torch.equal(weights(module), seen[-1])
    assert weights(module).isfinite().all()


BAD_ARGUMENTS = [
    ({"epochs": 0}, "epochs must be an integer from 1"),
    ({"epochs": 2.0}, "epochs must be an integer from 1"),
    ({"epochs": np.int64(3)}, "epochs must be an integer from 1"),
    ({"epochs": True}, "epochs must be an integer from 1"),
    ({"batch_size": -1}, "batch_size must be an integer from 1 or None"),
    ({"evaluate_every": 0}, "evaluate_every"),
    ({"checkpoint_every": None}, "checkpoint_every"),
    ({"patience": 0, "validation": 0}, "patience must be an integer from 1 or None"),
    ({"patience": 2}, "patience watches the validation bound"),
    ({"warmup_epochs": -1}, "warmup_epochs must be an integer from 0"),
    ({"warmup_epochs": 0.5}, "warmup_epochs must be an integer from 0"),
    ({"seed": -1}, "seed must be an integer from 0"),
    ({"seed": 2**32}, "seed must be an integer from 0"),
    ({"seed": None}, "seed must be an integer from 0"),
    ({"learning_rate": 0.0}, "learning_rate must be a positive number or a function"),
    ({"learning_rate": math.nan}, "learning_rate must be"),
    ({"learning_rate": "0.1"}, "learning_rate must be"),
    ({"loss": Trace_ELBO}, r"loss must be an ELBO such as Trace_ELBO\(\)"),
    ({"optimizer": "adam"}, "optimizer must be a function"),
    ({"resume": True}, "resume=True needs checkpoint=FOLDER"),
    ({"config": {"a": torch.ones(1)}}, "config must be what JSON can hold"),
    ({"config": {"a": math.nan}}, "config must be what JSON can hold"),
]


@pytest.mark.parametrize(("options", "match"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(options, match, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # ours, as users meet it
    module = linear()
    before = weights(module)
    with pytest.raises(ValueError, match=match):
        fit(module.model, module.guide, linear_data(), **options)
    assert torch.equal(weights(module), before)


def test_data_that_cannot_be_fitted_are_refused_at_once():
    module, x = vae(), torch.bernoulli(grey_data())
    with pytest.raises(ValueError, match="no data to fit"):
        fit(module.model, module.guide, x[:0])
    with pytest.raises(ValueError, match="validation data are empty"):
        fit(module.model, module.guide, x, validation=x[:0])
    before = weights(module)
    with pytest.raises(ValueError, match=r"Grey pixels|support"):
        fit(module.model, module.guide, x, validation=grey_data())
    with pytest.raises(ValueError, match=r"Grey pixels|support"):
        fit(module.model, module.guide, grey_data())
    assert torch.equal(weights(module), before)


# --- the world afterwards -------------------------------------------------------------------------


def world():
    return (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        {k: v.tolist() for k, v in pyro.get_param_store().items()},
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        dict(pyro.settings.get()),
        signal.getsignal(signal.SIGINT),
        nn.modules.module._global_forward_pre_hooks,
    )


def test_the_world_is_afterwards_what_it_was(tmp_path):
    pyro.param("mine", torch.tensor([1.0, 2.0]))
    before = world()
    module = vae()
    torch.manual_seed(1)
    before = world()
    fit(module.model, module.guide, grey_data(), transform=binarise, epochs=2, patience=1,
        validation=torch.ones(3, DATA_DIM), checkpoint=tmp_path / "run")  # fmt: skip
    assert world() == before

    def broken(x, generator):
        if torch.get_rng_state().tolist() != before[0] and len(x) == 20:
            raise ZeroDivisionError
        return binarise(x, generator)

    with pytest.raises(ZeroDivisionError):
        fit(module.model, module.guide, grey_data(), transform=broken, epochs=2, batch_size=20)
    assert world() == before
    torch.rand(1)
    assert world() != before  # must reject


def test_it_trains_where_gradients_are_switched_off():
    module = linear()
    before = weights(module)
    with torch.no_grad():
        fit(module.model, module.guide, linear_data(), epochs=1)
    assert not torch.equal(weights(module), before)


def test_it_is_quiet_where_nobody_watches(capfd):
    module = linear()
    found = fit(module.model, module.guide, linear_data(), epochs=2)
    assert capfd.readouterr() == ("", "")
    assert re.fullmatch(
        r"<fit finished after 2 epochs, \d+\.\d s; bound -\d+\.\d\d \+- \d\.\d\d nats per datum; "
        r"30 parameters>",
        repr(found),
    )
    page = found._repr_html_()
    assert page.startswith(f"<p>{found.summary()}</p><div")
    assert "<td>bound (1)</td>" in page


def test_the_same_seed_gives_the_same_bits():
    x = grey_data()

    def train(seed):
        module = vae()
        found = fit(module.model, module.guide, x, transform=binarise, epochs=3, batch_size=20,
                    seed=seed, validation=torch.bernoulli(torch.full((9, DATA_DIM), 0.5),
                    generator=torch.Generator().manual_seed(0)))  # fmt: skip
        return weights(module), rows(found)

    (one, history), (two, again), (three, other) = train(7), train(7), train(8)
    assert torch.equal(one, two)
    assert history == again
    assert not torch.equal(one, three)
    assert history != other


# --- the run folder -------------------------------------------------------------------------------


def refuse(token):
    raise AssertionError(f"{token} is no JSON")


class Stop:
    """Sends Ctrl-C or another signal to this process at the given call of the transform."""

    def __init__(self, at, times=1, number=signal.SIGINT):
        self.at, self.times, self.number, self.calls = at, times, number, 0

    def __call__(self, x, generator):
        self.calls += 1
        if self.calls == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
        return torch.bernoulli(x, generator=generator)


def train(folder, *, epochs=7, transform=binarise, module=None, **options):
    """Everything at once: binarisation, warm-up, patience, a learning rate that falls."""
    module = module or vae()
    settings = {
        "batch_size": 20,
        "warmup_epochs": 3,
        "validation": torch.bernoulli(grey_data(13), generator=torch.Generator().manual_seed(0)),
        "patience": 50,
        "learning_rate": lambda epoch: 0.02 / (1 + epoch),
        "seed": 6,
        "checkpoint": folder,
        "checkpoint_every": 2,
    }
    found = fit(module.model, module.guide, grey_data(), epochs=epochs, transform=transform,
                **settings | options)  # fmt: skip
    return module, found


def state_of(folder):
    """Tensors and state, without the times."""
    tensors, metadata = load_tensors(folder / "training.safetensors")
    state = metadata["state"]
    state.pop("seconds")
    for row in state["history"]:
        row.pop("seconds")
    return tensors, state


def assert_same_run(folder, other):
    (tensors, state), (others, other_state) = state_of(folder), state_of(other)
    assert state == other_state
    assert tensors.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in tensors.items())
    one, two = (load_tensors(f / "model.safetensors")[0] for f in (folder, other))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_the_folder_of_a_run(tmp_path):
    module, found = train(tmp_path / "run", config={"data": {"name": "grey noise"}})
    folder = tmp_path / "run"
    names = {"training.safetensors", "model.safetensors", "config.json", "history.jsonl"}
    assert {path.name for path in folder.iterdir()} == names | {"README.md"}
    config = json.loads((folder / "config.json").read_text(), parse_constant=refuse)
    assert config == json.loads(json.dumps(found.config))
    assert config["model"] == {"class": "VAE", "arguments": module.config}
    assert config["data"] == {"name": "grey noise"}
    assert config["fit"] | {
        "loss": "Trace_ELBO", "optimizer": "Adam", "batch_size": 20, "seed": 6, "num_data": 47,
        "num_threads": 1, "dtype": "float64", "learning_rate": "a function", "epochs": 7,
    } == config["fit"]  # fmt: skip
    lines = (folder / "history.jsonl").read_text().splitlines()
    history = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["epoch"] for row in history] == list(range(1, 8))
    assert [row["bound"] for row in history] == found.history.bound.values.tolist()
    saved, _ = load_tensors(folder / "model.safetensors")
    assert all(torch.equal(value, saved[n]) for n, value in module.state_dict().items())
    best = found.history.validation_bound.values.max()
    card = (folder / "README.md").read_text()
    assert "# VAE on grey noise" in card
    assert f"ELBO {best:.2f}" in card


def test_bare_parameters_are_in_the_folder(tmp_path):
    found = fit(bare_model, bare_guide, linear_data()[:, 0], epochs=1, checkpoint=tmp_path)
    saved, _ = load_tensors(tmp_path / "model.safetensors")
    assert saved.keys() == found.parameters.keys()
    for name, value in found.parameters.items():  # positive ones are kept as their logarithms
        free = saved[name]
        assert torch.equal(value, free) or torch.equal(value, free.exp())


@pytest.mark.parametrize("first", [1, 2, 5])
def test_a_run_resumed_at_an_epoch_is_the_same_to_the_bit(tmp_path, first):
    """Parameters, optimizer, random states and history."""
    whole, found = train(tmp_path / "whole")
    train(tmp_path / "parts", epochs=first, warmup_epochs=3) if first >= 3 else _short(
        tmp_path / "parts", first
    )
    module, resumed = train(tmp_path / "parts", module=vae(seed=99), resume=True)
    assert torch.equal(weights(module), weights(whole))
    assert rows(resumed) == rows(found)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def _short(folder, epochs):
    with pytest.warns(UserWarning, match="never optimised"):
        train(folder, epochs=epochs)


def calls_before_training(tmp_path):
    counter = Stop(at=-1)
    train(tmp_path / "count", epochs=3, transform=counter)
    evaluations = 3
    return counter.calls - 3 * 3 - evaluations


@pytest.mark.parametrize("step", [1, 2, 3, 8])
def test_a_run_interrupted_in_mid_epoch_is_the_same_to_the_bit(tmp_path, step):
    """Ctrl-C during any step: the step ends, the state is written, the run goes on."""
    before = calls_before_training(tmp_path)
    whole, found = train(tmp_path / "whole")
    passed = (step - 1) // 3  # evaluations before it
    module, part = train(tmp_path / "parts", transform=Stop(at=before + step + passed))
    assert part.status == "interrupted"
    assert "interrupted" in part.summary()
    assert state_of(tmp_path / "parts")[1]["position"] == (step - 1) % 3 + 1
    module, resumed = train(tmp_path / "parts", module=vae(seed=99), resume=True)
    assert resumed.status == "finished"
    assert torch.equal(weights(module), weights(whole))
    assert rows(resumed) == rows(found)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_second_interrupt_ends_it_at_once_and_writes_nothing(tmp_path):
    before = calls_before_training(tmp_path)
    _, found = train(tmp_path / "run", transform=Stop(at=before + 8 + 2, times=2))
    assert found.status == "interrupted"
    assert state_of(tmp_path / "run")[1]["epoch"] == 2  # the checkpoint of before
    _, resumed = train(tmp_path / "run", resume=True)
    _, whole = train(tmp_path / "whole")
    assert rows(resumed) == rows(whole)


def test_fit_runs_in_a_thread(tmp_path):
    """Python takes signals in the main thread alone, so none is touched."""
    found = []
    thread = threading.Thread(target=lambda: found.append(train(tmp_path / "run", epochs=3)[1]))
    thread.start()
    thread.join()
    assert found[0].status == "finished"


def test_an_ignored_interrupt_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _, found = train(tmp_path / "run", epochs=3, transform=Stop(at=5))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert found.status == "finished"


class Killed:
    """A process that dies, as by kill -9, just before it puts its n-th file in place."""

    def __init__(self, at):
        self.at, self.calls, self.real = at, 0, os.replace

    def __call__(self, source, target):
        self.calls += 1
        if self.calls == self.at:
            os._exit(9)
        self.real(source, target)


def killed_at(at, folder, monkeypatch, **options):
    """Whether a training died there, in a process of its own, and not of its own accord."""
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(files.os, "replace", Killed(at))
        train(folder, **options)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def contents(folder):
    """Every file of a run folder, without the times."""
    found = {path.name: path.read_text(errors="replace") for path in folder.iterdir()}
    for name in ("training.safetensors", "model.safetensors"):
        found[name] = None  # their headers are in any order; `assert_same_run` compares them
    return {name: re.sub(r'"seconds": [0-9.e-]+', "", text or "") for name, text in found.items()}


SHORT = {"epochs": 2, "warmup_epochs": 0}


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_run_killed_at_any_file_is_resumed_to_the_bit(tmp_path, monkeypatch):
    """The call that started it, with resume=True: killed before the first checkpoint, or later."""
    whole, found = train(tmp_path / "whole", **SHORT)
    at, folder = 0, tmp_path
    while at == 0 or killed_at(at, folder, monkeypatch, **SHORT):
        if at:
            start = vae(seed=99 if at > 1 else 0)  # what the folder holds replaces it
            module, resumed = train(folder, module=start, resume=True, **SHORT)
            assert resumed.status == "finished"
            assert torch.equal(weights(module), weights(whole)), at
            assert rows(resumed) == rows(found)
            assert_same_run(folder, tmp_path / "whole")
            assert contents(folder) == contents(tmp_path / "whole")
        at, folder = at + 1, tmp_path / f"killed at {at + 1}"
    assert at - 1 == 2 * 5  # the start and the end


def test_a_signal_that_ends_the_process_is_obeyed_once_the_state_is_written(tmp_path):
    def handler(*_):
        raise SystemExit(143)

    whole, _ = train(tmp_path / "whole")
    before = signal.signal(signal.SIGTERM, handler)
    try:
        at = calls_before_training(tmp_path) + 8 + 2
        with pytest.raises(SystemExit):
            train(tmp_path / "parts", transform=Stop(at=at, number=signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert state_of(tmp_path / "parts")[1]["position"] == 2
    module, _ = train(tmp_path / "parts", module=vae(seed=99), resume=True)
    assert torch.equal(weights(module), weights(whole))


def test_whoever_goes_on_may_ask_for_a_finished_fit(tmp_path):
    _, found = train(None, epochs=3)
    assert found.require_finished() is found
    _, part = train(None, transform=Stop(at=calls_before_training(tmp_path) + 1))
    with pytest.raises(KeyboardInterrupt, match="interrupted before its first epoch"):
        part.require_finished()


def test_resuming_a_finished_run_returns_it(tmp_path):
    module, found = train(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    again, resumed = train(tmp_path / "run", module=vae(seed=99), resume=True)
    assert torch.equal(weights(again), weights(module))
    assert rows(resumed, seconds=True) == rows(found, seconds=True)
    assert resumed.status == "finished"
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}


def test_resuming_a_run_that_stopped_early(tmp_path):
    options = {"patience": 1, "warmup_epochs": 0, "learning_rate": lambda epoch: 0.01 + epoch}
    _, found = train(tmp_path / "run", **options)
    assert found.status == "stopped early"
    epochs = found.history.sizes["epoch"]
    assert epochs < 7
    module, again = train(tmp_path / "run", resume=True, module=vae(seed=99), **options)
    assert again.status == "stopped early"
    assert rows(again) == rows(found)
    saved, _ = load_tensors(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(value, saved[n]) for n, value in module.state_dict().items())
    _, further = train(tmp_path / "run", resume=True, epochs=20, **options)
    assert further.history.sizes["epoch"] > epochs


def test_resume_with_batch_normalisation(tmp_path):
    x = linear_data(40)
    whole, first, second = WithModes(), WithModes(), WithModes()
    options = {"epochs": 4, "batch_size": 20}
    fit(whole.model, whole.guide, x, **options)
    fit(first.model, first.guide, x, checkpoint=tmp_path, **options | {"epochs": 2})
    fit(second.model, second.guide, x, checkpoint=tmp_path, resume=True, **options)
    for name in ("up", "down"):
        theirs = second.nets[name].state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in whole.nets[name].state_dict().items())


def test_resume_of_guessed_plates_and_other_optimizers(tmp_path):
    """Pyro's guess of the plate nesting would draw random numbers in the middle of the run."""
    x = linear_data()
    options = {"optimizer": partial(torch.optim.SGD, lr=1e-3, momentum=0.9), "batch_size": 20,
               "loss": TraceGraph_ELBO(num_particles=2)}  # fmt: skip
    whole, first, second = linear(), linear(), linear(seed=9)
    fit(whole.model, whole.guide, x, epochs=4, **options)
    fit(first.model, first.guide, x, epochs=2, checkpoint=tmp_path, **options)
    fit(second.model, second.guide, x, epochs=4, checkpoint=tmp_path, resume=True, **options)
    assert torch.equal(weights(whole), weights(second))
    options["optimizer"] = partial(torch.optim.SGD, lr=1e-2, momentum=0.9)
    with pytest.raises(CheckpointError, match="optimizer_arguments"):
        fit(second.model, second.guide, x, epochs=5, checkpoint=tmp_path, resume=True, **options)


def test_a_run_is_never_replaced_in_silence(tmp_path):
    train(tmp_path / "run", epochs=3)
    before = (tmp_path / "run" / "training.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"already has a training.safetensors.*resume=True"):
        train(tmp_path / "run", epochs=3)
    assert (tmp_path / "run" / "training.safetensors").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my own")
    with pytest.raises(CheckpointError, match=r"already has a README.md"):
        train(tmp_path / "mine", epochs=3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("my own")
    train(tmp_path / "other", epochs=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        train(tmp_path / "file", epochs=3)


def damage(folder, kind):
    path = folder / "training.safetensors"
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:-9])
    elif kind == "flipped":
        content[-9] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes((folder / "model.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("missing", "does not exist; is .* a run folder"),
        ("truncated", "is damaged"),
        ("flipped", "do not match their sha256"),
        ("another file", "not of a run that this version"),
    ],
)
def test_a_damaged_run_is_refused(tmp_path, kind, match):
    train(tmp_path / "run", epochs=3)
    damage(tmp_path / "run", kind)
    module = vae(seed=99)
    before = weights(module)
    with pytest.raises(CheckpointError, match=match):
        train(tmp_path / "run", module=module, resume=True)
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss": TraceMeanField_ELBO()}, "trained with loss 'Trace_ELBO', not"),
        ({"loss": Trace_ELBO(num_particles=2)}, "num_particles 1, not 2"),
        ({"batch_size": 10}, "batch_size 20, not 10"),
        ({"seed": 7}, "seed 6, not 7"),
        ({"warmup_epochs": 1}, "warmup_epochs 3, not 1"),
        ({"learning_rate": 0.5}, "learning_rate 'a function', not 0.5"),
        ({"optimizer": partial(torch.optim.SGD, lr=0.1)}, "optimizer 'Adam', not 'SGD'"),
        ({"module": VAE(DATA_DIM, LATENT_DIM, hidden=(8,)).double()}, r"hidden \[7\], not \[8\]"),
        ({"config": {"data": {"name": "b"}}}, "data name 'a', not 'b'"),
    ],
)
def test_another_run_is_refused(tmp_path, options, match):
    data = {"config": {"data": {"name": "a"}}}
    train(tmp_path / "run", epochs=3, **data)
    with pytest.raises(CheckpointError, match=match):
        train(tmp_path / "run", resume=True, **data | options)


def test_other_parameters_of_a_program_of_ones_own_are_refused(tmp_path):
    def programs(name):
        def guide(x):
            loc = pyro.param(name, torch.zeros(()))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, 1.0))

        return bare_model, guide

    x = linear_data()[:, 0]
    fit(*programs("a"), x, epochs=1, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="not those of this model"):
        fit(*programs("b"), x, epochs=2, checkpoint=tmp_path, resume=True)


def test_other_data_are_refused(tmp_path):
    x, module = linear_data(), linear()
    fit(module.model, module.guide, x, epochs=1, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="data_sha256"):
        fit(module.model, module.guide, x.flip(0), epochs=2, checkpoint=tmp_path, resume=True)


def test_another_precision_is_said(tmp_path):
    train(tmp_path / "run", epochs=3)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with pytest.warns() as said:
            train(tmp_path / "run", epochs=4, resume=True)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    sentences = " ".join(str(warning.message) for warning in said)
    assert "resuming with bf16 (CPU) precision what was begun with ieee" in sentences


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_small_steps_take_one_thread_and_large_ones_the_callers(two_threads, monkeypatch):
    def threads(found):
        assert torch.get_num_threads() == 2  # the caller's own
        return found.config["fit"]["num_threads"]

    seen = []
    _, one = train(None, epochs=3, transform=lambda x, g: seen.append(torch.get_num_threads()) or
                   binarise(x, g))  # fmt: skip
    assert (threads(one), set(seen)) == (1, {1})
    assert threads(train(None, epochs=3, threads=2)[1]) == 2
    count = one.model.__self__
    multiplications = sum(p.numel() for p in count.parameters()) * 20  # a batch, one particle
    for limit, expected in ((multiplications + 1, 1), (multiplications, 2)):
        monkeypatch.setattr(loop, "_LARGE_STEP", limit)
        assert threads(train(None, epochs=3)[1]) == expected


def test_a_resumed_run_takes_the_threads_it_was_begun_with(tmp_path, two_threads):
    train(tmp_path / "run", epochs=3, threads=2)
    torch.set_num_threads(1)
    _, found = train(tmp_path / "run", epochs=4, resume=True)
    assert found.config["fit"]["num_threads"] == 2
    with pytest.warns(UserWarning, match="resuming with 1 threads what was begun with 2"):
        train(tmp_path / "run", epochs=5, resume=True, threads=1)


ENDLESS = """
import sys, torch
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
from test_svi import fit, linear, linear_data
module = linear()
fit(module.model, module.guide, linear_data(4), epochs=10**6, evaluate_every=10**6,
    checkpoint=sys.argv[1], checkpoint_every=1, resume=sys.argv[2] == "True")
"""


def kill_while_it_writes(folder, reached, wait, resume):
    """Kill -9 of a process that writes after every epoch, `wait` seconds after some epochs."""
    command = [sys.executable, "-c", ENDLESS, str(folder), str(resume)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    path = folder / "training.safetensors"
    deadline = time.monotonic() + 90
    with subprocess.Popen(command, env=environment) as child:
        try:
            while time.monotonic() < deadline and not (
                path.exists() and state_of(folder)[1]["epoch"] > reached
            ):
                assert child.poll() is None
                time.sleep(0.01)
            time.sleep(wait)
        finally:
            child.kill()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_killed_run_can_be_resumed(tmp_path):
    folder, reached = tmp_path / "run", -1
    for attempt, wait in enumerate((0.0037, 0.0011)):
        kill_while_it_writes(folder, reached, wait, resume=attempt > 0)
        tensors, state = state_of(folder)
        assert state["epoch"] > reached
        assert state["status"] == "interrupted"
        assert all(t.isfinite().all() for n, t in tensors.items() if n.startswith("parameter."))
        if (folder / "model.safetensors").exists():
            load_tensors(folder / "model.safetensors")
        reached = state["epoch"]
    module = linear()
    found = fit(module.model, module.guide, linear_data(4), epochs=reached + 1, checkpoint=folder,
                resume=True)  # fmt: skip
    assert found.status == "finished"
