"""What log weights refuse, each with the sentence that names the site, and what they find out."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer import autoguide as guides
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pyro_vae import log_weights
from pyro_vae.inference.programs import (
    ProgramError,
    check_module_names,
    check_parameters,
    inspect_programs,
)

N, K, D, H = 5, 7, 3, 2  # data, particles, features, latents: all different


def model(x: Tensor, also: Callable[[Tensor], Any] = id) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, torch.ones(H)).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), torch.ones(D)).to_event(1), obs=x)
        also(x)


def guide(x: Tensor, also: Callable[[Tensor], Any] = id) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, :H], 0.8).to_event(1))
        also(x)


def weigh(pair: tuple[Callable, Callable], joint: bool = False, x: Tensor | None = None) -> Tensor:
    x = torch.randn(N, D) if x is None else x
    return log_weights(pair[0], pair[1], x, K, joint=joint)


# --- one refusal after another --------------------------------------------------------------------


def latent_outside() -> tuple[Callable, Callable]:
    def m(x: Tensor) -> None:
        pyro.sample("global", dist.Normal(0.0, 1.0))
        model(x)

    def g(x: Tensor) -> None:
        pyro.sample("global", dist.Normal(0.0, 1.0))
        guide(x)

    return m, g


def observed_outside() -> tuple[Callable, Callable]:
    def m(x: Tensor) -> None:
        model(x)
        pyro.sample("total", dist.Normal(0.0, 1.0), obs=x.sum())

    return m, guide


def missing_in_guide() -> tuple[Callable, Callable]:
    return partial(model, also=lambda x: pyro.sample("forgotten", dist.Normal(0.0, 1.0))), guide


def guide_only() -> tuple[Callable, Callable]:
    return model, partial(guide, also=lambda x: pyro.sample("surplus", dist.Normal(0.0, 1.0)))


def delta() -> tuple[Callable, Callable]:
    def g(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x[:, :H], event_dim=1))

    return model, g


def delta_beside_autonormal() -> tuple[Callable, Callable]:
    def m(x: Tensor) -> None:
        with pyro.plate("data", N, subsample_size=2) as rows:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal((a + b)[..., None], 1.0).to_event(1), obs=x[rows])

    both = guides.AutoGuideList(m)
    both.append(guides.AutoNormal(poutine.block(m, expose=["a"])))

    def start(site: Any) -> Tensor:
        return torch.randn(site["fn"].shape())  # every row its own point

    both.append(guides.AutoDelta(poutine.block(m, expose=["b"]), init_loc_fn=start))
    return m, both


def unequal_scales() -> tuple[Callable, Callable]:
    def m(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.5):
                z = pyro.sample("z", dist.Normal(0.0, torch.ones(H)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, True), torch.ones(D)).to_event(1), obs=x)

    return m, guide


def scale_per_datum() -> tuple[Callable, Callable]:
    weight = torch.arange(1.0, N + 1)
    return poutine.scale(model, scale=weight), poutine.scale(guide, scale=weight)


def undeclared_dim() -> tuple[Callable, Callable]:
    def m(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(H)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0).expand([4, N]), obs=x[:, 0].expand(4, N))

    return m, guide


def forgotten_to_event_on_a_square() -> tuple[Callable, Callable]:
    """x is [N, N] here, so that the feature dim passes for the batch plate."""

    def m(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(H)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, True), torch.ones(N)), obs=x[:, :1].expand(N, N))

    return m, guide


def noise_in_the_model() -> tuple[Callable, Callable]:
    def m(x: Tensor) -> None:
        model(x + 0.1 * torch.rand(x.shape))

    return m, guide


def noise_in_the_guide() -> tuple[Callable, Callable]:
    def g(x: Tensor) -> None:
        guide(x + 0.1 * torch.rand(x.shape))

    return model, g


def shared_in_a_sizeless_plate() -> tuple[Callable, Callable]:
    def m(x: Tensor) -> None:
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(H)).to_event(1))
            loc = z.sum(-1, True).expand(N, D)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def g(x: Tensor) -> None:
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(0.0, torch.ones(H)).to_event(1))

    return m, g


def two_names() -> tuple[Callable, Callable]:
    def m(x: Tensor) -> None:
        with pyro.plate("codes", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(H)).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z.sum(-1, True), torch.ones(D)).to_event(1), obs=x)

    return m, guide


def subsampled(
    model_name: str, guide_name: str, model_rows: dict[str, Any], guide_rows: dict[str, Any]
) -> tuple[Callable, Callable]:
    def m(x: Tensor) -> None:
        with pyro.plate(model_name, N, **model_rows) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = z[..., None]
            pyro.sample("x", dist.Normal(loc, torch.ones(D)).to_event(1), obs=x[rows])

    def g(x: Tensor) -> None:
        with pyro.plate(guide_name, N, **guide_rows) as rows:
            pyro.sample("z", dist.Normal(x[rows, 0], 1.0))

    return m, g


def grey(validate: bool | None) -> tuple[Callable, Callable]:
    def m(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(H)).to_event(1))
            pixels = dist.Bernoulli(
                logits=z.sum(-1, True).expand(*z.shape[:-1], D), validate_args=validate
            )
            pyro.sample("x", pixels.to_event(1), obs=x.sigmoid())

    return m, guide


def no_plate() -> tuple[Callable, Callable]:
    def m(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, torch.ones(N, H)).to_event(2))
        pyro.sample("x", dist.Normal(z.sum(-1, True), torch.ones(D)).to_event(2), obs=x)

    def g(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(x[:, :H], 0.8).to_event(2))

    return m, g


def only_a_sequential_plate() -> tuple[Callable, Callable]:
    def m(x: Tensor) -> None:
        for n in pyro.plate("data", N):
            z = pyro.sample(f"z_{n}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{n}", dist.Normal(z, 1.0), obs=x[n, 0])

    def g(x: Tensor) -> None:
        for n in pyro.plate("data", N):
            pyro.sample(f"z_{n}", dist.Normal(x[n, 0], 1.0))

    return m, g


def coupled() -> tuple[Callable, Callable]:
    def m(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(H)).to_event(1))
            loc = (z - z.mean(0)).sum(-1, True)
            pyro.sample("x", dist.Normal(loc, torch.ones(D)).to_event(1), obs=x)

    return m, guide


def coupled_by(shift: Callable[[Tensor, Tensor], Tensor]) -> tuple[Callable, Callable]:
    """The rows meet in a shift that is made of all data, or of latents where a mask hides some."""

    def m(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(H)).to_event(1))
            loc = z.sum(-1, True) + shift(x, z)
            seen = torch.arange(N) > 0  # the first row shows nothing
            fn = dist.Normal(loc, torch.ones(D)).to_event(1)
            pyro.sample("x", fn.mask(seen), obs=x)

    return m, guide


def writes_to_the_data() -> tuple[Callable, Callable]:
    return lambda x: model(x.clamp_(-1.0, 1.0)), guide


def longer_plate() -> tuple[Callable, Callable]:
    def g(x: Tensor) -> None:
        with pyro.plate("data", len(x) + 1):
            pyro.sample("z", dist.Normal(x[:, :H], 0.8).to_event(1))

    return model, g


def forgotten_to_event_in_a_plate() -> tuple[Callable, Callable]:
    def m(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", 4, dim=-1):
                loc = z[..., None].expand(*z.shape[:-1], 4, D)
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x[:, None].expand(N, 4, D))

    def g(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x[:, :1], 0.8))

    return m, g


def vector_to_be_summed() -> tuple[Callable, Callable]:
    fn = dist.Bernoulli(torch.full((2,), 0.4)).to_event(1)

    def also(_: Tensor) -> None:
        pyro.sample("bits", fn, infer={"enumerate": "parallel"})

    return partial(model, also=also), guide


def observed_in_guide() -> tuple[Callable, Callable]:
    def also(x: Tensor) -> None:
        pyro.sample("again", dist.Normal(0.0, 1.0), obs=x[:, 0])

    return model, partial(guide, also=also)


def sampled_in_guide() -> tuple[Callable, Callable]:
    def also(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(0.0, torch.ones(D)).to_event(1))

    return model, partial(guide, also=also)


def latent_observed_in_guide() -> tuple[Callable, Callable]:
    def g(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, torch.ones(H)).to_event(1), obs=x[:, :H])

    return model, g


def other_size() -> tuple[Callable, Callable]:
    def g(x: Tensor) -> None:
        with pyro.plate("data", N, dim=-2):
            pyro.sample("z", dist.Normal(x[:, None, :H], 0.8).to_event(1))

    return model, g


def module_in_training(module: nn.Module) -> tuple[Callable, Callable]:
    def m(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(H)).to_event(1))
            loc = module(z).sum(-1, True)
            pyro.sample("x", dist.Normal(loc, torch.ones(D)).to_event(1), obs=x)

    return m, guide


ROWS = {"subsample_size": 2}
REFUSED: dict[str, tuple[Callable[[], tuple[Callable, Callable]], str]] = {
    "latent outside": (latent_outside, "latent site 'global' is outside the batch plate 'data'"),
    "observed outside": (observed_outside, "observed site 'total' is outside the batch plate"),
    "missing in guide": (missing_in_guide, "latent site 'forgotten' is missing from the guide"),
    "guide only": (guide_only, "the guide samples site 'surplus', which the model does not have"),
    "Delta": (delta, "the guide's site 'z' is a Delta"),
    "AutoDelta": (lambda: (model, guides.AutoDelta(model)), "the guide's site 'z' is a Delta"),
    "Delta of subsampled rows": (delta_beside_autonormal, "the guide's site 'b' is a Delta"),
    "unequal scales": (unequal_scales, r"sites 'z' and 'x' have different scales \(0.5 and 1\)"),
    "scale of each datum": (scale_per_datum, "site 'z' has for its data different scales"),
    "undeclared dim": (undeclared_dim, "site 'x' has log-probabilities of shape .* in no plate"),
    "forgotten to_event": (
        forgotten_to_event_on_a_square,
        r"site 'x' has log-probabilities of shape \(5, 5\), whose dim -2 is in no plate",
    ),
    "noise in the model": (noise_in_the_model, "the model is not deterministic given its latents"),
    "noise in the guide": (noise_in_the_guide, "the guide is not deterministic given its latents"),
    "shared value": (
        shared_in_a_sizeless_plate,
        "site 'z' has one value for the whole batch of 5",
    ),
    "two plates": (two_names, "site '[xz]' is outside the batch plate"),
    "subsampled under two names": (
        lambda: subsampled("data", "rows", ROWS, ROWS),
        "the model subsamples plate 'data' and the guide plate 'rows'",
    ),
    "grey pixels": (lambda: grey(None), "the data at site 'x' lie outside the support.*binarise"),
    "grey, unvalidated": (lambda: grey(False), "the data at site 'x' lie outside the support"),
    "no plate": (no_plate, "no site of the model is in a vectorised pyro.plate.*site 'z'"),
    "sequential plate": (only_a_sequential_plate, "'for i in pyro.plate' cannot hold a batch"),
    "coupled data": (coupled, "the model's site 'x' depends on the latents of other data"),
    "a mean of all data": (
        lambda: coupled_by(lambda x, _: x.mean()),
        "the model's site 'x' depends on the observed data of others",
    ),
    "the first datum as a baseline": (
        lambda: coupled_by(lambda x, _: x[:1, :1]),
        "the model's site 'x' depends on the observed data of others",
    ),
    "data of the row before the last": (
        lambda: coupled_by(lambda x, _: x[:, :1].roll(2, 0)),
        "the model's site 'x' depends on the observed data of others",
    ),
    "data of four rows further": (
        lambda: coupled_by(lambda x, _: x[:, :1].roll(-4, 0)),
        "the model's site 'x' depends on the observed data of others",
    ),
    "latents of the row before": (
        lambda: coupled_by(lambda _, z: z[..., :1].roll(1, -2)),
        "the model's site 'x' depends on the latents of other data",
    ),
    "data changed in place": (writes_to_the_data, "writes to argument 1 in place"),
    "plate of another size": (longer_plate, r"inside plate\('data'\) at site z .*number of data"),
    "forgotten to_event in a plate": (
        forgotten_to_event_in_a_plate,
        r"site '?x'? .*\.to_event\(1\)",
    ),
    "vector to be summed out": (
        vector_to_be_summed,
        "the model's site 'bits' is marked for enumeration, but .* lists no states",
    ),
    "observed in guide": (observed_in_guide, "the guide's site 'again' is observed"),
    "data sampled in guide": (sampled_in_guide, "site 'x' is observed in the model"),
    "latent observed in guide": (latent_observed_in_guide, "the guide's site 'z' is observed"),
    "another dim": (other_size, "batch plate is at dim -1, where the guide has no plate"),
    "BatchNorm": (
        lambda: module_in_training(nn.BatchNorm1d(H)),
        "BatchNorm1d in training mode couples the data",
    ),
    "BatchNorm without statistics": (
        lambda: module_in_training(nn.BatchNorm1d(H, track_running_stats=False).eval()),
        "BatchNorm1d without running statistics couples the data",
    ),
    "Dropout": (
        lambda: module_in_training(nn.Dropout(0.1)),
        "Dropout in training mode makes the program random",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_a_sentence_that_names_the_site(name: str) -> None:
    make, sentence = REFUSED[name]
    with pytest.raises(ProgramError, match=sentence):
        weigh(make())


def test_accepts_the_pair_that_the_refused_ones_vary() -> None:
    assert weigh((model, guide)).shape == (K, N)
    for pair in (
        subsampled("data", "data", ROWS, ROWS),
        module_in_training(nn.BatchNorm1d(H).eval()),
        module_in_training(nn.Dropout(0.0)),
        coupled_by(lambda x, _: x[..., :1]),  # each row's own
        (poutine.scale(model, scale=0.1), poutine.scale(guide, scale=0.1)),
    ):
        assert len(weigh(pair)) == K


def test_joint_weights_take_global_latents_and_coupled_data_but_no_subsample() -> None:
    for make in (latent_outside, no_plate, coupled, two_names):
        assert weigh(make(), joint=True).shape == (K, 1)
    with pytest.raises(ProgramError, match="joint log weights need the full data, but site 'z'"):
        weigh(subsampled("data", "data", ROWS, ROWS), joint=True)


def test_masked_data_may_lie_off_the_support() -> None:
    x, seen = torch.tensor([0.0, 0.5, 1.0, 1.0, 0.0]), torch.tensor([1, 0, 1, 1, 0]).bool()

    def by_poutine(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Bernoulli(logits=z, validate_args=False), obs=x)

    def by_distribution(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            bits = dist.Bernoulli(logits=z, validate_args=False).mask(seen)
            pyro.sample("x", bits, obs=x)

    def normal(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    off = 1 - x  # the third is no more masked, and no bit
    off[2] = 0.3
    for masked in (by_poutine, by_distribution):
        assert inspect_programs(masked, normal, ((x,), {})).measure == "binary"
        with pytest.raises(ProgramError, match="site 'x' lie outside the support"):
            inspect_programs(masked, normal, ((off,), {}))


def test_missing_data_need_a_mask() -> None:
    x = torch.randn(N, D)
    x[1, 2] = torch.nan

    def m(x: Tensor, mask: Callable[[Tensor], Any]) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(H)).to_event(1))
            features = dist.Normal(z.sum(-1, True), torch.ones(D), validate_args=False)
            pyro.sample("x", features.mask(mask(x)).to_event(1), obs=x)

    for mask in (torch.isfinite, lambda x: False):
        assert weigh((partial(m, mask=mask), guide), x=x).isfinite().all()
    with pytest.raises(ProgramError, match=r"site 'x' observes 1 values that are not finite"):
        weigh((partial(m, mask=lambda x: x != 0), guide), x=x)


@pytest.mark.parametrize(
    ("likelihood", "x", "measure"),
    [
        (lambda z: dist.Bernoulli(logits=z), torch.tensor([0.0, 1.0]), "binary"),
        (lambda z: dist.ContinuousBernoulli(logits=z), torch.tensor([0.2, 0.9]), "grey"),
        (lambda z: dist.Normal(z, 1.0), torch.tensor([0.2, -0.9]), "real"),
        (lambda z: dist.Poisson(z.exp()), torch.tensor([0.0, 4.0]), "counts"),
    ],
)
def test_finds_the_structure(likelihood: Callable, x: Tensor, measure: str) -> None:
    def m(x: Tensor) -> None:
        with pyro.plate("rows", 2, dim=-3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", likelihood(z), obs=x[:, None, None])

    def g(x: Tensor) -> None:
        with pyro.plate("rows", 2, dim=-3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    found = inspect_programs(m, g, ((x,), {}))
    assert (found.batch_dim, found.batch_size, found.max_plate_nesting) == (-3, 2, 3)
    assert (found.latents, found.observed) == (("z",), ("x",))
    assert (found.measure, found.scale) == (measure, 1.0)
    assert found.vectorizable
    assert found.replayable


def test_gives_back_the_random_numbers_it_takes() -> None:
    pyro.set_rng_seed(5)
    expected = torch.rand(4)
    pyro.set_rng_seed(5)
    inspect_programs(model, guide, ((torch.randn(N, D),), {}))
    pyro.set_rng_seed(5)
    inspect_programs(model, guide, ((torch.zeros(N, D),), {}))
    assert torch.equal(torch.rand(4), expected)


def test_parameters_that_are_first_drawn_here_owe_nothing_to_the_particles() -> None:
    """Were their random numbers given back, the first particle's noise would be the parameter."""

    def g(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.randn(len(x), H))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    x = torch.zeros(N, D)
    weights = log_weights(model, g, x, 1, seed=2)
    pyro.set_rng_seed(2)
    loc = noise = torch.randn(N, H)
    z = loc + noise
    log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_p = log_p + dist.Normal(z.sum(-1, True), torch.ones(D)).log_prob(x).sum(-1)
    tied = log_p - dist.Normal(loc, 1.0).log_prob(z).sum(-1)
    assert not torch.allclose(weights[0], tied)


