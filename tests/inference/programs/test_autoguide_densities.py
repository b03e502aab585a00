"""Densities of Pyro's autoguides at latents that they did not draw, in unconstrained space."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide

from pyro_vae.inference.programs import ProgramError, program_scope, unconstrained_model


def model(x):
    scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(z + share[..., 0], 1.0), obs=x)


X = torch.tensor([0.5, -1.0, 2.0, 0.1])
DIM = 1 + 2 + len(X)


def multivariate(guide):
    return torch.distributions.MultivariateNormal(
        guide.loc.detach(), scale_tril=guide.scale[:, None].detach() * guide.scale_tril.detach()
    )


def diagonal(guide):
    return torch.distributions.Normal(guide.loc.detach(), guide.scale.detach())


def by_site(guide):
    locs, scales = (
        torch.cat([getattr(part, name).detach().reshape(-1) for name in ("scale", "share", "z")])
        for part in (guide.locs, guide.scales)
    )
    return torch.distributions.Normal(locs, scales)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (autoguide.AutoMultivariateNormal, multivariate),
        (autoguide.AutoDiagonalNormal, diagonal),
        (autoguide.AutoNormal, by_site),
    ],
)
@pytest.mark.parametrize("chains", [1, 3])
def test_densities_are_those_of_the_normal_behind(kind, expected, chains):
    guide = kind(model, init_scale=0.3)
    guide(X)
    with torch.no_grad(), program_scope(0):
        latent_model = unconstrained_model(model, guide, X, joint=True)
        assert latent_model.knows_guide_density
        u = torch.randn(chains, 1, DIM)
        found = latent_model.log_densities(u, "guide").start
        log_q = expected(guide).log_prob(u)
    wanted = log_q if log_q.dim() == 2 else log_q.sum(-1)
    torch.testing.assert_close(found, wanted)


def test_of_each_datum_and_not_of_guides_with_other_auxiliary_sites():
    def local(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    guide = autoguide.AutoNormal(local, init_scale=0.5)
    guide(X)
    with torch.no_grad(), program_scope(0):
        latent_model = unconstrained_model(local, guide, X)
        u = torch.randn(3, len(X), 2)
        found = latent_model.log_densities(u, "guide").start
    normal = torch.distributions.Normal(guide.locs.z.detach(), guide.scales.z.detach())
    torch.testing.assert_close(found, normal.log_prob(u).sum(-1))

    def hidden(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer=AUXILIARY)
            log_density = -a.sum(-1)
            pyro.sample("z", dist.Delta((2 * a).exp(), log_density, event_dim=1))

    with torch.no_grad(), program_scope(0):
        latent_model = unconstrained_model(local, hidden, X)
        assert not latent_model.knows_guide_density
        with pytest.raises(ProgramError, match="auxiliary site 'a'"):
            latent_model.log_densities(u, "guide")


AUXILIARY = {"is_auxiliary": True}
