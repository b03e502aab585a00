"""Pareto-smoothed importance sampling of predictive densities, with its Monte-Carlo error."""

from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from pyro_vae.inference.log_weights import (
    pareto_khat,
    pareto_tail,
    smoothed_log_weights,
    tail_inflation,
)

__all__ = ["Smoothed", "smoothed_density"]

_DATA = 256  # at once: the fits hold several arrays of their size


class Smoothed(NamedTuple):
    """A weighted mean density of each datum.

    Attributes:
        log_density: Its log in nats, `[datum]`.
        influence: What each draw moved it by, its square raised where the weights have a tail,
            `[draws, datum]`: the root of the sum of squares is the Monte-Carlo error.
        khat: The larger Pareto k-hat of the weights and of the weights times the density, between
            which the ratio is taken, `[datum]`.
        log_weights: Smoothed, exponentials sum to 1, `[draws, datum]`.
    """

    log_density: Float64[Tensor, " datum"]
    influence: Float64[Tensor, "draws datum"]
    khat: Float64[Tensor, " datum"]
    log_weights: Float64[Tensor, "draws datum"]

    @property
    def se(self) -> Float64[Tensor, " datum"]:
        """Monte-Carlo error of the log density."""
        return self.influence.square().sum(0).sqrt()


def smoothed_density(
    log_ratios: Float64[Tensor, "draws datum"], pointwise: Float64[Tensor, "draws datum"]
) -> Smoothed:
    r"""The log of :math:`\sum_s w_s p_{sn} / \sum_s w_s`, with the largest weights smoothed.

    Args:
        log_ratios: Log weights of each datum, in nats; a constant does not matter.
        pointwise: Log densities log p(x_n | theta_s), in nats.

    References:
        Vehtari, Gelman & Gabry (2017), Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC; Vehtari et al. (2024), Pareto smoothed importance sampling.
    """
    parts = [
        _smoothed(ratios, densities)
        for ratios, densities in zip(
            log_ratios.split(_DATA, 1), pointwise.split(_DATA, 1), strict=True
        )
    ]
    return Smoothed(*(torch.cat(column, -1) for column in zip(*parts, strict=True)))


def _smoothed(log_ratios: Tensor, pointwise: Tensor) -> Smoothed:
    tail = pareto_tail(log_ratios)
    weights = smoothed_log_weights(log_ratios, tail)
    # A datum far from where the draws are rests on few of them, however good their weights.
    khat = torch.maximum(tail.khat, pareto_khat(log_ratios + pointwise))
    found = (weights + pointwise).logsumexp(0)
    influence = weights.exp() * torch.expm1(pointwise - found)
    influence = influence * tail_inflation(log_ratios, tail).sqrt()
    return Smoothed(found, influence, khat, weights)
