r"""What importance weights say of a guide: corrected moments, divergences and total variation.

All of it is read off draws of the guide and their log weights, and is therefore blind to what the
guide never visits.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pyro_vae.inference.log_weights.draw import (
    effective_sample_size,
    elbo,
    importance_bound,
    mean_error,
)
from pyro_vae.inference.log_weights.pareto import (
    ParetoTail,
    importance_bound_error,
    khat_limit,
    khat_threshold,
    pareto_tail,
    smoothed_log_weights,
    tail_error,
    tail_inflation,
)

__all__ = ["weighted_columns"]

Columns = dict[str, Tensor]

_MOMENTS = 0.9  # upper limit of k-hat above which errors of sds fail; beyond 1 there is no mean
_SINGULAR = 1e-10  # share of the greatest variance below which a direction has none


def weighted_columns(
    draws: Float[Tensor, "draws batch dim"], log_weights: Float[Tensor, "draws batch"]
) -> Columns:
    r"""Every number of the posterior's quality that the log weights give.

    With w the weights and r = w / mean(w), so that E_q[r] = 1:

    .. math:: \mathrm{KL}(q \| p) = \log \mathbb E_q w - \mathbb E_q \log w, \quad
              \mathrm{KL}(p \| q) = \mathbb E_q[r \log r], \quad
              \mathrm{TV} = \mathbb E_q (1 - r)_+

    The total variation is the largest difference of the probabilities that q and p give to any
    event; the best classifier tells a draw of one from a draw of the other with probability
    (1 + TV) / 2. The moments are corrected with Pareto-smoothed weights, everything else takes the
    weights as they are: the evidence is then a lower bound in expectation.

    Returns:
        `khat`, `khat_moments` (the larger of it and the k-hats of :math:`w (z - m)^2`, on which
        corrected standard deviations rest), `widening` (the largest ratio of the weighted sd to
        that of q, over latents and directions), `ess`, `kl_guide_posterior`, `kl_posterior_guide`,
        `total_variation` of shape `[batch]`; `mean`, `sd` (of q), `corrected_mean`, `corrected_sd`
        in units of the latents,
        `mean_correction` (q's mean less the corrected one, in corrected sds) and
        `scale_correction` (log of the ratio of q's sd to the corrected one) of shape
        `[batch, dim]`. All but `ess`, `khat_moments` and `widening` with a standard error ``_se``,
        of the delta method, in which the fitted tail stands for the largest weights (see
        `pareto.tail_error`; of sds that of w (z - m)^2); those of the two corrections allow for
        both moments being of the same draws. `kl_guide_posterior_bias`, `error_reliable`: of
        `pareto.importance_bound_error`. Where that is False no error is to be relied upon;
        `moments_reliable` is False besides where the upper 90 % limit of `khat_moments` is above
        0.9, for `corrected_sd` and `scale_correction`, and `kl_posterior_guide_reliable` where that
        of the k-hat of r log r is above `khat_threshold`.

    Note: KL(p || q) is at most log(draws), however large it is in truth.
    """
    tail = pareto_tail(log_weights)  # in their own precision, of which it knows the rounding
    log_weights = log_weights.detach().double()
    smoothed = smoothed_log_weights(log_weights, tail).exp()
    draws = draws.detach().double()
    inflation = tail_inflation(log_weights, tail)
    squares = _tails_of_squares(draws, smoothed, log_weights, tail)
    moments = _moments(
        draws, smoothed, inflation, torch.maximum(inflation[..., None], squares.inflation)
    )
    divergences = _divergences(log_weights, tail)
    columns = {
        "khat": tail.khat,
        "khat_se": tail.khat_se,
        "khat_moments": squares.khat,
        "widening": _widening(draws, smoothed, moments["scale_correction"]),
        "ess": effective_sample_size(log_weights),
        "moments_reliable": divergences["error_reliable"] & (squares.limit <= _MOMENTS),
    }
    return columns | divergences | moments


class _Squares(NamedTuple):
    """The tails of w (z - m)^2, with m the weighted mean."""

    khat: Float64[Tensor, " batch"]
    """The largest over the latents, and no less than that of w itself."""
    limit: Float64[Tensor, " batch"]
    """The same of the upper limits."""
    inflation: Float64[Tensor, "draws batch dim"]
    """See `tail_inflation`."""


def _tails_of_squares(
    draws: Float64[Tensor, "draws batch dim"],
    smoothed: Float64[Tensor, "draws batch"],
    log_weights: Float64[Tensor, "draws batch"],
    tail: ParetoTail,
) -> _Squares:
    """Each side of m has a tail of its own.

    Of both together, draws of the light side lie just above the cutoff and make the heavy one look
    heavier.
    """
    count, data, dim = draws.shape
    rest = draws - draws[0]
    rest = rest - (smoothed[..., None] * rest).sum(0)
    products = log_weights[..., None] + rest.square().log()
    sides = torch.stack([torch.where(sign * rest > 0, products, -math.inf) for sign in (1, -1)], 1)
    sides = sides.reshape(count, -1)
    found = pareto_tail(sides)
    # Where weights are all equal, a latent does not move or takes few values: nothing to be heavy.
    equal = tail.khat == -math.inf
    flat = ~found.khat.reshape(2, data, dim).isfinite() | equal[:, None]

    def largest(values: Tensor, of_weights: Tensor) -> Tensor:
        each = values.reshape(2, data, dim).masked_fill(flat, -math.inf)
        return torch.maximum(each.amax((0, 2)), of_weights)

    inflation = tail_inflation(sides, found).reshape(count, 2, data, dim)
    return _Squares(
        largest(found.khat, tail.khat),
        largest(khat_limit(found), khat_limit(tail)),
        inflation.masked_fill(flat, 1.0).amax(1),
    )


def _widening(
    draws: Float64[Tensor, "draws batch dim"],
    weights: Float64[Tensor, "draws batch"],
    scale_correction: Float64[Tensor, "batch dim"],
) -> Float64[Tensor, " batch"]:
    """The largest ratio of a weighted sd to that of q: of a latent, or of a linear combination.

    Latents of few values are left out, as they have no tail. The largest eigenvalue of a covariance
    of n draws in d dimensions is too large by a factor up to (1 + sqrt(d / n))^2 (Marchenko &
    Pastur), which is taken out with n the effective draws; of one latent there is nothing to take.
    """
    few = (draws.sort(0).values.diff(dim=0) == 0).double().mean(0) > 0.5
    of_latents = (-scale_correction).exp().masked_fill(few, 0.0).amax(1)
    count, _, dim = draws.shape
    if count <= dim or dim == 1:
        return of_latents
    broken = ~(draws.isfinite().all(2).all(0) & weights.isfinite().all(0))
    z = (draws - draws.mean(0)).masked_fill(few | broken[:, None], 0.0).movedim(0, 1)
    share = weights.mT.masked_fill(broken[:, None], 1 / count)[..., None]
    sd = z.std(1, keepdim=True)
    z = z / torch.where(sd > 0, sd, 1.0)
    values, axes = torch.linalg.eigh(z.mT @ z / (count - 1))
    known = values > _SINGULAR * values[:, -1:]
    z = z @ torch.where(known[:, None], axes / values.clamp_min(1e-300).sqrt()[:, None], 0.0)
    z = z - (share * z).sum(1, keepdim=True)
    largest = torch.linalg.eigvalsh((share * z).mT @ z * (count / (count - 1)))[:, -1]
    noise = 1 + ((known.sum(1) - 1).clamp_min(0) * share.square().sum((1, 2))).sqrt()
    directions = largest.clamp_min(0.0).sqrt() / noise
    return torch.maximum(of_latents, directions.masked_fill(broken, math.nan))


def _divergences(log_weights: Float64[Tensor, "draws batch"], tail: ParetoTail) -> Columns:
    evidence, lower = importance_bound(log_weights), elbo(log_weights)
    log_ratio = log_weights - evidence
    ratio = log_ratio.exp()
    # Where w is 0, r log r is 0.
    reverse = torch.where(ratio > 0, ratio * log_ratio, 0.0).mean(0)
    below = (1 - ratio).clamp_min(0.0)
    slope = torch.where(ratio < 1, ratio, 0.0).mean(0)
    error = importance_bound_error(log_weights, tail)
    gains = torch.where(ratio > 1, log_ratio + log_ratio.clamp_min(0).log(), -math.inf)
    limit = khat_limit(pareto_tail(gains))  # inf or nan where no fit: then `error` alone speaks
    light = ~limit.isfinite() | (limit <= khat_threshold(len(log_weights)))

    def of_reverse(at: Tensor) -> Tensor:
        return torch.where(at > -math.inf, at.exp() * (at - reverse), 0.0) - at.exp()

    def of_variation(at: Tensor) -> Tensor:
        return (1 - at.exp()).clamp_min(0.0) + slope * at.exp()

    return {
        "kl_guide_posterior": evidence - lower,
        "kl_guide_posterior_se": torch.hypot(mean_error(ratio - log_ratio), error.unseen),
        "kl_guide_posterior_bias": error.bias,
        "kl_posterior_guide": reverse,
        "kl_posterior_guide_se": tail_error(of_reverse, log_ratio, tail),
        "total_variation": below.mean(0),
        "total_variation_se": tail_error(of_variation, log_ratio, tail),
        "error_reliable": error.reliable,
        "kl_posterior_guide_reliable": error.reliable & light,
    }


def _moments(
    draws: Float64[Tensor, "draws batch dim"],
    weights: Float64[Tensor, "draws batch"],
    inflation: Float64[Tensor, "draws batch"],
    of_squares: Float64[Tensor, "draws batch dim"],
) -> Columns:
    """Moments of q and of the weighted draws, which all have the influence of each draw.

    Args:
        draws: Of q.
        weights: That sum to 1 over the draws.
        inflation: Of the squares of influences on a weighted mean, see `tail_inflation`.
        of_squares: On a weighted sd.
    """
    count = len(draws)

    def weighted_error(influence: Tensor, by: Tensor = inflation[..., None]) -> Tensor:
        if count < 2:
            return mean_error(influence)
        squares = (influence - influence.mean(0)).square() * by
        return (squares.sum(0) / (count * (count - 1))).sqrt()

    ratio = (count * weights)[..., None]
    columns: Columns = {}
    influence: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    for name, share in (("", torch.ones_like(ratio)), ("corrected_", ratio)):
        mean = draws[0] + (share * (draws - draws[0])).mean(0)
        rest = draws - mean
        variance = (share * rest.square()).sum(0) / (count - 1)
        sd = variance.sqrt()
        columns |= {f"{name}mean": mean, f"{name}sd": sd}
        unit = torch.where(sd > 0, sd, 1.0)
        influence[name], scores[name] = share * rest, share * ((rest / unit).square() - 1) / 2
        if name:
            columns[f"{name}mean_se"] = weighted_error(influence[name])
            columns[f"{name}sd_se"] = sd * weighted_error(scores[name], of_squares)
        else:
            columns["mean_se"] = mean_error(influence[""])
            columns["sd_se"] = sd * mean_error(scores[""])
    mean, sd = columns["corrected_mean"], columns["corrected_sd"]
    shift = columns["mean"] - mean
    columns["mean_correction"] = torch.where(shift == 0, 0.0, shift / sd)
    # The shift is counted in corrected sds, whose own error matters where the shift is large.
    paired = influence[""] - influence["corrected_"] - shift * scores["corrected_"]
    of_shift = weighted_error(paired)
    columns["mean_correction_se"] = torch.where(of_shift == 0, 0.0, of_shift / sd)
    same = columns["sd"] == sd
    columns["scale_correction"] = torch.where(same, 0.0, columns["sd"].log() - sd.log())
    columns["scale_correction_se"] = weighted_error(scores[""] - scores["corrected_"], of_squares)
    return columns
