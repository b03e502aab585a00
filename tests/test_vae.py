"""The VAE's programs against their formulas written out in plain torch, at float64."""

import json
import math

import jaxtyping
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from pyro_vae.models import VAE, Gaussian

NUM_DATA, DATA_DIM, LATENT_DIM, HIDDEN = 4, 6, 3, (7, 5)
LIKELIHOODS = [
    "bernoulli",
    "continuous_bernoulli",
    {"name": "gaussian", "scale": 0.3},
    {"name": "gaussian", "scale": "shared"},
    {"name": "gaussian", "scale": "pixel"},
]
STANDARD_ERRORS = 5  # a two-sided failure rate of 6e-7 a number


def build(likelihood="bernoulli"):
    return VAE(DATA_DIM, LATENT_DIM, HIDDEN, likelihood).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, (NUM_DATA, DATA_DIM), generator=generator).double()


def network(layers, inputs):
    """A perceptron with tanh, from its state only."""
    tensors = list(layers.state_dict().values())
    for weight, bias in zip(tensors[:-2:2], tensors[1:-2:2], strict=True):
        inputs = torch.tanh(inputs @ weight.T + bias)
    return inputs @ tensors[-2].T + tensors[-1]


def log_normal(value, loc, scale):
    return (-0.5 * ((value - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def log_likelihood(vae, likelihood, x, z):
    output = network(vae.decoder, z)
    if likelihood == "bernoulli":
        return (x * output - torch.log1p(output.exp())).sum(-1)
    if likelihood == "continuous_bernoulli":
        return (x * output - (output.expm1() / output).log()).sum(-1)
    if likelihood["scale"] == "pixel":
        return log_normal(x, output[..., :DATA_DIM], 1e-3 + output[..., DATA_DIM:].exp())
    if likelihood["scale"] == "shared":
        raw_scale = vae.state_dict()["likelihood.raw_scale"]
        return log_normal(x, output, (1e-3 + raw_scale.exp()).expand(DATA_DIM))
    return log_normal(x, output, torch.full((DATA_DIM,), 0.3, dtype=torch.float64))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_programs_have_the_hand_written_log_densities(likelihood):
    vae, x = build(likelihood), data()
    guide_trace = poutine.trace(vae.guide).get_trace(x)
    model_trace = poutine.trace(poutine.replay(vae.model, guide_trace)).get_trace(x)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    z = guide_trace.nodes["z"]["value"].detach()
    assert z.shape == (NUM_DATA, LATENT_DIM)
    loc, raw_scale = network(vae.encoder, x).split(LATENT_DIM, dim=-1)
    scale = 1e-6 + torch.log1p(raw_scale.exp())
    zero, one = torch.zeros_like(z), torch.ones_like(z)
    for trace, site, expected in [
        (guide_trace, "z", log_normal(z, loc, scale)),
        (model_trace, "z", log_normal(z, zero, one)),
        (model_trace, "x", log_likelihood(vae, likelihood, x, z)),
    ]:
        torch.testing.assert_close(trace.nodes[site]["log_prob"].detach(), expected)
    assert model_trace.nodes["x"]["is_observed"]
    assert {f.name for f in model_trace.nodes["x"]["cond_indep_stack"]} == {"data"}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_vectorised_particles_estimate_the_same_elbo(likelihood):
    """Trace_ELBO against the mean of hand-written log weights, and against a wrong one."""
    vae, x, num = build(likelihood), data(), 4000
    with torch.no_grad():
        loc, raw_scale = network(vae.encoder, x).split(LATENT_DIM, dim=-1)
        scale = 1e-6 + torch.log1p(raw_scale.exp())
        z = loc + scale * torch.randn(num, NUM_DATA, LATENT_DIM, dtype=torch.float64)
        prior = log_normal(z, torch.zeros_like(z), torch.ones_like(z))
        weights = log_likelihood(vae, likelihood, x, z) + prior - log_normal(z, loc, scale)
        weights = weights.sum(-1)
    elbo = Trace_ELBO(num_particles=num, vectorize_particles=True, max_plate_nesting=1)
    estimate = -elbo.loss(vae.model, vae.guide, x)
    error = (2 * weights.var() / num).sqrt()
    assert abs(estimate - weights.mean()) < STANDARD_ERRORS * error
    assert abs(estimate - (weights.mean() - prior.sum(-1).mean())) > STANDARD_ERRORS * error


def test_decoder_and_means_broadcast_over_particles():
    vae = build({"name": "gaussian", "scale": "pixel"})
    z = torch.randn(2, 5, NUM_DATA, LATENT_DIM, dtype=torch.float64)
    means = vae.decode(z)
    assert means.shape == (2, 5, NUM_DATA, DATA_DIM)
    expected = network(vae.decoder, z[1, 3, 2])[:DATA_DIM]
    torch.testing.assert_close(means[1, 3, 2].detach(), expected)


@pytest.mark.parametrize("likelihood", ["bernoulli", {"name": "gaussian", "scale": "shared"}])
def test_svi_moves_every_parameter(likelihood):
    vae = build(likelihood)
    pyro.clear_param_store()
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    optimizer = pyro.optim.Adam({"lr": 1e-2})
    SVI(vae.model, vae.guide, optimizer, Trace_ELBO(max_plate_nesting=1)).step(data())
    for name, parameter in vae.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    names = {name.split("$$$")[0] for name in pyro.get_param_store()}
    assert names == {"encoder", "decoder"} | (
        {"likelihood"} if likelihood != "bernoulli" else set()
    )


def test_the_guides_scale_is_positive_however_extreme_the_encoder():
    vae = build().float()
    x = data().float()
    with torch.no_grad():
        for raw_scale in (-1e4, 1e4):
            vae.encoder[-1].bias[LATENT_DIM:] = raw_scale
            scale = vae.encode(x).stddev
            assert scale.isfinite().all()
            assert (scale >= 1e-6).all()


def test_reconstruct_decodes_the_posterior_mean():
    vae, x = build(), data()
    loc = network(vae.encoder, x)[:, :LATENT_DIM]
    expected = torch.sigmoid(network(vae.decoder, loc))
    torch.testing.assert_close(vae.reconstruct(x).detach(), expected)


def test_samples_are_means_or_draws_of_the_prior_predictive():
    vae, num = build(), 5000
    means = vae.sample(num, generator=torch.Generator().manual_seed(2))
    draws = vae.sample(num, mean=False, generator=torch.Generator().manual_seed(2))
    z = torch.randn(
        num, LATENT_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    torch.testing.assert_close(means, torch.sigmoid(network(vae.decoder, z)))
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    error = (means * (1 - means)).mean(0).sqrt() / math.sqrt(num)
    assert (abs(draws.mean(0) - means.mean(0)) < STANDARD_ERRORS * error).all()
    assert (abs(1 - draws.mean(0) - means.mean(0)) > STANDARD_ERRORS * error).any()


@pytest.mark.parametrize("mean", [True, False])
def test_a_generator_advances_and_leaves_the_global_stream_alone(mean):
    vae, generator = build(), torch.Generator().manual_seed(3)
    state = torch.get_rng_state()
    first, second = (vae.sample(9, mean=mean, generator=generator) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    again = vae.sample(9, mean=mean, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, again)
    vae.sample(9, mean=mean)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_config_rebuilds_the_architecture(likelihood):
    vae = VAE(DATA_DIM, LATENT_DIM, HIDDEN, likelihood, activation="relu").double()
    config = json.loads(json.dumps(vae.config))
    again = VAE(**config).double()
    assert again.config == config
    again.load_state_dict(vae.state_dict())
    assert torch.equal(again.reconstruct(data()), vae.reconstruct(data()))


def test_the_lectures_architecture():
    vae = VAE.lecture()
    expected = (784 * 400 + 400) + (400 * 40 + 40) + (20 * 400 + 400) + (400 * 784 + 784)
    assert sum(p.numel() for p in vae.parameters()) == expected
    assert vae.likelihood.measure == "binary"


@pytest.mark.parametrize("program", ["model", "guide", "encode", "reconstruct"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x[:, :-1], "shape"),
        (lambda x: x.reshape(NUM_DATA, 2, 3), "flatten"),
        (lambda x: x[:0], "at least one"),
        (lambda x: x.float(), "float64"),
        (lambda x: x.long(), "float64"),
        (lambda x: x / 0, "NaN or infinite"),
    ],
)
def test_data_that_cannot_be_taken_are_refused(program, spoil, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # ours, as users meet it
    with pytest.raises(ValueError, match=message):
        getattr(build(), program)(spoil(data()))


def test_grey_pixels_are_refused_by_a_bernoulli_only():
    grey = 0.5 * data()
    with pytest.raises(ValueError, match="continuous_bernoulli"):
        build().model(grey)
    build("continuous_bernoulli").model(grey)
    build(Gaussian(0.3)).model(grey)


def test_unknown_parts_are_refused():
    with pytest.raises(ValueError, match="likelihood"):
        build("poisson")
    with pytest.raises(ValueError, match="activation"):
        VAE(DATA_DIM, LATENT_DIM, activation="step")
