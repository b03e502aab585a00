r"""How far draws from a guide are from draws of a reference, for each datum.

Every function takes two sets of draws, `sample` (draws, batch, dim) and `reference` (others, batch,
dim), which may differ in number. A datum with a draw that is not finite gets nan, and the others
are not touched by it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pyro_vae.diagnostics.posterior.pairs import (
    PairSums,
    centred,
    check_two_samples,
    finite_data,
    median_distance,
    pair_sums,
    resampled_p_values,
    squares,
)

__all__ = [
    "MomentErrors",
    "energy_distance",
    "moment_errors",
    "permutation_p_values",
    "squared_mmd",
    "standardised",
    "wasserstein",
]

Sample = Float[Tensor, "draws batch dim"]
Reference = Float[Tensor, "others batch dim"]

_SINGULAR = 1e-12  # share of its variance that a latent keeps when the latents before it are known


class MomentErrors(NamedTuple):
    """Errors of mean and covariance; nan where a draw is not finite."""

    mean: Float64[Tensor, "batch dim"]
    """Difference of the means, in standard deviations of the reference."""
    scale: Float64[Tensor, "batch dim"]
    """Log of the ratio of the standard deviations, in nats."""
    covariance: Float64[Tensor, " batch"]
    """Relative error of the covariance matrix; nan where the reference's is singular."""


def moment_errors(sample: Sample, reference: Reference) -> MomentErrors:
    r"""Errors of the mean, the standard deviations and the covariance matrix of a sample.

    .. math:: \frac{\bar x - \bar y}{s_y}, \qquad \log \frac{s_x}{s_y}, \qquad
              d^{-1/2} \lVert L^{-1} S_x L^{-T} - I \rVert_F, \quad L L^T = S_y

    The last one does not change under invertible linear maps of the latents. Two exact samples of
    n draws have it near :math:`\sqrt{2 (d + 1) / n}`: it is noise below that.

    Args:
        sample: Draws to judge, at least 2.
        reference: Draws to trust, at least 2; more than `dim` for a covariance error.

    Returns:
        All in float64. Where a margin of the reference is constant, its `mean` is infinite (0 if
        the means agree) and its `scale` too (0 if the sample is constant as well), and
        `covariance` is nan, as it is for every singular covariance of the reference.

    Raises:
        ValueError: If one of the two has fewer than 2 draws.
    """
    check_two_samples(sample, reference, least=2)
    x_mean, x_rest = centred(sample)
    y_mean, y_rest = centred(reference)
    x_sd, y_sd = (rest.square().sum(0).div(len(rest) - 1).sqrt() for rest in (x_rest, y_rest))
    shift = x_mean - y_mean
    mean = torch.where(shift == 0, 0.0, shift / y_sd)
    scale = torch.where(x_sd == y_sd, 0.0, x_sd.log() - y_sd.log())
    covariance = _covariance_error(x_rest, y_rest, y_sd)
    broken = ~finite_data(sample, reference)
    return MomentErrors(
        mean.masked_fill(broken[:, None], math.nan),
        scale.masked_fill(broken[:, None], math.nan),
        covariance.masked_fill(broken, math.nan),
    )


def _covariance_error(
    x_rest: Sample, y_rest: Reference, y_sd: Float64[Tensor, "batch dim"]
) -> Float64[Tensor, " batch"]:
    unit = torch.where(y_sd > 0, y_sd, 1.0)
    x_cov, y_cov = (
        torch.einsum("nbi,nbj->bij", rest / unit, rest / unit) / (len(rest) - 1)
        for rest in (x_rest, y_rest)
    )
    factor, failed = torch.linalg.cholesky_ex(y_cov.nan_to_num(nan=0.0))
    singular = (failed > 0) | (factor.diagonal(dim1=1, dim2=2).square() < _SINGULAR).any(1)
    eye = torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device)
    factor = torch.where(singular[:, None, None], eye, factor)
    half = torch.linalg.solve_triangular(factor, x_cov, upper=False)
    ratio = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    error = (ratio - eye).square().sum((1, 2)).sqrt() / math.sqrt(unit.shape[1])
    return error.masked_fill(singular, math.nan)


