r"""How far the tail of the importance weights can be trusted, and what is lost beyond it.

The mean of K weights rests on the largest of them, and more so on larger ones that K draws happened
not to give. Errors from the spread of the weights seen are therefore too small. Here they come from
weights whose tail is continued by a fitted distribution: log-normal, and generalised Pareto where
there are draws enough to tell its shape, the Pareto k-hat of each datum.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from pyro_vae.inference.log_weights.draw import effective_sample_size, importance_bound
from pyro_vae.intervals import student_factor

__all__ = [
    "BoundError",
    "ParetoTail",
    "importance_bound_error",
    "khat_limit",
    "khat_threshold",
    "pareto_khat",
    "pareto_tail",
    "smoothed_log_weights",
    "tail_error",
    "tail_inflation",
]

_ROWS = 256  # data fitted at once; bounds memory
_PRIOR = 10  # draws that the prior of PSIS on the shape, centred at 1/2, counts for
_RARE = 0.05  # fitted tails end at the weight that so many sets of draws exceed
_LIMIT = 1.2816  # standard errors of k-hat to its upper 90 % limit
_SHAPE_ERRORS = 1.1  # by which the fitted tail is made heavier
_SD_ERRORS = 0.8  # of the sd of few log weights, by which it is raised
_NODES = 48  # of the quadrature over a fitted tail
_DEPTH = 36.0  # nats below the largest weight, where double precision no longer sees a weight
_MOST = 0.5  # nats; larger errors are a matter of the tail that is assumed


class BoundError(NamedTuple):
    """How surely an importance bound estimates the log of the mean weight, in nats."""

    se: Float64[Tensor, " batch"]
    """Root mean square error, noise and bias together."""
    bias: Float64[Tensor, " batch"]
    """Estimate of the bias: negative where larger weights are to be expected than were seen."""
    unseen: Float64[Tensor, " batch"]
    """The part of `se` that the spread of the weights seen does not show."""
    reliable: Bool[Tensor, " batch"]
    """Whether the error is small, and no tail beyond what was seen is to be feared."""


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


def khat_limit(tail: ParetoTail) -> Float64[Tensor, " batch"]:
    """What k-hat is below with 90 % probability: k-hat plus 1.28 of its standard errors.

    Draws that happened to miss the largest weights have a low k-hat and a low estimate together, so
    k-hat itself lets them pass. Where there is no fit it is k-hat as it is: -inf, inf or nan.
    """
    return torch.where(tail.khat.isfinite(), tail.khat + _LIMIT * tail.khat_se, tail.khat)


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
        Vehtari et al. (2024), Pareto smoothed importance sampling; Zhang & Stephens
        (2009), A new and efficient estimation method for the generalized Pareto distribution.
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
        Smith (1987), Estimating tails of probability distributions (the variance for
        k > -1/2, which is also used below); Vehtari et al. (2024).
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
        Vehtari et al. (2024), Pareto smoothed importance sampling.
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


# --- errors ---------------------------------------------------------------------------------------


def importance_bound_error(
    log_weights: Float[Tensor, "particles batch"], tail: ParetoTail | None = None
) -> BoundError:
    r"""The error of a log-mean-exp of few, heavy weights.

    With T the log mean and v the relative variance of weights whose largest min(K/2, 3 sqrt(K)) are
    replaced by a log-normal tail, fitted to them by least squares on a normal probability plot (for
    v its sd is raised by 0.8 of the standard error of a normal sd,
    :math:`\mathrm{sd} / \sqrt{2(K-1)}`),

    .. math:: \mathrm{se}^2 = t^2 \log(1 + v / K) + \mathrm{bias}^2, \qquad
              \mathrm{bias} = \log \tfrac1K \textstyle\sum_k w_k - T

    where t is the 97.5 % quantile of Student's t with K - 1 degrees of freedom, over that of the
    normal. log(1 + v/K) is the variance of the log of a log-normal mean; to first order it is v/K,
    the delta method. v is no less than that of the weights as they are, and with `tail` no less
    than that of their Pareto tail (see `tail_error`). So two standard errors hold
    95 % where log weights are normal or have a lighter upper tail (92 % and more of K = 16 up to a
    spread of 2 nats; the delta method holds 65 % there), and fewer where it is heavier.

    Args:
        log_weights: In nats.
        tail: From `pareto_tail` of the same weights. Leave it out where weights are near log-normal
            by construction, as those of annealing, sums over many steps, are.

    Returns:
        Error and bias, nan where fewer than two weights matter. An error is reliable if it is at
        most 0.5 nats and, with `tail`, `khat_limit` is at most `khat_threshold`.

    Note: of 16 normal log weights with an sd of 1 or 2 nats, 95 and 92 % hold, and of those called
        reliable (64 and 6 %) 92 and 31 %: an sd of 2 that looks like 1 is not told from it. Of 1000
        weights of a normal guide with a true k-hat of 0.6 or 0.9, 96 and 82 % hold, and of those
        called reliable (33 and 4 %) 88 and 1 %. `docs/errors.md` has the bands.

    Note: Weights say nothing of a region that was never visited. No error holds for every tail.

    References:
        Neal (2001), Annealed importance sampling, section 4 (errors where log weights are normal);
        Helsel & Cohn (1988), Estimation of descriptive statistics for multiply censored water
        quality data (regression on order statistics); Vehtari et al. (2024), section 3.
    """
    log_weights = log_weights.detach().double()
    count = len(log_weights)
    bound = importance_bound(log_weights)
    first = _lognormal_moments(log_weights, 1)
    wide_first, second = (_lognormal_moments(log_weights, power, raised=True) for power in (1, 2))
    seen = (1 / effective_sample_size(log_weights) - 1 / count).clamp_min(0) * _unbiased(count)
    continued = torch.expm1((second - 2 * wide_first).clamp(0, 700)) / count
    relative = torch.maximum(seen, continued)
    if tail is not None:
        relative = torch.maximum(
            relative, tail_error(torch.exp, log_weights - bound, tail).square()
        )
    bias = bound - first - log_weights.amax(0)
    se = (float(student_factor(count)) ** 2 * relative.log1p() + bias.square()).sqrt()
    reliable = se <= _MOST
    if tail is not None:
        reliable = reliable & (khat_limit(tail) <= khat_threshold(count))
    return BoundError(se, bias, (se.square() - seen).clamp_min(0).sqrt(), reliable)


def tail_error(
    influence: Callable[[Tensor], Tensor],
    log_ratio: Float64[Tensor, "particles batch"],
    tail: ParetoTail,
) -> Float64[Tensor, " batch"]:
    """Standard error of the mean of a function of the weights, its tail taken from the fit.

    The squares of the largest values are those of the fitted distribution at k-hat plus 1.1 of its
    standard errors (more would hold more often, and be twice too large where k-hat is 0.4), up to
    the weight that one in twenty sets of draws exceeds; but no less than those seen. Where there is
    no fit, they are those seen.

    Args:
        influence: The function, of the log of the ratio of a weight and the mean weight.
        log_ratio: Its arguments at the draws.
        tail: From `pareto_tail` of the same weights.
    """
    values = influence(log_ratio)
    centre = values.mean(0)
    squares = (values - centre).square()
    points, shares = _tail_points(tail)
    fitted = (influence(points + log_ratio.amax(0)) - centre).square()
    more = tail.size * (shares * fitted).sum(0) - (squares * _in_tail(log_ratio, tail)).sum(0)
    more = torch.where(more.isfinite(), more.clamp_min(0), 0.0)
    return ((squares.sum(0) + more) * _unbiased(len(values))).sqrt() / len(values)


def tail_inflation(
    log_weights: Float[Tensor, "particles batch"], tail: ParetoTail
) -> Float64[Tensor, "particles batch"]:
    """By how much the square of each draw's share in a weighted mean is to be raised.

    It is 1 below the tail, and in it the ratio of the mean squared weights fitted, as in
    `tail_error`, and seen; so it serves functions of a draw too, of whose own tail less is known.
    """
    log_weights = log_weights.detach().double()
    points, shares = _tail_points(tail)
    inside = _in_tail(log_weights, tail)
    seen = ((2 * (log_weights - log_weights.amax(0))).exp() * inside).sum(0)
    ratio = tail.size * (shares * (2 * points).exp()).sum(0) / seen
    return torch.where(inside & ratio.isfinite(), ratio.clamp_min(1.0), 1.0)


def _in_tail(
    log_weights: Float64[Tensor, "particles batch"], tail: ParetoTail
) -> Bool[Tensor, "particles batch"]:
    return log_weights - log_weights.amax(0) > tail.log_cutoff


def _tail_points(
    tail: ParetoTail,
) -> tuple[Float64[Tensor, "points batch"], Float64[Tensor, "points batch"]]:
    """Log weights along the fitted tail, in units of the largest, and their shares in it."""
    nodes, weights = (torch.from_numpy(a)[:, None] for a in np.polynomial.legendre.leggauss(_NODES))
    depth = (tail.size.double() / _RARE).log()  # of the survival function, in nats
    survival = (nodes.to(depth) + 1) / 2 * depth
    shares = weights.to(depth) * (-survival).exp()
    shape = tail.khat + _SHAPE_ERRORS * tail.khat_se
    shape = torch.where(shape.abs() < 1e-6, 1e-6, shape)
    points = tail.scale * torch.expm1(shape * survival) / shape + tail.log_cutoff.exp()
    return points.log(), shares / shares.sum(0)


def _lognormal_moments(
    log_weights: Float64[Tensor, "particles batch"], power: int, *, raised: bool = False
) -> Float64[Tensor, " batch"]:
    """Log moment of weights with a log-normal tail, in units of the largest; nan if it has none.

    The sd of the tail is that fitted, or raised by the standard error of a normal sd.
    """
    count = len(log_weights)
    size = min(max(math.ceil(min(count / 2, 3 * math.sqrt(count))), 2), count)
    shifted = log_weights - log_weights.amax(0)
    largest = shifted.topk(size, 0).values
    used = (largest > -_DEPTH).double()
    largest = largest.clamp_min(-_DEPTH)
    ranks = torch.arange(size, dtype=torch.float64, device=largest.device)
    normal = torch.special.ndtri((count - ranks - 0.375) / (count + 0.25))[:, None]
    number = used.sum(0)
    centred = normal - (used * normal).sum(0) / number
    slope = (used * centred * largest).sum(0) / (used * centred.square()).sum(0)
    level = (used * (largest - slope * normal)).sum(0) / number
    if raised and count > 1:
        slope = slope * (1 + _SD_ERRORS * (2 * (count - 1)) ** -0.5)
    start = torch.special.ndtri(1 - number / count)
    rest = (power * shifted).exp().sum(0) - (used * (power * largest).exp()).sum(0)
    inside = torch.special.log_ndtr(power * slope - start)
    tail = power * level + (power * slope).square() / 2 + inside
    return torch.logaddexp((rest.clamp_min(0) / count).log(), tail)


def _unbiased(count: int) -> float:
    return count / (count - 1) if count > 1 else math.nan


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
