"""The gap of pairs with global latents, where each KL has a closed form or can be enumerated."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_vae import elbo_gap, log_evidence
from pyro_vae.diagnostics.gap import gap_on_both
from pyro_vae.inference.programs import ProgramError

N = 4
X = torch.linspace(-1.0, 2.0, N, dtype=torch.float64)
PRECISION = 1 + N / 2  # of theta | x, as x_n ~ N(theta, 2)
MEAN = X.sum() / 2 / PRECISION
EVIDENCE = (
    dist.MultivariateNormal(torch.zeros(N).double(), 2 * torch.eye(N).double() + 1).log_prob(X)
).item()
ERRORS = 4.5  # standard errors: a comparison fails at a rate of 7e-6


def hierarchy(x: Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of(shift: float, sd: float, moved: Tensor, scale: float, *, knows: float = 1.0) -> Any:
    """Off the posterior by stated amounts; `knows` times what theta tells of z."""

    def guide(x: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(MEAN + shift, sd))
        with pyro.plate("data", len(x)):
            loc = (x + knows * theta + (1 - knows) * MEAN) / 2 + moved
            pyro.sample("z", dist.Normal(loc, scale))

    return guide


def kl(q_loc: Any, q_sd: float, loc: Any, sd: float) -> Any:
    ratio = (q_sd / sd) ** 2
    return 0.5 * (ratio + ((q_loc - loc) / sd) ** 2 - 1 - math.log(ratio))


def test_both_parts_of_a_hierarchy_are_those_of_the_closed_forms() -> None:
    moved = torch.tensor([0.0, 0.1, -0.2, 0.3])
    guide = guide_of(0.2, 0.6, moved, 0.8, knows=0.5)
    found = elbo_gap(hierarchy, guide, X, num_particles=1000, seed=0, progress=False)
    above = kl(MEAN + 0.2, 0.6, MEAN, PRECISION**-0.5)
    # The guide's location is off by moved - (theta - MEAN) / 4, theta - MEAN ~ N(0.2, 0.6^2).
    off = (moved - 0.05) ** 2 + 0.25**2 * 0.6**2
    each = 0.5 * (0.8**2 / 0.5 + off / 0.5 - 1 - math.log(0.8**2 / 0.5))
    truths = {
        "global_gap": above,
        "local_gap": each,
        "gap": above + each.sum(),
        "elbo": EVIDENCE - above - each.sum(),
        "log_evidence": torch.tensor(EVIDENCE),
    }
    for name, truth in truths.items():
        away = torch.as_tensor(found[name].values) - truth
        error = torch.as_tensor(found[f"{name}_se"].values)
        assert (away.abs() < ERRORS * error).all(), name
        assert error.max() < 0.1, name
    assert found.gap.attrs["reduction"] == "total"
    assert found.local_gap.dims == ("datum",)
    total = found.global_gap + found.local_gap.sum()
    assert float(total) == pytest.approx(float(found.gap), abs=1e-10)
    assert any("theta are global" in note for note in found.provenance["notes"])


@pytest.mark.parametrize("exact", ["global", "local"])
def test_a_part_without_a_fault_has_no_gap(exact: str) -> None:
    right = PRECISION**-0.5
    guide = guide_of(0.0, right if exact == "global" else 0.4, torch.zeros(N),
                     0.5**0.5 if exact == "local" else 0.6)  # fmt: skip
    known = log_evidence(hierarchy, guide_of(0.0, right, torch.zeros(N), 0.5**0.5), X, joint=True)
    assert float(known.log_evidence) == pytest.approx(EVIDENCE, abs=1e-9)
    found = elbo_gap(hierarchy, guide, X, evidence=known, num_particles=200, progress=False)
    if exact == "local":
        assert abs(found.local_gap).max() < 1e-12
        assert (
            abs(float(found.global_gap) - float(kl(MEAN, 0.4, MEAN, right)))
            < 4.5 * found.global_gap_se
        )
    else:
        assert abs(found.global_gap) < 4.5 * found.global_gap_se
        assert (found.local_gap > 5 * found.local_gap_se).all()


@pytest.mark.parametrize("together", [True, False])
def test_both_parts_of_a_mixture_are_those_of_an_enumeration(together: bool) -> None:
    """A global switch and a bit for each datum; particles at once, or one by one."""
    x = torch.tensor([0.2, 1.4, -0.5])

    def model(x: Tensor) -> None:
        g = pyro.sample("g", dist.Bernoulli(torch.tensor(0.3)))
        if not together:
            assert g.dim() == 0  # written for one particle
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.2 + 0.6 * g))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        g = pyro.sample("g", dist.Bernoulli(torch.tensor(0.4)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=2 * x - 1 + g))

    share, prior = torch.tensor([0.6, 0.4]), torch.tensor([0.7, 0.3])
    one = torch.tensor([[0.2], [0.8]]) * dist.Normal(1.0, 1.0).log_prob(x).exp()
    zero = torch.tensor([[0.8], [0.2]]) * dist.Normal(0.0, 1.0).log_prob(x).exp()
    given = one + zero  # p(x_n | g), [g, datum]
    posterior, q = one / given, torch.sigmoid(2 * x - 1 + torch.tensor([[0.0], [1.0]]))
    each = q * (q / posterior).log() + (1 - q) * ((1 - q) / (1 - posterior)).log()
    weights = prior * given.prod(1)
    above = (share * (share * weights.sum() / weights).log()).sum()
    count = 400 if together else 12
    found = elbo_gap(model, guide, x, num_particles=count, seed=2, progress=False)
    for name, truth in (("global_gap", above), ("local_gap", share @ each)):
        away = torch.as_tensor(found[name].values) - truth
        assert (away.abs() < ERRORS * torch.as_tensor(found[f"{name}_se"].values)).all(), name


def test_what_it_cannot_do_is_refused() -> None:
    guide = guide_of(0.0, 0.5, torch.zeros(N), 0.7)

    def local(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def alone(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    of_each = log_evidence(local, alone, X, num_particles=10)
    with pytest.raises(ValueError, match="one number for all data"):
        elbo_gap(hierarchy, guide, X, evidence=of_each, num_particles=10)
    with pytest.raises(ProgramError, match="latents are global"):
        gap_on_both(hierarchy, guide, X, X, num_particles=10, progress=False)
