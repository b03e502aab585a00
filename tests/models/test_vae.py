"""The VAE's programs against their formulas written out in plain torch, at float64."""

import copy
import itertools
import json
import math
from typing import Any, cast

import jaxtyping
import numpy as np
import pyro
import pytest
import torch
from cases import pairs
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from pyro_vae import fit, load_run, log_evidence
from pyro_vae.inference.estimators.bounds import DReG, StickingTheLanding
from pyro_vae.inference.programs import inspect_programs
from pyro_vae.inference.svi import load_tensors
from pyro_vae.models import VAE, FullPosterior, Gaussian, TwoLayerVAE

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


# --- parts ----------------------------------------------------------------------------------------

IMAGE_DIM = 9
PRIORS: dict[str, dict[str, Any]] = {
    "normal": {"name": "normal"},
    "mixture": {"name": "mixture", "num_components": 2},
    "vamp": {"name": "vamp", "num_pseudo_inputs": 3},
    "coupling": {"name": "flow", "num_steps": 2, "hidden": [4]},
    "autoregressive": {"name": "flow", "kind": "autoregressive", "num_steps": 1, "hidden": [4]},
}
POSTERIORS: dict[str, dict[str, Any]] = {
    "diagonal": {"name": "diagonal"},
    "full": {"name": "full"},
    "low_rank": {"name": "low_rank", "rank": 1},
    "iaf": {"name": "iaf", "num_steps": 2, "hidden": [4], "context_dim": 2},
}
NETWORKS: list[Any] = ["mlp", {"name": "conv", "channels": [2], "image_shape": [3, 3]}, "residual"]
PIXELS: list[Any] = [
    "bernoulli",
    "continuous_bernoulli",
    "gaussian",
    {"name": "gaussian", "scale": "pixel"},
    {"name": "categorical", "levels": 3},
    {"name": "discretized_logistic", "levels": 3},
    {"name": "discretized_logistic", "levels": 3, "components": 2, "scale": "shared"},
]
MEASURES = ["binary", "grey", "real", "real", "counts", "counts", "counts"]


def pixels(measure, num=7):
    levels = torch.randint(2 if measure == "binary" else 3, (num, IMAGE_DIM))
    return levels.double() / (1 if measure == "binary" else 2)


def walk(vae, x, measure, folder):
    """Trains, saves, loads, evaluates and samples; returns the evaluation of what was loaded."""
    found = fit(vae.model, vae.guide, x, epochs=2, batch_size=4, checkpoint=folder, progress=False)
    assert found.history.bound.attrs["bound"] == "lower"
    assert found.history.bound.attrs["measure"] == measure
    described = json.loads((folder / "config.json").read_text())["model"]
    assert described["class"] == type(vae).__name__
    with torch.device("meta"):  # as `load_run` does
        again = type(vae)(**described["arguments"])
    weights, _ = load_tensors(folder / "model.safetensors")
    again.load_state_dict(weights, assign=True)
    assert all(value.is_floating_point() for value in weights.values())
    results = [
        log_evidence(m.model, m.guide, x, num_particles=6, progress=False) for m in (vae, again)
    ]
    assert results[0].log_evidence.equals(results[1].log_evidence)
    assert results[1].log_evidence.attrs["measure"] == measure
    assert bool(np.isfinite(results[1].log_evidence).all())
    copy.deepcopy(vae)  # nothing of a run stays in the module
    for mean in (True, False):
        assert again.sample(5, mean=mean).shape == (5, IMAGE_DIM)
    again.likelihood.check(again.sample(5, mean=False))
    assert again.reconstruct(x).shape == x.shape
    return results[1]


