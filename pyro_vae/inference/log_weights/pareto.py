r"""How far the tail of the importance weights can be trusted: the Pareto k-hat of each datum."""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

__all__ = ["ParetoTail", "khat_threshold", "pareto_khat", "pareto_tail", "smoothed_log_weights"]

_ROWS = 256  # data fitted at once; bounds memory
_PRIOR = 10  # draws that the prior of PSIS on the shape, centred at 1/2, counts for


class ParetoTail(NamedTuple):
    """The generalised Pareto distribution fitted to the largest weights of each datum.

    Weights are counted in units of the largest one of the datum.
    """

    khat: Float64[Tensor, " batch"]
    """Its shape; see `pareto_khat` for the values where there is no fit."""
    khat_se: Float64[Tensor, " batch"]
    """Standard error of the shape; nan where it was not fitted."""
    scale: Float64[Tensor, " batch"]
    """Its scale; nan where it was not fitted."""
    log_cutoff: Float64[Tensor, " batch"]
    """Log of the weight above which the tail begins, in nats."""
    size: Int[Tensor, " batch"]
    """How many weights make the tail."""


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
    Zhang & Stephens with the weak prior of PSIS, as in ArviZ 0.23 (ArviZ 1 rounds the tail's size
    down, not up).

    Args:
        log_weights: In nats; a common constant does not matter.

    Returns:
        k-hat per datum in float64. -inf where all weights, or all that would make the tail, are
        equal up to rounding (there is no tail; those of discrete latents have such ties), +inf
        where fewer than 5 draws make the tail or a weight is infinite, nan where one is nan.

    References:
        Vehtari et al. (2024), Pareto smoothed importance sampling, section 2.2; Zhang & Stephens
        (2009), A new and efficient estimation method for the generalized Pareto distribution,
        section 3.
    """
    return pareto_tail(log_weights).khat


def pareto_tail(log_weights: Float[Tensor, "particles batch"]) -> ParetoTail:
    r"""Fits the tail as `pareto_khat` does, and says how surely its shape is known.

    .. math:: \mathrm{se}(\hat k) = \frac{M}{M + 10} \cdot \frac{1 + k}{\sqrt M}

    is the standard error of the maximum likelihood estimate k from M weights, drawn towards 1/2 as
    the prior of PSIS draws k-hat. It is the scatter over repeated sets of draws only; that a tail
    of finite length looks lighter or heavier than it ends up to be is no part of it.

    Args:
        log_weights: In nats; a common constant does not matter.

    References:
        Smith (1987), Estimating tails of probability distributions, section 3 (the variance for
        k > -1/2, which is also used below); Vehtari et al. (2024), section 2.2.
    """
    rows = log_weights.detach().T.double()
    top = rows.amax(1, keepdim=True)
    shifted = rows - torch.where(top.isfinite(), top, 0.0)
    num_particles = shifted.shape[1]
    size = math.ceil(min(num_particles / 5, 3 * math.sqrt(num_particles)))
    khat, scale = (torch.full_like(top[:, 0], value) for value in (math.inf, math.nan))
    khat[rows.isnan().any(1)] = math.nan
    khat[(rows == -math.inf).all(1)] = math.nan
    if num_particles <= size:
        return ParetoTail(khat, scale, scale.clone(), scale.clone(), torch.zeros_like(khat).long())
    tails = shifted.sort(1).values[:, -size - 1 :]
    cutoff = tails[:, :1].clamp_min(math.log(np.finfo(float).tiny))
    counts = (tails > cutoff).sum(1)
    rounding = 100 * torch.finfo(log_weights.dtype).eps * (1 + top[:, 0].abs())
    # A tail of ties is no tail: the weights are bounded by a value that many draws have.
    least = tails[:, 0] if size > 4 else shifted.amin(1)
    equal = top[:, 0].isfinite() & (-least < rounding.clamp_min(1e-10))
    khat[equal] = -math.inf
    usable = top[:, 0].isfinite() & (counts > 4) & ~equal
    excess = tails.exp() - cutoff.exp()
    for count in counts[usable].unique().tolist():  # ties and underflow make some tails shorter
        which = torch.nonzero(usable & (counts == count))[:, 0]
        for chunk in which.split(_ROWS):
            khat[chunk], scale[chunk] = _fit_tail(excess[chunk, -count:])
    return ParetoTail(khat, _khat_se(khat, counts), scale, cutoff[:, 0], counts)


def smoothed_log_weights(
    log_weights: Float[Tensor, "particles batch"], tail: ParetoTail
) -> Float64[Tensor, "particles batch"]:
    r"""Replaces the largest weights of each datum by quantiles of their fitted distribution.

    None becomes larger than the largest was. Weights without a fit stay as they are.

    Args:
        log_weights: In nats.
        tail: From `pareto_tail` of the same weights.

    Returns:
        Log weights in float64 whose exponentials sum to 1 for each datum.

    References:
        Vehtari et al. (2024), Pareto smoothed importance sampling, algorithm 1.
    """
    weights = log_weights.detach().double()
    weights = weights - weights.amax(0)
    for column in torch.nonzero(tail.khat.isfinite())[:, 0].tolist():
        size, k = int(tail.size[column]), tail.khat[column]
        largest = weights[:, column].topk(size).indices.flip(0)
        levels = (torch.arange(size).to(weights) + 0.5) / size
        excess = -torch.log1p(-levels)
        excess = tail.scale[column] * (excess if k == 0 else torch.expm1(k * excess) / k)
        smoothed = torch.log(excess + tail.log_cutoff[column].exp())
        weights[largest, column] = smoothed.clamp_max(0.0)
    return weights - weights.logsumexp(0)


def _khat_se(
    khat: Float64[Tensor, " batch"], size: Int[Tensor, " batch"]
) -> Float64[Tensor, " batch"]:
    k = ((size + _PRIOR) * khat - _PRIOR * 0.5) / size  # as it was without the prior
    se = size.double().sqrt() / (size + _PRIOR) * (1 + k.clamp_min(-0.5))
    return torch.where(khat.isfinite(), se, math.nan)


def _fit_tail(
    tail: Float64[Tensor, "rows tail"],
) -> tuple[Float64[Tensor, " rows"], Float64[Tensor, " rows"]]:
    """Shape and scale of the generalised Pareto distribution of sorted excesses."""
    size = tail.shape[1]
    grid = 30 + int(size**0.5)
    quartile = tail[:, int(size / 4 + 0.5) - 1, None]
    steps = torch.arange(1, grid + 1, dtype=torch.float64, device=tail.device) - 0.5
    b = (1 - (grid / steps).sqrt()) / (3 * quartile) + 1 / tail[:, -1:]
    k = torch.log1p(-b[:, :, None] * tail[:, None, :]).mean(2)
    profile = size * (torch.log(-b / k) - k - 1)
    weights = 1 / (profile[:, None, :] - profile[:, :, None]).exp().sum(2)
    weights = torch.where(weights >= 10 * np.finfo(float).eps, weights, 0.0)
    b_mean = (b * weights).sum(1) / weights.sum(1)
    k_mean = torch.log1p(-b_mean[:, None] * tail).mean(1)
    return (size * k_mean + _PRIOR * 0.5) / (size + _PRIOR), -k_mean / b_mean
