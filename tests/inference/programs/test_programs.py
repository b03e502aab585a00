"""Running users' programs leaves the caller's world as it was, also after an error."""

import copy
import random
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.effect import AutoNormalMessenger
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae import (
    compare_estimators,
    draw_posterior,
    elbo_gap,
    fit,
    log_evidence,
    log_weights,
    posterior_quality,
    predictive_check,
    sample_posterior,
)
from pyro_vae.inference.estimators.bounds import PathwiseELBO
from pyro_vae.inference.programs import (
    FittedProgram,
    as_arguments,
    batch_axes,
    batch_length,
    evaluation_mode,
    fixed_draws,
    keep_random_state,
    map_batch,
    modules_of,
    program_scope,
    take,
    trace_programs,
    unwrap_programs,
)

N, K, D, H = 5, 7, 3, 2  # data, particles, features, latents: all different


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.3))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, scale))


# --- the caller's world ---------------------------------------------------------------------------


class Unruly(Exception):
    pass


def unruly(x: Tensor) -> None:
    """Changes everything that a program can, and then gives up."""
    pyro.param("mine", torch.tensor(1.0))
    pyro.param("loc", torch.tensor(9.0))
    torch.set_default_dtype(torch.float16)
    torch.set_num_threads(2)
    pyro.enable_validation(False)
    np.random.rand()  # noqa: NPY002 - the stream that users' programs use
    random.random()
    torch.rand(3)
    raise Unruly


def world() -> dict[str, Any]:
    state = pyro.get_param_store().get_state()
    return {
        "tensors": {name: id(value) for name, value in state["params"].items()},
        "values": {name: value.tolist() for name, value in state["params"].items()},
        "constraints": {name: str(value) for name, value in state["constraints"].items()},
        "settings": pyro.settings.get(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "torch": torch.random.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "random": random.getstate(),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_world_is_afterwards_what_it_was(fails: bool) -> None:
    x = torch.randn(N)
    guide(x)
    before = world()
    if fails:
        with pytest.raises(Unruly):
            log_weights(unruly, guide, x, K, seed=1)
    else:
        log_weights(model, guide, x, K, seed=1)
    assert world() == before
    assert set(before["values"]) == {"loc", "scale"}


# --- the precision of products --------------------------------------------------------------------

PRODUCTS = {
    "CPU": torch.backends.mkldnn.matmul,
    "CPU convolutions": torch.backends.mkldnn.conv,
    "CUDA": torch.backends.cuda.matmul,
    "CUDA convolutions": torch.backends.cudnn.conv,
}


def precisions() -> dict[str, str]:
    """What torch says of every product, and of its older switches where it says it."""
    found = {name: product.fp32_precision for name, product in PRODUCTS.items()}
    for name, read in {
        "older": torch.get_float32_matmul_precision,
        "older cuDNN": lambda: torch.backends.cudnn.allow_tf32,
    }.items():
        try:
            found[name] = str(read())
        except RuntimeError:
            found[name] = "contradicted"
    return found


def everything_in_bfloat16() -> None:
    torch.backends.fp32_precision = "bf16"


def products_in_tf32() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"


CHOICES: dict[str, Callable[[], None]] = {
    "torch's own": lambda: None,
    "medium": partial(torch.set_float32_matmul_precision, "medium"),
    "high": partial(torch.set_float32_matmul_precision, "high"),
    "all of them": everything_in_bfloat16,
    "one of them": products_in_tf32,
}


@pytest.fixture(params=CHOICES)
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    """The precisions that a caller may have chosen, and torch's own afterwards."""
    before = {product: product.fp32_precision for product in PRODUCTS.values()}
    CHOICES[request.param]()
    yield request.param
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for product, precision in before.items():
        product.fp32_precision = precision


def test_evaluation_is_in_full_precision_and_leaves_the_callers_choice(chosen: str) -> None:
    before, seen = precisions(), []

    def watched(x: Tensor) -> None:
        seen.append({name: product.fp32_precision for name, product in PRODUCTS.items()})
        model(x)

    def unruly_too(x: Tensor) -> None:
        watched(x)
        torch.set_float32_matmul_precision("medium")
        raise Unruly

    x, quiet = torch.randn(N), {"progress": False}
    few = {"num_particles": 8, **quiet}
    tools: list[Callable[[], object]] = [
        lambda: log_weights(watched, guide, x, K),
        lambda: draw_posterior(watched, guide, x, num_draws=K),
        lambda: log_evidence(watched, guide, x, **few),
        lambda: elbo_gap(watched, guide, x, richer=(), max_steps=20, **few),
        lambda: posterior_quality(watched, guide, x, checks=(), **few),
        lambda: compare_estimators(watched, guide, x, ["PathwiseELBO"], [2], repeats=8, **quiet),
        lambda: sample_posterior(watched, x, num_warmup=2, num_samples=4, **quiet),
        lambda: predictive_check(watched, guide, x, num_draws=20),
    ]
    for tool in tools if chosen == "medium" else tools[:1]:
        seen.clear()
        tool()
        assert seen
        assert all(set(found.values()) == {"ieee"} for found in seen)
        assert precisions() == before
    with pytest.raises(Unruly):
        log_weights(unruly_too, guide, x, K)
    assert precisions() == before


def test_training_is_in_the_callers_precision_which_is_recorded(chosen: str) -> None:
    before, seen = precisions(), []

    def watched(x: Tensor) -> None:
        seen.append((torch.is_grad_enabled(), torch.backends.mkldnn.matmul.fp32_precision))
        model(x)

    found = fit(watched, guide, torch.randn(N), epochs=2, progress=False)
    # Before the first step the programs are looked at, which is no training.
    steps = [precision for with_gradients, precision in seen[3:] if with_gradients]
    assert set(steps) == {before["CPU"]}
    assert seen[-1] == (False, "ieee")  # the bound of the last epoch
    says = {
        "medium": "bf16 (CPU), tf32 (CUDA)",
        "high": "tf32 (CPU), tf32 (CUDA)",
        "all of them": "bf16 (CPU)",
        "one of them": "tf32 (CPU)",
    }
    assert found.config["fit"]["float32_precision"] == says.get(chosen, "ieee")
    assert precisions() == before


@pytest.mark.float32
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_coarse_precision_moves_no_log_weight(device: str) -> None:
    """784 pixels through a layer of 400: in bfloat16 a datum's log-probability moves by 0.1 nats.

    Where the processor has no such products, torch takes others, and the last bits still differ.
    """
    decoder = nn.Sequential(nn.Linear(20, 400), nn.Tanh(), nn.Linear(400, 784)).to(device)
    x = torch.bernoulli(torch.full((64, 784), 0.3)).to(device)

    def pixels(x: Tensor) -> None:
        net = pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(20), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=3 * net(z)).to_event(1), obs=x)

    def prior(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(20), 1.0).to_event(1))

    full = log_weights(pixels, prior, x, K, seed=1)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(log_weights(pixels, prior, x, K, seed=1), full)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = "none"
    with program_scope(1):
        z = trace_programs(pixels, prior, ((x,), {}), K, 1)[0].nodes["z"]["value"]
    exact = decoder.double()(z.double()) * 3
    expected = dist.Bernoulli(logits=exact).log_prob(x.double()).sum(-1)
    # A sum of 784 terms of about 1, each of 400 products: within float32 rounding.
    torch.testing.assert_close(full.double(), expected, rtol=0, atol=784 * 2**-20)


