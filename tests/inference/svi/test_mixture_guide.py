"""The mixture of guides beside sums over components and quadrature."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoStructured
from torch import nn
from torch.distributions import constraints

from pyro_vae import (
    VAE,
    draw_posterior,
    elbo_gap,
    fit,
    log_evidence,
    log_weights,
    posterior_quality,
)
from pyro_vae.inference.programs import ProgramError
from pyro_vae.inference.svi.restarts import MixtureGuide

DATA = torch.tensor([[0.4, -1.0, 2.0], [1.5, 0.3, -0.2]], dtype=torch.float64).T  # [3, 2]
LOCS, SCALES = [-1.0, 0.2, 1.4], [0.5, 1.0, 0.7]


def pair(x):
    """Two latents a datum, the second of which has an inner plate of three and a mask."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x), 1]))
        with pyro.plate("inner", 3, dim=-1), pyro.poutine.mask(mask=MASK[: len(x)]):
            pyro.sample("w", dist.Normal(z, 2.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, :1])


MASK = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])


def component(loc, scale):
    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(loc + 0.1 * x[:, :1], scale))
            with pyro.plate("inner", 3, dim=-1), pyro.poutine.mask(mask=MASK[: len(x)]):
                pyro.sample("w", dist.Normal(loc * z, scale + torch.tensor([0.1, 0.2, 0.3])))

    return guide


def mixture(batch_dim=-2):
    parts = [component(loc, scale) for loc, scale in zip(LOCS, SCALES, strict=True)]
    return MixtureGuide(parts[0], parts, batch_dim)


def exact_log_q(z, w, x, *, joint):
    """From the components' own formulae: [draws] or [draws, data]."""
    found = []
    for loc, scale in zip(LOCS, SCALES, strict=True):
        log_q = dist.Normal(loc + 0.1 * x[:, 0], scale).log_prob(z)
        wide = scale + torch.tensor([0.1, 0.2, 0.3])
        log_q = log_q + (dist.Normal(loc * z[..., None], wide).log_prob(w) * MASK).sum(-1)
        found.append(log_q.sum(-1) if joint else log_q)
    return torch.stack(found).logsumexp(0) - math.log(3)


@pytest.mark.parametrize("num_draws", [1, 5])
@pytest.mark.parametrize("joint", [False, True])
def test_the_density_is_that_of_the_mixture(joint, num_draws):
    """Of each datum, and of all data together: sites in order, inner plates, masks, particles."""
    guide = mixture(None if joint else -2)
    found = draw_posterior(pair, guide, DATA, num_draws=num_draws, joint=joint, seed=3)
    z, w = (found.latents[name] for name in ("z", "w"))
    z, w = z.reshape(num_draws, 3), w.reshape(num_draws, 3, 3)
    exact = exact_log_q(z, w, DATA, joint=joint)
    torch.testing.assert_close(found.log_guide.squeeze(1) if joint else found.log_guide, exact)


def test_data_choose_their_components_each_by_itself_and_evenly():
    """Shares of 3 components in 4,000 draws of 3 data: off by 4.4 errors once in 10^5 / 9."""
    with pyro.plate("many", 4000, dim=-3):
        trace = pyro.poutine.trace(mixture()).get_trace(DATA)
    z = trace.nodes["z"]["value"][..., 0] - 0.1 * DATA[:, 0]  # [draws, data]
    assert z.shape == (4000, 3)
    mean = sum(LOCS) / 3
    sd = math.sqrt(sum(s**2 + (m - mean) ** 2 for m, s in zip(LOCS, SCALES, strict=True)) / 3)
    assert ((z.mean(0) - mean).abs() < 4.4 * sd / math.sqrt(4000)).all()
    assert (torch.corrcoef(z.T) - torch.eye(3)).abs().max() < 4.6 / math.sqrt(4000)
    together = MixtureGuide(mixture().parts[0], mixture().parts, None)
    with pyro.plate("many", 4000, dim=-3):
        trace = pyro.poutine.trace(together).get_trace(DATA)
    z = trace.nodes["z"]["value"][..., 0]
    assert torch.corrcoef(z.T)[0, 1] > 0.4  # one component for all: 0.58 by the same formula


def test_a_single_component_is_that_guide():
    alone = MixtureGuide(component(0.3, 0.8), [component(0.3, 0.8)], -2)
    found = [log_weights(pair, g, DATA, 4, seed=1) for g in (alone, component(0.3, 0.8))]
    assert found[0].mean().isfinite()
    draws = draw_posterior(pair, alone, DATA, num_draws=4)
    with pyro.plate("four", 4, dim=-3):
        values = {name: value.reshape(4, 3, -1) for name, value in draws.latents.items()}
        given = pyro.poutine.condition(component(0.3, 0.8), data=values)
        trace = pyro.poutine.trace(given).get_trace(DATA)
    trace.compute_log_prob()
    exact = sum(trace.nodes[name]["log_prob"].sum(-1) for name in ("z", "w"))
    torch.testing.assert_close(draws.log_guide, exact)


# --- guides of Pyro -------------------------------------------------------------------------------


