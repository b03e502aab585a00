r"""Guides un-amortised: the best member of a family for each datum, found by ascent on the bound.

An amortised guide computes the parameters of its distributions from x. `refit_guide` frees them:
every parameter :math:`\lambda` that the guide computes at a latent site becomes, for datum n,

.. math:: \lambda'_n = t\bigl(t^{-1}(\lambda) + \delta_n\bigr)

with t the map onto the parameter's constraint. At :math:`\delta = 0` it is the amortised guide. An
offset, not a constant, so that q(z2 | x, z1) still depends on z1 as the guide says.

Richer families reshape the standard normal noise :math:`\varepsilon` from which all sites of the
refitted guide are drawn, jointly and for each datum: a normal of full covariance, then affine
couplings on top of it. Each family thereby holds the one before it, and starts at its optimum.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import torch
from jaxtyping import Bool, Float, Int64
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.distributions.transforms.spline import ConditionedSpline
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch import distributions as torch_dist
from torch.distributions import constraints, transform_to

from pyro_vae.checks import check_count, check_positive
from pyro_vae.data import Seed, as_seed
from pyro_vae.inference.programs import (
    Arguments,
    JointOnlyError,
    Pair,
    Program,
    ProgramError,
    ProgramStructure,
    SubsampleError,
    bytes_of_run,
    is_delta,
    particles_at_once,
    program_scope,
    split_count,
    tool,
    weighted_sites,
)
from pyro_vae.progress import progress_bar
from pyro_vae.results import ShortRepr

__all__ = [
    "FAMILIES",
    "RefittedGuide",
    "inspect_refittable",
    "maximize_per_datum",
    "paired_log_weights",
    "refit_guide",
    "refits",
]

FAMILIES = ("same", "full", "flow")
"""The families in the order of inclusion: each one holds those before it."""

_NOISE_SITE = "_refitted_noise"

# Steps: particles in each, steps in a window, windows without a rise before the rate falls, by how
# much it falls, and how often before a datum counts as converged.
_DRAWS, _WINDOW, _PATIENCE, _DECAY, _STAGES = 16, 20, 3, 0.2, 3
_SELECTION_DRAWS = 256  # fresh draws that choose among the start, the last and the mean iterate
_COUPLINGS, _COUPLING_UNITS = 4, 16
_BINS, _SPLINE_BOUND = 8, 4.0


def _parameters_of_leaves() -> dict[type, tuple[str, ...]]:
    names = {
        "Normal": ("loc", "scale"),
        "MultivariateNormal": ("loc", "scale_tril"),
        "LowRankMultivariateNormal": ("loc", "cov_factor", "cov_diag"),
        "Laplace": ("loc", "scale"),
        "StudentT": ("df", "loc", "scale"),
        "Gamma": ("concentration", "rate"),
        "Beta": ("concentration1", "concentration0"),
        "Dirichlet": ("concentration",),
    }
    # Exact types: a subclass may have another constructor, or mean something else.
    return {
        getattr(home, name): parameters
        for name, parameters in names.items()
        for home in (torch_dist, dist)
    }


_LEAVES = _parameters_of_leaves()


# --- the distributions of a guide -----------------------------------------------------------------


def _leaf(fn: Any) -> Any:
    """The innermost distribution, whose parameters are freed."""
    while type(fn) not in _LEAVES and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _check_distribution(name: str, fn: Any) -> None:
    """Refuses what cannot be rebuilt with other parameters."""
    outer = fn
    while type(fn) not in _LEAVES:
        if isinstance(fn, torch_dist.TransformedDistribution):
            if not all(t.bijective for t in fn.transforms):
                raise _unknown(name, outer)
        elif not isinstance(fn, torch_dist.Independent | MaskedDistribution | ExpandedDistribution):
            raise _unknown(name, outer)
        fn = fn.base_dist


def _unknown(name: str, fn: Any) -> ProgramError:
    kind = fn
    while isinstance(kind, torch_dist.Independent | MaskedDistribution | ExpandedDistribution):
        kind = kind.base_dist
    known = ", ".join(dict.fromkeys(cls.__name__ for cls in _LEAVES))
    return ProgramError(
        f"the guide's site '{name}' has a {type(kind).__name__}, whose parameters cannot be freed "
        f"for each datum; known are {known}, and bijective transforms, masks and Independent of "
        "these"
    )


def _rebuild(fn: Any, change: Callable[[Any], Any]) -> Any:
    """The same distribution around a changed leaf; transforms are shared and stay as they are."""
    if type(fn) in _LEAVES:
        return change(fn)
    base = _rebuild(fn.base_dist, change)
    if isinstance(fn, torch_dist.Independent):
        return dist.Independent(base, fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        return MaskedDistribution(base, fn._mask)
    if isinstance(fn, ExpandedDistribution):
        return ExpandedDistribution(base, fn.batch_shape)
    return dist.TransformedDistribution(base, fn.transforms)


def _from_noise(fn: Any, noise: Tensor) -> Tensor:
    """The draw of a site that standard normal noise gives."""
    if type(fn) in _LEAVES:
        if hasattr(fn, "scale_tril"):
            return fn.loc + (fn.scale_tril @ noise[..., None])[..., 0]
        return fn.loc + fn.scale * noise
    value = _from_noise(fn.base_dist, noise)
    if isinstance(fn, torch_dist.TransformedDistribution):
        for transform in fn.transforms:
            value = transform(value)
    return value


def _has_normal_noise(fn: Any) -> bool:
    normal = (torch_dist.Normal, torch_dist.MultivariateNormal)
    return isinstance(_leaf(fn), (*normal, torch_dist.LowRankMultivariateNormal))


class _Reshaped(TorchDistribution):
    """Draws from one distribution, scores by another, relative to a third.

    `drawn` and `scored` have the same values; the second has no gradient to its parameters, so that
    only the path through the draw is differentiated (Roeder et al. 2017).
    """

    arg_constraints: dict = {}  # noqa: RUF012 - as torch declares it
    has_rsample = True

    def __init__(self, drawn: Any, scored: Any, relative_to: Any = None) -> None:
        self.drawn, self.scored, self.relative_to = drawn, scored, relative_to
        super().__init__(drawn.batch_shape, drawn.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.drawn.support

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.drawn.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob = self.scored.log_prob(value)
        return log_prob if self.relative_to is None else log_prob - self.relative_to.log_prob(value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        parts = (self.drawn, self.scored, self.relative_to)
        same = parts[0] is parts[1]
        drawn, scored, relative_to = (p and p.expand(batch_shape) for p in parts)
        return _Reshaped(drawn, drawn if same else scored, relative_to)


# --- what is freed --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Free:
    """One tensor of numbers per datum: where it starts, its unit, and the axis of the data."""

    start: Tensor
    unit: Tensor
    axis: int


@dataclass(frozen=True)
class _FreeSite:
    """A latent site of the guide.

    Attributes:
        parameters: What is freed, by the name of the parameter.
        plates: Sizes of the plates' dims.
        event: Shape of the noise within a cell of the plates.
        normal: Whether the site is drawn from standard normal noise.
        kind: The name of its innermost distribution.
    """

    parameters: dict[str, _Free]
    plates: torch.Size
    event: torch.Size
    normal: bool
    kind: str

    def num_noise(self, num_data: int) -> int:
        return self.plates.numel() // num_data * self.event.numel()


@dataclass(frozen=True)
class _Layout:
    """The freed sites of a guide, and the plate of its data."""

    sites: dict[str, _FreeSite]
    plate: str
    batch_dim: int
    num_data: int
    like: Tensor

    @property
    def num_noise(self) -> int:
        return sum(site.num_noise(self.num_data) for site in self.sites.values())

    @property
    def noise_batch(self) -> tuple[int, ...]:
        return (self.num_data, *(1,) * (-self.batch_dim - 1))

    def split(self, noise: Tensor) -> dict[str, Tensor]:
        """Cuts the noise of a datum, `[..., data, 1s, noise]`, into that of the sites."""
        sizes = [site.num_noise(self.num_data) for site in self.sites.values()]
        parts = noise.split(sizes, -1)
        return {
            name: self._to_plates(part, site)
            for (name, site), part in zip(self.sites.items(), parts, strict=True)
        }

    def _to_plates(self, noise: Tensor, site: _FreeSite) -> Tensor:
        """Lays the noise of a datum out along the plates within it."""
        nesting = len(site.plates)
        inner = list(site.plates)
        inner[self.batch_dim] = 1
        outer = [1] * (nesting - noise.dim() + 1) + list(noise.shape[:-1])
        lead, data = outer[: len(outer) - nesting], outer[len(outer) - nesting :]
        noise = noise.reshape(*outer, *inner, *site.event)
        first = len(lead)
        pairs = [d for i in range(nesting) for d in (first + i, first + nesting + i)]
        event = range(first + 2 * nesting, noise.dim())
        noise = noise.permute(*range(first), *pairs, *event)
        merged = [a * b for a, b in zip(data, inner, strict=True)]
        return noise.reshape(*lead, *merged, *site.event)


def _lay_out(guide: Program, arguments: Arguments, structure: ProgramStructure) -> _Layout:
    """Runs the guide once and lists what can be freed."""
    args, kwargs = arguments
    with torch.no_grad():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    found = {n: s for n, s in weighted_sites(trace).items() if not s["is_observed"]}
    drawn = {name: site for name, site in found.items() if not is_delta(site["fn"])}
    for name, site in drawn.items():
        _check_distribution(name, site["fn"])
    if not drawn:
        raise ProgramError("the guide draws nothing, so there is no family to refit")
    dim = cast(int, structure.batch_dim)
    frames = next(iter(drawn.values()))["cond_indep_stack"]
    plate = next(frame.name for frame in frames if frame.vectorized and frame.dim == dim)
    sites = {name: _free_site(site["fn"], dim) for name, site in drawn.items()}
    like = next(iter(next(iter(sites.values())).parameters.values())).start
    return _Layout(sites, plate, dim, structure.batch_size, like)


def _free_site(fn: Any, batch_dim: int) -> _FreeSite:
    leaf, nesting = _leaf(fn), len(fn.batch_shape)
    parameters = {}
    for name in _LEAVES[type(leaf)]:
        value = getattr(leaf, name)
        unconstrained = transform_to(_constraint(leaf, name)).inv(value)
        unit = _unit(leaf, name, value).expand(unconstrained.shape)
        axis = batch_dim - (unconstrained.dim() - nesting)
        parameters[name] = _Free(torch.zeros_like(unconstrained), unit, axis)
    shape = leaf.batch_shape + leaf.event_shape
    return _FreeSite(
        parameters, fn.batch_shape, shape[nesting:], _has_normal_noise(fn), type(leaf).__name__
    )


def _constraint(leaf: Any, name: str) -> Any:
    return leaf.arg_constraints[name]


def _unit(leaf: Any, name: str, value: Tensor) -> Tensor:
    """The size of a step: a parameter with the latent's unit moves in the guide's scales."""
    if name == "loc":
        return leaf.scale if hasattr(leaf, "scale") else leaf.variance.sqrt()
    if name == "scale_tril":
        scale = leaf.variance.sqrt()[..., None].expand_as(value)
        return torch.where(torch.eye(value.shape[-1], dtype=torch.bool), 1.0, scale)
    if name == "cov_factor":
        return leaf.variance.sqrt()[..., None].expand_as(value)
    return torch.ones_like(value)


# --- the refitted guide ---------------------------------------------------------------------------


@dataclass
class RefittedGuide:
    """A guide with parameters of its own for each datum: a program for the data it was fitted to.

    It can be passed to `log_weights`, `log_evidence` and every other tool together with the same
    data. Calling it with another number of data is an error.

    Attributes:
        family: One of `FAMILIES`.
        steps: Steps that each datum took, in this family.
        converged: Whether the bound of a datum had stopped rising when its steps ended.
        log_weight: The mean log weight of each datum on the draws that chose it, in nats.
    """

    __wrapped__: Program
    family: str
    layout: _Layout = field(repr=False)
    values: dict[str, Tensor] = field(repr=False)
    steps: Int64[Tensor, " batch"] = field(repr=False)
    converged: Bool[Tensor, " batch"] = field(repr=False)
    log_weight: Float[Tensor, " batch"] = field(repr=False)
    path_only: bool = field(default=False, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the guide with its distributions replaced."""
        noise: dict[str, Tensor] = {}
        if self.family != "same":
            layout = self.layout
            with IndepMessenger(layout.plate, layout.num_data, dim=layout.batch_dim):
                drawn = pyro.sample(
                    _NOISE_SITE,
                    _noise_distribution(self.family, self.values, layout, self.path_only),
                    infer={"is_auxiliary": True},
                )
            noise = layout.split(drawn)
        with _Replace(self.layout, self.values, noise, self.path_only):
            return self.__wrapped__(*args, **kwargs)

    def __hash__(self) -> int:
        return id(self)


