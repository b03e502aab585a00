"""Models whose truth is known beforehand: closed forms and quadrature that never run the programs.

A pair draws its own data and knows log p(x) and KL(guide, posterior) of each datum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from scipy import special, stats
from torch import Tensor

__all__ = [
    "BetaBinomial",
    "Correlated",
    "Discrete",
    "GammaPoisson",
    "Hierarchy",
    "NormalNormal",
    "OneBit",
    "Pair",
    "tensor",
]

Array = Float[np.ndarray, "..."]


def tensor(values: Any) -> Tensor:
    """In double precision."""
    return torch.as_tensor(np.asarray(values), dtype=torch.float64)


def _run(x: Tensor, latent: dist.Distribution, seen: Callable[[Tensor], Any] | None) -> None:
    """A latent of each datum and, in the model, what is seen of it."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", latent)
        if seen is not None:
            pyro.sample("x", seen(z), obs=x)


class Pair(Protocol):
    """A model, a guide and what is true of them."""

    def model(self, x: Tensor) -> None:
        """The generative program."""

    def guide(self, x: Tensor) -> None:
        """The program of the approximate posterior."""

    def data(self, count: int, seed: int) -> Tensor:
        """Draws of x from the model."""

    def log_evidence(self, x: Tensor) -> Array:
        """Of each datum, in nats."""

    def kl(self, x: Tensor) -> Array:
        """Of the guide from the posterior of each datum, in nats."""


@dataclass(frozen=True)
class Hierarchy:
    """theta ~ N(0, 1), z_n ~ N(theta, 1), x_n ~ N(z_n, 1); a guide off by stated amounts.

    Attributes:
        scale: The guide's sds, in those of the posterior of theta, and of z given theta.
        shift: Of the guide's mean of theta, in posterior sds.
    """

    scale: float = 0.8
    shift: float = 0.4

    def data(self, count: int, seed: int) -> Tensor:
        """From the model."""
        noise = np.random.default_rng(seed).normal(size=2 * count + 1)
        return tensor(noise[0] + noise[1 : count + 1] + noise[count + 1 :])

    def posterior(self, x: Tensor) -> tuple[float, float]:
        """Mean and sd of theta, as x_n ~ N(theta, 2)."""
        precision = 1 + len(x) / 2
        return float(x.sum()) / 2 / precision, precision**-0.5

    def model(self, x: Tensor) -> None:
        """Sites "theta", "z" and "x"."""
        theta = pyro.sample("theta", dist.Normal(tensor(0.0), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        """Sites "theta" and "z"."""
        mean, sd = self.posterior(x)
        theta = pyro.sample("theta", dist.Normal(tensor(mean + self.shift * sd), self.scale * sd))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + theta) / 2, self.scale * 0.5**0.5))

    def kls(self) -> tuple[float, float]:
        """Of theta, and of each datum given it."""
        stretched = 0.5 * (self.scale**2 - 1) - np.log(self.scale)
        return float(stretched + self.shift**2 / 2), float(stretched)

    def log_evidence(self, x: Tensor) -> float:
        """Of all data."""
        covariance = 2 * torch.eye(len(x)).double() + 1
        normal = torch.distributions.MultivariateNormal(torch.zeros(len(x)).double(), covariance)
        return float(normal.log_prob(x))


@dataclass(frozen=True)
class NormalNormal:
    """z ~ N(0, 1), x ~ N(z, noise); the guide is the posterior, moved and stretched.

    The importance weights of a guide narrower than the posterior have k-hat 1 - scale^2.

    Attributes:
        scale: The guide's sd, in posterior sds.
        shift: The guide's mean less the posterior's, in posterior sds.
        noise: Standard deviation of x.
    """

    scale: float = 1.3
    shift: float = 0.4
    noise: float = 0.7

    @property
    def sd(self) -> float:
        """Of the posterior."""
        return float((1 + self.noise**-2) ** -0.5)

    def mean(self, x: Tensor) -> Tensor:
        """Of the posterior."""
        return x / (1 + self.noise**2)

    def model(self, x: Tensor) -> None:
        """Sites "z" and "x"."""
        zero = torch.zeros((), dtype=torch.float64)
        _run(x, dist.Normal(zero, 1.0), lambda z: dist.Normal(z, self.noise))

    def guide(self, x: Tensor) -> None:
        """Site "z"."""
        loc = self.mean(x) + self.shift * self.sd
        _run(x, dist.Normal(loc, torch.full_like(loc, self.scale * self.sd)), None)

    def data(self, count: int, seed: int) -> Tensor:
        """Draws of x."""
        sd = float(np.hypot(1.0, self.noise))
        return tensor(np.random.default_rng(seed).normal(0.0, sd, count))

    def log_evidence(self, x: Tensor) -> Array:
        """A normal density."""
        return stats.norm.logpdf(x.numpy(), 0.0, np.hypot(1.0, self.noise))

    def kl(self, x: Tensor) -> Array:
        """Of two normals."""
        value = (self.scale**2 + self.shift**2 - 1) / 2 - np.log(self.scale)
        return np.full(len(x), value)

    def divergences(self) -> tuple[float, float]:
        """KL(posterior, guide) and the total variation, by quadrature; of every datum the same."""
        z = np.linspace(-12.0, 12.0, 200_001)
        p, q = stats.norm.pdf(z), stats.norm.pdf(z, self.shift, self.scale)
        log_ratio = stats.norm.logpdf(z) - stats.norm.logpdf(z, self.shift, self.scale)
        return float(np.trapezoid(p * log_ratio, z)), float(np.trapezoid(abs(p - q), z) / 2)