# --- missing data ---------------------------------------------------------------------------------


SEEN = torch.arange(N * D).reshape(N, D) % 4 > 0


def ragged(how: str) -> tuple[Callable, Callable]:
    """z ~ N(0, 1), x_d ~ N(z, spread_d) where it was seen; the guide leaves out what was not."""

    def model(x: Tensor) -> None:
        spread = pyro.param("spread", torch.ones(D), constraint=constraints.positive)
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            features = dist.Normal(z[..., None], spread)
            if how == "features":
                pyro.sample("x", features.mask(SEEN).to_event(1), obs=x)
            elif how == "data":
                with poutine.mask(mask=SEEN.all(1)):
                    pyro.sample("x", features.to_event(1), obs=x)
            else:
                with pyro.plate("features", D, dim=-2), poutine.mask(mask=SEEN.T):
                    pyro.sample("x", dist.Normal(z, spread[:, None]), obs=x.T)

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.2))
        with pyro.plate("data", N):
            loc = slope * torch.where(SEEN, x, 0.0).sum(-1)
            pyro.sample("z", dist.Normal(loc, 0.6))

    return model, guide


@pytest.mark.filterwarnings("ignore:measuring the unfitted")
@pytest.mark.parametrize("how", ["features", "data", "plate"])
def test_missing_data_under_a_mask_weigh_what_any_other_values_do(how: str) -> None:
    model, guide = ragged(how)
    filled = torch.randn(N, D)
    missing = torch.where(SEEN, filled, torch.nan)
    quiet = {"progress": False}
    few = {"num_particles": 40, **quiet}
    tools: dict[str, Callable[[Tensor], Any]] = {
        "log_weights": lambda x: log_weights(model, guide, x, K, seed=1).detach(),
        "log_evidence": lambda x: log_evidence(model, guide, x, **few).log_evidence,
        "elbo_gap": lambda x: elbo_gap(model, guide, x, richer=(), max_steps=40, **few).gap,
        "posterior_quality": lambda x: posterior_quality(model, guide, x, checks=(), **few).khat,
        "sample_posterior": lambda x: sample_posterior(
            model, x, num_warmup=3, num_samples=4, **quiet
        ).latents["z"],
        "compare_estimators": lambda x: (
            compare_estimators(model, guide, x, [Trace_ELBO()], [2], repeats=8, **quiet).variance
        ),
        **{
            f"fit with {type(loss).__name__}": lambda x, loss=loss: (
                fit(model, guide, x, loss=loss, learning_rate=0.1, epochs=3, **quiet)
            ).parameters["spread"]
            for loss in (Trace_ELBO(), TraceMeanField_ELBO(), PathwiseELBO())
        },
    }
    for name, tool in tools.items() if how == "features" else [*tools.items()][:1]:
        found, expected = (torch.as_tensor(np.asarray(tool(x))) for x in (missing, filled))
        assert expected.isfinite().any(), name
        assert torch.equal(found.nan_to_num(), expected.nan_to_num()), name
    assert not torch.equal(tools["log_weights"](1 + filled), tools["log_weights"](filled))


