r"""Conjugate priors on the parameters of a mixture, and variational Bayes as EM.

.. math:: F(q) = E_q \log p(x, z \mid \theta) + H(q(z)) - \mathrm{KL}(q(\theta) \,\|\, p(\theta))

Where the prior is conjugate, the best :math:`q(\theta)` is the prior with the expected sufficient
statistics added to it, and the best :math:`q(z)` is the posterior under the *expected* natural
parameters. So `ConjugateProblem` is EM on a mixture once more: its parameters are a posterior, its
M step adds, and its E step is that of the mixture at `expected(posterior)`.

References: Attias (2000), A variational Bayesian framework for graphical models; Bishop (2006),
Pattern Recognition and Machine Learning, section 10.2.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from pyro_vae.data import as_tensor, takes_arrays
from pyro_vae.models.mixtures.problem import (
    Expectation,
    MixtureParameters,
    Statistics,
)

__all__ = [
    "BernoulliConjugate",
    "ConjugateProblem",
    "MixturePosterior",
    "PoissonConjugate",
]


@dataclass(frozen=True, eq=False)
class MixturePosterior:
    """The posterior over the parameters of a mixture that variational Bayes reached.

    Attributes:
        prior: Hyperparameters of the prior by name, in the data's units.
        hyperparameters: Those of the posterior, of which `concentration` has shape (components,).
        marginals: The posterior of each parameter by itself: "weights", and "locs" and
            "precisions", "probs" or "rates". Given the precisions, locs are Gaussian; by
            themselves they are Student's.
        predictive: The density of a new datum in each component with the parameters integrated
            out: batch shape (components,), event shape (features,).
    """

    prior: dict[str, Tensor]
    hyperparameters: dict[str, Tensor]
    marginals: dict[str, Distribution]
    predictive: Distribution

    @takes_arrays()
    def log_joint(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch components"]:
        """The log of p(x, z = k) of new data, in nats, with the parameters integrated out."""
        return self.marginals["weights"].mean.log() + self.predictive.log_prob(x[:, None])

    def log_predictive(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, " batch"]:
        """The log-density of each new datum, in nats, with the parameters integrated out."""
        return self.log_joint(x).logsumexp(1)


class ConjugateProblem(ABC):
    """A mixture with conjugate priors on one data set, as `fit_em` works on it.

    What EM calls parameters is a posterior over them here, and every bound has
    KL(q(theta) || p(theta)) subtracted. `e_step` has as `log_likelihood` the bound at the best
    q(z), for the evidence itself is not known.

    Args:
        points: The mixture on these data, whose passes over them are used.
        prior: Hyperparameters by name; those left out take the defaults of `_hyperparameters`.

    Raises:
        ValueError: If a hyperparameter is unknown or cannot be used, or a parameter is held.
    """

    names: ClassVar[tuple[str, ...]]

    def __init__(self, points: Any, prior: Mapping[str, Any] | None = None) -> None:
        if points.has_missing:
            raise ValueError(
                "variational Bayes takes no missing entries: pass method='exact', or leave out "
                "the rows that have some"
            )
        self.points: Any = points
        self.num_data, self.total_weight = points.num_data, points.total_weight
        self.num_components, self.measure = points.num_components, points.measure
        given = dict(prior or {})
        if unknown := sorted(set(given) - set(self.names)):
            raise ValueError(f"prior takes names out of {self.names}, not {unknown}")
        self.given = {name: self._number(name, value) for name, value in given.items()}
        self.prior = self._checked(self._hyperparameters())
        self._last: tuple[Any, MixtureParameters, float] | None = None

    def _summary(self, posterior: Any) -> tuple[MixtureParameters, float]:
        """`expected` and `divergence_from_prior`, which one half step asks for several times."""
        if self._last is None or self._last[0] is not posterior:
            divergence = self.divergence_from_prior(posterior)
            self._last = posterior, self.expected(posterior), divergence
        return self._last[1:]

    def _number(self, name: str, value: Any) -> Tensor:
        if isinstance(value, int | float):
            value = torch.tensor(value, dtype=torch.float64)
        number = as_tensor(value, torch.float64).to(self.points._x.device)
        if not bool(number.isfinite().all()):
            raise ValueError(f"prior[{name!r}] must be finite, not {value!r}")
        return number

    def _checked(self, prior: dict[str, Tensor]) -> dict[str, Tensor]:
        """The prior, broadcast to its shapes; raises where a number that must be is not positive.

        A scalar is the same for all; other shapes are those of `_hyperparameters`.
        """
        checked = {}
        for name, default in prior.items():
            value = self.given.get(name, default)
            if value.dim() and value.shape != default.shape:
                raise ValueError(
                    f"prior[{name!r}] is one number or has shape {tuple(default.shape)}, not "
                    f"{tuple(value.shape)}"
                )
            if name not in ("loc", "inverse_scale") and not bool((value > 0).all()):
                raise ValueError(f"prior[{name!r}] must be positive")
            if name == "inverse_scale" and not value.dim() and default.dim() == 2:
                value = value * torch.eye(len(default)).to(value)
            checked[name] = value.expand(default.shape)
        return checked

    # -- what a family says

    @abstractmethod
    def _hyperparameters(self) -> dict[str, Tensor]:
        """The defaults of the prior, in the data's units."""

    @abstractmethod
    def m_step(self, statistics: Statistics, current: Any) -> Any:
        """The best q(theta) for these statistics: the prior, with them added."""

    @abstractmethod
    def expected(self, posterior: Any) -> MixtureParameters:
        """Parameters whose log joint is E_q log p(x, z = k | theta), weights left as they fall."""

    @abstractmethod
    def estimate(self, posterior: Any) -> MixtureParameters:
        """Parameters that stand for the posterior: its means, of Gaussians 1 / E precision."""

    @abstractmethod
    def divergence_from_prior(self, posterior: Any) -> float:
        """KL(q(theta) || p(theta)), in nats."""

    @abstractmethod
    def described(self, posterior: Any) -> MixturePosterior:
        """The posterior in the data's units."""

    def _expected_log_weights(self, concentration: Tensor) -> Tensor:
        return concentration.digamma() - concentration.sum().digamma()

    def _weights_divergence(self, concentration: Tensor) -> Tensor:
        prior = self.prior["concentration"].expand_as(concentration)
        return kl_divergence(dist.Dirichlet(concentration), dist.Dirichlet(prior))

    @abstractmethod
    def unconstrained(self, posterior: Any) -> Tensor:
        """The posterior as one vector, of which every value is one."""

    @abstractmethod
    def constrained(self, vector: Tensor) -> Any:
        """The posterior that `unconstrained` makes this vector of."""

    # -- what EM asks of a problem

    def initialize(self, method: str, generator: torch.Generator) -> Any:
        """The posterior after an E step at a start of the mixture."""
        return self._from_points(self.points.initialize(method, generator))

    def read(self) -> Any:
        """The posterior after an E step at the parameters in the model."""
        return self._from_points(self.points.read())

    def _from_points(self, parameters: MixtureParameters) -> Any:
        about = self.points.origin(parameters)
        return self.m_step(self.points.e_step(parameters, about=about).statistics, None)

    def write(self, posterior: Any) -> None:
        """Puts `estimate` into the model."""
        self.points.write(self.estimate(posterior))

    def origin(self, posterior: Any) -> Any:
        """As of the mixture."""
        return self.points.origin(self._summary(posterior)[0])

    def e_step(
        self, posterior: Any, rows: Tensor | None = None, *, about: Any = None, keep: bool = False
    ) -> Expectation:
        """The best q(z): its statistics, its entropy and, as `log_likelihood`, its bound."""
        expected, divergence = self._summary(posterior)
        found = self.points.e_step(expected, rows, about=about, keep=keep)
        return replace(found, log_likelihood=found.log_likelihood - divergence)

    def responsibilities(self, posterior: Any, rows: Tensor | None = None) -> Tensor:
        """The best q(z = k), shape (rows, components)."""
        return self.points.responsibilities(self._summary(posterior)[0], rows)

    def statistics(
        self, q: Tensor, rows: Tensor | None = None, *, about: Any = None, at: Any = None
    ) -> Statistics:
        """Sufficient statistics under any q(z)."""
        return self.points.statistics(q, rows, about=about)

    def counts(self, statistics: Statistics) -> Tensor:
        """The weight of the data in each component."""
        return self.points.counts(statistics)

    def expected_log_joint(self, statistics: Statistics, posterior: Any) -> float:
        """E_q log p(x, z, theta) - E_q log q(theta): the bound without the entropy of q(z)."""
        expected, divergence = self._summary(posterior)
        return self.points.expected_log_joint(statistics, expected) - divergence

    def expected_log_prior(self, statistics: Statistics, posterior: Any) -> float:
        """E_q log p(z | theta) - KL(q(theta) || p(theta)), so that `kl` is that of all latents."""
        log_weights = self._expected_log_weights(posterior.concentration)
        return float(self.counts(statistics) @ log_weights) - self._summary(posterior)[1]

    def measure_bound(self, posterior: Any, q: Tensor) -> tuple[float, float, float]:
        """The bound at the best q(z), that at this q(z), and the KL between the two."""
        expected, divergence = self._summary(posterior)
        best, bound, gap = self.points.measure_bound(expected, q)
        return best - divergence, bound - divergence, gap

    def divergence(self, log_q: Tensor, log_p: Tensor) -> float:
        """As of the mixture."""
        return self.points.divergence(log_q, log_p)


