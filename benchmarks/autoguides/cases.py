"""Models whose posterior, evidence and predictions are known, and Pyro's autoguides for them."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import ELBO, TraceEnum_ELBO, autoguide
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor
from torch import distributions as torch_dist

from pyro_vae.inference.programs import Program

X = torch.tensor([-1.0, 0.3, 1.2, 0.5], dtype=torch.float64)
KEPT = torch.tensor([True, True, False, True])
NOISE = 2.0
SHARE = torch.tensor(0.7, dtype=torch.float64)  # of the second kind
STAY = torch.tensor([0.2, 0.9], dtype=torch.float64)  # chance of the second state after each


class Truth(NamedTuple):
    """What is known of a model and its data.

    Attributes:
        mean: Of the posterior of the latent, `[]` or `[datum]`.
        scale: Its standard deviation.
        log_evidence: Of all data, or `[datum]`.
        left_out: Log density of each datum given the others, `[datum]`.
        tail: Two-sided tail area of the mean of data drawn anew, of the first site.
    """

    mean: Tensor
    scale: Tensor
    log_evidence: Tensor
    left_out: Tensor
    tail: float


def _log_evidence(seen: Tensor) -> Tensor:
    """Of normal data with scale `NOISE` about one standard normal location."""
    n = len(seen)
    covariance = NOISE**2 * torch.eye(n) + torch.ones(n, n)
    return torch_dist.MultivariateNormal(torch.zeros(n), covariance).log_prob(seen)


def _tail(mean: Tensor, variance: Tensor, compared: Tensor = X) -> float:
    """Of the mean of some data below a normal distribution."""
    below = float(torch_dist.Normal(mean, variance.sqrt()).cdf(compared.mean()))
    return 2 * min(below, 1 - below)


def about_one(data: Sequence[Tensor], also: Tensor | float = 0.0, compared: Tensor = X) -> Truth:
    """One location for all data.

    Args:
        data: What is seen of each datum: one number, none, or several.
        also: Log density of what each datum has beside it, `[datum]`.
        compared: The data of whose mean the tail area is.
    """
    seen = torch.cat(list(data))
    precision = 1 + len(seen) / torch.tensor(NOISE**2)
    mean = seen.sum() / NOISE**2 / precision
    evidence = _log_evidence(seen) if len(seen) else torch.tensor(0.0)
    others = [torch.cat([*data[:n], *data[n + 1 :]]) for n in range(len(data))]
    also = torch.as_tensor(also).expand(len(data))
    return Truth(
        mean,
        precision.rsqrt(),
        evidence + also.sum(),
        torch.stack([evidence - _log_evidence(rest) for rest in others]) + also,
        _tail(mean, 1 / precision + NOISE**2 / len(compared), compared),
    )


def about_each() -> Truth:
    """A location for each datum."""
    precision = 1 + 1 / torch.tensor(NOISE**2)
    mean = X / NOISE**2 / precision
    evidence = torch_dist.Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(X)
    tail = _tail(mean.mean(), (1 / precision + NOISE**2) / len(X))
    return Truth(mean, precision.rsqrt().expand(len(X)), evidence, evidence, tail)


def of_kinds() -> Truth:
    """Each datum from one of two normals, see `of_each_kind`; latents are counted through."""
    kinds = torch.tensor([0.0, 1.0])
    joint = torch_dist.Bernoulli(SHARE).log_prob(kinds) + torch_dist.Normal(
        2 * kinds - 1, 1.0
    ).log_prob(X[:, None])
    evidence = joint.logsumexp(-1)
    share = (joint[:, 1] - evidence).exp()
    below = 0.0
    for kept in itertools.product((0.0, 1.0), repeat=len(X)):
        kind = torch.tensor(kept)
        weight = torch_dist.Bernoulli(share).log_prob(kind).sum().exp()
        replicated = torch_dist.Normal((2 * kind - 1).mean(), math.sqrt(1 / len(X)))
        below += float(weight * replicated.cdf(X.mean()))
    scale = (share * (1 - share)).sqrt()
    return Truth(share, scale, evidence, evidence, 2 * min(below, 1 - below))


def _log_kinds() -> Tensor:
    """Log density of what is seen of each kind, with the kind's share, `[datum]`."""
    kinds = torch.tensor([0.0, 1.0])
    log_prior = torch_dist.Bernoulli(SHARE).log_prob(kinds)
    return (log_prior + torch_dist.Normal(2 * kinds - 1, 1.0).log_prob(X[:, None])).logsumexp(-1)


def _log_states() -> Tensor:
    """Log density of what is seen of a chain of states, by counting every path through."""
    paths = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(X))))
    before = torch.cat([torch.zeros(len(paths), 1), paths[:, :-1]], -1)
    log_prior = torch_dist.Bernoulli(STAY[before.long()]).log_prob(paths)
    log_seen = torch_dist.Normal(2 * paths - 1, 1.0).log_prob(X)
    return (log_prior + log_seen).sum(-1).logsumexp(0)


