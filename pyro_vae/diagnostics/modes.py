"""Where a density of one or two unconstrained latents is high: draws, a scan of scales, ascent.

All data at once, and without gradients: a program may have none, and in so few dims a quadratic
through neighbouring points does as well.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["LogDensity", "Search", "search_modes"]

LogDensity = Callable[[Float[Tensor, "points batch dim"]], Float[Tensor, "points batch"]]

_RADII = 40  # of a scan of all scales, each 1.6 times the last, from a hundredth of the spread on
_DIRECTIONS = 8  # of that scan in two dims
_REACH = 9.0  # of the even scan, in spreads
_EVEN = {1: 64, 2: 12}  # points along each dim of it
_NEIGHBOURS = 4
_STARTS = {1: 64, 2: 32}  # ascents of each datum
_TURNS = 80  # of an ascent, at most
_STEEPEST = 1e6  # nats between neighbouring points that still count in a slope
_WHITENINGS = 30
_GRID = (-2.4, -1.2, 0.0, 1.2, 2.4)  # points around a mode, in units of its axes


@dataclass(frozen=True)
class Search:
    """What a search has seen of each datum's density.

    Attributes:
        u: Points: draws, scans, and last `points_around` points for each mode, by point and mode.
        log_density: There.
        modes: Ends of the ascents, some of them more than once.
        log_peaks: Log-density of the modes.
        axes: Of each mode, as columns: along them the density falls by half a nat in one unit.
    """

    u: Float[Tensor, "points batch dim"]
    log_density: Float[Tensor, "points batch"]
    modes: Float[Tensor, "modes batch dim"]
    log_peaks: Float[Tensor, "modes batch"]
    axes: Float[Tensor, "modes batch dim dim"]
    points_around: int


def search_modes(log_density: LogDensity, draws: Float[Tensor, "draws batch dim"]) -> Search:
    """Evaluates draws and a scan around them, and ascends from whatever is a peak among these.

    Distances and angles of the scan are from the global random stream, so that two searches are
    independent.
    """

    def defined(u: Tensor) -> Tensor:
        return log_density(u).nan_to_num(-math.inf, neginf=-math.inf)

    known = torch.cat([draws, _scan(draws)])
    values = defined(known)
    starts, radius = _peaks(known, values)
    index = starts[..., None].expand(*starts.shape, known.shape[-1])
    modes, peaks, radius = _ascend(
        defined, known.gather(0, index), values.gather(0, starts), radius
    )
    axes = _whitened_axes(defined, modes, peaks, radius)
    grid = torch.cartesian_prod(*[torch.tensor(_GRID)] * known.shape[-1]).to(known)
    around = modes + torch.einsum("kbij,pj->pkbi", axes, grid.reshape(-1, known.shape[-1]))
    tails = _tails(modes, peaks, axes)
    seen = torch.cat([tails, around.flatten(0, 1)])
    return Search(
        torch.cat([known, seen]),
        torch.cat([values, defined(seen)]),
        modes,
        peaks,
        axes,
        len(grid),
    )


def _tails(modes: Tensor, log_peaks: Tensor, axes: Tensor) -> Float[Tensor, "points batch dim"]:
    """Points on rays from the highest mode, along the coordinates and along its own axes."""
    best = log_peaks.argmax(0)[None, :, None]
    mode = modes.gather(0, best.expand(1, *modes.shape[1:]))[0]
    own = axes.gather(0, best[..., None].expand(1, *axes.shape[1:]))[0]
    unit = torch.eye(mode.shape[-1]).to(mode)
    steps = _rays(torch.cat([unit, -unit])).to(mode)
    along = torch.stack([torch.diag_embed(own.norm(dim=-1)), own])
    return mode + torch.einsum("abij,pj->apbi", along, steps).flatten(0, 1)


def _scan(draws: Float[Tensor, "draws batch dim"]) -> Float[Tensor, "points batch dim"]:
    """Points around the draws' median: an even grid, and rays over all scales."""
    dim = draws.shape[-1]
    center = draws.median(0).values
    spread = (draws - center).abs().median(0).values
    spread = torch.where(spread > 0, spread, 1e-6 * (1 + center.abs()))
    ticks = (torch.arange(_EVEN[dim]) + torch.rand(())) * (2 * _REACH / _EVEN[dim]) - _REACH
    even = torch.cartesian_prod(*[ticks] * dim).reshape(-1, dim)
    if dim == 1:
        directions = torch.tensor([[1.0], [-1.0]])
    else:
        angles = (torch.arange(_DIRECTIONS) + torch.rand(())) * (2 * math.pi / _DIRECTIONS)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
    steps = torch.cat([even, _rays(directions)]).to(draws)
    return center + spread * steps[:, None]


def _rays(directions: Float[Tensor, "directions dim"]) -> Float[Tensor, "points dim"]:
    """Points on rays, at distances from a hundredth to about a million."""
    radii = 0.01 * 1.6 ** (torch.arange(_RADII) + torch.rand(()))
    return (radii[:, None, None] * directions).flatten(0, 1)


def _peaks(
    u: Float[Tensor, "points batch dim"], log_density: Float[Tensor, "points batch"]
) -> tuple[Int[Tensor, "starts batch"], Float[Tensor, "starts batch"]]:
    """The highest points that no neighbour exceeds, and how far their neighbours are."""
    near = _on_a_line if u.shape[-1] == 1 else _in_a_plane
    found = []
    for datum in range(u.shape[1]):
        value = log_density[:, datum]
        neighbours, distance = near(u[:, datum])
        peak = value >= value[neighbours].amax(1)
        order = (
            torch.where(peak, value, -math.inf).topk(min(_STARTS[u.shape[-1]], len(value))).indices
        )
        found.append((order, distance[order]))
    starts, radius = (torch.stack(columns, -1) for columns in zip(*found, strict=True))
    return starts, radius.clamp_min(torch.finfo(u.dtype).tiny)


