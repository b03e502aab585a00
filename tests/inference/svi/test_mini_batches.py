"""Mini-batches of models with global latents, and of guides with values for each datum.

A level theta ~ N(0, 1), z_n ~ N(theta, 1) and x_n ~ N(z_n, sigma), written in every way that Pyro
has for a plate. The oracle is the ELBO of all data at stated noise, written by hand.
"""

import itertools
import math
import signal

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    JitTrace_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.poutine.messenger import Messenger

from pyro_vae import fit
from pyro_vae.inference.estimators import (
    AnalyticELBO,
    BetaELBO,
    ImportanceWeighted,
    LeaveOneOut,
    PathwiseELBO,
    Renyi,
    ScoreFunction,
    StickingTheLanding,
)
from pyro_vae.inference.programs import ProgramError, as_arguments
from pyro_vae.inference.svi.mini_batches import TrainingData
from pyro_vae.inference.svi.preparation import prepare

N, B = 7, 3
X = torch.linspace(-1.0, 2.0, N, dtype=torch.float64).square()
START = {"sigma": 0.7, "m": 0.3, "s": 0.5, "b": 0.4, "slope": 0.6}


def number(name):
    return pyro.param(name, torch.tensor(START[name]))


def locs():
    return pyro.param("locs", lambda: torch.linspace(0.5, -1.0, N))


def draw_z(loc):
    return pyro.sample("z", dist.Normal(loc, number("b")))


def observe(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))

    def inside(x):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, number("sigma")), obs=x)

    return inside


def level():
    pyro.sample("theta", dist.Normal(number("m"), number("s")))


def written(plate, pick=lambda x, rows: x, loc=lambda x, rows: number("slope") * x, guide=None):
    """A pair whose plate, rows of x and guide's locations are written in these ways."""

    def model(x):
        inside = observe(x)
        with plate(x) as rows:
            inside(pick(x, rows))

    def q(x):
        level()
        with (guide or plate)(x) as rows:
            draw_z(loc(pick(x, rows), rows))

    return model, q


def of_length(x):
    return pyro.plate("data", len(x))


def of_stated_size(x):
    return pyro.plate("data", N)


def look_up(x, rows):
    return x[rows]


def scaled_by_hand():
    def scaled(program):
        def run(x):
            with _InPlates(N / len(x)):
                program(x)

        return run

    model, guide = written(of_length)
    return scaled(model), scaled(guide)


