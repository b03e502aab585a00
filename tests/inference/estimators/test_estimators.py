"""The table of estimators against exact enumeration, quadrature, closed forms and Pyro's own.

Chance: a Monte-Carlo check asks for 4 standard errors at every coordinate, so that a right
estimator fails one coordinate with probability 6e-5; the seeds are fixed.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from closed_forms import gauss
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from pyro.optim import Adam
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae import fit
from pyro_vae.inference.estimators import bounds as table
from pyro_vae.inference.estimators import estimator_names, make_estimator
from pyro_vae.inference.estimators.bounds import (
    CIWAE,
    MIWAE,
    PIWAE,
    VIMCO,
    DReG,
    ImportanceWeighted,
    LeaveOneOut,
    PathwiseELBO,
    Renyi,
    RenyiDReG,
    ReweightedWakeSleep,
    ScoreFunction,
    StickingTheLanding,
    WakeDReG,
)
from pyro_vae.inference.programs import ProgramError

N, D, H = 3, 4, 2  # data, features, latents: all different
EXACT = 1e-12
ERRORS = 4.0  # standard errors


# --- what the tests share -------------------------------------------------------------------------


def each_gradient(
    estimator: Any, model: Callable, guide: Callable, x: Tensor, leaves: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients of the bound of parameters that each datum has for itself."""
    loss = estimator.differentiable_loss(model, guide, x)
    found = torch.autograd.grad(-loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if g is None else g
        for (name, leaf), g in zip(leaves.items(), found, strict=True)
    }


def spread(values: dict[str, Tensor], repeats: int) -> dict[str, Tensor]:
    """Leaves that hold one copy of every parameter for each repeat of each datum."""
    return {
        n: v.detach().repeat(repeats, *([1] * (v.dim() - 1))).requires_grad_()
        for n, v in values.items()
    }


def assert_unbiased(draws: Tensor, exact: Tensor, error_of_exact: Tensor | float = 0.0) -> None:
    """The mean of independent draws is within 4 standard errors of the exact value everywhere."""
    error = (draws.var(0) / len(draws) + torch.as_tensor(error_of_exact) ** 2).sqrt()
    z = (draws.mean(0) - exact) / error.clamp_min(1e-14)
    assert float(z.abs().max()) < ERRORS, z


def mean_log_weight(w: Tensor) -> Tensor:
    return w.mean(0)


def log_mean_exp(w: Tensor) -> Tensor:
    return w.logsumexp(0) - math.log(len(w))


