"""The objectives beside the bounds, by hand and by closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_vae import fit, log_evidence
from pyro_vae.inference.estimators.bounds import AnalyticELBO, PathwiseELBO
from pyro_vae.inference.estimators.not_bounds import (
    BetaELBO,
    FreeBits,
    InfoVAE,
    maximum_mean_discrepancy,
)
from pyro_vae.inference.programs import ProgramError
from pyro_vae.results import IncomparableError, label, make_result

N, D, H = 6, 4, 3
STANDARD_ERRORS = 5  # a two-sided failure rate of 6e-7 a number
OBJECTIVES = [BetaELBO(), FreeBits(), InfoVAE(), InfoVAE(alpha=0.5)]


class Pair:
    """z ~ N(0, 1), x ~ N(W z, 1), q = N(a, s): every term in closed form."""

    def __init__(self, normal=dist.Normal, full=False):
        generator = torch.Generator().manual_seed(2)
        self.x = torch.randn(N, D, generator=generator)
        self.weight = torch.randn(D, H, generator=generator)
        self.loc = torch.randn(N, H, generator=generator).requires_grad_()
        self.scale = (0.3 + torch.rand(H, generator=generator)).requires_grad_()
        self.normal, self.full, self.learns_scale = normal, full, True

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(H), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, 1.0).to_event(1), obs=x)

    def guide(self, x):
        loc = pyro.param("loc", self.loc)
        scale = pyro.param("scale", self.scale) if self.learns_scale else self.scale.detach()
        with pyro.plate("data", len(x)):
            if self.full:
                pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale.diag()))
            else:
                pyro.sample("z", self.normal(loc, scale.expand(N, H)).to_event(1))

    def kl(self):
        """KL of each datum and dimension."""
        return 0.5 * (self.loc**2 + self.scale**2 - 1) - self.scale.log()

    def likelihood(self):
        residual = (self.x - self.loc @ self.weight.T).square().sum(1)
        spread = (self.scale**2 * self.weight.square().sum(0)).sum()
        return -0.5 * (residual + spread + D * math.log(2 * math.pi))


def mean_value(objective, pair, repeats=400):
    """The mean of the loss per datum over repeats, with its standard error."""
    with torch.no_grad():
        found = [objective.loss(pair.model, pair.guide, pair.x) / N for _ in range(repeats)]
    losses = torch.tensor(found)
    return -losses.mean(), losses.std() / math.sqrt(repeats)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 4.0])
def test_the_beta_elbo_by_closed_form(beta):
    pair = Pair()
    value, error = mean_value(BetaELBO(20, beta=beta), pair)
    expected = (pair.likelihood() - beta * pair.kl().sum(1)).detach().mean()
    assert abs(value - expected) < STANDARD_ERRORS * error
    assert abs(value - expected + 0.3 * pair.kl().detach().sum(1).mean()) > STANDARD_ERRORS * error


def test_the_beta_elbo_at_one_is_the_elbo_of_the_same_draws():
    pair = Pair()
    losses = []
    for loss in (BetaELBO(3, beta=1.0), PathwiseELBO(3)):
        pyro.set_rng_seed(1)
        losses.append(loss.differentiable_loss(pair.model, pair.guide, pair.x))
    gradients = [torch.autograd.grad(loss, [pair.loc, pair.scale]) for loss in losses]
    torch.testing.assert_close(losses[0].detach(), losses[1].detach())
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("nats", [0.0, "median", 50.0])
def test_free_bits_by_closed_form(nats, particles):
    """With a closed-form KL, only the likelihood is drawn: the rest agrees to rounding."""
    pair = Pair()
    halfway = nats == "median"  # free for one dimension, or two, and not for the others
    nats = float(pair.kl().detach().mean(0).median()) * 1.01 if halfway else nats
    losses: list[torch.Tensor] = []
    for loss in (FreeBits(particles, nats=nats), AnalyticELBO(particles)):
        pyro.set_rng_seed(1)
        losses.append(loss.differentiable_loss(pair.model, pair.guide, pair.x))
    free = pair.kl().mean(0).clamp_min(nats).sum()
    extra = N * (free - pair.kl().mean(0).sum())
    torch.testing.assert_close(losses[0], losses[1] + extra)
    gradient = torch.autograd.grad(losses[0] - losses[1].detach(), [pair.loc, pair.scale])
    expected = torch.autograd.grad(losses[1] + extra, [pair.loc, pair.scale])
    torch.testing.assert_close(gradient, expected)
    if halfway:
        assert (pair.kl().mean(0) < nats).sum() == 2


def test_free_bits_of_whole_sites_and_of_dependent_dimensions():
    pair = Pair(full=True)
    with pytest.raises(ProgramError, match="pass groups='site'"):
        FreeBits().loss(pair.model, pair.guide, pair.x)
    value, error = mean_value(FreeBits(20, nats=0.1, groups="site"), pair)
    kl = pair.kl().detach().sum(1).mean()
    assert kl > 0.1
    assert abs(value - (pair.likelihood().detach().mean() - kl)) < STANDARD_ERRORS * error
    value, error = mean_value(FreeBits(20, nats=50.0, groups="site"), pair)
    assert abs(value - (pair.likelihood().detach().mean() - 50)) < STANDARD_ERRORS * error


@pytest.mark.parametrize("groups", ["dimension", "site"])
@pytest.mark.parametrize("masked", ["model", "guide", "both", "twice"])
def test_free_bits_of_nothing_are_the_elbo_whatever_is_masked(masked, groups):
    """Each program drops what its own mask hides: only equal masks leave a KL."""
    pair, hidden = Pair(), torch.tensor([True, False, False, True, False, False])
    pair.scale.data.fill_(0.05)  # every group's KL is above 0 with any of the masks
    seen = ~hidden

    def masking(program, of):
        if masked in (of, "both"):
            return poutine.mask(program, mask=seen)
        return poutine.mask(program, mask=~hidden) if masked == "twice" else program

    model, guide = masking(pair.model, "model"), masking(pair.guide, "guide")
    losses = []
    for loss in (
        FreeBits(400, nats=0.0, groups=groups),
        AnalyticELBO(400),
        Trace_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=1),
    ):
        pyro.set_rng_seed(1)
        losses.append(loss.loss(model, guide, pair.x))
    ours, analytic, drawn = losses
    assert ours == pytest.approx(analytic, rel=1e-12)
    if masked in ("model", "guide"):
        assert ours == pytest.approx(drawn, rel=1e-12)
    else:  # in closed form, so without the noise of the draws: 18 terms chi-square / 2
        assert 1e-9 < abs(ours - drawn) < STANDARD_ERRORS * math.sqrt(18 / 2 / 400)


class Chain:
    """z2 -> z1 -> x, inferred from the bottom: KL(q(z1|x) || p(z1|z2)) at a drawn z2 is no term."""

    x = torch.tensor([0.3, -1.0, 2.0, 0.1, 0.7], dtype=torch.float64)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2, 0.5).to_event(1))
            pyro.sample("x", dist.Normal(z1[..., 0], 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(0.5 * x[..., None], 0.4).to_event(1))
            pyro.sample("z2", dist.Normal(0.8 * z1, 0.6).to_event(1))


@pytest.mark.parametrize("groups", ["dimension", "site"])
def test_free_bits_of_nothing_are_the_elbo_also_where_the_guide_turns_the_order(groups):
    chain = Chain()
    values = []
    for loss in (FreeBits(50, nats=0.0, groups=groups), PathwiseELBO(50)):
        losses = torch.tensor([loss.loss(chain.model, chain.guide, chain.x) for _ in range(60)])
        values.append((losses.mean(), losses.std() / math.sqrt(60)))
    (free, error), (elbo, other) = values
    # A group's mean below zero would be cut off; 250 draws make that improbable here.
    assert abs(free - elbo) < STANDARD_ERRORS * math.hypot(error, other)


def explicit_mmd(a, b, bandwidth):
    def kernel(u, v):
        return math.exp(-float((u - v).square().sum()) / (2 * bandwidth**2))

    def mean(s, t):
        return sum(kernel(u, v) for u in s for v in t) / (len(s) * len(t))

    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


def test_the_discrepancy_by_hand_and_of_normals():
    a, b = torch.randn(5, 2), 1 + torch.randn(4, 2)
    found = float(maximum_mean_discrepancy(a, b, 0.7))
    assert found == pytest.approx(explicit_mmd(a, b, 0.7), rel=1e-12)
    assert found != pytest.approx(explicit_mmd(a, b, 1.4), rel=1e-3)
    assert float(maximum_mean_discrepancy(a, a, 0.7)) == pytest.approx(0, abs=1e-14)
    # E k = h / sqrt(h^2 + 2) exp(-d^2 / 2 (h^2 + 2)) for draws of N(0, 1) that are d apart.
    num, apart, h = 2000, 1.5, 0.9
    exact = 2 * h / math.sqrt(h**2 + 2) * (1 - math.exp(-(apart**2) / (2 * (h**2 + 2))))
    found = float(maximum_mean_discrepancy(torch.randn(num, 1), apart + torch.randn(num, 1), h))
    assert found == pytest.approx(exact, abs=STANDARD_ERRORS * 2 / math.sqrt(num))


@pytest.mark.parametrize(("alpha", "weight"), [(1.0, 10.0), (0.3, 2.0)])
@pytest.mark.parametrize("particles", [1, 2])
def test_infovae_by_hand(alpha, weight, particles):
    pair = Pair()
    objective = InfoVAE(particles, alpha=alpha, weight=weight)
    objective.loss(pair.model, pair.guide, pair.x)  # looks at the programs
    pyro.set_rng_seed(4)
    found = objective.bound(pair.model, pair.guide, pair.x)
    pyro.set_rng_seed(4)
    noise = torch.randn(particles, N, H)
    prior = torch.randn(N, H)
    z = (pair.loc + pair.scale * noise).detach()
    likelihood = -0.5 * ((pair.x - z @ pair.weight.T) ** 2 + math.log(2 * math.pi)).sum(-1)
    log_q = -0.5 * (noise**2 + math.log(2 * math.pi)).sum(-1) - pair.scale.detach().log().sum()
    log_p = -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)
    distance = explicit_mmd(z.reshape(-1, H), prior, math.sqrt(H))
    expected = (likelihood - (1 - alpha) * (log_q - log_p)).mean(0)
    torch.testing.assert_close(found, expected - (alpha + weight - 1) * distance)
    assert not torch.allclose(found, expected)


def test_infovae_draws_the_aggregate_posterior_to_the_prior():
    pair = Pair()
    pair.learns_scale = False
    loc = pair.loc
    with torch.no_grad():
        loc += 5
    distance = []
    for weight in (0.0, 1000.0):
        pyro.clear_param_store()
        loss = InfoVAE(4, weight=weight, bandwidth=4.0)
        svi = SVI(pair.model, pair.guide, Adam({"lr": 0.05}), loss)
        for _ in range(60):
            svi.step(pair.x)
        distance.append(float(loc.detach().mean(0).norm()))
    assert distance[1] < 0.5 * distance[0]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_objectives_are_labelled_and_refused_beside_a_bound(objective):
    pair = Pair()
    assert objective.bound_kind == "objective"
    values = objective.bound(pair.model, pair.guide, pair.x)
    attrs = label(bound=objective.bound_kind, measure="real")
    named = make_result(
        {"value": ("datum", values, attrs)}, function="t", config={}, seed=0, data_sha256=None
    )
    evidence = log_evidence(pair.model, pair.guide, pair.x, num_particles=4, progress=False)
    bound = make_result(
        {"value": ("datum", values, label(bound="lower", measure="real"))},
        function="t",
        config={},
        seed=0,
        data_sha256=None,
    )
    assert evidence.log_evidence.attrs["bound"] == "lower"
    with pytest.raises(IncomparableError, match="an objective compares only"):
        named.quantity("value").difference(bound.quantity("value"))
    assert not hasattr(objective, "coefficients")


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_fit_minimises_an_objective_and_still_reports_the_elbo(objective):
    pair = Pair()
    found = fit(
        pair.model,
        pair.guide,
        pair.x,
        loss=objective,
        epochs=25,
        learning_rate=0.03,
        progress=False,
    )
    loss = found.history.loss.values
    assert loss[-3:].mean() < loss[:3].mean()
    assert found.history.loss.attrs["bound"] == "objective"
    assert found.history.bound.attrs["bound"] == "lower"
    assert found.config["fit"]["loss"] == type(objective).__name__


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_guides_without_reparameterised_draws_are_refused(objective):
    pair = Pair(NonreparameterizedNormal)
    with pytest.raises(ProgramError, match="site 'z' is not"):
        objective.loss(pair.model, pair.guide, pair.x)


def test_the_factor_of_a_subsampled_plate_stands_outside():
    pair = Pair()

    def scaled(program):
        return poutine.scale(program, 2.5)

    for objective in OBJECTIVES:
        values = []
        for model, guide in ((pair.model, pair.guide), map(scaled, (pair.model, pair.guide))):
            pyro.set_rng_seed(3)
            fresh = type(objective)()
            values.append(fresh.loss(model, guide, pair.x))
        assert values[1] == pytest.approx(2.5 * values[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BetaELBO(beta=-1.0), "beta"),
        (lambda: BetaELBO(beta=math.inf), "beta"),
        (lambda: FreeBits(nats=-0.1), "nats"),
        (lambda: FreeBits(groups="layer"), "'dimension' or 'site'"),
        (lambda: InfoVAE(alpha=1.5), "alpha"),
        (lambda: InfoVAE(alpha=0.0, weight=0.5), "away from the prior"),
        (lambda: InfoVAE(bandwidth=0.0), "bandwidth"),
        (lambda: InfoVAE(joint=True), "global latents"),
        (lambda: InfoVAE(0), "num_particles"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
