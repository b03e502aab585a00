"""Autoencoders against PCA, soft-thresholding, the Wiener filter and the explicit Jacobian."""

import functools
import json
import math
from typing import Any

import jaxtyping
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.nn import functional

from pyro_vae import compare_estimators, elbo_gap, fit, log_evidence, log_weights
from pyro_vae.diagnostics.posterior import posterior_quality
from pyro_vae.inference.programs import ProgramError
from pyro_vae.models import Autoencoder, Contractive, Denoising, Sparse, Undercomplete
from pyro_vae.models.autoencoder import make_kind, squared_jacobian_norm
from pyro_vae.models.parts import mlp

NUM_DATA, DATA_DIM, CODE_DIM = 40, 5, 2
KINDS = ["undercomplete", "sparse", "denoising", {"name": "denoising", "noise": "gaussian"}]
KINDS += ["contractive"]
GAUSSIAN = {"name": "gaussian", "scale": 1.0}
SPECTRUM = torch.tensor([4.0, 2.25, 0.49, 0.25, 0.09], dtype=torch.float64)
RESIDUAL = float(SPECTRUM[CODE_DIM:].sum())  # what PCA leaves
LOG_NORMALISER = 0.5 * DATA_DIM * math.log(2 * math.pi)
STANDARD_ERRORS = 5  # a two-sided failure rate of 6e-7 a number


def data(num=NUM_DATA):
    """With a spectrum that training gets through soon; `SPECTRUM` for all of it."""
    generator = torch.Generator().manual_seed(1)
    draws = torch.randn(NUM_DATA, DATA_DIM, generator=generator)
    axes = torch.linalg.qr(torch.randn(DATA_DIM, DATA_DIM, generator=generator)).Q
    white = math.sqrt(NUM_DATA) * torch.linalg.qr(draws - draws.mean(0)).Q
    return ((white * SPECTRUM.sqrt()) @ axes.mT + torch.arange(5) / 5)[:num]


def linear(kind="undercomplete", code_dim=CODE_DIM):
    return Autoencoder(DATA_DIM, code_dim, (), kind, GAUSSIAN)


def objective(autoencoder, x):
    """Minus the loss of each datum in nats, by Pyro's own ELBO."""
    elbo = Trace_ELBO(max_plate_nesting=1)
    with pyro.get_param_store().scope():
        return -elbo.loss(autoencoder.model, autoencoder.guide, x) / len(x)


def train(model, guide, x, epochs, optimizer=None):
    """Full batches and a step size that ends at zero, so that closed forms are reached."""
    return fit(
        model,
        guide,
        x,
        epochs=epochs,
        batch_size=len(x),
        evaluate_every=epochs,
        optimizer=optimizer or functools.partial(torch.optim.Adam, betas=(0.9, 0.99)),
        learning_rate=lambda epoch: 0.075 * (1 + math.cos(math.pi * epoch / epochs)) + 1e-6,
        progress=False,
    )


# --- the linear ones, in closed form --------------------------------------------------------------


@pytest.mark.timeout(60)
def test_a_linear_autoencoder_reaches_the_pca_residual():
    x, autoencoder = data(), linear()
    train(autoencoder.model, autoencoder.guide, x, 400)
    error = (x - autoencoder.reconstruct(x)).detach().square().sum(1).mean()
    assert RESIDUAL - 1e-12 < error < RESIDUAL + 1e-6
    assert objective(autoencoder, x) == pytest.approx(float(-error / 2 - LOG_NORMALISER))
    assert error < RESIDUAL + SPECTRUM[1] - 1e-3  # what one component fewer would leave


def soft_threshold(h, threshold):
    return h.sign() * (h.abs() - threshold).clamp(min=0)


def orthonormal_sparse(strength, scale):
    """A decoder with orthonormal columns, under a Gaussian of that scale."""
    autoencoder = Autoencoder(
        DATA_DIM, 3, (), Sparse(strength), {"name": "gaussian", "scale": scale}
    )
    weight = torch.linalg.qr(torch.randn(DATA_DIM, 3)).Q
    with torch.no_grad():
        out = next(m for m in autoencoder.decoder.modules() if isinstance(m, torch.nn.Linear))
        out.weight.copy_(weight)
        out.bias.zero_()
    return autoencoder, weight


