"""Discrete latents summed out beside global ones: mixtures and hidden Markov models.

What is expected goes over every assignment, or every path of states, by itertools.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_vae import (
    draw_posterior,
    elbo_gap,
    fit,
    fit_em,
    log_evidence,
    log_weights,
    loo,
    posterior_quality,
    predictive_check,
)
from pyro_vae.inference.estimators import ImportanceWeighted, PathwiseELBO
from pyro_vae.inference.log_weights import SplitLogWeights
from pyro_vae.inference.predictive import draw_predictive
from pyro_vae.inference.programs import ProgramError, program_scope, unconstrained_model

X = torch.tensor([-0.7, 1.6, 0.4], dtype=torch.float64)
LOCS = torch.tensor([-1.0, 1.5], dtype=torch.float64)
SEQUENCES = torch.tensor(
    [[0.3, -1.2, 1.1, 0.8], [-0.5, -0.9, 0.2, 1.9], [1.4, 0.1, -1.6, -0.3]], dtype=torch.float64
)
A, B = 2.0, 3.0
K = 5


def mixture(x: Tensor) -> None:
    """A share with a prior, of two components with known locations."""
    w = pyro.sample("w", dist.Beta(A, B))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(w), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(LOCS[c.long()], 1.0), obs=x)


def shares(x: Tensor) -> None:
    a = pyro.param("a", torch.tensor(2.5), constraint=dist.constraints.positive)
    pyro.sample("w", dist.Beta(a, 2.0))


@config_enumerate
def tutorial(x: Tensor) -> None:
    """As in Pyro's tutorial, whose `locs[assignment]` takes one particle at a time."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([0.5, 1.5])))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(locs[assignment], scale), obs=x)


def markov(x: Tensor) -> None:
    stay = pyro.sample("stay", dist.Beta(3.0, 2.0))
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("sequences", len(x)):
        z: Any = torch.tensor(0)
        for t in pyro.markov(range(x.shape[1])):
            to_one = torch.where(z == 1, stay, 1 - stay)
            z = pyro.sample(
                f"z{t}",
                dist.Categorical(torch.stack([1 - to_one, to_one], -1)),
                infer={"enumerate": "parallel"},
            )
            pyro.sample(f"x{t}", dist.Normal(Vindex(locs)[..., z], 0.8), obs=x[:, t])


def normal(x: Tensor, loc: Tensor, scale: Tensor | float) -> Tensor:
    return -0.5 * ((x - loc) / scale) ** 2 - torch.as_tensor(scale).log() - 0.5 * math.log(math.tau)


def all_assignments(x: Tensor, log_share: Tensor, locs: Tensor, scale: Any) -> Tensor:
    """Log p(x | theta) of all data as one sum over each of their joint assignments."""
    terms = []
    for chosen in itertools.product(range(len(locs)), repeat=len(x)):
        index = torch.tensor(chosen)
        terms.append((log_share[index] + normal(x, locs[index], scale)).sum())
    return torch.stack(terms).logsumexp(0)


def all_paths(x: Tensor, stay: Tensor, locs: Tensor) -> Tensor:
    """Log p(x | theta) of each sequence over every path of its states; paths begin in state 0."""
    table = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])]).log()
    terms = []
    for path in itertools.product((0, 1), repeat=x.shape[1]):
        moves = sum(table[a, b] for a, b in zip((0, *path), path, strict=False))
        terms.append(moves + normal(x, locs[torch.tensor(path)], 0.8).sum(1))
    return torch.stack(terms).logsumexp(0)


def likelihoods(name: str, theta: dict[str, Tensor]) -> Tensor:
    """Of each draw and datum, by the oracle."""
    found = []
    for k in range(len(next(iter(theta.values())))):
        at = {n: v[k] for n, v in theta.items()}
        if name == "markov":
            found.append(all_paths(SEQUENCES, at["stay"], at["locs"]))
            continue
        w, locs, scale = at.get("weights"), at.get("locs", LOCS), at.get("scale", 1.0)
        w = torch.stack([1 - at["w"], at["w"]]) if w is None else w
        each = torch.stack([all_assignments(x[None], w.log(), locs, scale) for x in X])
        torch.testing.assert_close(each.sum(), all_assignments(X, w.log(), locs, scale))
        found.append(each)
    return torch.stack(found)


