r"""Distances in latent space as the decoder sees them: curves, their lengths, shortest paths.

A decoder f bends the latent space. What a step dz changes in the data is its length under the
pulled-back metric

.. math:: G(z) = J_f(z)^\top J_f(z), \qquad
          L[\gamma] = \int_0^1 \sqrt{\dot\gamma^\top G(\gamma)\, \dot\gamma}\, dt
                    = \int_0^1 \Bigl\lVert \tfrac{d}{dt} f(\gamma(t)) \Bigr\rVert\, dt ,

so lengths are in the data's own units and need no Jacobian: they are lengths in data space of the
decoded curve. A decoder is any function from (*batch, latent) to (*batch, features).
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_vae.results import Result, label, make_result, sha256_of

__all__ = [
    "Decoder",
    "curve_energy",
    "curve_length",
    "magnification",
    "pulled_back_metric",
    "shortest_path",
    "straight_path",
]

Decoder = Callable[[Tensor], Tensor]

_TOLERANCE = 1e-9  # of the energy: less is no gain
_REFINEMENTS = (5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610)  # chords for each side of a polygon
_LENGTH_TOLERANCE = 1e-4  # of the length of a curve


def pulled_back_metric(
    decoder: Decoder, z: Float[Tensor, "batch latent"]
) -> Float[Tensor, "batch latent latent"]:
    r"""The metric :math:`J^\top J` of the decoder at each row of z, in squared units of the data.

    Args:
        decoder: Works row by row (no batch normalisation), twice differentiable by autograd.
        z: The codes.

    References:
        Arvanitidis, Hansen & Hauberg (2018), Latent space oddity: on the curvature of deep
        generative models, arXiv:1710.11379; Chen et al.
        (2018), Metrics for deep generative models, arXiv:1711.01204.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        decoded = decoder(z)
        # J^T u is linear in u, so its derivative by u gives the columns of J: as many passes as
        # there are latents, not features.
        u = torch.zeros_like(decoded, requires_grad=True)
        (pulled,) = torch.autograd.grad(decoded, z, u, create_graph=True)
        columns = [
            torch.autograd.grad(pulled[:, i].sum(), u, retain_graph=True)[0]
            for i in range(z.shape[1])
        ]
    jacobian = torch.stack(columns, dim=-1)
    return jacobian.mT @ jacobian


def magnification(decoder: Decoder, z: Float[Tensor, "batch latent"]) -> Float[Tensor, " batch"]:
    r"""The volume in data space of a unit of latent space, :math:`\sqrt{\det G(z)}`.

    References:
        Bishop, Svensen & Williams (1997), Magnification factors for the GTM algorithm.
    """
    return pulled_back_metric(decoder, z).det().clamp_min(0).sqrt()


def straight_path(
    start: Float[Tensor, "*batch latent"], end: Float[Tensor, "*batch latent"], num_points: int
) -> Float[Tensor, "*batch points latent"]:
    """Points at even steps of the latent space, both ends included."""
    share = torch.linspace(0, 1, num_points, dtype=start.dtype, device=start.device)[:, None]
    return torch.lerp(start[..., None, :], end[..., None, :], share)


