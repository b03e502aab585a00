r"""Normal distributions fitted to each datum's unnormalised posterior, in unconstrained space.

`batch_and_match` needs scores of the posterior and no learning rate; `match_moments` moves the
draws that a guide already made. Both work on all data at once.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_vae.inference.log_weights import pareto_khat
from pyro_vae.inference.tempered import Point

__all__ = [
    "Normal",
    "WeightedDraws",
    "batch_and_match",
    "match_moments",
    "match_scores",
    "weighted_normal",
]

_FULL = 1e8  # a step so large that what was before does not count


class Normal(NamedTuple):
    """A normal distribution of each datum.

    Attributes:
        loc: Its mean, `[batch, dim]`.
        chol: Lower Cholesky factor of its covariance, `[batch, dim, dim]`.
    """

    loc: Float[Tensor, "batch dim"]
    chol: Float[Tensor, "batch dim dim"]

    def draw(self, count: int) -> Float[Tensor, "count batch dim"]:
        """Independent draws from the global random stream."""
        noise = torch.randn(count, *self.loc.shape).to(self.loc)
        return self.from_noise(noise)

    def from_noise(self, noise: Float[Tensor, "count batch dim"]) -> Tensor:
        """Standard normal noise, shifted and scaled."""
        return self.loc + torch.einsum("nij,cnj->cni", self.chol, noise)

    def to_noise(self, u: Float[Tensor, "count batch dim"]) -> Tensor:
        """The noise that `from_noise` makes `u` of."""
        rest = (u - self.loc).movedim(0, -1)
        return torch.linalg.solve_triangular(self.chol, rest, upper=False).movedim(-1, 0)

    def log_prob(self, u: Float[Tensor, "count batch dim"]) -> Float[Tensor, "count batch"]:
        """Log density in nats."""
        half_log_det = self.chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        square = self.to_noise(u).square().sum(-1)
        return -0.5 * square - half_log_det - 0.5 * u.shape[-1] * math.log(2 * math.pi)


def weighted_normal(
    u: Float[Tensor, "count batch dim"],
    log_weights: Float[Tensor, "count batch"],
    *,
    shrink: bool = True,
) -> Normal:
    """Mean and covariance of weighted draws; of few effective draws, drawn towards the diagonal.

    Args:
        u: The draws.
        log_weights: Theirs.
        shrink: False for the covariance as it is, whose correlations may be all but one.
    """
    share = (log_weights - log_weights.logsumexp(0)).exp()
    loc = torch.einsum("cn,cni->ni", share, u)
    rest = u - loc
    covariance = torch.einsum("cn,cni,cnj->nij", share, rest, rest)
    ess = 1 / share.square().sum(0)
    keep = (ess / (ess + u.shape[-1] * shrink))[:, None, None]
    diagonal = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
    return Normal(loc, _cholesky(keep * covariance + (1 - keep) * diagonal))


def batch_and_match(
    target: Callable[[Tensor], Point], start: Normal, *, num_iterations: int = 40
) -> Normal:
    r"""Fits a normal distribution to each datum by matching scores; every update is closed form.

    With draws :math:`u_b \sim N(\mu, \Sigma)`, their scores :math:`g_b = \nabla \log p(x, u_b)`,
    means :math:`\bar u, \bar g` and covariances :math:`C, \Gamma`, and a step :math:`\lambda`,

    .. math:: \Sigma' U \Sigma' + \Sigma' = V, \quad
              U = \lambda \Gamma + \tfrac{\lambda}{1 + \lambda} \bar g \bar g^T, \quad
              V = \Sigma + \lambda C
                  + \tfrac{\lambda}{1 + \lambda} (\mu - \bar u)(\mu - \bar u)^T, \quad
              \mu' = \tfrac{1}{1 + \lambda} \mu
                  + \tfrac{\lambda}{1 + \lambda} (\Sigma' \bar g + \bar u).

    The normal distribution whose scores are the target's is its fixed point, so a normal target is
    met exactly.

    Args:
        target: Gives log density and gradient at `[count, batch, dim]`.
        start: Where to begin.
        num_iterations: Updates; each takes twice as many draws as there are latents, at least 16.

    Returns:
        The fitted distributions. A datum whose update is not finite keeps what it had.

    References:
        Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei & Saul (2024), Batch and match:
        black-box variational inference with a score-based divergence.
    """
    now, first = start, num_iterations // 3
    for iteration in range(num_iterations):
        now, _ = match_scores(target, now, max(iteration - first + 1, 0))
    return now


def match_scores(
    target: Callable[[Tensor], Point], now: Normal, shrinking: int, num_draws: int | None = None
) -> tuple[Normal, Float[Tensor, "count batch"]]:
    r"""One update of `batch_and_match`.

    Args:
        target: Gives log density and gradient at `[count, batch, dim]`.
        now: What is updated.
        shrinking: 0 for a full match, which finds the place, whatever the scales; from 1 on the
            number t of an update with the step :math:`\lambda = B D / t`, which averages noise.
        num_draws: B; twice as many as there are latents, at least 16, if None.

    Returns:
        The updated distributions, and log weights of the draws under what they were drawn from.
    """
    dim = now.loc.shape[-1]
    count = num_draws or max(16, 2 * dim)
    u = now.draw(count)
    point = target(u)
    step = count * dim / shrinking if shrinking else _FULL
    moved = _match(now, u, point.gradient.to(u), step)
    good = moved.loc.isfinite().all(-1) & moved.chol.isfinite().all(-1).all(-1)
    found = Normal(
        torch.where(good[:, None], moved.loc, now.loc),
        torch.where(good[:, None, None], moved.chol, now.chol),
    )
    return found, point.log_density.to(u) - now.log_prob(u)


def _match(now: Normal, u: Tensor, scores: Tensor, step: float) -> Normal:
    share = step / (1 + step)
    mean_u, mean_g = u.mean(0), scores.mean(0)
    # V = L L' and U = G' G are sums of squares, so their roots need no subtraction.
    each = math.sqrt(step / len(u))
    shift = math.sqrt(share) * (now.loc - mean_u)[:, None, :]
    chol = _lower(torch.cat([now.chol.mT, each * (u - mean_u).movedim(0, 1), shift], 1))
    g = torch.cat([each * (scores - mean_g).movedim(0, 1), math.sqrt(share) * mean_g[:, None]], 1)
    # S = L T L' turns the equation into T (G L)' (G L) T + T = I, so T has the vectors of G L.
    _, size, vectors = torch.linalg.svd(torch.nan_to_num(g @ chol), full_matrices=False)
    root = chol @ vectors.mT * (2 / (1 + (1 + 4 * size**2).sqrt())).sqrt()[:, None, :]
    score = (root @ (root.mT @ mean_g[..., None]))[..., 0]
    loc = (1 - share) * now.loc + share * (score + mean_u)
    return Normal(loc, _lower(root.mT))


def _lower(root: Float[Tensor, "batch rows dim"]) -> Float[Tensor, "batch dim dim"]:
    """The lower Cholesky factor of R' R, from R by a QR decomposition."""
    upper = torch.linalg.qr(torch.nan_to_num(root), mode="r").R
    return (upper * upper.diagonal(dim1=-2, dim2=-1).sign()[..., None]).mT


def _cholesky(covariance: Float[Tensor, "batch dim dim"]) -> Float[Tensor, "batch dim dim"]:
    """The factor; with what rounding needs added to the diagonal, and nan where it has none."""
    scale = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).sqrt()
    correlation = covariance / (scale[:, :, None] * scale[:, None, :])
    eye = torch.eye(covariance.shape[-1]).to(covariance)
    factor, fault = torch.linalg.cholesky_ex(correlation)
    if bool(fault.any()):
        second, again = torch.linalg.cholesky_ex(correlation + 1e-6 * eye)
        factor = torch.where(fault[:, None, None] > 0, second, factor)
        factor = factor.masked_fill(((fault > 0) & (again > 0))[:, None, None], math.nan)
    return scale[:, :, None] * factor