@pytest.mark.parametrize(("strength", "scale"), [(1.3, 1.0), (4.0, 0.5)])
def test_the_sparse_code_of_an_orthonormal_decoder_is_soft_thresholding(strength, scale):
    autoencoder, weight = orthonormal_sparse(strength, scale)
    threshold = strength * scale**2
    # Clear of the threshold, where descent is slow; and a part that the decoder cannot reach.
    inner = torch.tensor([-2.5, -0.6, 0.0, 0.3, 1.7, 4.0, 0.5]) * threshold
    inner = torch.stack([inner, inner.roll(2), -inner.roll(3)], dim=1)
    x = inner @ weight.mT + data(7) @ (torch.eye(DATA_DIM) - weight @ weight.mT)
    for parameter in autoencoder.parameters():
        parameter.requires_grad_(False)

    def guide(x):
        code = pyro.param("code", torch.zeros(len(x), 3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(code, event_dim=1))

    plain = functools.partial(torch.optim.SGD, lr=0.1)  # at a kink, Adam's steps do not shrink
    found = train(autoencoder.model, guide, x, 300, plain)
    code = found.parameters["code"]
    expected = soft_threshold(inner, threshold)
    assert (expected == 0).sum() == 12
    torch.testing.assert_close(code, expected, rtol=0, atol=1e-3)
    assert (code - soft_threshold(inner, 1.1 * threshold)).abs().max() > 0.05


def test_the_sparse_penalty_is_the_l1_norm():
    autoencoder, _ = orthonormal_sparse(1.7, 1.0)
    x = data(7)
    code = autoencoder.encode(x).detach()
    error = 0.5 * (x - autoencoder.reconstruct(x)).detach().square().sum(1)
    constant = LOG_NORMALISER - 3 * math.log(1.7 / 2)
    expected = -(error + 1.7 * code.abs().sum(1)).mean() - constant
    assert objective(autoencoder, x) == pytest.approx(float(expected), rel=1e-12)


def moments(kind, x):
    """Of clean and corrupted data: cov(x, noisy), cov(noisy), mean(noisy), in closed form."""
    mean = x.mean(0)
    cov = (x - mean).mT @ (x - mean) / len(x)
    if kind.noise == "gaussian":
        return cov, cov + kind.level**2 * torch.eye(DATA_DIM), mean
    keep = 1 - kind.level
    variance = keep * kind.level * (cov.diagonal() + mean**2)
    return keep * cov, keep**2 * cov + variance.diag(), keep * mean


def denoising_loss(x, weight, bias, kind):
    """The expected squared error of an affine denoiser over the noise, in closed form."""
    cross, noisy, noisy_mean = moments(kind, x)
    mean = x.mean(0)
    cov = (x - mean).mT @ (x - mean) / len(x)
    offset = mean - weight @ noisy_mean - bias
    return (
        cov.trace()
        - 2 * (weight @ cross.mT).trace()
        + (weight @ noisy @ weight.mT).trace()
        + offset.square().sum()
    )


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [Denoising("gaussian", 1.5), Denoising("mask", 0.4)])
def test_the_linear_denoiser_reaches_the_wiener_solution(kind):
    x = data()
    cross, noisy, noisy_mean = moments(kind, x)
    wiener = torch.linalg.solve(noisy, cross.mT).mT
    best = denoising_loss(x, wiener, x.mean(0) - wiener @ noisy_mean, kind)
    identity = denoising_loss(x, torch.eye(DATA_DIM), torch.zeros(DATA_DIM), kind)
    autoencoder = linear(kind, code_dim=DATA_DIM)
    many = x.repeat(25, 1)  # the same data, with more draws of the noise in each step
    train(autoencoder.model, autoencoder.guide, many, 250)
    into, out = autoencoder.encoder[0], autoencoder.decoder[0]
    weight = (out.weight @ into.weight).detach()
    bias = (out.weight @ into.bias + out.bias).detach()
    loss = denoising_loss(x, weight, bias, kind)
    # Half as many parameters as draws of a step would cost that share of the loss; far less here.
    assert best <= loss < best * (1 + 5e-3)
    assert identity > best * 1.3
    torch.testing.assert_close(weight, wiener, rtol=0, atol=0.05)


def test_corruption_has_the_stated_moments_and_scores_the_clean_x():
    x = torch.full((1, 20_000), 2.0)
    masked = Denoising("mask", 0.3).corrupt(x)
    assert set(masked.unique().tolist()) == {0.0, 2.0}
    error = math.sqrt(0.3 * 0.7 / x.numel())
    assert abs(float((masked == 0).double().mean()) - 0.3) < STANDARD_ERRORS * error
    noisy = Denoising("gaussian", 0.5).corrupt(x)
    assert abs(float(noisy.mean()) - 2) < STANDARD_ERRORS * 0.5 / math.sqrt(x.numel())
    assert abs(float(noisy.std()) - 0.5) < STANDARD_ERRORS * 0.5 / math.sqrt(2 * x.numel())
    autoencoder, x = linear({"name": "denoising", "level": 0.9}), data(6)
    trace = poutine.trace(autoencoder.guide).get_trace(x)
    assert not torch.allclose(trace.nodes["z"]["value"], autoencoder.encode(x))
    again = poutine.trace(poutine.replay(autoencoder.model, trace)).get_trace(x)
    assert torch.equal(again.nodes["x"]["value"], x)