def curve_length(
    decoder: Decoder,
    points: Float[Tensor, "*batch points latent"],
    *,
    tolerance: float = _LENGTH_TOLERANCE,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """The length in data space of the decoded polygon, in the data's own units, and its error.

    Sums of chords lie below the length. Each side is cut into more and more chords until three
    sums agree, and the last two are extrapolated as if they fell short by a part that falls with
    the square of their number (Richardson). The numbers follow Fibonacci, so that a ripple of the
    decoder which vanishes at one of them shows at the next.

    Args:
        decoder: The decoder.
        points: The corners of each polygon.
        tolerance: Of the error, as a part of the length. A curve that does not get there with 610
            chords a side keeps its larger error.

    Returns:
        Length and error, twice the range of the last three sums: far too large for a smooth
        decoder, and enough where it has kinks, past which nothing is gained by extrapolation.
    """
    found = [
        _length(decoder, polygon, tolerance) for polygon in points.reshape(-1, *points.shape[-2:])
    ]
    lengths, errors = torch.tensor(found, dtype=points.dtype, device=points.device).unbind(1)
    return lengths.reshape(points.shape[:-2]), errors.reshape(points.shape[:-2])


def _length(
    decoder: Decoder, polygon: Float[Tensor, "points latent"], tolerance: float
) -> tuple[float, float]:
    sums: list[float] = []
    error = float("inf")
    for refine in _REFINEMENTS:
        sums.append(float(_chords(decoder, polygon, refine)))
        if len(sums) > 2:
            error = 2 * (max(sums[-3:]) - min(sums[-3:]))
            if error <= tolerance * sums[-1]:
                break
    ratio = _REFINEMENTS[len(sums) - 1] / _REFINEMENTS[len(sums) - 2]
    return sums[-1] + (sums[-1] - sums[-2]) / (ratio**2 - 1), error


def _chords(
    decoder: Decoder, points: Float[Tensor, "*batch points latent"], refine: int
) -> Float[Tensor, "*batch"]:
    """The sum of the chords of a decoded polygon, `refine` of them for each side."""
    return _steps(decoder, _refined(points, refine)).square().sum(-1).sqrt().sum(-1)


def curve_energy(
    decoder: Decoder, points: Float[Tensor, "*batch points latent"]
) -> Float[Tensor, "*batch"]:
    r"""The discrete energy :math:`\frac T2 \sum_t \lVert f(z_{t+1}) - f(z_t) \rVert^2` of T steps.

    By Cauchy and Schwarz it is at least half the squared sum of the chords, and equal to it where
    all chords have one length: what minimises the energy is a shortest path run through at
    constant speed.

    References:
        Shao, Kumar & Fletcher (2018), The Riemannian geometry of deep generative models,
        arXiv:1711.08014.
    """
    steps = _steps(decoder, points)
    return 0.5 * steps.shape[-2] * steps.square().sum((-2, -1))


def _steps(
    decoder: Decoder, points: Float[Tensor, "*batch points latent"]
) -> Float[Tensor, "*batch steps features"]:
    return decoder(points).diff(dim=-2)


def _refined(
    points: Float[Tensor, "*batch points latent"], refine: int
) -> Float[Tensor, "*batch more latent"]:
    share = torch.arange(refine, dtype=points.dtype, device=points.device)[:, None] / refine
    inner = torch.lerp(points[..., :-1, None, :], points[..., 1:, None, :], share)
    return torch.cat([inner.flatten(-3, -2), points[..., -1:, :]], dim=-2)


def shortest_path(
    decoder: Decoder,
    start: Float[Tensor, "pairs latent"],
    end: Float[Tensor, "ends latent"],
    num_points: int = 32,
    *,
    through: Float[Tensor, "codes latent"] | None = None,
    num_neighbors: int = 8,
    max_steps: int = 500,
) -> Result:
    r"""Finds short curves between pairs of codes under the metric that the decoder pulls back.

    The points between the ends move until the discrete energy (`curve_energy`) is least, by
    L-BFGS. What it finds is the nearest minimum of its first guess, which is the straight line;
    with `through` also the shortest way through a graph of codes, and the shorter result is kept.

    Args:
        decoder: Differentiable; in float64 where the last digits matter.
        start: Codes where paths start.
        end: Codes where they end.
        num_points: Points of each path, ends included; at least 3.
        through: Codes, such as those of the training data, for the second guess: a search that
            starts at the straight line stays there where the way around is as long on every side.
        num_neighbors: To how many others a code of the graph is joined.
        max_steps: Of L-BFGS for each path and guess.

    Returns:
        Lengths are in the data's own units:

        =======================  ===================  =====  =====================================
        name                     dims                 bound  meaning
        =======================  ===================  =====  =====================================
        `length`                 pair                 upper  of the path found, and so an upper
                                                             bound of the distance
        `straight_length`        pair                 exact  of the straight line, never shorter
        `length_error`           pair                 none   numerical error of `length`, see
                                                             `curve_length`
        `straight_length_error`  pair                 none   that of `straight_length`
        `chord`                  pair                 lower  distance of the two decoded ends, a
                                                             lower bound
        `points`                 pair, point, latent  none   codes along the path
        `straight_points`        pair, point, latent  none   codes along the straight line
        `guess`                  pair                 text   where the path came from: "straight",
                                                             "codes", or "none" where nothing was
                                                             shorter than the straight line
        `converged`              pair                 bool   whether the search came to an end
        =======================  ===================  =====  =====================================

    Raises:
        ValueError: If there are too few points, or shapes do not match.

    Note: the metric is that of the decoder's mean alone. It knows nothing of where data are, so a
        path may cross a region without data where the decoder happens to change little.

    References:
        Arvanitidis, Hansen & Hauberg (2018), arXiv:1710.11379; Chen et al. (2018),
        arXiv:1711.01204; Chen et al. (2019), Fast approximate geodesics for deep generative
        models, arXiv:1812.08284 (the graph).

    Example:
        >>> found = shortest_path(lambda z: 3 * z, torch.zeros(1, 2), torch.ones(1, 2))
        >>> round(float(found.length[0]), 4)
        4.2426
    """
    if num_points < 3:
        raise ValueError(f"a path has at least 3 points, ends included, not {num_points}")
    if start.shape != end.shape:
        raise ValueError(
            f"start has shape {tuple(start.shape)} and end {tuple(end.shape)}: pass a start and an "
            "end for each pair"
        )
    straight = straight_path(start.detach(), end.detach(), num_points)
    guesses = {"straight": straight}
    if through is not None:
        guesses["codes"] = _routed(decoder, straight, through.detach(), num_neighbors)
    candidates, converged = [straight], [torch.ones(len(straight), dtype=torch.bool)]
    for guess in guesses.values():
        relaxed = [_relax(decoder, path, max_steps) for path in guess]
        candidates.append(torch.stack([path for path, _ in relaxed]))
        converged.append(torch.tensor([done for _, done in relaxed]))
    with torch.no_grad():
        measured = [curve_length(decoder, paths) for paths in candidates]
        lengths, errors = (torch.stack(part) for part in zip(*measured, strict=True))
        chord = (decoder(end) - decoder(start)).square().sum(-1).sqrt()
    gained = lengths[1:].amin(0) < lengths[0] * (1 - 100 * torch.finfo(lengths.dtype).eps)
    best = torch.where(gained, lengths[1:].argmin(0) + 1, 0)
    pairs = torch.arange(len(straight))
    return _as_result(
        {
            "length": lengths[best, pairs],
            "length_error": errors[best, pairs],
            "straight_length": lengths[0],
            "straight_length_error": errors[0],
            "chord": chord,
        },
        {"points": torch.stack(candidates)[best, pairs], "straight_points": straight},
        np.array(["none", *guesses])[best.numpy()],
        torch.stack(converged)[best, pairs],
        {"num_points": num_points, "num_neighbors": num_neighbors, "max_steps": max_steps},
        sha256_of(start, end),
    )


def _relax(
    decoder: Decoder, path: Float[Tensor, "points latent"], max_steps: int
) -> tuple[Float[Tensor, "points latent"], bool]:
    """Moves the inner points of one path to less energy; whether that came to an end."""
    inner = len(path) - 2
    # In these sine waves, scaled, the energy of a linear decoder is equally curved in all
    # directions along the path; in the points themselves, up to the square of their number.
    k = torch.arange(1, inner + 1, dtype=path.dtype)
    waves = torch.sin(torch.pi * k[:, None] * k / (inner + 1))
    waves = waves / torch.sin(torch.pi * k / (2 * (inner + 1))) / (inner + 1)

    weights = torch.zeros_like(path[1:-1]).requires_grad_()

    def moved() -> Tensor:
        return path + torch.nn.functional.pad(waves @ weights, (0, 0, 1, 1))

    def energy() -> Tensor:
        value = curve_energy(decoder, moved())
        (weights.grad,) = torch.autograd.grad(value, weights)
        return value

    least = max(_TOLERANCE, 10 * torch.finfo(path.dtype).eps)
    least *= curve_energy(decoder, path).item()
    search = torch.optim.LBFGS(
        [weights],
        max_iter=max_steps,
        history_size=20,
        tolerance_grad=least,
        tolerance_change=least,
        line_search_fn="strong_wolfe",
    )
    with torch.enable_grad():
        search.step(energy)
    return moved().detach(), search.state[weights]["n_iter"] < max_steps


@torch.no_grad()
def _routed(
    decoder: Decoder,
    straight: Float[Tensor, "pairs points latent"],
    codes: Float[Tensor, "codes latent"],
    num_neighbors: int,
) -> Float[Tensor, "pairs points latent"]:
    """The shortest way of each pair through the graph of codes; straight where there is none."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import dijkstra
    from sklearn.neighbors import kneighbors_graph

    pairs, num_points = straight.shape[:2]
    nodes = torch.cat([straight[:, 0], straight[:, -1], codes.to(straight)])
    count = min(num_neighbors, len(nodes) - 1)
    edges = kneighbors_graph(nodes.double().numpy(), count).tocoo()
    one, other = (torch.as_tensor(side.astype(np.int64)) for side in (edges.row, edges.col))
    lengths = _chords(decoder, torch.stack([nodes[one], nodes[other]], dim=1), _REFINEMENTS[0])
    graph = coo_array((lengths.double().numpy(), (edges.row, edges.col)), edges.shape).tocsr()
    _, before = dijkstra(graph, directed=False, indices=np.arange(pairs), return_predecessors=True)
    paths = straight.clone()
    for i in range(pairs):
        way = [pairs + i]
        while way[0] != i and before[i, way[0]] >= 0:
            way.insert(0, int(before[i, way[0]]))
        if way[0] == i and len(way) > 1:
            paths[i] = _even(decoder, nodes[way], num_points)
    return paths


def _even(
    decoder: Decoder, corners: Float[Tensor, "corners latent"], num_points: int
) -> Float[Tensor, "points latent"]:
    """Points along a polygon at even steps of its length in data space."""
    fine = _refined(corners, _REFINEMENTS[0])
    lengths = _steps(decoder, fine).square().sum(-1).sqrt()
    run = np.concatenate([[0.0], lengths.double().cumsum(0).numpy()])
    at = np.linspace(0, run[-1], num_points)
    columns = [np.interp(at, run, column) for column in fine.double().numpy().T]
    return torch.as_tensor(np.stack(columns, axis=1)).to(corners)


def _as_result(
    lengths: dict[str, Float[Tensor, " pairs"]],
    paths: dict[str, Float[Tensor, "pairs points latent"]],
    guess: np.ndarray,
    converged: Bool[Tensor, " pairs"],
    config: dict[str, int],
    data_sha256: str,
) -> Result:
    about = {
        "length": ("upper", "length in data space of the shortest path found"),
        "length_error": ("none", "numerical error of the length"),
        "straight_length": ("exact", "length in data space of the straight line of codes"),
        "straight_length_error": ("none", "numerical error of the straight line's length"),
        "chord": ("lower", "distance of the two decoded ends"),
    }
    found = {
        name: ("pair", values, label(unit="none", reduction="none", bound=bound, description=text))
        for name, values in lengths.items()
        for bound, text in [about[name]]
    }
    corners = label(unit="none", reduction="none", bound="none", description="codes along the path")
    dims = ("pair", "point", "latent")
    return make_result(
        {
            **found,
            **{name: (dims, points, corners) for name, points in paths.items()},
            "guess": ("pair", guess, {}),
            "converged": ("pair", converged, {}),
        },
        function="shortest_path",
        config=config,
        seed=None,
        data_sha256=data_sha256,
        notes=[
            "the metric is that of the decoder's mean: it does not know where data are.",
            "a length is that of the best path found, up to its numerical error, and bounds the "
            "distance from above; a shorter path may exist.",
        ],
    )
