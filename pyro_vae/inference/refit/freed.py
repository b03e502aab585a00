"""What is freed of a guide: its distributions, and the parameters that they are given."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_vae.inference.programs import (
    Arguments,
    Program,
    ProgramError,
    ProgramStructure,
    is_delta,
    weighted_sites,
)
from pyro_vae.inference.refit.parameters import check_rebuilt, constraint_of, in_plates, nodes
from pyro_vae.inference.refit.transport import noise_shape
from pyro_vae.inference.supports import family_of


class _Reshaped(TorchDistribution):
    """Draws from one distribution, scores by another, relative to a third.

    `drawn` and `scored` have the same values; the second has no gradient to its parameters, so that
    only the path through the draw is differentiated (Roeder et al. 2017). A draw that has no path
    is scored by `drawn` itself.
    """

    arg_constraints: dict = {}  # noqa: RUF012 - as torch declares it

    def __init__(self, drawn: Any, scored: Any, relative_to: Any = None) -> None:
        self.drawn, self.scored, self.relative_to = drawn, scored, relative_to
        self.has_rsample = drawn.has_rsample
        super().__init__(drawn.batch_shape, drawn.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.drawn.support

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.drawn.rsample(sample_shape)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.drawn.sample(sample_shape)

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
        has_noise: Whether it can be drawn from standard normal noise.
        kind: The name of its distribution.
        moves_support: Whether what is freed moves the ends of the support.
    """

    parameters: dict[str, _Free]
    plates: torch.Size
    event: torch.Size
    has_noise: bool
    kind: str
    moves_support: bool

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
        check_rebuilt(name, site["fn"])
    if not drawn:
        raise ProgramError("the guide draws nothing, so there is no family to refit")
    dim = cast(int, structure.batch_dim)
    frames = next(iter(drawn.values()))["cond_indep_stack"]
    plate = next(frame.name for frame in frames if frame.vectorized and frame.dim == dim)
    sites = {name: _free_site(site["fn"], dim) for name, site in drawn.items()}
    like = next(iter(next(iter(sites.values())).parameters.values())).start
    return _Layout(sites, plate, dim, structure.batch_size, like)


def _free_site(fn: Any, batch_dim: int) -> _FreeSite:
    nesting, found = len(fn.batch_shape), nodes(fn)
    parameters = {}
    for node in found:
        for name in node.names:
            value = in_plates(node, name)
            unconstrained = transform_to(constraint_of(node.fn, name)).inv(value)
            unit = _unit(node.fn, name, value).expand(unconstrained.shape)
            axis = batch_dim - (unconstrained.dim() - nesting)
            parameters[node.path + name] = _Free(torch.zeros_like(unconstrained), unit, axis)
    plates = torch.Size(fn.batch_shape)
    shape = noise_shape(fn, plates)
    return _FreeSite(
        parameters,
        plates,
        torch.Size() if shape is None else shape[nesting:],
        shape is not None,
        family_of(fn),
        any(_moves_support(node.fn) for node in found),
    )


def _moves_support(fn: Any) -> bool:
    """Whether a support depends on parameters: the mean score of these is then not zero."""
    return isinstance(type(fn).support, constraints._DependentProperty)


def _unit(fn: Any, name: str, value: Tensor) -> Tensor:
    """The size of a step: a parameter with the latent's unit moves in the guide's scales."""
    one = torch.ones_like(value)
    if name in ("loc", "low"):
        spread = fn.scale if hasattr(fn, "scale") else fn.variance.sqrt()
        return torch.where(spread.isfinite(), spread, one)
    if name == "scale_tril" and "loc" in fn.arg_constraints:
        scale = fn.scale_tril.norm(dim=-1)[..., None].expand_as(value)
        return torch.where(torch.eye(value.shape[-1], dtype=torch.bool), 1.0, scale)
    if name == "cov_factor":
        return fn.variance.sqrt()[..., None].expand_as(value)
    return one