class _InPlates(Messenger):
    """The factor that users without subsampled plates write themselves."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def _pyro_sample(self, msg):
        if msg["cond_indep_stack"]:
            msg["scale"] = msg["scale"] * self.factor


def with_event_dim(x, rows):
    return pyro.param("locs", lambda: torch.linspace(0.5, -1.0, N), event_dim=0)


WAYS = {
    "length": lambda: written(of_length),
    "stated size": lambda: written(of_stated_size),
    "no size": lambda: written(lambda x: pyro.plate("data"), lambda x, rows: x),
    "subsample given": lambda: written(
        lambda x: pyro.plate("data", N, subsample=x), lambda x, rows: rows
    ),
    "subsample size": lambda: written(
        lambda x: pyro.plate("data", len(x), subsample_size=2), look_up
    ),
    "own index": lambda: written(of_length, look_up),
    "stated size, own index": lambda: written(of_stated_size, look_up),
    "two names": lambda: written(of_length, guide=lambda x: pyro.plate("rows", len(x))),
    "scaled by hand": scaled_by_hand,
    "a value each": lambda: written(of_length, loc=lambda x, rows: locs()[rows]),
    "a value each, not looked up": lambda: written(of_length, loc=lambda x, rows: locs()),
    "a value each, the first": lambda: written(of_length, loc=lambda x, rows: locs()[: len(x)]),
    "a value each, event_dim": lambda: written(of_stated_size, loc=with_event_dim),
    "a value each, own index": lambda: written(
        lambda x: pyro.plate("data", N, subsample_size=4),
        look_up,
        loc=lambda x, rows: locs()[rows],
    ),
}
EACH = [name for name in WAYS if "each" in name]


class Noise(Messenger):
    """Draws every normal latent at stated noise, that of a datum with its row."""

    def __init__(self, rows):
        super().__init__()
        self.noise = {"theta": torch.tensor(0.8), "z": torch.linspace(-1.2, 0.9, N)[rows]}

    def _pyro_sample(self, msg):
        if not msg["is_observed"] and not msg["done"] and msg["name"] in self.noise:
            fn = msg["fn"]
            msg["value"], msg["done"] = fn.mean + fn.stddev * self.noise[msg["name"]], True


def normal(value, loc, scale):
    return -0.5 * ((value - loc) / scale) ** 2 - torch.log(scale) - 0.5 * math.log(2 * math.pi)


def kl(loc, scale, prior_loc):
    return 0.5 * (scale**2 + (loc - prior_loc) ** 2 - 1) - torch.log(scale)


def exact(each, kind):
    """The gradient of the ELBO of all data at the stated noise, by hand."""
    p = {name: torch.tensor(value, requires_grad=True) for name, value in START.items()}
    p["locs"] = torch.linspace(0.5, -1.0, N).requires_grad_()
    one, noise = torch.ones(()), Noise(torch.arange(N)).noise
    loc = p["locs"] if each else p["slope"] * X
    theta, z = p["m"] + p["s"] * noise["theta"], loc + p["b"] * noise["z"]
    fit_of_x = normal(X, z, p["sigma"]).sum()
    if kind == "analytic":
        bound = fit_of_x - kl(loc, p["b"], theta).sum() - kl(p["m"], p["s"], 0.0)
    else:
        q = {n: v.detach() if kind == "landing" else v for n, v in p.items()}
        q_loc = q["locs"] if each else q["slope"] * X
        log_q = normal(theta, q["m"], q["s"]) + normal(z, q_loc, q["b"]).sum()
        bound = fit_of_x + normal(z, theta, one).sum() + normal(theta, 0.0, one) - log_q
    bound.backward()
    return {n: -v.grad for n, v in p.items() if v.grad is not None}, -bound.item()


def prepared(programs, loss, batch_size=B):
    data = TrainingData(X, None, seed=0)
    return prepare(*programs, data, loss=loss, batch_size=batch_size, warmup_epochs=0)


def gradient(found, programs, loss, rows):
    """Loss and gradient of one mini-batch, by name."""
    args, kwargs = as_arguments(found.data.batch(rows))
    loss.max_plate_nesting = found.max_plate_nesting
    with found.on(rows), Noise(rows), poutine.trace(param_only=True) as seen:
        value = loss.loss_and_grads(*programs, *args, **kwargs)
    leaves = {n: s["value"].unconstrained() for n, s in seen.trace.nodes.items()}
    grads = {n: p.grad.clone() for n, p in leaves.items() if p.grad is not None}
    for p in leaves.values():
        p.grad = None
    return value, grads


def assert_mean(found, programs, loss, batches, expected):
    """The mean over batches, each with the probability that a datum of it is the one asked for."""
    total, value = {}, 0.0
    for rows, weight in batches:
        loss_of_batch, grads = gradient(found, programs, loss, rows)
        value += weight * loss_of_batch
        for name, grad in grads.items():
            total[name] = total.get(name, 0.0) + weight * grad
    assert set(expected[0]) <= set(total)
    for name, grad in total.items():
        wanted = expected[0].get(name, torch.zeros_like(grad))
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)
    assert math.isclose(value, expected[1], rel_tol=1e-12)


def partition():
    """Unequal batches: 3, 3 and 1 of a shuffled order."""
    parts = torch.tensor([4, 0, 6, 2, 1, 5, 3]).split(B)
    return [(rows, len(rows) / N) for rows in parts]


@pytest.mark.parametrize("name", WAYS)
def test_the_mean_gradient_over_mini_batches_is_that_of_all_data(name):
    programs, loss = WAYS[name](), Trace_ELBO()
    found = prepared(programs, loss)
    assert found.batch_size == B
    assert found.num_data(B) == N
    assert found.per_datum == ("locs" if name in EACH else "")
    expected = exact(name in EACH, "plain")
    assert_mean(found, programs, loss, partition(), expected)
    pairs = [torch.tensor(rows) for rows in itertools.combinations(range(N), 2)]
    assert_mean(found, programs, loss, [(rows, 1 / len(pairs)) for rows in pairs], expected)


LOSSES = {
    "graph": (TraceGraph_ELBO, "plain"),
    "mean field": (TraceMeanField_ELBO, "analytic"),
    "pathwise": (lambda: PathwiseELBO(joint=True), "plain"),
    "landing": (lambda: StickingTheLanding(joint=True), "landing"),
    "analytic": (lambda: AnalyticELBO(joint=True), "analytic"),
    "beta": (lambda: BetaELBO(beta=1.0, joint=True), "plain"),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["length", "a value each, own index"])
def test_every_elbo_takes_them(name, loss):
    make, kind = LOSSES[loss]
    programs, objective = WAYS[name](), make()
    found = prepared(programs, objective)
    assert_mean(found, programs, objective, partition(), exact(name in EACH, kind))


# --- discrete latents -----------------------------------------------------------------------------


COUNTED = torch.tensor([0.2, 1.4, -0.5], dtype=torch.float64)


def switched(x):
    """A global switch g ~ Bernoulli(0.3) moves the odds of every datum's bit z_n."""
    g = pyro.sample("g", dist.Bernoulli(0.3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.2 + 0.6 * g))
        pyro.sample("x", dist.Normal(z * number("slope"), 1.0), obs=x)


