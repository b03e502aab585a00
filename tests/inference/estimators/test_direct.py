"""Analytic KL, relaxed latents and the sleep phase against closed forms and enumeration."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from closed_forms import gauss
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_vae.inference.estimators.bounds import (
    AnalyticELBO,
    LeaveOneOut,
    PathwiseELBO,
    SleepPhi,
    StraightThrough,
)
from pyro_vae.inference.programs import ProgramError

N, D, H = 3, 4, 2  # data, features, latents: all different
EXACT = 1e-12
ERRORS = 4.0  # standard errors: chance fails one coordinate with probability 6e-5; seeds are fixed


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_unbiased(draws: Tensor, exact: Tensor) -> None:
    error = (draws.std(0) / math.sqrt(len(draws))).clamp_min(1e-14)
    z = (draws.mean(0) - exact) / error
    assert float(z.abs().max()) < ERRORS, z


def gradients(loss: Any, model: Callable, guide: Callable, leaves: list[Tensor], *x: Any) -> list:
    found = torch.autograd.grad(
        -loss.differentiable_loss(model, guide, *x), leaves, allow_unused=True
    )
    return [torch.zeros_like(v) if g is None else g for v, g in zip(leaves, found, strict=True)]


# --- the analytic KL ------------------------------------------------------------------------------


class Chain:
    """z1 -> z2 -> x; the guide draws in either order."""

    def __init__(self, repeats: int = 1) -> None:
        self.x = randn(N, seed=1).repeat(repeats)
        start = {"a": 2, "b": 3, "c": 4, "w": 5}
        self.v = {
            n: (randn(N, seed=s) / 2).repeat(repeats).requires_grad_() for n, s in start.items()
        }

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
            z2 = pyro.sample("z2", dist.Normal(self.v["w"] * z1, 1.1))
            pyro.sample("x", dist.Normal(z2, 0.9), obs=x)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(self.v["a"], 0.8))
            pyro.sample("z2", dist.Normal(self.v["b"] + self.v["c"] * z1, 0.7))

    def reversed(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(self.v["b"], 0.7))
            pyro.sample("z1", dist.Normal(self.v["a"] + self.v["c"] * z2, 0.8))

    def elbo(self, backwards: bool) -> Tensor:
        """Written out: E log p of linear Gaussians, plus the guide's entropy."""
        a, b, c, w = (self.v[n] for n in "abcw")
        if backwards:  # moments of z1, z2 under q
            m2, s2 = b, torch.full_like(b, 0.49)
            m1, s1, cross = a + c * b, 0.64 + c**2 * 0.49, c * 0.49
        else:
            m1, s1 = a, torch.full_like(a, 0.64)
            m2, s2, cross = b + c * a, 0.49 + c**2 * 0.64, c * 0.64
        log_2pi = math.log(2 * math.pi)
        prior = -0.5 * (m1**2 + s1) - 0.5 * log_2pi
        spread = s2 - 2 * w * cross + w**2 * s1 + (m2 - w * m1) ** 2
        prior = prior - 0.5 * spread / 1.21 - math.log(1.1) - 0.5 * log_2pi
        likelihood = -0.5 * ((self.x - m2) ** 2 + s2) / 0.81 - math.log(0.9) - 0.5 * log_2pi
        return prior + likelihood + math.log(0.8 * 0.7) + log_2pi + 1


@pytest.mark.parametrize("backwards", [False, True])
def test_hierarchies_in_either_order_are_unbiased(backwards):
    repeats = 10_000
    chain, one = Chain(repeats), Chain()
    guide = chain.reversed if backwards else chain.forward
    loss = AnalyticELBO(3)
    value = loss.bound(chain.model, guide, chain.x).view(repeats, N)
    assert loss.sampled_sites == (("z2",) if backwards else ())
    exact = one.elbo(backwards)
    assert_unbiased(value, exact.detach())
    found = gradients(loss, chain.model, guide, list(chain.v.values()), chain.x)
    expected = torch.autograd.grad(exact.sum(), list(one.v.values()))
    for g, e in zip(found, expected, strict=True):
        assert_unbiased(g.view(repeats, N), e)


