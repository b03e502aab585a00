r"""Mixtures of exponential families, as Pyro programs and as sums of sufficient statistics.

.. math:: p(x, z = k) = \pi_k \, h(x) \exp\bigl(\eta_k^\top T(x) - A(\eta_k)\bigr)

The log joint of all components is one matrix product of :math:`[T(x), 1]` with the natural
parameters (the E step); what a maximisation needs is one product of the responsibilities with the
same :math:`[T(x), 1]` (the M step). `MixtureProblem` does both.
`GaussianMixture` lies in a module of its own.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int, Num
from pyro.distributions.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.checks import refuses_in_words
from pyro_vae.data import Seed, as_seed, takes_arrays
from pyro_vae.models.mixtures.bayes import (
    BernoulliConjugate,
    ConjugateProblem,
    PoissonConjugate,
)
from pyro_vae.models.mixtures.natural import NaturalForm, mean_form
from pyro_vae.models.mixtures.problem import (
    Chunk,
    MixtureParameters,
    MixtureProblem,
    Statistics,
    check_weights,
    weighted_sum,
)
from pyro_vae.models.parts import check_batch, check_finite, mlp

__all__ = ["BernoulliMixture", "ExponentialMixture", "PoissonMixture"]

_FLOOR = 1e-12  # of probabilities and rates: their logarithms stay finite

# Not typing.Self, which the shape checks of the tests cannot read.
_Mixture = TypeVar("_Mixture", bound="ExponentialMixture")


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
    generative: Any  # the modules of the families, which mypy would take for tensors or modules

    @refuses_in_words
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
                f"num_components and dim must be positive, not {num_components} and {dim}"
            )
        if guide not in ("exact", "amortized"):
            raise ValueError(f"guide is 'exact' or 'amortized', not {guide!r}")
        self.num_components = num_components
        self.dim = dim
        self.guide_kind = guide
        self.hidden = tuple(hidden)
        self.enumerate = enumerate
        self.generative = self._make_generative()
        self.recognition = mlp(dim, self.hidden, num_components) if guide == "amortized" else None

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
    def _problem(
        self, x: Tensor, sample_weights: Tensor | None, hold: Sequence[str], coordinates: Any
    ) -> MixtureProblem:
        """The problem of this family, without the checks of `prepare`."""

    _conjugate: ClassVar[type[ConjugateProblem]]  # the problem with priors on the parameters

    def _coordinates(self) -> Any:
        """Coordinates for scores, which owe nothing to the data that are scored."""
        return None

    @takes_arrays(keep_dtype=True)
    def prepare(
        self,
        x: Num[Tensor, "batch features"],
        sample_weights: Num[Tensor, " batch"] | None = None,
        *,
        hold: Sequence[str] = (),
        coordinates: tuple[Tensor, Tensor] | None = None,
    ) -> MixtureProblem:
        """This mixture on one data set, as `fit_em` works on it.

        Args:
            x: Data, shape (batch, features), of any dtype; computed with in float64.
            sample_weights: How often each datum counts, shape (batch,), not negative; once if None.
            hold: Parameters that M steps leave as they are: of `"weights"`, `"locs"` and, for
                Gaussians, `"covariances"`.
            coordinates: Those of another problem, to whose statistics this one's are added: data
                may then be few; from these data if None.

        Raises:
            ValueError: If x has the wrong shape, fewer data than components, or values that are not
                finite or off the support; if a feature is constant where the model needs spread;
                or if `sample_weights` or `hold` cannot be used.
        """
        problem = self._problem(x, sample_weights, hold, coordinates)
        if coordinates is None:
            problem.check()
        return problem

    @takes_arrays(keep_dtype=True)
    def prepare_conjugate(
        self,
        x: Num[Tensor, "batch features"],
        sample_weights: Num[Tensor, " batch"] | None = None,
        *,
        prior: Mapping[str, Any] | None = None,
    ) -> ConjugateProblem:
        """This mixture with conjugate priors on its parameters, as variational Bayes takes it.

        Args:
            x: As `prepare`.
            sample_weights: As `prepare`.
            prior: Hyperparameters by name, in the data's units: `concentration` of the weights'
                Dirichlet, and for Gaussians `loc`, `loc_precision`, `degrees_of_freedom` and
                `inverse_scale` of a normal-Wishart, for Bernoullis `ones` and `zeros` of a Beta,
                for Poissons `shape` and `rate` of a Gamma; see `GaussianConjugate`,
                `BernoulliConjugate` and `PoissonConjugate` for the defaults.

        Raises:
            ValueError: As `prepare`, or if a hyperparameter is unknown or cannot be used.
        """
        return self._conjugate(self.prepare(x, sample_weights), prior)

    @takes_arrays(keep_dtype=True)
    def natural_form(self, x: Num[Tensor, "batch features"]) -> NaturalForm:
        """The mixture as a function of its free natural parameters, with these data.

        Raises:
            ValueError: As `prepare`.
        """
        return self._natural_form(self.prepare(x))

    @abstractmethod
    def _natural_form(self, problem: MixtureProblem) -> NaturalForm:
        """The form of a prepared problem."""

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

    @abstractmethod
    def fitted_values(self) -> dict[str, Tensor]:
        """The parameters by name, as users see them."""

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

        `TraceEnum_ELBO` sums over it; `Trace_ELBO` samples it, and warns of the mark for
        enumeration unless the mixture was built with `enumerate=False`.

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

    @takes_arrays()
    def log_joint(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch components"]:
        """The log of p(x, z = k) in nats for each datum and component, differentiable."""
        log_weights = self.generative.logits.log_softmax(-1)
        return log_weights + self.components().log_prob(x[:, None])

    @takes_arrays()
    def log_evidence(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, " batch"]:
        """The exact log p(x), in nats per datum, differentiable; see also `score_samples`."""
        self._check(x)
        return self.log_joint(x).logsumexp(-1)

    @takes_arrays(keep_dtype=True)
    def initialize(
        self: _Mixture,
        x: Num[Tensor, "batch features"],
        method: str = "k-means++",
        *,
        sample_weights: Num[Tensor, " batch"] | None = None,
        seed: Seed = 0,
    ) -> _Mixture:
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
        seed = as_seed(seed)
        problem = self.prepare(x, sample_weights)
        problem.write(problem.initialize(method, torch.Generator().manual_seed(seed)))
        return self

    @takes_arrays(keep_dtype=True)
    def score_samples(self, x: Num[Tensor, "batch features"]) -> Float[Tensor, " batch"]:
        """Log-density of each datum, in nats, float64, without gradient, in bounded memory."""
        return torch.cat([part.logsumexp(1) for part in self._log_joints(x)])

    @takes_arrays(keep_dtype=True)
    def score(self, x: Num[Tensor, "batch features"]) -> float:
        """The mean of log p(x), in nats per datum."""
        return float(self.score_samples(x).mean())

    @takes_arrays(keep_dtype=True)
    def predict_proba(self, x: Num[Tensor, "batch features"]) -> Float[Tensor, "batch components"]:
        """The responsibilities p(z = k | x), float64."""
        return torch.cat([part.softmax(1) for part in self._log_joints(x)])

    @takes_arrays(keep_dtype=True)
    def predict(self, x: Num[Tensor, "batch features"]) -> Int[Tensor, " batch"]:
        """The most probable component of each datum."""
        return torch.cat([part.argmax(1) for part in self._log_joints(x)])

    @takes_arrays(keep_dtype=True)
    def aic(self, x: Num[Tensor, "batch features"]) -> float:
        """Akaike's criterion, -2 log p(x) + 2 `num_parameters`; lower is better."""
        return -2.0 * float(self.score_samples(x).sum()) + 2.0 * self.num_parameters

    @takes_arrays(keep_dtype=True)
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
        problem = self._problem(x, None, (), self._coordinates())
        return problem.log_joints(problem.read())

    def _check(self, x: Tensor) -> None:
        check_batch(x, self.dim, like=self.generative.logits)
        if is_validation_enabled():  # a graph cannot be captured through a branch on data
            self._check_support(x)


