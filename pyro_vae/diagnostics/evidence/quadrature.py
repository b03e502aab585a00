r"""Log evidence by quadrature, for one or two latents of a datum.

The trapezoidal rule on a grid that is fitted to each datum's posterior: for a smooth integrand
that decays at both ends it converges faster than any power of the spacing.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.inference.programs import Potential, ProgramError

__all__ = ["Quadrature", "quadrature_columns"]

_DEPTH = 34.0  # nats below the peak at which the grid ends: e^-34 = 2e-15
_SEARCH = {1: 129, 2: 33}  # points along each dim while the grid is being placed
_ROUNDS = 12
_CANDIDATES = 300  # draws of prior and guide among which the search begins
_FIRST = {1: 65, 2: 33}
_ROWS = 40_000  # points times data evaluated at once


@dataclass(frozen=True)
class Quadrature:
    """Settings of the quadrature.

    Attributes:
        tolerance: Error in nats at which refinement stops.
        max_points: Points along each dim at which it stops in any case.
    """

    tolerance: float = 1e-8
    max_points: int = 513

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise ValueError(f"tolerance is in nats and must be positive, not {self.tolerance!r}")
        if self.max_points < 65:
            raise ValueError(f"max_points must be at least 65, not {self.max_points!r}")


@dataclass
class _Frame:
    """Where each datum's grid lies: u = center + axes s, with s between `low` and `high`."""

    center: Float[Tensor, "batch dim"]
    axes: Float[Tensor, "batch dim dim"]
    low: Float[Tensor, "batch dim"]
    high: Float[Tensor, "batch dim"]

    def points(self, size: int) -> tuple[Tensor, Tensor]:
        """Grid points in s and in u, each `[points, batch, dim]`."""
        dim = self.center.shape[-1]
        ticks = torch.linspace(0, 1, size, dtype=torch.float64).to(self.center)
        grid = torch.cartesian_prod(*[ticks] * dim).reshape(-1, 1, dim)
        s = self.low + grid * (self.high - self.low)
        return s, self.center + torch.einsum("bij,pbj->pbi", self.axes, s)

    def log_cell(self, size: int) -> Float[Tensor, " batch"]:
        """Log volume in u of a cell of the grid."""
        width = ((self.high - self.low) / (size - 1)).log().sum(-1)
        return width + torch.linalg.slogdet(self.axes).logabsdet


def quadrature_columns(
    potential: Potential, settings: Quadrature
) -> dict[str, Float[Tensor, " batch"]]:
    """Log evidence of each datum by quadrature, with an estimate of its error in nats.

    The error is the change at the last refinement, and what the edge of the grid cuts off.

    Raises:
        ProgramError: If a datum has more than two latents.
    """
    if potential.dim > 2:
        raise ProgramError(
            f"quadrature is for at most 2 latents per datum, and here are {potential.dim}; use "
            "method='annealed' or 'bridge'"
        )
    if not bool(potential.active.all()):
        raise ProgramError(
            "quadrature needs every latent to have a density, but a mask switches some off; leave "
            "those data out, or use method='annealed'"
        )
    frame = _place(potential)
    size, previous = _FIRST[potential.dim], None
    while True:
        values, edge = _integrate(potential, frame, size)
        change = values * math.inf if previous is None else (values - previous).abs()
        error = torch.where(values.isfinite(), torch.maximum(change, edge), 0.0)
        finished = bool((error <= settings.tolerance).all())
        if previous is not None and (finished or 2 * size - 1 > settings.max_points):
            return {"log_evidence": values, "quadrature_error": error}
        size, previous = 2 * size - 1, values


def _log_joint(potential: Potential, u: Float[Tensor, "points batch dim"]) -> Tensor:
    like = potential.like
    step = max(2, _ROWS // u.shape[1])
    found = [potential.log_joint(part.to(like)).double() for part in u.split(step)]
    values = torch.cat(found).detach()
    return torch.where(values.isnan(), -math.inf, values)


def _place(potential: Potential) -> _Frame:
    """Finds where the integrand is not negligible, and axes along which it is round."""
    starts = ["prior", "guide"] if potential.has_guide else ["prior"]
    candidates = torch.cat([potential.draw(_CANDIDATES, start) for start in starts]).double()
    density = _log_joint(potential, candidates)
    best = density.amax(0)
    dim = candidates.shape[-1]
    spread = candidates.amax(0) - candidates.amin(0) + 1e-6
    frame = _Frame(
        torch.zeros_like(spread),
        torch.eye(dim, dtype=torch.float64).to(spread).expand(len(spread), dim, dim),
        candidates.amin(0) - 0.25 * spread,
        candidates.amax(0) + 0.25 * spread,
    )
    size = _SEARCH[dim]
    for turn in range(_ROUNDS):
        s, u = frame.points(size)
        values = _log_joint(potential, u)
        best = torch.maximum(best, values.amax(0))
        if turn in (3, 6):
            frame, s = _turned(frame, s, values, size)
        inside = _to_frame(frame, candidates)
        keep = torch.cat([values > best - _DEPTH, density > best - _DEPTH])[..., None]
        where = torch.cat([s, inside])
        low = torch.where(keep, where, math.inf).amin(0)
        high = torch.where(keep, where, -math.inf).amax(0)
        cell = (frame.high - frame.low) / (size - 1)
        empty = ~(low <= high) | ~best.isfinite()[:, None]
        # Where the edge is not yet negligible the grid grows; else it closes in to one cell.
        reach = frame.high - frame.low
        down = torch.where(low <= frame.low + 0.5 * cell, frame.low - 0.5 * reach, low - 1.5 * cell)
        up = torch.where(
            high >= frame.high - 0.5 * cell, frame.high + 0.5 * reach, high + 1.5 * cell
        )
        frame.low = torch.where(empty, frame.low, down)
        frame.high = torch.where(empty, frame.high, up)
    return frame


def _to_frame(frame: _Frame, u: Tensor) -> Tensor:
    shifted = (u - frame.center)[..., None]
    return torch.linalg.solve(frame.axes, shifted)[..., 0]


def _turned(frame: _Frame, s: Tensor, values: Tensor, size: int) -> tuple[_Frame, Tensor]:
    """The frame in which the integrand has unit covariance, and the grid points in it."""
    weights = torch.softmax(torch.where(values.isfinite(), values, -1e300), 0)[..., None]
    mean = (weights * s).sum(0)
    centred = s - mean
    covariance = torch.einsum("pbi,pbj->bij", weights * centred, centred)
    cell = (frame.high - frame.low) / (size - 1)
    covariance = covariance + torch.diag_embed(cell**2 / 12)
    factor = torch.linalg.cholesky(covariance)
    center = frame.center + torch.einsum("bij,bj->bi", frame.axes, mean)
    turned = torch.linalg.solve_triangular(factor, centred[..., None], upper=False)[..., 0]
    corners = turned  # a box around the old one, which the next rounds close in again
    return _Frame(center, frame.axes @ factor, corners.amin(0), corners.amax(0)), turned


def _integrate(potential: Potential, frame: _Frame, size: int) -> tuple[Tensor, Tensor]:
    """The integral on a grid, and roughly the share of it that lies beyond the grid."""
    s, u = frame.points(size)
    values = _log_joint(potential, u)
    total = values.logsumexp(0) + frame.log_cell(size)
    on_edge = ((s <= frame.low) | (s >= frame.high)).any(-1)
    edge = torch.where(on_edge, values, -math.inf).logsumexp(0) - values.logsumexp(0)
    return total, torch.where(total.isfinite(), edge.exp() * size, 0.0)
