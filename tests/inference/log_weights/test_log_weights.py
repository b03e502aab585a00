"""Log weights against densities written out by hand, and against Pyro's own estimators."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer import autoguide as guides
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae import all_data, elbo_gap, fit, log_weights
from pyro_vae.inference.log_weights import effective_sample_size, elbo, importance_bound
from pyro_vae.inference.programs import FittedProgram, ProgramError, as_arguments, inspect_programs

N, K, D, H = 5, 7, 3, 2  # data, particles, features, latents: all different
SEED = 3


def normal(value: Tensor, loc: Any, scale: Any) -> Tensor:
    """The log-density of a normal, from its formula."""
    scale = torch.as_tensor(scale, dtype=value.dtype)
    return -0.5 * ((value - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def draws(guide: Callable, x: Any, *, nesting: int = 1, looped: bool = False) -> dict[str, Tensor]:
    """The latents of K particles at the seed, from Pyro alone."""
    args, kwargs = as_arguments(x)
    pyro.set_rng_seed(SEED)
    if looped:
        traces = [poutine.trace(guide).get_trace(*args, **kwargs) for _ in range(K)]
        names = [n for n, s in traces[0].nodes.items() if s["type"] == "sample"]
        return {n: torch.stack([t.nodes[n]["value"] for t in traces]) for n in names}
    with pyro.plate("k", K, dim=-1 - nesting):
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample"}


def gradient(leaf: Tensor) -> float:
    assert leaf.grad is not None
    return leaf.grad.item()


def pyro_elbo(model: Callable, guide: Callable, x: Any, structure: Any) -> float:
    """Pyro's own sum over the data of the ELBO, at the seed."""
    args, kwargs = as_arguments(x)
    pyro.set_rng_seed(SEED)
    loss = Trace_ELBO(
        num_particles=K,
        vectorize_particles=structure.vectorizable,
        max_plate_nesting=structure.max_plate_nesting,
    )
    return -float(loss.loss(model, guide, *args, **kwargs))


# --- the linear Gaussian --------------------------------------------------------------------------