def test_a_caught_error_leaves_no_hook_behind() -> None:
    net = nn.BatchNorm1d(1)

    def with_net(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(1)).to_event(1))
            pyro.sample("x", dist.Normal(net(z)[..., 0], 1.0), obs=x)

    def vector_guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, None], 1.0).to_event(1))

    buffers = {name: value.clone() for name, value in net.named_buffers()}
    with pytest.raises(ValueError, match="BatchNorm1d in training mode"):
        log_weights(with_net, vector_guide, torch.randn(N), K)
    assert net.training
    assert all(torch.equal(buffers[name], value) for name, value in net.named_buffers())
    net(torch.randn(4, 1))  # works again outside


def test_the_seed_alone_decides_the_draws() -> None:
    def noisy_elsewhere(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            shift = pyro.param("shift", lambda: torch.tensor(np.random.rand()))  # noqa: NPY002
            pyro.sample("z", dist.Normal(shift + random.Random(1).random(), 1.0))

    x = torch.randn(N)
    first = log_weights(model, noisy_elsewhere, x, K, seed=4)
    torch.rand(3)
    np.random.rand(2)  # noqa: NPY002
    random.random()
    assert torch.equal(first, log_weights(model, noisy_elsewhere, x, K, seed=4))
    assert not torch.equal(first, log_weights(model, noisy_elsewhere, x, K, seed=5))


def test_random_states_come_back_after_an_error() -> None:
    @keep_random_state()
    def fails() -> None:
        pyro.set_rng_seed(7)
        raise Unruly

    pyro.set_rng_seed(6)
    expected = torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002
    pyro.set_rng_seed(6)
    with pytest.raises(Unruly):
        fails()
    assert (torch.rand(()).item(), np.random.rand(), random.random()) == expected  # noqa: NPY002


def test_modules_are_put_in_evaluation_mode_and_back_each_in_its_own() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
    net.train()
    net[0].eval()

    def program() -> Any:
        return net

    @evaluation_mode(program)
    def fails() -> None:
        assert not any(module.training for module in net.modules())
        raise Unruly

    with pytest.raises(Unruly):
        fails()
    assert [module.training for module in net.modules()] == [True, False, True]


# --- parameters -----------------------------------------------------------------------------------


def decoder_of(net: nn.Module) -> Callable[[Tensor], None]:
    def program(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(net(z[..., None])[..., 0], 1.0), obs=x)

    return program


def encoder_of(net: nn.Module) -> Callable[[Tensor], None]:
    def program(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x[:, None])[:, 0], 1.0))

    return program


def linear(weight: float) -> nn.Linear:
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, weight)
    return net


def by_hand(x: Tensor, z: Tensor, decoder: float, encoder: float) -> Tensor:
    log_p = -0.5 * z**2 - 0.5 * (x - decoder * z) ** 2 - torch.log(torch.tensor(2 * torch.pi))
    return log_p + 0.5 * (z - encoder * x) ** 2 + 0.5 * torch.log(torch.tensor(2 * torch.pi))