# --- parameters -----------------------------------------------------------------------------------


class Loc(PyroModule):
    def __init__(self, role: str, name: str = "") -> None:
        super().__init__(name)
        self.role = role
        self.loc = PyroParam(torch.tensor(2.0 if role == "guide" else -1.0))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            if self.role == "model":
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_refuses_pyro_modules_that_share_a_name_before_pyro_mixes_them() -> None:
    x, m, g = torch.randn(N), Loc("model"), Loc("guide")
    for check in (check_module_names, lambda m, g: log_weights(m, g, x, K)):
        with pytest.raises(ProgramError, match="two PyroModules both have a parameter 'loc'"):
            check(m, g)
    assert [module.loc.item() for module in (m, g)] == [-1.0, 2.0]
    check_module_names(Loc("model", "model"), Loc("guide", "guide"))
    with torch.no_grad():
        assert len(log_weights(Loc("model", "model"), Loc("guide", "guide"), x, K)) == K


def test_refuses_parameters_that_svi_would_not_train() -> None:
    x, net = torch.randn(N, D), nn.Linear(D, H)

    def unregistered(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 0.8).to_event(1))

    def registered(x: Tensor) -> None:
        pyro.module("net", net)
        unregistered(x)

    arguments: Any = ((x,), {})
    with pytest.raises(ProgramError, match="neither model nor guide has a parameter"):
        check_parameters(model, guide, arguments, enumerates=False)

    def partly(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), scale.exp()).to_event(1))

    with pytest.raises(ProgramError, match=r"never registered.*weight \(2, 3\)"):
        check_parameters(model, partly, arguments, enumerates=False)
    with pytest.raises(ProgramError, match="latent site 'forgotten' is missing"):
        check_parameters(missing_in_guide()[0], registered, arguments, enumerates=False)
    assert check_parameters(model, registered, arguments, enumerates=False)
    before = net.weight.detach().clone()
    SVI(model, registered, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(x)
    assert not torch.equal(net.weight, before)  # what the check let pass is trained


def test_a_support_whose_bounds_are_tensors_has_a_measure():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Uniform(z - 9, z + 9), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 0.1))

    assert inspect_programs(model, guide, ((torch.randn(4),), {})).measure == "real"