def wasserstein(
    sample: Sample, reference: Reference, order: int = 1
) -> Float64[Tensor, "batch dim"]:
    r"""The Wasserstein distance of each margin, in units of the latent.

    .. math:: W_p = \Bigl( \int_0^1 \lvert F^{-1}(u) - G^{-1}(u) \rvert^p \, du \Bigr)^{1/p}

    It is exact for the two empirical distributions, whatever their numbers of draws. Between two
    samples of the same distribution it is positive, of the order of sd / sqrt(draws).

    Args:
        sample: Draws to judge.
        reference: Draws to trust.
        order: p, 1 or 2.

    Raises:
        ValueError: If `order` is neither, or one of the two has no draws.

    References:
        Peyré & Cuturi (2019), Computational optimal transport (in one dimension).

    Example:
        >>> zeros, ones = torch.zeros(3, 1, 1), torch.ones(2, 1, 1)
        >>> wasserstein(zeros, ones).item()
        1.0
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, not {order!r}")
    check_two_samples(sample, reference, least=1)
    n, m = len(sample), len(reference)
    # Both quantile functions are constant between these levels, counted in 1 / (n m).
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    widths = ends.diff(prepend=ends.new_zeros(1)).double() / (n * m)
    x = sample.detach().double().sort(0).values[((ends - 1) // m).to(sample.device)]
    y = reference.detach().double().sort(0).values[((ends - 1) // n).to(reference.device)]
    cost = torch.einsum("q,qbd->bd", widths.to(x), (x - y).abs().pow(order))
    broken = ~finite_data(sample, reference)
    return cost.pow(1 / order).masked_fill(broken[:, None], math.nan)


def standardised(
    sample: Sample, reference: Reference
) -> tuple[Float64[Tensor, "draws batch dim"], Float64[Tensor, "others batch dim"]]:
    """Both samples in pooled standard deviations from the pooled mean, for each margin.

    The distances below add latents up as they are: without this, those in small units do not
    count. The pooled moments do not depend on which draw is whose, so permutation tests stay valid.
    """
    check_two_samples(sample, reference, least=1)
    _, rest = centred(torch.cat([sample.double(), reference.double()]))
    sd = rest.square().mean(0).sqrt()
    unit = torch.where(sd == 0, 1.0, sd)
    return rest[: len(sample)] / unit, rest[len(sample) :] / unit


def energy_distance(sample: Sample, reference: Reference) -> Float64[Tensor, " batch"]:
    r"""The energy distance of two samples, estimated without bias.

    .. math:: 2\, \mathbb E \lVert X - Y \rVert - \mathbb E \lVert X - X' \rVert
              - \mathbb E \lVert Y - Y' \rVert

    It is 0 for equal distributions and positive for all others, in units of the latents (SciPy's
    `energy_distance` is its square root). The expectations are means over pairs of different draws
    (a U-statistic), so that an estimate may be negative.

    Args:
        sample: Draws to judge, at least 2.
        reference: Draws to trust, at least 2.

    Raises:
        ValueError: If one of the two has fewer than 2 draws.

    References:
        Székely & Rizzo (2013), Energy statistics: a class of statistics based on distances.
    """
    return _distance(sample, reference, "energy", None)


def squared_mmd(
    sample: Sample, reference: Reference, bandwidth: float | None = None
) -> Float64[Tensor, " batch"]:
    r"""The squared maximum mean discrepancy of two samples, estimated without bias.

    .. math:: \mathbb E\, k(X, X') + \mathbb E\, k(Y, Y') - 2\, \mathbb E\, k(X, Y), \qquad
              k(u, v) = e^{-\lVert u - v \rVert^2 / 2 h^2}

    The expectations are means over pairs of different draws (a U-statistic), so that an estimate
    may be negative. `inference.objectives.maximum_mean_discrepancy` is the biased one, to
    train with.

    Args:
        sample: Draws to judge, at least 2.
        reference: Draws to trust, at least 2.
        bandwidth: h, in units of the latents. None for the median distance between pooled draws of
            each datum: values of different data are then values of different kernels.

    Raises:
        ValueError: If one of the two has fewer than 2 draws, or the bandwidth is not positive.

    References:
        Gretton, Borgwardt, Rasch, Schoelkopf & Smola (2012), A kernel two-sample test.
    """
    return _distance(sample, reference, "mmd", bandwidth)


def permutation_p_values(
    sample: Sample,
    reference: Reference,
    statistic: str = "energy",
    num_permutations: int = 200,
    seed: int = 0,
    *,
    bandwidth: float | None = None,
    resolve: float | None = None,
) -> Float64[Tensor, " batch"]:
    r"""p-values of the hypothesis that both samples have the same distribution, for each datum.

    The statistic is compared with those of the same draws shared out at random. With independent
    draws :math:`p = (1 + \text{count}) / (1 + B)` is at most u with probability at most u, for any
    number of draws; the least value is 1 / (1 + B).

    Args:
        sample: Draws to judge, at least 2.
        reference: Draws to trust, at least 2.
        statistic: `"energy"` or `"mmd"`, see `energy_distance` and `squared_mmd`.
        num_permutations: B. All data share the permutations.
        seed: Of the permutations.
        bandwidth: Of the kernel, for `"mmd"`.
        resolve: Data that no permutation reached get more of them, 100,000 at most, until
            1 / (1 + B) is at most this times their number: the level over the number of data lets
            Benjamini & Hochberg's procedure find them, however few they are. None for no more.

    Raises:
        ValueError: If one of the two has fewer than 2 draws, or an option is none of the above.

    Note: Markov chains have dependent draws, which make p too small: thin them to about their
        effective sample size first.

    References:
        Gretton et al. (2012); Phipson & Smyth (2010), Permutation p-values should never be zero;
        Besag & Clifford (1991), Sequential Monte Carlo p-values.
    """
    if num_permutations < 1:
        raise ValueError(f"num_permutations must be at least 1, not {num_permutations}")
    check_two_samples(sample, reference, least=2)
    n, pooled = len(sample), len(sample) + len(reference)
    generator = torch.Generator().manual_seed(seed)

    def reached(data: Tensor, count: int) -> Tensor:
        random = torch.rand(count, pooled, generator=generator, dtype=torch.float64)
        chosen = torch.cat([torch.arange(n)[None], random.argsort(1)[:, :n]])
        shares = torch.zeros(len(chosen), pooled, dtype=torch.float64).scatter_(1, chosen, 1.0).T
        sums = _sums(sample[:, data], reference[:, data], statistic, bandwidth, shares)
        values = _statistic(sums, n, pooled - n)
        # Equal statistics may differ in their last bits.
        slack = 1e-11 * sums.total.abs() / pooled**2
        return (values[:, 1:] >= (values[:, 0] - slack)[:, None]).sum(1)

    p = resampled_p_values(reached, sample.shape[1], num_permutations, resolve)
    return p.masked_fill(~finite_data(sample, reference), math.nan)


def _distance(
    sample: Sample, reference: Reference, statistic: str, bandwidth: float | None
) -> Float64[Tensor, " batch"]:
    shares = torch.zeros(len(sample) + len(reference), 1, dtype=torch.float64)
    shares[: len(sample)] = 1.0
    sums = _sums(sample, reference, statistic, bandwidth, shares)
    value = _statistic(sums, len(sample), len(reference))[:, 0]
    return value.masked_fill(~finite_data(sample, reference), math.nan)


def _sums(
    sample: Sample,
    reference: Reference,
    statistic: str,
    bandwidth: float | None,
    shares: Float64[Tensor, "pooled columns"],
) -> PairSums:
    """Sums of the kernel over pairs of pooled draws; a column is 1 for the draws of the sample."""
    check_two_samples(sample, reference, least=2)
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth must be positive or None, not {bandwidth!r}")
    _, rest = centred(torch.cat([sample.double(), reference.double()]))
    broken = ~finite_data(sample, reference)
    pooled = rest.movedim(0, 1).masked_fill(broken[:, None, None], 0.0).contiguous()
    kernel = _kernel(statistic, pooled, bandwidth)

    def block(data: slice, rows: slice) -> Tensor:
        return kernel(squares(pooled[data, rows], pooled[data]), data)

    return pair_sums(block, len(pooled), shares.to(pooled.device))


def _kernel(
    statistic: str, pooled: Float64[Tensor, "batch draws dim"], bandwidth: float | None
) -> Callable[[Tensor, slice], Tensor]:
    """A function of squared distances and of which data they belong to."""
    if statistic == "energy":
        return lambda square, data: square.sqrt_().neg_()
    if statistic != "mmd":
        raise ValueError(f"statistic is 'energy' or 'mmd', not {statistic!r}")
    width = median_distance(pooled) if bandwidth is None else pooled.new_tensor([bandwidth])
    factor = (-0.5 / width.square()).expand(len(pooled))[:, None, None]
    return lambda square, data: square.mul_(factor[data]).exp_()


def _statistic(sums: PairSums, n: int, m: int) -> Float64[Tensor, "batch columns"]:
    """Mean within the sample, plus within the reference, less twice that between them."""
    within = sums.quadratic
    between = sums.linear - within
    others = sums.total[:, None] - within - 2 * between
    return within / (n * (n - 1)) + others / (m * (m - 1)) - 2 * between / (n * m)