class Linear:
    """x = W z + b + noise: everything in closed form."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.w = torch.randn(D, H, generator=g)
        self.b = torch.randn(D, generator=g)
        self.noise = 0.7
        self.a = torch.randn(H, D, generator=g) / 3
        self.x = torch.randn(N, D, generator=g)
        self.covariance = torch.linalg.inv(torch.eye(H) + self.w.T @ self.w / self.noise**2)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(H)).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.w.T + self.b, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.a.T, 0.8).to_event(1))

    def exact_guide(self, x: Tensor, error: float = 0.0) -> None:
        loc = (x - self.b) @ self.w @ self.covariance / self.noise**2 + error
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, self.covariance))

    def joint_density(self, x: Tensor, z: Tensor) -> Tensor:
        likelihood = normal(x, z @ self.w.T + self.b, self.noise).sum(-1)
        return likelihood + normal(z, 0.0, 1.0).sum(-1)

    def by_hand(self, x: Tensor, z: Tensor) -> Tensor:
        return self.joint_density(x, z) - normal(z, x @ self.a.T, 0.8).sum(-1)

    def evidence(self, x: Tensor) -> Tensor:
        covariance = self.w @ self.w.T + self.noise**2 * torch.eye(D)
        r = x - self.b
        quadratic = (r @ torch.linalg.inv(covariance) * r).sum(-1)
        return -0.5 * (quadratic + torch.logdet(covariance) + D * math.log(2 * math.pi))


@pytest.fixture
def linear() -> Linear:
    return Linear()


def test_equal_the_densities_written_by_hand(linear: Linear) -> None:
    weights = log_weights(linear.model, linear.guide, linear.x, K, seed=SEED)
    z = draws(linear.guide, linear.x)["z"]
    assert weights.shape == (K, N)
    torch.testing.assert_close(weights, linear.by_hand(linear.x, z), rtol=1e-12, atol=1e-12)
    # Must reject: the draws of another seed.
    other = log_weights(linear.model, linear.guide, linear.x, K, seed=SEED + 1)
    assert not torch.allclose(other, weights)


def test_mean_and_log_mean_exp_equal_pyros_bounds_at_the_same_seed(linear: Linear) -> None:
    weights = log_weights(linear.model, linear.guide, linear.x, K, seed=SEED)
    options = {"num_particles": K, "vectorize_particles": True, "max_plate_nesting": 1}
    pyro.set_rng_seed(SEED)
    trace = Trace_ELBO(**options).loss(linear.model, linear.guide, linear.x)
    pyro.set_rng_seed(SEED)
    renyi = RenyiELBO(alpha=0, **options).loss(linear.model, linear.guide, linear.x)
    assert -float(elbo(weights).sum()) == pytest.approx(trace, rel=1e-12)
    assert -float(importance_bound(weights).sum()) == pytest.approx(renyi, rel=1e-12)
    assert renyi < trace - 0.1  # must reject: the two bounds are different numbers here


def test_without_a_seed_the_draws_are_those_of_trace_elbo(linear: Linear) -> None:
    pyro.set_rng_seed(11)
    weights = log_weights(linear.model, linear.guide, linear.x, K)
    following = torch.rand(3)
    pyro.set_rng_seed(11)
    options = {"num_particles": K, "vectorize_particles": True, "max_plate_nesting": 1}
    loss = Trace_ELBO(**options).loss(linear.model, linear.guide, linear.x)
    assert -float(weights.mean(0).sum()) == pytest.approx(loss, rel=1e-12)
    assert torch.equal(following, torch.rand(3))  # no more and no fewer numbers were taken


@pytest.mark.parametrize("num_particles", [1, 2, 7])
def test_an_exact_guide_gives_the_evidence_without_variance(
    linear: Linear, num_particles: int
) -> None:
    weights = log_weights(linear.model, linear.exact_guide, linear.x, num_particles, seed=SEED)
    expected = linear.evidence(linear.x).expand(num_particles, N)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)

    def slightly_wrong(x: Tensor) -> None:
        linear.exact_guide(x, error=0.01)

    wrong = log_weights(linear.model, slightly_wrong, linear.x, num_particles, seed=SEED)
    assert float((wrong - expected).abs().min()) > 1e-6


def test_the_mean_weight_is_an_unbiased_estimate_of_the_evidence(linear: Linear) -> None:
    weights = log_weights(linear.model, linear.guide, linear.x, 40_000, seed=SEED)
    ratios = (weights - linear.evidence(linear.x)).exp()
    z = (ratios.mean(0) - 1) / (ratios.std(0) / len(ratios) ** 0.5)
    assert float(z.abs().max()) < 4.5  # 5 normal scores: fails once in 30,000 seeds


def test_reductions_have_the_closed_form_on_given_weights() -> None:
    weights = torch.tensor([[0.0, 1.0, -800.0], [math.log(3.0), 1.0, 800.0]])
    assert elbo(weights).tolist() == pytest.approx([math.log(3.0) / 2, 1.0, 0.0])
    expected = [math.log(2.0), 1.0, 800.0 - math.log(2.0)]
    assert importance_bound(weights).tolist() == pytest.approx(expected)
    assert effective_sample_size(weights).tolist() == pytest.approx([1.6, 2.0, 1.0])


def test_gradients_flow_to_modules_and_to_bare_parameters(linear: Linear) -> None:
    """d/dm of E log w of x ~ N(z, 1), z ~ N(0, 1), q = N(m, s): -m - (m - x), by hand per draw."""
    x = torch.randn(N)
    net = nn.Linear(1, 1)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(net(z[..., None])[..., 0], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.3))
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    guide(x)
    leaf = pyro.get_param_store().get_state()["params"]["loc"]
    log_weights(model, guide, x, K, seed=SEED).sum().backward()
    z = draws(guide, x)["z"].detach()
    w, b = net.weight.detach()[0, 0], net.bias.detach()[0]
    residual = x - w * z - b
    assert gradient(net.bias) == pytest.approx(float(residual.sum()))
    assert gradient(net.weight) == pytest.approx(float((residual * z).sum()))
    assert gradient(leaf) == pytest.approx(float((w * residual - z).sum()))
    assert pyro.get_param_store().get_state()["params"]["loc"] is leaf


@pytest.mark.parametrize("num_particles", [0, -1, 1.5, True, "2", None])
def test_num_particles_must_be_a_positive_integer(linear: Linear, num_particles: Any) -> None:
    unchecked = inspect.unwrap(log_weights)  # without the type checks that only tests have
    with pytest.raises(ValueError, match="num_particles must be an integer from 1, not"):
        unchecked(linear.model, linear.guide, linear.x, num_particles)


# --- users' programs, with the weights by hand ----------------------------------------------------


@dataclass
class Case:
    """A pair of programs, and its weights from the latents by formula."""

    model: Callable
    guide: Callable
    x: Any
    by_hand: Callable[[dict[str, Tensor]], Tensor]
    nesting: int = 1
    looped: bool = False
    scale: float = 1.0


def pair_at(dim: int) -> Case:
    x = torch.randn(N).reshape(N, *[1] * (-1 - dim))

    def plate() -> Any:
        return pyro.plate("observations", N, dim=dim)

    def model(x: Tensor) -> None:
        with plate():
            z = pyro.sample("z", dist.Normal(0.0, 2.0))
            pyro.sample("x", dist.Normal(z, 0.6), obs=x)

    def guide(x: Tensor) -> None:
        with plate():
            pyro.sample("z", dist.Normal(x / 3, 0.9))

    def by_hand(latents: dict[str, Tensor]) -> Tensor:
        z, flat = latents["z"].reshape(K, N), x.reshape(N)
        return normal(z, 0.0, 2.0) + normal(flat, z, 0.6) - normal(z, flat / 3, 0.9)

    return Case(model, guide, x, by_hand, nesting=-dim)


def sizeless() -> Case:
    x = torch.randn(N, D)

    def model(x: Tensor) -> None:
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.6).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(x / 3, 0.9).to_event(1))

    def by_hand(latents: dict[str, Tensor]) -> Tensor:
        z = latents["z"]
        return (normal(z, 0.0, 1.0) + normal(x, z, 0.6) - normal(z, x / 3, 0.9)).sum(-1)

    return Case(model, guide, x, by_hand)


def ragged() -> Case:
    """Sequences of unequal length in an inner plate, a hierarchy of two latents."""
    steps = 4
    x, lengths = torch.randn(steps, N), torch.tensor([1, 2, 4, 3, 1])
    mask = torch.arange(steps)[:, None] < lengths

    def model(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", N, dim=-1):
            top = pyro.sample("top", dist.Normal(0.0, 1.0))
            with pyro.plate("steps", steps, dim=-2), poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(top, 1.5))
                pyro.sample("x", dist.Normal(z, 0.6), obs=x)

    def guide(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", N, dim=-1):
            top = pyro.sample("top", dist.Normal(0.1, 0.7))
            with pyro.plate("steps", steps, dim=-2), poutine.mask(mask=mask):
                pyro.sample("z", dist.Normal((x + top) / 2, 0.9))

    def by_hand(latents: dict[str, Tensor]) -> Tensor:
        top, z = latents["top"].reshape(K, 1, N), latents["z"]
        inner = normal(z, top, 1.5) + normal(x, z, 0.6) - normal(z, (x + top) / 2, 0.9)
        outer = normal(top, 0.0, 1.0) - normal(top, 0.1, 0.7)
        return outer[:, 0] + (inner * mask).sum(1)

    return Case(model, guide, (x, mask), by_hand, nesting=2)


def factor_and_deterministic() -> Case:
    x = {"counts": torch.tensor([0.0, 3.0, 1.0, 2.0, 7.0]), "offset": torch.randn(N)}

    def model(counts: Tensor, *, offset: Tensor) -> None:
        with pyro.plate("data", len(counts)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            rate = pyro.deterministic("rate", (z + offset).exp())
            pyro.sample("counts", dist.Poisson(rate), obs=counts)
            pyro.factor("penalty", -(z**4))

    def guide(counts: Tensor, *, offset: Tensor) -> None:
        with pyro.plate("data", len(counts)):
            pyro.sample("z", dist.Normal((1 + counts).log() - offset, 0.9))

    def by_hand(latents: dict[str, Tensor]) -> Tensor:
        z, counts, offset = latents["z"], x["counts"], x["offset"]
        log_rate = z + offset
        likelihood = counts * log_rate - log_rate.exp() - torch.lgamma(counts + 1)
        prior = normal(z, 0.0, 1.0) - z**4
        return likelihood + prior - normal(z, (1 + counts).log() - offset, 0.9)

    return Case(model, guide, x, by_hand)


def discrete() -> Case:
    """A categorical latent that indexes parameters, drawn in the guide."""
    x, locs = torch.randn(N), torch.tensor([-2.0, 0.5, 1.0, 3.0])
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    q = torch.softmax(torch.randn(N, 4), -1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[z], 0.6), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(q))

    def by_hand(latents: dict[str, Tensor]) -> Tensor:
        z = latents["z"]
        return weights[z].log() + normal(x, locs[z], 0.6) - q[torch.arange(N), z].log()

    return Case(model, guide, x, by_hand)


def branching() -> Case:
    """`if z > 0` cannot be run on a tensor of particles."""
    x = torch.tensor([1.3])

    def model(x: Tensor) -> None:
        with pyro.plate("data", 1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z if z > 0 else 3 * z, 0.6), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 1):
            pyro.sample("z", dist.Normal(x / 3, 0.9))

    def by_hand(latents: dict[str, Tensor]) -> Tensor:
        z = latents["z"]
        loc = torch.where(z > 0, z, 3 * z)
        return normal(z, 0.0, 1.0) + normal(x, loc, 0.6) - normal(z, x / 3, 0.9)

    return Case(model, guide, x, by_hand, looped=True)


def reshaping() -> Case:
    """A decoder that flattens all but the batch."""
    x, w = torch.randn(N, D), torch.randn(2 * H, D)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, H), 1.0).to_event(2))
            pyro.sample("x", dist.Normal(z.reshape(len(x), -1) @ w, 0.6).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.1, torch.ones(2, H)).to_event(2))

    def by_hand(latents: dict[str, Tensor]) -> Tensor:
        z = latents["z"].reshape(K, N, 2 * H)
        return normal(x, z @ w, 0.6).sum(-1) + (normal(z, 0.0, 1.0) - normal(z, 0.1, 1.0)).sum(-1)

    return Case(model, guide, x, by_hand, looped=True)


def wrong_without_an_error() -> Case:
    """`z.sum(1)` means the latents for one particle and the data for many: no error if N == H."""
    x = torch.randn(N)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(N), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(1), 0.6), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, None] / 3, 0.9 * torch.ones(N)).to_event(1))

    def by_hand(latents: dict[str, Tensor]) -> Tensor:
        z = latents["z"]
        latent = (normal(z, 0.0, 1.0) - normal(z, x[:, None] / 3, 0.9)).sum(-1)
        return latent + normal(x, z.sum(-1), 0.6)

    return Case(model, guide, x, by_hand, looped=True)


def convolutional() -> Case:
    side = 4
    decoder = nn.Sequential(
        nn.Linear(H, 8), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 1, 2, stride=2)
    )
    encoder = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, H))
    x = torch.randn(N, 1, side, side)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(H)).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.6).to_event(3), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.9).to_event(1))

    def by_hand(latents: dict[str, Tensor]) -> Tensor:
        z = latents["z"]
        image = decoder(z.reshape(K * N, H)).reshape(K, N, side * side)
        likelihood = normal(x.reshape(N, -1), image, 0.6).sum(-1)
        return likelihood + (normal(z, 0.0, 1.0) - normal(z, encoder(x), 0.9)).sum(-1)

    return Case(model, guide, x, by_hand, looped=True)


def markov() -> Case:
    """A state-space model whose time runs inside the plate, and a guide that filters."""
    steps = 4
    x = torch.randn(N, steps)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z: Any = 0.0
            for t in pyro.markov(range(steps)):
                z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 0.6), obs=x[:, t])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z: Any = 0.0
            for t in pyro.markov(range(steps)):
                z = pyro.sample(f"z_{t}", dist.Normal((z + x[:, t]) / 2, 0.9))

    def by_hand(latents: dict[str, Tensor]) -> Tensor:
        total, before = torch.zeros(K, N), torch.zeros(K, N)
        for t in range(steps):
            z = latents[f"z_{t}"]
            total = total + normal(z, 0.9 * before, 1.0) + normal(x[:, t], z, 0.6)
            total = total - normal(z, (before + x[:, t]) / 2, 0.9)
            before = z
        return total

    return Case(model, guide, x, by_hand)


def sequential_plate() -> Case:
    x = torch.randn(N, D)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for d in pyro.plate("features", D):
                z = pyro.sample(f"z_{d}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x_{d}", dist.Normal(z, 0.6), obs=x[:, d])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for d in pyro.plate("features", D):
                pyro.sample(f"z_{d}", dist.Normal(x[:, d] / 3, 0.9))

    def by_hand(latents: dict[str, Tensor]) -> Tensor:
        z = torch.stack([latents[f"z_{d}"] for d in range(D)], -1)
        return (normal(z, 0.0, 1.0) + normal(x, z, 0.6) - normal(z, x / 3, 0.9)).sum(-1)

    return Case(model, guide, x, by_hand)


def two_plates_around_everything() -> Case:
    """Both plates hold every site: the outer one is the batch, the inner one is summed."""
    x = torch.randn(N, D)

    def plates() -> Any:
        return pyro.plate("data", N, dim=-2), pyro.plate("columns", D, dim=-1)

    def model(x: Tensor) -> None:
        outer, inner = plates()
        with outer, inner:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.6), obs=x)

    def guide(x: Tensor) -> None:
        outer, inner = plates()
        with outer, inner:
            pyro.sample("z", dist.Normal(x / 3, 0.9))

    def by_hand(latents: dict[str, Tensor]) -> Tensor:
        z = latents["z"]
        return (normal(z, 0.0, 1.0) + normal(x, z, 0.6) - normal(z, x / 3, 0.9)).sum(-1)

    return Case(model, guide, x, by_hand, nesting=2)


def no_arguments() -> Case:
    case = pair_at(-1)
    model, guide, x = case.model, case.guide, case.x
    return Case(lambda: model(x), lambda: guide(x), (), case.by_hand)


def masked_site() -> Case:
    """A site under mask=False counts nothing; a distribution may hold its own mask."""
    x, seen = torch.randn(N), torch.tensor([True, False, True, True, False])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.6).mask(seen), obs=x)
            with poutine.mask(mask=False):
                pyro.sample("ignored", dist.Normal(z, 0.1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 3, 0.9))

    def by_hand(latents: dict[str, Tensor]) -> Tensor:
        z = latents["z"]
        return normal(z, 0.0, 1.0) + normal(x, z, 0.6) * seen - normal(z, x / 3, 0.9)

    return Case(model, guide, x, by_hand)


def missing_data() -> Case:
    """`obs_mask` makes a latent of what was not seen; the guide draws it."""
    x, seen = torch.randn(N), torch.tensor([True, False, True, True, False])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.6), obs=x, obs_mask=seen)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.2, 0.9))
            with poutine.mask(mask=~seen):
                pyro.sample("x_unobserved", dist.Normal(z, 0.8))

    def by_hand(latents: dict[str, Tensor]) -> Tensor:
        z, other = latents["z"], latents["x_unobserved"]
        missing = normal(other, z, 0.6) - normal(other, z, 0.8)
        data = torch.where(seen, normal(x, z, 0.6), missing)
        return normal(z, 0.0, 1.0) - normal(z, 0.2, 0.9) + data

    return Case(model, guide, x, by_hand)


def scaled(subsample: Callable[[], dict[str, Any]]) -> Case:
    """A fixed subsample: the weights leave out the factor N / B, which stands in the structure."""
    x = torch.randn(N)

    def model(x: Tensor) -> None:
        with pyro.plate("data", N, **subsample()) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.6), obs=x[rows])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", N, **subsample()) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 3, 0.9))

    def by_hand(latents: dict[str, Tensor]) -> Tensor:
        # The guide draws the rows first, so that at the seed they are these.
        rows = latents.get("data", torch.tensor([0, 3]))
        z = latents["z"]
        return normal(z, 0.0, 1.0) + normal(x[rows], z, 0.6) - normal(z, x[rows] / 3, 0.9)

    return Case(model, guide, x, by_hand, scale=N / 2)


CASES = {
    "plate at dim -1": lambda: pair_at(-1),
    "plate at dim -2": lambda: pair_at(-2),
    "plate at dim -3": lambda: pair_at(-3),
    "plate without size": sizeless,
    "ragged sequences": ragged,
    "factor and deterministic": factor_and_deterministic,
    "discrete latent": discrete,
    "branch on a latent": branching,
    "reshaping decoder": reshaping,
    "wrong without an error": wrong_without_an_error,
    "convolutional": convolutional,
    "markov": markov,
    "sequential plate": sequential_plate,
    "two plates around everything": two_plates_around_everything,
    "no arguments": no_arguments,
    "masked site": masked_site,
    "missing data": missing_data,
    "subsample given": lambda: scaled(lambda: {"subsample": torch.tensor([0, 3])}),
    "subsample drawn": lambda: scaled(lambda: {"subsample_size": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_users_programs_weigh_what_their_formulas_say(name: str) -> None:
    case = CASES[name]()
    structure = inspect_programs(case.model, case.guide, as_arguments(case.x), num_particles=K)
    assert structure.vectorizable is not case.looped
    assert structure.scale == case.scale
    assert structure.max_plate_nesting == case.nesting
    with torch.no_grad():
        weights = log_weights(case.model, case.guide, case.x, K, seed=SEED)
    latents = draws(case.guide, case.x, nesting=case.nesting, looped=case.looped)
    expected = case.by_hand(latents).detach()
    torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-10)
    total = float(weights.sum()) / K * structure.scale
    assert total == pytest.approx(pyro_elbo(case.model, case.guide, case.x, structure), rel=1e-10)


@pytest.mark.parametrize("automatic", [True, False])
def test_what_was_fitted_on_subsamples_is_measured_on_all_data(automatic: bool) -> None:
    """A global latent and a subsampled plate: the weights are those of the plate of all data."""
    x = torch.randn(12)

    def model(x: Tensor, rows: Any = 5) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=rows) as some:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[some])

    def guide(x: Tensor) -> None:
        pyro.sample("loc", dist.Normal(pyro.param("at", torch.zeros(())), 0.5))

    found = fit(model, guides.AutoNormal(model) if automatic else guide, x, epochs=3)
    with pytest.raises(ProgramError, match=r"plate 'data' draws 5 of 12.*pyro_vae.all_data\(\)"):
        log_weights(found.model, found.guide, x, K, joint=True)
    with all_data():
        weights = log_weights(found.model, found.guide, x, K, joint=True, seed=SEED)
        with pytest.raises(ProgramError, match=r"'loc' is outside the batch plate.* joint=True"):
            log_weights(found.model, found.guide, x, K, joint=False)
    everything = FittedProgram(partial(model, rows=None), found.model.state)
    expected = log_weights(everything, found.guide, x, K, joint=True, seed=SEED)
    assert torch.equal(weights, expected)
    with pyro.plate("data", 12, subsample_size=5) as some:  # outside, plates subsample again
        assert len(some) == 5


def test_local_latents_fitted_on_subsamples_are_measured_on_all_data() -> None:
    x = torch.randn(12)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=5) as some:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[some])

    found = fit(model, guides.AutoNormal(model), x, epochs=3)
    with pytest.raises(ProgramError, match=r"pyro_vae.all_data\(\)"):
        elbo_gap(found.model, found.guide, x)
    q = [found.parameters[f"AutoNormal.{name}.z"] for name in ("locs", "scales")]
    with all_data():
        gap = elbo_gap(found.model, found.guide, x, num_particles=400, max_steps=300, richer=())
    exact = normal(x, 0.0, math.sqrt(2.0))
    divergence = torch.distributions.kl_divergence(
        dist.Normal(*q), dist.Normal(x / 2, math.sqrt(0.5))
    )
    assert gap.log_evidence.values == pytest.approx(exact.numpy(), abs=0.02)
    errors = 4.5 * gap.gap_se.values  # two-sided failure rate 7e-6 a datum
    assert (abs(gap.gap.values - divergence.detach().numpy()) < errors).all()


def test_looped_particles_see_one_subsample() -> None:
    x = torch.randn(N) + 100 * torch.arange(N)  # the value of x tells the row

    def model(x: Tensor) -> None:
        with pyro.plate("data", N, subsample_size=1) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = z if z > 0 else -z
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[rows])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", N, subsample_size=1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    weights = log_weights(model, guide, x, K, seed=SEED)
    pyro.set_rng_seed(SEED)
    row = poutine.trace(guide).get_trace(x).nodes["data"]["value"]
    implied = (-2 * (weights[:, 0] + 0.5 * math.log(2 * math.pi))).sqrt()  # |x - loc| of each
    assert float(implied.max() - implied.min()) < 10.0  # another row would be 100 away
    assert abs(float(implied.mean()) - abs(float(x[row]))) < 10.0


# --- programs whose weights Pyro's Trace_ELBO sums ------------------------------------------------


def hierarchy(x: Tensor) -> None:
    """Constrained local latents: positive, and on the simplex."""
    with pyro.plate("data", len(x)):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(D)))
        pyro.sample("x", dist.Normal(shares, scale[..., None]).to_event(1), obs=x)


def global_latent(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(loc + z[..., None], 1.0).to_event(1), obs=x)


class Regression(PyroModule):
    """Bayesian linear regression: the weights of a module are latents."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](D, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, D]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.linear(x)[..., 0]
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def two_levels(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(z[..., None], 0.6).to_event(1), obs=x)