def test_a_reversed_guide_is_wrong_in_pyro():
    repeats = 10_000
    chain, one = Chain(repeats), Chain()
    pyros = TraceMeanField_ELBO(max_plate_nesting=1, vectorize_particles=True, num_particles=3)
    with pytest.warns(UserWarning, match="mean field"):
        found = -pyros.loss(chain.model, chain.reversed, chain.x) / repeats
    per_datum = AnalyticELBO(3).bound(chain.model, chain.reversed, chain.x).view(repeats, N)
    error = float(per_datum.sum(1).std()) / math.sqrt(repeats)
    assert abs(found - float(one.elbo(True).sum().detach())) > 10 * error  # documents Pyro 1.9.2


@pytest.mark.parametrize("masked", [False, True])
def test_the_same_seed_gives_the_loss_and_gradient_of_pyro(masked):
    x, mask = randn(N, seed=1), torch.tensor([True, False, True])
    v = [(randn(N, H, seed=s) / 2).requires_grad_() for s in (6, 7)]

    def program(body: Callable) -> Callable:
        return poutine.mask(body, mask=mask) if masked else body

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(H), 1.3).to_event(1))
            y = pyro.sample("y", dist.Gamma(2.0, 3.0))
            pyro.sample("x", dist.Normal(z.sum(-1), y), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(v[0], v[1].exp()).to_event(1))
            pyro.sample("y", dist.Gamma(v[1].exp().sum(-1), 2.0))

    found = []
    for loss in (
        AnalyticELBO(5),
        TraceMeanField_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1),
    ):
        pyro.set_rng_seed(2)
        value = loss.differentiable_loss(program(model), program(guide), x)
        found.append((float(value.detach()), torch.autograd.grad(value, v)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    for p, q in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-12)


def test_the_value_is_the_written_out_kl_and_likelihood_at_the_same_draw():
    x, loc = randn(N, D, seed=1), randn(N, D, seed=2)

    def model(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(loc, 0.6).to_event(1))

    pyro.set_rng_seed(3)
    loss = AnalyticELBO(1)
    found = loss.bound(model, guide, x)
    pyro.set_rng_seed(3)
    z = loc + 0.6 * torch.randn(N, D)
    kl = 0.5 * (0.36 + loc**2 - 1 - math.log(0.36)).sum(-1)
    assert torch.allclose(found, gauss(x, z, 0.5).sum(-1) - kl, rtol=0, atol=EXACT)
    assert loss.sampled_sites == ()


def test_sites_without_a_registered_kl_are_drawn_and_named():
    x = randn(N, seed=1)

    def model(x):
        with pyro.plate("data", N):
            mixture = dist.MixtureSameFamily(
                dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-1.0, 1.0]), 1.0)
            )
            y = pyro.sample("y", mixture)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(y + z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(0.3, 0.9))
            pyro.sample("z", dist.Normal(0.1, 0.8))

    loss = AnalyticELBO(2000)
    value = loss.bound(model, guide, x)
    assert loss.sampled_sites == ("y",)
    other = PathwiseELBO(2000).bound(model, guide, x)
    # Two means of 2000 log weights whose standard deviation is below 5: 4 standard errors.
    assert float((value - other).abs().max()) < ERRORS * 5 * math.sqrt(2 / 2000)


def test_masks_that_differ_between_model_and_guide_are_not_put_in_one_kl():
    """Pyro's KL of masked distributions keeps what both masks leave; the ELBO drops each alone."""
    x, loc = randn(N, seed=1), randn(N, seed=2)
    prior_mask = torch.tensor([True, True, False])
    guide_mask = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(prior_mask))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(loc, 0.6).mask(guide_mask))

    loss = AnalyticELBO(1)
    pyro.set_rng_seed(4)
    found = loss.bound(model, guide, x)
    pyro.set_rng_seed(4)
    z = loc + 0.6 * torch.randn(N)
    expected = gauss(x, z, 0.5) + prior_mask * gauss(z, 0.0, 1.0) - guide_mask * gauss(z, loc, 0.6)
    assert loss.sampled_sites == ("z",)
    assert torch.allclose(found, expected, rtol=0, atol=EXACT)


