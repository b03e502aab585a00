"""Wake-sleep against the gradients of a Helmholtz machine whose states are enumerated."""

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_vae.inference.estimators import PathwiseELBO, WakeSleep
from pyro_vae.inference.programs import ProgramError

H, D, REPEATS = 2, 3, 20_000
ERRORS = 4.5  # standard errors: 7e-6 a number, 3e-4 for the 38 numbers of the test
THETA, PHI = ("prior", "weight", "bias"), ("recognition", "shift")


def bits(size: int) -> Tensor:
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=size)))


class HelmholtzMachine:
    """One layer of binary latents; every datum has parameters of its own."""

    def __init__(self, repeats: int) -> None:
        generator = torch.Generator().manual_seed(3)
        shapes = {"prior": (H,), "weight": (D, H), "bias": (D,), "recognition": (H, D)}
        self.start = {
            name: torch.randn(shape, generator=generator)
            for name, shape in {**shapes, "shift": (H,)}.items()
        }
        self.patterns = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
        self.x = self.patterns.repeat(repeats, 1)
        self.v = {
            name: t.expand(len(self.x), *t.shape).clone().requires_grad_()
            for name, t in self.start.items()
        }

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", 4 * len(x), subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Bernoulli(logits=self.v["prior"]).to_event(1))
            logits = torch.einsum("bdh,...bh->...bd", self.v["weight"], z) + self.v["bias"]
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", 4 * len(x), subsample=torch.arange(len(x))):
            logits = torch.einsum("bhd,bd->bh", self.v["recognition"], x) + self.v["shift"]
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    def enumerated(self) -> dict[str, dict[str, Tensor]]:
        """Exact gradients: of the wake phase and of the ELBO a pattern each, of the sleep phase."""
        v = {name: t.clone().requires_grad_() for name, t in self.start.items()}

        def log_bernoulli(value: Tensor, logits: Tensor) -> Tensor:
            return (value * logits - torch.nn.functional.softplus(logits)).sum(-1)

        z, all_x = bits(H), bits(D)

        def log_p(x: Tensor) -> Tensor:  # [x, z]
            given = log_bernoulli(x[:, None], z @ v["weight"].T + v["bias"])
            return given + log_bernoulli(z, v["prior"])

        def log_q(x: Tensor) -> Tensor:
            return log_bernoulli(z, (x @ v["recognition"].T + v["shift"])[:, None])

        def gradient(total: Tensor, names: Any) -> list[Tensor]:
            return list(torch.autograd.grad(total, [v[n] for n in names], retain_graph=True))

        wake, elbo = [], []
        for x in self.patterns[:, None]:
            q = log_q(x).exp()
            wake.append(gradient((q.detach() * log_p(x)).sum(), THETA))
            elbo.append(gradient((q * (log_p(x) - log_q(x))).sum(), PHI))
        sleep = gradient((log_p(all_x).exp().detach() * log_q(all_x)).sum(), PHI)
        return {
            "wake": {n: torch.stack([g[i] for g in wake]) for i, n in enumerate(THETA)},
            "elbo": {n: torch.stack([g[i] for g in elbo]) for i, n in enumerate(PHI)},
            "sleep": {n: sleep[i].expand(2, *sleep[i].shape) for i, n in enumerate(PHI)},
        }


def worst_score(draws: Tensor, exact: Tensor) -> float:
    error = (draws.std(0) / math.sqrt(len(draws))).clamp_min(1e-14)
    return float(((draws.mean(0) - exact) / error).abs().max())


def test_both_phases_have_the_enumerated_gradients() -> None:
    machine = HelmholtzMachine(REPEATS)
    leaves = list(machine.v.values())
    loss = WakeSleep(2).differentiable_loss(machine.model, machine.guide, machine.x)
    found = torch.autograd.grad(-loss, leaves)
    drawn = {  # 4 is the factor N/B of the plate
        name: g.unflatten(0, (REPEATS, 2)) / 4 for name, g in zip(machine.v, found, strict=True)
    }
    exact = machine.enumerated()
    for phase, names in (("wake", THETA), ("sleep", PHI)):
        for name in names:
            assert worst_score(drawn[name], exact[phase][name]) < ERRORS, name
    # The guide's gradient of the ELBO is another one, which the same check refuses.
    assert max(worst_score(drawn[name], exact["elbo"][name]) for name in PHI) > 20


def test_the_value_is_the_elbo_of_the_wake_phase() -> None:
    machine = HelmholtzMachine(REPEATS)
    value = WakeSleep(2).bound(machine.model, machine.guide, machine.x).unflatten(0, (-1, 2))
    z = bits(H)
    v = {n: t[:1].detach() for n, t in machine.v.items()}
    log_p = (
        dist.Bernoulli(logits=z @ v["weight"][0].T + v["bias"])
        .to_event(1)
        .log_prob(machine.patterns[:, None])
    )
    log_p = log_p + dist.Bernoulli(logits=v["prior"]).to_event(1).log_prob(z)
    logits = machine.patterns @ v["recognition"][0].T + v["shift"]
    log_q = dist.Bernoulli(logits=logits[:, None]).to_event(1).log_prob(z)
    assert worst_score(value, (log_q.exp() * (log_p - log_q)).sum(1)) < ERRORS


def test_programs_that_simulate_something_else_than_x_are_refused_by_the_own_name() -> None:
    def model(x: Tensor, extra: int) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, extra: int) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.zeros(3)
    assert math.isfinite(PathwiseELBO(1).loss(model, guide, x, 1))
    with pytest.raises(ProgramError, match=r"WakeSleep puts .* must take x alone"):
        WakeSleep(1).loss_and_grads(model, guide, x, 1)