# --- mixtures whose natural statistic is x itself -------------------------------------------------


@dataclass(frozen=True)
class _Independent:
    """q(theta) of independent features: two hyperparameters, (components, features) each."""

    concentration: Tensor
    first: Tensor
    second: Tensor


class _MeanConjugate(ConjugateProblem):
    """Dirichlet weights, and for each component and feature a prior with two hyperparameters."""

    @abstractmethod
    def _family(self, first: Tensor, second: Tensor) -> Any:
        """The distribution of the means."""

    @abstractmethod
    def _add(self, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """What data add to the two."""

    @abstractmethod
    def _expectations(self, posterior: _Independent) -> tuple[Tensor, Tensor]:
        """E eta, and E A(eta) summed over features."""

    @abstractmethod
    def _predictive(self, posterior: _Independent) -> Distribution: ...

    def m_step(self, statistics: Statistics, current: Any) -> _Independent:
        """The best q(theta) for these statistics: the prior, with them added."""
        sums, counts = self.points._unpack(statistics)
        added = self._add(sums, counts[:, None])
        first, second = (self.prior[name] for name in self.names[1:])
        concentration = self.prior["concentration"] + counts
        return _Independent(concentration, first + added[0], second + added[1])

    def expected(self, posterior: _Independent) -> MixtureParameters:
        """The mixture at the mean natural parameters, with what that leaves out as weights."""
        natural, normaliser = self._expectations(posterior)
        log_weights = self._expected_log_weights(posterior.concentration)
        log_weights = log_weights + self.points.mixture._log_normaliser(natural) - normaliser
        locs = self._family(posterior.first, posterior.second).mean
        return MixtureParameters(log_weights, locs, natural=natural)

    def estimate(self, posterior: _Independent) -> MixtureParameters:
        """Mean weights, and mean probabilities or rates."""
        weights = posterior.concentration / posterior.concentration.sum()
        return MixtureParameters(
            weights.log(), self._family(posterior.first, posterior.second).mean
        )

    def divergence_from_prior(self, posterior: _Independent) -> float:
        """KL(q(theta) || p(theta)), in nats."""
        prior = self._family(
            *(self.prior[name].expand_as(posterior.first) for name in self.names[1:])
        )
        each = kl_divergence(self._family(posterior.first, posterior.second), prior)
        return float(self._weights_divergence(posterior.concentration) + each.sum())

    def unconstrained(self, posterior: _Independent) -> Tensor:
        """Logarithms of all hyperparameters."""
        each = posterior.concentration, posterior.first.flatten(), posterior.second.flatten()
        return torch.cat(each).log()

    def constrained(self, vector: Tensor) -> _Independent:
        """The posterior that `unconstrained` makes this vector of."""
        concentration, each = vector.exp().tensor_split([self.num_components])
        first, second = each.reshape(2, self.num_components, -1)
        return _Independent(concentration, first, second)

    def described(self, posterior: _Independent) -> MixturePosterior:
        """The posterior over weights and over probabilities or rates."""
        name = "probs" if self.measure == "binary" else "rates"
        own = dict(zip(self.names[1:], (posterior.first, posterior.second), strict=True))
        return MixturePosterior(
            prior=dict(self.prior),
            hyperparameters={"concentration": posterior.concentration, **own},
            marginals={
                "weights": dist.Dirichlet(posterior.concentration),
                name: self._family(posterior.first, posterior.second),
            },
            predictive=self._predictive(posterior),
        )

    def _ones(self) -> tuple[Tensor, Tensor]:
        one = torch.ones(self.points.mixture.dim, dtype=torch.float64).to(self.points._x.device)
        return one[0], one


class BernoulliConjugate(_MeanConjugate):
    """Dirichlet weights and Beta probabilities, of `ones` and `zeros` seen beforehand.

    The defaults are 1 / K, 1 and 1.
    """

    names = ("concentration", "ones", "zeros")

    def _hyperparameters(self) -> dict[str, Tensor]:
        number, each = self._ones()
        return {"concentration": number / self.num_components, "ones": each, "zeros": each}

    def _family(self, first: Tensor, second: Tensor) -> Any:
        return dist.Beta(first, second)

    def _add(self, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        return sums, counts - sums

    def _expectations(self, posterior: _Independent) -> tuple[Tensor, Tensor]:
        a, b = posterior.first, posterior.second
        normaliser = (a + b).digamma() - b.digamma()
        return a.digamma() - b.digamma(), normaliser.sum(-1)

    def _predictive(self, posterior: _Independent) -> Distribution:
        mean = self._family(posterior.first, posterior.second).mean
        return dist.Bernoulli(mean).to_event(1)


class PoissonConjugate(_MeanConjugate):
    """Dirichlet weights and Gamma rates, of a `shape` and a `rate`.

    The defaults are 1 / K, 1, and what makes the prior mean that of the data.
    """

    names = ("concentration", "shape", "rate")

    def _hyperparameters(self) -> dict[str, Tensor]:
        number, each = self._ones()
        total = torch.zeros_like(each)
        for _, chunk in self.points._chunks(None):
            weighted = chunk.x if chunk.weights is None else chunk.x * chunk.weights
            total += weighted.sum(1)
        mean = total / self.points.total_weight
        shape = self.given.get("shape", each).expand_as(each)
        rate = shape / torch.where(mean > 0, mean, 1.0)
        return {"concentration": number / self.num_components, "shape": each, "rate": rate}

    def _family(self, first: Tensor, second: Tensor) -> Any:
        return dist.Gamma(first, second)

    def _add(self, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        return sums, counts.expand_as(sums)

    def _expectations(self, posterior: _Independent) -> tuple[Tensor, Tensor]:
        a, b = posterior.first, posterior.second
        return a.digamma() - b.log(), (a / b).sum(-1)

    def _predictive(self, posterior: _Independent) -> Distribution:
        return dist.GammaPoisson(posterior.first, posterior.second).to_event(1)
