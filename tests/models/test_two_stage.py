"""The two-stage VAE against closed forms of linear Gaussian stages, at float64."""

import json
import math

import jaxtyping
import numpy as np
import pytest
import torch
from pyro import poutine

from pyro_vae import elbo_gap, fit, log_evidence, log_weights
from pyro_vae.inference.programs import ProgramError, inspect_programs
from pyro_vae.inference.svi import load_tensors
from pyro_vae.models import VAE, TwoLayerVAE, TwoStageVAE

NUM_DATA, DATA_DIM, LATENT_DIM, UPPER_DIM = 400, 3, 2, 1
STANDARD_ERRORS = 5  # a two-sided failure rate of 6e-7 a number
SCALE, POSTERIOR_SCALE = 0.5, torch.tensor([0.3, 0.6], dtype=torch.float64)
ENCODER = torch.tensor([[0.6, -0.2, 0.5], [0.1, 0.9, 0.3]], dtype=torch.float64)
DECODER = torch.tensor([[0.7, 0.1], [-0.3, 0.8], [0.5, 0.2]], dtype=torch.float64)
ENCODER_BIAS = torch.tensor([1.5, -0.7], dtype=torch.float64)
DECODER_BIAS = torch.tensor([-0.4, 0.2, 0.1], dtype=torch.float64)
DATA_MEAN = torch.tensor([0.5, 1.0, -1.0], dtype=torch.float64)
DATA_ROOT = torch.tensor([[1.5, 0, 0], [0.8, 1.1, 0], [-0.5, 0.4, 0.7]], dtype=torch.float64)


def linear_first():
    """A linear Gaussian VAE whose codes are far from N(0, I): nobody trained it."""
    first = VAE(DATA_DIM, LATENT_DIM, (), {"name": "gaussian", "scale": SCALE})
    raw_scale = (POSTERIOR_SCALE - 1e-6).expm1().log()  # softplus undone
    with torch.no_grad():
        first.encoder[0].weight[:LATENT_DIM] = ENCODER
        first.encoder[0].weight[LATENT_DIM:] = 0
        first.encoder[0].bias.copy_(torch.cat([ENCODER_BIAS, raw_scale]))
        first.decoder[0].weight.copy_(DECODER)
        first.decoder[0].bias.copy_(DECODER_BIAS)
    return first


def data():
    """Draws moved so that their mean and covariance (with 1/N) are exactly the ones above."""
    draws = torch.randn(NUM_DATA, DATA_DIM, generator=torch.Generator().manual_seed(1))
    draws = draws - draws.mean(0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(draws.T @ draws / NUM_DATA), draws.T, upper=False
    ).T
    return DATA_MEAN + white @ DATA_ROOT.T


def aggregated_posterior():
    """Mean and covariance of q(z) over the data."""
    cov = ENCODER @ DATA_ROOT
    return ENCODER @ DATA_MEAN + ENCODER_BIAS, cov @ cov.T + POSTERIOR_SCALE.square().diag()


def parts_without_the_prior():
    """E log p(x | z) - E log q(z | x), per datum."""
    left = torch.eye(DATA_DIM) - DECODER @ ENCODER
    spread = (left @ DATA_ROOT).square().sum() + (DECODER * POSTERIOR_SCALE).square().sum()
    shift = left @ DATA_MEAN - DECODER @ ENCODER_BIAS - DECODER_BIAS
    likelihood = -DATA_DIM * math.log(SCALE * math.sqrt(2 * math.pi))
    likelihood -= (spread + shift.square().sum()) / (2 * SCALE**2)
    entropy = LATENT_DIM / 2 * math.log(2 * math.pi * math.e) + POSTERIOR_SCALE.log().sum()
    return likelihood + entropy


def best_elbo():
    """With q(z) itself as the prior, whose entropy then is the cross-entropy."""
    cov = aggregated_posterior()[1]
    entropy = LATENT_DIM / 2 * math.log(2 * math.pi * math.e) + 0.5 * cov.logdet()
    return float(parts_without_the_prior() - entropy)


def first_elbo():
    mean, cov = aggregated_posterior()
    cross = LATENT_DIM / 2 * math.log(2 * math.pi) + (cov.trace() + mean.square().sum()) / 2
    return float(parts_without_the_prior() - cross)


def measured_elbo(vae, x):
    """Mean over data and particles, and its Monte-Carlo error."""
    weights = log_weights(vae.model, vae.guide, x, 100).detach()
    return float(weights.mean()), float(weights.std(0).square().mean().sqrt()) / math.sqrt(
        weights.numel()
    )


