"""What is freed of a guide: its distributions, and the parameters that they are given."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch import distributions as torch_dist
from torch.distributions import transform_to

from pyro_vae.inference.programs import (
    Arguments,
    Program,
    ProgramError,
    ProgramStructure,
    is_delta,
    weighted_sites,
)


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
