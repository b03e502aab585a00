"""Transforms from unconstrained space onto the supports of latents.

Torch's `biject_to` and what it lacks: matrices that are positive definite, directions, angles, and
supports that a chain of transforms has moved.
"""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import CholeskyTransform
from pyro.infer.autoguide import init_to_median
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.transforms import ComposeTransform, IndependentTransform

__all__ = ["family_of", "init_to_middle", "support_of", "transform_of"]

_WRAPPERS = (dist.ExpandedDistribution, dist.MaskedDistribution)
_TURN = constraints.interval(-math.pi, math.pi)  # torch calls the support of angles the real line
_OPEN_ENDED = (constraints.greater_than, constraints.greater_than_eq)
_BOUNDED = (constraints.interval, constraints.half_open_interval)


def family_of(fn: Any) -> str:
    """The name of a distribution's class, whatever Pyro has wrapped around it."""
    while isinstance(fn, (*_WRAPPERS, torch.distributions.Independent)):
        fn = fn.base_dist
    return type(fn).__name__


def transform_of(fn: Any) -> Transform:
    """The transform from unconstrained space onto the support of a distribution.

    Raises:
        NotImplementedError: If there is none.
        AttributeError: If the distribution states no support.
    """
    return _onto(support_of(fn))


def init_to_middle(site: Any) -> Tensor:
    """Where an automatic guide of Pyro's may begin: `AutoNormal(model, init_loc_fn=...)`.

    The median of the prior, and zero in unconstrained space for priors that have no draws
    (`ImproperUniform`), at which Pyro's own starts fail.
    """
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    if not isinstance(fn, dist.ImproperUniform):
        return init_to_median(site)
    transform = transform_of(site["fn"])
    return transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))


def support_of(fn: Any) -> Any:
    """A distribution's support.

    Of a mixture it is that of its components together, of an angle one turn, and of transformed
    draws what the transforms make of the support of the draws.
    """
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    if isinstance(fn, torch.distributions.Independent):
        return _independent(support_of(fn.base_dist), fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.VonMises):
        return _TURN
    if isinstance(fn, (dist.SineBivariateVonMises, dist.SineSkewed)):
        return _independent(_TURN, 1)
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        return _of_all(support_of(fn.component_distribution))
    if type(fn) in (dist.TransformedDistribution, torch.distributions.TransformedDistribution):
        return _moved(fn)
    # Asked of no other: a look at the bounds' values would keep samplers from capturing a graph.
    return _simplest(fn.support) if isinstance(fn, dist.GeneralizedPareto) else fn.support


def _of_all(support: Any) -> Any:
    """The support of components together, which the last batch dim runs through."""
    bounds = _bounds(support)
    if bounds is None or max(bound.dim() for bound in bounds) == 0:
        return support
    return _between(bounds[0].amin(-1), bounds[1].amax(-1))


def _moved(fn: Any) -> Any:
    """What the transforms make of the support of a transformed distribution's base."""
    parts: list[Transform] = []
    for part in fn.transforms:
        parts += part.parts if isinstance(part, ComposeTransform) else [part]
    support = support_of(fn.base_dist)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    for part in parts:
        bounds = None if support is constraints.real else _bounds(support)
        try:
            rises = part.sign > 0
        except NotImplementedError:
            bounds = None
        if bounds is None or part.codomain.event_dim:
            support = part.codomain
        else:
            low, high = part(bounds[0]), part(bounds[1])
            up = torch.as_tensor(rises)
            support = _between(torch.where(up, low, high), torch.where(up, high, low))
    return _independent(support, len(fn.event_shape) - support.event_dim)


def _independent(support: Any, events: int) -> Any:
    return constraints.independent(support, events) if events else support


def _simplest(support: Any) -> Any:
    """An interval without end as what it is."""
    if isinstance(support, constraints.independent):
        return _independent(_simplest(support.base_constraint), support.reinterpreted_batch_ndims)
    if isinstance(support, _BOUNDED):
        bounds = _bounds(support)
        assert bounds is not None
        if any(bound.isinf().any() for bound in bounds):
            return _between(*bounds)
    return support


def _bounds(support: Any) -> tuple[Tensor, Tensor] | None:
    """The ends of a support on the line."""
    infinite = torch.tensor(math.inf)
    if support is constraints.real:
        return -infinite, infinite
    if isinstance(support, _BOUNDED):
        return torch.as_tensor(support.lower_bound), torch.as_tensor(support.upper_bound)
    if isinstance(support, _OPEN_ENDED):
        return torch.as_tensor(support.lower_bound), infinite
    if isinstance(support, constraints.less_than):
        return -infinite, torch.as_tensor(support.upper_bound)
    return None


def _between(lower: Tensor, upper: Tensor) -> Any:
    """The support between two ends."""
    open_below, open_above = bool(lower.isinf().all()), bool(upper.isinf().all())
    if open_below and open_above:
        return constraints.real
    if open_below:
        return constraints.less_than(upper)
    if open_above:
        return constraints.greater_than(lower)
    if bool(lower.isinf().any()) or bool(upper.isinf().any()):
        raise NotImplementedError("some of the entries have an end and some have none")
    return constraints.interval(lower, upper)


# --- transforms -----------------------------------------------------------------------------------


def _onto(support: Any) -> Transform:
    if isinstance(support, constraints.independent):
        return IndependentTransform(
            _onto(support.base_constraint), support.reinterpreted_batch_ndims
        )
    try:
        return biject_to(support)
    except NotImplementedError:
        if support is constraints.lower_cholesky:
            return _LowerCholesky()
        if support is constraints.positive_definite:
            return ComposeTransform([_LowerCholesky(), CholeskyTransform().inv])
        if support is dist.constraints.sphere:
            return _Stereographic()
        raise


class _LowerCholesky(Transform):
    """From a vector to a lower triangle with a positive diagonal, row by row."""

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        size = int(math.sqrt(2 * shape[-1]))
        return torch.Size((*shape[:-1], size, size))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))

    def _call(self, x: Tensor) -> Tensor:
        shape = self.forward_shape(x.shape)
        row, column = torch.tril_indices(shape[-1], shape[-1], device=x.device)
        lower = x.new_zeros(shape)
        lower[..., row, column] = torch.where(row == column, x.exp(), x)
        return lower

    def _inverse(self, y: Tensor) -> Tensor:
        row, column = torch.tril_indices(y.shape[-1], y.shape[-1], device=y.device)
        x = y[..., row, column]
        return torch.where(row == column, torch.where(row == column, x, 1.0).log(), x)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class _Stereographic(Transform):
    """From a plane to the sphere without a pole; volumes are those of its surface."""

    domain = constraints.real_vector
    codomain = dist.constraints.sphere
    bijective = True

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] + 1))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] - 1))

    def _call(self, x: Tensor) -> Tensor:
        square = x.square().sum(-1, keepdim=True)
        return torch.cat([2 * x, square - 1], -1) / (1 + square)

    def _inverse(self, y: Tensor) -> Tensor:
        return y[..., :-1] / (1 - y[..., -1:])

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.shape[-1] * (math.log(2) - torch.log1p(x.square().sum(-1)))