def test_a_prior_with_an_enumerated_latent_is_drawn_and_another_is_not():
    x, loc = randn(N, seed=1), randn(N, seed=2)
    means = torch.tensor([-1.0, 0.5, 2.0])

    def model(x):
        with pyro.plate("data", N):
            k = pyro.sample("k", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            y = pyro.sample("y", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(means[k], 0.8))
            pyro.sample("x", dist.Normal(y + z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(loc, 0.7))
            pyro.sample("z", dist.Normal(loc, 0.6))

    loss = AnalyticELBO(1)
    pyro.set_rng_seed(4)
    found = loss.bound(model, guide, x)
    pyro.set_rng_seed(4)
    y = loc + 0.7 * torch.randn(N)
    z = loc + 0.6 * torch.randn(N)
    prior = gauss(z[:, None], means, 0.8).logsumexp(-1) - math.log(3)
    kl = 0.5 * (0.49 + loc**2 - 1 - math.log(0.49))
    expected = gauss(x, y + z, 0.5) + prior - gauss(z, loc, 0.6) - kl
    assert loss.sampled_sites == ("z",)
    assert torch.allclose(found, expected, rtol=0, atol=EXACT)


def test_inner_plates_sum_the_kl():
    x, loc = randn(2, N, seed=1), randn(2, N, seed=2)

    def model(x):
        with pyro.plate("data", N, dim=-1), pyro.plate("pixels", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", N, dim=-1), pyro.plate("pixels", 2, dim=-2):
            pyro.sample("z", dist.Normal(loc, 1e-9))

    kl = 0.5 * (1e-18 + loc**2 - 1 - 2 * math.log(1e-9))
    found = AnalyticELBO(3).bound(model, guide, x)
    assert torch.allclose(found, (gauss(x, loc, 0.5) - kl).sum(0), rtol=1e-7)


# --- straight through -----------------------------------------------------------------------------


class Coins:
    """Two bits, or two one-hot latents of three kinds; x ~ N(W z, noise) or E log p linear in z."""

    def __init__(self, repeats: int, one_hot: bool, noise: float = 0.8) -> None:
        self.one_hot, self.noise = one_hot, noise
        shape = (H, 3) if one_hot else (H,)
        self.x = randn(N, D, seed=1).repeat(repeats, 1)
        self.w = randn(D, math.prod(shape), seed=2) / 2
        self.prior = randn(*shape, seed=3)
        one = randn(N, *shape, seed=4) / 2
        self.q = one.repeat(repeats, *[1] * len(shape)).requires_grad_()

    def bits(self, logits: Tensor) -> Any:
        if self.one_hot:
            return dist.OneHotCategorical(logits=logits).to_event(1)
        return dist.Bernoulli(logits=logits).to_event(1)

    def mean(self, z: Tensor) -> Tensor:
        return (z.flatten(-2) if self.one_hot else z) @ self.w.T

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.bits(self.prior))
            pyro.sample("x", dist.Normal(self.mean(z), self.noise).to_event(1), obs=x)

    def linear(self, x: Tensor) -> None:
        """Log p(x | z) is linear in z: x . W z, up to a constant."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.bits(self.prior))
            pyro.factor("x", (self.mean(z) * x).sum(-1))

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.bits(self.q))

    def log_probability(self, z: Tensor, logits: Tensor) -> Tensor:
        if self.one_hot:
            return (z * logits.log_softmax(-1)).sum((-1, -2))
        return (z * logits - nn.functional.softplus(logits)).sum(-1)

    def exact(self, linear: bool = False) -> tuple[Tensor, Tensor]:
        """The ELBO and its gradient by q's logits, by enumeration."""
        rows = torch.eye(3) if self.one_hot else torch.tensor([0.0, 1.0])
        outcomes = torch.stack([torch.stack(o) for o in itertools.product(rows, repeat=H)])
        z, q = outcomes[:, None], self.q[:N].detach().requires_grad_()
        log_q = self.log_probability(z, q)
        x, mean = self.x[:N], self.mean(z)
        fit = (mean * x).sum(-1) if linear else gauss(x, mean, self.noise).sum(-1)
        log_w = fit + self.log_probability(z, self.prior) - log_q
        value = (log_q.exp() * log_w).sum(0)
        return value.detach(), torch.autograd.grad(value.sum(), q)[0]


@pytest.mark.parametrize("one_hot", [False, True])
def test_straight_through_has_the_value_of_the_discrete_elbo(one_hot):
    repeats = 20_000
    coins = Coins(repeats, one_hot)
    value = StraightThrough(1).bound(coins.model, coins.guide, coins.x)
    exact, _ = coins.exact()
    assert_unbiased(value.view(repeats, N), exact)


@pytest.mark.parametrize("one_hot", [False, True])
def test_the_value_is_that_of_the_discrete_model_at_the_draws(one_hot):
    coins, drawn = Coins(1, one_hot), []

    def model(x):
        coins.model(x)

    def recorded(x):
        with pyro.plate("data", len(x)):
            drawn.append(pyro.sample("z", coins.bits(coins.q)).detach())

    found = StraightThrough(5).bound(model, recorded, coins.x)
    z = drawn[-1]
    assert bool(((z == 0) | (z == 1)).all())
    assert z.shape[0] == 5
    log_w = gauss(coins.x, coins.mean(z), coins.noise).sum(-1)
    log_w = log_w + coins.log_probability(z, coins.prior) - coins.log_probability(z, coins.q)
    assert torch.allclose(found, log_w.detach().mean(0), rtol=0, atol=EXACT)


def straight_through_gradient(coins: Coins, model: Callable, temperature: float) -> Tensor:
    estimator = StraightThrough(1, temperature=temperature)
    found = gradients(estimator, model, coins.guide, [coins.q], coins.x)[0]
    return found.view(-1, N, *coins.q.shape[1:])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.2])
