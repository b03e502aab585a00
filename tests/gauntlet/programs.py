"""Random pairs of Pyro programs: a description of each, its source text, and the programs made.

A `Pair` says what the densities are (sites, expressions, plates, masks); `oracles.py` reads that
and nothing else. `Pair.build` writes the source of model and guide, and runs it as a user's file.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn


class Family(NamedTuple):
    """How a distribution is written; r, p, q, u: a real, positive, concentration, unit argument."""

    source: str
    arguments: str
    event: int  # length of its vectors, 0 for scalars
    support: str


FAMILIES = {
    "normal": Family("dist.Normal({0}, {1})", "rp", 0, "real"),
    "affine": Family(
        "dist.TransformedDistribution(dist.Normal(0.0, 1.0), [T.AffineTransform({0}, {1})])",
        *("rp", 0, "real"),
    ),
    "normals": Family("dist.Normal(vec({0}, {1}), 0.8).to_event(1)", "rr", 2, "reals"),
    "mvn": Family("dist.MultivariateNormal(vec({0}, {1}), scale_tril=TRIL)", "rr", 2, "reals"),
    "lognormal": Family("dist.LogNormal({0}, {1})", "rp", 0, "positive"),
    "expnormal": Family(
        "dist.TransformedDistribution(dist.Normal({0}, {1}), [T.ExpTransform()])",
        *("rp", 0, "positive"),
    ),
    "gamma": Family("dist.Gamma({0}, {1})", "qp", 0, "positive"),
    "logitnormal": Family(
        "dist.TransformedDistribution(dist.Normal({0}, {1}), [T.SigmoidTransform()])",
        *("rp", 0, "unit"),
    ),
    "beta": Family("dist.Beta({0}, {1})", "qq", 0, "unit"),
    "bernoulli": Family("dist.Bernoulli(logits={0})", "r", 0, "bit"),
    "bits": Family("dist.Bernoulli(logits=vec({0}, {1})).to_event(1)", "rr", 2, "bits"),
    "categorical": Family("dist.Categorical(logits=vec({0}, {1}, {2}))", "rrr", 0, "three"),
    "onehot": Family("dist.OneHotCategorical(logits=vec({0}, {1}, {2}))", "rrr", 3, "onehot"),
    "binomial": Family("dist.Binomial(2, logits={0})", "r", 0, "upto2"),
    "successes": Family("dist.Binomial(3, probs={0})", "u", 0, "upto3"),
    "poisson": Family("dist.Poisson({0})", "p", 0, "count"),
    "zeros": Family("dist.ZeroInflatedPoisson({0}, gate=torch.tensor(0.3))", "p", 0, "count"),
    "negative": Family("dist.NegativeBinomial(3.0, logits={0})", "r", 0, "count"),
    "student": Family("dist.StudentT(4.0, {0}, {1})", "rp", 0, "real"),
    "exponential": Family("dist.Exponential({0})", "p", 0, "positive"),
    "mixture": Family(
        "dist.MixtureSameFamily(dist.Categorical(logits=vec({0}, {1})),"
        " dist.Normal(vec(-1.0, 1.5) + 0.0 * vec({0}, {1}), 0.8))",
        *("rr", 0, "real"),
    ),
}
CONTINUOUS = ("normal", "affine", "normals", "mvn", "lognormal", "expnormal", "gamma")
CONTINUOUS = (*CONTINUOUS, "logitnormal", "beta")
DISCRETE = {"bernoulli": 2, "bits": 4, "categorical": 3, "onehot": 3, "binomial": 3}
OBSERVED = tuple(name for name in FAMILIES if name not in ("affine", "onehot", "bits"))
TRIL = ((0.9, 0.0), (0.4, 0.7))
TABLE = (-0.6, 0.3, 0.9)


@dataclass(frozen=True)
class Site:
    """One site of a program. Its expressions speak of one datum and one cell of its plates."""

    name: str
    kind: str  # latent, observed, deterministic, factor
    family: str
    arguments: tuple[str, ...]
    plates: tuple[str, ...] = ()
    enumerated: bool = False
    mask: str = ""  # "", handler or distribution

    @property
    def event(self) -> int:
        return FAMILIES[self.family].event if self.family else 0


@dataclass(frozen=True)
class Pair:
    """A description of a model and a guide, and the data."""

    seed: int
    sites: tuple[Site, ...]
    guide: tuple[Site, ...] | str  # or the name of an autoguide
    plates: dict[str, int]  # the inner ones and their sizes
    dims: dict[str, int]  # of every plate, "data" among them
    data: dict[str, Tensor]  # [batch, cells of the plates, event]
    parameters: dict[str, Tensor]  # one for each datum
    num_data: int
    style: dict[str, Any]  # how the source is written; no density depends on it
    joint: tuple[str, ...] = ()  # latents outside the data plate
    rows: tuple[int, ...] | int | None = None  # a subsample, or the size of a random one
    scale: float = 1.0
    fault: str = ""
    masked: tuple[str, ...] = field(default=())  # plates of the mask

    @property
    def latents(self) -> list[Site]:
        return [s for s in self.sites if s.kind == "latent"]

    @property
    def drawn(self) -> list[Site]:
        return [s for s in self.latents if not s.enumerated]

    @property
    def depth(self) -> int:
        """Dims that the plates of its sites take."""
        used = {"data", *(p for s in self.sites for p in s.plates)}
        return max(-self.dims[p] for p in used)

    def cells(self, site: Site) -> list[tuple[int, ...]]:
        return list(itertools.product(*(range(self.plates[p]) for p in site.plates)))

    def build(self, repeats: int = 1) -> "Built":
        """The programs, of `repeats` copies of each datum one after another."""
        return Built(self, repeats)


# --- source text ----------------------------------------------------------------------------------


def place(x: Tensor, dims: tuple[int, ...], events: int = 0) -> Tensor:
    """Moves the leading axes of data to the dims of their plates."""
    order = sorted(range(len(dims)), key=lambda axis: dims[axis])
    shape = [1] * max(-dim for dim in dims)
    for axis, dim in enumerate(dims):
        shape[dim] = x.shape[axis]
    rest = range(len(dims), x.dim())
    assert len(rest) == events
    return x.permute(*order, *rest).reshape(*shape, *x.shape[len(dims) :])


def vec(*parts: Any) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, parts)), -1)


def summary(x: Tensor) -> Tensor:
    return torch.tanh(x.to(torch.get_default_dtype()).reshape(len(x), -1).mean(1))


class Net(nn.Module):
    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value.detach().clone()))


def _pyro_module(name: str, values: dict[str, Tensor], program: Any) -> PyroModule:
    class Program(PyroModule):
        def __init__(self) -> None:
            super().__init__(name)
            for key, value in values.items():
                setattr(self, key, PyroParam(value.detach().clone()))

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return program(self, *args, **kwargs)

    return Program()


class _Source:
    """Writes one of the two programs."""

    def __init__(self, pair: Pair, role: str) -> None:
        self.pair, self.role = pair, role
        self.fault = pair.fault
        self.lines: list[str] = []
        self.depth = 1

    def line(self, text: str, *more: str) -> None:
        self.lines += ["    " * self.depth + one for one in (text, *more)]

    def write(self) -> str:
        pair, role = self.pair, self.role
        form = pair.style["form"]
        names = [n for n in pair.parameters if n[0] == ("a" if role == "model" else "b")]
        own = "self, " if form == "pyromodule" else ""
        head = f"def {role}({own}{', '.join(pair.data)}):"
        if form == "module":
            self.line(f"pyro.module('{role}_net', {role}_net)")
        for name in names:
            value = {
                "param": f"pyro.param('{name}', init['{name}'])",
                "module": f"{role}_net.{name}",
                "pyromodule": f"self.{name}",
            }[form]
            self.line(f"{name} = {value}")
        self._plates()
        sites = pair.sites if role == "model" else pair.guide
        for site in sites:
            if site.name in pair.joint:
                self._site(site)
        outer = self.depth
        if self.fault == "no_plate":
            self.line("rows = None")
        else:
            self.line("with data as rows:")
            self.depth += 1
        self._inputs(names)
        self._faults_inside()
        for site in sites:
            if site.name not in pair.joint:
                self._block(site)
        if len(self.lines) and self.lines[-1].endswith(":"):
            self.line("pass")
        self.depth = outer
        return "\n".join([head, *self.lines]) + "\n"

    def _plates(self) -> None:
        pair = self.pair
        first = next(iter(pair.data))
        size = f"len({first})" if pair.rows is None else str(pair.num_data)
        if self.fault == f"plate_size_{self.role}":
            size += " + 1"
        dim = f", dim={pair.dims['data']}" if pair.plates or pair.style["dim"] else ""
        rows = ""
        if isinstance(pair.rows, int):
            rows = f", subsample_size={pair.rows}"
        elif pair.rows is not None:
            rows = f", subsample=torch.tensor({list(pair.rows)})"
        self.line(f"data = pyro.plate('data', {size}{rows}{dim})")
        for name, inner in pair.plates.items():
            if name not in pair.style["sequential"]:
                self.line(f"{name} = pyro.plate('{name}', {inner}, dim={pair.dims[name]})")
        if self.fault == "in_place":
            self.line("c.clamp_(-0.2, 0.2)")
        if self.fault == "in_place_adds":
            self.line("c.add_(0.1)")
        if self.fault == "global" or (self.fault == "global_model" and self.role == "model"):
            self.line("w = pyro.sample('w', dist.Normal(0.0, 1.0))")

    def _inputs(self, names: list[str]) -> None:
        """Lays data and parameters out along the dims of their plates, and takes the rows."""
        pair, at = self.pair, self.pair.dims["data"]
        if self.role == "guide":
            source = next(s.name for s in pair.sites if s.kind == "observed")
            self.line(f"s = place(summary({source}), ({at},))")
        if self.fault in ("data_mean", "data_sorted") and self.role == "model":
            source = next(s.name for s in pair.sites if s.kind == "observed")
            whole = "{0}.mean()" if self.fault == "data_mean" else "place({0}.cumsum(0), ({1},))"
            self.line(f"s = {whole.format(f'summary({source})', at)}")
        for name in pair.data:
            plates, events = layout_of(pair, name)
            dims = tuple(pair.dims[p] for p in ("data", *plates))
            self.line(f"{name} = place({name}, {dims}{f', {events}' if events else ''})")
        if pair.rows is not None:
            chosen = [*pair.data, *names, *(["s"] if self.role == "guide" else [])]
            for name in chosen:
                events = layout_of(pair, name)[1] if name in pair.data else 0
                self.line(f"{name} = {name}.index_select({at - events}, rows)")
            if self.role == "model":
                self.line("keep('rows', rows)")

    def _faults_inside(self) -> None:
        at = self.pair.dims["data"]
        if self.fault == f"random_{self.role}":
            self.line("s = torch.rand(())" if self.role == "model" else "s = s + torch.rand(())")
        if self.fault == "extra" and self.role == "guide":
            self.line("pyro.sample('extra', dist.Normal(0.0, 1.0))")
        if self.fault == "guide_observes" and self.role == "guide":
            self.line(f"pyro.sample('seen', dist.Normal(0.0, 1.0), obs=0.0 * c + {at}.0)")

    def _block(self, site: Site) -> None:
        if self.fault == "missing" and self.role == "guide" and site is self.pair.guide[-1]:
            return
        if any(p in self.pair.style["sequential"] for p in site.plates):
            (plate,) = site.plates
            self.line(f"for step in pyro.plate('{plate}', {self.pair.plates[plate]}):")
            self.depth += 1
            self._site(site, step=True)
            self.depth -= 1
            return
        around = [*site.plates]
        if site.mask == "handler":
            around.append("poutine.mask(mask=m)")
        if self.fault == "scale" and self.role == "model" and site.kind == "latent":
            around.append("poutine.scale(scale=0.5)")
        if around:
            self.line(f"with {', '.join(around)}:")
            self.depth += 1
        self._site(site)
        self.depth -= bool(around)

    def _site(self, site: Site, *, step: bool = False) -> None:
        name, arguments = site.name, list(site.arguments)
        if site.kind == "deterministic":
            self.line(f"{name} = pyro.deterministic('{name}', {arguments[0]})")
            return
        if site.kind == "factor":
            self.line(f"pyro.factor('{name}', {arguments[0]})")
            return
        observed = site.kind == "observed"
        fn = FAMILIES[site.family].source.format(*arguments)
        if observed and self.fault == "to_event":
            fn = fn.replace(".to_event(1)", "")
        if self.fault == "delta" and self.role == "guide":
            fn = "dist.Delta(0.3 + 0.0 * s)"
        if self.fault == "guide_obs" and self.role == "guide":
            self.line(f"pyro.sample('{name}', {fn}, obs=0.5 + 0.0 * s)")
            return
        if site.mask == "distribution":
            fn += ".mask(m)"
        infer = ", infer={'enumerate': 'parallel'}" if site.enumerated else ""
        if step:
            at = self.pair.dims[site.plates[0]] - (site.event > 0)
            value = f"{name}.select({at}, step).unsqueeze({at})"
            self.line(f"pyro.sample(f'{name}_{{step}}', {fn}, obs={value})")
        elif observed:
            self.line(f"pyro.sample('{name}', {fn}, obs={name})")
        elif self.role == "model" and not site.enumerated:
            self.line(f"{name} = keep('{name}', pyro.sample('{name}', {fn}))")
        else:
            self.line(f"{name} = pyro.sample('{name}', {fn}{infer})")
        reshaped = self.pair.style["one_particle"]
        if reshaped and self.role == "model" and not (observed or site.event or site.enumerated):
            self.line(f"{name} = {reshaped.format(name)}")


def layout_of(pair: Pair, name: str) -> tuple[tuple[str, ...], int]:
    """The inner plates that a data argument runs along, and its event dims."""
    if name == "c":
        return (), 0
    if name == "m":
        return pair.masked, 0
    site = next(s for s in pair.sites if s.name == name)
    return site.plates, int(site.event > 0)


# --- programs -------------------------------------------------------------------------------------


class Built:
    """Programs made of a pair, with their arguments, and the latents that the model last saw."""

    def __init__(self, pair: Pair, repeats: int) -> None:
        self.pair, self.repeats = pair, repeats
        self.kept: dict[str, list[Tensor]] = {}
        at = pair.dims["data"]
        self.init = {
            name: place(value.repeat(repeats), (at,)).clone()
            for name, value in pair.parameters.items()
        }
        data = {k: v.repeat(repeats, *[1] * (v.dim() - 1)) for k, v in pair.data.items()}
        form = pair.style["arguments"]
        alone = form == "alone" and len(data) == 1
        self.x: Any = next(iter(data.values())) if alone else tuple(data.values())
        if form == "keywords":
            self.x = dict(data)
        space = self._namespace()
        self.source = {"model": _Source(pair, "model").write()}
        exec(self.source["model"], space)
        self.modules: dict[str, nn.Module] = {}
        self.model = self._program("model", space)
        if isinstance(pair.guide, str):
            kinds = {"AutoNormal": AutoNormal, "AutoDelta": AutoDelta}
            kinds |= {"AutoDiagonalNormal": AutoDiagonalNormal}
            kinds |= {"AutoMultivariateNormal": AutoMultivariateNormal}
            hidden = [s.name for s in pair.latents if s.enumerated]
            shown = poutine.block(self.model, hide=hidden) if hidden else self.model
            self.guide = kinds[pair.guide](shown)
            self.source["guide"] = f"guide = {pair.guide}(model without {hidden})\n"
        else:
            self.source["guide"] = _Source(pair, "guide").write()
            exec(self.source["guide"], space)
            self.guide = self._program("guide", space)
        if pair.scale != 1.0:
            self.model = poutine.scale(self.model, scale=pair.scale)
            self.guide = poutine.scale(self.guide, scale=pair.scale)

    def _namespace(self) -> dict[str, Any]:
        nets = {
            f"{role}_net": Net({n: v for n, v in self.init.items() if n[0] == letter})
            for role, letter in (("model", "a"), ("guide", "b"))
            if self.pair.style["form"] == "module"
        }
        self.nets = nets
        return {
            **{"pyro": pyro, "dist": dist, "T": T, "torch": torch, "poutine": poutine},
            **{"vec": vec, "place": place, "summary": summary, "keep": self._keep},
            **{"TABLE": torch.tensor(TABLE), "TRIL": torch.tensor(TRIL), "init": self.init},
            **nets,
        }

    def _program(self, role: str, space: dict[str, Any]) -> Any:
        if self.pair.style["form"] != "pyromodule":
            return space[role]
        own = {n: v for n, v in self.init.items() if n[0] == ("a" if role == "model" else "b")}
        self.modules[role] = _pyro_module(f"{role}_program", own, space[role])
        return self.modules[role]

    def _keep(self, name: str, value: Tensor) -> Tensor:
        self.kept.setdefault(name, []).append(value.detach().clone())
        return value

    @property
    def arguments(self) -> tuple[tuple, dict]:
        if isinstance(self.x, dict):
            return (), self.x
        return (self.x if isinstance(self.x, tuple) else (self.x,)), {}

    def leaves(self) -> dict[str, Tensor]:
        """The unconstrained parameters, once the programs have run."""
        if self.pair.style["form"] == "param":
            named = dict(pyro.get_param_store().named_parameters())
            return {name: named[name] for name in self.init if name in named}
        holders = {"a": "model", "b": "guide"}
        if self.pair.style["form"] == "module":
            return {n: getattr(self.nets[f"{holders[n[0]]}_net"], n) for n in self.init}
        return {
            n: getattr(self.modules[holders[n[0]]], f"{n}_unconstrained")
            for n in self.init
            if holders[n[0]] in self.modules
        }

    def describe(self) -> str:
        pair = self.pair
        shapes = {name: tuple(value.shape) for name, value in pair.data.items()}
        return (
            f"seed {pair.seed}, fault {pair.fault or 'none'}, joint {pair.joint}, scale "
            f"{pair.scale}, arguments {pair.style['arguments']} {shapes}\n"
            f"{self.source['model']}{self.source['guide']}"
        )