# --- the contractive penalty ----------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu", "gelu", "softplus"])
@pytest.mark.parametrize("hidden", [(), (7,), (7, 4)])
def test_the_contractive_penalty_is_that_of_the_explicit_jacobian(hidden, activation):
    network, x = mlp(DATA_DIM, hidden, 3, activation), data(4)

    def explicit():
        rows = [
            torch.autograd.functional.jacobian(network, row, create_graph=True).square().sum()
            for row in x
        ]
        return torch.stack(rows)

    penalty, expected = squared_jacobian_norm(network, x), explicit()
    torch.testing.assert_close(penalty, expected, rtol=1e-12, atol=1e-12)
    assert penalty.shape == (4,)
    weights = [p for p in network.parameters() if p.dim() == 2]  # and so do its gradients
    given, wanted = (torch.autograd.grad(v.sum(), weights) for v in (penalty, expected))
    torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-10)


def test_the_contractive_penalty_of_other_networks_and_its_place_in_the_objective():
    x = data(4)
    network = {"name": "conv", "image_shape": (1, 5), "channels": (2,)}
    autoencoder = Autoencoder(DATA_DIM, CODE_DIM, (3,), Contractive(0.7), GAUSSIAN, "tanh", network)
    jacobians = [torch.autograd.functional.jacobian(autoencoder.encoder, row) for row in x]
    penalty = torch.stack([j.square().sum() for j in jacobians])
    torch.testing.assert_close(autoencoder.contraction(x).detach(), penalty)
    error = 0.5 * (x - autoencoder.reconstruct(x)).detach().square().sum(1)
    expected = -(error + 0.7 * penalty).mean() - LOG_NORMALISER
    assert objective(autoencoder, x) == pytest.approx(float(expected), rel=1e-10)


def test_contraction_contracts():
    x, norms = data(), []
    for strength in (1e-6, 1.0):
        torch.manual_seed(0)
        autoencoder = Autoencoder(
            DATA_DIM, CODE_DIM, (6,), {"name": "contractive", "strength": strength}, GAUSSIAN
        )
        fit(autoencoder.model, autoencoder.guide, x, epochs=60, learning_rate=0.02, progress=False)
        norms.append(float(autoencoder.contraction(x).detach().mean()))
    assert norms[1] < 0.5 * norms[0]


# --- from the point to the posterior --------------------------------------------------------------


def variational(autoencoder, scale, prior=None):
    """The two changes of the module's docstring; without a prior the flat one stays."""

    def model(x):
        pyro.module("decoder", autoencoder.decoder)
        with pyro.plate("data", len(x)):
            flat = autoencoder.kind.prior(x.new_zeros(autoencoder.code_dim))
            z = pyro.sample("z", prior or flat)
            pyro.sample("x", autoencoder.likelihood.distribution(autoencoder.decoder(z)), obs=x)

    def guide(x):
        pyro.module("encoder", autoencoder.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(autoencoder.encode(x), scale).to_event(1))

    return model, guide


def entropy(scale):
    return CODE_DIM * (0.5 * math.log(2 * math.pi * math.e) + math.log(scale))


@pytest.mark.parametrize("scale", [0.5, 0.05, 0.005])
def test_a_vae_with_a_shrinking_guide_tends_to_the_autoencoder(scale):
    """For a linear decoder the distance is s^2 |W|^2 / 2, exactly."""
    autoencoder, x, num = linear(), data(8), 4000
    model, guide = variational(autoencoder, scale)
    weights = log_weights(model, guide, x, num, seed=0).detach()  # the entropy by the same draws
    reached = (weights - entropy(scale)).mean()
    error = weights.mean(1).std() / math.sqrt(num)
    distance = scale**2 * autoencoder.decoder[0].weight.detach().square().sum() / 2
    point = objective(autoencoder, x)
    assert abs(reached - (point - distance)) < STANDARD_ERRORS * error
    if scale == 0.5:
        assert abs(reached - point) > STANDARD_ERRORS * error


@pytest.mark.timeout(60)
def test_training_the_vae_with_a_tiny_guide_reaches_the_autoencoders_residual():
    x, scale, autoencoder = data(), 1e-4, linear()
    wide = dist.Normal(torch.zeros(CODE_DIM), 1e3).to_event(1)  # a proper prior, nearly flat
    model, guide = variational(autoencoder, scale, wide)
    found = train(model, guide, x, 250)
    error = (x - autoencoder.reconstruct(x)).detach().square().sum(1).mean()
    assert error < RESIDUAL + 1e-3
    assert found.history.bound.attrs["bound"] == "lower"  # this one has a density, and is a bound