def test_the_gradient_of_a_bit_is_that_of_its_relaxed_mean_where_log_w_is_linear(temperature):
    """There the slope of log w does not depend on the draw, and d E[u] / d logits is left.

    u = sigmoid((logits + logistic noise) / t), whose mean has the slope E u (1 - u) / t; it tends
    to the exact p (1 - p) as t falls. By quadrature over the noise.
    """
    coins = Coins(20_000, one_hot=False)
    q = coins.q[:N].detach()
    slope = coins.x[:N] @ coins.w + coins.prior - q
    p = torch.sigmoid(q)
    assert torch.allclose(slope * p * (1 - p), coins.exact(linear=True)[1], atol=EXACT)
    at = (torch.arange(200_000) + 0.5) / 200_000
    relaxed = torch.sigmoid((q[..., None] + at.log() - (-at).log1p()) / temperature)
    expected = slope * (relaxed * (1 - relaxed) / temperature).mean(-1)
    assert_unbiased(straight_through_gradient(coins, coins.linear, temperature), expected)


@pytest.mark.parametrize("linear", [True, False])
def test_the_bias_falls_with_the_temperature_where_log_w_is_at_most_quadratic(linear):
    """As t falls u jumps at its threshold, where half the draws are 0 and half are 1.

    The gradient is then p (1 - p) (f'(0) + f'(1)) / 2, and that is p (1 - p) (f(1) - f(0)), the
    exact one, if f is at most quadratic in each bit, as with a Gaussian likelihood.
    """
    coins = Coins(60_000, one_hot=False)
    exact = coins.exact(linear)[1]
    biases = []
    for temperature in (2.0, 0.5, 0.1):
        model = coins.linear if linear else coins.model
        found = straight_through_gradient(coins, model, temperature)
        biases.append(float((found.mean(0) - exact).norm() / exact.norm()))
    assert biases[0] > 0.25
    assert biases[1] < 0.12
    assert biases[2] < 0.05