class Case(NamedTuple):
    """A row: programs, and what is known of them.

    Attributes:
        model: The generative program.
        guide: Makes the guide of a model.
        truth: What is known.
        joint: What `joint` is given as.
        latent: The site of the latent.
        loss: What `fit` is given; None for its default.
        exact: Whether the guide can be set to the posterior.
    """

    model: Program
    guide: Callable[[Program], Any]
    truth: Truth
    joint: bool | None = None
    latent: str = "z"
    loss: ELBO | None = None
    exact: bool = True


# --- programs -------------------------------------------------------------------------------------


def of_all(x: Tensor) -> None:
    """One location for all data."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def of_each(x: Tensor) -> None:
    """A location for each datum."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


class Module(PyroModule):
    """The first as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.z = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, x: Tensor) -> None:
        """Draws the location and observes the data."""
        z = self.z
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def under_mask(x: Tensor) -> None:
    """The third datum is masked by a handler."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), poutine.mask(mask=KEPT):
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def with_mask(x: Tensor) -> None:
    """The third datum is masked in its distribution."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, NOISE).mask(KEPT), obs=x)


def twice(x: Tensor) -> None:
    """Two observed sites."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)
        pyro.sample("y", dist.Normal(z, NOISE), obs=x + 1)


def one_after_another(x: Tensor) -> None:
    """The data in a loop that forgets what is further back."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    for n in pyro.markov(range(len(x))):
        pyro.sample(f"x_{n}", dist.Normal(z, NOISE), obs=x[n])


def of_exponential(x: Tensor) -> None:
    """The location is the logarithm of a latent."""
    z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z.log(), NOISE), obs=x)


def of_each_kind(x: Tensor) -> None:
    """Each datum from one of two normals."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(SHARE), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(2 * z - 1, 1.0), obs=x)


def beside_kinds(x: Tensor) -> None:
    """One location for all data, and a kind of each that is summed out."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)
        kind = pyro.sample("kind", dist.Bernoulli(SHARE), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(2 * kind - 1, 1.0), obs=x)


def beside_states(x: Tensor) -> None:
    """One location for all data, and a chain of states that is summed out."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    state: Any = torch.tensor(0.0)
    for n in pyro.markov(range(len(x))):
        stay = STAY[state.long()]
        state = pyro.sample(f"state_{n}", dist.Bernoulli(stay), infer={"enumerate": "parallel"})
        pyro.sample(f"x_{n}", dist.Normal(z, NOISE), obs=x[n])
        pyro.sample(f"y_{n}", dist.Normal(2 * state - 1, 1.0), obs=x[n])


# --- guides ---------------------------------------------------------------------------------------


def laplace(model: Program) -> Any:
    """The normal at the mode, which is the mean."""
    guide = autoguide.AutoLaplaceApproximation(model)
    guide(X)
    with torch.no_grad():
        guide.loc.fill_(about_one(X.split(1)).mean)
    return guide.laplace_approximation(X)


def listed(model: Program) -> Any:
    """A list of one autoguide."""
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["z"])))
    return guide


class Easy(EasyGuide):
    """One group of one site."""

    def __init__(self, model: Program) -> None:
        super().__init__(model)
        positive = dist.constraints.positive
        self.loc = PyroParam(torch.zeros(()))
        self.scale = PyroParam(torch.ones(()), constraint=positive)

    def guide(self, *_: Any) -> None:
        """Draws the group's vector."""
        group = self.group(match="z")
        group.sample("group", dist.Normal(self.loc, self.scale).expand([1]).to_event(1))


class EasyOfEach(Easy):
    """A group in the plate of its sites."""

    def __init__(self, model: Program) -> None:
        super().__init__(model)
        positive = dist.constraints.positive
        self.loc = PyroParam(torch.zeros(len(X)))
        self.scale = PyroParam(torch.ones(len(X)), constraint=positive)

    def guide(self, *_: Any) -> None:
        """Draws a vector for each datum."""
        group = self.group(match="z")
        with self.plate("data", len(X)):
            group.sample("group", dist.Normal(self.loc[:, None], self.scale[:, None]).to_event(1))


class EasyWithoutPlate(Easy):
    """A group that forgets the plate of its sites."""


AUTOGUIDES: Mapping[str, Callable[[Program], Any]] = {
    "AutoDelta": autoguide.AutoDelta,
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": partial(autoguide.AutoLowRankMultivariateNormal, rank=1),
    "AutoIAFNormal": partial(autoguide.AutoIAFNormal, hidden_dim=[4]),
    "AutoLaplaceApproximation": autoguide.AutoLaplaceApproximation,
    "AutoLaplaceApproximation, its .laplace_approximation(x)": laplace,
    "AutoGuideList": listed,
    "AutoStructured": partial(
        autoguide.AutoStructured, conditionals="normal", dependencies="linear"
    ),
    "AutoGaussian": partial(autoguide.AutoGaussian, backend="dense"),
    "AutoNormalMessenger": autoguide.AutoNormalMessenger,
    "AutoHierarchicalNormalMessenger": autoguide.AutoHierarchicalNormalMessenger,
    "AutoRegressiveMessenger": autoguide.AutoRegressiveMessenger,
    "EasyGuide": Easy,
}
OF_EACH: Mapping[str, Callable[[Program], Any]] = {
    **{
        name: AUTOGUIDES[name]
        for name in ("AutoNormal", "AutoMultivariateNormal", "AutoNormalMessenger")
    },
    "EasyGuide": EasyOfEach,
    "EasyGuide without its plate": EasyWithoutPlate,
}