@pytest.mark.parametrize(("prior", "posterior"), pairs(list(PRIORS), list(POSTERIORS)))
def test_every_prior_goes_with_every_posterior(prior, posterior, tmp_path):
    """And every likelihood with every network: they take turns."""
    turn = list(PRIORS).index(prior) * len(POSTERIORS) + list(POSTERIORS).index(posterior)
    vae = VAE(
        IMAGE_DIM,
        2,
        (4,),
        PIXELS[turn % len(PIXELS)],
        prior=PRIORS[prior],
        posterior=POSTERIORS[posterior],
        network=NETWORKS[turn % len(NETWORKS)],
    )
    measure = MEASURES[turn % len(PIXELS)]
    evaluated = walk(vae, pixels(measure), measure, tmp_path / "run")
    run = load_run(tmp_path / "run")
    again = log_evidence(run.model, run.guide, pixels(measure), num_particles=2, progress=False)
    assert again.log_evidence.attrs["measure"] == evaluated.log_evidence.attrs["measure"]


def test_the_turns_meet_every_likelihood_with_every_network(tmp_path):
    met = {(turn % len(PIXELS), turn % len(NETWORKS)) for turn in range(20)}
    missing = set(itertools.product(range(len(PIXELS)), range(len(NETWORKS)))) - met
    assert len(missing) == 1
    ((likelihood, network),) = missing
    vae = VAE(IMAGE_DIM, 2, (4,), PIXELS[likelihood], network=NETWORKS[network])
    walk(vae, pixels(MEASURES[likelihood]), MEASURES[likelihood], tmp_path / "run")


@pytest.mark.parametrize(
    ("prior", "posterior"), pairs([name for name in PRIORS if name != "vamp"], list(POSTERIORS))
)
def test_two_layers_go_with_every_prior_and_posterior(prior, posterior, tmp_path):
    turn = list(PRIORS).index(prior) + list(POSTERIORS).index(posterior)
    vae = TwoLayerVAE(
        IMAGE_DIM,
        (3, 2),
        ((5,), (4,)),
        PIXELS[turn % len(PIXELS)],
        prior=PRIORS[prior],
        posterior=POSTERIORS[posterior],
        network=NETWORKS[turn % len(NETWORKS)],
    )
    measure = MEASURES[turn % len(PIXELS)]
    walk(vae, pixels(measure), measure, tmp_path / "run")


@pytest.mark.parametrize("posterior", ["diagonal", "iaf"])
@pytest.mark.parametrize("prior", ["normal", "vamp", "coupling"])
def test_particles_run_in_one_tensor_program_and_scores_can_be_had(prior, posterior):
    for network in NETWORKS:
        vae = VAE(
            IMAGE_DIM,
            2,
            (4,),
            prior=PRIORS[prior],
            posterior=POSTERIORS[posterior],
            network=network,
        )
        x = pixels("binary")
        structure = inspect_programs(vae.model, vae.guide, ((x,), {}))
        assert structure.vectorizable
        assert structure.replayable
        for estimator in (DReG(3), StickingTheLanding(3)):  # need log q at given latents
            loss = estimator.differentiable_loss(vae.model, vae.guide, x)
            gradients = torch.autograd.grad(loss, list(vae.parameters()), allow_unused=True)
            assert all(g is None or g.isfinite().all() for g in gradients)


def test_svi_moves_every_parameter_of_the_parts():
    vae = VAE(
        IMAGE_DIM,
        2,
        (4,),
        PIXELS[-1],
        prior=PRIORS["mixture"],
        posterior=POSTERIORS["iaf"],
        network=NETWORKS[1],
    )
    deep = TwoLayerVAE(IMAGE_DIM, (3, 2), ((5,), (4,)), prior=PRIORS["mixture"])
    for model, x in ((vae, pixels("counts")), (deep, pixels("binary"))):
        pyro.clear_param_store()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        svi = SVI(
            model.model, model.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(max_plate_nesting=1)
        )
        for _ in range(2):
            svi.step(x)
        still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
        assert not still


def test_the_vamp_prior_trains_the_encoder_from_the_model():
    """So that a model with another guide has its parameters registered, too."""
    vae, x = VAE(IMAGE_DIM, 2, (4,), prior=PRIORS["vamp"]), pixels("binary")
    trace = poutine.trace(poutine.condition(vae.model, {"z": torch.zeros(7, 2)})).get_trace(x)
    names = {name.split("$$$")[0] for name in trace.param_nodes}
    assert {"encoder", "prior"} <= names