@pytest.mark.parametrize("one_hot", [False, True])
def test_the_gradient_of_a_curved_model_points_along_the_exact_one_with_a_stated_bias(one_hot):
    repeats = 20_000
    coins = Coins(repeats, one_hot)
    exact = coins.exact()[1].flatten()
    found = straight_through_gradient(coins, coins.model, 0.5).mean(0).flatten()
    cosine = float(torch.dot(found, exact) / found.norm() / exact.norm())
    assert bool(found.isfinite().all())
    assert cosine > 0.9
    assert float((found - exact).norm() / exact.norm()) < 0.5


def test_leave_one_out_is_unbiased_where_straight_through_is_not():
    repeats = 20_000
    coins = Coins(repeats, one_hot=False)
    exact = coins.exact()[1]
    unbiased = gradients(LeaveOneOut(4), coins.model, coins.guide, [coins.q], coins.x)[0]
    assert_unbiased(unbiased.view(repeats, N, H), exact)
    with pytest.raises(AssertionError):
        assert_unbiased(straight_through_gradient(coins, coins.model, 0.5), exact)


def test_masked_bits_are_relaxed_as_well():
    x, mask = randn(N, seed=1), torch.tensor([True, False, True])
    logits = randn(N, seed=2).requires_grad_()

    def model(x):
        with pyro.plate("data", N):
            bit = pyro.sample("bit", dist.Bernoulli(0.4).mask(mask))
            pyro.sample("x", dist.Normal(bit, 0.7).mask(mask), obs=x)

    def guide(x):
        with pyro.plate("data", N):
            pyro.sample("bit", dist.Bernoulli(logits=logits).mask(mask))

    assert float(StraightThrough(2).bound(model, guide, x)[1]) == 0.0
    gradient = gradients(StraightThrough(2), model, guide, [logits], x)[0]
    assert torch.equal(gradient != 0, mask)


