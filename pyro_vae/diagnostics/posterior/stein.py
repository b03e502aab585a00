r"""The kernel Stein discrepancy: how far draws are from a density, from its gradient alone."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pyro_vae.data import Seed, as_seed
from pyro_vae.diagnostics.posterior.pairs import (
    centred,
    finite_data,
    median_distance,
    pair_sums,
    resampled_p_values,
    squares,
)

__all__ = ["SteinDiscrepancy", "kernel_stein_discrepancy"]

Radial = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""A kernel and its first two derivatives, as functions of the squared distance in bandwidths."""

_SINGULAR = 1e-10  # share of the greatest variance below which a direction has none


class SteinDiscrepancy(NamedTuple):
    """Squared discrepancy and p-value of each datum; nan where a number is not finite."""

    value: Float64[Tensor, " batch"]
    """Unbiased estimate of the squared discrepancy; may be negative."""
    p_value: Float64[Tensor, " batch"]
    """Of the hypothesis that the draws come from the density."""


def kernel_stein_discrepancy(
    draws: Float[Tensor, "draws batch dim"],
    scores: Float[Tensor, "draws batch dim"],
    *,
    kernel: str = "imq",
    bandwidth: float | None = None,
    standardise: bool = True,
    num_bootstrap: int = 500,
    seed: Seed = 0,
    resolve: float | None = None,
) -> SteinDiscrepancy:
    r"""The squared kernel Stein discrepancy of draws from the density whose gradient is given.

    .. math:: \mathrm{KSD}^2 = \mathbb E_{x, x'} \bigl[ s^T s' k + s^T \nabla_{x'} k
              + s'^T \nabla_x k + \operatorname{tr} \nabla_x \nabla_{x'} k \bigr],
              \qquad s = \nabla_x \log p(x)

    with the inverse multiquadric kernel :math:`k = (1 + r^2 / h^2)^{-1/2}` or the Gaussian
    :math:`e^{-r^2 / 2 h^2}`. The mean is over pairs of different draws (a U-statistic), and the
    p-value compares it with those whose terms get random signs (the wild bootstrap).

    Args:
        draws: Independent draws to judge, at least 2.
        scores: The gradient of the log density at each draw. That of the log joint with respect to
            the latents will do: the evidence is a constant.
        kernel: `"imq"`, whose discrepancy controls convergence, or `"gaussian"`, which can miss
            draws that leave for infinity in more than 2 dimensions.
        bandwidth: h; None for the median distance between draws of each datum.
        standardise: Whether the kernel measures distances by the draws' own covariance. Value and
            p-value then depend neither on the latents' units nor on their correlation, which would
            hide faults along narrow directions, and `bandwidth` counts standard deviations. With no
            more draws than latents the covariance is unknown, and each latent is scaled by itself.
            Otherwise everything is in units of the latents, the value in theirs to the power -2.
        num_bootstrap: Sets of signs. The least p-value is one over one more than that. All data
            share them.
        seed: Of the signs.
        resolve: As in `two_sample.permutation_p_values`: more sets of signs where p is least.

    Raises:
        ValueError: If there are fewer than 2 draws, draws and scores differ in shape, or an option
            is none of the above.

    Note: blind to the weights of modes that lie far apart, and so to a missing one: the gradient
        within a mode does not know of the others. Draws of a Markov chain depend on one another,
        which makes p too small: thin them first. p is right for many draws only.

    References:
        Liu, Lee & Jordan (2016), A kernelized Stein discrepancy for goodness-of-fit tests; Gorham &
        Mackey (2017), Measuring sample quality with kernels; Chwialkowski, Strathmann & Gretton
        (2016), A kernel test of goodness of fit (the signs).

    Example:
        >>> z = torch.randn(200, 1, 2, generator=torch.Generator().manual_seed(0))
        >>> exact = kernel_stein_discrepancy(z, -z)  # the standard normal
        >>> shifted = kernel_stein_discrepancy(z, -(z - 1))  # a normal with mean 1
        >>> bool(exact.p_value > 0.05), bool(shifted.p_value < 0.01)
        (True, True)
    """
    seed = as_seed(seed)
    radial = _radial(kernel)
    _check(draws, scores, bandwidth, num_bootstrap)
    broken = ~finite_data(draws, scores)
    x, s = (
        values.movedim(0, 1).masked_fill(broken[:, None, None], 0.0).contiguous()
        for values in (centred(draws)[1], scores.detach().double())
    )
    if standardise:
        x, s = _whitened(x, s)
    width = median_distance(x) if bandwidth is None else x.new_tensor([bandwidth])
    width = width.expand(len(x))[:, None, None]
    x, s = x / width, s * width
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def reached(data: Tensor, count: int) -> Tensor:
        signs = torch.randint(2, (x.shape[1], count), generator=generator)
        z, own = x[data], s[data]

        def block(place: slice, rows: slice) -> Tensor:
            return _stein_kernel(z[place, rows], own[place, rows], z[place], own[place], radial)

        sums = pair_sums(block, len(z), (2.0 * signs - 1).to(z))
        total[data] = sums.total
        return (sums.quadratic >= sums.total[:, None]).sum(1)

    p = resampled_p_values(reached, len(x), num_bootstrap, resolve)
    value = total / (x.shape[1] * (x.shape[1] - 1) * width[:, 0, 0].square())
    return SteinDiscrepancy(value.masked_fill(broken, math.nan), p.masked_fill(broken, math.nan))