def test_log_weights_of_two_layers_by_hand():
    deep = TwoLayerVAE(DATA_DIM, (3, 2), ((7,), (5,)))
    x = data()
    guide_trace = poutine.trace(deep.guide).get_trace(x)
    model_trace = poutine.trace(poutine.replay(deep.model, guide_trace)).get_trace(x)
    z1, z2 = (guide_trace.nodes[name]["value"].detach() for name in ("z1", "z2"))
    assert z1.shape == (NUM_DATA, 3)
    assert z2.shape == (NUM_DATA, 2)

    def conditional(layers, inputs, value):
        loc, raw_scale = network(layers, inputs).chunk(2, dim=-1)
        return log_normal(value, loc, 1e-6 + torch.log1p(raw_scale.exp()))

    log_q = conditional(deep.encoder, x, z1) + conditional(deep.upper_encoder, z1, z2)
    log_p = log_normal(z2, torch.zeros_like(z2), torch.ones_like(z2))
    log_p = log_p + conditional(deep.upper_decoder, z2, z1)
    output = network(deep.decoder, z1)
    log_p = log_p + (x * output - torch.log1p(output.exp())).sum(-1)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    found_q = sum(guide_trace.nodes[name]["log_prob"] for name in ("z1", "z2"))
    found_p = sum(model_trace.nodes[name]["log_prob"] for name in ("z2", "z1", "x"))
    torch.testing.assert_close((found_p - found_q).detach(), (log_p - log_q).detach())
    upside_down = conditional(deep.upper_decoder, z2, z1.roll(1, 0))
    assert not torch.allclose(conditional(deep.upper_decoder, z2, z1), upside_down)


def test_the_two_layer_model_of_the_iwae_paper():
    deep = TwoLayerVAE(784)
    layers = [(784, 200), (200, 200), (200, 200), (100, 100), (100, 100), (100, 100)]  # q
    layers += [(50, 100), (100, 100), (100, 200), (100, 200), (200, 200), (200, 784)]  # p
    assert sum(p.numel() for p in deep.parameters()) == sum(a * b + b for a, b in layers)
    again = TwoLayerVAE(**json.loads(json.dumps(deep.config)))
    assert again.config == deep.config


def test_samples_of_two_layers_come_from_the_top():
    deep = TwoLayerVAE(DATA_DIM, (3, 2), ((7,), (5,)))
    draws = deep.sample(9, generator=torch.Generator().manual_seed(2))
    assert torch.equal(draws, deep.sample(9, generator=torch.Generator().manual_seed(2)))
    with torch.no_grad():
        for parameter in deep.upper_decoder.parameters():
            parameter.zero_()
        cast(Any, deep.upper_decoder)[-1].bias[3:] = -1e4  # p(z1 | z2) is a point at 0
    torch.testing.assert_close(
        deep.sample(4), deep.decode(torch.zeros(4, 3)).detach(), rtol=0, atol=1e-4
    )


def test_parts_that_cannot_stand_together_say_why(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # ours, as users meet it
    with pytest.raises(ValueError, match="'mixture' or 'flow'"):
        TwoLayerVAE(DATA_DIM, (3, 2), ((7,), (5,)), prior="vamp")
    with pytest.raises(ValueError, match="posterior of its own"):
        TwoLayerVAE(DATA_DIM, (3, 2), posterior=cast(Any, FullPosterior(3)))
    with pytest.raises(ValueError, match="two entries"):
        TwoLayerVAE(DATA_DIM, (3, 2, 1))
    with pytest.raises(ValueError, match="posterior='diagonal'"):
        VAE(DATA_DIM, 1, posterior="iaf")
    with pytest.raises(ValueError, match="latent_dim=3"):
        VAE(DATA_DIM, LATENT_DIM, posterior=FullPosterior(2))
    with pytest.raises(ValueError, match="not a square picture"):
        VAE(DATA_DIM, LATENT_DIM, network="conv")
    for part in ("prior", "posterior", "network"):
        with pytest.raises(ValueError, match="choose one of"):
            VAE(DATA_DIM, LATENT_DIM, **cast(Any, {part: "unknown"}))