@dataclass(frozen=True)
class GammaPoisson:
    """z ~ Gamma(2.5, 0.8), x ~ Poisson(z); the evidence is negative binomial."""

    shape, rate = 2.5, 0.8

    def model(self, x: Tensor) -> None:
        """Sites "z" and "x"."""
        _run(x, dist.Gamma(tensor(self.shape), tensor(self.rate)), dist.Poisson)

    def _guide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 0.8 * (self.shape + x), torch.full_like(x, 0.75 * (self.rate + 1))

    def guide(self, x: Tensor) -> None:
        """Site "z"."""
        _run(x, dist.Gamma(*self._guide(x)), None)

    def data(self, count: int, seed: int) -> Tensor:
        """Draws of x."""
        random = np.random.default_rng(seed)
        return tensor(random.poisson(random.gamma(self.shape, 1 / self.rate, count)))

    def log_evidence(self, x: Tensor) -> Array:
        """Negative binomial."""
        return stats.nbinom.logpmf(x.numpy(), self.shape, self.rate / (1 + self.rate))

    def kl(self, x: Tensor) -> Array:
        """Of two gamma distributions."""
        a, b = (part.numpy() for part in self._guide(x))
        c, d = self.shape + x.numpy(), self.rate + 1
        value = (a - c) * special.digamma(a) - special.gammaln(a) + special.gammaln(c)
        return value + c * (np.log(b) - np.log(d)) + a * (d - b) / b


@dataclass(frozen=True)
class BetaBinomial:
    """z ~ Beta(2, 3), x ~ Binomial(12, z)."""

    a, b, trials = 2.0, 3.0, 12

    def model(self, x: Tensor) -> None:
        """Sites "z" and "x"."""
        prior = dist.Beta(tensor(self.a), tensor(self.b))
        _run(x, prior, lambda z: dist.Binomial(self.trials, z))

    def _guide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 0.7 * (self.a + x), 0.8 * (self.b + self.trials - x)

    def guide(self, x: Tensor) -> None:
        """Site "z"."""
        _run(x, dist.Beta(*self._guide(x)), None)

    def data(self, count: int, seed: int) -> Tensor:
        """Draws of x."""
        random = np.random.default_rng(seed)
        return tensor(random.binomial(self.trials, random.beta(self.a, self.b, count)))

    def log_evidence(self, x: Tensor) -> Array:
        """Beta-binomial."""
        return stats.betabinom.logpmf(x.numpy(), self.trials, self.a, self.b)

    def kl(self, x: Tensor) -> Array:
        """Of two beta distributions."""
        a, b = (part.numpy() for part in self._guide(x))
        c, d = self.a + x.numpy(), self.b + self.trials - x.numpy()
        value = special.betaln(c, d) - special.betaln(a, b) + (a - c) * special.digamma(a)
        return value + (b - d) * special.digamma(b) + (c - a + d - b) * special.digamma(a + b)