class _Replace(Messenger):
    """Puts freed parameters, and noise where a family reshapes it, into a guide's sites."""

    def __init__(
        self,
        layout: _Layout,
        values: Mapping[str, Tensor],
        noise: Mapping[str, Tensor],
        path_only: bool,
    ) -> None:
        super().__init__()
        self.layout, self.values, self.noise = layout, values, noise
        self.path_only = path_only and not noise

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.layout.sites or msg["done"]:
            return
        length = msg["fn"].batch_shape[self.layout.batch_dim]
        if length != self.layout.num_data:
            raise ValueError(
                f"this guide was refitted to {self.layout.num_data} data and got {length}; pass "
                "the same data, or refit it to these"
            )
        moved = _rebuild(msg["fn"], lambda leaf: self._move(name, leaf, detach=False))
        if name in self.noise:
            value = _from_noise(moved, self.noise[name])
            log_density = moved.log_prob(value)
            msg["fn"] = dist.Delta(value, log_density, event_dim=moved.event_dim)
        elif self.path_only:
            scored = _rebuild(msg["fn"], lambda leaf: self._move(name, leaf, detach=True))
            msg["fn"] = _Reshaped(moved, scored)
        else:
            msg["fn"] = moved

    def _move(self, name: str, leaf: Any, *, detach: bool) -> Any:
        parameters = {}
        for parameter, free in self.layout.sites[name].parameters.items():
            offset = self.values[f"{name}.{parameter}"]
            offset = free.unit * (offset.detach() if detach else offset)
            onto = transform_to(_constraint(leaf, parameter))
            parameters[parameter] = onto(onto.inv(getattr(leaf, parameter)) + offset)
        home = type(leaf) if issubclass(type(leaf), TorchDistribution) else None
        cls = home or getattr(dist, type(leaf).__name__)
        return cls(**parameters, validate_args=False)