def mean_of_groups(w: Tensor) -> Tensor:
    return torch.stack([log_mean_exp(part) for part in w.split(len(w) // 2)]).mean(0)


def renyi(alpha: float) -> Callable[[Tensor], Tensor]:
    return lambda w: log_mean_exp((1 - alpha) * w) / (1 - alpha)


# --- exact, by enumeration: two bits --------------------------------------------------------------


def scripted(kind: type, draw: Callable[[Any], Tensor], shape: tuple[int, ...]) -> type:
    """A distribution whose draws of this shape come from a script, and others from chance."""

    class Scripted(kind):
        def sample(self, sample_shape: Any = ()) -> Tensor:
            with torch.no_grad():
                follows = tuple(self.batch_shape) == shape
                return draw(self) if follows else super().sample(sample_shape)

        def rsample(self, sample_shape: Any = ()) -> Tensor:
            follows = tuple(self.batch_shape) == shape
            return draw(self) if follows else super().rsample(sample_shape)

    return Scripted


def bernoulli(value: Tensor, logits: Tensor) -> Tensor:
    return value * logits - nn.functional.softplus(logits)


class Bits:
    """x ~ N(W z, 0.8), z of 2 bits with prior logits; q has logits of its own for each datum."""

    noise = 0.8

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(1)
        self.x = torch.randn(N, D, generator=g)
        self.values = {
            "w": torch.randn(N, D, H, generator=g),
            "prior": torch.randn(N, H, generator=g),
            "q": torch.randn(N, H, generator=g),
        }
        self.outcomes = torch.tensor(list(itertools.product([0.0, 1.0], repeat=H)))  # [4, H]

    def log_weights(self, z: Tensor, v: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Log p, log q of z [..., N, H], written out."""
        log_q = bernoulli(z, v["q"]).sum(-1)
        loc = torch.einsum("ndh,...nh->...nd", v["w"], z)
        return bernoulli(z, v["prior"]).sum(-1) + gauss(self.x, loc, self.noise).sum(-1), log_q, loc

    def programs(
        self, v: dict[str, Tensor], kind: type = dist.Bernoulli
    ) -> tuple[Callable, Callable]:
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(logits=v["prior"]).to_event(1))
                loc = torch.einsum("ndh,...nh->...nd", v["w"], z)
                pyro.sample("x", dist.Normal(loc, self.noise).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", kind(logits=v["q"]).to_event(1))

        return model, guide

    def all_outcomes(self, k: int) -> Tensor:
        """What K particles of a datum can draw, [K, 4^K, H]."""
        return torch.stack(
            [torch.stack(p) for p in itertools.product(self.outcomes, repeat=k)], dim=1
        )


def enumerate_bits(estimator: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Expected value and gradient of an estimator of the code under test, without chance."""
    bits, k = Bits(), estimator.num_particles
    outcomes = bits.all_outcomes(k)
    count = outcomes.shape[1]
    z = outcomes[:, :, None].expand(k, count, N, H).reshape(k, count * N, H)
    leaves = spread(bits.values, count)
    drawn = z if k > 1 else z[0]  # one particle has no dim of its own
    kind = scripted(dist.Bernoulli, lambda _: drawn, tuple(drawn.shape))
    model, guide = bits.programs(leaves, kind)
    x = bits.x.repeat(count, 1)
    gradient = each_gradient(estimator, model, guide, x, leaves)
    value = estimator.bound(model, guide, x)
    chance = bernoulli(z, leaves["q"].detach()).sum((0, -1)).exp().reshape(count, N)
    assert torch.allclose(chance.sum(0), torch.ones(N), atol=EXACT)
    expected = {
        n: (chance.reshape(count, N, *[1] * (g.dim() - 1)) * g.reshape(count, N, *g.shape[1:])).sum(
            0
        )
        for n, g in gradient.items()
    }
    return (chance * value.reshape(count, N)).sum(0), expected


def exact_bits(
    reduce: Callable[[Tensor], Tensor], k: int, wake: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from sums over all outcomes and autograd through them, in plain torch."""
    bits = Bits()
    v = {n: t.clone().requires_grad_() for n, t in bits.values.items()}
    z = bits.all_outcomes(k)[:, :, None].expand(k, 4**k, N, H)
    log_p, log_q, _ = bits.log_weights(z, v)
    chance = log_q.sum(0).exp()
    value = (chance * reduce(log_p - log_q)).sum(0)
    target = value
    if wake:  # theta maximises the bound; phi maximises sum_k w_k log q(z_k), all else held
        held = (log_p - log_q).detach()
        target = (chance.detach() * (held.softmax(0) * (log_p + log_q)).sum(0)).sum(0)
    gradient = torch.autograd.grad(target.sum(), list(v.values()))
    if wake:
        theta = torch.autograd.grad(
            exact_bits_value(reduce, k, theta := v["w"].detach().requires_grad_()), theta
        )
        assert torch.allclose(theta[0], gradient[0], atol=EXACT)
    return value.detach(), dict(zip(v, gradient, strict=True))


def exact_bits_value(reduce: Callable[[Tensor], Tensor], k: int, w: Tensor) -> Tensor:
    bits = Bits()
    z = bits.all_outcomes(k)[:, :, None].expand(k, 4**k, N, H)
    log_p, log_q, _ = bits.log_weights(z, {**bits.values, "w": w})
    return (log_q.sum(0).exp() * reduce(log_p - log_q)).sum()


def differences(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    return max(float((found[n] - exact[n]).abs().max()) for n in exact)


DISCRETE: list[tuple[Callable, Callable, bool]] = [
    (ScoreFunction, mean_log_weight, False),
    (LeaveOneOut, mean_log_weight, False),
    (VIMCO, log_mean_exp, False),
    (ReweightedWakeSleep, log_mean_exp, True),
]


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize(("kind", "reduce", "wake"), DISCRETE)
def test_every_outcome_of_two_bits_gives_the_exact_expectation(kind, reduce, wake, k):
    value, gradient = enumerate_bits(kind(k))
    exact_value, exact_gradient = exact_bits(reduce, k, wake)
    assert float((value - exact_value).abs().max()) < EXACT
    assert differences(gradient, exact_gradient) < EXACT
    assert min(float(g.abs().max()) for g in gradient.values()) > 1e-3  # nothing is missing


def test_one_particle_of_the_score_function_is_exact():
    value, gradient = enumerate_bits(ScoreFunction(1))
    exact_value, exact_gradient = exact_bits(mean_log_weight, 1)
    assert float((value - exact_value).abs().max()) < EXACT
    assert differences(gradient, exact_gradient) < EXACT


@pytest.mark.parametrize("kind", [LeaveOneOut, VIMCO])
def test_a_baseline_that_holds_the_particle_itself_is_found_out(kind, monkeypatch):
    monkeypatch.setattr(table, "_others_mean", lambda v: v.mean(0).expand_as(v))
    reduce = mean_log_weight if kind is LeaveOneOut else log_mean_exp
    _, gradient = enumerate_bits(kind(3))
    _, exact_gradient = exact_bits(reduce, 3)
    assert differences(gradient, exact_gradient) > 1e-3


def test_the_elbo_of_bits_is_that_of_trace_enum_elbo():
    bits = Bits()
    leaves = {n: t.clone().requires_grad_() for n, t in bits.values.items()}

    def flat(x):
        with pyro.plate("data", N, dim=-1):
            joint = torch.einsum("ch,nh->nc", bits.outcomes, leaves["q"])
            pyro.sample("z", dist.Categorical(logits=joint))

    def flat_model(x):
        with pyro.plate("data", N, dim=-1):
            joint = torch.einsum("ch,nh->nc", bits.outcomes, leaves["prior"])
            z = bits.outcomes[pyro.sample("z", dist.Categorical(logits=joint))]
            loc = torch.einsum("ndh,...nh->...nd", leaves["w"], z)
            pyro.sample("x", dist.Normal(loc, bits.noise).to_event(1), obs=x)

    enumerated = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(
        flat_model, config_enumerate(flat), bits.x
    )
    exact = torch.autograd.grad(-enumerated, list(leaves.values()))
    value, gradient = enumerate_bits(LeaveOneOut(2))
    assert float((value.sum() + enumerated.detach()).abs()) < 1e-10
    assert differences(gradient, dict(zip(leaves, exact, strict=True))) < 1e-10


def test_pyros_renyi_bound_leaves_a_discrete_guide_untrained_and_vimco_does_not():
    bits = Bits()
    leaves = {n: t.clone().requires_grad_() for n, t in bits.values.items()}
    model, _ = bits.programs(leaves)

    def with_param(x):
        q = pyro.param("q", lambda: bits.values["q"].clone())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=q).to_event(1))

    largest = {}
    for name, loss in (
        ("Pyro", RenyiELBO(0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)),
        ("ours", VIMCO(5)),
    ):
        loss.loss_and_grads(model, with_param, bits.x)
        unconstrained = pyro.param("q").unconstrained()
        largest[name] = float(unconstrained.grad.abs().max())
        unconstrained.grad = None
    assert largest["Pyro"] < 1e-12  # documents Pyro 1.9.2: the exact gradient is not zero
    assert largest["ours"] > 1e-3


# --- exact, by quadrature: one normal and one bit, in both orders ---------------------------------


class Mixed:
    """A bit and a normal, each below the other in turn; parameters of each datum its own."""

    def __init__(self, order: str) -> None:
        g = torch.Generator().manual_seed(2)
        self.order = order
        self.x = torch.randn(N, D, generator=g)
        self.values = {
            "w": torch.randn(N, D, 3, generator=g) / 2,
            "prior": torch.randn(N, 1, generator=g)[:, 0],
            "bit": torch.randn(N, 2, generator=g) / 2,
            "loc": torch.randn(N, 2, generator=g) / 2,
            "scale": torch.rand(N, generator=g) / 2 + 0.6,
        }

    @staticmethod
    def mean_of_x(v: dict[str, Tensor], bit: Tensor, z: Tensor) -> Tensor:
        return v["w"][..., 0] * bit[..., None] + v["w"][..., 1] * z[..., None] + v["w"][..., 2]

    def programs(self, v: dict[str, Tensor], normal: type, bit_kind: type) -> tuple:
        def model(x):
            with pyro.plate("data", len(x)):
                bit = pyro.sample("bit", dist.Bernoulli(logits=v["prior"]))
                z = pyro.sample("z", dist.Normal(bit - 0.5, 1.0))
                loc = self.mean_of_x(v, bit, z)
                pyro.sample("x", dist.Normal(loc, 0.9).to_event(1), obs=x)

        def normal_below(x):
            with pyro.plate("data", len(x)):
                bit = pyro.sample("bit", bit_kind(logits=v["bit"][..., 0]))
                pyro.sample("z", normal(v["loc"][..., 0] + v["loc"][..., 1] * bit, v["scale"]))

        def bit_below(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", normal(v["loc"][..., 0], v["scale"]))
                pyro.sample("bit", bit_kind(logits=v["bit"][..., 0] + v["bit"][..., 1] * z))

        return model, normal_below if self.order == "normal below bit" else bit_below

    def terms(self, v: dict[str, Tensor], bit: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """Z, log p, log q and log q of the bit, written out."""
        if self.order == "normal below bit":
            loc = v["loc"][:, 0] + v["loc"][:, 1] * bit
            z = loc + v["scale"] * noise
            logits = v["bit"][:, 0] + 0 * z
        else:
            loc = v["loc"][:, 0]
            z = loc + v["scale"] * noise
            logits = v["bit"][:, 0] + v["bit"][:, 1] * z
        return z, *self.densities(v, bit, z, loc, logits)

    def densities(
        self, v: dict[str, Tensor], bit: Tensor, z: Tensor, loc: Tensor, logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_q_bit = bernoulli(bit, logits)
        log_p = bernoulli(bit, v["prior"]) + gauss(z, bit - 0.5, 1.0)
        log_p = log_p + gauss(self.x, self.mean_of_x(v, bit, z), 0.9).sum(-1)
        return log_p, log_q_bit + gauss(z, loc, v["scale"]), log_q_bit


K_MIXED, NODES = 2, 14


def quadrature() -> tuple[Tensor, Tensor, Tensor]:
    """Noise [K, G], bits [K, G] and the weight of the noise [G] of all nodes and outcomes."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    weights = weights / weights.sum()
    grid = list(itertools.product(range(NODES), repeat=K_MIXED))
    bits = list(itertools.product([0.0, 1.0], repeat=K_MIXED))
    noise = torch.tensor([[nodes[i] for i in g] for g in grid for _ in bits]).T
    outcome = torch.tensor([b for _ in grid for b in bits]).T
    weight = torch.tensor([math.prod(weights[i] for i in g) for g in grid for _ in bits])
    return noise, outcome, weight


def integrate_mixed(order: str, estimator: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Expected value and gradient of the code under test over all nodes and outcomes."""
    mixed = Mixed(order)
    noise, outcome, weight = quadrature()
    count = noise.shape[1]
    noise, outcome = (
        t[:, :, None].expand(-1, -1, N).reshape(K_MIXED, -1) for t in (noise, outcome)
    )
    leaves = spread(mixed.values, count)
    shape = (K_MIXED, count * N)
    normal = scripted(dist.Normal, lambda d: d.loc + d.scale * noise, shape)
    bit = scripted(dist.Bernoulli, lambda _: outcome, shape)
    model, guide = mixed.programs(leaves, normal, bit)
    x = mixed.x.repeat(count, 1)
    gradient = each_gradient(estimator, model, guide, x, leaves)
    value = estimator.bound(model, guide, x)
    grid = (K_MIXED, count, N)
    _, _, _, log_q_bit = mixed.terms(mixed.values, outcome.view(grid), noise.view(grid))
    chance = weight[:, None] * log_q_bit.sum(0).exp()
    assert torch.allclose(chance.sum(0), torch.ones(N), atol=1e-10)
    expected = {
        n: (chance.reshape(count, N, *[1] * (g.dim() - 1)) * g.reshape(count, N, *g.shape[1:])).sum(
            0
        )
        for n, g in gradient.items()
    }
    return (chance * value.reshape(count, N)).sum(0), expected


def exact_mixed(order: str, reduce: Callable) -> tuple[Tensor, dict[str, Tensor]]:
    mixed = Mixed(order)
    v = {n: t.clone().requires_grad_() for n, t in mixed.values.items()}
    noise, outcome, weight = quadrature()
    grid = (K_MIXED, -1, N)
    _, log_p, log_q, log_q_bit = mixed.terms(
        v, outcome[:, :, None].expand(grid), noise[:, :, None].expand(grid)
    )
    value = (weight[:, None] * log_q_bit.sum(0).exp() * reduce(log_p - log_q)).sum(0)
    return value.detach(), dict(
        zip(v, torch.autograd.grad(value.sum(), list(v.values())), strict=True)
    )


ORDERS = ("normal below bit", "bit below normal")
# The last two do not follow the gradient node by node; 14 nodes integrate theirs to 1e-6.
MIXED: list[tuple[Callable, Callable, float]] = [
    (PathwiseELBO, mean_log_weight, 1e-12),
    (ImportanceWeighted, log_mean_exp, 1e-12),
    (lambda k: Renyi(k, alpha=0.3), renyi(0.3), 1e-12),
    (lambda k: MIWAE(k, num_groups=2), mean_of_groups, 1e-12),
    (
        lambda k: CIWAE(k, beta=0.3),
        lambda w: 0.3 * mean_log_weight(w) + 0.7 * log_mean_exp(w),
        1e-12,
    ),
    (StickingTheLanding, mean_log_weight, 1e-6),
    (LeaveOneOut, mean_log_weight, 1e-6),
    (VIMCO, log_mean_exp, 1e-3),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("make", "reduce", "tolerance"), MIXED)
def test_guides_that_mix_a_normal_and_a_bit_have_the_exact_gradient(order, make, reduce, tolerance):
    value, gradient = integrate_mixed(order, make(K_MIXED))
    exact_value, exact_gradient = exact_mixed(order, reduce)
    assert float((value - exact_value).abs().max()) < EXACT
    assert differences(gradient, exact_gradient) < tolerance


@pytest.mark.parametrize("order", ORDERS)
def test_piwae_moves_the_model_by_the_whole_bound_and_the_guide_by_the_groups(order):
    value, gradient = integrate_mixed(order, PIWAE(K_MIXED, num_groups=2))
    exact_value, whole = exact_mixed(order, log_mean_exp)
    _, groups = exact_mixed(order, mean_of_groups)
    assert float((value - exact_value).abs().max()) < EXACT
    for name in ("w", "prior"):
        assert float((gradient[name] - whole[name]).abs().max()) < EXACT
    for name in ("bit", "loc", "scale"):
        assert float((gradient[name] - groups[name]).abs().max()) < EXACT
        assert float((gradient[name] - whole[name]).abs().max()) > 1e-3


def test_a_mixed_guide_without_the_score_of_its_bit_is_found_out(monkeypatch):
    monkeypatch.setattr(table, "_vimco", lambda w, power=1.0: torch.zeros_like(w))
    _, gradient = integrate_mixed(ORDERS[0], ImportanceWeighted(K_MIXED))
    _, exact_gradient = exact_mixed(ORDERS[0], log_mean_exp)
    assert differences(gradient, exact_gradient) > 1e-2


# --- exact, by quadrature: a ladder of normals, an inner plate and a ragged mask ------------------


class Ladder:
    """z1 -> z2 -> pixels in model and guide; some pixels are missing."""

    pixels = 2

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(3)
        self.x = torch.randn(self.pixels, N, generator=g)
        self.seen = torch.tensor([[True, True, False], [True, False, True]])
        self.values = {
            "w": torch.randn(N, generator=g),
            "a": torch.randn(N, generator=g) / 2,
            "b": torch.randn(N, generator=g) / 2,
            "c": torch.randn(N, generator=g) / 2,
        }

    def programs(self, v: dict[str, Tensor], first: type, second: type) -> tuple:
        def model(x, seen):
            with pyro.plate("data", x.shape[-1], dim=-1):
                z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
                z2 = pyro.sample("z2", dist.Normal(v["w"] * z1, 1.1))
                with pyro.plate("pixels", self.pixels, dim=-2), poutine.mask(mask=seen):
                    pyro.sample("x", dist.Normal(z2, 0.9), obs=x)

        def guide(x, seen):
            with pyro.plate("data", x.shape[-1], dim=-1):
                z1 = pyro.sample("z1", first(v["a"], 0.8))
                pyro.sample("z2", second(v["b"] + v["c"] * z1, 0.7))

        return model, guide

    def log_weights(self, v: dict[str, Tensor], noise: Tensor) -> Tensor:
        z1 = v["a"] + 0.8 * noise[0]
        loc = v["b"] + v["c"] * z1
        z2 = loc + 0.7 * noise[1]
        log_p = gauss(z1, 0.0, 1.0) + gauss(z2, v["w"] * z1, 1.1)
        for row, seen in zip(self.x, self.seen, strict=True):
            log_p = log_p + seen * gauss(row, z2, 0.9)
        return log_p - gauss(z1, v["a"], 0.8) - gauss(z2, loc, 0.7)


def ladder_nodes(nodes: int) -> tuple[Tensor, Tensor]:
    """Noise of two latents and two particles [2, 2, G], and its weight [G]."""
    at, weights = (torch.tensor(t) for t in np.polynomial.hermite_e.hermegauss(nodes))
    grid = torch.cartesian_prod(*[torch.arange(nodes)] * 4).T
    return at[grid].view(2, 2, -1), (weights / weights.sum())[grid].prod(0)


# Nodes, and how far the quadrature (not the estimator) is off.
LADDER: list[tuple[Callable, Callable, int, float]] = [
    (PathwiseELBO, mean_log_weight, 3, 1e-12),
    (StickingTheLanding, mean_log_weight, 3, 1e-12),
    (ScoreFunction, mean_log_weight, 4, 1e-11),
    (LeaveOneOut, mean_log_weight, 4, 1e-11),
    (ImportanceWeighted, log_mean_exp, 4, 1e-12),
    (lambda k: Renyi(k, alpha=0.5), renyi(0.5), 4, 1e-12),
    (lambda k: Renyi(k, alpha=2.0), renyi(2.0), 4, 1e-12),
    (lambda k: MIWAE(k, num_groups=1), log_mean_exp, 4, 1e-12),
    (DReG, log_mean_exp, 12, 6e-3),
    (lambda k: RenyiDReG(k, alpha=0.5), renyi(0.5), 12, 6e-3),
    (lambda k: RenyiDReG(k, alpha=2.0), renyi(2.0), 12, 6e-3),
    (VIMCO, log_mean_exp, 12, 1e-3),
]


def integrate_ladder(estimator: Any, nodes: int) -> tuple[Tensor, dict[str, Tensor]]:
    ladder = Ladder()
    noise, weight = ladder_nodes(nodes)
    count = noise.shape[-1]
    flat = noise[..., None].expand(2, 2, count, N).reshape(2, 2, 1, count * N)
    leaves = spread(ladder.values, count)
    shape = (2, 1, count * N)
    first = scripted(dist.Normal, lambda d: d.loc + d.scale * flat[0], shape)
    second = scripted(dist.Normal, lambda d: d.loc + d.scale * flat[1], shape)
    model, guide = ladder.programs(leaves, first, second)
    x, seen = ladder.x.repeat(1, count), ladder.seen.repeat(1, count)
    loss = estimator.differentiable_loss(model, guide, x, seen)
    gradient = torch.autograd.grad(-loss, list(leaves.values()))
    value = (weight[:, None] * estimator.bound(model, guide, x, seen).view(count, N)).sum(0)
    return value, {
        n: (weight[:, None] * g.view(count, N)).sum(0)
        for n, g in zip(leaves, gradient, strict=True)
    }


def exact_ladder(target: Callable, nodes: int) -> tuple[Tensor, dict[str, Tensor]]:
    ladder = Ladder()
    v = {n: t.clone().requires_grad_() for n, t in ladder.values.items()}
    noise, weight = ladder_nodes(nodes)
    log_w = ladder.log_weights(v, noise[..., None].expand(2, 2, -1, N))
    value = (weight[:, None] * target(log_w)).sum(0)
    gradient = torch.autograd.grad(value.sum(), list(v.values()))
    return value.detach(), dict(zip(v, gradient, strict=True))


@pytest.mark.parametrize(("make", "reduce", "nodes", "tolerance"), LADDER)
def test_hierarchies_inner_plates_and_masks_have_the_exact_gradient(make, reduce, nodes, tolerance):
    value, gradient = integrate_ladder(make(2), nodes)
    exact_value, exact_gradient = exact_ladder(reduce, nodes)
    assert float((value - exact_value).abs().max()) < EXACT
    assert differences(gradient, exact_gradient) < tolerance
    assert min(float(g.abs().max()) for g in exact_gradient.values()) > 0.05


def test_the_two_wake_phases_have_one_gradient_in_expectation():
    found = {kind: integrate_ladder(kind(2), 12)[1] for kind in (ReweightedWakeSleep, WakeDReG)}
    assert differences(found[ReweightedWakeSleep], found[WakeDReG]) < 6e-3
    bound = exact_ladder(log_mean_exp, 12)[1]
    assert differences(found[WakeDReG], bound) > 0.05  # the guide's target is another


# --- by Monte Carlo: probabilistic PCA ------------------------------------------------------------


class Pca:
    """x ~ N(W z, 0.7), z ~ N(0, 1); q = N(A x, diagonal scale); a copy of it all for each datum."""

    noise = 0.7
    latents = 2

    def __init__(self, features: int = 3, data: int = 2) -> None:
        g = torch.Generator().manual_seed(4)
        self.x = torch.randn(data, features, generator=g)
        self.values = {
            "w": torch.randn(data, features, self.latents, generator=g),
            "loc": torch.randn(data, self.latents, generator=g) / 3,
            "scale": torch.rand(data, self.latents, generator=g) / 3 + 0.4,
        }

    def programs(self, v: dict[str, Tensor]) -> tuple[Callable, Callable]:
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(self.latents), 1.0).to_event(1))
                loc = torch.einsum("bdh,...bh->...bd", v["w"], z)
                pyro.sample("x", dist.Normal(loc, self.noise).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(v["loc"], v["scale"]).to_event(1))

        return model, guide

    def elbo(self, v: dict[str, Tensor]) -> Tensor:
        """Kingma & Welling's closed form."""
        residual = self.x - torch.einsum("bdh,bh->bd", v["w"], v["loc"])
        spent = (residual**2).sum(-1) + torch.einsum("bdh,bh->b", v["w"] ** 2, v["scale"] ** 2)
        features = self.x.shape[-1]
        likelihood = -features * math.log(self.noise * math.sqrt(2 * math.pi))
        kl = 0.5 * (v["scale"] ** 2 + v["loc"] ** 2 - 1 - 2 * v["scale"].log()).sum(-1)
        return likelihood - 0.5 * spent / self.noise**2 - kl

    def evidence(self) -> Tensor:
        w = self.values["w"]
        covariance = self.noise**2 * torch.eye(w.shape[1]) + w @ w.mT
        found = torch.distributions.MultivariateNormal(torch.zeros(w.shape[1]), covariance)
        return found.log_prob(self.x)

    def log_weights(self, v: dict[str, Tensor], noise: Tensor, held: bool = False) -> Tensor:
        z = v["loc"] + v["scale"] * noise
        z = z.detach() if held else z
        log_p = gauss(z, 0.0, 1.0).sum(-1)
        loc = torch.einsum("bdh,...bh->...bd", v["w"], z)
        x = self.x.repeat(len(v["w"]) // len(self.x), 1)
        log_p = log_p + gauss(x, loc, self.noise).sum(-1)
        return log_p - gauss(z, v["loc"], v["scale"]).sum(-1)


REPEATS = 10_000


def draw_pca(estimator: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Independent values and gradients, [repeats, data, ...]."""
    pca = Pca()
    leaves = spread(pca.values, REPEATS)
    model, guide = pca.programs(leaves)
    x = pca.x.repeat(REPEATS, 1)
    gradient = each_gradient(estimator, model, guide, x, leaves)
    value = estimator.bound(model, guide, x)
    return value.view(REPEATS, -1), {
        n: g.view(REPEATS, len(pca.x), *g.shape[1:]) for n, g in gradient.items()
    }


@pytest.mark.parametrize(
    "name",
    ["PathwiseELBO", "AnalyticELBO", "StickingTheLanding", "ScoreFunction", "LeaveOneOut"],
)
def test_gradients_of_the_elbo_are_unbiased_on_pca(name):
    value, gradient = draw_pca(make_estimator(name, 4))
    v = {n: t.clone().requires_grad_() for n, t in Pca().values.items()}
    exact = Pca().elbo(v)
    assert_unbiased(value, exact.detach())
    for n, g in zip(v, torch.autograd.grad(exact.sum(), list(v.values())), strict=True):
        assert_unbiased(gradient[n], g)


BOUNDS_ON_PCA: list[tuple[Callable, Callable]] = [
    (ImportanceWeighted, log_mean_exp),
    (DReG, log_mean_exp),
    (VIMCO, log_mean_exp),
    (lambda k: Renyi(k, alpha=0.5), renyi(0.5)),
    (lambda k: RenyiDReG(k, alpha=0.5), renyi(0.5)),
    (lambda k: RenyiDReG(k, alpha=2.0), renyi(2.0)),
    (lambda k: MIWAE(k, num_groups=2), mean_of_groups),
    (lambda k: CIWAE(k, beta=0.3), lambda w: 0.3 * mean_log_weight(w) + 0.7 * log_mean_exp(w)),
]


def reference_pca(reduce: Callable) -> tuple[Tensor, dict[str, Tensor]]:
    """Values and pathwise gradients of as many independent draws, from plain torch."""
    pca = Pca()
    leaves = spread(pca.values, REPEATS)
    noise = torch.randn(4, *leaves["loc"].shape)
    value = reduce(pca.log_weights(leaves, noise))
    gradient = torch.autograd.grad(value.sum(), list(leaves.values()))
    return value.detach().view(REPEATS, -1), {
        n: g.view(REPEATS, len(pca.x), *g.shape[1:]) for n, g in zip(leaves, gradient, strict=True)
    }


@pytest.mark.parametrize(("make", "reduce"), BOUNDS_ON_PCA)
def test_gradients_of_many_particle_bounds_are_unbiased_on_pca(make, reduce):
    value, gradient = draw_pca(make(4))
    reference, reference_gradient = reference_pca(reduce)
    root = math.sqrt(REPEATS)
    assert_unbiased(value, reference.mean(0), reference.std(0) / root)
    for n, g in reference_gradient.items():
        assert_unbiased(gradient[n], g.mean(0), g.std(0) / root)


def test_a_guide_gradient_without_its_square_is_found_biased():
    class Wrong(table.Estimator):
        value_name = "IWAE"

        def coefficients(self, log_weights):
            row = DReG(4).coefficients(log_weights)
            return row._replace(path=row.theta)  # sticking the landing, biased for K > 1

    gradient = draw_pca(Wrong(4))[1]["scale"]
    exact = reference_pca(log_mean_exp)[1]["scale"]
    with pytest.raises(AssertionError):
        assert_unbiased(gradient, exact.mean(0), exact.std(0) / math.sqrt(REPEATS))


class OneNormal(Pca):
    """`Pca` with one latent, drawn by a distribution of the test's choice."""

    latents = 1

    def programs(self, v: dict[str, Tensor], normal: type = dist.Normal) -> tuple:
        model, _ = super().programs(v)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", normal(v["loc"], v["scale"]).to_event(1))

        return model, guide


OF_ITS_VALUE: dict[str, Callable] = {  # by the name of the value, for the default options
    "ELBO": mean_log_weight,
    "IWAE": log_mean_exp,
    "Renyi": renyi(0.5),
    "MIWAE": mean_of_groups,
    "CIWAE": lambda w: 0.5 * mean_log_weight(w) + 0.5 * log_mean_exp(w),
}
ON_A_NORMAL = [n for n in table.estimator_names() if n not in ("SleepPhi", "StraightThrough")]


def on_a_grid(k: int) -> tuple[Tensor, Tensor]:
    """Noise of K particles [K, G] and its probability; sums over it are good to 1e-6 here."""
    nodes = torch.linspace(-7.0, 7.0, 141)
    weights = (-0.5 * nodes**2).exp()
    chance = torch.cartesian_prod(*[weights] * k).reshape(-1, k).prod(1) / weights.sum() ** k
    return torch.cartesian_prod(*[nodes] * k).reshape(-1, k).T, chance


def run_on_a_grid(estimator: Any) -> tuple[dict[str, Tensor], Tensor, Tensor, Callable, Callable]:
    """Leaves and noise for each node, the chance of each datum's, and the programs."""
    noise, chance = on_a_grid(estimator.num_particles)
    pca = OneNormal()
    leaves = spread(pca.values, len(chance))
    grid = noise.repeat_interleave(len(pca.x), 1)[..., None]
    drawn = grid if len(grid) > 1 else grid[0]  # one particle has no dim of its own
    normal = scripted(dist.Normal, lambda d: d.loc + d.scale * drawn, tuple(drawn.shape))
    return leaves, grid, chance.repeat_interleave(len(pca.x)), *pca.programs(leaves, normal)


@pytest.mark.parametrize("name", ON_A_NORMAL)
def test_an_estimator_says_whether_its_gradient_is_that_of_its_value(name):
    """Expectations over two particles."""
    pca, estimator = OneNormal(), make_estimator(name, 2)
    leaves, grid, chance, model, guide = run_on_a_grid(estimator)
    x = pca.x.repeat(len(chance) // len(pca.x), 1)

    def by_datum(gradient: Tensor) -> Tensor:
        return gradient.view(-1, len(pca.x), *gradient.shape[1:]).sum(0)

    found = {
        n: by_datum(torch.einsum("c,c...->c...", chance, g))
        for n, g in each_gradient(estimator, model, guide, x, leaves).items()
    }
    value = OF_ITS_VALUE[estimator.value_name](pca.log_weights(leaves, grid))
    exact = torch.autograd.grad((chance * value).sum(), list(leaves.values()))
    bias = differences(found, dict(zip(leaves, map(by_datum, exact), strict=True)))
    assert bias < 1e-5 if type(estimator).unbiased else bias > 0.01, bias


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_renyi_bounds_of_few_particles_lie_between_the_elbo_and_the_renyi_bound(alpha):
    """Daudel et al. (2023) for alpha below 1, and never above the evidence for any."""
    pca, found = OneNormal(), []
    for k in (1, 2):
        estimator = Renyi(k, alpha=alpha)
        _, _, chance, model, guide = run_on_a_grid(estimator)
        x = pca.x.repeat(len(chance) // len(pca.x), 1)
        value = chance * estimator.bound(model, guide, x).detach()
        found.append(value.view(-1, len(pca.x)).sum(0))
    noise, chance = on_a_grid(1)
    each = pca.log_weights(pca.values, noise[0][:, None, None].expand(-1, len(pca.x), 1))
    limit = (chance.log()[:, None] + (1 - alpha) * each).logsumexp(0) / (1 - alpha)
    torch.testing.assert_close(found[0], pca.elbo(pca.values), atol=1e-6, rtol=0)
    side = 1 if alpha < 1 else -1
    for nearer, farther in ((limit, found[1]), (found[1], found[0])):
        assert bool((side * (nearer - farther) > 1e-3).all())
    assert all(bool((value < pca.evidence()).all()) for value in found)


def at_the_posterior() -> tuple[Callable, Callable, Tensor, dict[str, Tensor]]:
    pca = Pca(data=5)
    w = pca.values["w"]
    precision = torch.eye(pca.latents) + w.mT @ w / pca.noise**2
    covariance = torch.linalg.inv(precision)
    leaves = {
        "loc": (covariance @ w.mT @ pca.x[..., None])[..., 0] / pca.noise**2,
        "tril": torch.linalg.cholesky(covariance),
    }
    leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
    model, _ = pca.programs(pca.values)

    def guide(x):
        with pyro.plate("data", len(x)):
            q = dist.MultivariateNormal(leaves["loc"], scale_tril=leaves["tril"])
            pyro.sample("z", q)

    return model, guide, pca.x, leaves


@pytest.mark.parametrize("make", [StickingTheLanding, DReG, RenyiDReG, WakeDReG])
def test_the_guide_has_no_gradient_at_the_exact_posterior(make):
    model, guide, x, leaves = at_the_posterior()
    for _ in range(3):
        gradient = each_gradient(make(6), model, guide, x, leaves)
        assert max(float(g.abs().max()) for g in gradient.values()) < EXACT


@pytest.mark.parametrize("make", [PathwiseELBO, ImportanceWeighted, ReweightedWakeSleep])
def test_other_estimators_are_noisy_at_the_exact_posterior(make):
    model, guide, x, leaves = at_the_posterior()
    gradient = each_gradient(make(6), model, guide, x, leaves)
    assert min(float(g.abs().max()) for g in gradient.values()) > 0.05


# AnalyticELBO takes the KL exactly and draws the likelihood: unbiased, and not constant there.
OFF_THE_TABLE = ("AnalyticELBO", "SleepPhi", "StraightThrough")


@pytest.mark.parametrize("name", [n for n in estimator_names() if n not in OFF_THE_TABLE])
def test_every_bound_is_the_evidence_at_the_exact_posterior(name):
    model, guide, x, _ = at_the_posterior()
    exact = Pca(data=5).evidence()
    found = make_estimator(name, 4).bound(model, guide, x)
    assert float((found - exact).abs().max()) < 1e-11


def test_bounds_rise_with_particles_and_stay_below_the_evidence():
    pca = Pca()
    model, guide = pca.programs(
        {n: t.repeat(4000, *[1] * (t.dim() - 1)) for n, t in pca.values.items()}
    )
    x = pca.x.repeat(4000, 1)
    drawn = {k: ImportanceWeighted(k).bound(model, guide, x).view(4000, -1) for k in (1, 2, 5, 20)}
    for lower, upper in itertools.pairwise([*drawn.values(), pca.evidence().expand(4000, -1)]):
        rise = upper - lower
        assert bool((rise.mean(0) > ERRORS * rise.std(0) / math.sqrt(4000)).all())


def test_the_bounds_are_ordered_at_the_same_draws():
    pca = Pca()
    model, guide = pca.programs(pca.values)
    found = {}
    for make in (
        ImportanceWeighted,
        lambda k: Renyi(k, alpha=0.5),
        lambda k: CIWAE(k, beta=0.5),
        lambda k: MIWAE(k, num_groups=2),
        PathwiseELBO,
        lambda k: Renyi(k, alpha=2.0),
    ):
        pyro.set_rng_seed(5)
        estimator = make(6)
        key = (type(estimator).__name__, getattr(estimator, "alpha", None))
        found[key] = estimator.bound(model, guide, pca.x)
    iwae, half, convex, groups, elbo, two = found.values()
    for upper, lower in ((iwae, half), (half, elbo), (iwae, convex), (convex, elbo)):
        assert bool((upper > lower).all())
    assert bool((iwae > groups).all() and (groups > elbo).all() and (elbo > two).all())


def test_renyi_goes_from_iwae_to_the_elbo():
    pca = Pca()
    model, guide = pca.programs(pca.values)

    def bound(estimator: Any) -> Tensor:
        pyro.set_rng_seed(6)
        return estimator.bound(model, guide, pca.x)

    iwae, elbo = bound(ImportanceWeighted(6)), bound(PathwiseELBO(6))
    assert torch.allclose(bound(Renyi(6, alpha=0.0)), iwae, rtol=0, atol=EXACT)
    assert torch.allclose(bound(RenyiDReG(6, alpha=0.0)), iwae, rtol=0, atol=EXACT)
    distance = [
        float((bound(Renyi(6, alpha=1 - step)) - elbo).abs().max()) for step in (1e-2, 1e-4, 1e-6)
    ]
    # The bound is smooth in alpha: the distance falls in proportion to 1 - alpha.
    assert distance[1] == pytest.approx(distance[0] / 100, rel=0.1)
    assert distance[2] == pytest.approx(distance[1] / 100, rel=0.1)


# --- against Pyro's own ---------------------------------------------------------------------------


class Amortised(nn.Module):
    """A small linear autoencoder with shared weights, as users write them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.decoder, self.encoder = nn.Linear(H, D), nn.Linear(D, H)
        self.log_scale = nn.Parameter(torch.full((H,), -0.5))
        self.calls = {"model": 0, "guide": 0}

    def model(self, x: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        self.calls["model"] += 1
        pyro.module("model", self)
        with pyro.plate("data", size or len(x), subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(H), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.6).to_event(1), obs=x)

    def guide(self, x: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        self.calls["guide"] += 1
        pyro.module("model", self)
        with pyro.plate("data", size or len(x), subsample=rows):
            scale = self.log_scale.exp()
            pyro.sample("z", dist.Normal(self.encoder(x), scale).to_event(1))

    def gradients(self) -> list[Tensor]:
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters()]
        self.zero_grad(set_to_none=True)
        return found


def data(count: int = N) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(8))


PYRO: dict[str, Any] = {"num_particles": 5, "vectorize_particles": True, "max_plate_nesting": 1}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: PathwiseELBO(5), lambda: Trace_ELBO(**PYRO)),
        (lambda: ImportanceWeighted(5), lambda: RenyiELBO(0, **PYRO)),
        (lambda: Renyi(5, alpha=0.4), lambda: RenyiELBO(0.4, **PYRO)),
        (lambda: Renyi(5, alpha=2.5), lambda: RenyiELBO(2.5, **PYRO)),
        (lambda: CIWAE(5, beta=1.0), lambda: Trace_ELBO(**PYRO)),
        (lambda: MIWAE(5, num_groups=5), lambda: Trace_ELBO(**PYRO)),
        (lambda: MIWAE(5, num_groups=1), lambda: RenyiELBO(0, **PYRO)),
        (lambda: PIWAE(5, num_groups=1), lambda: RenyiELBO(0, **PYRO)),
    ],
)
def test_the_same_seed_gives_the_loss_and_gradient_of_pyro(ours, theirs):
    pair, x = Amortised(), data()
    found = []
    for make in (ours, theirs):
        pyro.set_rng_seed(9)
        loss = make().loss_and_grads(pair.model, pair.guide, x)
        found.append((loss, pair.gradients()))
    (a, grads_a), (b, grads_b) = found
    assert a == pytest.approx(b, rel=1e-12)
    for p, q in zip(grads_a, grads_b, strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-12)


def test_a_subsampled_bound_stays_a_bound_where_pyros_does_not():
    pca = Pca(data=6)
    values = {n: t[:1].expand(6, *t.shape[1:]) for n, t in pca.values.items()}
    pca.values = values  # one W for all data
    rows = torch.tensor([0, 3])
    evidence = float(3 * pca.evidence()[rows].sum())  # log p(x) of the rows on the scale N/B

    def model(x):
        with pyro.plate("data", 6, subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = torch.einsum("dh,...bh->...bd", values["w"][0], z)
            pyro.sample("x", dist.Normal(loc, pca.noise).to_event(1), obs=x[rows])

    def guide(x):
        with pyro.plate("data", 6, subsample=rows):
            shared = dist.Normal(values["loc"][:2], values["scale"][:2])
            pyro.sample("z", shared.to_event(1))

    ours = ImportanceWeighted(20)
    full = RenyiELBO(0, num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    found = torch.tensor(
        [[-loss.loss(model, guide, pca.x) for loss in (ours, full)] for _ in range(200)]
    )
    mean, error = found.mean(0), found.std(0) / math.sqrt(200)
    assert mean[0] < evidence - ERRORS * error[0]
    assert mean[1] > evidence + ERRORS * error[1]  # documents Pyro 1.9.2: N/B inside the log
    unscaled = ours.bound(model, guide, pca.x)
    assert unscaled.shape == (2,)


def test_pyros_reweighted_wake_sleep_is_per_batch_and_ours_per_datum():
    pair, x = Amortised(), data(20)
    pyro.set_rng_seed(10)
    ours = ReweightedWakeSleep(6).loss(pair.model, pair.guide, x)
    pyro.set_rng_seed(10)
    theirs = pyro.infer.ReweightedWakeSleep(
        num_particles=6, vectorize_particles=True, max_plate_nesting=1
    ).loss(pair.model, pair.guide, x)[0]
    pyro.set_rng_seed(10)
    with pyro.plate("k", 6, dim=-2):
        q = poutine.trace(pair.guide).get_trace(x)
        p = poutine.trace(poutine.replay(pair.model, trace=q)).get_trace(x)
    p.compute_log_prob()
    q.compute_log_prob()
    log_w = sum(p.nodes[n]["log_prob"] for n in ("x", "z")) - q.nodes["z"]["log_prob"]
    assert -ours == pytest.approx(float(log_mean_exp(log_w.detach()).sum()), rel=1e-12)
    assert -theirs == pytest.approx(float(log_mean_exp(log_w.detach().sum(1))), rel=1e-12)
    assert theirs > ours + 1


@pytest.mark.parametrize(("kind", "power"), [(PathwiseELBO, 0), (ImportanceWeighted, 1), (DReG, 2)])
def test_enumerated_latents_of_the_model_are_summed_out_of_the_weights(kind, power):
    """Gradients by hand at the same draws: through z, and at z held fixed."""
    x, k = data()[:, 0], 5
    g = torch.Generator().manual_seed(18)
    loc, means = (torch.randn(n, generator=g).requires_grad_() for n in (N, 2))
    weights = torch.tensor([0.3, 0.7])

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(weights), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(means[c], 0.8))
            pyro.sample("x", dist.Normal(z, 0.9), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.7))

    pyro.set_rng_seed(19)
    loss = kind(k).differentiable_loss(model, guide, x)
    found = torch.autograd.grad(-loss, (loc, means))
    pyro.set_rng_seed(19)
    z = (loc + 0.7 * torch.randn(k, N)).detach().requires_grad_()
    log_p = (gauss(z[..., None], means, 0.8) + weights.log()).logsumexp(-1) + gauss(x, z, 0.9)
    log_w = log_p - gauss(z, loc.detach(), 0.7)
    w = log_w.softmax(0).detach() if power else torch.full((k, N), 1 / k)
    by_z = torch.autograd.grad(log_w.sum(), z, retain_graph=True)[0]
    by_means = torch.autograd.grad((w * log_p).sum(), means)[0]
    by_loc = (w**power * by_z).sum(0) if power else by_z.mean(0)  # d z / d loc = 1
    if kind is not DReG:
        by_loc = by_loc - (w * (z - loc) / 0.49).detach().sum(0)
    value = log_w.mean(0) if not power else log_mean_exp(log_w)
    assert float(-loss.detach()) == pytest.approx(float(value.sum().detach()), rel=1e-12)
    assert torch.allclose(found[0], by_loc, rtol=0, atol=EXACT)
    assert torch.allclose(found[1], by_means, rtol=0, atol=EXACT)


@pytest.mark.parametrize("kind", [ImportanceWeighted, DReG, VIMCO, ReweightedWakeSleep])
def test_impossible_particles_have_no_weight_and_leave_the_bound_finite(kind):
    """Prior N(0, 1) cut to |z| < 1: its evidence is the mass left, at the cut posterior's guide."""
    loc = torch.zeros(N).requires_grad_()

    def model(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("cut", torch.where(z.abs() > 1, -math.inf, 0.0 * z))

    def guide(x):
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(loc, 1.0))

    found = -kind(4000).loss_and_grads(model, guide, data())
    mass = math.erf(2**-0.5)
    error = math.sqrt(N * (1 - mass) / mass / 4000)
    assert found == pytest.approx(N * math.log(mass), abs=ERRORS * error)
    assert loc.grad is not None
    assert bool(loc.grad.isfinite().all())


# --- how they are used ----------------------------------------------------------------------------

CONTINUOUS = [n for n in estimator_names() if n != "StraightThrough"]


@pytest.mark.parametrize("name", CONTINUOUS)
def test_svi_and_the_elbo_module_have_the_gradient_of_loss_and_grads(name):
    pair, x = Amortised(), data()
    pyro.set_rng_seed(11)
    loss = make_estimator(name, 4).loss_and_grads(pair.model, pair.guide, x)
    expected = pair.gradients()
    assert any(float(g.abs().max()) > 1e-3 for g in expected)

    class Program(nn.Module):
        def __init__(self, run: Callable) -> None:
            super().__init__()
            self.inner, self.run = pair, run

        def forward(self, x):
            return self.run(x)

    pyro.set_rng_seed(11)
    module = make_estimator(name, 4)(Program(pair.model), Program(pair.guide))
    again = module(x)
    again.backward()
    assert float(again.detach()) == pytest.approx(loss, rel=1e-12)
    for p, q in zip(pair.gradients(), expected, strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-13)

    pyro.set_rng_seed(11)
    before = [p.detach().clone() for p in pair.parameters()]
    svi = SVI(pair.model, pair.guide, pyro.optim.SGD({"lr": 0.01}), make_estimator(name, 4))
    assert svi.step(x) == pytest.approx(loss, rel=1e-12)
    for p, start, g in zip(pair.parameters(), before, expected, strict=True):
        assert torch.allclose(p, start - 0.01 * g, rtol=1e-10, atol=1e-12)
    pyro.set_rng_seed(11)
    assert math.isfinite(svi.evaluate_loss(x))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_fit_trains_with_every_estimator(name):
    pair, x = Amortised(), data(12)
    result = fit(
        pair.model, pair.guide, x, loss=make_estimator(name, 4), epochs=2, batch_size=5,
        progress=False,
    )  # fmt: skip
    assert len(result.history["epoch"]) == 2
    assert math.isfinite(float(result.history["loss"][-1]))


ONE_PASS = ["PathwiseELBO", "AnalyticELBO", "ImportanceWeighted", "Renyi", "CIWAE", "MIWAE"]
ONE_PASS += ["ScoreFunction", "LeaveOneOut", "VIMCO", "ReweightedWakeSleep"]
TWO_PASSES = ["StickingTheLanding", "DReG", "RenyiDReG", "WakeDReG", "PIWAE"]


@pytest.mark.parametrize(
    ("name", "passes"), [(n, 1) for n in ONE_PASS] + [(n, 2) for n in TWO_PASSES]
)
def test_programs_run_as_often_as_the_estimator_needs(name, passes):
    pair, x = Amortised(), data()
    estimator = make_estimator(name, 4)
    estimator.loss_and_grads(pair.model, pair.guide, x)
    for count in (1, 2):
        pair.calls.update(model=0, guide=0)
        for _ in range(count):
            estimator.loss_and_grads(pair.model, pair.guide, x)
        assert pair.calls == {"model": passes * count, "guide": passes * count}
    pair.calls.update(model=0, guide=0)
    estimator.loss(pair.model, pair.guide, x)
    assert pair.calls == {"model": 1, "guide": 1}


def test_a_mixed_guide_takes_one_pass_where_the_gradient_is_the_whole_one():
    mixed, calls = Mixed(ORDERS[1]), []
    leaves = {n: t.clone().requires_grad_() for n, t in mixed.values.items()}
    model, guide = mixed.programs(leaves, dist.Normal, dist.Bernoulli)
    estimator = ImportanceWeighted(3)
    estimator.loss(model, guide, mixed.x)

    def counted(x):
        calls.append(1)
        return model(x)

    estimator.loss(counted, guide, mixed.x)
    calls.clear()
    estimator.loss_and_grads(counted, guide, mixed.x)
    assert len(calls) == 1


@pytest.mark.long
@pytest.mark.parametrize("name", ["PathwiseELBO", "DReG", "VIMCO", "AnalyticELBO", "PIWAE"])
def test_programs_that_take_one_particle_at_a_time_agree_with_those_that_take_all(name):
    """A loop draws its particles in another order: the means agree, within 4 standard errors."""
    pca = Pca()
    leaves = {n: t.clone().requires_grad_() for n, t in pca.values.items()}
    model, guide = pca.programs(leaves)

    def one_by_one(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = (leaves["w"] @ z.reshape(len(x), 2, 1)).reshape(len(x), 3)
            pyro.sample("x", dist.Normal(loc, pca.noise).to_event(1), obs=x)

    found = []
    for program in (model, one_by_one):
        estimator = make_estimator(name, 4)
        grads = [each_gradient(estimator, program, guide, pca.x, leaves)["loc"] for _ in range(150)]
        structure = estimator.structure_of(program, guide, ((pca.x,), {}))
        assert structure.vectorizable == (program is model)
        found.append(torch.stack(grads))
    together, alone = found
    error = alone.std(0) / math.sqrt(150)
    assert_unbiased(together, alone.mean(0), error)


def test_every_term_of_a_looped_program_is_that_of_the_vectorised_one_at_given_draws():
    """At the exact posterior no draw matters: looped DReG is 0 as well, and IWAE the evidence."""
    _, guide, x, leaves = at_the_posterior()

    def sequential(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = (Pca(data=5).values["w"] @ z.reshape(5, 2, 1)).reshape(5, 3)
            pyro.sample("x", dist.Normal(loc, Pca.noise).to_event(1), obs=x)

    gradient = each_gradient(DReG(3), sequential, guide, x, leaves)
    assert max(float(g.abs().max()) for g in gradient.values()) < EXACT
    found = ImportanceWeighted(3).bound(sequential, guide, x)
    assert torch.allclose(found, Pca(data=5).evidence(), atol=1e-11)


class Scales:
    """A positive latent, for autoguides: x ~ N(0, z), z ~ Gamma(3, 2)."""

    x = torch.tensor([0.3, -1.2, 2.0, 0.9], dtype=torch.float64)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(3.0, 2.0))
            pyro.sample("x", dist.Normal(0.0, z), obs=x)

    def elbo(self, loc: Tensor, scale: Tensor) -> Tensor:
        """The ELBO of log-normal guides, by quadrature on log z (80 nodes)."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        noise, weight = torch.tensor(nodes), torch.tensor(weights / weights.sum())
        log_z = loc + scale * noise[:, None]
        z = log_z.exp()
        log_p = 3 * math.log(2.0) - math.lgamma(3.0) + 2 * log_z - 2 * z + gauss(self.x, 0.0, z)
        return (weight[:, None] * (log_p - gauss(log_z, loc, scale) + log_z)).sum(0)


@pytest.mark.parametrize(
    "name", ["PathwiseELBO", "StickingTheLanding", "LeaveOneOut", "AnalyticELBO"]
)
def test_autonormal_with_a_positive_latent_is_unbiased(name):
    scales, repeats = Scales(), 3000
    guide = AutoNormal(scales.model, init_scale=0.4)
    x = scales.x.repeat(repeats)
    guide(x)
    parameters = [guide.locs.z_unconstrained, guide.scales.z_unconstrained]
    loss = make_estimator(name, 3)
    grads = torch.autograd.grad(-loss.differentiable_loss(scales.model, guide, x), parameters)
    value = loss.bound(scales.model, guide, x).view(repeats, -1)
    loc = guide.locs.z.detach().view(repeats, -1)[:1].clone().requires_grad_()
    raw = parameters[1].detach().view(repeats, -1)[:1].clone().requires_grad_()
    everywhere = guide.locs.z.detach().view(repeats, -1)
    assert bool((everywhere == everywhere[:1]).all())
    scale = torch.distributions.transform_to(constraints.softplus_positive)(raw)
    assert float((scale.detach() - guide.scales.z.detach()[0]).abs().max()) < EXACT
    exact = scales.elbo(loc, scale)
    assert_unbiased(value, exact.detach())
    for g, e in zip(grads, torch.autograd.grad(exact.sum(), (loc, raw)), strict=True):
        assert_unbiased(g.view(repeats, -1), e[0])


def test_delta_sites_that_parameters_move_are_refused_where_log_q_at_given_latents_is_needed():
    scales = Scales()
    guide = AutoStructured(scales.model, conditionals="normal", dependencies="linear")
    guide(scales.x)
    for kind in (StickingTheLanding, LeaveOneOut, DReG, VIMCO):
        with pytest.raises(ProgramError, match=r"Delta site 'z' by parameters.*PathwiseELBO"):
            kind(3, joint=True).loss_and_grads(scales.model, guide, scales.x)
    pyro.set_rng_seed(12)
    ours = PathwiseELBO(5, joint=True).loss_and_grads(scales.model, guide, scales.x)
    pyro.set_rng_seed(12)
    assert ours == pytest.approx(Trace_ELBO(**PYRO).loss(scales.model, guide, scales.x), rel=1e-12)


@pytest.mark.parametrize("kind", [AutoMultivariateNormal, AutoDiagonalNormal, AutoIAFNormal])
@pytest.mark.parametrize("name", ["StickingTheLanding", "DReG", "LeaveOneOut", "VIMCO"])
def test_autoguides_of_all_latents_at_once_are_joint(kind, name):
    scales = Scales()
    guide = kind(scales.model)
    estimator = make_estimator(name, 4, joint=True)
    assert math.isfinite(estimator.loss_and_grads(scales.model, guide, scales.x))
    found = [p.grad for p in guide.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in found)
    assert max(float(g.abs().max()) for g in found) > 1e-3


def test_guide_messengers_train_where_one_pass_is_enough():
    scales = Scales()
    guide = AutoNormalMessenger(scales.model)
    assert math.isfinite(ImportanceWeighted(3).loss_and_grads(scales.model, guide, scales.x))
    with pytest.raises(ProgramError, match="guide messenger"):
        DReG(3).loss_and_grads(scales.model, guide, scales.x)


def flow_pair(transform: Any) -> tuple[Callable, Callable]:
    model, _ = Pca().programs(Pca().values)

    def guide(x):
        pyro.module("flow", transform)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [transform]))

    return model, guide


@pytest.mark.parametrize("name", [n for n in CONTINUOUS if n != "SleepPhi"])
def test_flows_with_an_inverse_serve_every_estimator(name):
    model, guide = flow_pair(T.affine_autoregressive(2, hidden_dims=[5]))
    assert math.isfinite(make_estimator(name, 4).loss_and_grads(model, guide, Pca().x))


def test_the_second_pass_of_a_flow_gives_what_one_pass_gives():
    transform = T.affine_autoregressive(2, hidden_dims=[5])
    model, guide = flow_pair(transform)

    class TwoPasses(table.Estimator):
        value_name = "IWAE"

        def coefficients(self, log_weights):
            row = ImportanceWeighted(4).coefficients(log_weights)
            return row._replace(score=row.score * (1 + 1e-14))

    found = []
    for estimator in (ImportanceWeighted(4), TwoPasses(4)):
        pyro.set_rng_seed(13)
        transform.zero_grad()
        estimator.loss_and_grads(model, guide, Pca().x)
        found.append([p.grad.clone() for p in transform.parameters()])
    for p, q in zip(*found, strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", [T.planar, T.neural_autoregressive])
def test_flows_without_an_inverse_serve_one_pass_and_are_refused_a_second(kind):
    model, guide = flow_pair(kind(2))
    x = Pca().x
    for estimator in (PathwiseELBO(3), ImportanceWeighted(3), Renyi(3)):
        assert math.isfinite(estimator.loss_and_grads(model, guide, x))
        assert math.isfinite(estimator.loss(model, guide, x))
    for estimator in (StickingTheLanding(3), DReG(3), LeaveOneOut(3), ReweightedWakeSleep(3)):
        with pytest.raises(ProgramError, match="use PathwiseELBO, ImportanceWeighted or Renyi"):
            estimator.loss_and_grads(model, guide, x)


def test_bare_parameters_register_and_train():
    x = data()

    def model(x):
        w = pyro.param("w", lambda: torch.ones(D))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None] * w, 1.0).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: torch.zeros(len(x)))
        scale = pyro.param("scale", lambda: torch.ones(()), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    svi = SVI(model, guide, Adam({"lr": 0.1}), DReG(4))
    losses = [svi.step(x) for _ in range(60)]
    assert set(pyro.get_param_store()) == {"w", "loc", "scale"}
    assert sum(losses[-10:]) < sum(losses[:10])
    assert float((pyro.param("loc") != 0).double().mean()) == 1.0


def test_a_subsampled_plate_scales_value_and_gradient_by_n_over_b():
    pair, x = Amortised(), data(4)
    rows = torch.tensor([5, 1, 2, 8])
    for make in (PathwiseELBO, DReG, VIMCO, ReweightedWakeSleep, StickingTheLanding):
        pyro.set_rng_seed(14)
        loss = make(3).loss_and_grads(pair.model, pair.guide, x)
        alone = pair.gradients()
        pyro.set_rng_seed(14)
        scaled = make(3).loss_and_grads(pair.model, pair.guide, x, 10, rows)
        assert scaled == pytest.approx(2.5 * loss, rel=1e-12)
        for p, q in zip(pair.gradients(), alone, strict=True):
            assert torch.allclose(p, 2.5 * q, rtol=1e-10, atol=1e-12)


def test_one_estimator_serves_batches_of_changing_size_and_several_pairs():
    pair, estimator = Amortised(), DReG(3)
    for count in (7, 2, 5):
        assert estimator.bound(pair.model, pair.guide, data(count)).shape == (count,)
    rows = torch.arange(5)
    pyro.set_rng_seed(15)
    loss = estimator.loss(pair.model, pair.guide, data(5))
    pyro.set_rng_seed(15)
    assert estimator.loss(pair.model, pair.guide, data(5), 20, rows) == pytest.approx(4 * loss)
    other, guide, x, _ = at_the_posterior()
    assert torch.allclose(estimator.bound(other, guide, x), Pca(data=5).evidence())


def test_global_latents_have_one_weight_a_particle():
    x = data()

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0).expand([D]).to_event(1), obs=x)

    count = x.numel()
    loc, scale = float(x.sum()) / (count + 1), (count + 1) ** -0.5

    def guide(x):
        pyro.sample("m", dist.Normal(loc, scale))

    covariance = torch.eye(count) + 1.0
    exact = torch.distributions.MultivariateNormal(torch.zeros(count), covariance)
    found = DReG(4, joint=True).bound(model, guide, x)
    assert found.shape == (1,)
    assert float(found) == pytest.approx(float(exact.log_prob(x.flatten())), rel=1e-11)
    assert DReG(4).bound(model, guide, x).shape == (1,)  # inferred
    with pytest.raises(ProgramError, match="joint=True"):
        DReG(4, joint=False).bound(model, guide, x)


# --- VIMCO ----------------------------------------------------------------------------------------


def naive_vimco(w: Tensor, k: int) -> Tensor:
    """L - L_-k of one particle, from its definition (Mnih & Rezende 2016)."""
    replaced = w.clone()
    replaced[k] = torch.cat([w[:k], w[k + 1 :]]).mean(0)
    return log_mean_exp(w) - log_mean_exp(replaced)


@pytest.mark.parametrize("dominating", [0.0, 1e3, -1e3])
def test_vimcos_baselines_are_those_of_the_definition(dominating):
    w = torch.randn(7, N, generator=torch.Generator().manual_seed(16))
    w[4] += dominating
    row = VIMCO(7).coefficients(w)
    assert row.reinforce is not None
    expected = torch.stack([naive_vimco(w, k) for k in range(7)]) - w.softmax(0)
    assert float((row.score + row.reinforce - expected).abs().max()) < 1e-12 * max(
        1.0, abs(dominating)
    )


def test_an_impossible_particle_leaves_the_others_finite_baselines():
    w = torch.randn(5, N, generator=torch.Generator().manual_seed(17))
    w[2] = -math.inf
    reinforce = VIMCO(5).coefficients(w).reinforce
    assert reinforce is not None
    assert bool(reinforce[2].isfinite().all())
    others = torch.cat([w[:2], w[3:]])
    expected = others.logsumexp(0) - (others.logsumexp(0).exp() + others.mean(0).exp()).log()
    assert float((reinforce[2] - expected).abs().max()) < EXACT


class LargestTensor(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_vimco_needs_no_memory_of_particles_squared():
    particles, bits = 20_000, Bits()
    model, guide = bits.programs({n: t.requires_grad_() for n, t in bits.values.items()})
    with LargestTensor() as seen:
        loss = VIMCO(particles).loss_and_grads(model, guide, bits.x)
    assert math.isfinite(loss)
    assert bits.values["q"].grad is not None
    assert bool(bits.values["q"].grad.isfinite().all())
    assert seen.elements <= particles * N * D * H  # the largest tensor of the model's own


# --- refusals -------------------------------------------------------------------------------------

ANY_LATENT = ("ScoreFunction", "LeaveOneOut", "VIMCO", "ReweightedWakeSleep", "WakeSleep")


@pytest.mark.parametrize(
    "name",
    [n for n in estimator_names() if n not in (*ANY_LATENT, "SleepPhi", "StraightThrough")],
)
def test_a_discrete_guide_is_refused_with_the_site_and_the_way_out(name):
    bits = Bits()
    model, guide = bits.programs({n: t.requires_grad_() for n, t in bits.values.items()})
    with pytest.raises(ProgramError, match=r"'z' is not; use LeaveOneOut.*VIMCO") as caught:
        make_estimator(name, 4).loss_and_grads(model, guide, bits.x)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["DReG", "RenyiDReG", "WakeDReG"])
def test_a_mixed_guide_is_told_what_would_do(name):
    mixed = Mixed(ORDERS[0])
    pair = mixed.programs(mixed.values, dist.Normal, dist.Bernoulli)
    with pytest.raises(ProgramError, match=r"'bit' is not; .*ImportanceWeighted"):
        make_estimator(name, 4).loss_and_grads(*pair, mixed.x)


def test_a_mixed_guide_needs_a_second_particle_for_its_baseline():
    mixed = Mixed(ORDERS[0])
    pair = mixed.programs(mixed.values, dist.Normal, dist.Bernoulli)
    with pytest.raises(ProgramError, match=r"'bit'.*num_particles >= 2, or ScoreFunction"):
        PathwiseELBO(1).loss_and_grads(*pair, mixed.x)


@pytest.mark.parametrize("kind", [LeaveOneOut, VIMCO, ReweightedWakeSleep, WakeDReG])
def test_estimators_that_compare_particles_need_two(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} needs num_particles >= 2, not 1"):
        kind(1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PathwiseELBO(0), "num_particles"),
        (lambda: PathwiseELBO(True), "an integer from 1"),
        (lambda: MIWAE(5, num_groups=2), r"num_particles \(5\) must be a multiple"),
        (lambda: MIWAE(4, num_groups=0), "num_groups must be an integer from 1"),
        (lambda: PIWAE(4, num_groups=True), "num_groups must be an integer from 1"),
        (lambda: Renyi(4, alpha=1.0), "alpha must be"),
        (lambda: Renyi(4, alpha=-0.1), "alpha must be"),
        (lambda: RenyiDReG(4, alpha=math.nan), "alpha must be"),
        (lambda: Renyi(4, alpha=math.inf), "alpha must be"),
        (lambda: CIWAE(4, beta=1.1), "beta must lie"),
        (lambda: CIWAE(4, beta=math.nan), "beta must lie"),
        (lambda: make_estimator("IWAE", 4), "there is no estimator 'IWAE'; there are"),
    ],
)
def test_options_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- tighter bounds are not necessarily better ----------------------------------------------------


class Toy:
    """Rainforth's: x | z ~ N(z, I), z ~ N(mu, I), q = N(A x + b, 2/3 I), all near the optimum.

    Every repeat perturbs the optimum anew by N(0, 0.01^2) and has one x ~ N(mu, 2 I).
    """

    dims = 20

    def __init__(self, points: int, repeats: int) -> None:
        self.points, self.repeats = points, repeats
        mu_true = torch.randn(self.dims)
        self.x = mu_true + 2**0.5 * torch.randn(points, self.dims)

        def near(value: Tensor) -> Tensor:
            return value + 0.01 * torch.randn(points, self.dims)

        self.mu = near(mu_true)
        self.a = 0.5 * torch.eye(self.dims) + 0.01 * torch.randn(points, self.dims, self.dims)
        self.b = near(mu_true / 2)

    def gradients(self, estimator: Any) -> dict[str, Tensor]:
        """Per-datum gradients [repeats, points, dims]."""
        leaves = spread({"mu": self.mu, "b": self.b}, self.repeats)
        shift = (self.a @ self.x[..., None])[..., 0].repeat(self.repeats, 1)

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(leaves["mu"], 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                q = dist.Normal(shift + leaves["b"], (2 / 3) ** 0.5)
                pyro.sample("z", q.to_event(1))

        x = self.x.repeat(self.repeats, 1)
        found = each_gradient(estimator, model, guide, x, leaves)
        return {n: g.view(self.repeats, self.points, self.dims) for n, g in found.items()}


def deviation(gradient: Tensor) -> float:
    return float(gradient.var(0).mean().sqrt())


def signal_to_noise(signal: Tensor, noise: Tensor) -> float:
    """The mean over coordinates of |mean| / standard deviation."""
    return float((signal.mean(0).abs() / noise.var(0).mean(-1, keepdim=True).sqrt()).mean())


def slope(particles: list[int], values: list[float]) -> float:
    return float(np.polyfit(np.log(particles), np.log(values), 1)[0])


TOY_PARTICLES = {1: (20, 3000), 10: (20, 600), 100: (10, 150), 1000: (3, 60)}


@pytest.mark.long
def test_rainforths_toy_signal_falls_under_iwae_and_rises_under_dreg():
    """The anchors' figures are from one perturbation and one x: 17 % uncertain (20 coordinates).

    IWAE and DReG have one expectation, which DReG finds with far fewer draws: the signal of both is
    DReG's mean (where that is unbiased, by other tests), the noise is each one's own.
    """
    iwae, dreg, model = [], [], []
    deviations: dict[str, list[float]] = {"iwae": [], "dreg": []}
    for k, (points, repeats) in TOY_PARTICLES.items():
        toy = Toy(points, repeats)
        with_score, without = (toy.gradients(kind(k)) for kind in (ImportanceWeighted, DReG))
        iwae.append(signal_to_noise(without["b"], with_score["b"]))
        dreg.append(signal_to_noise(without["b"], without["b"]))
        model.append(signal_to_noise(with_score["mu"], with_score["mu"]))
        deviations["iwae"].append(deviation(with_score["b"]))
        deviations["dreg"].append(deviation(without["b"]))
    particles = list(TOY_PARTICLES)
    assert slope(particles, iwae) == pytest.approx(-0.5, abs=0.1)
    assert slope(particles, model) == pytest.approx(0.5, abs=0.1)
    assert slope(particles[1:], dreg[1:]) == pytest.approx(0.5, abs=0.1)
    # Standard deviations hardly depend on the perturbation.
    assert deviations["iwae"] == pytest.approx([1.63, 0.576, 0.185, 0.0585], rel=0.05)
    assert deviations["dreg"][:2] == pytest.approx([0.408, 0.0382], rel=0.05)
    # Signals do: 3 times 17 %.
    assert iwae[:3] == pytest.approx([0.065, 0.0228, 0.0081], rel=0.51)
    assert model == pytest.approx([0.732, 2.13, 6.67, 21.1], rel=0.51)
    assert dreg == pytest.approx([0.262, 0.348, 0.911, 2.82], rel=0.51)
