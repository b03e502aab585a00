"""One torch optimizer behind Pyro's interface: the same steps, and the same again after a pause."""

from functools import partial

import pyro
import pytest
import torch
from pyro.optim.clipped_adam import ClippedAdam

from pyro_vae.inference.svi import TrainingError
from pyro_vae.inference.svi.optimizer import check_gradients, make_optimizer


def parameters(seed=0):
    """Three parameters of unequal sizes in the store."""
    pyro.clear_param_store()
    generator = torch.Generator().manual_seed(seed)
    for name, shape in (("b", (2, 3)), ("a", (4,)), ("c", ())):
        pyro.param(name, torch.randn(shape, generator=generator))
    return dict(pyro.get_param_store().named_parameters())


def put_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(params):
        params[name].grad = torch.randn(params[name].shape, generator=generator)


def steps(optim, params, seeds):
    for seed in seeds:
        put_gradients(params, seed)
        optim(set(params.values()))
    return {name: p.detach().clone() for name, p in params.items()}


def started(optimizer=None, learning_rate=0.1):
    params = parameters()
    optim = make_optimizer(optimizer, learning_rate)
    optim.add(params.values())
    return optim, params


def test_adam_by_its_formula():
    """Kingma & Ba (2015), written out."""
    optim, params = started()
    expected = {name: p.detach().clone() for name, p in params.items()}
    m = dict.fromkeys(params, 0.0)
    v = dict.fromkeys(params, 0.0)
    for t in range(1, 6):
        put_gradients(params, t)
        for name, p in params.items():
            m[name] = 0.9 * m[name] + 0.1 * p.grad
            v[name] = 0.999 * v[name] + 0.001 * p.grad**2
            rate = 0.1 / (1 - 0.9**t)
            expected[name] -= rate * m[name] / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-8)
        optim(set(params.values()))
    for name, p in params.items():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "factory",
    [
        None,
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.SGD, lr=0.1),
        partial(torch.optim.RMSprop, lr=0.1),
        partial(torch.optim.NAdam, lr=0.1),
        partial(ClippedAdam, lr=0.1, lrd=0.9),  # changes its learning rate as it goes
    ],
)
def test_a_restored_optimizer_goes_on_bit_for_bit(factory):
    optim, params = started(factory)
    through = steps(optim, params, range(6))

    optim, params = started(factory)
    half = steps(optim, params, range(3))
    saved = {name: t.clone() for name, t in optim.tensors(params).items()}
    optim, params = started(factory)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(half[name])
    optim.restore(saved, params)
    resumed = steps(optim, params, range(3, 6))
    assert all(torch.equal(resumed[name], through[name]) for name in through)

    if saved and any("momentum" in n or "exp_avg" in n for n in saved):  # must reject: no state
        optim, params = started(factory)
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(half[name])
        other = steps(optim, params, range(3, 6))
        assert not all(torch.equal(other[name], through[name]) for name in through)


def test_parameters_that_a_step_did_not_use_stay():
    """As with Pyro's one optimizer a tensor: momentum alone moves nothing."""
    optim, params = started()
    steps(optim, params, range(2))
    before = params["a"].detach().clone()
    optim([params["b"]])  # nobody has a gradient
    put_gradients(params, 9)
    params["a"].grad = None
    optim([params["b"], params["c"]])
    assert torch.equal(params["a"].detach(), before)


def test_a_parameter_that_comes_later_is_trained():
    optim, _ = started()
    late = pyro.param("late", torch.ones(2)).unconstrained()
    late.grad = torch.ones(2)
    optim([late])
    torch.testing.assert_close(late.detach(), torch.full((2,), 0.9))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("given", [None, pyro.optim.Adam({"lr": 0.1})])
def test_gradients_that_are_not_finite_move_nothing(bad, given):
    optim, params = started(given)
    before = {name: p.detach().clone() for name, p in params.items()}
    put_gradients(params, 0)
    params["b"].grad[1, 2] = bad
    with pytest.raises(TrainingError, match="the gradient of 'b' is not finite"):
        optim(set(params.values()))
    assert all(torch.equal(p.detach(), before[name]) for name, p in params.items())


def test_huge_but_finite_gradients_pass():
    """Their norm overflows although each of them is a number."""
    params = parameters()
    params["a"].grad = torch.full((4,), 1e200)
    check_gradients(list(params.values()))


def test_what_is_no_optimizer_is_refused():
    weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="function from parameters to a torch optimizer"):
        make_optimizer(torch.optim.SGD([weight], lr=0.1), 0.1)
    with pytest.raises(ValueError, match="it gave"):
        started(lambda params: list(params))


def test_name_and_settings():
    optim, _ = started(partial(torch.optim.SGD, lr=0.25))
    assert optim.name == "SGD"
    assert optim.arguments["lr"] == 0.25
    assert started()[0].arguments["betas"] == [0.9, 0.999]
    assert "Adam" in make_optimizer(pyro.optim.Adam({"lr": 0.1}), 0.1).name


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.3),
        pyro.optim.ClippedAdam({"lr": 0.1, "weight_decay": 0.3}),
    ],
)
def test_rows_that_were_not_seen_stay_to_the_bit(optimizer):
    locs = pyro.param("locs", torch.randn(2, 5)).unconstrained()
    shared = pyro.param("shared", torch.randn(5)).unconstrained()
    optim = make_optimizer(optimizer, 0.1)

    def step(rows, visits):
        optim.see(torch.tensor(rows), {"locs": 1}, visits)
        locs.grad, shared.grad = torch.zeros(2, 5), torch.ones(5)
        locs.grad[:, rows] = 1.0
        optim([locs, shared])

    def state():
        users = isinstance(optimizer, pyro.optim.PyroOptim)
        kept = optim.optim.optim_objs[locs] if users else optim.optimizer
        return [v.clone() for v in kept.state[locs].values() if getattr(v, "shape", 0) == (2, 5)]

    step([0, 1, 4], 0)  # every row has momentum now
    step([2, 3], 0)
    before, others, kept = locs.detach().clone(), shared.detach().clone(), state()
    step([1, 3], 1)
    for now, was in zip([locs, *state()], [before, *kept], strict=True):
        assert torch.equal(now[:, [0, 2, 4]], was[:, [0, 2, 4]])
        assert (now[:, [1, 3]] != was[:, [1, 3]]).all()
    assert (shared != others).all()
    assert kept
