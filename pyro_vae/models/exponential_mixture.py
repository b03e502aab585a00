r"""Mixtures of exponential families, as Pyro programs and as sums of sufficient statistics.

.. math:: p(x, z = k) = \pi_k \, h(x) \exp\bigl(\eta_k^\top T(x) - A(\eta_k)\bigr)

The log joint of all components is one matrix product of :math:`[T(x), 1]` with the natural
parameters (the E step); what a maximisation needs is one product of the responsibilities with the
same :math:`[T(x), 1]` (the M step). `MixtureProblem` does both in chunks, so that memory does not
grow with the data. `GaussianMixture` lies in a module of its own.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int, Num
from pyro.distributions.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.models.likelihoods import check_batch, check_finite
from pyro_vae.networks import mlp

__all__ = [
    "BernoulliMixture",
    "Expectation",
    "ExponentialMixture",
    "MixtureParameters",
    "MixtureProblem",
    "PoissonMixture",
    "SingularComponentError",
    "Statistics",
]

_CHUNK_NUMBERS = 1 << 17  # float64 numbers of a chunk's largest array: 1 MiB stays in a core's cache
_KEEP_NUMBERS = 1 << 25  # standardised data of up to 256 MiB are kept; larger ones made chunkwise
_STARVED = 1e-8  # data; a component with fewer has no location
_FLOOR = 1e-12  # of probabilities and rates: their logarithms stay finite
_STARTS = ("k-means++", "k-means", "random")
_LLOYD_STEPS = 10


class SingularComponentError(torch.linalg.LinAlgError):
    """A component holds no data, or data without spread; the message names it and the way out.

    Attributes:
        component: Its number, from 0.
    """

    def __init__(self, component: int, message: str) -> None:
        super().__init__(message)
        self.component = component


# --- what the E step gives and the M step takes ---------------------------------------------------


@dataclass(frozen=True)
class MixtureParameters:
    """Parameters while they are fitted, in the coordinates of a `MixtureProblem`, float64.

    Attributes:
        log_weights: Shape (components,).
        locs: Means of the components, shape (components, features).
        roots: Gaussians only: W with precision W^T W; (components, features, features) if full,
            (1, features, features) if tied, otherwise its diagonal, (components, features).
    """

    log_weights: Float[Tensor, " components"]
    locs: Float[Tensor, "components features"]
    roots: Tensor | None = None


@dataclass(frozen=True)
class Statistics:
    """Sums over data of responsibility times sufficient statistic; they add and scale.

    Attributes:
        values: All sums in one vector.
        about: For each component the point that moments are taken about, (components, features);
            None for the origin.
    """

    values: Float[Tensor, " sums"]
    about: Float[Tensor, "components features"] | None = None

    def __add__(self, other: "Statistics") -> "Statistics":
        return replace(self, values=self.values + other.values)

    def __sub__(self, other: "Statistics") -> "Statistics":
        return replace(self, values=self.values - other.values)

    def __mul__(self, factor: float) -> "Statistics":
        return replace(self, values=self.values * factor)


@dataclass(frozen=True)
class Expectation:
    """What one pass over data gives; numbers are totals over data, in nats.

    Attributes:
        log_likelihood: log p(x).
        entropy: Of the posterior q(z) = p(z | x).
        statistics: Expected sufficient statistics under that posterior.
    """

    log_likelihood: float
    entropy: float
    statistics: Statistics


# --- the module -----------------------------------------------------------------------------------


class ExponentialMixture(nn.Module, ABC):
    r"""A mixture as a Pyro model and guide, and as a problem that `fit_em` solves.

    Args:
        num_components: Number K of components.
        dim: Number D of features of one observation.
        guide: `"exact"` (the responsibilities, without parameters of its own) or `"amortized"` (a
            network from x to logits).
        hidden: Hidden layers of the amortised guide's network.
        enumerate: Whether `model` marks its component for enumeration, so that `TraceEnum_ELBO`
            sums it out; otherwise it is sampled.

    Attributes:
        generative: Logits of the weights and parameters of the components, unconstrained.
        recognition: The network of the amortised guide, or None.
    """

    measure: ClassVar[str]

    def __init__(
        self,
        num_components: int,
        dim: int,
        *,
        guide: str = "exact",
        hidden: Sequence[int] = (32,),
        enumerate: bool = True,
    ) -> None:
        super().__init__()
        if num_components < 1 or dim < 1:
            raise ValueError(
                f"num_components and dim must be positive, not {num_components} and {dim}."
            )
        if guide not in ("exact", "amortized"):
            raise ValueError(f"guide is 'exact' or 'amortized', not {guide!r}.")
        self.num_components = num_components
        self.dim = dim
        self.guide_kind = guide
        self.hidden = tuple(hidden)
        self.enumerate = enumerate
        self.generative = self._make_generative()
        self.recognition = (
            mlp(dim, self.hidden, num_components) if guide == "amortized" else None
        )

    @abstractmethod
    def _make_generative(self) -> nn.Module:
        """A module with a parameter `logits` and those of the components, at a random start."""

    @abstractmethod
    def components(self) -> Distribution:
        """The components p(x | z = k): batch shape (components,), event shape (features,)."""

    @abstractmethod
    def _component(self, z: Int[Tensor, "*batch"]) -> Distribution:
        """The component of each z."""

    @abstractmethod
    def _check_support(self, x: Tensor) -> None:
        """Raises if x lies off the support."""

    @abstractmethod
    def _problem(self, x: Tensor, sample_weights: Tensor | None, hold: Sequence[str]) -> Any:
        """The `MixtureProblem` of this family, without the checks of `prepare`."""

    def prepare(
        self,
        x: Num[Tensor, "batch features"],
        sample_weights: Num[Tensor, " batch"] | None = None,
        *,
        hold: Sequence[str] = (),
    ) -> "MixtureProblem":
        """This mixture on one data set, as `fit_em` works on it.

        Args:
            x: Data, shape (batch, features), of any dtype; computed with in float64.
            sample_weights: How often each datum counts, shape (batch,), not negative; once if None.
            hold: Parameters that M steps leave as they are: of `"weights"`, `"locs"` and, for
                Gaussians, `"covariances"`.

        Raises:
            ValueError: If x has the wrong shape, fewer data than components, or values that are not
                finite or off the support; if a feature is constant where the model needs spread;
                or if `sample_weights` or `hold` cannot be used.
        """
        problem = self._problem(x, sample_weights, hold)
        problem.check()
        return problem

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Free parameters, as `aic` and `bic` count them."""

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments: `type(m)(**m.config)` has this architecture."""
        return {
            "num_components": self.num_components,
            "dim": self.dim,
            "guide": self.guide_kind,
            "hidden": list(self.hidden),
            "enumerate": self.enumerate,
        }

    @property
    def weights(self) -> Float[Tensor, " components"]:
        """The mixture weights, which sum to 1."""
        return self.generative.logits.softmax(-1)

    def model(self, x: Float[Tensor, "batch features"]) -> None:
        """The generative program: sites "z" and, observed, "x", in the plate "data".

        Raises:
            ValueError: If x has the wrong shape or dtype, or lies off the support.
        """
        self._check(x)
        pyro.module("generative", self.generative)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=self.generative.logits), infer=self._infer)
            pyro.sample("x", self._component(z), obs=x)

    def guide(self, x: Float[Tensor, "batch features"]) -> None:
        """The posterior of the component, exact or amortised, as a program.

        Raises:
            ValueError: As `model`.
        """
        self._check(x)
        if self.recognition is None:
            pyro.module("generative", self.generative)
            logits = self.log_joint(x)
        else:
            pyro.module("recognition", self.recognition)
            logits = self.recognition(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=logits), infer=self._infer)

    @property
    def _infer(self) -> dict[str, str]:
        return {"enumerate": "parallel"} if self.enumerate else {}

    def log_joint(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch components"]:
        """log p(x, z = k) in nats for each datum and component, differentiable."""
        log_weights = self.generative.logits.log_softmax(-1)
        return log_weights + self.components().log_prob(x[:, None])

    def log_evidence(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, " batch"]:
        """The exact log p(x), in nats per datum, differentiable; see also `score_samples`."""
        self._check(x)
        return self.log_joint(x).logsumexp(-1)

    def initialize(
        self,
        x: Num[Tensor, "batch features"],
        method: str = "k-means++",
        *,
        sample_weights: Num[Tensor, " batch"] | None = None,
        seed: int = 0,
    ) -> "ExponentialMixture":
        """Sets the parameters to a start for these data, and returns the mixture itself.

        Args:
            x: Data, shape (batch, features).
            method: `"k-means++"` (Arthur & Vassilvitskii 2007), `"k-means"` (the same, then ten
                steps of Lloyd's algorithm) or `"random"` (data drawn as centres).
            sample_weights: As in `prepare`.
            seed: Of the draws.

        Raises:
            ValueError: As `prepare`, or if there are fewer distinct data than components.
            SingularComponentError: If data have no spread where the model needs one.
        """
        problem = self.prepare(x, sample_weights)
        problem.write(problem.initialize(method, torch.Generator().manual_seed(seed)))
        return self

    def score_samples(self, x: Num[Tensor, "batch features"]) -> Float[Tensor, " batch"]:
        """log p(x) of each datum, in nats, float64, without gradient and in bounded memory."""
        return torch.cat([part.logsumexp(1) for part in self._log_joints(x)])

    def score(self, x: Num[Tensor, "batch features"]) -> float:
        """The mean of log p(x), in nats per datum."""
        return float(self.score_samples(x).mean())

    def predict_proba(
        self, x: Num[Tensor, "batch features"]
    ) -> Float[Tensor, "batch components"]:
        """The responsibilities p(z = k | x), float64."""
        return torch.cat([part.softmax(1) for part in self._log_joints(x)])

    def predict(self, x: Num[Tensor, "batch features"]) -> Int[Tensor, " batch"]:
        """The most probable component of each datum."""
        return torch.cat([part.argmax(1) for part in self._log_joints(x)])

    def aic(self, x: Num[Tensor, "batch features"]) -> float:
        """Akaike's criterion, -2 log p(x) + 2 `num_parameters`; lower is better."""
        return -2.0 * float(self.score_samples(x).sum()) + 2.0 * self.num_parameters

    def bic(self, x: Num[Tensor, "batch features"]) -> float:
        """The Bayesian criterion, -2 log p(x) + log N `num_parameters`; lower is better."""
        total = float(self.score_samples(x).sum())
        return -2.0 * total + math.log(len(x)) * self.num_parameters

    @torch.no_grad()
    def sample(
        self, num_samples: int, *, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "samples features"], Int[Tensor, " samples"]]:
        """Draws data and their components, without gradient.

        Args:
            num_samples: How many draws.
            generator: The source of randomness, on the parameters' device; torch's global one if
                omitted.
        """
        z = torch.multinomial(self.weights, num_samples, replacement=True, generator=generator)
        return self._draw(z, generator), z

    @abstractmethod
    def _draw(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """A draw from the component of each z."""

    def _log_joints(self, x: Tensor) -> Iterator[Tensor]:
        problem = self._problem(x, None, ())
        return problem.log_joints(problem.read())

    def _check(self, x: Tensor) -> None:
        check_batch(x, self.dim, like=self.generative.logits)
        if is_validation_enabled():  # a graph cannot be captured through a branch on data
            self._check_support(x)


# --- one mixture on one data set ------------------------------------------------------------------


class _Chunk:
    """Some data, a column each, in the problem's coordinates; their features once asked for."""

    def __init__(self, x: Tensor, weights: Tensor | None, log_base: Tensor | float) -> None:
        self.x, self.weights, self.log_base = x, weights, log_base
        self.features: Tensor | None = None


class MixtureProblem(ABC):
    r"""A mixture on one data set: what `fit_em` alternates between.

    Data are read in chunks, so that memory beyond them stays bounded; all sums are float64.

    Args:
        mixture: The module to read parameters from and to write them to.
        x: Data, shape (batch, features).
        sample_weights: See `ExponentialMixture.prepare`.
        hold: Likewise.

    Attributes:
        num_data: Rows of the data.
        total_weight: The sum of `sample_weights`, or the number of rows.
        num_components: Of the mixture.
        measure: What the data are; see `pyro_vae.results.MEASURES`.
    """

    _holdable: ClassVar[tuple[str, ...]] = ("weights", "locs")

    def __init__(
        self,
        mixture: ExponentialMixture,
        x: Tensor,
        sample_weights: Tensor | None,
        hold: Sequence[str],
    ) -> None:
        check_batch(x, mixture.dim, like=x)
        if x.is_complex() or x.dtype == torch.bool:
            raise ValueError(f"The data are {x.dtype}; convert them, for example x.double().")
        check_finite(x)
        mixture._check_support(x)
        unknown = sorted(set(hold) - set(self._holdable))
        if isinstance(hold, str) or unknown:
            raise ValueError(f"hold takes names out of {self._holdable}, not {hold!r}.")
        self.mixture = mixture
        self.num_components = mixture.num_components
        self.measure = mixture.measure
        self.num_data = len(x)
        self.hold = frozenset(hold)
        self._x = x.detach()
        self._weights = self._checked_weights(sample_weights)
        self.total_weight = (
            float(len(x)) if self._weights is None else float(self._weights.sum())
        )
        self._center, self._scale = self._coordinates()
        keep = x.numel() <= _KEEP_NUMBERS
        self._kept = self._standardise(self._x) if keep else None

    def _checked_weights(self, given: Tensor | None) -> Tensor | None:
        if given is None:
            return None
        weights = given.detach().to(torch.float64)
        if weights.shape != (self.num_data,) or not bool(
            (weights >= 0).all() and weights.isfinite().all() and weights.sum() > 0
        ):
            raise ValueError(
                f"sample_weights must have shape ({self.num_data},) and be finite and not "
                "negative, with a positive sum."
            )
        return weights

    def check(self) -> None:
        """Raises if there are too few data to fit, or they lack the spread that the model needs."""
        positive = self.num_data if self._weights is None else int((self._weights > 0).sum())
        if positive < self.num_components:
            raise ValueError(
                f"{positive} data cannot hold {self.num_components} components: use fewer "
                "components, or more data."
            )

    # -- what a family says

    @abstractmethod
    def _coordinates(self) -> tuple[Tensor, Tensor]:
        """The centre and scale of each feature that data are put in before anything is computed."""

    @abstractmethod
    def _width(self) -> int:
        """Numbers for each datum in the largest array of a chunk."""

    @abstractmethod
    def _scorer(self, parameters: MixtureParameters) -> Any:
        """A function from a chunk to log pi_k + eta_k T(x) - A(eta_k), (components, chunk)."""

    @abstractmethod
    def _sums(self, chunk: _Chunk, q: Tensor, about: Tensor | None) -> Tensor:
        """The statistics' values of a chunk with responsibilities q, (components, chunk)."""

    @abstractmethod
    def counts(self, statistics: Statistics) -> Float[Tensor, " components"]:
        """The sum of the responsibilities of each component, in data."""

    @abstractmethod
    def m_step(self, statistics: Statistics, current: MixtureParameters) -> MixtureParameters:
        """The parameters that maximise `expected_log_joint`.

        Args:
            statistics: Expected sufficient statistics, of all data.
            current: Where the parameters named in `hold` are taken from.

        Raises:
            SingularComponentError: If a component holds no data, or data without spread.
        """

    @abstractmethod
    def expected_log_joint(self, statistics: Statistics, parameters: MixtureParameters) -> float:
        """E_q log p(x, z), a total in nats, from the statistics of q alone."""

    @abstractmethod
    def _start(self, centres: Tensor, statistics: Statistics) -> MixtureParameters:
        """Parameters from a partition of the data into those nearest to each centre."""

    @abstractmethod
    def read(self) -> MixtureParameters:
        """The parameters in the module, in the problem's coordinates."""

    @abstractmethod
    def write(self, parameters: MixtureParameters) -> None:
        """Puts parameters into the module, in its own dtype and the data's units."""

    def origin(self, parameters: MixtureParameters) -> Tensor | None:
        """Where moments should be taken about near these parameters, so that nothing cancels."""
        return None

    def _log_base(self, rows: Any) -> Tensor | float:
        """log h(x), or the log-volume of the coordinates, added to every log joint."""
        return 0.0

    def expected_log_prior(self, statistics: Statistics, parameters: MixtureParameters) -> float:
        """E_q log p(z), a total in nats."""
        return float(self.counts(statistics) @ parameters.log_weights)

    # -- passes over data

    def _standardise(self, x: Tensor) -> Float[Tensor, "features chunk"]:
        return x.to(torch.float64).sub(self._center).div_(self._scale).mT.contiguous()

    def _chunks(self, rows: Tensor | None, width: int | None = None) -> Iterator[tuple[Any, _Chunk]]:
        """The data at `rows` (all if None), a chunk at a time, each with its place among them."""
        length = self.num_data if rows is None else len(rows)
        size = max(64, _CHUNK_NUMBERS // (width or self._width()))
        for begin in range(0, length, size):
            place = slice(begin, min(begin + size, length))
            chosen = place if rows is None else rows[place]
            if self._kept is not None:
                x = self._kept[:, chosen]
            else:
                x = self._standardise(self._x[chosen])
            weights = None if self._weights is None else self._weights[chosen]
            yield place, _Chunk(x, weights, self._log_base(chosen))

    @torch.no_grad()
    def e_step(
        self,
        parameters: MixtureParameters,
        rows: Int[Tensor, " rows"] | None = None,
        *,
        about: Float[Tensor, "components features"] | None = None,
    ) -> Expectation:
        """One pass over data: their log-likelihood and their posterior's sufficient statistics.

        Args:
            parameters: Of the posterior.
            rows: Which data; all if None.
            about: What the moments are taken about, from `origin`.
        """
        scorer = self._scorer(parameters)
        totals = torch.zeros(2, dtype=torch.float64, device=self._x.device)
        values: Tensor | None = None
        for _, chunk in self._chunks(rows):
            scores = scorer(chunk)
            top = scores.amax(0)
            scores -= top
            q = scores.exp()
            norm = q.sum(0)
            q /= norm
            norm.log_()
            if chunk.weights is not None:
                q *= chunk.weights
            totals[0] += _weighted_sum(top + norm + chunk.log_base, chunk.weights)
            totals[1] += _weighted_sum(norm, chunk.weights) - torch.vdot(
                q.reshape(-1), scores.reshape(-1)
            )
            sums = self._sums(chunk, q, about)
            values = sums if values is None else values.add_(sums)
        assert values is not None
        log_likelihood, entropy = totals.tolist()
        return Expectation(
            log_likelihood=log_likelihood,
            entropy=entropy,
            statistics=Statistics(self._completed(values, rows, about), about),
        )

    @torch.no_grad()
    def divergence(self, before: MixtureParameters, after: MixtureParameters) -> float:
        """KL of the posterior under `before` from that under `after`, a total in nats."""
        old, new = self._scorer(before), self._scorer(after)
        total = torch.zeros((), dtype=torch.float64, device=self._x.device)
        for _, chunk in self._chunks(None):
            log_q, log_posterior = (score(chunk).log_softmax(0) for score in (old, new))
            each = (log_q.exp() * (log_q - log_posterior)).sum(0)
            total += _weighted_sum(each, chunk.weights)
        return max(float(total), 0.0)

    def _completed(self, values: Tensor, rows: Tensor | None, about: Tensor | None) -> Tensor:
        """The sums with those parts added that are the same for every q."""
        return values

    @torch.no_grad()
    def log_joints(
        self, parameters: MixtureParameters, rows: Int[Tensor, " rows"] | None = None
    ) -> Iterator[Float[Tensor, "chunk components"]]:
        """log p(x, z = k) in nats, chunk by chunk."""
        scorer = self._scorer(parameters)
        for _, chunk in self._chunks(rows):
            yield (scorer(chunk) + chunk.log_base).mT.contiguous()

    def responsibilities(
        self, parameters: MixtureParameters, rows: Int[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "rows components"]:
        """The posterior p(z = k | x) of each datum."""
        return torch.cat([part.softmax(1) for part in self.log_joints(parameters, rows)])

    @torch.no_grad()
    def statistics(
        self,
        q: Float[Tensor, "rows components"],
        rows: Int[Tensor, " rows"] | None = None,
        *,
        about: Float[Tensor, "components features"] | None = None,
    ) -> Statistics:
        """Sufficient statistics under any q."""
        values: Tensor | None = None
        for place, chunk in self._chunks(rows):
            part = q[place].mT
            part = part if chunk.weights is None else part * chunk.weights
            sums = self._sums(chunk, part, about)
            values = sums if values is None else values.add_(sums)
        assert values is not None
        return Statistics(self._completed(values, rows, about), about)

    @torch.no_grad()
    def measure_bound(
        self, parameters: MixtureParameters, q: Float[Tensor, "rows components"]
    ) -> tuple[float, float, float]:
        """log p(x), ELBO and KL(q || p(z | x)) of all data: totals in nats, each summed by itself."""
        totals = torch.zeros(3, dtype=torch.float64, device=self._x.device)
        start = 0
        for joint in self.log_joints(parameters):
            place = slice(start, start + len(joint))
            start = place.stop
            weights = None if self._weights is None else self._weights[place]
            part = q[place]
            log_evidence = joint.logsumexp(1)
            surprise = torch.special.xlogy(part, part).sum(1)
            posterior = joint - log_evidence[:, None]
            totals[0] += _weighted_sum(log_evidence, weights)
            totals[1] += _weighted_sum((part * joint).sum(1) - surprise, weights)
            totals[2] += _weighted_sum(surprise - (part * posterior).sum(1), weights)
        log_likelihood, elbo, divergence = totals.tolist()
        return log_likelihood, elbo, max(divergence, 0.0)

    # -- starts

    @torch.no_grad()
    def initialize(self, method: str, generator: torch.Generator) -> MixtureParameters:
        """Parameters to start from; see `ExponentialMixture.initialize`."""
        if method not in _STARTS:
            raise ValueError(f"A start is one of {_STARTS}, not {method!r}.")
        centres = self._seeds(generator, spread=method != "random")
        if method == "k-means":
            for _ in range(_LLOYD_STEPS):
                centres = self._lloyd_step(centres)
        return self._start(centres, self.statistics(self._nearest(centres)))

    def _seeds(self, generator: torch.Generator, spread: bool) -> Tensor:
        """Distinct data as centres: far from each other if `spread`, else drawn alike."""
        weights = self._weights
        if weights is None:
            weights = self._x.new_ones(self.num_data, dtype=torch.float64)
        distance = torch.full_like(weights, math.inf)
        centres: list[Tensor] = []
        for number in range(self.num_components):
            far = distance > 0
            if not bool((far & (weights > 0)).any()):
                raise ValueError(
                    f"The data have {number} distinct rows, which cannot start "
                    f"{self.num_components} components: use fewer components."
                )
            chances = weights * (distance if spread and number else far.to(weights))
            index = _draw_row(chances, generator)
            centre = self._rows(torch.tensor([index], device=self._x.device))
            centres.append(centre[:, 0])
            for place, chunk in self._chunks(None, width=self.mixture.dim):
                away = (chunk.x - centre).square().sum(0)
                torch.minimum(distance[place], away, out=distance[place])
        return torch.stack(centres)

    def _rows(self, index: Tensor) -> Float[Tensor, "features rows"]:
        if self._kept is not None:
            return self._kept[:, index]
        return self._standardise(self._x[index])

    def _nearest(self, centres: Tensor) -> Float[Tensor, "batch components"]:
        """One for the nearest centre of each datum, zero for the others."""
        parts = []
        for _, chunk in self._chunks(None, width=max(self.mixture.dim, len(centres))):
            scores = torch.addmm(-0.5 * centres.square().sum(1, keepdim=True), centres, chunk.x)
            parts.append(scores.argmax(0))
        return one_hot(torch.cat(parts), len(centres))

    def _lloyd_step(self, centres: Tensor) -> Tensor:
        """Each centre in the mean of its data; where it has none, it stays."""
        q = self._nearest(centres)
        total, count = torch.zeros_like(centres), centres.new_zeros(len(centres))
        for place, chunk in self._chunks(None):
            part = q[place].mT if chunk.weights is None else q[place].mT * chunk.weights
            total += part @ chunk.x.mT
            count += part.sum(1)
        return torch.where(count[:, None] > 0, total / count.clamp(min=_STARVED)[:, None], centres)

    def _log_weights(self, counts: Tensor, current: MixtureParameters) -> Tensor:
        """New log weights; raises if a component has starved."""
        if "weights" in self.hold:
            return current.log_weights
        return (counts / counts.sum()).log()

    def _check_starved(self, counts: Tensor) -> None:
        least = int(counts.argmin())
        if not float(counts[least]) > _STARVED:  # also if it is nan
            raise SingularComponentError(
                least,
                f"Component {least} of {self.num_components} holds {float(counts[least]):.1g} "
                "data, so it has no location: use fewer components, another start (seed=...), "
                "or on_singular='restart' in fit_em.",
            )


def one_hot(
    labels: Int[Tensor, " rows"], num_components: int
) -> Float[Tensor, "rows components"]:
    """A q that puts each datum into one component."""
    q = torch.zeros(len(labels), num_components, dtype=torch.float64, device=labels.device)
    return q.scatter_(1, labels[:, None], 1.0)


def _draw_row(chances: Tensor, generator: torch.Generator) -> int:
    """A row by its chances; torch.multinomial takes no more than 2^24 of them."""
    running = chances.cumsum(0)
    draw = torch.rand((), generator=generator, dtype=torch.float64).to(running) * running[-1]
    row = int(torch.searchsorted(running, draw, right=True))
    return min(row, int(chances.nonzero()[-1]))


def _weighted_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.sum() if weights is None else torch.dot(values, weights)


# --- mixtures whose natural statistic is x itself -------------------------------------------------


class _Means(nn.Module):
    """Logits of the weights, and the natural parameters of the components."""

    def __init__(self, num_components: int, dim: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.natural = nn.Parameter(0.5 * torch.randn(num_components, dim))


class _MeanMixture(ExponentialMixture):
    r"""A mixture with :math:`T(x) = x`: its components are known by their means."""

    def _make_generative(self) -> nn.Module:
        return _Means(self.num_components, self.dim)

    def _problem(self, x: Tensor, sample_weights: Tensor | None, hold: Sequence[str]) -> Any:
        return _MeanProblem(self, x, sample_weights, hold)

    @classmethod
    def _from_means(
        cls, weights: Tensor, means: Tensor, arguments: dict[str, Any]
    ) -> "_MeanMixture":
        check_weights(weights, len(means))
        mixture = cls(*means.shape, **arguments).to(means)
        with torch.no_grad():
            mixture.generative.logits.copy_(weights.log())
            mixture.generative.natural.copy_(mixture._to_natural(means))
        return mixture

    @property
    def num_parameters(self) -> int:
        """Weights, less one for their sum, and one number for each component and feature."""
        return self.num_components - 1 + self.num_components * self.dim

    def components(self) -> Distribution:
        """The components p(x | z = k): batch shape (components,), event shape (features,)."""
        return self._distribution(self.generative.natural)

    def _component(self, z: Tensor) -> Distribution:
        return self._distribution(self.generative.natural[z])

    def _draw(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        return self._draw_from_means(self._to_mean(self.generative.natural)[z], generator)

    @abstractmethod
    def _distribution(self, natural: Tensor) -> Distribution: ...

    @abstractmethod
    def _to_natural(self, means: Tensor) -> Tensor: ...

    @abstractmethod
    def _to_mean(self, natural: Tensor) -> Tensor: ...

    @abstractmethod
    def _log_normaliser(self, natural: Tensor) -> Tensor:
        """A(eta) of each component, summed over features."""

    @abstractmethod
    def _largest_mean(self) -> float: ...

    @abstractmethod
    def _log_base(self, x: Tensor) -> Tensor | float:
        """log h(x) of each datum."""

    @abstractmethod
    def _draw_from_means(self, means: Tensor, generator: torch.Generator | None) -> Tensor: ...


class BernoulliMixture(_MeanMixture):
    r"""A mixture of independent Bernoulli features: latent class analysis.

    .. math:: p(x) = \sum_k \pi_k \prod_d \mu_{kd}^{x_d} (1 - \mu_{kd})^{1 - x_d}

    See `ExponentialMixture` for the arguments.

    References:
        Bishop (2006), Pattern Recognition and Machine Learning, section 9.3.3.

    Example:
        >>> x = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
        >>> BernoulliMixture(2, 3).initialize(x).predict(x).bincount().tolist() in ([2, 1], [1, 2])
        True
    """

    measure = "binary"

    @classmethod
    def from_parameters(
        cls,
        weights: Float[Tensor, " components"],
        probs: Float[Tensor, "components features"],
        **arguments: Any,
    ) -> "BernoulliMixture":
        """Builds the mixture with given weights and probabilities, in the dtype of `probs`."""
        if not bool(((probs > 0) & (probs < 1)).all()):
            raise ValueError("Every probability must lie between 0 and 1, and be neither.")
        mixture = cls._from_means(weights, probs, arguments)
        assert isinstance(mixture, cls)
        return mixture

    @property
    def probs(self) -> Float[Tensor, "components features"]:
        """The probability of a 1, for each component and feature."""
        return self.generative.natural.sigmoid()

    def _check_support(self, x: Tensor) -> None:
        check_finite(x)
        if not bool(((x == 0) | (x == 1)).all()):
            raise ValueError(
                f"The data must be 0 or 1, but lie between {x.min():.3g} and {x.max():.3g} with "
                "values between: binarise them first."
            )

    def _distribution(self, natural: Tensor) -> Distribution:
        return dist.Bernoulli(logits=natural).to_event(1)

    def _to_natural(self, means: Tensor) -> Tensor:
        return means.logit()

    def _to_mean(self, natural: Tensor) -> Tensor:
        return natural.sigmoid()

    def _log_normaliser(self, natural: Tensor) -> Tensor:
        return nn.functional.softplus(natural).sum(-1)

    def _largest_mean(self) -> float:
        return 1.0 - _FLOOR

    def _log_base(self, x: Tensor) -> Tensor | float:
        return 0.0

    def _draw_from_means(self, means: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.bernoulli(means, generator=generator)


class PoissonMixture(_MeanMixture):
    r"""A mixture of independent Poisson features.

    .. math:: p(x) = \sum_k \pi_k \prod_d \lambda_{kd}^{x_d} e^{-\lambda_{kd}} / x_d!

    See `ExponentialMixture` for the arguments.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [0.0], [9.0], [11.0], [10.0]])
        >>> mixture = PoissonMixture(2, 1).initialize(x)
        >>> mixture.predict(x)[:3].unique().numel()
        1
    """

    measure = "counts"

    @classmethod
    def from_parameters(
        cls,
        weights: Float[Tensor, " components"],
        rates: Float[Tensor, "components features"],
        **arguments: Any,
    ) -> "PoissonMixture":
        """Builds the mixture with given weights and rates, in the dtype of `rates`."""
        if not bool(((rates > 0) & rates.isfinite()).all()):
            raise ValueError("Every rate must be positive and finite.")
        mixture = cls._from_means(weights, rates, arguments)
        assert isinstance(mixture, cls)
        return mixture

    @property
    def rates(self) -> Float[Tensor, "components features"]:
        """The mean count, for each component and feature."""
        return self.generative.natural.exp()

    def _check_support(self, x: Tensor) -> None:
        check_finite(x)
        if not bool(((x >= 0) & (x == x.floor())).all()):
            raise ValueError(
                f"The data must be counts 0, 1, 2, ..., but lie between {x.min():.3g} and "
                f"{x.max():.3g} or are not whole: use a GaussianMixture for real values."
            )

    def _distribution(self, natural: Tensor) -> Distribution:
        return dist.Poisson(natural.exp()).to_event(1)

    def _to_natural(self, means: Tensor) -> Tensor:
        return means.log()

    def _to_mean(self, natural: Tensor) -> Tensor:
        return natural.exp()

    def _log_normaliser(self, natural: Tensor) -> Tensor:
        return natural.exp().sum(-1)

    def _largest_mean(self) -> float:
        return math.inf

    def _log_base(self, x: Tensor) -> Tensor | float:
        return -torch.lgamma(x.to(torch.float64) + 1).sum(-1)

    def _draw_from_means(self, means: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.poisson(means, generator=generator)


class _MeanProblem(MixtureProblem):
    """Statistics [x, 1]: for each component the sum of x, then the count."""

    mixture: _MeanMixture

    def _coordinates(self) -> tuple[Tensor, Tensor]:
        one = torch.ones(self.mixture.dim, dtype=torch.float64, device=self._x.device)
        return torch.zeros_like(one), one

    def _width(self) -> int:
        return max(self.mixture.dim, self.num_components)

    def _log_base(self, rows: Any) -> Tensor | float:
        return self.mixture._log_base(self._x[rows])

    def _scorer(self, parameters: MixtureParameters) -> Any:
        natural = self.mixture._to_natural(parameters.locs)
        constant = parameters.log_weights - self.mixture._log_normaliser(natural)
        return lambda chunk: torch.addmm(constant[:, None], natural, chunk.x)

    def _sums(self, chunk: _Chunk, q: Tensor, about: Tensor | None) -> Tensor:
        return torch.cat([q @ chunk.x.mT, q.sum(1, keepdim=True)], 1).reshape(-1)

    def _unpack(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        table = statistics.values.reshape(self.num_components, -1)
        return table[:, :-1], table[:, -1]

    def counts(self, statistics: Statistics) -> Tensor:
        return self._unpack(statistics)[1]

    def m_step(self, statistics: Statistics, current: MixtureParameters) -> MixtureParameters:
        sums, counts = self._unpack(statistics)
        self._check_starved(counts)
        means = (sums / counts[:, None]).clamp(_FLOOR, self.mixture._largest_mean())
        return MixtureParameters(
            log_weights=self._log_weights(counts, current),
            locs=current.locs if "locs" in self.hold else means,
        )

    def expected_log_joint(self, statistics: Statistics, parameters: MixtureParameters) -> float:
        sums, counts = self._unpack(statistics)
        natural = self.mixture._to_natural(parameters.locs)
        constant = parameters.log_weights - self.mixture._log_normaliser(natural)
        return float((sums * natural).sum() + counts @ constant) + self._base_total

    @property
    def _base_total(self) -> float:
        if not hasattr(self, "_base"):
            parts = (
                _weighted_sum(c.log_base, c.weights) if isinstance(c.log_base, Tensor) else 0.0
                for _, c in self._chunks(None)
            )
            self._base = float(sum(parts))
        return self._base

    def _start(self, centres: Tensor, statistics: Statistics) -> MixtureParameters:
        sums, counts = self._unpack(statistics)
        overall = sums.sum(0) / counts.sum()
        # Half a datum of the overall mean, so that no probability or rate starts at its limit.
        means = (sums + 0.5 * overall) / (counts + 0.5)[:, None]
        weights = (counts + 0.5) / (counts + 0.5).sum()
        return MixtureParameters(
            weights.log(), means.clamp(_FLOOR, self.mixture._largest_mean())
        )

    @torch.no_grad()
    def read(self) -> MixtureParameters:
        generative = self.mixture.generative
        natural = generative.natural.to(self._x.device, torch.float64)
        means = self.mixture._to_mean(natural).clamp(_FLOOR, self.mixture._largest_mean())
        logits = generative.logits.to(self._x.device, torch.float64)
        return MixtureParameters(logits.log_softmax(-1), means)

    @torch.no_grad()
    def write(self, parameters: MixtureParameters) -> None:
        generative = self.mixture.generative
        generative.logits.copy_(parameters.log_weights)
        generative.natural.copy_(self.mixture._to_natural(parameters.locs))


def check_weights(weights: Tensor, num_components: int) -> None:
    """Raises unless these are positive weights of so many components."""
    total = float(weights.sum())
    if weights.shape != (num_components,) or not bool((weights > 0).all()):
        raise ValueError(f"There must be {num_components} positive weights, one a component.")
    if abs(total - 1) > 1e-4:
        raise ValueError(f"The weights sum to {total:.6g}, not to 1: divide them by their sum.")