class Easy(EasyGuide):
    def guide(self, x: Tensor) -> None:
        with self.plate("data", N, dim=-1):
            group = self.group(match="scale|z")
            group.sample("both", dist.Normal(torch.zeros(N, 2), 0.4).to_event(1))


def parts(model: Callable) -> guides.AutoGuideList:
    both = guides.AutoGuideList(model)
    both.append(guides.AutoNormal(poutine.block(model, expose=["loc"])))
    both.append(guides.AutoNormal(poutine.block(model, expose=["scale", "z"])))
    return both


def local_parts(model: Callable) -> guides.AutoGuideList:
    both = guides.AutoGuideList(model)
    both.append(guides.AutoNormal(poutine.block(model, expose=["scale"])))
    both.append(guides.AutoNormal(poutine.block(model, expose=["shares"])))
    return both


GUIDES: dict[str, tuple[Callable, Callable, bool]] = {
    "AutoNormal": (hierarchy, guides.AutoNormal, False),
    "AutoGuideList": (hierarchy, local_parts, False),
    "EasyGuide": (two_levels, Easy, False),
    "joint AutoNormal": (global_latent, guides.AutoNormal, True),
    "joint AutoDiagonalNormal": (global_latent, guides.AutoDiagonalNormal, True),
    "joint AutoMultivariateNormal": (global_latent, guides.AutoMultivariateNormal, True),
    "joint AutoLowRank": (global_latent, guides.AutoLowRankMultivariateNormal, True),
    "joint AutoIAF": (global_latent, lambda m: guides.AutoIAFNormal(m, hidden_dim=[9]), True),
    "joint AutoStructured": (
        global_latent,
        lambda m: guides.AutoStructured(
            m,
            conditionals={"loc": "mvn", "scale": "normal", "z": "normal"},
            dependencies={"z": {"scale": "linear"}},
        ),
        True,
    ),
    "joint AutoGuideList": (global_latent, parts, True),
    "joint planar flow": (
        global_latent,
        lambda m: guides.AutoNormalizingFlow(m, lambda n: T.planar(n)),
        True,
    ),
}