@pytest.fixture(scope="module")
def fitted():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    first = linear_first()
    two_stage = TwoStageVAE(first, (), UPPER_DIM)
    start = {name: value.clone() for name, value in two_stage.state_dict().items()}
    fit(
        two_stage.model,
        two_stage.guide,
        data(),
        epochs=220,
        evaluate_every=220,
        batch_size=NUM_DATA,
        learning_rate=lambda epoch: 0.1 * 0.95 ** max(0, epoch - 120),
        progress=False,
    )
    torch.set_default_dtype(before)
    return first, two_stage, start


def prior_of_codes(two_stage):
    """Mean and covariance of p(z), from the weights alone."""
    state = two_stage.state_dict()
    weight, bias = state["upper_decoder.0.weight"], state["upper_decoder.0.bias"]
    scale = 1e-3 + state["conditional.raw_scale"].exp()
    return bias, weight @ weight.T + scale.square() * torch.eye(LATENT_DIM)


def test_the_second_stage_takes_the_law_of_the_codes(fitted):
    """One latent and a shared scale make any covariance in two dimensions."""
    _, two_stage, _ = fitted
    mean, cov = aggregated_posterior()
    found_mean, found_cov = prior_of_codes(two_stage)
    # KL(q(z) || p(z)) in nats; seen: 1e-4.
    solved = torch.linalg.solve(found_cov, torch.column_stack([cov, (mean - found_mean)[:, None]]))
    kl = solved[:, :2].trace() - 2 + (mean - found_mean) @ solved[:, 2]
    kl = 0.5 * (kl + found_cov.logdet() - cov.logdet())
    assert 0 <= kl < 1e-3
    assert 0.5 * (cov.trace() + mean.square().sum() - 2 - cov.logdet()) > 0.5  # that of N(0, I)


def test_the_elbo_reaches_its_closed_form_and_gains_what_the_prior_lost(fitted):
    first, two_stage, _ = fitted
    value, error = measured_elbo(two_stage, data())
    assert value < best_elbo() + STANDARD_ERRORS * error
    assert value > best_elbo() - 3e-3 - STANDARD_ERRORS * error
    before, error = measured_elbo(first, data())
    assert abs(before - first_elbo()) < STANDARD_ERRORS * error
    assert value > before + 0.5


def test_samples_follow_the_second_stage_through_the_first_decoder(fitted):
    _, two_stage, _ = fitted
    mean, cov = prior_of_codes(two_stage)
    num = 20_000
    for draws, noise in ((True, 0.0), (False, SCALE)):
        x = two_stage.sample(num, mean=draws, generator=torch.Generator().manual_seed(3))
        wanted = DECODER @ cov @ DECODER.T + noise**2 * torch.eye(DATA_DIM)
        error = (wanted.diag() / num).sqrt()
        assert ((x.mean(0) - DECODER @ mean - DECODER_BIAS).abs() < STANDARD_ERRORS * error).all()
        spread = (wanted.square() + wanted.diag().outer(wanted.diag())) / num
        off = (x.T.cov() - wanted).abs() / spread.sqrt()
        assert (off < STANDARD_ERRORS).all()
        from_prior = DECODER @ DECODER.T + noise**2 * torch.eye(DATA_DIM)
        assert ((x.T.cov() - from_prior).abs() / spread.sqrt() > STANDARD_ERRORS).any()


def test_training_moves_the_second_stage_alone(fitted):
    first, two_stage, start = fitted
    for name, value in two_stage.state_dict().items():
        upper = name.startswith(("upper_", "conditional"))
        assert torch.equal(value, start[name]) != upper, name
    own = {id(p) for p in two_stage.parameters()}
    for name, parameter in first.named_parameters():
        assert id(parameter) not in own
        assert parameter.requires_grad, name
        assert torch.equal(parameter, two_stage.state_dict()[name]), name


def test_a_first_stage_that_would_be_trained_is_refused():
    two_stage = TwoStageVAE(linear_first(), (), UPPER_DIM).requires_grad_(True)
    with pytest.raises(ProgramError, match="requires_grad_"):
        fit(two_stage.model, two_stage.guide, data(), epochs=1, progress=False)


# --- nonlinear stages -----------------------------------------------------------------------------

HIDDEN, PIXELS = (5, 4), 9


def build(likelihood="bernoulli", **parts):
    return TwoStageVAE(VAE(PIXELS, 3, (6,), likelihood, **parts), HIDDEN, 2)


