"""The distributions of the noise from which a refitted guide is drawn, family by family."""

import math
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import torch
from pyro.distributions.transforms.spline import ConditionedSpline
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_vae.inference.programs import ProgramError
from pyro_vae.inference.refit.freed import _Free, _Layout, _Reshaped

_COUPLINGS, _COUPLING_UNITS = 4, 16
_BINS, _SPLINE_BOUND = 8, 4.0


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


def _check_noise(layout: _Layout) -> None:
    for name, site in layout.sites.items():
        if not site.has_noise:
            raise ProgramError(
                f"the richer families reshape normal noise, which nobody knows how to draw the "
                f"guide's site '{name}' ({site.kind}) from; leave them out with richer=()"
            )
