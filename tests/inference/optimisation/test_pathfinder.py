"""L-BFGS over chains and data, and the normals of Pathfinder, against closed forms."""

import pyro
import pyro.distributions as dist
import torch

from pyro_vae.inference.optimisation import InverseHessian, climb, find_paths
from pyro_vae.inference.programs import program_scope, unconstrained_model
from pyro_vae.inference.tempered import Tempered

CHAINS, N, D = 3, 4, 5


def bent(seed=0):
    """Normal distributions of each datum, with correlations of 0.99 and scales from 1 to 1000."""
    generator = torch.Generator().manual_seed(seed)
    correlation = torch.full((D, D), 0.99) + 0.01 * torch.eye(D)
    scales = torch.logspace(0, 3, D) * (1 + torch.rand(N, D, generator=generator))
    covariance = scales[:, :, None] * correlation * scales[:, None, :]
    loc = torch.randn(N, D, generator=generator) * scales
    return loc, covariance


def test_every_chain_reaches_its_mode_and_learns_the_curvature():
    loc, covariance = bent()
    precision = torch.linalg.inv(covariance)

    def target(u):
        rest = u - loc
        gradient = -torch.einsum("nij,cnj->cni", precision, rest)
        return 0.5 * (gradient * rest).sum(-1), gradient

    torch.manual_seed(0)
    *_, last = climb(target, 1000 * torch.randn(CHAINS, N, D), num_iterations=200)
    sds = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert not last.moving.any()
    assert float(last.log_density.min()) > -1e-3  # nats
    assert (((last.u - loc) / sds).abs() < 0.05).all()


def test_the_factors_are_those_of_the_updates_by_broyden_fletcher_goldfarb_and_shanno():
    torch.manual_seed(1)
    precision = torch.diag(torch.tensor([1.0, 4.0, 9.0, 2.0, 3.0])) + 0.5
    hessian = InverseHessian(
        torch.ones(CHAINS, N, D), torch.zeros(CHAINS, N, D, 3), torch.zeros(CHAINS, N, D, 3)
    )
    pairs = []
    for count in range(4):
        step = torch.randn(CHAINS, N, D)
        if count == 1:
            step[0, 2] = 0.0  # a chain that stood still has nothing to remember
        change = step @ precision
        hessian = hessian.extended(step, change)
        pairs.append((step, change))
    assert hessian.is_empty().sum() == 0
    diagonal = hessian.diagonal
    for chain, datum in ((0, 1), (2, 3), (0, 2)):
        kept = pairs[1:] if (chain, datum) != (0, 2) else [pairs[0], *pairs[2:]]
        expected = torch.diag(diagonal[chain, datum])
        for step, change in kept:
            s, y = step[chain, datum], change[chain, datum]
            left = torch.eye(D) - torch.outer(s, y) / (s @ y)
            expected = left @ expected @ left.T + torch.outer(s, s) / (s @ y)
        torch.testing.assert_close(hessian.dense()[chain, datum], expected)
        # The secant equation of the last step.
        torch.testing.assert_close(hessian.dense()[chain, datum] @ y, s)
    vector = torch.randn(CHAINS, N, D)
    expected = torch.einsum("cnij,cnj->cni", hessian.dense(), vector)
    torch.testing.assert_close(hessian.times(vector), expected)
    noise = torch.randn(7, CHAINS, N, D)
    draws, log_q = hessian.normal(noise)
    normal = torch.distributions.MultivariateNormal(torch.zeros(D), hessian.dense())
    torch.testing.assert_close(log_q, normal.log_prob(draws))
    many, _ = hessian.normal(torch.randn(20_000, CHAINS, N, D))
    found = torch.einsum("kcni,kcnj->cnij", many, many) / len(many)
    variance = hessian.dense().diagonal(dim1=-2, dim2=-1)
    scale = (variance[..., :, None] * variance[..., None, :]).sqrt()
    # Of 300 relative moments, each with a standard error of at most 0.01.
    assert ((found - hessian.dense()).abs() / scale).max() < 0.05


def test_the_best_normal_of_a_path_is_the_posterior_where_that_is_normal():
    loc, covariance = bent(2)

    def model(x):
        with pyro.plate("data", N):
            prior = dist.MultivariateNormal(torch.zeros(D), 1e6 * torch.eye(D))
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.MultivariateNormal(z, covariance), obs=x)

    with torch.no_grad(), program_scope(0):
        target = Tempered(unconstrained_model(model, None, loc))
        found = find_paths(target, target.latent_model.draw(CHAINS))
        drawn, log_q = found.draw(50)
        ratio = (
            target.latent_model.log_density(drawn.flatten(0, 1)).unflatten(0, (50, CHAINS)) - log_q
        )
    prior = torch.distributions.MultivariateNormal(torch.zeros(D), 1e6 * torch.eye(D) + covariance)
    evidence = prior.log_prob(loc)
    best = found.elbo.amax(0)
    # The KL of a path's normal from the posterior: a nat at most for the best of three paths.
    assert (best < evidence + 1.5).all()
    assert (best > evidence - 3).all()
    torch.testing.assert_close(ratio.mean(0).amax(0), best, atol=2.0, rtol=0)


def test_a_start_of_zero_density_and_a_masked_latent_are_left_where_they_are():
    mask = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", 3), pyro.poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("x", torch.where(x > 100, 0.0 * z, 1.0).log())

    with torch.no_grad(), program_scope(0):
        target = Tempered(unconstrained_model(model, None, torch.tensor([1.0, 2.0, 200.0])))
        start = target.latent_model.draw(2)
        found = find_paths(target, start)
    assert (found.elbo[:, 2] == -torch.inf).all()
    assert torch.equal(found.mode[:, 1:], start[:, 1:])
    assert (found.mode[:, 0].abs() < 1e-3).all()
    assert found.loc.isfinite().all()
