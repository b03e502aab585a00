r"""Log evidence by adaptive quadrature, for one or two latents of a datum.

Around each datum's highest mode, in axes along which it is round, a coordinate is stretched,

.. math:: u = c + A \sinh \tau, \qquad p(x) = \int p\bigl(x, u(\tau)\bigr)
          \, \lvert A \rvert \prod_i \cosh \tau_i \, d\tau,

so that all scales have room: tails that fall like a power of the distance fall exponentially in
:math:`\tau`. The plane of :math:`\tau` is cut into cells, and a cell is halved while its rule and
a weaker one on the same nodes differ, or while a point known to be high lies in it unseen.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import legendre
from torch import Tensor

from pyro_vae.diagnostics.modes import LogDensity, Search, search_modes
from pyro_vae.inference.programs import ProgramError, UnconstrainedModel

__all__ = ["Quadrature", "is_exact", "quadrature_columns"]

_DRAWS = 200  # of prior and of guide, for each of the two searches
_NODES = 15  # along each side of a cell
_GRADES = (-3.0, -1.5, 0.0, 1.5, 3.0)  # where the first cells meet
_FARTHEST = {torch.float64: 300.0, torch.float32: 80.0}  # largest tau that a number can hold
_NEGLIGIBLE = 45.0  # nats below the peak: e^-45 = 3e-20
_SLANTED = 0.8  # correlation of a mode's latents from which on the axes are turned
_UNSEEN = 1.0  # nats by which a known point may exceed all nodes of its cell
_ROWS = 40_000  # points times data evaluated at once


@dataclass(frozen=True)
class Quadrature:
    """Settings of the quadrature.

    Attributes:
        tolerance: Error in nats at which refinement stops.
        max_points: Evaluations of a datum's log joint at which it stops in any case.
    """

    tolerance: float = 1e-8
    max_points: int = 200_000

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise ValueError(f"tolerance is in nats and must be positive, not {self.tolerance!r}")
        if self.max_points < 10_000:
            raise ValueError(f"max_points must be at least 10000, not {self.max_points!r}")


def quadrature_columns(
    latent_model: UnconstrainedModel, settings: Quadrature
) -> dict[str, Float[Tensor, " batch"]]:
    """Log evidence of each datum by quadrature, with an estimate of its error in nats.

    Two independent searches look for modes, each by draws of the prior (and the guide), a scan of
    all scales, and optimises from the peaks among these. The error is what the rules of the cells
    differ by, what could hide where a known point is unseen, what the edge cuts off, rounding, and
    what the second search changed. It is infinite where no point of positive density was found.

    Raises:
        ProgramError: If a datum has more than two latents, or one that a mask switches off.
    """
    if latent_model.dim > 2:
        raise ProgramError(
            f"quadrature is for at most 2 latents per datum, and here are {latent_model.dim}; use "
            "method='annealed' or 'bridge'"
        )
    if not bool(latent_model.active.all()):
        raise ProgramError(
            "quadrature needs every latent to have a density, but a mask switches some off; leave "
            "those data out, or use method='annealed'"
        )
    log_density = partial(_log_joint, latent_model)
    first, second = (search_modes(log_density, _draws(latent_model)) for _ in range(2))
    frame = _frame_around(first, _FARTHEST[latent_model.like.dtype])
    cells = _Cells(log_density, frame, _reach(log_density, frame, (first, second)))
    rounding = _rounding(latent_model, frame, first)
    cells.watch(first)
    cells.refine(settings, rounding)
    alone = cells.log_total()
    cells.watch(second)
    cells.refine(settings, rounding)
    value = cells.log_total()
    # What one search missed that the other found, they may both miss, and more of it.
    error = cells.error() + rounding + 4 * (value - alone).abs()
    return {
        "log_evidence": value,
        "quadrature_error": torch.where(value.isfinite() & ~error.isnan(), error, math.inf),
    }


def is_exact(columns: Mapping[str, Float[Tensor, " batch"]]) -> bool:
    """Whether every datum's error is a millionth of its number (or of a nat), or less."""
    room = 1e-6 * (1 + columns["log_evidence"].abs())
    return bool((columns["quadrature_error"] <= room).all()) and bool(room.isfinite().all())


