"""Log weights of a pair with global latents, in two parts, beside an enumeration.

A switch g ~ Bernoulli(0.3) for all data and a bit z_n ~ Bernoulli(0.2 + 0.6 g) for each; x_n is
normal about z_n. Guide: g with probability 0.4, z_n by a logistic curve of x_n.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

from pyro_vae import (
    compare_estimators,
    draw_posterior,
    log_evidence,
    log_weights,
    posterior_quality,
    predictive_check,
)
from pyro_vae.inference.log_weights import SplitLogWeights
from pyro_vae.inference.programs import ProgramError

X = torch.tensor([0.2, 1.4, -0.5], dtype=torch.float64)
K = 5000


def model(x: Tensor) -> None:
    g = pyro.sample("g", dist.Bernoulli(torch.tensor(0.3)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.2 + 0.6 * g))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_in(name: str):
    def guide(x: Tensor) -> None:
        g = pyro.sample("g", dist.Bernoulli(torch.tensor(0.4)))
        with pyro.plate(name, len(x)):
            pyro.sample("z", dist.Bernoulli(logits=2 * x - 1 + g))

    return guide


guide = guide_in("data")


def bernoulli(value: float, probability: Tensor) -> Tensor:
    return torch.log(probability if value else 1 - probability)


def exact() -> tuple[dict[float, Tensor], dict[tuple[float, float], Tensor], dict]:
    """Log p(g)/q(g) by g; log p(x, z | g)/q(z | x, g) of each datum by g and z; log q(z_n | g)."""
    above, inside, q = {}, {}, {}
    for g in (0.0, 1.0):
        above[g] = bernoulli(g, torch.tensor(0.3)) - bernoulli(g, torch.tensor(0.4))
        probability = torch.sigmoid(2 * X - 1 + g)
        for z in (0.0, 1.0):
            q[g, z] = bernoulli(z, probability)
            of_x = -0.5 * (X - z) ** 2 - 0.5 * math.log(2 * math.pi)
            inside[g, z] = bernoulli(z, torch.tensor(0.2 + 0.6 * g)) + of_x - q[g, z]
    return above, inside, q


@pytest.mark.parametrize("name", ["data", "rows"])
def test_both_parts_are_those_of_the_enumeration(name: str) -> None:
    found = log_weights(model, guide_in(name), X, K, seed=0)
    assert isinstance(found, SplitLogWeights)
    assert found.global_latents == ("g",)
    assert found.log_weights.shape == (K, len(X))
    above, inside, _ = exact()
    for g in (0.0, 1.0):
        drawn = (found.global_log_weights - above[g]).abs() < 1e-12
        share, sd = (0.4 if g else 0.6), (0.24 / K) ** 0.5
        assert abs(drawn.double().mean() - share) < 5 * sd  # fails once in 1.7 million runs
        states = torch.stack([inside[g, z] for z in (0.0, 1.0)])
        nearest = (found.log_weights[drawn][:, None] - states).abs().min(1).values
        assert nearest.max() < 1e-12


def test_their_means_are_the_parts_of_the_elbo_and_the_joint_weight_is_unbiased() -> None:
    found = log_weights(model, guide, X, K, seed=1)
    above, inside, q = exact()
    share = {0.0: 0.6, 1.0: 0.4}
    parts = torch.stack(
        [sum(share[g] * q[g, z].exp() * inside[g, z] for g in share for z in (0.0, 1.0))]
    )
    global_part = sum(share[g] * above[g] for g in share)
    evidence = 0.0
    for g in share:
        prior = 0.3 if g else 0.7
        each = sum((inside[g, z] + q[g, z]).exp() for z in (0.0, 1.0))
        evidence += prior * each.prod()
    for draws, expected in (
        (found.log_weights, parts[0]),
        (found.global_log_weights, global_part),
        (found.joint[:, 0].exp(), evidence),
    ):
        error = draws.std(0) / K**0.5
        assert ((draws.mean(0) - expected).abs() < 5 * error).all()  # 6e-7 each
    joint = log_weights(model, guide, X, K, joint=True, seed=1)
    torch.testing.assert_close(found.joint, joint, rtol=1e-12, atol=1e-12)


def test_without_global_latents_there_is_one_part_and_false_refuses_them() -> None:
    def local(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=2 * x - 1))

    def alone(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert log_weights(alone, local, X, 4).shape == (4, 3)
    with pytest.raises(ProgramError, match=r"'g' is outside the batch plate 'data'.*joint=True"):
        log_weights(model, guide, X, 4, joint=False)


def hierarchy(x: Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("components", 3):  # of as many as there are data: another plate all the same
        pyro.sample("w", dist.Normal(theta, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        with pyro.plate("inner", 2, dim=-2):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(2, -1))


def test_automatic_guides_have_parts_where_they_have_sites() -> None:
    found = log_weights(hierarchy, AutoNormal(hierarchy), X, 7, seed=0)
    assert found.global_latents == ("theta", "w")
    assert found.log_weights.shape == (7, 3)
    with pytest.raises(ProgramError, match=r"as one vector.*joint=True.*AutoNormal"):
        log_weights(hierarchy, AutoDiagonalNormal(hierarchy), X, 7)
    assert log_weights(hierarchy, AutoDiagonalNormal(hierarchy), X, 7, joint=True).shape == (7, 1)


def test_of_global_latents_alone_the_data_have_their_likelihoods() -> None:
    def level(x: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    def exactly(x: Tensor) -> None:
        precision = 1.0 + len(x)
        pyro.sample("theta", dist.Normal(x.sum() / precision, precision**-0.5))

    evidence = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(X)
    found = log_weights(level, exactly, X, 6, seed=0)
    torch.testing.assert_close(found.joint, evidence.expand(6, 1), rtol=1e-12, atol=0)
    assert found.log_weights.std(0).min() > 0.01  # the likelihood of each datum moves with theta


def switched(x: Tensor) -> None:
    pyro.sample("g", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=2 * x - 1))


TOOLS = {
    "log_evidence": lambda **joint: log_evidence(model, guide, X, num_particles=50, **joint),
    "posterior_quality": lambda **joint: posterior_quality(
        model, guide, X, num_particles=50, **joint
    ),
    "predictive_check": lambda **joint: predictive_check(model, guide, X, num_draws=20, **joint),
    "compare_estimators": lambda **joint: compare_estimators(
        model, switched, X, ["LeaveOneOut"], [2], repeats=8, progress=False, **joint
    ),
    "draw_posterior": lambda **joint: draw_posterior(model, guide, X, num_draws=5, **joint),
}


@pytest.mark.parametrize("name", TOOLS)
def test_tools_infer_joint_from_the_plates(name: str) -> None:
    inferred, stated = TOOLS[name](), TOOLS[name](joint=True)
    if name == "draw_posterior":
        torch.testing.assert_close(inferred.log_weights, stated.log_weights)
        return
    assert inferred.provenance["config"]["joint"] is True
    if name != "predictive_check":
        assert any("the latents g are global" in note for note in inferred.provenance["notes"])
    for variable in inferred.data_vars:
        if variable not in ("seconds", "seconds_se", "bytes", "reason"):
            assert inferred[variable].equals(stated[variable])
    with pytest.raises(ProgramError, match="outside the batch plate"):
        TOOLS[name](joint=False)


def test_what_a_reparameteriser_leaves_of_a_site_is_no_data():
    """The location is a function of its new site, outside the plate of the data."""
    x, noise = torch.tensor([-1.0, 0.3, 1.2]), 2.0

    def centred(x):
        z = pyro.sample("z", dist.Normal(0.5, 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    model = poutine.reparam(centred, config={"z": LocScaleReparam(0.0)})
    precision = 1 + len(x) * 9 / noise**2
    mean = 3 * (x - 0.5).sum() / noise**2 / precision

    def guide(x):
        pyro.sample("z_decentered", dist.Normal(mean, precision**-0.5))

    covariance = noise**2 * torch.eye(3) + 9 * torch.ones(3, 3)
    exact = dist.MultivariateNormal(torch.full((3,), 0.5), covariance).log_prob(x)
    found = log_weights(model, guide, x, 5, seed=0)
    assert found.global_latents == ("z_decentered",)
    torch.testing.assert_close(found.joint, exact.expand(5, 1))