def test_sites_that_have_no_relaxation_are_refused_by_name():
    x = randn(N, seed=1)

    def model(x):
        with pyro.plate("data", N):
            kind = pyro.sample("kind", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(kind.to(x.dtype), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", N):
            pyro.sample("kind", dist.Categorical(logits=torch.zeros(N, 3)))

    with pytest.raises(ProgramError, match=r"'kind' is a Categorical; .* LeaveOneOut or VIMCO"):
        StraightThrough(3).loss_and_grads(model, guide, x)


def test_continuous_latents_beside_discrete_ones_keep_their_path():
    x = randn(N, seed=1)
    v = [randn(N, seed=s).requires_grad_() for s in (2, 3)]

    def model(x):
        with pyro.plate("data", N):
            bit = pyro.sample("bit", dist.Bernoulli(0.4))
            z = pyro.sample("z", dist.Normal(bit, 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(v[0], 0.6))
            pyro.sample("bit", dist.Bernoulli(logits=v[1] + z))

    found = gradients(StraightThrough(4), model, guide, v, x)
    assert all(bool(g.isfinite().all()) and float(g.abs().min()) > 0 for g in found)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperatures_out_of_range_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        StraightThrough(1, temperature=temperature)


# --- sleep ----------------------------------------------------------------------------------------


class Simulated:
    """Linear Gaussian with a guide N(A x + b, S) that can be the exact posterior."""

    noise = 0.7

    def __init__(self, exact: bool, repeats: int = 1) -> None:
        self.w = randn(D, H, seed=1)
        covariance = torch.linalg.inv(torch.eye(H) + self.w.T @ self.w / self.noise**2)
        a, b = covariance @ self.w.T / self.noise**2, torch.zeros(H)
        tril = torch.linalg.cholesky(covariance)
        if not exact:
            a, b, tril = a + 0.2 * randn(H, D, seed=2), b + 0.3, 1.4 * tril
        self.start = [t.detach() for t in (a, b, tril)]
        # One copy of the guide for each repeat, so that gradients come apart.
        self.leaves = [t.expand(repeats, *t.shape).clone().requires_grad_() for t in (a, b, tril)]
        self.x = torch.zeros(repeats, D)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(H), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.w.T, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        a, b, tril = self.leaves
        with pyro.plate("data", len(x)):
            loc = torch.einsum("nhd,...nd->...nh", a, x) + b
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))

    def closed_form(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """E_p log q(z | x) and its gradient: z - A x - b is Gaussian with known moments."""
        a, b, tril = (t.clone().requires_grad_() for t in self.start)
        residual = torch.eye(H) - a @ self.w
        second = residual @ residual.T + self.noise**2 * a @ a.T + torch.outer(b, b)
        precision = torch.cholesky_inverse(tril)
        value = -0.5 * (precision * second).sum() - tril.diagonal().log().sum()
        value = value - 0.5 * H * math.log(2 * math.pi)
        return value.detach(), torch.autograd.grad(value, (a, b, tril))


@pytest.mark.parametrize("exact", [True, False])
def test_the_sleep_phase_has_the_closed_form_value_and_gradient(exact):
    repeats = 20_000
    simulated = Simulated(exact, repeats)
    value, expected = simulated.closed_form()
    assert_unbiased(SleepPhi(1).bound(simulated.model, simulated.guide, simulated.x), value)
    found = gradients(SleepPhi(2), simulated.model, simulated.guide, simulated.leaves, simulated.x)
    lower = torch.ones(H, H).tril()
    kept = [torch.ones(H, D), torch.ones(H), lower]  # a Cholesky factor is lower triangular
    for g, e, keep in zip(found, expected, kept, strict=True):
        assert_unbiased(g * keep, e * keep)
    largest = max(float((e * keep).abs().max()) for e, keep in zip(expected, kept, strict=True))
    assert (largest < 1e-10) == exact


def test_sleeping_trains_the_guide_and_leaves_the_model():
    torch.manual_seed(5)
    decoder, encoder = nn.Linear(H, D), nn.Linear(D, H)
    start = decoder.weight.detach().clone()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(H), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.5).to_event(1))

    svi = SVI(model, guide, Adam({"lr": 0.03}), SleepPhi(1))
    x = randn(50, D, seed=6)
    losses = [svi.step(x) for _ in range(80)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert torch.equal(decoder.weight, start)


def test_the_sleep_phase_has_the_factor_of_the_subsample_at_hand():
    simulated, loss, size = Simulated(exact=True, repeats=6), SleepPhi(1), [6]

    def model(x):
        with pyro.plate("data", size[0], subsample=torch.arange(6)):
            z = pyro.sample("z", dist.Normal(torch.zeros(H), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ simulated.w.T, 0.7).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", size[0], subsample=torch.arange(6)):
            pyro.sample("z", dist.Normal(torch.zeros(H), 1.0).to_event(1))

    totals = []
    for size[0] in (6, 24, 12):
        pyro.set_rng_seed(7)
        totals.append(loss.loss(model, guide, simulated.x))
    assert [t / totals[0] for t in totals] == pytest.approx([1.0, 4.0, 2.0])


def test_what_a_model_computes_is_no_part_of_the_simulation():
    x = torch.zeros(20_000)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(pyro.deterministic("twice", 2 * z), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.4 * x, 0.2**0.5))

    # The exact posterior: minus its entropy.
    exact = torch.tensor(-0.5 * math.log(2 * math.pi * math.e * 0.2))
    assert_unbiased(SleepPhi(1).bound(model, guide, x), exact)


def test_programs_that_simulate_something_else_than_x_are_refused():
    def model(x, extra):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, extra):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = randn(N, seed=1)
    with pytest.raises(ProgramError, match="must take x alone"):
        SleepPhi(1).loss(model, guide, x, 1)


def test_off_the_table_there_is_no_row():
    for estimator in (AnalyticELBO(2), StraightThrough(2), SleepPhi(2)):
        assert not hasattr(estimator, "coefficients")