def test_modules_registered_under_one_name_do_not_meet() -> None:
    x = torch.randn(N)
    for decoder, encoder in ((2.0, -1.0), (0.5, 3.0)):  # the second pair takes the name again
        nets = linear(decoder), linear(encoder)
        weights = log_weights(decoder_of(nets[0]), encoder_of(nets[1]), x, K, seed=1)
        pyro.set_rng_seed(1)
        z = encoder * x + torch.randn(K, N)
        torch.testing.assert_close(weights, by_hand(x, z, decoder, encoder))
        weights.sum().backward()
        assert all(net.weight.grad is not None for net in nets)
        assert [net.weight.item() for net in nets] == [decoder, encoder]
        decoder_of(nets[0])(x)  # now the caller's own store holds the name, too


def test_refuses_a_parameter_that_is_made_anew_at_every_call() -> None:
    """It would be evaluated at its first value, whatever it was fitted to."""

    def anew(x: Tensor) -> None:
        loc = pyro.param("loc", nn.Parameter(torch.tensor(0.0)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    for num_particles in (1, K):
        with pytest.raises(ValueError, match=r"'loc' is another nn\.Parameter at every call"):
            log_weights(model, anew, torch.randn(1), num_particles)


class Shift(PyroModule):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = PyroParam(torch.tensor(value), constraint=constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.value, 1.0))


def test_a_pyro_module_keeps_its_values_whatever_the_store_holds() -> None:
    x, old, new = torch.randn(N), Shift(1.0), Shift(5.0)
    old(x)  # the store now holds the old module's parameter under this name
    weights = log_weights(model, new, x, K, seed=1)
    pyro.set_rng_seed(1)
    z = 5.0 + torch.randn(K, N)
    log_q = dist.Normal(5.0, 1.0).log_prob(z)
    expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x) - log_q
    torch.testing.assert_close(weights, expected)
    assert [shift.value.item() for shift in (old, new)] == pytest.approx([1.0, 5.0])


# --- fitted programs ------------------------------------------------------------------------------


@pytest.fixture
def fitted() -> FittedProgram:
    store = pyro.get_param_store()
    state = {
        "params": {
            "loc": torch.tensor(2.0, requires_grad=True),
            "scale": torch.tensor(0.0, requires_grad=True),  # exp(0) = 1
        },
        "constraints": {"loc": constraints.real, "scale": constraints.positive},
    }
    store.clear()
    return FittedProgram(guide, state)


def test_a_fitted_program_runs_with_its_values(fitted: FittedProgram) -> None:
    x = torch.randn(N)
    guide(x)  # the caller's store says loc = 0.3, scale = 0.5
    weights = log_weights(model, fitted, x, K, seed=1)
    pyro.set_rng_seed(1)
    z = 2.0 + torch.randn(K, N)
    log_q = dist.Normal(2.0, 1.0).log_prob(z)
    expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x) - log_q
    torch.testing.assert_close(weights, expected)
    assert pyro.param("loc").item() == pytest.approx(0.3)
    weights.sum().backward()
    assert fitted.state["params"]["loc"].grad is not None