def make_exact(guide: Any, truth: Truth) -> None:
    """Sets the parameters of a guide to those of the known posterior.

    Args:
        guide: One that was made by `Case.guide`.
        truth: Whose mean and standard deviation it gets.
    """
    guide(X)  # which makes the parameters
    with torch.no_grad():
        for name, value in list(guide.named_pyro_params()):
            _set(guide, name, value, truth)
        if isinstance(guide, autoguide.AutoIAFNormal):
            for p in guide.transform.parameters():
                p.zero_()
            p.copy_(torch.stack([truth.mean, truth.scale.log()]))  # the last bias: loc, log scale


def _set(guide: Any, name: str, value: Tensor, truth: Truth) -> None:
    """Sets one parameter, by what it is called; those of correlations to zero."""
    path = name.split(".")
    module = guide.get_submodule(name.rpartition(".")[0])
    known = {"loc": truth.mean, "locs": truth.mean, "scale": truth.scale, "scales": truth.scale}
    known |= {"z": truth.mean, "z_probs": truth.mean}  # a point, and shares
    known |= {
        kind: torch.zeros(value.numel()) for kind in ("cov_factor", "prec_sqrts", "white_vecs")
    }
    if name == "prec_sqrts.z":
        return  # the identity
    kind = next((part for part in path if part in known), None)
    if kind is None:
        return
    exact = known[kind].expand(value.shape) if known[kind].dim() == 0 else known[kind]
    if path[-1] in dict(module.named_parameters(recurse=False)):
        value.copy_(exact.reshape(value.shape))
    else:  # has a constraint
        setattr(module, path[-1], exact.reshape(value.shape).clone())


def cases() -> dict[str, Case]:
    """The rows."""
    one, each = about_one(X.split(1)), about_each()
    rows = {name: Case(of_all, make, one) for name, make in AUTOGUIDES.items()}
    for name, make in OF_EACH.items():
        exact = make is not EasyWithoutPlate
        rows[f"{name}, a latent of each datum"] = Case(of_each, make, each, exact=exact)
    in_all = each._replace(log_evidence=each.log_evidence.sum())
    together = Case(of_each, autoguide.AutoMultivariateNormal, in_all, joint=True)
    rows["AutoMultivariateNormal, a latent of each datum, joint=True"] = together
    rows["AutoDiscreteParallel"] = Case(of_each_kind, autoguide.AutoDiscreteParallel, of_kinds())
    normal = AUTOGUIDES["AutoNormal"]
    masked = about_one([X[:1], X[1:2], X[:0], X[3:]])
    both = about_one(list(torch.stack([X, X + 1], -1)))
    states = about_one(X.split(1), _log_states() / len(X), X[:1])
    in_turn = about_one(X.split(1), compared=X[:1])
    programs: dict[str, tuple[Program, Truth, dict[str, Any]]] = {
        "PyroModule, PyroSample": (Module(), one, {}),
        "poutine.mask": (under_mask, masked, {}),
        "Distribution.mask": (with_mask, masked, {}),
        "two observed sites": (twice, both, {}),
        "pyro.markov": (one_after_another, in_turn, {}),
        "pyro.markov, joint=True": (one_after_another, in_turn, {"joint": True}),
        "LocScaleReparam": (
            poutine.reparam(of_all, config={"z": LocScaleReparam(0.0)}),
            one,
            {"latent": "z_decentered"},
        ),
        "TransformReparam": (
            poutine.reparam(of_exponential, config={"z": TransformReparam()}),
            one,
            {"latent": "z_base"},
        ),
        "enumerated kinds": (
            beside_kinds,
            about_one(X.split(1), _log_kinds()),
            {"loss": TraceEnum_ELBO()},
        ),
        "pyro.markov, enumerated states, joint=True": (
            beside_states,
            states,
            {"joint": True, "loss": TraceEnum_ELBO(max_plate_nesting=0)},
        ),
    }
    hide = poutine.block
    return rows | {
        f"AutoNormal, {name}": Case(
            model,
            (lambda m: autoguide.AutoNormal(hide(m, hide_fn=_is_enumerated)))
            if "enumerated" in name
            else normal,
            truth,
            **options,
        )
        for name, (model, truth, options) in programs.items()
    }


def _is_enumerated(site: Mapping[str, Any]) -> bool:
    return site.get("infer", {}).get("enumerate") == "parallel"