def _on_a_line(
    u: Float[Tensor, "points 1"],
) -> tuple[Int[Tensor, "points neighbours"], Float[Tensor, " points"]]:
    """The neighbours on both sides of each point, and how far the farther one is."""
    order = u[:, 0].argsort()
    sides = torch.stack([order.roll(1), order.roll(-1)], -1)
    sides[0, 0], sides[-1, 1] = order[1], order[-2]
    neighbours = torch.empty_like(sides)
    neighbours[order] = sides
    return neighbours, (u[neighbours][..., 0] - u).abs().amax(1)


def _in_a_plane(
    u: Float[Tensor, "points 2"],
) -> tuple[Int[Tensor, "points neighbours"], Float[Tensor, " points"]]:
    near = torch.cdist(u, u).topk(_NEIGHBOURS + 1, largest=False)
    return near.indices, near.values.amax(1)


def _stencil(dim: int, like: Tensor) -> Float[Tensor, "points dim"]:
    """Steps up and down each axis, and one along both, from which a quadratic is found."""
    unit = torch.eye(dim).to(like)
    return torch.cat([unit, -unit] + ([unit.sum(0, keepdim=True)] if dim == 2 else []))


def _quadratic(
    rise: Float[Tensor, "points *batch"], dim: int
) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch dim dim"]]:
    """Slope and curvature from the rise to the points of the stencil."""
    up, down = rise[:dim], rise[dim : 2 * dim]
    slope = ((up - down) / 2).movedim(0, -1)
    curvature = torch.diag_embed((up + down).movedim(0, -1))
    if dim == 2:
        mixed = rise[4] - up[0] - up[1]
        curvature = curvature + mixed[..., None, None] * (1 - torch.eye(2).to(rise))
    return slope, curvature


def _around(
    log_density: LogDensity, u: Tensor, axes: Tensor
) -> Float[Tensor, "points starts batch"]:
    """Log-density at the stencil around each of `u`, its steps the columns of `axes`."""
    steps = torch.einsum("...ij,pj->p...i", axes, _stencil(u.shape[-1], u))
    points = u + steps
    return log_density(points.flatten(0, 1)).unflatten(0, points.shape[:2])


def _ascend(
    log_density: LogDensity,
    u: Float[Tensor, "starts batch dim"],
    value: Float[Tensor, "starts batch"],
    radius: Float[Tensor, "starts batch"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Ascends to within a hundredth of a nat of a mode: points, log-densities and step lengths."""
    dim = u.shape[-1]
    identity = torch.eye(dim).to(u)
    done = value == -math.inf
    for _ in range(_TURNS):
        if bool(done.all()):
            break
        near = _around(log_density, u, radius[..., None, None] * identity)
        rise = _bounded(near - value)
        slope, curvature = _quadratic(rise, dim)
        step, gain = _newton(slope, curvature)
        ahead = u + radius[..., None] * step
        at = log_density(ahead)
        done = done | ((gain < 0.01) & (rise.abs().amax(0) < 1.0))
        steps = torch.cat(
            [_stencil(dim, u).unsqueeze(1).unsqueeze(1).expand(-1, *u.shape), step[None]]
        )
        best = torch.cat([near, at[None]]).max(0)
        better = (best.values > value) & ~done
        chosen = steps.gather(0, best.indices[None, ..., None].expand(1, *u.shape))[0]
        u = torch.where(better[..., None], u + radius[..., None] * chosen, u)
        value = torch.where(better, best.values, value)
        # The step length follows the steps that help, and shrinks where none does.
        factor = torch.where(better, chosen.norm(dim=-1).clamp(0.25, 4.0), 0.25)
        radius = torch.where(done, radius, radius * factor)
    return u, value, radius


def _newton(slope: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """The step to the top of a quadratic, at most four units long, and what it gains there."""
    values, vectors = torch.linalg.eigh(-curvature)
    along = torch.einsum("...ji,...j->...i", vectors, slope)
    size = values.abs().clamp_min(1e-12)
    moved = along / size
    gain = (along * moved).sum(-1) / 2
    step = torch.einsum("...ij,...j->...i", vectors, moved)
    length = step.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    return step * (4 / length).clamp_max(1.0), gain


def _whitened_axes(
    log_density: LogDensity,
    modes: Float[Tensor, "modes batch dim"],
    log_peaks: Float[Tensor, "modes batch"],
    radius: Float[Tensor, "modes batch"],
) -> Float[Tensor, "modes batch dim dim"]:
    """Axes around each mode along which the density falls by about half a nat in one unit."""
    dim = modes.shape[-1]
    axes = radius[..., None, None] * torch.eye(dim).to(modes)
    for _ in range(_WHITENINGS):
        rise = _bounded(_around(log_density, modes, axes) - log_peaks)
        # Of an edge or a skew mode the wide side: what is narrow there, cells find out.
        wide = torch.maximum(rise[:dim], rise[dim : 2 * dim])
        values, vectors = torch.linalg.eigh(
            -_quadratic(torch.cat([wide, wide, rise[2 * dim :]]), dim)[1]
        )
        scale = values.clamp(1 / 16, 64.0)
        axes = axes @ (vectors * scale.rsqrt()[..., None, :]) @ vectors.mT
        if bool(((scale.log().abs() < 0.3).all(-1) | (log_peaks == -math.inf)).all()):
            break
    return axes


def _bounded(rise: Tensor) -> Tensor:
    """Differences of log-densities in which an infinite one is merely very steep."""
    return rise.nan_to_num(0.0, _STEEPEST, -_STEEPEST).clamp(-_STEEPEST, _STEEPEST)