def test_a_fitted_program_can_be_trained_again_by_svi(fitted: FittedProgram) -> None:
    x = torch.randn(N)
    svi = SVI(model, fitted, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(3):
        svi.step(x)
    loc = fitted.state["params"]["loc"].item()
    assert loc == pytest.approx(1.7, abs=0.05)  # three steps of Adam towards x / 2
    assert poutine.trace(fitted).get_trace(x).nodes["z"]["fn"].loc[0].item() == loc
    assert list(pyro.get_param_store()) == []


def test_fitted_programs_are_transparent(fitted: FittedProgram) -> None:
    start, bare_model, bare_guide = unwrap_programs(model, fitted)
    assert (bare_model, bare_guide) == (model, guide)
    assert start["params"]["loc"] is not fitted.state["params"]["loc"]
    assert start["params"]["loc"].item() == 2.0
    assert fitted.__name__ == "guide"
    twin = copy.deepcopy(fitted)
    assert twin.state["params"]["loc"] is not fitted.state["params"]["loc"]
    assert twin.state["params"]["loc"].item() == 2.0


# --- arguments and modules ------------------------------------------------------------------------


def test_arguments_of_every_kind() -> None:
    x, y = torch.zeros(N, D), torch.ones(N)
    assert as_arguments(x) == ((x,), {})
    assert as_arguments((x, y)) == ((x, y), {})
    assert as_arguments({"x": x}) == ((), {"x": x})
    assert as_arguments(()) == ((), {})
    lengths = [batch_length(a, batch_axes(a)[0]) for a in (x, (y, x), {"n": 3, "x": x}, (), 4)]
    assert lengths == [N, N, N, 1, 1]


def test_data_are_taken_along_the_axis_of_their_plate() -> None:
    x, y, scale = torch.randn(D, N), torch.randn(N), torch.ones(D)
    arguments = (scale, x, "label", y)
    (axes,) = batch_axes(arguments, N)
    assert axes == (None, 1, None, 0)
    assert batch_length(arguments, axes) == N
    for part, expected in ((slice(1, 3), [1, 2]), (torch.tensor([4, 0]), [4, 0])):
        taken = map_batch(arguments, take(part), axes)
        assert torch.equal(taken[1], x[:, expected])
        assert torch.equal(taken[3], y[expected])
        assert taken[0] is scale
        assert taken[2] == "label"
    assert batch_axes({"x": torch.zeros(N, N), "y": y}, N) == [(0, 0), (1, 0)]  # a square
    assert batch_axes(x, K) == []
    taken = map_batch({"n": 3, "x": x}, take(slice(2)), batch_axes({"n": 3, "x": x}, D)[0])
    assert torch.equal(taken["x"], x[:2])


global_net = nn.Linear(1, 1)


class Owner(nn.Module):
    def program(self) -> None:
        pass


class Plain:
    """Not a module, but it holds one."""

    def __init__(self) -> None:
        self.net = nn.Linear(1, 1)

    def __call__(self) -> None:
        pass

    def program(self) -> None:
        pass


def test_finds_the_modules_that_a_program_reaches() -> None:
    net, owner, plain = nn.Linear(1, 1), Owner(), Plain()

    def closure() -> Any:
        return net, later

    def by_global() -> Any:
        return global_net

    @wraps(closure)
    def decorated() -> None:
        pass

    assert modules_of(closure) == [net]  # the other cell is still empty
    later = 1
    for program, expected in (
        (net, net),
        (owner.program, owner),
        (partial(owner.program), owner),
        (partial(net), net),
        (closure, net),
        (by_global, global_net),
        (decorated, net),
        (plain, plain.net),
        (plain.program, plain.net),
        (FittedProgram(owner.program, {}), owner),
        (FittedProgram(net, {}), net),
    ):
        assert modules_of(program) == [expected], program
    assert modules_of(len) == []
    assert later == 1


def test_a_scope_starts_with_the_callers_values_and_shares_their_leaves() -> None:
    guide(torch.randn(N))
    leaf = pyro.get_param_store().get_state()["params"]["scale"]
    with program_scope():
        assert pyro.param("scale").item() == pytest.approx(0.5)
        assert pyro.param("scale").unconstrained() is leaf
        pyro.param("new", torch.tensor(1.0))
    assert sorted(pyro.get_param_store()) == ["loc", "scale"]


def test_draws_to_replay_are_detached_copies_and_leave_the_trace_alone() -> None:
    x = torch.randn(N)
    traces = trace_programs(model, guide, ((x,), {}))
    attached = traces[0].nodes["z"]["value"]
    given = fixed_draws(*traces)
    assert traces[0].nodes["z"]["value"] is attached
    assert attached.requires_grad
    value = given.nodes["z"]["value"]
    assert torch.equal(value, attached)
    assert not value.requires_grad
    assert value is not attached


def test_guides_that_pyro_runs_as_messengers() -> None:
    x = torch.randn(N)
    messenger = AutoNormalMessenger(model)
    messenger(x)
    with torch.no_grad():
        weights = log_weights(model, messenger, x, K, seed=1)
        pyro.set_rng_seed(1)
        expected = -Trace_ELBO(num_particles=K).loss(model, messenger, x)
    assert weights.shape == (K, N)
    assert float(weights.sum() / K) == pytest.approx(expected, rel=1e-10)


def test_an_autoguide_may_be_set_up_by_log_weights() -> None:
    x, auto = torch.randn(N), AutoNormal(model)
    weights = log_weights(model, auto, x, K, seed=1)
    assert torch.equal(weights, log_weights(model, auto, x, K, seed=1))
    weights.sum().backward()
    assert auto.locs.z_unconstrained.grad is not None
    assert list(pyro.get_param_store()) == []
