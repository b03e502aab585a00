"""Discrete latents that the model marks for enumeration and the guide leaves out."""

import itertools
import math

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


MOVES = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)


@config_enumerate
def inner(x):
    with pyro.plate("data", len(x)), pyro.plate("features", D, dim=-2):
        c = pyro.sample("c", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(c, 1.0), obs=x.T)


@config_enumerate
def outer(x):
    c = pyro.sample("c", dist.Bernoulli(0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(c[..., None] * torch.ones(D), 1.0).to_event(1), obs=x)


@config_enumerate
def chain(x):
    with pyro.plate("data", len(x)):
        c = torch.tensor(0)
        for t in pyro.markov(range(D)):
            c = pyro.sample(f"c{t}", dist.Categorical(MOVES[c]))
            pyro.sample(f"x{t}", dist.Normal(c.double(), 1.0), obs=x[:, t])


@config_enumerate
def two_chains(x):
    """The second chain reads the first; what is observed has a plate within the datum."""
    pair = pyro.plate("pair", 2, dim=-1)
    with pyro.plate("data", len(x), dim=-2):
        a = b = torch.tensor(0)
        for t in pyro.markov(range(2)):
            a = pyro.sample(f"a{t}", dist.Categorical(MOVES[a]))
            b = pyro.sample(f"b{t}", dist.Categorical(MOVES[(a + b) % 2]))
            with pair:
                loc = a.double() - 2.0 * b
                pyro.sample(f"x{t}", dist.Normal(loc, 1.0), obs=x[:, 2 * t : 2 * t + 2])


@config_enumerate
def of_lengths(x):
    """Sequences of which the n-th is over after n % D steps more than one."""
    lengths = 1 + torch.arange(len(x)) % D
    with pyro.plate("data", len(x)):
        c = torch.tensor(0)
        for t in pyro.markov(range(D)):
            with pyro.poutine.mask(mask=t < lengths):
                c = pyro.sample(f"c{t}", dist.Categorical(MOVES[c]))
                pyro.sample(f"x{t}", dist.Normal(c.double(), 1.0), obs=x[:, t])


@config_enumerate
def with_masked_sites(x):
    """The same with masks of the distributions, where Pyro counts the states of what is over."""
    lengths = 1 + torch.arange(len(x)) % D
    with pyro.plate("data", len(x)):
        c = torch.tensor(0)
        for t in pyro.markov(range(D)):
            c = pyro.sample(f"c{t}", dist.Categorical(MOVES[c]).mask(t < lengths))
            pyro.sample(f"x{t}", dist.Normal(c.double(), 1.0).mask(t < lengths), obs=x[:, t])


def densities(x, states):
    """Of standard normals about one state, or about a state for each of the last dim."""
    return torch.distributions.Normal(torch.as_tensor(states).double(), 1.0).log_prob(x)


def paths(x, length):
    """Over every path of the chain from state 0, by brute force."""
    terms = []
    for path in itertools.product((0, 1), repeat=length):
        moves = sum(MOVES[i, j].log() for i, j in itertools.pairwise((0, *path)))
        terms.append(moves + densities(x[:length], path).sum())
    return torch.stack(terms).logsumexp(0)


def pairs_of_paths(x):
    terms = []
    for a0, b0, a1, b1 in itertools.product((0, 1), repeat=4):
        moves = MOVES[0, a0] * MOVES[a0, b0] * MOVES[a0, a1] * MOVES[(a1 + b0) % 2, b1]
        observed = densities(x[:2], a0 - 2 * b0).sum() + densities(x[2:], a1 - 2 * b1).sum()
        terms.append(moves.log() + observed)
    return torch.stack(terms).logsumexp(0)


SHARES = torch.tensor([0.7, 0.3], dtype=torch.float64).log()


def of_each_entry(x):
    return sum((SHARES + densities(value, (0, 1))).logsumexp(0) for value in x)


@pytest.mark.parametrize(
    ("model", "by_hand"),
    [
        (inner, lambda x, n: of_each_entry(x)),
        (chain, lambda x, n: paths(x, D)),
        (two_chains, lambda x, n: pairs_of_paths(x)),
        (of_lengths, lambda x, n: paths(x, 1 + n % D)),
        (with_masked_sites, lambda x, n: paths(x, 1 + n % D)),
    ],
)
def test_states_in_plates_and_chains_equal_a_sum_over_all_of_them(model, by_hand, x):
    expected = torch.stack([by_hand(row, n) for n, row in enumerate(x)])
    found = log_weights(model, empty_guide, x, num_particles=2)
    torch.testing.assert_close(found, expected.expand(2, N), rtol=1e-12, atol=1e-12)
    together = log_weights(model, empty_guide, x, joint=True)
    torch.testing.assert_close(together, expected.sum().reshape(1, 1), rtol=1e-12, atol=1e-12)
    theirs = TraceEnum_ELBO(max_plate_nesting=2).loss(model, empty_guide, x)
    if model is with_masked_sites:
        theirs += sum(D - 1 - n % D for n in range(N)) * math.log(2)
    assert float(expected.sum()) == pytest.approx(-theirs, rel=1e-10)


def test_one_sequence_alone_has_a_joint_weight(x):
    @config_enumerate
    def alone(x):
        c = torch.tensor(0)
        for t in pyro.markov(range(len(x))):
            c = pyro.sample(f"c{t}", dist.Categorical(MOVES[c]))
            pyro.sample(f"x{t}", dist.Normal(c.double(), 1.0), obs=x[t])

    found = log_weights(alone, empty_guide, x[0], joint=True)
    assert float(found) == pytest.approx(float(paths(x[0], D)), rel=1e-12)
    with pytest.raises(ProgramError, match="joint=True"):
        log_weights(alone, empty_guide, x[0])


def test_a_state_outside_the_plate_is_one_for_all_data(x):
    found = log_weights(outer, empty_guide, x, joint=True)
    expected = (SHARES + torch.stack([densities(x, c).sum() for c in (0, 1)])).logsumexp(0)
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
    with pytest.raises(ProgramError, match="'c' is outside the batch plate"):
        log_weights(outer, empty_guide, x)


def test_no_state_is_lost_for_being_a_thousand_nats_less_probable():
    """Each reading favours another state; products of their probabilities are zero in float64."""

    @config_enumerate
    def contradictory(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(60.0 * c, 1.0), obs=0 * x)
            pyro.sample("y", dist.Normal(60.0 * (1 - c), 1.0), obs=0 * x)

    found = log_weights(contradictory, empty_guide, torch.zeros(2))
    expected = -(60.0**2) / 2 - torch.tensor(2 * torch.pi).log()
    torch.testing.assert_close(found, expected.expand(1, 2), rtol=1e-12, atol=1e-12)


def test_what_cannot_be_summed_is_refused(x):
    @config_enumerate
    def crossed(x):
        data, features = pyro.plate("data", len(x), dim=-1), pyro.plate("features", D, dim=-2)
        with data:
            a = pyro.sample("a", dist.Bernoulli(0.5))
        with features:
            b = pyro.sample("b", dist.Bernoulli(0.5))
        with data, features:
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x.T)

    @config_enumerate
    def narrow(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            loc = c.expand(N)[:, None]
            pyro.sample("x", dist.Normal(loc, 1.0).expand([N, D]).to_event(1), obs=x)

    @config_enumerate
    def undeclared(x):
        c = pyro.sample("c", dist.Bernoulli(0.5).expand([len(x)]))
        pyro.sample("x", dist.Normal(c[..., None] * torch.ones(D), 1.0).to_event(1), obs=x)

    def unlisted(x):
        with pyro.plate("data", len(x)):
            bits = dist.Bernoulli(0.5).expand([2]).to_event(1)
            pyro.sample("c", bits, infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([D]).to_event(1), obs=x)

    def unmarked(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(c[..., None], 1.0).expand([N, D]).to_event(1), obs=x)

    for model, message in (
        (crossed, "plates of which neither is inside the other.*sequential"),
        (narrow, "with the states of its enumerated latents side by side .*RuntimeError"),
        (undeclared, r"site 'c' has log-probabilities of shape .*declare the dim"),
        (unlisted, "'c' is marked for enumeration, but its distribution"),
        (unmarked, "'c' is missing from the guide"),
    ):
        with pytest.raises(ProgramError, match=message):
            log_weights(model, empty_guide, x, joint=True)