def pixels(num=7):
    return torch.randint(2, (num, PIXELS)).double()


def network(layers, inputs):
    """A perceptron with tanh, from its state only."""
    tensors = list(layers.state_dict().values())
    for weight, bias in zip(tensors[:-2:2], tensors[1:-2:2], strict=True):
        inputs = torch.tanh(inputs @ weight.T + bias)
    return inputs @ tensors[-2].T + tensors[-1]


def log_normal(value, loc, scale):
    return (-0.5 * ((value - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def test_programs_have_the_hand_written_log_densities():
    two_stage, x = build(), pixels()
    guide = poutine.trace(two_stage.guide).get_trace(x)
    model = poutine.trace(poutine.replay(two_stage.model, guide)).get_trace(x)
    guide.compute_log_prob()
    model.compute_log_prob()
    z, u = (guide.nodes[name]["value"].detach() for name in ("z", "u"))
    assert (z.shape, u.shape) == ((7, 3), (7, 2))
    loc, raw = network(two_stage.encoder, x).split(3, -1)
    upper_loc, upper_raw = network(two_stage.upper_encoder, z).split(2, -1)
    logits = network(two_stage.decoder, z)
    scale = (1e-3 + two_stage.state_dict()["conditional.raw_scale"].exp()).expand(3)
    for trace, site, wanted in [
        (guide, "z", log_normal(z, loc, 1e-6 + torch.log1p(raw.exp()))),
        (guide, "u", log_normal(u, upper_loc, 1e-6 + torch.log1p(upper_raw.exp()))),
        (model, "u", log_normal(u, torch.zeros_like(u), torch.ones_like(u))),
        (model, "z", log_normal(z, network(two_stage.upper_decoder, u), scale)),
        (model, "x", (x * logits - torch.log1p(logits.exp())).sum(-1)),
    ]:
        torch.testing.assert_close(trace.nodes[site]["log_prob"].detach(), wanted)


@pytest.mark.parametrize(
    "parts",
    [
        {"posterior": {"name": "iaf", "num_steps": 1, "hidden": [4]}, "prior": "vamp"},
        {"posterior": "full", "prior": "mixture", "likelihood": {"name": "categorical"}},
        {"network": {"name": "conv", "channels": [2]}, "likelihood": "continuous_bernoulli"},
    ],
)
def test_every_first_vae_trains_saves_loads_and_evaluates(parts, tmp_path):
    two_stage, x = build(**parts), pixels()
    found = fit(two_stage.model, two_stage.guide, x, epochs=2, checkpoint=tmp_path, progress=False)
    assert found.history.bound.attrs["bound"] == "lower"
    described = json.loads((tmp_path / "config.json").read_text())["model"]
    assert described["class"] == "TwoStageVAE"
    with torch.device("meta"):  # as `load_run` does
        again = TwoStageVAE(**described["arguments"])
    again.load_state_dict(load_tensors(tmp_path / "model.safetensors")[0], assign=True)
    trained = {name.split(".")[0] for name, p in again.named_parameters() if p.requires_grad}
    assert trained == {"upper_encoder", "upper_decoder", "conditional"}
    results = [
        log_evidence(m.model, m.guide, x, num_particles=6, progress=False)
        for m in (two_stage, again)
    ]
    assert results[0].log_evidence.equals(results[1].log_evidence)
    assert bool(np.isfinite(results[0].log_evidence).all())
    assert inspect_programs(again.model, again.guide, ((x,), {})).vectorizable
    assert again.sample(5, mean=False).shape == again.reconstruct(x[:5]).shape == (5, PIXELS)


def test_the_gap_can_be_measured():
    two_stage = build()
    found = elbo_gap(
        two_stage.model,
        two_stage.guide,
        pixels(3),
        num_particles=20,
        richer=(),
        max_steps=20,
        progress=False,
    )
    assert bool(np.isfinite(found.gap).all())


def test_default_size_and_dtype_are_those_of_the_first():
    two_stage = TwoStageVAE(VAE(PIXELS, 3, (6,)).float())
    assert two_stage.latent_dims == (3, 3)
    assert {p.dtype for p in two_stage.parameters()} == {torch.float32}
    assert TwoStageVAE(**json.loads(json.dumps(two_stage.config))).config == two_stage.config


def test_what_is_no_vae_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # ours, as users meet it
    with pytest.raises(ValueError, match="TwoLayerVAE"):
        TwoStageVAE(TwoLayerVAE(PIXELS, (3, 2), ((5,), (4,))))
