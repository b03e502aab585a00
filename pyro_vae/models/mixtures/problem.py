r"""Sums of sufficient statistics over one data set: what EM on a mixture alternates between.

`MixtureProblem` reads data in chunks, so that memory beyond them stays bounded, and computes in
float64. A family says how the log joint of a chunk comes from the parameters (a matrix product
with the natural parameters), what its statistics are (a product with the responsibilities), and
which parameters maximise the bound.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_vae.models.parts import check_batch

__all__ = [
    "Chunk",
    "Expectation",
    "MixtureParameters",
    "MixtureProblem",
    "SingularComponentError",
    "Statistics",
    "check_weights",
    "one_hot",
    "weighted_sum",
]

_CHUNK_NUMBERS = 1 << 18  # float64 numbers of a chunk's largest array: 2 MiB, a cache's size
_MAX_CHUNK = 8192  # data in a chunk
_KEEP_NUMBERS = 1 << 25  # standardised data of up to 256 MiB are kept; larger ones made chunkwise
_STARVED = 1e-8  # data; a component with fewer has no location
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
        natural: What stands for the natural parameters of `locs`, where it is not theirs but an
            expectation; (components, features).
    """

    log_weights: Float[Tensor, " components"]
    locs: Float[Tensor, "components features"]
    roots: Tensor | None = None
    natural: Tensor | None = None


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
        log_posterior: Its logarithm, shape (components, rows), where asked for.
    """

    log_likelihood: float
    entropy: float
    statistics: Statistics
    log_posterior: Tensor | None = None


# --- one mixture on one data set ------------------------------------------------------------------


class Chunk:
    """Some data, a column each, in the problem's coordinates; their features once asked for.

    Where entries are missing, `pattern` numbers which of each datum, and `completed` has the data
    with these expected under the parameters `at`; see `missing`.
    """

    def __init__(self, x: Tensor, weights: Tensor | None, log_base: Tensor | float) -> None:
        self.x, self.weights, self.log_base = x, weights, log_base
        self.features: Tensor | None = None
        self.at: MixtureParameters | None = None
        self.pattern: Tensor | None = None
        self.completed: Any = None


class MixtureProblem(ABC):
    r"""A mixture on one data set: what `fit_em` alternates between.

    Data are read in chunks, so that memory beyond them stays bounded; all sums are float64.

    Args:
        mixture: The module to read parameters from and to write them to.
        x: Data, shape (batch, features).
        sample_weights: See `models.ExponentialMixture.prepare`.
        hold: Likewise.
        coordinates: Centre and scale of each feature; from the data if None, as a fit wants them.

    Attributes:
        num_data: Rows of the data.
        total_weight: The sum of `sample_weights`, or the number of rows.
        num_components: Of the mixture.
        measure: What the data are; see `pyro_vae.results.MEASURES`.
        has_missing: Whether entries of the data are missing, and latent like the components.
    """

    has_missing: bool = False
    _holdable: ClassVar[tuple[str, ...]] = ("weights", "locs")
    _least_chunk: ClassVar[int] = 512  # data: products of fewer are slow

    def __init__(
        self,
        mixture: Any,
        x: Tensor,
        sample_weights: Tensor | None,
        hold: Sequence[str],
        coordinates: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        check_batch(x, mixture.dim, like=x)
        if x.is_complex() or x.dtype == torch.bool:
            raise ValueError(f"the data are {x.dtype}; convert them, for example x.double()")
        self._check_values(x, mixture)
        unknown = sorted(set(hold) - set(self._holdable))
        if isinstance(hold, str) or unknown:
            raise ValueError(f"hold takes names out of {self._holdable}, not {hold!r}")
        self.mixture = mixture
        self.num_components = mixture.num_components
        self.measure = mixture.measure
        self.num_data = len(x)
        self.hold = frozenset(hold)
        self._x = x.detach()
        self._weights = self._checked_weights(sample_weights)
        self.total_weight = float(len(x)) if self._weights is None else float(self._weights.sum())
        self._center, self._scale = coordinates or self._coordinates()
        keep = x.numel() <= _KEEP_NUMBERS
        self._kept = self._standardise(self._x) if keep else None

    def _check_values(self, x: Tensor, mixture: Any) -> None:
        """Raises if a value is not finite or off the support."""
        mixture._check_support(x)

    def _checked_weights(self, given: Tensor | None) -> Tensor | None:
        if given is None:
            return None
        weights = given.detach().to(torch.float64)
        if weights.shape != (self.num_data,) or not bool(
            (weights >= 0).all() and weights.isfinite().all() and weights.sum() > 0
        ):
            raise ValueError(
                f"sample_weights must have shape ({self.num_data},) and be finite and not "
                "negative, with a positive sum"
            )
        return weights

    @property
    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Centre and scale of each feature: statistics add up where these are the same."""
        return self._center, self._scale

    def check(self) -> None:
        """Raises if there are too few data to fit, or they lack the spread that the model needs."""
        positive = self.num_data if self._weights is None else int((self._weights > 0).sum())
        if positive < self.num_components:
            raise ValueError(
                f"{positive} data cannot hold {self.num_components} components: use fewer "
                "components, or more data"
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
    def _sums(self, chunk: Chunk, q: Tensor, about: Tensor | None) -> Tensor:
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

    @abstractmethod
    def unconstrained(self, parameters: MixtureParameters) -> Float[Tensor, " numbers"]:
        """The parameters as one vector, of which every value is one."""

    @abstractmethod
    def constrained(self, vector: Float[Tensor, " numbers"]) -> MixtureParameters:
        """The parameters that `unconstrained` makes this vector of."""

    def origin(self, parameters: MixtureParameters) -> Tensor | None:
        """Where moments should be taken about near these parameters, so that nothing cancels."""
        return None

    def _log_base(self, rows: Any) -> Tensor | float:
        """Log-carrier h(x), or the log-volume of the coordinates, added to every log joint."""
        return 0.0

    def entropy_residual(self, statistics: Statistics, parameters: MixtureParameters) -> float:
        r"""How far the bound is from the sum of entropies that it equals at a stationary point.

        .. math:: E_q \log p(x, z) + N H(\pi) + \sum_k n_k H_k
                  = \sum_k (n_k - N \pi_k) \log \pi_k
                  + \sum_k \langle \eta_k, t_k - n_k \nabla A(\eta_k) \rangle

        for sums :math:`n_k` and :math:`t_k` of responsibilities and sufficient statistics, and
        :math:`H_k` the entropy of component k (without its log-carrier h(x), on which no parameter
        has a say). Weights are stationary where :math:`n_k = N \pi_k`, and the log density
        :math:`\langle \eta, T(x) \rangle - A(\eta)` of a family that can scale its :math:`\eta`
        where :math:`\langle \eta, t_k - n_k \nabla A \rangle = 0`: so both terms vanish.

        Args:
            statistics: Expected sufficient statistics under q, of all data.
            parameters: Of the model.

        Returns:
            A total in nats; nan where what is held or added to covariances keeps parameters from
            being stationary.

        References:
            Damm, Forster, Velychko, Dai, Fischer & Lücke (2023), The ELBO of variational
            autoencoders converges to a sum of entropies, AISTATS.
        """
        if "weights" in self.hold or not self._scales_freely:
            return math.nan
        counts = self.counts(statistics)
        log_weights = parameters.log_weights
        beside = counts - self.total_weight * log_weights.exp()
        prior = torch.where(beside == 0, 0.0, beside * log_weights).sum()
        return float(prior) + self._family_residual(statistics, parameters)

    @property
    @abstractmethod
    def _scales_freely(self) -> bool:
        """Whether the natural parameters of every component can be scaled by a factor."""

    @abstractmethod
    def _family_residual(self, statistics: Statistics, parameters: MixtureParameters) -> float:
        """The sum over components of <eta, t - n grad A(eta)>, a total in nats."""

    def expected_log_prior(self, statistics: Statistics, parameters: MixtureParameters) -> float:
        """E_q log p(z), a total in nats."""
        return float(self.counts(statistics) @ parameters.log_weights)

    # -- passes over data

    def _standardise(self, x: Tensor) -> Float[Tensor, "features chunk"]:
        return x.to(torch.float64).sub(self._center).div_(self._scale).mT.contiguous()

    def _chunks(self, rows: Tensor | None, width: int | None = None) -> Iterator[tuple[Any, Chunk]]:
        """The data at `rows` (all if None), a chunk at a time, each with its place among them."""
        length = self.num_data if rows is None else len(rows)
        size = min(max(_CHUNK_NUMBERS // (width or self._width()), self._least_chunk), _MAX_CHUNK)
        for begin in range(0, length, size):
            place = slice(begin, min(begin + size, length))
            chosen = place if rows is None else rows[place]
            if self._kept is not None:
                x = self._kept[:, chosen]
            else:
                x = self._standardise(self._x[chosen])
            weights = None if self._weights is None else self._weights[chosen]
            yield place, Chunk(x, weights, self._log_base(chosen))

    @torch.no_grad()
    def e_step(
        self,
        parameters: MixtureParameters,
        rows: Int[Tensor, " rows"] | None = None,
        *,
        about: Float[Tensor, "components features"] | None = None,
        keep: bool = False,
    ) -> Expectation:
        """One pass over data: their log-likelihood and their posterior's sufficient statistics.

        Args:
            parameters: Of the posterior.
            rows: Which data; all if None.
            about: What the moments are taken about, from `origin`.
            keep: Whether to return the posterior itself, a number a datum and component.
        """
        kept: list[Tensor] = []
        scorer = self._scorer(parameters)
        totals = torch.zeros(2, dtype=torch.float64, device=self._x.device)
        values: Tensor | None = None
        for _, chunk in self._chunks(rows):
            chunk.at = parameters
            scores = scorer(chunk)
            top = scores.amax(0)
            scores -= top
            q = scores.exp()
            norm = q.sum(0)
            q /= norm
            norm.log_()
            if keep:
                kept.append(scores - norm)
            if chunk.weights is not None:
                q *= chunk.weights
            totals[0] += weighted_sum(top + norm + chunk.log_base, chunk.weights)
            totals[1] += weighted_sum(norm, chunk.weights) - torch.vdot(
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
            log_posterior=torch.cat(kept, 1) if keep else None,
        )

    @torch.no_grad()
    def divergence(
        self, log_q: Float[Tensor, "components batch"], log_p: Float[Tensor, "components batch"]
    ) -> float:
        """KL(q || p) summed over all data, in nats, from what `e_step` kept."""
        each = (log_q.exp() * (log_q - log_p)).sum(0)
        return max(float(weighted_sum(each, self._weights)), 0.0)

    def _completed(self, values: Tensor, rows: Tensor | None, about: Tensor | None) -> Tensor:
        """The sums with those parts added that are the same for every q."""
        return values

    @torch.no_grad()
    def log_joints(
        self, parameters: MixtureParameters, rows: Int[Tensor, " rows"] | None = None
    ) -> Iterator[Float[Tensor, "chunk components"]]:
        """The log of p(x, z = k) in nats, chunk by chunk."""
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
        q: Float[Tensor, "rows components"] | Int[Tensor, " rows"],
        rows: Int[Tensor, " rows"] | None = None,
        *,
        about: Float[Tensor, "components features"] | None = None,
        at: MixtureParameters | None = None,
    ) -> Statistics:
        """Sufficient statistics under any q, or with each datum in the one component given.

        Args:
            q: The responsibilities, or the component of each datum.
            rows: Which data; all if None.
            about: What the moments are taken about, from `origin`.
            at: Parameters under which missing entries are expected, where there are some; those of
                the data's own mean and spread if None.
        """
        values: Tensor | None = None
        for place, chunk in self._chunks(rows):
            part = self._columns(q[place])
            part = part if chunk.weights is None else part * chunk.weights
            chunk.at = at
            sums = self._sums(chunk, part, about)
            values = sums if values is None else values.add_(sums)
        assert values is not None
        return Statistics(self._completed(values, rows, about), about)

    @torch.no_grad()
    def measure_bound(
        self, parameters: MixtureParameters, q: Float[Tensor, "rows components"]
    ) -> tuple[float, float, float]:
        """The log of p(x), ELBO and KL(q || p(z | x)): totals in nats, each summed by itself."""
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
            totals[0] += weighted_sum(log_evidence, weights)
            totals[1] += weighted_sum((part * joint).sum(1) - surprise, weights)
            totals[2] += weighted_sum(surprise - (part * posterior).sum(1), weights)
        log_likelihood, elbo, divergence = totals.tolist()
        return log_likelihood, elbo, max(divergence, 0.0)

    # -- starts

    @torch.no_grad()
    def initialize(self, method: str, generator: torch.Generator) -> MixtureParameters:
        """Parameters to start from; see `models.ExponentialMixture.initialize`."""
        if method not in _STARTS:
            raise ValueError(f"a start is one of {_STARTS}, not {method!r}")
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
                    f"the data have {number} distinct rows, which cannot start "
                    f"{self.num_components} components: use fewer components"
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

    def _columns(self, q: Tensor) -> Float[Tensor, "components rows"]:
        """A q, or labels, with a column a datum."""
        return (q if q.dim() == 2 else one_hot(q, self.num_components)).mT

    def _nearest(self, centres: Tensor) -> Int[Tensor, " batch"]:
        """The nearest centre of each datum."""
        parts = []
        for _, chunk in self._chunks(None, width=max(self.mixture.dim, len(centres))):
            scores = torch.addmm(-0.5 * centres.square().sum(1, keepdim=True), centres, chunk.x)
            parts.append(scores.argmax(0))
        return torch.cat(parts)

    def _lloyd_step(self, centres: Tensor) -> Tensor:
        """Each centre in the mean of its data; where it has none, it stays."""
        labels = self._nearest(centres)
        total, count = torch.zeros_like(centres), centres.new_zeros(len(centres))
        for place, chunk in self._chunks(None):
            part = self._columns(labels[place])
            part = part if chunk.weights is None else part * chunk.weights
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


def one_hot(labels: Int[Tensor, " rows"], num_components: int) -> Float[Tensor, "rows components"]:
    """A q that puts each datum into one component."""
    q = torch.zeros(len(labels), num_components, dtype=torch.float64, device=labels.device)
    return q.scatter_(1, labels[:, None], 1.0)


def _draw_row(chances: Tensor, generator: torch.Generator) -> int:
    """A row by its chances; torch.multinomial takes no more than 2^24 of them."""
    running = chances.cumsum(0)
    draw = torch.rand((), generator=generator, dtype=torch.float64).to(running) * running[-1]
    row = int(torch.searchsorted(running, draw, right=True))
    return min(row, int(chances.nonzero()[-1]))


def weighted_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    """The sum over data, each counted as often as its weight says."""
    return values.sum() if weights is None else torch.dot(values, weights)


def check_weights(weights: Tensor, num_components: int) -> None:
    """Raises unless these are positive weights of so many components."""
    total = float(weights.sum())
    if weights.shape != (num_components,) or not bool((weights > 0).all()):
        raise ValueError(f"there must be {num_components} positive weights, one a component")
    if abs(total - 1) > 1e-4:
        raise ValueError(f"the weights sum to {total:.6g}, not to 1: divide them by their sum")