def _noise_distribution(
    family: str, values: Mapping[str, Tensor], layout: _Layout, path_only: bool
) -> Any:
    """The noise of all sites of a datum, scored relative to the standard normal."""
    drawn = _reshaped_noise(family, values, layout)
    scored = drawn
    if path_only:
        scored = _reshaped_noise(family, {n: v.detach() for n, v in values.items()}, layout)
    standard = dist.Normal(torch.zeros_like(values["noise.loc"]), 1.0, validate_args=False)
    return _Reshaped(drawn, scored, standard.to_event(1))


def _reshaped_noise(family: str, values: Mapping[str, Tensor], layout: _Layout) -> Any:
    onto = transform_to(constraints.lower_cholesky)
    normal = dist.MultivariateNormal(
        values["noise.loc"], scale_tril=onto(values["noise.scale_tril"]), validate_args=False
    )
    if family == "full":
        return normal
    parts = [part for i in range(_COUPLINGS) for part in _coupling(i, values, layout.num_noise)]
    return dist.TransformedDistribution(normal, parts, validate_args=False)


def _coupling(number: int, values: Mapping[str, Tensor], dim: int) -> list[Any]:
    """One affine coupling with weights for each datum, and the reversal that follows it."""
    if dim == 1:  # nothing to couple with: a spline bends the only axis
        return [_spline(values)] if number == 0 else []
    first, second, bias = (values[f"flow.{number}.{n}"] for n in ("first", "second", "bias"))

    def net(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.einsum("...i,...ih->...h", x, first[..., :-1, :]) + first[..., -1, :]
        out = torch.einsum("...h,...ho->...o", hidden.tanh(), second) + bias[..., 0, :]
        shift, log_scale = out.chunk(2, -1)
        return shift, log_scale

    flip = transforms.Permute(torch.arange(dim - 1, -1, -1, device=first.device), cache_size=1)
    return [transforms.AffineCoupling(_split(dim), net), flip]


def _split(dim: int) -> int:
    return (dim + 1) // 2


def _noise_start(family: str, layout: _Layout) -> dict[str, _Free]:
    """Where the parameters of reshaped noise start: at noise that is not reshaped."""
    dim, batch, axis = layout.num_noise, layout.noise_batch, layout.batch_dim
    zeros = layout.like.new_zeros
    if family == "full":
        starts = {"noise.loc": zeros(*batch, dim), "noise.scale_tril": zeros(*batch, dim, dim)}
    elif dim == 1:
        starts = _spline_start(layout)
    else:
        starts = {}
        kept = _split(dim)
        for i in range(_COUPLINGS):
            fan_in = torch.randn(*batch, kept + 1, _COUPLING_UNITS, device=layout.like.device)
            starts[f"flow.{i}.first"] = fan_in.to(layout.like) / math.sqrt(kept)
            starts[f"flow.{i}.second"] = zeros(*batch, _COUPLING_UNITS, 2 * (dim - kept))
            starts[f"flow.{i}.bias"] = zeros(*batch, 1, 2 * (dim - kept))
    return {
        name: _Free(value, torch.ones_like(value), axis - (value.dim() - len(batch)))
        for name, value in starts.items()
    }


def _spline_start(layout: _Layout) -> dict[str, Tensor]:
    zeros = layout.like.new_zeros
    sizes = {"widths": _BINS, "heights": _BINS, "slopes": _BINS - 1}
    return {f"flow.{name}": zeros(*layout.noise_batch, 1, size) for name, size in sizes.items()}


def _spline(values: Mapping[str, Tensor]) -> Any:
    one = math.log(math.expm1(1 - 1e-3))  # Pyro adds 0.001 to every slope: the start is 1
    shape = (
        values["flow.widths"].softmax(-1),
        values["flow.heights"].softmax(-1),
        torch.nn.functional.softplus(values["flow.slopes"] + one),
        None,
    )
    return ConditionedSpline(shape, bound=_SPLINE_BOUND, order="quadratic")


# --- ascent ---------------------------------------------------------------------------------------


@dataclass(repr=False)
class Maximized(ShortRepr):
    """Where `maximize_per_datum` came to, per datum.

    Attributes:
        last: The last iterates.
        mean: Their means since the value last rose.
        steps: Steps taken.
        converged: Whether the value had stopped rising.
    """

    last: dict[str, Tensor]
    mean: dict[str, Tensor]
    steps: Int64[Tensor, " batch"]
    converged: Bool[Tensor, " batch"]


def maximize_per_datum(
    value: Callable[[dict[str, Tensor]], Float[Tensor, " batch"]],
    start: Mapping[str, Tensor],
    axes: Mapping[str, int],
    *,
    max_steps: int,
    step_size: float,
    advance: Callable[[int], object] = lambda steps: None,
) -> Maximized:
    """Maximises a noisy value for each datum by Adam, with a step size and an end of its own.

    The value of a datum may depend on its own slice of each tensor alone. Its step size falls to a
    fifth whenever its mean over a window of 20 steps has not risen for 3 windows, and it stops at
    the third fall. At each fall the datum goes to the mean of its iterates since the last rise.

    Args:
        value: Gives the value of every datum, differentiably.
        start: The tensors to begin with.
        axes: The axis of the data in each tensor, negative.
        max_steps: The most steps.
        step_size: Of the first steps.
        advance: Called with the number of steps done since the last call.

    References:
        Kingma & Ba (2015), Adam: a method for stochastic optimization.
    """
    now = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    mean = {name: tensor.detach().clone() for name, tensor in start.items()}
    first = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    plateau: _Plateau | None = None
    for step in range(1, max_steps + 1):
        with torch.enable_grad():
            values = value(now)
            finite = torch.where(values.isfinite(), values, 0.0).sum()
            grads = torch.autograd.grad(finite, list(now.values()), allow_unused=True)
        if plateau is None:
            plateau = _Plateau(values.detach(), step_size)
        with torch.no_grad():
            for (name, tensor), grad in zip(now.items(), grads, strict=True):
                grad = torch.zeros_like(tensor) if grad is None else grad.nan_to_num(0.0, 0.0, 0.0)
                first[name].lerp_(grad, 0.1)
                second[name].lerp_(grad.square(), 0.01)
                scale = (second[name] / (1 - 0.99**step)).sqrt() + 1e-8
                rate = _along(plateau.rate, tensor, axes[name])
                tensor += rate * first[name] / (1 - 0.9**step) / scale
                share = _along(plateau.share(), tensor, axes[name])
                mean[name] += share * (tensor - mean[name])
            fell = plateau.see(values.detach())
            for name, tensor in now.items():  # a smaller step starts from the mean
                restart = _along(fell, tensor, axes[name])
                tensor.copy_(torch.where(restart, mean[name], tensor))
        if step % _WINDOW == 0:
            advance(_WINDOW)
            if not plateau.active.any():
                break
    assert plateau is not None
    last = {name: tensor.detach() for name, tensor in now.items()}
    return Maximized(last, mean, plateau.steps, ~plateau.active)


def _along(per_datum: Tensor, like: Tensor, axis: int) -> Tensor:
    return per_datum.to(like.device).reshape(-1, *(1,) * (-axis - 1))


class _Plateau:
    """Per datum: the step size, when it falls, and when the steps end."""

    def __init__(self, values: Float[Tensor, " batch"], step_size: float) -> None:
        self.rate = torch.full_like(values, step_size)
        self.best = torch.full_like(values, -math.inf)
        self.window = torch.zeros_like(values)
        self.stale = torch.zeros_like(values)
        self.stage = torch.zeros_like(values)
        self.averaged = torch.zeros_like(values)
        self.steps = torch.zeros_like(values, dtype=torch.int64)
        self.count = 0

    @property
    def active(self) -> Bool[Tensor, " batch"]:
        return self.stage < _STAGES

    def share(self) -> Float[Tensor, " batch"]:
        """How much of this iterate goes into the running mean."""
        return torch.where(self.active, 1 / (self.averaged + 1), 0.0)

    def see(self, values: Float[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        """Takes note of the values of a step; returns for which data the step size falls."""
        self.averaged += self.active
        self.steps += self.active
        self.window += values / _WINDOW
        self.count += 1
        if self.count % _WINDOW:
            return torch.zeros_like(values, dtype=torch.bool)
        risen = self.window > self.best  # nan has not
        self.best = torch.where(risen, self.window, self.best)
        self.stale = torch.where(risen, 0.0, self.stale + 1)
        self.window = torch.zeros_like(values)
        fell = (self.stale >= _PATIENCE) & self.active
        self.stage = self.stage + fell
        self.rate = torch.where(fell, self.rate * _DECAY, self.rate)
        self.rate = torch.where(self.active, self.rate, 0.0)
        self.stale = torch.where(fell, 0.0, self.stale)
        self.best = torch.where(fell, -math.inf, self.best)  # a lucky window ends no later stage
        moving = (risen | fell) & self.active  # the mean is of iterates that rise no more
        self.averaged = torch.where(moving, 0.0, self.averaged)
        return fell


# --- refitting ------------------------------------------------------------------------------------


@tool
def refit_guide(
    model: Program,
    guide: Program,
    x: Any,
    *,
    family: str = "same",
    max_steps: int = 1000,
    step_size: float = 0.05,
    seed: Seed = 0,
    max_memory: float = 0.5,
    progress: bool = True,
) -> RefittedGuide:
    r"""Finds the guide's best parameters for each datum, from those that it computes for it.

    The ELBO of every datum is maximised in parallel, with the gradient of the path through the
    latents alone, whose noise vanishes at the exact posterior. Which of the start, the last and the
    mean iterate is kept is decided, for each datum, by fresh draws.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior. Of its latent sites the parameters of
            Normal, MultivariateNormal, LowRankMultivariateNormal, Laplace, StudentT, Gamma, Beta
            and Dirichlet are freed, also within Independent, masks and bijective transforms; the
            transforms' own parameters stay as the guide computes them.
        x: The data; a tuple for several arguments, a dict for keywords.
        family: `"same"`; `"full"`, a normal of full covariance in place of the standard normal
            noise of all sites; or `"flow"`, affine couplings on top of it (a spline where a datum
            has one latent).
        max_steps: The most steps of each family.
        step_size: Of Adam's first steps, in the guide's own scales.
        seed: Seeds the draws; the caller's random state is left alone.
        max_memory: Roughly the memory that draws without gradients may take, in GiB.
        progress: Shows a bar on stderr where that is a terminal.

    Returns:
        A Pyro program for the same data, which any tool takes in place of the guide.

    Raises:
        ProgramError: If the pair has no log weights (see `log_weights`), the data are subsampled, a
            latent is global, or a distribution is unknown; the sentence names the site.
        ValueError: If an argument is out of its range.

    Note: The last of the families holds the others, but no ascent is sure to find the best: its
        ELBO is a lower bound of the family's best.

    References:
        Cremer, Li & Duvenaud (2018), Inference suboptimality in variational autoencoders, section
        4; Roeder, Wu & Duvenaud (2017), Sticking the landing.

    Example:
        >>> import torch
        >>> from pyro_vae import LinearGaussian, log_weights
        >>> pair, x = LinearGaussian(data_dim=3, latent_dim=2), torch.zeros(4, 3)
        >>> better = refit_guide(pair.model, pair.guide, x, max_steps=100, progress=False)
        >>> log_weights(pair.model, better, x, num_particles=5).shape
        torch.Size([5, 4])
    """
    seed = as_seed(seed)
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}, but must be one of {', '.join(FAMILIES)}")
    chain = FAMILIES[: FAMILIES.index(family) + 1]
    with program_scope(seed):
        found = refits(
            inspect_refittable(model, guide, x),
            chain,
            max_steps=max_steps,
            step_size=step_size,
            max_memory=max_memory,
            progress=progress,
        )
        return list(found)[-1]


def inspect_refittable(model: Program, guide: Program, x: Any) -> Pair:
    """`Pair.inspect`, and the refusals of guides that have no parameters per datum."""
    if isinstance(poutine.unwrap(guide), Messenger):
        raise ProgramError(
            "the guide is a messenger that runs the model itself, so its distributions cannot be "
            "replaced; write it as a program of its own"
        )
    try:
        pair = Pair.inspect(model, guide, x)
    except JointOnlyError as error:
        raise ProgramError(
            f"{error.reason}; parameters per datum and a gap per datum need latents per datum"
        ) from error
    if pair.structure.scale != 1.0:
        raise SubsampleError("the programs subsample their data, so every run would refit others")
    return pair


def refits(
    pair: Pair,
    families: tuple[str, ...],
    *,
    max_steps: int,
    step_size: float,
    max_memory: float,
    progress: bool,
) -> Iterator[RefittedGuide]:
    """Refits each family in turn, from the optimum of the one before; `"same"` comes first.

    Runs in the caller's `program_scope`, and takes its random numbers from the global stream.
    """
    check_count("max_steps", max_steps)
    check_positive("step_size", step_size)
    layout = _lay_out(pair.guide, pair.arguments, pair.structure)
    if len(families) > 1:
        _check_noise(layout)
    none = torch.zeros(layout.num_data)
    values = {
        f"{site}.{name}": free.start
        for site, freed in layout.sites.items()
        for name, free in freed.parameters.items()
    }
    axes = {
        f"{site}.{name}": free.axis
        for site, freed in layout.sites.items()
        for name, free in freed.parameters.items()
    }
    now = RefittedGuide(pair.guide, "same", layout, values, none.long(), none.bool(), none)
    for family in families:
        if family != "same":
            # The sites' own parameters stay where they are: the noise moves in their place.
            started = _noise_start(family, layout)
            if family == "flow" and "noise.loc" not in now.values:  # it bends the full normal
                started = _noise_start("full", layout) | started
            axes = {name: free.axis for name, free in started.items()} | (
                axes if family == "flow" and "noise.loc" in axes else {}
            )
            now = replace(
                now,
                family=family,
                values={**now.values, **{name: free.start for name, free in started.items()}},
            )
        now = _refit(
            pair,
            now,
            axes,
            max_steps=max_steps,
            step_size=step_size,
            max_memory=max_memory,
            progress=progress,
        )
        yield now


def _check_noise(layout: _Layout) -> None:
    for name, site in layout.sites.items():
        if not site.normal:
            raise ProgramError(
                f"the richer families reshape normal noise, which the guide's site '{name}' "
                f"({site.kind}) is not drawn from; leave them out"
            )


def _refit(
    pair: Pair,
    guide: RefittedGuide,
    axes: Mapping[str, int],
    *,
    max_steps: int,
    step_size: float,
    max_memory: float,
    progress: bool,
) -> RefittedGuide:
    def value(moved: dict[str, Tensor]) -> Float[Tensor, " batch"]:
        trial = replace(guide, values={**guide.values, **moved}, path_only=True)
        return pair.with_guide(trial).log_weights(_DRAWS).mean(0)

    start = {name: guide.values[name] for name in axes}
    what = f"refitting ({guide.family})"
    shown = progress_bar(max_steps, "step", show=progress, what=what)
    with shown, pyro.validation_enabled(False):  # one datum that leaves a support stops no other
        reached = maximize_per_datum(
            value, start, axes, max_steps=max_steps, step_size=step_size, advance=shown.update
        )
        candidates = (start, reached.last, reached.mean)
        chosen, log_weight = _choose(pair, guide, axes, candidates, max_memory)
    values = {**guide.values, **chosen}
    return replace(
        guide,
        values=values,
        steps=reached.steps.cpu(),
        converged=reached.converged.cpu(),
        log_weight=log_weight,
    )


def _choose(
    pair: Pair,
    guide: RefittedGuide,
    axes: Mapping[str, int],
    candidates: Sequence[dict[str, Tensor]],
    max_memory: float,
) -> tuple[dict[str, Tensor], Float[Tensor, " batch"]]:
    """The best candidate for each datum, by its ELBO on draws in common."""
    trials = [replace(guide, values={**guide.values, **values}) for values in candidates]
    weights = paired_log_weights(pair, trials, _SELECTION_DRAWS, max_memory)
    means = torch.stack([w.mean(0).nan_to_num(-math.inf, math.inf, -math.inf) for w in weights])
    best = means.max(0)
    chosen = {}
    for name in axes:
        together = torch.stack([values[name] for values in candidates])
        which = _along(best.indices, together[0], axes[name]).expand_as(together[0])
        chosen[name] = together.gather(0, which[None])[0]
    return chosen, best.values


@torch.no_grad()
def paired_log_weights(
    pair: Pair,
    guides: Sequence[Program],
    num_particles: int,
    max_memory: float,
) -> list[Float[Tensor, "particles batch"]]:
    """Fresh log weights of every guide, all from the same random numbers; float64, on the CPU.

    Runs in the caller's `program_scope`.
    """
    size = max(bytes_of_run(pair.model, guide, pair.arguments) for guide in guides)
    most = particles_at_once(num_particles, max_memory, size)
    parts: list[list[Tensor]] = [[] for _ in guides]
    for count in split_count(num_particles, most):
        seed = int(torch.randint(2**31, ()))
        for guide, part in zip(guides, parts, strict=True):
            pyro.set_rng_seed(seed)
            part.append(pair.with_guide(guide).log_weights(count).double().cpu())
    return [torch.cat(part) for part in parts]
