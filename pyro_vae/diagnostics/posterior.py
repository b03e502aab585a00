r"""How far the tail of the importance weights can be trusted: the Pareto k-hat of each datum."""

import math

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

__all__ = ["khat_threshold", "pareto_khat"]

_ROWS = 256  # data fitted at once; bounds memory


def khat_threshold(num_particles: int) -> float:
    r"""The k-hat above which an importance estimate is not to be trusted, min(1 - 1/log10 S, 0.7).

    References:
        Vehtari, Simpson, Gelman, Yao & Gabry (2024), Pareto smoothed importance sampling, section
        3.
    """
    return min(1 - 1 / math.log10(max(num_particles, 2)), 0.7)


def pareto_khat(log_weights: Float[Tensor, "particles batch"]) -> Float64[Tensor, " batch"]:
    r"""Fits a generalised Pareto distribution to the largest weights of each datum.

    The tail is the min(S/5, 3 sqrt(S)) largest weights, and the fit is the quasi-Bayesian one of
    Zhang & Stephens
    with the weak prior of PSIS, as in ArviZ 0.23 (ArviZ 1 rounds the tail's size down, not up).

    Args:
        log_weights: In nats; a common constant does not matter.

    Returns:
        k-hat per datum in float64. -inf where all weights are equal (there is no tail), +inf where
        fewer than 5
        draws make the tail or a weight is infinite, nan where one is nan.

    References:
        Vehtari et al. (2024), Pareto smoothed importance sampling, section 2.2; Zhang & Stephens
        (2009), A new and
        efficient estimation method for the generalized Pareto distribution, section 3.
    """
    rows = log_weights.detach().T.double()
    top = rows.amax(1, keepdim=True)
    shifted = rows - torch.where(top.isfinite(), top, 0.0)
    num_particles = shifted.shape[1]
    size = math.ceil(min(num_particles / 5, 3 * math.sqrt(num_particles)))
    khat = torch.full((len(rows),), math.inf, dtype=torch.float64)
    khat[rows.isnan().any(1)] = math.nan
    khat[(rows == -math.inf).all(1)] = math.nan
    if num_particles <= size:
        return khat
    tails = shifted.sort(1).values[:, -size - 1 :]
    cutoff = tails[:, :1].clamp_min(math.log(np.finfo(float).tiny))
    counts = (tails > cutoff).sum(1)
    usable = top[:, 0].isfinite() & (counts > 4)
    excess = tails.exp() - cutoff.exp()
    for count in counts[usable].unique().tolist():  # ties and underflow make some tails shorter
        which = torch.nonzero(usable & (counts == count))[:, 0]
        for chunk in which.split(_ROWS):
            khat[chunk] = _fit_tail(excess[chunk, -count:])
    equal = top[:, 0].isfinite() & (top[:, 0] - rows.amin(1) < 1e-10)
    khat[equal] = -math.inf
    return khat


def _fit_tail(tail: Float64[Tensor, "rows tail"]) -> Float64[Tensor, " rows"]:
    """Shape of the generalised Pareto distribution of sorted excesses (Zhang & Stephens 2009)."""
    size = tail.shape[1]
    grid = 30 + int(size**0.5)
    quartile = tail[:, int(size / 4 + 0.5) - 1, None]
    steps = torch.arange(1, grid + 1, dtype=torch.float64) - 0.5
    b = (1 - (grid / steps).sqrt()) / (3 * quartile) + 1 / tail[:, -1:]
    k = torch.log1p(-b[:, :, None] * tail[:, None, :]).mean(2)
    profile = size * (torch.log(-b / k) - k - 1)
    weights = 1 / (profile[:, None, :] - profile[:, :, None]).exp().sum(2)
    weights = torch.where(weights >= 10 * np.finfo(float).eps, weights, 0.0)
    b_mean = (b * weights).sum(1) / weights.sum(1)
    k_mean = torch.log1p(-b_mean[:, None] * tail).mean(1)
    return (size * k_mean + 10 * 0.5) / (size + 10)
