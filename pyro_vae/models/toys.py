"""Small models at which gradient estimators are studied."""

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["BinaryLatents", "RainforthToy"]


class BinaryLatents(nn.Module):
    """Three binary latents, eight binary pixels and an amortised guide, at a random start."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.randn(3))
        self.decoder = nn.Linear(3, 8)
        self.encoder = nn.Linear(8, 3)

    def model(self, x: Float[Tensor, "batch 8"]) -> None:
        """Latent bits, then pixels given them."""
        pyro.module("decoder", self.decoder)
        logits = pyro.param("prior", self.prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Float[Tensor, "batch 8"]) -> None:
        """Latent bits given pixels, independent of each other."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


class RainforthToy(nn.Module):
    """z ~ N(mu, I), x | z ~ N(z, I) and q = N(A x + b, 2/3 I), close to the optimum for data x.

    The optimum is mu = mean of x, A = I / 2 and b = mu / 2; the posterior's variance is 1/2.

    Args:
        x: Data, shape (batch, features).
        distance: Standard deviation of the noise on each parameter, away from the optimum.

    References:
        Rainforth et al. (2018), Tighter variational bounds are not necessarily better.
    """

    def __init__(self, x: Float[Tensor, "batch features"], distance: float) -> None:
        super().__init__()
        dim = x.shape[-1]

        def near(optimum: Tensor) -> nn.Parameter:
            return nn.Parameter(optimum + distance * torch.randn(optimum.shape))

        self.mu = near(x.mean(0))
        self.matrix = near(torch.eye(dim) / 2)
        self.shift = near(x.mean(0) / 2)

    def model(self, x: Float[Tensor, "batch features"]) -> None:
        """A normal around mu, seen with unit noise."""
        mu = pyro.param("mu", self.mu)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Float[Tensor, "batch features"]) -> None:
        """An affine map of x with fixed variance 2/3."""
        loc = x @ pyro.param("A", self.matrix).mT + pyro.param("b", self.shift)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, (2 / 3) ** 0.5).to_event(1))