def test_particles_that_a_program_mixes_are_found_whatever_the_seed():
    """The mean broadcasts wrongly, and the better particle hides it in the sum of densities."""
    inputs = torch.linspace(-1, 1, 7 * 3).reshape(7, 3)
    y = 5 * inputs.sum(-1)

    def model(inputs, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 3.0).to_event(1))
        with pyro.plate("data", len(y)):
            mean = (inputs * weight.unsqueeze(-2)).sum(-1)
            pyro.sample("y", dist.Normal(mean, 0.1), obs=y)

    def guide(inputs, y):
        pyro.sample("weight", dist.Normal(torch.zeros(3), 3.0).to_event(1))

    for seed in range(30):
        pyro.set_rng_seed(seed)
        found = inspect_programs(model, guide, ((inputs, y), {}), joint=True, num_particles=2)
        assert not found.vectorizable


@pytest.mark.parametrize("read", [slice(None, 4), slice(-4, None)], ids=["first", "last"])
@pytest.mark.parametrize("shown", ["even", "odd", "front", "back"])
def test_a_mask_does_not_hide_that_particles_are_read_for_one_another(
    shown: str, read: slice
) -> None:
    """Right for one particle: every particle takes the latents of the first, or of the last."""
    number = torch.arange(4)
    mask = {"even": number % 2 == 0, "odd": number % 2 == 1, "front": number < 2}
    mask["back"] = ~mask["front"]

    def blind(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=mask[shown]):
                pyro.sample("x", dist.Normal(z.reshape(-1)[read], 1.0), obs=x)

    def free(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    x = torch.tensor([0.3, -1.2, 2.0, 0.4])
    assert not inspect_programs(blind, free, ((x,), {})).vectorizable


def test_latents_of_data_an_even_number_of_rows_away_are_seen() -> None:
    """Halves of the data are exchanged as well as every second one."""

    def coupled(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(len(x))))
            pyro.sample("x", dist.Normal(z.roll(2, -1), 1.0), obs=x)

    def free(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ProgramError, match="'x' depends on the latents of other data"):
        inspect_programs(coupled, free, ((torch.randn(6),), {}))
