r"""How well chains have mixed: rank-normalised split R-hat and bulk effective sample size, batched.

The same definitions as ArviZ, for many quantities in one go.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

__all__ = ["bulk_ess", "mean_ess", "split_rhat"]


def split_rhat(
    draws: Float[Tensor, "chains draws *quantities"],
) -> Float64[Tensor, "*quantities"]:
    r"""Rank-normalised split R-hat, the larger of the bulk's and the (folded) tail's.

    Near 1 where all chains agree. Chains that never move and agree give 1, ones that never move
    and disagree inf.

    Args:
        draws: At least 4 draws a chain; each chain is split in two.

    Raises:
        ValueError: If there are fewer than 4 draws.

    References:
        Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021), Rank-normalization, folding, and
        localization, Bayesian Analysis 16.
    """
    halves = _split(draws)
    middle = _median(halves.flatten(0, 1))
    bulk, tail = (_rhat(_normal_scores(part)) for part in (halves, (halves - middle).abs()))
    return torch.maximum(bulk, tail)


def bulk_ess(
    draws: Float[Tensor, "chains draws *quantities"],
) -> Float64[Tensor, "*quantities"]:
    r"""Bulk effective sample size: how many independent draws locate the mean as well.

    Geyer's initial monotone sequence on the rank-normalised split chains, at most S log10 S.

    Raises:
        ValueError: If there are fewer than 4 draws.

    References:
        Vehtari et al. (2021), Rank-normalization, folding, and localization; Geyer
        (1992), Practical Markov chain Monte Carlo.
    """
    return _ess(_normal_scores(_split(draws)))


def mean_ess(
    draws: Float[Tensor, "chains draws *quantities"],
) -> Float64[Tensor, "*quantities"]:
    r"""Effective sample size of the mean: as `bulk_ess`, of the values themselves, not their ranks.

    Raises:
        ValueError: If there are fewer than 4 draws.

    References:
        Vehtari et al. (2021), Rank-normalization, folding, and localization; Geyer (1992).
    """
    return _ess(_split(draws))


def _ess(scores: Float64[Tensor, "chains draws *quantities"]) -> Float64[Tensor, "*quantities"]:
    chains, length = scores.shape[:2]
    total = chains * length
    covariance = _autocovariance(scores).mean(0)  # over chains: [lags, *quantities]
    within = covariance[0] * length / (length - 1)
    pooled = covariance[0] + scores.mean(1).var(0)
    rho = 1 - (within - covariance) / pooled
    rho[0] = 1.0
    last_pair = max((length - 3) // 2, 0)
    pairs = rho[: 2 * last_pair + 2].unflatten(0, (last_pair + 1, 2)).sum(1)
    positive = (pairs > 0).cumprod(0)  # up to the first pair that is not
    stop = positive.sum(0).clamp_max(last_pair)
    inside = torch.arange(last_pair + 1, device=pairs.device).view(-1, *[1] * stop.dim()) < stop
    summed = torch.where(inside, pairs.cummin(0).values, 0.0).sum(0)
    # Of the pair at which the sequence stops the even lag counts once: this lowers the variance.
    even = rho.gather(0, 2 * stop[None])[0]
    keep = (even > 0) | (pairs.gather(0, stop[None])[0] >= 0)
    tau = -1 + 2 * summed + torch.where(keep, even, 0.0)
    ess = total / tau.clamp_min(1 / math.log10(total))
    constant = scores.flatten(0, 1).amax(0) - scores.flatten(0, 1).amin(0) < 1e-15
    return torch.where(constant, float(total), ess)


def _split(draws: Tensor) -> Float64[Tensor, "chains draws *quantities"]:
    length = draws.shape[1]
    if length < 4:
        raise ValueError(f"R-hat and ESS need at least 4 draws a chain, not {length}")
    half = length // 2
    return torch.cat([draws[:, :half], draws[:, -half:]]).detach().double()


def _normal_scores(draws: Tensor) -> Tensor:
    """Normal scores of the average ranks over all chains (Blom's offset)."""
    flat = draws.flatten(0, 1).movedim(0, -1).contiguous()
    ordered = flat.sort(-1).values
    below = torch.searchsorted(ordered, flat)
    up_to = torch.searchsorted(ordered, flat, right=True)
    ranks = (below + 1 + up_to).double() / 2
    scores = torch.special.ndtri((ranks - 0.375) / (flat.shape[-1] + 0.25))
    return scores.movedim(-1, 0).reshape(draws.shape)


def _median(values: Tensor) -> Tensor:
    """The mean of the two middle values; folded around it, those two stay tied."""
    ordered, length = values.sort(0).values, len(values)
    return (ordered[(length - 1) // 2] + ordered[length // 2]) / 2


def _rhat(scores: Tensor) -> Tensor:
    length = scores.shape[1]
    within = scores.var(1).mean(0)
    between = length * scores.mean(1).var(0)
    ratio = torch.where(within > 0, between / within, torch.where(between > 1e-20, math.inf, 1.0))
    return ((ratio + length - 1) / length).sqrt()


def _autocovariance(chains: Tensor) -> Tensor:
    """Of each chain, by Fourier transform; divided by the length at every lag."""
    length = chains.shape[1]
    centred = chains - chains.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, n=2 * length, dim=1)
    power = spectrum.real**2 + spectrum.imag**2
    return torch.fft.irfft(power, n=2 * length, dim=1)[:, :length] / length
