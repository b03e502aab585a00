"""Closed forms that several tests compare with."""

import math

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_vae.models import LinearGaussian

NOISE = 0.5  # variance of the noise of `linear_pair`


def linear_pair(data_dim: int, latent_dim: int) -> LinearGaussian:
    """x ~ N(W z + b, NOISE), z ~ N(0, 1), with the same W and b at every call."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(data_dim, latent_dim, generator=generator)
    bias = torch.randn(data_dim, generator=generator)
    return LinearGaussian.from_parameters(weight, bias, torch.tensor(NOISE))


def exact_log_evidence(linear: LinearGaussian, x: Tensor) -> Tensor:
    """log p(x) of each datum under a `linear_pair`, by the dense normal."""
    covariance = linear.weight @ linear.weight.T + NOISE * torch.eye(x.shape[1])
    return MultivariateNormal(linear.bias, covariance).log_prob(x).detach()


def gauss(value: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    """log N(value | loc, scale^2)."""
    scale = torch.as_tensor(scale)
    return -0.5 * ((value - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def z_score(values: Tensor, truth: float) -> float:
    """Of the mean of independent repetitions, in its standard errors."""
    return abs(float((values.mean() - truth) / (values.std() / math.sqrt(len(values)))))