# --- mixtures whose natural statistic is x itself -------------------------------------------------


class _Means(nn.Module):
    """Logits of the weights, and the natural parameters of the components."""

    def __init__(self, num_components: int, dim: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.natural = nn.Parameter(0.5 * torch.randn(num_components, dim))


class _MeanMixture(ExponentialMixture):
    r"""A mixture with :math:`T(x) = x`: its components are known by their means."""

    _natural_name: ClassVar[str]

    def _make_generative(self) -> nn.Module:
        return _Means(self.num_components, self.dim)

    def _problem(
        self, x: Tensor, sample_weights: Tensor | None, hold: Sequence[str], coordinates: Any
    ) -> MixtureProblem:
        return _MeanProblem(self, x, sample_weights, hold, coordinates)

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

    def _natural_form(self, problem: MixtureProblem) -> NaturalForm:
        return mean_form(problem, self._natural_name)

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
        """The log of h(x) of each datum."""

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
    _conjugate = BernoulliConjugate
    _natural_name = "logit_probs"

    @classmethod
    def from_parameters(
        cls,
        weights: Float[Tensor, " components"],
        probs: Float[Tensor, "components features"],
        **arguments: Any,
    ) -> "BernoulliMixture":
        """Builds the mixture with given weights and probabilities, in the dtype of `probs`."""
        if not bool(((probs > 0) & (probs < 1)).all()):
            raise ValueError("every probability must lie between 0 and 1, and be neither")
        mixture = cls._from_means(weights, probs, arguments)
        assert isinstance(mixture, cls)
        return mixture

    @property
    def probs(self) -> Float[Tensor, "components features"]:
        """The probability of a 1, for each component and feature."""
        return self.generative.natural.sigmoid()

    def fitted_values(self) -> dict[str, Tensor]:
        """Weights and probabilities."""
        return {"weights": self.weights, "probs": self.probs}

    def _check_support(self, x: Tensor) -> None:
        check_finite(x)
        if not bool(((x == 0) | (x == 1)).all()):
            raise ValueError(
                f"the data must be 0 or 1, but lie between {x.min():.3g} and {x.max():.3g} with "
                "values between: binarise them first"
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
    _conjugate = PoissonConjugate
    _natural_name = "log_rates"

    @classmethod
    def from_parameters(
        cls,
        weights: Float[Tensor, " components"],
        rates: Float[Tensor, "components features"],
        **arguments: Any,
    ) -> "PoissonMixture":
        """Builds the mixture with given weights and rates, in the dtype of `rates`."""
        if not bool(((rates > 0) & rates.isfinite()).all()):
            raise ValueError("every rate must be positive and finite")
        mixture = cls._from_means(weights, rates, arguments)
        assert isinstance(mixture, cls)
        return mixture

    @property
    def rates(self) -> Float[Tensor, "components features"]:
        """The mean count, for each component and feature."""
        return self.generative.natural.exp()

    def fitted_values(self) -> dict[str, Tensor]:
        """Weights and rates."""
        return {"weights": self.weights, "rates": self.rates}

    def _check_support(self, x: Tensor) -> None:
        check_finite(x)
        if not bool(((x >= 0) & (x == x.floor())).all()):
            raise ValueError(
                f"the data must be counts 0, 1, 2, ..., but lie between {x.min():.3g} and "
                f"{x.max():.3g} or are not whole: use a GaussianMixture for real values"
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

    def _canonical(self, parameters: MixtureParameters) -> tuple[Tensor, Tensor]:
        """Natural parameters, and log pi_k - A(eta_k)."""
        natural = parameters.natural
        if natural is None:
            natural = self.mixture._to_natural(parameters.locs)
        return natural, parameters.log_weights - self.mixture._log_normaliser(natural)

    def _scorer(self, parameters: MixtureParameters) -> Any:
        natural, constant = self._canonical(parameters)
        return lambda chunk: torch.addmm(constant[:, None], natural, chunk.x)

    def _sums(self, chunk: Chunk, q: Tensor, about: Tensor | None) -> Tensor:
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
        natural, constant = self._canonical(parameters)
        return float((sums * natural).sum() + counts @ constant) + self._base_total

    @property
    def _scales_freely(self) -> bool:
        return "locs" not in self.hold

    def _family_residual(self, statistics: Statistics, parameters: MixtureParameters) -> float:
        sums, counts = self._unpack(statistics)
        natural, _ = self._canonical(parameters)
        return float(((sums - counts[:, None] * parameters.locs) * natural).sum())

    @property
    def _base_total(self) -> float:
        if not hasattr(self, "_base"):
            parts = (
                weighted_sum(c.log_base, c.weights) if isinstance(c.log_base, Tensor) else 0.0
                for _, c in self._chunks(None)
            )
            self._base = float(sum(parts))
        return self._base

    def unconstrained(self, parameters: MixtureParameters) -> Tensor:
        natural = self.mixture._to_natural(parameters.locs)
        return torch.cat([parameters.log_weights, natural.flatten()])

    def constrained(self, vector: Tensor) -> MixtureParameters:
        log_weights, natural = vector.tensor_split([self.num_components])
        locs = self.mixture._to_mean(natural.reshape(self.num_components, -1))
        locs = locs.clamp(_FLOOR, self.mixture._largest_mean())
        return MixtureParameters(log_weights.log_softmax(0), locs)

    def _start(self, centres: Tensor, statistics: Statistics) -> MixtureParameters:
        sums, counts = self._unpack(statistics)
        overall = sums.sum(0) / counts.sum()
        # Half a datum of the overall mean, so that no probability or rate starts at its limit.
        means = (sums + 0.5 * overall) / (counts + 0.5)[:, None]
        weights = (counts + 0.5) / (counts + 0.5).sum()
        return MixtureParameters(weights.log(), means.clamp(_FLOOR, self.mixture._largest_mean()))

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