@dataclass(frozen=True)
class Discrete:
    """z one of three, x ~ N(location of z, 0.8); evidence and KL by enumeration.

    Attributes:
        missing: Whether the guide never draws the third state.
    """

    missing: bool = False
    share, location = (0.5, 0.3, 0.2), (-1.0, 0.5, 2.0)

    def _joint(self, x: Tensor) -> Array:
        return np.log(self.share) + stats.norm.logpdf(x.numpy()[:, None], self.location, 0.8)

    def _log_guide(self, x: Tensor) -> Array:
        flat = 0.6 * self._joint(x)
        if self.missing:
            flat[:, 2] = -np.inf
        return flat - special.logsumexp(flat, 1, keepdims=True)

    def model(self, x: Tensor) -> None:
        """Sites "z" and "x"."""
        prior = dist.Categorical(tensor(self.share))
        _run(x, prior, lambda z: dist.Normal(tensor(self.location)[z], 0.8))

    def guide(self, x: Tensor) -> None:
        """Site "z"."""
        _run(x, dist.Categorical(probs=tensor(np.exp(self._log_guide(x)))), None)

    def data(self, count: int, seed: int) -> Tensor:
        """Draws of x."""
        random = np.random.default_rng(seed)
        z = random.choice(3, count, p=self.share)
        return tensor(random.normal(np.array(self.location)[z], 0.8))

    def log_evidence(self, x: Tensor) -> Array:
        """A sum of three."""
        return special.logsumexp(self._joint(x), 1)

    def kl(self, x: Tensor) -> Array:
        """A sum of those that the guide draws."""
        q = self._log_guide(x)
        ratio = np.where(np.isfinite(q), q - self._joint(x), 0.0)
        return (np.exp(q) * ratio).sum(1) + self.log_evidence(x)


@dataclass(frozen=True)
class OneBit:
    """z ~ N(0, 1), one bit with log odds 3 z: p(x) = 1/2 by symmetry, whatever x is."""

    def model(self, x: Tensor) -> None:
        """Sites "z" and "x"."""
        zero = torch.zeros((), dtype=torch.float64)
        _run(x, dist.Normal(zero, 1.0), lambda z: dist.Bernoulli(logits=3 * z))

    def guide(self, x: Tensor) -> None:
        """Site "z"."""
        loc = 0.8 * (2 * x - 1)
        _run(x, dist.Normal(loc, torch.full_like(loc, 0.8)), None)

    def data(self, count: int, seed: int) -> Tensor:
        """Fair bits."""
        return tensor(np.random.default_rng(seed).integers(2, size=count))

    def log_evidence(self, x: Tensor) -> Array:
        """The same of all data."""
        return np.full(len(x), np.log(0.5))

    def kl(self, x: Tensor) -> Array:
        """By quadrature."""
        z = np.linspace(-8.0, 10.0, 50_001)
        q = stats.norm.pdf(z, 0.8, 0.8)
        joint = stats.norm.logpdf(z) - np.logaddexp(0.0, -3 * z)
        value = np.trapezoid(q * (stats.norm.logpdf(z, 0.8, 0.8) - joint), z) + np.log(0.5)
        return np.full(len(x), value)


@dataclass(frozen=True)
class Correlated:
    """z ~ N(0, I) in two dimensions, x ~ N(z_1 + z_2, noise): a slanted posterior.

    The guide is a diagonal normal, moved and stretched from the best of its family.
    """

    noise: float = 0.8
    scale: float = 1.3
    shift: float = 0.5

    @property
    def covariance(self) -> Array:
        """Of the posterior."""
        return np.linalg.inv(np.eye(2) + np.ones((2, 2)) / self.noise**2)

    @property
    def _sd(self) -> float:
        """Of the best diagonal normal, in either latent."""
        return float(np.linalg.inv(self.covariance)[0, 0] ** -0.5)

    def model(self, x: Tensor) -> None:
        """Sites "z" and "x"."""
        zero = torch.zeros(2, dtype=torch.float64)
        _run(x, dist.Normal(zero, 1.0).to_event(1), lambda z: dist.Normal(z.sum(-1), self.noise))

    def guide(self, x: Tensor) -> None:
        """Site "z"."""
        loc = (x / (2 + self.noise**2) + self.shift * self._sd)[:, None].expand(-1, 2)
        q = dist.Normal(loc, torch.full_like(loc, self.scale * self._sd)).to_event(1)
        _run(x, q, None)

    def data(self, count: int, seed: int) -> Tensor:
        """Draws of x."""
        sd = float(np.sqrt(2 + self.noise**2))
        return tensor(np.random.default_rng(seed).normal(0.0, sd, count))

    def log_evidence(self, x: Tensor) -> Array:
        """A normal density."""
        return stats.norm.logpdf(x.numpy(), 0.0, np.sqrt(2 + self.noise**2))

    def best_kl(self) -> float:
        """Of the best diagonal normal."""
        return self._kl(1.0, 0.0)

    def kl(self, x: Tensor) -> Array:
        """Of two normals."""
        return np.full(len(x), self._kl(self.scale, self.shift))

    def _kl(self, scale: float, shift: float) -> float:
        precision = np.linalg.inv(self.covariance)
        sd, move = scale * self._sd, np.full(2, shift * self._sd)
        trace = sd**2 * np.trace(precision) + move @ precision @ move - 2
        return float((trace + np.linalg.slogdet(self.covariance)[1]) / 2 - 2 * np.log(sd))
