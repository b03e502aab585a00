"""Discrete latents that the model marks for enumeration and the guide leaves out."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyro_vae import fit, log_evidence, log_weights
from pyro_vae.inference.estimators.bounds import (
    AnalyticELBO,
    DReG,
    ImportanceWeighted,
    PathwiseELBO,
    StickingTheLanding,
)
from pyro_vae.inference.programs import ProgramError

N, D, C, K = 6, 4, 3, 5
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


@pytest.fixture
def x():
    return torch.randn(N, D)


def mixture(locs):
    @config_enumerate
    def model(x):
        means = pyro.param("locs", locs)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            pyro.sample("x", dist.Normal(means[c], 1.0).to_event(1), obs=x)

    return model


def empty_guide(x):
    pass


def mixture_with_offset(locs):
    """A mixture whose two discrete latents are summed out beside a sampled continuous one."""

    @config_enumerate
    def model(x):
        means = pyro.param("locs", locs)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            b = pyro.sample("b", dist.Bernoulli(0.3))
            loc = means[c] + (z + b)[..., None]
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.linspace(-1, 1, N))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.7))

    return model, guide


def test_a_mixture_with_nothing_left_to_sample_has_its_exact_evidence(x):
    locs = torch.randn(C, D)
    each = torch.distributions.Normal(locs, 1.0).log_prob(x[:, None]).sum(-1)
    exact = (each + WEIGHTS.log()).logsumexp(-1)
    found = log_weights(mixture(locs), empty_guide, x, num_particles=2)
    torch.testing.assert_close(found, exact.expand(2, N), rtol=1e-12, atol=1e-12)
    result = log_evidence(mixture(locs), empty_guide, x, num_particles=3)
    assert result.log_evidence.values == pytest.approx(exact.numpy(), abs=1e-12)
    largest = (each + WEIGHTS.log()).amax(-1)  # the best component alone is not the evidence
    assert (exact - largest).min() > 1e-3


def test_two_enumerated_sites_beside_a_sampled_one_equal_a_sum_by_hand(x):
    locs = torch.randn(C, D)
    model, guide = mixture_with_offset(locs)
    pyro.set_rng_seed(7)
    found = log_weights(model, guide, x, num_particles=K)
    pyro.set_rng_seed(7)
    q = torch.distributions.Normal(torch.linspace(-1, 1, N), torch.tensor(0.7))
    z = q.sample((K,))
    shift = z[..., None, None] + torch.tensor([0.0, 1.0])  # particles data 1 bernoulli
    loc = locs[:, None] + shift[..., None]  # particles data component bernoulli features
    log_p = torch.distributions.Normal(loc, 1.0).log_prob(x[:, None, None]).sum(-1)
    log_p = log_p + WEIGHTS.log()[:, None] + torch.tensor([0.7, 0.3]).log()
    by_hand = log_p.flatten(2).logsumexp(-1) + torch.distributions.Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(found.detach(), by_hand - q.log_prob(z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [PathwiseELBO, AnalyticELBO])
def test_gradients_equal_those_of_traceenum(kind, x):
    start = torch.randn(C, D)

    def gradients(loss):
        pyro.clear_param_store()
        model, guide = mixture_with_offset(start.clone())
        pyro.set_rng_seed(7)
        value = loss.loss_and_grads(model, guide, x)
        named = dict(pyro.get_param_store().named_parameters())
        return value, named["locs"].grad, named["loc"].grad

    ours = gradients(kind(K))
    options = {"vectorize_particles": True, "max_plate_nesting": 1}
    theirs = gradients(TraceEnum_ELBO(num_particles=K, **options))
    if kind is AnalyticELBO:  # the same model gradient at the same draws; its KL is exact
        assert torch.equal(ours[1], theirs[1]) or torch.allclose(ours[1], theirs[1], rtol=1e-12)
        assert not torch.allclose(ours[2], theirs[2], rtol=1e-3)
        return
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [ImportanceWeighted, DReG, StickingTheLanding])
def test_estimators_with_fixed_latents_sum_them_out_in_both_passes(kind, x):
    model, guide = mixture_with_offset(torch.randn(C, D))
    pyro.set_rng_seed(7)
    log_w = log_weights(model, guide, x, num_particles=K).detach()
    value = {
        StickingTheLanding: log_w.mean(0),
        ImportanceWeighted: log_w.logsumexp(0) - torch.tensor(float(K)).log(),
    }.get(kind, log_w.logsumexp(0) - torch.tensor(float(K)).log())
    pyro.set_rng_seed(7)
    assert kind(K).loss_and_grads(model, guide, x) == pytest.approx(-float(value.sum()))


def test_fit_trains_an_enumerated_mixture_and_reports_its_exact_bound(x):
    locs = torch.randn(C, D)
    reached = fit(
        mixture(locs),
        empty_guide,
        x,
        loss=TraceEnum_ELBO(max_plate_nesting=1),
        epochs=20,
        learning_rate=0.1,
        progress=False,
    )
    fitted = reached.parameters["locs"]
    each = torch.distributions.Normal(fitted, 1.0).log_prob(x[:, None]).sum(-1)
    exact = (each + WEIGHTS.log()).logsumexp(-1).mean()
    assert float(reached.history.bound[-1]) == pytest.approx(float(exact), abs=1e-9)
    assert float(reached.history.bound[-1]) > float(reached.history.bound[0])
    assert "kl" not in reached.history


@pytest.mark.parametrize("read", ["states as rows", "other rows"])
def test_a_program_that_weighs_other_states_than_it_draws_is_refused(x, read):
    """As many data as states: what takes the first numbers of `c` runs, and is wrong.

    A fault is missed where the draws happen to be the states that are read: fewer than 1e-6.
    """
    means = torch.randn(C, D)
    reading = {
        "states as rows": lambda c: c.reshape(-1)[:C],
        "other rows": lambda c: c.roll(1, -1),
    }

    def weigh(take, seed):
        @config_enumerate
        def model(x):
            with pyro.plate("data", len(x)):
                c = pyro.sample("c", dist.Categorical(WEIGHTS))
                pyro.sample("x", dist.Normal(means[take(c)], 1.0).to_event(1), obs=x)

        return log_weights(model, empty_guide, x[:C], K, seed=seed)

    for seed in range(3):
        with pytest.raises(ProgramError, match="site 'x' has another density where latents are"):
            weigh(reading[read], seed)
    assert bool(weigh(lambda c: c, 0).isfinite().all())


def test_what_cannot_be_summed_per_datum_is_refused(x):
    @config_enumerate
    def inner(x):
        with pyro.plate("data", len(x)), pyro.plate("features", D, dim=-2):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x.T)

    @config_enumerate
    def outer(x):
        c = pyro.sample("c", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(c, 1.0).expand([D]).to_event(1), obs=x)

    @config_enumerate
    def chain(x):
        with pyro.plate("data", len(x)):
            c = torch.tensor(0)
            for t in pyro.markov(range(D)):
                c = pyro.sample(f"c{t}", dist.Categorical(torch.eye(2)[c] * 0.8 + 0.1))
                pyro.sample(f"x{t}", dist.Normal(c.double(), 1.0), obs=x[:, t])

    def unmarked(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(c[..., None], 1.0).expand([N, D]).to_event(1), obs=x)

    for model, message in (
        (outer, "'c' is outside the batch plate"),
        (chain, "share dims"),
        (unmarked, "'c' is missing from the guide"),
    ):
        with pytest.raises(ProgramError, match=message):
            log_weights(model, empty_guide, x)
    with pytest.raises(ProgramError, match="inside plate"):
        log_weights(inner, empty_guide, x, joint=True)