def _draws(latent_model: UnconstrainedModel) -> Float[Tensor, "draws batch dim"]:
    starts = ["prior", "guide"] if latent_model.has_guide else ["prior"]
    return torch.cat([latent_model.draw(_DRAWS, start) for start in starts]).double()


def _log_joint(latent_model: UnconstrainedModel, u: Float[Tensor, "points batch dim"]) -> Tensor:
    """Log joints; nan where they are not defined, as where a positive latent rounds to zero."""
    step = max(2, _ROWS // u.shape[1])
    values = torch.cat(
        [_evaluated(latent_model, part.to(latent_model.like)) for part in u.split(step)]
    )
    return torch.where(values == math.inf, math.nan, values)


def _evaluated(latent_model: UnconstrainedModel, u: Tensor) -> Float[Tensor, "points batch"]:
    """Log joints; nan where a matrix of the program cannot be factorised."""
    try:
        return latent_model.log_density(u).double().detach()
    except torch.linalg.LinAlgError:
        if len(u) == 1:
            return torch.full(u.shape[:2], math.nan, dtype=torch.float64, device=u.device)
        return torch.cat([_evaluated(latent_model, half) for half in u.tensor_split(2)])


def _rounding(
    latent_model: UnconstrainedModel, frame: "_Frame", search: Search
) -> Float[Tensor, " batch"]:
    """Nats that the arithmetic itself may be off by."""
    width = frame.axes.norm(dim=1).amin(-1)
    far = (frame.center.norm(dim=-1) / width).clamp_max(1e300)
    high = search.log_density.amax(0).abs()
    return 16 * torch.finfo(latent_model.like.dtype).eps * (1 + high + far)


# --- coordinates ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """Coordinates of each datum: u = center + axes sinh(tau)."""

    center: Float[Tensor, "batch dim"]
    axes: Float[Tensor, "batch dim dim"]
    log_volume: Float[Tensor, " batch"]  # of the axes
    farthest: float

    def log_integrand(
        self, log_density: LogDensity, tau: Float[Tensor, "points batch dim"]
    ) -> Float[Tensor, "points batch"]:
        u = self.center + torch.einsum("bij,pbj->pbi", self.axes, tau.sinh())
        return log_density(u) + self.log_jacobian(tau)

    def log_jacobian(self, tau: Float[Tensor, "points batch dim"]) -> Float[Tensor, "points batch"]:
        size = tau.abs()
        return (size + torch.log1p((-2 * size).exp()) - math.log(2)).sum(-1) + self.log_volume

    def locate(self, u: Float[Tensor, "points batch dim"]) -> Float[Tensor, "points batch dim"]:
        shifted = (u - self.center)[..., None]
        return torch.linalg.solve(self.axes, shifted)[..., 0].asinh()

    def grain(
        self, search: Search, tau: Float[Tensor, "points batch dim"]
    ) -> Float[Tensor, "points batch dim"]:
        """How far in tau the density around each point of a search goes on, where that is known."""
        spread = torch.linalg.solve(self.axes, search.axes).norm(dim=-1)  # of each mode
        others = len(search.u) - search.points_around * len(spread)
        known = spread.repeat(search.points_around, 1, 1)
        return torch.cat([tau.new_ones(others, *tau.shape[1:]), known / tau[others:].cosh()])


def _frame_around(search: Search, farthest: float) -> _Frame:
    """Coordinates around the highest mode, in which no mode is a ridge that runs askew.

    They are those of the latents, where tails and independent latents run along them, unless a
    mode is too slanted for that: then the highest is round, and the axes those of the others.
    """
    best = search.log_peaks.argmax(0)[None, :, None]
    center = search.modes.gather(0, best.expand(1, *search.modes.shape[1:]))[0]
    axes = search.axes.gather(0, best[..., None].expand(1, *search.axes.shape[1:]))[0]
    weight = torch.softmax(search.log_peaks + torch.linalg.slogdet(search.axes).logabsdet, 0)
    weight = weight.nan_to_num(1.0)[..., None, None]  # where no point has a density
    widths = search.axes.norm(dim=-1, keepdim=True)
    unit = search.axes / widths
    slant = (weight * (unit @ unit.mT).tril(-1).abs()).sum((0, -1, -2))
    others = torch.linalg.solve(axes, search.axes)
    shape = (weight * _normalised(others @ others.mT)).sum(0) + 1e-3 * _normalised(axes.mT @ axes)
    turned = axes @ torch.linalg.eigh(shape).eigenvectors
    straight = torch.diag_embed(axes.norm(dim=-1))
    axes = torch.where((slant < _SLANTED)[:, None, None], straight, turned)
    return _Frame(center, axes, torch.linalg.slogdet(axes).logabsdet, farthest)


def _normalised(matrix: Tensor) -> Tensor:
    return matrix / matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _reach(
    log_density: LogDensity, frame: _Frame, searches: tuple[Search, ...]
) -> tuple[Float[Tensor, "batch dim 2"], Float[Tensor, " batch"]]:
    """How far the cells go below and above, and the log of what lies beyond, roughly."""
    dim = frame.center.shape[-1]
    high = torch.cat([s.log_density for s in searches])
    tau = torch.cat([frame.locate(s.u) for s in searches])
    peak = high + frame.log_jacobian(tau)
    top = peak.amax(0)
    known = (peak > top - _NEGLIGIBLE)[..., None]
    low = torch.where(known, tau, 0.0).amin(0)
    up = torch.where(known, tau, 0.0).amax(0)
    reach = torch.stack([-low, up], -1).add(1.0).clamp_min(4.0).clamp_max(frame.farthest)
    while True:
        at_edge = torch.stack(
            [
                torch.stack([_edge(log_density, frame, reach, i, side) for side in (0, 1)], -1)
                for i in range(dim)
            ],
            -2,
        )
        open_ends = (at_edge > (top - _NEGLIGIBLE)[:, None, None]) & (reach < frame.farthest)
        if not bool(open_ends.any()):
            break
        reach = torch.where(open_ends, 1.5 * reach, reach).clamp_max(frame.farthest)
    beyond = at_edge + reach.sum((-1, -2)).log()[:, None, None]
    return reach, beyond.flatten(1).logsumexp(1)


def _edge(
    log_density: LogDensity, frame: _Frame, reach: Tensor, axis: int, side: int
) -> Float[Tensor, " batch"]:
    """The highest of the integrand along one edge."""
    dim = frame.center.shape[-1]
    share = torch.linspace(0, 1, 33 if dim == 2 else 2).to(reach)[:, None, None]
    tau = -reach[..., 0] + share * (reach[..., 0] + reach[..., 1])
    tau[..., axis] = reach[:, axis, side] * (1 if side else -1)
    return frame.log_integrand(log_density, tau).nan_to_num(-math.inf, neginf=-math.inf).amax(0)


# --- cells ----------------------------------------------------------------------------------------


@cache
def _rule(dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes on [-1, 1], the weights of the rule, and by axis its differences to weaker ones.

    Gauss-Lobatto, whose nodes include the ends (what lies just across an edge is seen), against
    the two rules that leave out the middle node of an axis and the two beside it: of one degree,
    but not blind to the same errors.
    """
    inner = legendre.Legendre.basis(_NODES - 1).deriv().roots()
    x = np.concatenate([[-1.0], np.real(inner), [1.0]])
    weight = 2 / (_NODES * (_NODES - 1) * legendre.legval(x, np.eye(_NODES)[-1]) ** 2)
    middle = _NODES // 2
    less = np.stack(
        [weight - _rule_without(x, out) for out in ([middle], [middle - 1, middle + 1])]
    )
    if dim == 1:
        return torch.from_numpy(x[:, None]), torch.from_numpy(weight), torch.from_numpy(less[None])
    first = [np.outer(row, weight).flatten() for row in less]
    second = [np.outer(weight, row).flatten() for row in less]
    nodes = torch.cartesian_prod(*[torch.from_numpy(x)] * 2)
    both = torch.from_numpy(np.outer(weight, weight).flatten())
    return nodes, both, torch.from_numpy(np.array([first, second]))


def _rule_without(x: np.ndarray, out: list[int]) -> np.ndarray:
    """Weights of the rule on all nodes but some, exact for as many powers as it has nodes."""
    kept = np.delete(np.arange(len(x)), out)
    moments = np.zeros(len(kept))
    moments[0] = 2.0
    weights = np.zeros(len(x))
    weights[kept] = np.linalg.solve(legendre.legvander(x[kept], len(kept) - 1).T, moments)
    return weights


_OF_CELLS = (
    "low",
    "high",
    "log_integral",
    "log_rough",
    "log_top",
    "log_cut",
    "log_known",
    "grain",
)


class _Cells:
    """The cells of every datum, and what each holds; all logs are in nats.

    Every datum has as many cells as any other, each its own. Points that are known to be high are
    kept, and a cell must not overlook those that lie in it: ends of ascents and draws, and the
    highest nodes on each face, for what goes on across a face may fall between the nodes there.
    """

    def __init__(
        self, log_density: LogDensity, frame: _Frame, reach: tuple[Tensor, Tensor]
    ) -> None:
        self.log_density, self.frame = log_density, frame
        ends, self.log_beyond = reach
        self.points = 0
        self.low, self.high = _first_cells(ends)
        measured = self._measure(self.low, self.high)
        self.log_integral, self.log_rough, self.log_top, self.log_cut, faces = measured
        self.log_room = ends.sum(-1).log().sum(-1)
        self.log_known = torch.full_like(self.log_top, -math.inf)
        self.grain = torch.ones_like(self.low)
        self.known = faces
        self._notice(faces)

    def _measure(
        self, low: Tensor, high: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, "_Known"]:
        """Log integral, log difference of the rules by axis, and the highest nodes.

        These are the highest of all, of cells in which the integrand is not defined everywhere,
        and of each face.
        """
        offsets, weights, less = (part.to(low) for part in _rule(low.shape[-1]))
        half = (high - low) / 2
        tau = (low + half)[:, None] + offsets[None, :, None] * half[:, None]
        tau = torch.where(offsets[None, :, None] == 1, high[:, None], tau)  # exactly, as next door
        tau = torch.where(offsets[None, :, None] == -1, low[:, None], tau)
        flat = self.frame.log_integrand(self.log_density, tau.flatten(0, 1))
        values = flat.unflatten(0, tau.shape[:2])
        self.points += tau.shape[0] * tau.shape[1]
        undefined = values.isnan()
        values = torch.where(undefined, -math.inf, values)
        top = values.amax(1)
        cut = torch.where(undefined.any(1), top, -math.inf)
        relative = (values - torch.where(top.isfinite(), top, 0.0)[:, None]).exp()
        scale = top + half.log().sum(-1)
        integral = torch.einsum("p,kpb->kb", weights, relative)
        rough = torch.einsum("irp,kpb->kbir", less, relative).abs().sum(-1)
        faces = _highest_on_faces(offsets, tau, values, half)
        return scale + integral.log(), scale[..., None] + rough.log(), top, cut, faces

    def watch(self, search: Search) -> None:
        """Takes in points that cells must not overlook."""
        tau = self.frame.locate(search.u)
        height = search.log_density + self.frame.log_jacobian(tau)
        known = _Known(tau, height, self.frame.grain(search, tau))
        self._notice(known)
        self.known = self.known.joined(known)

    def _notice(self, known: "_Known") -> None:
        height, grain = known.highest_within(self.low, self.high)
        higher = height > self.log_known
        self.log_known = torch.where(higher, height, self.log_known)
        self.grain = torch.where(higher[..., None], grain, self.grain)

    def log_total(self) -> Float[Tensor, " batch"]:
        return self.log_integral.logsumexp(0)

    def _log_errors(self) -> Float[Tensor, "cells batch"]:
        """What each cell may be off by: the rules' difference, or what a known point stands for."""
        unseen = self.log_known > self.log_top + _UNSEEN
        hidden = self.log_known + (self.high - self.low).log().sum(-1)
        hidden = torch.where(unseen, hidden, -math.inf)
        return torch.logaddexp(self.log_rough.logsumexp(-1), hidden)

    def error(self) -> Float[Tensor, " batch"]:
        """The error of the log of the total, in nats.

        Where the integrand ceases to be defined, it may go on as high as it was.
        """
        cut = self.log_cut.amax(0) + self.log_room
        parts = torch.stack([self._log_errors().logsumexp(0), self.log_beyond, cut])
        share = (parts.logsumexp(0) - self.log_total()).exp()
        return torch.where(share < 1, -torch.log1p(-share.clamp_max(1.0)), math.inf)

    def refine(self, settings: Quadrature, rounding: Float[Tensor, " batch"]) -> None:
        """Halves cells until the error is within the tolerance, or the points are spent."""
        tolerance = rounding.clamp_min(settings.tolerance)
        each = 2 * len(_rule(self.low.shape[-1])[0])
        while True:
            errors, total = self._log_errors(), self.log_total()
            share = errors - total - tolerance.log()
            over = share.logsumexp(0) > 0
            much = (share > -math.log(len(share))) & over
            count = min(int(much.sum(0).max()), (settings.max_points - self.points) // each)
            if count < 1:
                return
            self._halve(torch.where(over, share, -math.inf).topk(count, dim=0).indices)

    def _halve(self, index: Tensor) -> None:
        """Puts the lower half of each cell in its place, and its upper half at the end."""
        wide = index[..., None].expand(*index.shape, self.low.shape[-1])
        low, high = self.low.gather(0, wide), self.high.gather(0, wide)
        rough = self.log_rough.gather(0, wide)
        unseen = self.log_known.gather(0, index) > self.log_top.gather(0, index) + _UNSEEN
        grains = ((high - low) / self.grain.gather(0, wide)).log()
        along = torch.where(unseen[..., None], grains, rough).argmax(-1, keepdim=True)
        split = torch.zeros_like(low, dtype=torch.bool).scatter(-1, along, True)
        middle = (low + high) / 2
        lower = (low, torch.where(split, middle, high))
        upper = (torch.where(split, middle, low), high)
        low, high = (torch.cat(pair) for pair in zip(lower, upper, strict=True))
        *measured, faces = self._measure(low, high)
        self.known = self.known.joined(faces)
        new = (low, high, *measured, *self.known.highest_within(low, high))
        for name, value in zip(_OF_CELLS, new, strict=True):
            old, count = getattr(self, name), len(index)
            where = wide if old.dim() == 3 else index
            setattr(self, name, torch.cat([old.scatter(0, where, value[:count]), value[count:]]))
        self._notice(faces)


@dataclass(frozen=True)
class _Known:
    """Points that cells must not overlook, in tau, and how finely the integrand varies there."""

    tau: Float[Tensor, "points batch dim"]
    height: Float[Tensor, "points batch"]
    grain: Float[Tensor, "points batch dim"]

    def joined(self, other: "_Known") -> "_Known":
        return _Known(
            torch.cat([self.tau, other.tau]),
            torch.cat([self.height, other.height]),
            torch.cat([self.grain, other.grain]),
        )

    def highest_within(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Height and grain of the highest point in each cell."""
        heights, grains = [], []
        rows = max(1, 2_000_000 // self.height.numel())
        for lower, upper in zip(low.split(rows), high.split(rows), strict=True):
            inside = ((self.tau >= lower[:, None]) & (self.tau <= upper[:, None])).all(-1)
            best = torch.where(inside, self.height, -math.inf).max(1)
            index = best.indices[..., None].expand(*best.indices.shape, low.shape[-1])
            heights.append(best.values)
            grains.append(self.grain.gather(0, index))
        return torch.cat(heights), torch.cat(grains)


def _highest_on_faces(
    offsets: Tensor, tau: Float[Tensor, "cells nodes batch dim"], values: Tensor, half: Tensor
) -> _Known:
    """The highest node on each face of each cell, which is as fine as the cell."""
    points, heights = [], []
    for axis in range(tau.shape[-1]):
        for end in (-1, 1):
            on_face = offsets[:, axis] == end
            best = values[:, on_face].max(1, keepdim=True)
            index = best.indices[..., None].expand(*best.indices.shape, tau.shape[-1])
            points.append(tau[:, on_face].gather(1, index)[:, 0])
            heights.append(best.values[:, 0])
    return _Known(torch.cat(points), torch.cat(heights), half.repeat(len(points), 1, 1))


def _first_cells(reach: Float[Tensor, "batch dim 2"]) -> tuple[Tensor, Tensor]:
    """The cells to begin with: fine around the mode, one on each side beyond."""
    grades = torch.tensor(_GRADES).to(reach)
    inner = grades[:, None, None].expand(-1, *reach.shape[:2])
    marks = torch.cat([-reach[None, ..., 0], inner, reach[None, ..., 1]])
    dim, count = reach.shape[1], len(marks) - 1
    index = torch.cartesian_prod(*[torch.arange(count)] * dim).reshape(-1, dim)
    low = torch.stack([marks[index[:, i], :, i] for i in range(dim)], -1)
    high = torch.stack([marks[index[:, i] + 1, :, i] for i in range(dim)], -1)
    return low, high
