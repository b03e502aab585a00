"""What the methods of EM share: their settings, where they stand, the loop that drives them."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyro_vae.checks import check_count
from pyro_vae.inference.em.history import HalfSteps
from pyro_vae.inference.em.online import check_steps
from pyro_vae.inference.programs import Program
from pyro_vae.inference.svi import best_row
from pyro_vae.progress import progress_bar

__all__ = [
    "METHODS",
    "RANDOM_METHODS",
    "EMSettings",
    "Ending",
    "Reached",
    "best_of_starts",
    "drive",
    "random_stream",
]

R = TypeVar("R")

_MAX_SINGULAR = 20  # starts that may fail in all where on_singular="restart"

METHODS = (
    *("exact", "generalized", "monte_carlo", "online", "incremental", "hard"),
    *("stochastic_approximation", "variational_bayes", "stochastic_variational_bayes"),
)
"""What `fit_em` takes as `method`."""

RANDOM_METHODS = (
    *("monte_carlo", "stochastic_approximation", "online", "stochastic_variational_bayes"),
)
"""Those whose bound moves at random, so that a small gain means nothing."""


@dataclass(frozen=True)
class EMSettings:
    """The arguments of `fit_em` that are not the model, its data or what is held."""

    method: str
    max_iterations: int
    tolerance: float
    initialization: str | Tensor
    num_restarts: int
    seed: int
    on_singular: str
    batch_size: int | None
    num_samples: int
    step_exponent: float
    step_delay: float
    num_held: int
    num_gradient_steps: int
    optimizer: Any
    record: str | None
    progress: bool
    prior: Mapping[str, Any] | None = None
    acceleration: str | None = None

    def check(self) -> None:
        """Raises ValueError for a value that cannot be used."""
        if self.method not in METHODS:
            raise ValueError(f"method is one of {', '.join(METHODS)}, not {self.method!r}")
        for name in ("max_iterations", "num_restarts", "num_samples", "num_gradient_steps"):
            value = getattr(self, name)
            check_count(name, value)
        check_count("batch_size", self.batch_size, optional=True)
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance must be 0 or positive, not {self.tolerance!r}")
        check_steps(self.step_exponent, self.step_delay)
        if self.prior is not None and not self.bayesian:
            raise ValueError(
                f"method={self.method!r} has no prior on parameters; pass "
                "method='variational_bayes'"
            )
        if self.acceleration not in (None, "squarem"):
            raise ValueError(f"acceleration is 'squarem' or None, not {self.acceleration!r}")
        if self.acceleration and self.method not in ("exact", "variational_bayes"):
            raise ValueError(
                f"method={self.method!r} cannot be accelerated: pass method='exact' or "
                "'variational_bayes', or acceleration=None"
            )
        check_count("seed", self.seed, 0)
        if self.on_singular not in ("raise", "restart"):
            raise ValueError(f"on_singular is 'raise' or 'restart', not {self.on_singular!r}")
        if self.record not in (None, "half steps", "passes"):
            raise ValueError(f"record is 'half steps', 'passes' or None, not {self.record!r}")
        if self.starts_given and (self.num_restarts > 1 or self.on_singular == "restart"):
            raise ValueError(
                "restarts from what is given would all be the same; pass initialization='k-means++'"
            )

    @property
    def random(self) -> bool:
        """Whether the bound moves at random, so that a small gain means nothing."""
        return self.method in RANDOM_METHODS

    @property
    def bayesian(self) -> bool:
        """Whether parameters are latent: the bound is then one on their evidence."""
        return self.method.endswith("variational_bayes")

    @property
    def starts_given(self) -> bool:
        """Whether the start is told, so that every one is the same."""
        return isinstance(self.initialization, Tensor) or self.initialization == "given"

    def described(self) -> dict[str, Any]:
        """What config.json says of them: the common ones, and those that the method uses."""
        common = (
            *("method", "max_iterations", "tolerance", "initialization"),
            *("num_restarts", "seed", "on_singular"),
        )
        own: dict[str, tuple[str, ...]] = {
            "monte_carlo": ("num_samples",),
            "stochastic_approximation": ("num_samples", "step_exponent", "step_delay"),
            "online": ("batch_size", "step_exponent", "step_delay", "num_held"),
            "stochastic_variational_bayes": (
                *("batch_size", "step_exponent", "step_delay", "num_held"),
            ),
            "incremental": ("batch_size",),
            "exact": ("acceleration",),
            "variational_bayes": ("acceleration",),
            "generalized": ("num_gradient_steps",),
        }
        said = {name: getattr(self, name) for name in (*common, *own.get(self.method, ()))}
        if isinstance(self.initialization, Tensor):
            said["initialization"] = "responsibilities"
        return json.loads(json.dumps(said))


def random_stream(seed: int, *streams: int) -> torch.Generator:
    """A source of randomness of its own; the first start is that of `initialize(seed=seed)`."""
    if any(streams):
        seed = int(np.random.SeedSequence((seed, *streams)).generate_state(1)[0])
    return torch.Generator().manual_seed(seed)


@dataclass
class Reached:
    """Where an algorithm stands after an iteration, or ended."""

    parameters: Any
    objective: float
    record: HalfSteps
    converged: bool = False
    status: Literal["finished", "stopped early", "interrupted"] = "finished"


@dataclass
class Ending:
    """What a method leaves to `fit_em` to make a fit of.

    Attributes:
        model: The program, without fitted parameters around it.
        guide: Its posterior.
        state: The parameter store that both run in.
        parameters: The fitted values by name, as users see them.
        measure: What the data are.
        reached: Where the best start ended.
        facts: What the config says of the course of the fit.
        posterior: Over the parameters, where there is one.
    """

    model: Program
    guide: Program
    state: dict[str, Any]
    parameters: dict[str, Tensor]
    measure: str
    reached: Reached
    facts: dict[str, Any]
    posterior: Any = None


def best_of_starts(
    run: Callable[[int], R],
    settings: EMSettings,
    objective: Callable[[R], Reached],
) -> tuple[int, list[R], int]:
    """Runs every start, another one in place of each that a singular component ended.

    Args:
        run: Of the number of the attempt.
        settings: Say how many starts there are, and what a singular component means.
        objective: Where a run ended.

    Returns:
        The place of the best, all that ended, and how many were singular.
    """
    runs: list[R] = []
    failures = 0
    while len(runs) < settings.num_restarts:
        try:
            runs.append(run(len(runs) + failures))
        except torch.linalg.LinAlgError as error:
            failures += 1
            if settings.on_singular == "raise":
                raise
            if failures > _MAX_SINGULAR:
                raise type(error)(*_arguments_of(error, failures)) from error
            continue
        if objective(runs[-1]).status == "interrupted":
            break
    return best_row([objective(one).objective for one in runs]), runs, failures


def _arguments_of(error: Any, failures: int) -> tuple[Any, ...]:
    """The error's own arguments, its text saying that other starts did not help."""
    text = f"{error} ({failures} starts ended like this.)"
    return (error.component, text) if hasattr(error, "component") else (text,)


def drive(
    algorithm: Iterator[Reached],
    settings: EMSettings,
    total_weight: float,
    interrupted: Callable[[], bool],
) -> Reached:
    """Takes iterations until they gain nothing, are used up, or Ctrl-C comes."""
    bar = progress_bar(settings.max_iterations, "iteration", show=settings.progress, what="EM")
    reached = next(algorithm)
    with bar:
        for following in algorithm:
            gain = (following.objective - reached.objective) / total_weight
            reached = following
            bar.update()
            if not bar.disable:
                bar.set_postfix(bound=f"{reached.objective / total_weight:.6f}")
            if not settings.random and settings.tolerance > 0 and gain < settings.tolerance:
                reached.converged = True
                break
            if interrupted():
                reached.status = "interrupted"
                break
    return reached