@pytest.mark.parametrize("name", GUIDES)
def test_autoguides_weigh_what_trace_elbo_sums(name: str) -> None:
    model, make, joint = GUIDES[name]
    x, guide = torch.randn(N, D), make(model)
    guide(x)
    structure = inspect_programs(model, guide, (as_arguments(x)), joint=joint, num_particles=K)
    with torch.no_grad():
        weights = log_weights(model, guide, x, K, joint=joint, seed=SEED)
    assert weights.shape == (K, 1 if joint else N)
    expected = pyro_elbo(model, guide, x, structure)
    assert float(weights.sum() / K) == pytest.approx(expected, rel=1e-10)


def test_autonormal_weighs_with_the_jacobian_of_its_constraint() -> None:
    x = torch.randn(N).exp()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 0.5))
            pyro.sample("x", dist.Normal(z, 0.6), obs=x)

    guide = guides.AutoNormal(model)
    guide(x)
    with torch.no_grad():
        weights = log_weights(model, guide, x, K, seed=SEED)
        z = draws(guide, x)["z"]
        q = normal(z.log(), guide.locs.z, guide.scales.z) - z.log()
        expected = normal(z.log(), 0.0, 0.5) - z.log() + normal(x, z, 0.6) - q
    torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-10)


def test_bayesian_regression_by_pyro_sample_has_joint_weights() -> None:
    x, y = torch.randn(N, D), torch.randn(N)
    model = Regression()
    guide = guides.AutoDiagonalNormal(model)
    guide(x, y)
    with torch.no_grad():
        weights = log_weights(model, guide, (x, y), K, joint=True, seed=SEED)
        pyro.set_rng_seed(SEED)
        expected = -Trace_ELBO(num_particles=K).loss(model, guide, x, y)
    assert float(weights.mean()) == pytest.approx(expected, rel=1e-10)