def guess(x):
    pyro.sample("g", dist.Bernoulli(logits=number("m")))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=number("s") * x - number("b")))


class Drawn(Messenger):
    """Gives the latents of the guide these values."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg):
        if msg["name"] in self.values:  # whoever has drawn one before
            msg["value"], msg["done"] = self.values[msg["name"]], True


def bernoulli(value, probs):
    return value * torch.log(probs) + (1 - value) * torch.log1p(-probs)


def test_score_functions_take_them_too():
    """Every outcome of two particles in every mini-batch of two, weighted by its probability."""
    p = {name: torch.tensor(START[name], requires_grad=True) for name in ("slope", "m", "s", "b")}
    q_g, q_z = p["m"].sigmoid(), (p["s"] * COUNTED - p["b"]).sigmoid()
    bound = 0.0
    for g in (0.0, 1.0):
        weight = q_g if g else 1 - q_g
        prior = torch.tensor(0.2 + 0.6 * g)
        for n, x in enumerate(COUNTED):
            for z in (0.0, 1.0):
                terms = bernoulli(z, prior) - bernoulli(z, q_z[n])
                terms = terms + normal(x, z * p["slope"], torch.ones(()))
                bound = bound + weight * (q_z[n] if z else 1 - q_z[n]) * terms
        bound = bound + weight * (bernoulli(g, torch.tensor(0.3)) - torch.log(weight))
    bound.backward()
    data = TrainingData(COUNTED, None, seed=0)
    bits = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    for particles, make in ((1, ScoreFunction), (2, LeaveOneOut)):
        loss = make(particles, joint=True)
        pyro.clear_param_store()
        found = prepare(switched, guess, data, loss=loss, batch_size=2, warmup_epochs=0)
        total = dict.fromkeys(p, 0.0)
        for rows in map(torch.tensor, itertools.combinations(range(3), 2)):
            probs = torch.cat([q_g[None], q_z[rows]]).detach()
            weights = bernoulli(bits, probs).sum(1).exp()
            for k in itertools.product(range(8), repeat=particles):
                own = bits[list(k)] if particles > 1 else bits[k[0]]
                values = {"g": own[..., :1] if particles > 1 else own[0], "z": own[..., 1:]}
                with Drawn(values):
                    _, grads = gradient(found, (switched, guess), loss, rows)
                for name, grad in grads.items():
                    total[name] = total[name] + weights[list(k)].prod() / 3 * grad
        for name, value in p.items():
            torch.testing.assert_close(total[name], -value.grad, rtol=1e-12, atol=1e-12)


def test_summed_out_latents_of_each_datum():
    def mixture(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(theta + 2 * c, number("sigma")), obs=x)

    def guide(x):
        level()

    p = {name: torch.tensor(START[name], requires_grad=True) for name in ("sigma", "m", "s")}
    theta = p["m"] + p["s"] * 0.8
    parts = [normal(X, theta + 2 * c, p["sigma"]) + math.log(0.3 if c else 0.7) for c in (0, 1)]
    one = torch.ones(())
    log_q = normal(theta, p["m"], p["s"])
    bound = torch.stack(parts).logsumexp(0).sum() + normal(theta, 0.0, one) - log_q
    bound.backward()
    loss = TraceEnum_ELBO()
    found = prepared((mixture, guide), loss)
    expected = {n: -v.grad for n, v in p.items()}, -bound.item()
    assert_mean(found, (mixture, guide), loss, partition(), expected)


# --- training -------------------------------------------------------------------------------------


def locals_only(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_each_row_has_an_adam_of_its_own():
    seen = []

    def point(x):
        with pyro.plate("data", len(x)) as rows:
            if len(rows) < N:
                seen.append(rows)
            pyro.sample("z", dist.Delta(locs()[rows]))

    found = fit(locals_only, point, X, epochs=3, batch_size=B, learning_rate=0.1, progress=False)
    steps = seen[-10:-1]  # after the looks at the programs, and before the last of them
    assert all(torch.cat(steps[i : i + 3]).sort()[0].tolist() == list(range(N)) for i in (0, 3, 6))
    for n in range(N):
        z = torch.linspace(0.5, -1.0, N)[n].clone().requires_grad_()
        adam = torch.optim.Adam([z], lr=0.1)
        for rows in steps:
            if n in rows:
                adam.zero_grad()
                (N / len(rows) * 0.5 * (z**2 + (X[n] - z) ** 2)).backward()
                adam.step()
        torch.testing.assert_close(found.parameters["locs"][n], z.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("automatic", [AutoNormal, AutoDelta])
def test_automatic_guides_of_a_hierarchy(automatic):
    """The bound of the history is that of all data, though the model draws two of them itself."""

    def model(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    found = fit(model, automatic(model), X, epochs=80, batch_size=B, evaluate_every=80,
                learning_rate=lambda epoch: 0.3 * 0.95**epoch, progress=False)  # fmt: skip
    # theta | x: precision 1 + N/2, as x_n ~ N(theta, 2).
    mean = X.sum() / 2 / (1 + N / 2)
    name = "AutoNormal.locs.theta" if automatic is AutoNormal else "AutoDelta.theta"
    assert abs(found.parameters[name] - mean) < 0.2
    z = found.parameters[name.replace("theta", "z")]
    assert ((z - (X + mean) / 2).abs() < 0.2).all()
    if automatic is AutoDelta:
        theta, one = found.parameters[name], torch.ones(())
        joint = normal(X, z, one).sum() + normal(z, theta, one).sum() + normal(theta, 0.0, one)
        assert math.isclose(found.history.bound[-1], joint / N, rel_tol=1e-12)
    else:
        evidence = dist.MultivariateNormal(torch.zeros(N), 2 * torch.eye(N) + 1).log_prob(X)
        assert found.history.bound.attrs["bound"] == "lower"
        assert abs(found.history.bound[-1] * N - evidence.item()) < 4
    assert found.history.data_passes.values.tolist() == [80]


@pytest.mark.parametrize("plate", [of_stated_size, lambda x: pyro.plate("data", N, subsample=x)])
def test_held_out_data_may_be_of_another_number(plate):
    """Each bound is that of its own data, and the global latent counts once in both."""

    def model(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with plate(x) as rows:
            pyro.sample("x", dist.Normal(theta, 1.0), obs=rows if rows.dtype == x.dtype else x)

    held_out = torch.tensor([0.5, 3.0])
    options = {"validation": held_out} if plate is of_stated_size else {}
    found = fit(model, AutoDelta(model), X, epochs=2, batch_size=B, progress=False, **options)
    theta, one = found.parameters["AutoDelta.theta"], torch.ones(())
    for name, x in (("bound", X), ("validation_bound", held_out)):
        if name in found.history:
            joint = normal(x, theta, one).sum() + normal(theta, 0.0, one)
            assert math.isclose(found.history[name][-1], joint / len(x), rel_tol=1e-12)


class Interrupts:
    """Ends training after some step, as Ctrl-C does."""

    def __init__(self, at=None):
        self.at, self.calls = at, 0

    def __call__(self, x, generator):
        self.calls += 1
        if self.calls == self.at:
            signal.raise_signal(signal.SIGINT)
        return x + 0.01 * torch.randn(x.shape, generator=generator)


@pytest.mark.parametrize("name", ["a value each", "a value each, own index"])
def test_a_resumed_run_is_the_same_to_the_bit(name, tmp_path):
    def train(folder, transform, **options):
        return fit(*WAYS[name](), X, epochs=4, batch_size=B, learning_rate=0.1, transform=transform,
                   checkpoint=tmp_path / folder, progress=False, **options)  # fmt: skip

    counted = Interrupts()
    whole = train("whole", counted)
    looks = counted.calls - 12 - 4 - 1  # steps, evaluations and the look at the names at the end
    part = train("part", Interrupts(looks + 5))
    assert part.status == "interrupted"
    resumed = train("part", Interrupts(), resume=True)
    for parameter, value in whole.parameters.items():
        assert torch.equal(resumed.parameters[parameter], value)
    assert resumed.history.bound.values.tolist() == whole.history.bound.values.tolist()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda: RenyiELBO(num_particles=2), "RenyiELBO does not keep the factor N/B"),
        (lambda: ReweightedWakeSleep(), "ReweightedWakeSleep does not keep the factor N/B"),
        (lambda: JitTrace_ELBO(), "keeps the rows of its first step"),
        (lambda: ImportanceWeighted(2, joint=True), r"the latents \['theta'\] are global"),
        (lambda: Renyi(2, joint=True), "not linear in it; use an ELBO"),
    ],
)
def test_bounds_that_mini_batches_do_not_estimate_are_refused(loss, says):
    with pytest.raises(ProgramError, match=says):
        prepared(WAYS["length"](), loss())


def test_importance_bounds_of_each_datum_are_not():
    """Without global latents the weights are per datum, and N/B stands outside."""

    def guide(x):
        with pyro.plate("data", len(x)) as rows:
            pyro.sample("z", dist.Normal(locs()[rows], 1.0))

    loss = ImportanceWeighted(2)
    found = prepared((locals_only, guide), loss)
    _, grads = gradient(found, (locals_only, guide), loss, torch.tensor([5, 1]))
    assert grads["locs"].nonzero().flatten().tolist() == [1, 5]


REFUSED = {
    "no plate": (
        lambda x: pyro.sample("x", dist.Normal(pyro.sample("theta", dist.Normal(0.0, 1.0))
                                               .expand(x.shape), 1.0).to_event(1), obs=x),
        lambda x: level(),
        "no vectorised plate with the number of data",
    ),
    "a global latent that looks at the data": (
        WAYS["length"]()[0],
        lambda x: (pyro.sample("theta", dist.Normal(x.mean(), number("s"))), plated(x)),
        "the guide's site 'theta' weighs some of the data otherwise",
    ),
    "coupled data": (
        lambda x: coupled(x),
        lambda x: (level(), plated(x)),
        "the model's site 'x' weighs some of the data otherwise",
    ),
    "one vector for all": (
        WAYS["length"]()[0],
        AutoMultivariateNormal(WAYS["length"]()[0]),
        "Shape mismatch inside plate",
    ),
}  # fmt: skip


def plated(x):
    with pyro.plate("data", len(x)):
        draw_z(number("slope") * x)


def coupled(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z - z.mean(), number("sigma")), obs=x)


@pytest.mark.parametrize("name", REFUSED)
def test_programs_that_do_not_take_parts_are_refused(name):
    model, guide, says = REFUSED[name]
    with pytest.raises(ProgramError, match=says) as refused:
        prepared((model, guide), Trace_ELBO())
    assert "with pyro.plate('data', 7) as rows:`" in str(refused.value)
    assert "batch_size=None" in str(refused.value)


def test_a_guide_that_looks_up_rows_is_not_taken_for_an_amortised_one():
    """Its plate counts from 0 in every part of the data: 128 rows would stand for all."""

    def guide(x):
        with pyro.plate("data", len(x)) as rows:
            pyro.sample("z", dist.Normal(pyro.param("locs", torch.zeros(150))[rows], 1.0))

    data = TrainingData(torch.linspace(-1, 1, 150), None, seed=0)
    found = prepare(locals_only, guide, data, loss=Trace_ELBO(), batch_size=None, warmup_epochs=0)
    assert (found.batch_size, found.per_datum) == (150, "locs")
