"""Normal distributions of each datum and an update of batch and match, against equations."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_vae.inference.refit.normals import Normal, _match

N, D = 3, 2


def normals(seed: int = 0) -> Normal:
    generator = torch.Generator().manual_seed(seed)
    chol = torch.randn(N, D, D, generator=generator).double().tril(-1)
    chol = chol + torch.diag_embed(0.3 + torch.rand(N, D, generator=generator).double())
    return Normal(torch.randn(N, D, generator=generator).double(), chol)


def test_log_densities_are_torch_s() -> None:
    found, u = normals(), torch.randn(5, N, D).double()
    expected = MultivariateNormal(found.loc, scale_tril=found.chol).log_prob(u)
    assert (found.log_prob(u) - expected).abs().max() < 1e-12
    assert (found.from_noise(found.to_noise(u)) - u).abs().max() < 1e-12


def covariance(rows: Tensor) -> Tensor:
    rest = rows - rows.mean(0)
    return torch.einsum("cni,cnj->nij", rest, rest) / len(rows)


@pytest.mark.parametrize("step", [0.3, 5.0, 200.0])
def test_an_update_solves_the_equation_of_batch_and_match(step: float) -> None:
    """Cai et al. (2024): S U S + S = V and the new mean, with moments made here."""
    start, u = normals(), torch.randn(7, N, D).double()
    scores = torch.randn(7, N, D).double() - 2 * u
    found = _match(start, u, scores, step)
    share = step / (1 + step)
    mean_u, mean_g = u.mean(0), scores.mean(0)
    away = start.loc - mean_u
    left = step * covariance(scores) + share * mean_g[:, :, None] * mean_g[:, None, :]
    right = start.chol @ start.chol.mT + step * covariance(u)
    right = right + share * away[:, :, None] * away[:, None, :]
    new = found.chol @ found.chol.mT
    residual = new @ left @ new + new - right
    assert residual.abs().max() < 1e-10 * right.abs().max()
    loc = start.loc / (1 + step) + share * ((new @ mean_g[..., None])[..., 0] + mean_u)
    assert (found.loc - loc).abs().max() < 1e-10 * (1 + loc.abs().max())
    assert math.isfinite(float(found.chol.sum()))
    assert residual.abs().max() < (new - right).abs().max()  # the equation is not trivial here