PAIRS: dict[str, tuple[Any, Callable[[], Any], Tensor]] = {
    "mixture": (mixture, lambda: shares, X),
    "tutorial": (
        tutorial,
        lambda: AutoNormal(poutine.block(tutorial, expose=["weights", "scale", "locs"])),
        X,
    ),
    "one vector": (
        tutorial,
        lambda: AutoMultivariateNormal(
            poutine.block(tutorial, expose=["weights", "scale", "locs"])
        ),
        X,
    ),
    "markov": (
        markov,
        lambda: AutoNormal(poutine.block(markov, expose=["stay", "locs"])),
        SEQUENCES,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_both_parts_of_the_weights_are_those_of_an_enumeration(name: str) -> None:
    model, make, x = PAIRS[name]
    guide = make()
    pyro.set_rng_seed(0)
    found = log_weights(model, guide, x, K, seed=3)
    assert isinstance(found, SplitLogWeights)
    draws = draw_posterior(model, guide, x, num_draws=K, seed=3)
    assert found.global_latents == tuple(draws.latents)
    inside = likelihoods(name, draws.latents)
    torch.testing.assert_close(found.log_weights.detach(), inside, rtol=1e-11, atol=1e-11)
    prior = {
        "w": dist.Beta(A, B),
        "weights": dist.Dirichlet(torch.tensor([0.5, 1.5])),
        "scale": dist.LogNormal(0.0, 0.5),
        "locs": dist.Normal(0.0, 1.0 if name == "markov" else 3.0),
        "stay": dist.Beta(3.0, 2.0),
    }
    above = sum(prior[n].log_prob(v).reshape(K, -1).sum(1) for n, v in draws.latents.items())
    log_joint = above + inside.sum(1)
    torch.testing.assert_close(draws.log_joint[:, 0], log_joint, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.joint.detach(), draws.log_weights, rtol=1e-11, atol=1e-11)
    assert found.global_log_weights.detach() + draws.log_guide[:, 0] == pytest.approx(
        above, abs=1e-10
    )


def exact_evidence(x: Tensor = X) -> float:
    """Log p(x) of the mixture, its share integrated out, over all assignments."""
    logs = []
    for chosen in itertools.product((0, 1), repeat=len(x)):
        index, ones = torch.tensor(chosen), sum(chosen)
        shape = torch.tensor([A + ones, B + len(x) - ones, A, B, A + B, A + B + len(x)])
        a, b, a0, b0, before, after = torch.lgamma(shape)
        logs.append(a + b - after - a0 - b0 + before + normal(x, LOCS[index], 1.0).sum())
    return float(torch.stack(logs).logsumexp(0))


def test_evidence_is_that_of_all_assignments() -> None:
    exact = exact_evidence()
    grid = log_evidence(mixture, shares, X, method="quadrature", joint=True, progress=False)
    assert float(grid.log_evidence) == pytest.approx(exact, abs=1e-6)
    found = log_evidence(mixture, shares, X, num_particles=4000, seed=0)
    away = abs(float(found.log_evidence) - exact)
    assert away < 4.5 * float(found.log_evidence_se)  # fails once in 150,000 runs
    assert float(found.log_evidence_se) < 0.01


def test_the_gap_is_that_of_the_global_latents_alone() -> None:
    exact = exact_evidence()
    grid = torch.linspace(0, 1, 20_002, dtype=torch.float64)[1:-1]
    q = dist.Beta(torch.tensor(2.5), torch.tensor(2.0)).log_prob(grid)
    likelihood = torch.stack(
        [all_assignments(X, torch.stack([1 - w, w]).log(), LOCS, 1.0) for w in grid[::20]]
    )
    posterior = dist.Beta(A, B).log_prob(grid[::20]) + likelihood - exact
    q = q[::20]
    kl = float(torch.trapezoid(q.exp() * (q - posterior), grid[::20]))
    found = elbo_gap(mixture, shares, X, num_particles=4000, progress=False)
    assert abs(float(found.global_gap) - kl) < 4.5 * float(found.global_gap_se)
    assert float(found.global_gap_se) < 0.02
    assert found.local_gap.values.tolist() == [0.0] * len(X)
    assert found.local_gap_se.values.tolist() == [0.0] * len(X)
    assert float(found.global_gap) == pytest.approx(float(found.gap), abs=1e-12)


def test_data_left_out_are_predicted_as_an_enumeration_does() -> None:
    rest = [torch.cat([X[:n], X[n + 1 :]]) for n in range(len(X))]
    exact = exact_evidence() - torch.tensor([exact_evidence(others) for others in rest])
    found = loo(mixture, shares, X)
    away = (torch.as_tensor(found.log_predictive.values) - exact).abs()
    assert (away < 4.5 * torch.as_tensor(found.log_predictive_se.values)).all()
    assert float(found.log_predictive_se.max()) < 0.05


@pytest.mark.parametrize("name", ["tutorial", "markov"])
def test_the_density_that_chains_follow_is_that_of_an_enumeration(name: str) -> None:
    model, _, x = PAIRS[name]
    u = torch.linspace(-1.0, 1.2, 2 * {"tutorial": 4, "markov": 3}[name]).reshape(2, 1, -1)
    with program_scope(0):
        latent_model = unconstrained_model(model, None, x, joint=None)
        found, start = latent_model.log_densities(u)
        latents = latent_model.constrain(u)
    inside = likelihoods(name, latents).sum(1)
    torch.testing.assert_close((found - start)[:, 0], inside, rtol=1e-11, atol=1e-11)


def test_states_are_drawn_from_their_posterior_given_the_draws() -> None:
    def apart(x: Tensor) -> None:
        w = pyro.sample("w", dist.Beta(A, B))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(w), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(2.0 * c, 1.0), obs=x)
            pyro.sample("y", dist.Normal(100 * c, 1.0).mask(torch.tensor(False)), obs=x)

    count = 4000
    draws = draw_posterior(apart, shares, X, num_draws=count, seed=0)
    drawn = draw_predictive(apart, draws, X, seed=1).values["y"] > 50  # shows the state drawn
    w = draws.latents["w"][:, None]
    one, zero = w * normal(X, torch.tensor(2.0), 1.0).exp(), (1 - w) * normal(X, 0 * X, 1.0).exp()
    expected = one / (one + zero)
    error = ((expected * (1 - expected)).sum(0)).sqrt() / count
    assert ((drawn.double().mean(0) - expected.mean(0)).abs() < 4.5 * error).all()
    assert ((expected - w).abs().mean(0) > 10 * error).all()  # those of the prior would be seen
    checked = predictive_check(mixture, shares, X, num_draws=30)
    assert any("c, summed out" in note for note in checked.provenance["notes"])


def test_paths_of_states_are_drawn_from_their_posterior() -> None:
    def chain(x: Tensor) -> None:
        stay = pyro.sample("stay", dist.Beta(3.0, 2.0))
        with pyro.plate("sequences", len(x)):
            z: Any = torch.tensor(0)
            for t in pyro.markov(range(2)):
                to_one = torch.where(z == 1, stay, 1 - stay)
                probs = torch.stack([1 - to_one, to_one], -1)
                z = pyro.sample(f"z{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
                pyro.sample(f"x{t}", dist.Normal(z.double(), 0.8), obs=x[:, t])
                hidden = dist.Normal(100 * z.double(), 1.0).mask(torch.tensor(False))
                pyro.sample(f"y{t}", hidden, obs=x[:, t])

    def guide(x: Tensor) -> None:
        pyro.sample("stay", dist.Beta(torch.tensor(4.0), 2.0))

    x, count = SEQUENCES[:, :2], 4000
    draws = draw_posterior(chain, guide, x, num_draws=count, seed=0)
    values = draw_predictive(chain, draws, x, seed=1).values
    drawn = (values["y0"] > 50) & (values["y1"] > 50)  # both states 1
    stay = draws.latents["stay"][:, None]
    weights = {
        (a, b): (stay if a == 0 else 1 - stay)
        * (stay if a == b else 1 - stay)
        * (normal(x[:, 0], torch.tensor(a), 0.8) + normal(x[:, 1], torch.tensor(b), 0.8)).exp()
        for a in (0.0, 1.0)
        for b in (0.0, 1.0)
    }
    expected = weights[1.0, 1.0] / sum(weights.values())
    error = (expected * (1 - expected)).sum(0).sqrt() / count
    assert ((drawn.double().mean(0) - expected.mean(0)).abs() < 4.5 * error).all()


def test_one_sequence_without_a_plate_is_taken_as_a_whole() -> None:
    def alone(x: Tensor) -> None:
        stay = pyro.sample("stay", dist.Beta(3.0, 2.0))
        z: Any = torch.tensor(0)
        for t in pyro.markov(range(len(x))):
            to_one = torch.where(z == 1, stay, 1 - stay)
            probs = torch.stack([1 - to_one, to_one], -1)
            z = pyro.sample(f"z{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
            pyro.sample(f"x{t}", dist.Normal(2.0 * z - 1, 0.8), obs=x[t])

    def guide(x: Tensor) -> None:
        pyro.sample("stay", dist.Beta(torch.tensor(4.0), 2.0))

    x, locs = SEQUENCES[0], torch.tensor([-1.0, 1.0])
    grid = torch.linspace(0, 1, 1002, dtype=torch.float64)[1:-1]
    inside = torch.stack([all_paths(x[None], stay, locs)[0] for stay in grid])
    exact = torch.trapezoid((inside + dist.Beta(3.0, 2.0).log_prob(grid)).exp(), grid).log()
    options: dict[str, Any] = {"joint": True, "progress": False}
    found = log_evidence(alone, guide, x, method="quadrature", **options)
    assert float(found.log_evidence) == pytest.approx(float(exact), abs=1e-6)
    draws = draw_posterior(alone, guide, x, num_draws=6, joint=True)
    predicted = draw_predictive(alone, draws, x).values
    assert {name: tuple(v.shape) for name, v in predicted.items()} == {
        f"x{t}": (6,) for t in range(4)
    }
    with pytest.raises(ProgramError, match="joint=True"):
        log_evidence(alone, guide, x)


# --- training -------------------------------------------------------------------------------------


def in_rows(x: Tensor, rows: Tensor | None = None) -> None:
    w = pyro.sample("logit", dist.Normal(0.0, 1.0)).sigmoid()
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(X), subsample=rows):
        data = x if rows is None else x[rows]
        c = pyro.sample("c", dist.Bernoulli(w), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(mean + 2 * c, 1.0), obs=data)


def of_rows(x: Tensor, rows: Tensor | None = None) -> None:
    loc = pyro.param("loc", torch.tensor([0.3, -0.4]))
    sd = pyro.param("sd", torch.tensor([0.5, 0.7]))
    pyro.sample("logit", dist.Normal(loc[0], sd[0]))
    pyro.sample("mean", dist.Normal(loc[1], sd[1]))


def gradients_of(loss: Any, *args: Any) -> tuple[float, Tensor]:
    pyro.clear_param_store()
    pyro.set_rng_seed(7)
    value = loss.loss_and_grads(in_rows, of_rows, *args)
    named = dict(pyro.get_param_store().named_parameters())
    return value, torch.cat([named["loc"].grad, named["sd"].grad])


@pytest.mark.parametrize("kind", [PathwiseELBO, ImportanceWeighted])
def test_gradients_are_those_of_the_enumeration(kind: Any) -> None:
    found, gradient = gradients_of(kind(K), X)
    pyro.set_rng_seed(7)
    eps = [torch.randn(K, 1), torch.randn(K, 1)]
    loc = torch.tensor([0.3, -0.4], requires_grad=True)
    sd = torch.tensor([0.5, 0.7], requires_grad=True)
    logit, mean = (loc[i] + sd[i] * eps[i][:, 0] for i in (0, 1))
    w = logit.sigmoid()
    each = [
        all_assignments(
            X, torch.stack([1 - w[k], w[k]]).log(), torch.stack([mean[k], mean[k] + 2]), 1.0
        )
        for k in range(K)
    ]
    above = normal(logit, 0 * logit, 1.0) + normal(mean, 0 * mean, 2.0)
    log_q = normal(logit, loc[0], sd[0]) + normal(mean, loc[1], sd[1])
    log_w = above + torch.stack(each) - log_q
    bound = log_w.mean() if kind is PathwiseELBO else log_w.logsumexp(0) - math.log(K)
    (-bound).backward()
    assert found == pytest.approx(-bound.item(), rel=1e-11)
    torch.testing.assert_close(gradient, torch.cat([loc.grad, sd.grad]), rtol=1e-9, atol=1e-11)


def test_mini_batches_are_unbiased_and_scale_outside_the_sum_over_states() -> None:
    whole, gradient = gradients_of(PathwiseELBO(K), X)
    parts = [
        gradients_of(PathwiseELBO(K), X, torch.tensor(rows))
        for rows in itertools.combinations(range(len(X)), 2)
    ]
    assert sum(value for value, _ in parts) / 3 == pytest.approx(whole, rel=1e-12)
    mean = torch.stack([part for _, part in parts]).mean(0)
    torch.testing.assert_close(mean, gradient, rtol=1e-12, atol=1e-12)


def test_fit_takes_a_mini_batch_of_the_tutorials_mixture() -> None:
    x = torch.cat([dist.Normal(-3.0, 1.0).sample((40,)), dist.Normal(3.0, 1.0).sample((24,))])
    guide = AutoNormal(poutine.block(tutorial, expose=["weights", "scale", "locs"]))
    options: dict[str, Any] = {"loss": PathwiseELBO(), "learning_rate": 0.05, "progress": False}
    fitted = fit(tutorial, guide, x, batch_size=16, epochs=8, seed=0, **options)
    bound = fitted.history.bound
    assert float(bound[-1] - bound[0]) > 0.5
    exact = log_weights(fitted.model, fitted.guide, x, 50, seed=0).joint.mean().item() / len(x)
    assert float(bound[-1]) == pytest.approx(exact, abs=0.15)
    with pytest.raises(ProgramError, match="one weight on all data"):
        fit(tutorial, guide, x, loss=ImportanceWeighted(2), batch_size=16, progress=False)


def clusters(x: Tensor) -> None:
    w = pyro.sample("w", dist.Beta(A, B))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(w))  # not marked: EM sums all that can be listed
        pyro.sample("x", dist.Normal(locs[c.long()], 0.8), obs=x)


def test_em_holds_global_latents_at_their_most_probable_point() -> None:
    options: dict[str, Any] = {"method": "generalized", "tolerance": 1e-13, "progress": False}
    fitted = fit_em(clusters, X, num_gradient_steps=20, **options)
    w, locs = (fitted.parameters[f"AutoDelta.{n}"].clone().requires_grad_() for n in ("w", "locs"))
    by_hand = (
        all_assignments(X, torch.stack([1 - w, w]).log(), locs, 0.8)
        + dist.Beta(A, B).log_prob(w)
        + normal(locs, torch.tensor([-1.0, 1.0]), 1.0).sum()
    )
    by_hand.backward()
    assert abs(float(w.grad)) < 1e-5
    assert float(locs.grad.abs().max()) < 1e-5
    history = fitted.history
    assert float(history.log_joint_total[-1]) == pytest.approx(by_hand.item(), rel=1e-12)
    assert float(history.log_joint[-1]) == pytest.approx(by_hand.item() / len(X), rel=1e-12)
    assert float(history.objective_total.diff("step").min()) > -1e-12
    assert float(history.log_joint[-1] - history.log_joint[0]) > 1e-3
    assert history.objective.attrs["bound"] == "objective"
    assert not {"bound", "log_evidence"} & set(history)  # nothing here bounds log p(x)
    assert "with w, locs at a point log p(x, theta)" in fitted.summary()
    at = poutine.trace(fitted.guide).get_trace(X).nodes["w"]["value"]
    assert at.item() == w.item()
    with pytest.raises(ProgramError, match="Delta"):
        log_weights(config_enumerate(clusters), fitted.guide, X)


def test_em_sums_the_paths_of_a_chain_beside_a_point() -> None:
    fitted = fit_em(markov, SEQUENCES, method="generalized", max_iterations=3, progress=False)
    stay, locs = fitted.parameters["AutoDelta.stay"], fitted.parameters["AutoDelta.locs"]
    expected = all_paths(SEQUENCES, stay, locs).sum() + dist.Beta(3.0, 2.0).log_prob(stay)
    expected = expected + normal(locs, torch.zeros(2), 1.0).sum()
    assert float(fitted.history.log_joint_total[-1]) == pytest.approx(float(expected), rel=1e-12)


def test_em_refuses_latents_of_the_data_and_variational_bayes_of_programs() -> None:
    def with_local(x: Tensor) -> None:
        w = pyro.sample("w", dist.Beta(A, B))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(w))
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def nothing_to_sum(x: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    with pytest.raises(ProgramError, match="'z' cannot be enumerated"):
        fit_em(with_local, X, method="generalized")
    with pytest.raises(ProgramError, match=r"theta are global.*AutoDelta\(model\)"):
        fit_em(nothing_to_sum, X, method="generalized")
    with pytest.raises(ValueError, match=r"AutoNormal\(poutine.block"):
        fit_em(clusters, X, method="variational_bayes")


# --- what shares states, or reads them wrongly ----------------------------------------------------


def shared_state(x: Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(theta + 2 * s, 1.0), obs=x)


def thetas(x: Tensor) -> None:
    pyro.sample("theta", dist.Normal(torch.tensor(0.2), 0.9))


def test_a_state_that_the_data_share_is_summed_jointly_or_refused() -> None:
    found = log_weights(shared_state, thetas, X, K, seed=0)
    theta = draw_posterior(shared_state, thetas, X, num_draws=K, seed=0).latents["theta"]
    each = [
        math.log(p) + normal(X, theta[:, None] + 2 * s, 1.0).sum(1) for s, p in ((0, 0.7), (1, 0.3))
    ]
    expected = torch.stack(each).logsumexp(0) + dist.Normal(0.0, 1.0).log_prob(theta)
    expected = expected - dist.Normal(0.2, 0.9).log_prob(theta)
    torch.testing.assert_close(found, expected[:, None], rtol=1e-12, atol=1e-12)
    with pytest.raises(ProgramError, match=r"share the state .* \(s\).*joint=True"):
        elbo_gap(shared_state, thetas, X, progress=False)

    def scaled(x: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        with pyro.plate("data", 2 * len(x), subsample_size=len(x)) as rows:
            pyro.sample("x", dist.Normal(theta + 2 * s, 1.0), obs=x[rows % len(x)])

    with pytest.raises(ProgramError, match="different scales"):
        PathwiseELBO().loss_and_grads(scaled, thetas, X)


@pytest.mark.parametrize("read", ["states as rows", "other rows"])
def test_states_read_by_the_wrong_dim_are_refused(read: str) -> None:
    """Missed where the draws happen to be what is read: a 2^-24 chance, or less, each time."""
    take = {
        "states as rows": lambda c: c.reshape(-1)[:2].repeat(2)[:3],
        "other rows": lambda c: c.roll(1, -1),
    }[read]

    def wrong(x: Tensor) -> None:
        w = pyro.sample("w", dist.Beta(A, B))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(w), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(LOCS[take(c).long()], 1.0), obs=x)

    with pytest.raises(ProgramError, match="site 'x' has another density where latents are"):
        log_weights(wrong, shares, X, K, seed=0)


def test_what_reads_states_upwards_or_cannot_draw_them_is_refused() -> None:
    def upward(x: Tensor) -> None:
        w = pyro.sample("w", dist.Beta(A, B))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(w), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)
        pyro.sample("count", dist.Normal(c.sum(-1), 1.0), obs=torch.tensor(2.0))

    def some(x: Tensor) -> None:
        w = pyro.sample("w", dist.Beta(A, B))
        with pyro.plate("data", len(x)):
            drawn = {"enumerate": "parallel", "num_samples": 3}
            c = pyro.sample("c", dist.Bernoulli(w), infer=drawn)
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def one_hot(x: Tensor) -> None:
        w = pyro.sample("w", dist.Beta(A, B))
        with pyro.plate("data", len(x)):
            c = dist.OneHotCategorical(torch.stack([1 - w, w], -1))
            c = pyro.sample("c", c, infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(c @ LOCS, 1.0), obs=x)

    def unsized(x: Tensor) -> None:
        w = pyro.sample("w", dist.Beta(A, B))
        with pyro.plate("data"):
            c = pyro.sample("c", dist.Bernoulli(w), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(LOCS[c.long()], 1.0), obs=x)

    with pytest.raises(ProgramError, match="site 'count' has another density"):
        log_weights(upward, shares, X, joint=True)
    with pytest.raises(ProgramError, match="num_samples draws"):
        log_weights(some, shares, X)
    expected = log_weights(mixture, shares, X, K, seed=0).joint
    for model, message in ((one_hot, "states .* are vectors"), (unsized, "'data' .* has no size")):
        draws = draw_posterior(model, shares, X, num_draws=K, seed=0)
        torch.testing.assert_close(draws.log_weights, expected.detach(), rtol=1e-12, atol=1e-12)
        with pytest.raises(ProgramError, match=message):
            draw_predictive(model, draws, X)


def test_a_point_has_no_weights_but_can_be_fitted() -> None:
    guide = AutoDelta(poutine.block(tutorial, expose=["weights", "scale", "locs"]))
    with pytest.raises(ProgramError, match="Delta"):
        log_evidence(tutorial, guide, X)
    fitted = fit(tutorial, guide, X, loss=TraceEnum_ELBO(), epochs=2, progress=False)
    assert set(fitted.parameters) == {f"AutoDelta.{n}" for n in ("weights", "scale", "locs")}


def test_a_reference_by_chains_finds_the_posterior() -> None:
    found = posterior_quality(
        mixture,
        shares,
        X,
        reference="hmc",
        num_particles=200,
        num_chains=4,
        num_warmup=40,
        num_samples=50,
        progress=False,
    )
    assert float(found.rhat) < 1.3
    assert float(found.khat) < 0.7