def positive(x):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(slope.sum(-1), rate), obs=x[:, 0])


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_automatic_guides_mix(kind):
    """Integrals: the weights' mean is p(x), the same for each guide and for their mixture."""
    found = fit(positive, kind(positive), DATA, restarts=2, epochs=3, progress=False)
    mixed = found.restarts.mixture
    runs = [run.guide for run in found.restarts.runs]
    values = [log_evidence(found.model, g, DATA, num_particles=4000) for g in (*runs, mixed)]
    truth = values[-1]
    assert abs(float(truth.log_evidence - values[0].log_evidence)) < 5 * math.hypot(
        float(truth.log_evidence_se), float(values[0].log_evidence_se)
    )
    assert posterior_quality(found.model, mixed, DATA).sizes["latent"] == 3


def test_a_guide_whose_latents_cannot_be_inverted_is_refused_by_name():
    guide = AutoStructured(
        positive,
        conditionals={"rate": "normal", "slope": "normal"},
        dependencies={"slope": {"rate": "linear"}},
    )
    found = fit(positive, guide, DATA, restarts=2, epochs=2, progress=False)
    with pytest.raises(ProgramError, match="auxiliary"):
        found.restarts.mixture  # noqa: B018 - it raises
    assert "no mixture" in found.restarts.table.summary()


# --- modules, and what each tool says -------------------------------------------------------------


def test_modules_of_each_run_keep_their_own_values():
    model = VAE(data_dim=2, latent_dim=1, hidden=(3,), likelihood="gaussian").double()
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = fit(model, x, restarts=3, epochs=2, batch_size=4, progress=False)
    runs = found.restarts.runs
    bounds = [log_weights(run, x, 50, seed=0).detach().mean() for run in runs]
    assert len({round(float(b), 6) for b in bounds}) == 3
    kept = found.restarts.kept
    torch.testing.assert_close(log_weights(found, x, 50, seed=0).detach().mean(), bounds[kept])
    torch.testing.assert_close(log_weights(model, x, 50, seed=0).detach().mean(), bounds[kept])
    mixed = found.restarts.mixture
    draws = draw_posterior(found.model, mixed, x, num_draws=6)
    each = []
    for run in runs:
        with pyro.plate("six", 6, dim=-2):
            given = pyro.poutine.condition(run.guide, data=draws.latents)
            trace = pyro.poutine.trace(given).get_trace(x)
        trace.compute_log_prob()
        each.append(trace.nodes["z"]["unscaled_log_prob"])
    exact = torch.stack(each).logsumexp(0) - math.log(3)
    torch.testing.assert_close(draws.log_guide, exact)
    with pytest.raises(ProgramError, match="no parameters of its own"):
        fit(found.model, mixed, x, progress=False)
    with pytest.raises(ProgramError, match="'z'"):
        elbo_gap(found.model, mixed, x)


def both(x):
    shared = pyro.sample("shared", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(shared, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def both_guide(x):
    loc = pyro.param("loc", torch.tensor(0.2))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    shared = pyro.sample("shared", dist.Normal(loc, scale))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x[:, 0] + shared) / 2, 0.5**0.5))


def test_shared_latents_are_mixed_with_those_of_the_data_and_not_one_by_one():
    found = fit(both, both_guide, DATA, restarts=2, epochs=5, progress=False)
    mixed = found.restarts.mixture
    both_ways = [
        log_weights(found.model, guide, DATA, 4000, joint=True, seed=0).detach().logsumexp(0)
        for guide in (mixed, found.guide)
    ]
    assert abs(float(both_ways[0] - both_ways[1])) < 0.1
    with pytest.raises(ProgramError, match="joint=True"):
        log_weights(found.model, mixed, DATA, 4, seed=0)


def test_factors_and_changing_sites_are_refused_by_name():
    def with_factor(x):
        component(0.0, 1.0)(x)
        pyro.factor("extra", torch.tensor(0.0), has_rsample=False)

    with pytest.raises(ProgramError, match="'extra'"):
        log_weights(pair, MixtureGuide(with_factor, [with_factor], -2), DATA)

    def another(x):
        component(0.0, 1.0)(x)
        pyro.sample("odd", dist.Normal(0.0, 1.0))

    with pytest.raises(ProgramError, match="'odd'"):
        log_weights(pair, MixtureGuide(another, [another, component(0.0, 1.0)], -2), DATA)


def test_plates_that_subsample_give_all_components_the_same_data():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows, 0])

    def guide(scale):
        def run(x):
            with pyro.plate("data", len(x), subsample_size=2) as rows:
                pyro.sample("z", dist.Normal(x[rows, 0] / 2, scale))

        return run

    exact = guide(0.5**0.5)
    found = log_weights(model, MixtureGuide(exact, [exact, exact], -1), DATA, 3, seed=0)
    evidence = dist.Normal(0.0, 2**0.5).log_prob(DATA[:, 0])
    assert found.shape == (3, 2)
    assert torch.isclose(found[..., None], evidence).any(-1).all()
    torch.testing.assert_close(found, found[:1].expand(3, 2))


def test_a_module_of_recurrent_cells_is_held_as_well():
    """torch keeps their weights in a second list."""
    cell = nn.GRU(2, 2, batch_first=True).double()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("cell", cell)
        with pyro.plate("data", len(x)):
            out = cell(x[:, None])[0][:, 0]
            pyro.sample("z", dist.Normal(out, 0.7).to_event(1))

    found = fit(model, guide, DATA, restarts=2, epochs=1, progress=False)
    one, other = (
        draw_posterior(model, run.guide, DATA, num_draws=2) for run in found.restarts.runs
    )
    assert not torch.allclose(one.latents["z"], other.latents["z"])