def test_a_guide_without_a_density_bounds_nothing():
    for kind in KINDS:
        autoencoder, x = linear(kind), data(6)
        found = fit(autoencoder.model, autoencoder.guide, x, epochs=1, progress=False)
        assert found.history.bound.attrs["bound"] == "objective"
        assert found.history.loss.attrs["bound"] == "objective"
        assert "kl" not in found.history
        assert "objective" in found.summary()
        assert "bound" not in found.summary()


SENTENCE = (
    "the guide's site 'z' is a Delta: a point has no density, so its objective is a MAP objective "
    "and neither a bound nor an importance weight exists"
)
TOOLS: dict[str, Any] = {
    "log_weights": lambda m, g, x: log_weights(m, g, x, 2),
    **{
        f"log_evidence, {method}": functools.partial(log_evidence, method=method)
        for method in ("importance", "annealed", "bidirectional", "bridge", "quadrature")
    },
    "elbo_gap": elbo_gap,
    "elbo_gap, annealed": functools.partial(elbo_gap, evidence="annealed"),
    "posterior_quality": posterior_quality,
    "compare_estimators": functools.partial(compare_estimators, num_particles=[2], repeats=8),
    "compare_estimators, Pyro's": functools.partial(
        compare_estimators, estimators=[Trace_ELBO()], num_particles=[2], repeats=8
    ),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_tool_refuses_a_point_with_one_sentence(kind, tool):
    """Also where a flat prior is a second reason why there is no evidence."""
    autoencoder, x = linear(kind), data(6)
    with pytest.raises(ProgramError) as refused:
        TOOLS[tool](autoencoder.model, autoencoder.guide, x)
    assert str(refused.value).startswith(SENTENCE)


def test_a_flat_prior_is_refused_where_the_guide_is_no_reason():
    for kind in ("undercomplete", "denoising"):
        autoencoder, x = linear(kind), data(6)
        model, guide = variational(autoencoder, 0.5)
        for given in (guide, None):
            with pytest.raises(ProgramError, match="latent site 'z' is improper"):
                log_evidence(model, given, x, method="annealed")
    sparse, x = linear("sparse"), data(6)  # has a proper prior, so a guide is all that it lacks
    found = log_evidence(sparse.model, None, x, method="quadrature", progress=False)
    assert bool(found.log_evidence.notnull().all())


# --- the programs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", ["mlp", "residual"])
def test_fit_trains_every_kind_and_its_config_rebuilds_it(kind, network):
    x = (data(9) > 1).double()
    autoencoder = Autoencoder(DATA_DIM, 3, (4,), kind, "bernoulli", "relu", network)
    before = objective(autoencoder, x)
    fit(autoencoder.model, autoencoder.guide, x, epochs=30, learning_rate=0.02, progress=False)
    assert objective(autoencoder, x) > before
    config = json.loads(json.dumps(autoencoder.config))
    again = Autoencoder(**config)
    assert again.config == config
    again.load_state_dict(autoencoder.state_dict())
    assert torch.equal(again.reconstruct(x), autoencoder.reconstruct(x))


def test_the_reconstruction_error_of_a_bernoulli_is_the_cross_entropy():
    x = (data(9) > 1).double()
    autoencoder = Autoencoder(DATA_DIM, 3, (4,))
    probs = autoencoder.reconstruct(x).detach()
    expected = -functional.binary_cross_entropy(probs, x, reduction="sum") / len(x)
    assert objective(autoencoder, x) == pytest.approx(float(expected), rel=1e-12)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="learns the identity"):
        Autoencoder(DATA_DIM, DATA_DIM)
    Autoencoder(DATA_DIM, DATA_DIM + 1, kind="sparse")
    with pytest.raises(ValueError, match="choose one of"):
        make_kind("variational")
    with pytest.raises(TypeError):
        make_kind({"name": "undercomplete", "strength": 1.0})
    with pytest.raises(ValueError, match="strength"):
        Sparse(0.0)
    with pytest.raises(ValueError, match="strength"):
        Contractive(math.nan)
    with pytest.raises(ValueError, match="'mask' or 'gaussian'"):
        Denoising("salt")
    with pytest.raises(ValueError, match="between 0 and 1"):
        Denoising("mask", 1.0)
    assert make_kind(kind := Undercomplete()) is kind


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(lambda x: x[:, 1:], "shape"), (lambda x: x.float(), "float64"), (lambda x: x / 0, "NaN")],
)
def test_data_that_cannot_be_taken_are_refused(spoil, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # ours, as users meet it
    for program in ("model", "guide", "encode", "reconstruct"):
        with pytest.raises(ValueError, match=message):
            getattr(linear(), program)(spoil(data(4) * 0))