class WeightedDraws(NamedTuple):
    """Draws of each datum with what their weights are made of.

    Attributes:
        u: Unconstrained latents, `[count, batch, dim]`.
        log_joint: log p(x, u) in nats, `[count, batch]`.
        log_q: Log density of what drew them, `[count, batch]`.
    """

    u: Float[Tensor, "count batch dim"]
    log_joint: Float[Tensor, "count batch"]
    log_q: Float[Tensor, "count batch"]

    @property
    def log_weights(self) -> Float[Tensor, "count batch"]:
        """Log p(x, u) - log q(u), in nats; -inf where that is undefined."""
        return torch.nan_to_num(self.log_joint - self.log_q, nan=-math.inf, posinf=math.inf)


def match_moments(
    log_joint: Callable[[Tensor], Tensor],
    draws: WeightedDraws,
    *,
    enough: float,
    most_rounds: int = 10,
) -> WeightedDraws:
    r"""Moves draws by an affine map to the moments that their weights give them, while that helps.

    Each round tries the mean, then also each latent's spread, then the whole covariance, and keeps
    what lowers a datum's k-hat. The map :math:`u' = \mu' + A (u - \mu)` divides the density by
    :math:`|A|`.

    Args:
        log_joint: log p(x, u) at `[count, batch, dim]`.
        draws: To begin with.
        enough: The k-hat at which a datum is left as it is.
        most_rounds: Passes over the three maps at most.

    References:
        Paananen, Piironen, Buerkner & Vehtari (2021), Implicitly adaptive importance sampling,
        algorithm 1.
    """
    khat = pareto_khat(draws.log_weights)
    for _ in range(most_rounds):
        any_moved = False
        for kind in ("mean", "spread", "covariance"):
            if not bool((khat > enough).any()):
                return draws
            u, log_det = _moved(draws, kind)
            tried = WeightedDraws(u, log_joint(u), draws.log_q - log_det)
            new = pareto_khat(tried.log_weights)
            better = (khat > enough) & (new < khat)
            any_moved = any_moved or bool(better.any())
            draws, khat = _where(better, tried, draws), torch.where(better, new, khat)
        if not any_moved:
            break
    return draws


def _moved(draws: WeightedDraws, kind: str) -> tuple[Tensor, Float[Tensor, " batch"]]:
    plain = weighted_normal(draws.u, torch.zeros_like(draws.log_weights))
    aimed = weighted_normal(draws.u, draws.log_weights.clamp_max(1e300))
    rest = draws.u - plain.loc
    if kind == "mean":
        return aimed.loc + rest, torch.zeros_like(rest[0, :, 0])
    if kind == "spread":
        factor = (aimed.chol.square().sum(-1) / plain.chol.square().sum(-1)).sqrt()
        return aimed.loc + factor * rest, factor.log().sum(-1)
    log_det = aimed.chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_det = log_det - plain.chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return aimed.from_noise(plain.to_noise(draws.u)), log_det


def _where(which: Bool[Tensor, " batch"], new: WeightedDraws, old: WeightedDraws) -> WeightedDraws:
    return WeightedDraws(
        torch.where(which[:, None], new.u, old.u),
        torch.where(which, new.log_joint, old.log_joint),
        torch.where(which, new.log_q, old.log_q),
    )