def _whitened(
    x: Float64[Tensor, "data draws dim"], s: Float64[Tensor, "data draws dim"]
) -> tuple[Float64[Tensor, "data draws dim"], Float64[Tensor, "data draws dim"]]:
    """Centred draws with their own covariance taken out, and the scores that go with them."""
    sd = x.std(1, keepdim=True)
    unit = torch.where(sd == 0, 1.0, sd)
    x, s = x / unit, s * unit
    if x.shape[1] <= x.shape[2]:
        return x, s
    values, axes = torch.linalg.eigh(x.mT @ x / (x.shape[1] - 1))
    known = values > _SINGULAR * values[:, -1:]
    spread = torch.where(known, values, 1.0).sqrt()[:, None]
    return x @ axes / spread, s @ axes * spread


def _stein_kernel(
    x: Float64[Tensor, "data rows dim"],
    s: Float64[Tensor, "data rows dim"],
    others: Float64[Tensor, "data draws dim"],
    their_scores: Float64[Tensor, "data draws dim"],
    radial: Radial,
) -> Float64[Tensor, "data rows draws"]:
    """Liu, Lee & Jordan's kernel for k(x, x') = f(|x - x'|^2)."""
    square = squares(x, others)
    f, f1, f2 = radial(square)
    along = (x * s).sum(2)[:, :, None] - s @ others.mT  # s (x - x')
    theirs = x @ their_scores.mT - (others * their_scores).sum(2)[:, None, :]  # s' (x - x')
    value = f * (s @ their_scores.mT)
    value += 2 * f1 * (theirs - along - x.shape[2])
    return value.sub_(4 * square * f2)


def _radial(kernel: str) -> Radial:
    if kernel == "imq":
        return _inverse_multiquadric
    if kernel == "gaussian":
        return _gaussian
    raise ValueError(f"kernel is 'imq' or 'gaussian', not {kernel!r}")


def _inverse_multiquadric(square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inverse = 1 / (1 + square)
    f = inverse.sqrt()
    f1 = -0.5 * f * inverse
    return f, f1, -1.5 * f1 * inverse


def _gaussian(square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    f = torch.exp(-0.5 * square)
    return f, -0.5 * f, 0.25 * f


def _check(draws: Tensor, scores: Tensor, bandwidth: float | None, num_bootstrap: int) -> None:
    if draws.shape != scores.shape:
        raise ValueError(
            f"draws have shape {tuple(draws.shape)} and scores {tuple(scores.shape)}; give the "
            "gradient of the log joint at each draw"
        )
    if len(draws) < 2 or draws.shape[2] == 0:
        raise ValueError(
            f"{len(draws)} draws of {draws.shape[2]} latents make no pair; give at least 2 draws "
            "of at least one latent"
        )
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth must be positive or None, not {bandwidth!r}")
    if num_bootstrap < 1:
        raise ValueError(f"num_bootstrap must be at least 1, not {num_bootstrap}")