def test_sequential_plates_have_joint_weights() -> None:
    """At the exact posterior the weight is the evidence, whichever plate the sites are in."""
    x = torch.randn(N)

    def model(x: Tensor) -> None:
        for n in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{n}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{n}", dist.Normal(z, 1.0), obs=x[n])

    def exact(x: Tensor) -> None:
        for n in pyro.plate("data", len(x)):
            pyro.sample(f"z_{n}", dist.Normal(x[n] / 2, math.sqrt(0.5)))

    evidence = normal(x, 0.0, math.sqrt(2.0)).sum()
    weights = log_weights(model, exact, x, K, joint=True)
    torch.testing.assert_close(weights, evidence.expand(K, 1), rtol=1e-12, atol=1e-12)
    with pytest.raises(ProgramError, match="cannot hold a batch"):
        log_weights(model, exact, x, K)


class Triangular(dist.TorchDistribution):
    """A user's distribution that states no support."""

    arg_constraints: dict = {}  # noqa: RUF012 - as torch.distributions writes it

    def __init__(self, width: Tensor) -> None:
        self.width = width
        super().__init__(width.shape, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Triangular":
        return Triangular(self.width.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return (2 * (self.width - value) / self.width**2).log()


class Cube(T.Transform):
    """A user's own transform."""

    domain = codomain = constraints.real
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return x**3

    def _inverse(self, y: Tensor) -> Tensor:
        return y.sign() * y.abs() ** (1 / 3)

    def log_abs_det_jacobian(self, x: Tensor, _y: Tensor) -> Tensor:
        return (3 * x**2).log()


def test_users_distributions_and_transforms() -> None:
    x = torch.rand(N)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", Triangular(2 + z.exp()), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(x, 0.9), [Cube()]))

    weights = log_weights(model, guide, x, K, seed=SEED)
    z = draws(guide, x)["z"]
    u, width = z.sign() * z.abs() ** (1 / 3), 2 + z.exp()
    q = normal(u, x, 0.9) - (3 * u**2).log()
    expected = normal(z, 0.0, 1.0) + (2 * (width - x) / width**2).log() - q
    torch.testing.assert_close(weights, expected, rtol=1e-8, atol=1e-8)


FLOWS = {
    "planar": (lambda: T.planar(H), False),
    "spline": (lambda: T.spline(H, bound=3.0), True),
    "affine autoregressive": (lambda: T.affine_autoregressive(H, hidden_dims=[9]), True),
    "conditional planar": (lambda: T.conditional_planar(H, D, hidden_dims=[9]), False),
    "conditional affine": (
        lambda: T.conditional_affine_autoregressive(H, D, hidden_dims=[9]),
        True,
    ),
}


@pytest.mark.parametrize("name", FLOWS)
def test_flow_guides_have_values_with_or_without_an_inverse(name: str, linear: Linear) -> None:
    make, invertible = FLOWS[name]
    flow = make()

    def guide(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(len(x), H), 1.0).to_event(1)
            step = flow.condition(x) if "conditional" in name else flow
            pyro.sample("z", dist.TransformedDistribution(base, [step]))

    structure = inspect_programs(linear.model, guide, as_arguments(linear.x), num_particles=K)
    assert structure.replayable is invertible
    with torch.no_grad():
        weights = log_weights(linear.model, guide, linear.x, K, seed=SEED)
        pyro.set_rng_seed(SEED)
        u = torch.randn(K, N, H)
        step = flow.condition(linear.x) if "conditional" in name else flow
        z = step(u)
        jacobian = step.log_abs_det_jacobian(u, z)
        jacobian = jacobian.sum(-1) if jacobian.dim() == 3 else jacobian  # spline: of each latent
        q = normal(u, 0.0, 1.0).sum(-1) - jacobian
        expected = linear.joint_density(linear.x, z) - q.reshape(K, N)
    assert structure.vectorizable
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-9)


def test_batch_normalisation_and_dropout_are_fine_in_evaluation_mode(linear: Linear) -> None:
    first, norm, last = nn.Linear(H, 9), nn.BatchNorm1d(9), nn.Linear(9, D)
    net = nn.Sequential(first, norm, nn.Dropout(0.5), last)
    norm.load_state_dict({"running_mean": torch.full((9,), 0.3)}, strict=False)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(H)).to_event(1))
            loc = net(z.reshape(-1, H)).reshape(*z.shape[:-1], D)
            pyro.sample("x", dist.Normal(loc, 0.6).to_event(1), obs=x)

    net.eval()
    with torch.no_grad():
        weights = log_weights(model, linear.guide, linear.x, K, seed=SEED)
        z = draws(linear.guide, linear.x)["z"]
        hidden = (z @ first.weight.T + first.bias - 0.3) / (1 + norm.eps) ** 0.5
        loc = hidden @ last.weight.T + last.bias
        expected = normal(linear.x, loc, 0.6).sum(-1) + normal(z, 0.0, 1.0).sum(-1)
        expected = expected - normal(z, linear.x @ linear.a.T, 0.8).sum(-1)
    torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_have_the_dtype_of_the_data(dtype: torch.dtype) -> None:
    x = torch.randn(N, dtype=dtype)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), x.new_ones(())))
            pyro.sample("x", dist.Normal(z, x.new_full((), 0.6)), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 3, x.new_full((), 0.9)))

    weights = log_weights(model, guide, x, K, seed=SEED)
    assert weights.dtype == dtype
    z = draws(guide, x)["z"]
    expected = normal(z, 0.0, 1.0) + normal(x, z, 0.6) - normal(z, x / 3, 0.9)
    tolerance = 50 * torch.finfo(dtype).eps
    torch.testing.assert_close(weights, expected, rtol=tolerance, atol=tolerance)

    def no_latent(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(()), x.new_ones(())), obs=x)

    weights = log_weights(no_latent, lambda x: None, x, K)
    assert weights.dtype == dtype
    torch.testing.assert_close(weights, normal(x, 0.0, 1.0).expand(K, N))
