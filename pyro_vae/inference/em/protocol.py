"""What `fit_em` asks of a model whose M step is a function of sufficient statistics."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["ConjugateModel", "NaturalModel", "StatisticsModel", "StatisticsProblem"]


@runtime_checkable
class StatisticsProblem(Protocol):
    """A model on one data set, as EM sees it. All totals are float64 and in nats.

    `parameters` and `statistics` are the problem's own; statistics can be added, subtracted and
    multiplied by a number. `rows` selects data, all if None. `about` says what moments are taken
    about (`origin` chooses it) and must be the same for statistics that are added.
    """

    num_data: int
    total_weight: float
    num_components: int
    measure: str

    def initialize(self, method: str, generator: torch.Generator) -> Any:
        """Parameters to start from."""

    def read(self) -> Any:
        """The parameters in the model."""

    def write(self, parameters: Any) -> None:
        """Puts parameters into the model."""

    def origin(self, parameters: Any) -> Any:
        """What moments should be taken about near these parameters."""

    def e_step(
        self,
        parameters: Any,
        rows: Tensor | None = None,
        *,
        about: Any = None,
        keep: bool = False,
    ) -> Any:
        """One pass: has `log_likelihood`, `entropy` (of the posterior) and `statistics`.

        With `keep` it has `log_posterior` as well, shape (components, rows).
        """

    def m_step(self, statistics: Any, current: Any) -> Any:
        """The parameters of the highest bound; `torch.linalg.LinAlgError` where there are none."""

    def responsibilities(self, parameters: Any, rows: Tensor | None = None) -> Tensor:
        """The posterior p(z = k | x), shape (rows, components)."""

    def statistics(
        self, q: Tensor, rows: Tensor | None = None, *, about: Any = None, at: Any = None
    ) -> Any:
        """Sufficient statistics under any q, shape (rows, components).

        `at` are the parameters under which missing entries are expected, where there are some.
        """

    def counts(self, statistics: Any) -> Tensor:
        """The weight of the data in each component."""

    def expected_log_joint(self, statistics: Any, parameters: Any) -> float:
        """E_q log p(x, z)."""

    def expected_log_prior(self, statistics: Any, parameters: Any) -> float:
        """E_q log p(z)."""

    def measure_bound(self, parameters: Any, q: Tensor) -> tuple[float, float, float]:
        """The log of p(x), ELBO and KL(q || p(z | x)) of all data."""

    def divergence(self, log_q: Tensor, log_p: Tensor) -> float:
        """KL(q || p) of two posteriors that `e_step` kept."""

    def unconstrained(self, parameters: Any) -> Tensor:
        """The parameters as one vector, of which every value is one."""

    def constrained(self, vector: Tensor) -> Any:
        """The parameters that `unconstrained` makes this vector of."""


@runtime_checkable
class StatisticsModel(Protocol):
    """What `fit_em` takes for every method: a Pyro program with sufficient statistics."""

    def prepare(
        self, x: Any, sample_weights: Any = None, *, hold: Sequence[str] = ()
    ) -> StatisticsProblem:
        """The model on one data set."""

    def model(self, x: Any) -> Any:
        """The generative program."""

    def guide(self, x: Any) -> Any:
        """The program of the posterior."""

    def fitted_values(self) -> dict[str, Tensor]:
        """The parameters by name, as users see them."""


@runtime_checkable
class ConjugateModel(StatisticsModel, Protocol):
    """What `fit_em` takes for variational Bayes: one whose parameters have conjugate priors."""

    def prepare_conjugate(
        self, x: Any, sample_weights: Any = None, *, prior: Mapping[str, Any] | None = None
    ) -> Any:
        """A `StatisticsProblem` whose parameters are a posterior, with its `described`."""


@runtime_checkable
class NaturalModel(Protocol):
    """What `standard_errors` takes: a model of one vector of free natural parameters."""

    def natural_form(self, x: Any) -> Any:
        """Has `theta`, `x`, `labels`, `log_joint`, `values` and `fitted`; see `NaturalForm`."""
