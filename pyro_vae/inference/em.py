r"""Expectation-maximisation and its relatives: `fit_em`, which climbs one bound in half steps.

.. math:: \log p(x) = \underbrace{E_q \log p(x, z) + H(q)}_{F(q, \theta)}
          + \mathrm{KL}(q \,\|\, p(z \mid x))

An E step moves q and closes the gap, an M step moves :math:`\theta` and raises F. What the methods
differ in is how far each goes. Every half step is a row of the history with all three terms.

Models with sufficient statistics (`StatisticsModel`; the mixtures of this package are such) have
closed M steps. `method="generalized"` takes any Pyro program whose latents can be enumerated.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.inference.em_history import HalfSteps
from pyro_vae.inference.enumerated import EnumeratedProgram, climb, measure_of, no_guide
from pyro_vae.inference.programs import (
    FittedProgram,
    Program,
    as_arguments,
    batch_length,
    keep_random_state,
    program_scope,
    unwrap_programs,
)
from pyro_vae.inference.step import deferred_interrupt
from pyro_vae.inference.svi import Fit
from pyro_vae.results import sha256_of

__all__ = ["METHODS", "EMFit", "StatisticsModel", "StatisticsProblem", "fit_em"]

METHODS = ("exact", "generalized", "monte_carlo", "online", "incremental", "hard")
"""What `fit_em` takes as `method`."""

_MEASURED_RESPONSIBILITIES = 200_000  # up to which nobody notices what measuring a KL costs
_RECORDED_DATA = 2_000  # up to which mini-batch methods record every half step
_MAX_SINGULAR = 20  # starts that may fail in all where on_singular="restart"
_BATCHES_A_PASS = 10


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

    def statistics(self, q: Tensor, rows: Tensor | None = None, *, about: Any = None) -> Any:
        """Sufficient statistics under any q, shape (rows, components)."""

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


class EMFit(Fit):
    """What `fit_em` reached: a `Fit` whose history has a row a half step, dimension `step`."""

    @property
    def converged(self) -> bool:
        """Whether the last iteration gained less than `tolerance`."""
        return bool(self.config["fit_em"]["converged"])

    def summary(self) -> str:
        """One sentence: how long it ran, whether it converged and which log p(x) it reached."""
        settings, count = self.config["fit_em"], sum(v.numel() for v in self.parameters.values())
        text = f"EM ({settings['method']}) {self.status}"
        if self.history.sizes["step"]:
            last = self.history.isel(step=-1)
            text += f" after {int(last.iteration)} iterations, {float(last.seconds):.1f} s"
            if settings["method"] not in ("monte_carlo", "online"):
                text += ", converged" if self.converged else ", not converged"
            text += f"; log p(x) {float(last.log_evidence):.6g}, bound {float(last.bound):.6g}"
            text += " nats per datum"
        return f"{text}; {count:,} parameters"


def fit_em(
    model: StatisticsModel | Program,
    x: Any,
    *,
    method: str = "exact",
    max_iterations: int = 200,
    tolerance: float = 1e-7,
    initialization: str = "k-means++",
    num_restarts: int = 1,
    seed: int = 0,
    sample_weights: Tensor | None = None,
    hold: Sequence[str] = (),
    on_singular: Literal["raise", "restart"] = "raise",
    batch_size: int | None = None,
    num_samples: int = 1,
    step_exponent: float = 0.6,
    num_held: int = 20,
    num_gradient_steps: int = 5,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
    record: Literal["half steps", "passes"] | None = None,
    progress: bool = True,
) -> EMFit:
    r"""Fits a model by expectation-maximisation or one of its relatives.

    | method | E step | M step |
    | --- | --- | --- |
    | exact | the posterior | the maximum (Dempster, Laird & Rubin 1977) |
    | generalized | the posterior | a few gradient steps that do not lower the bound |
    | monte_carlo | `num_samples` draws from the posterior (Wei & Tanner 1990) | the maximum |
    | hard | the most probable component | the maximum |
    | incremental | the posterior of a block of data (Neal & Hinton 1998) | the maximum |
    | online | the posterior of a mini-batch (Cappe & Moulines 2009) | the maximum, of statistics |
    | | | :math:`s \leftarrow s + n^{-a} (\hat s - s)` averaged over the second half |

    The history has the dimension `step`: half steps, numbered from 0, with coordinates `phase`
    ("E" or "M": which half step led to this row) and `iteration`. It starts with the E step at the
    starting parameters and ends with an E step, which speaks of the fitted ones. Its variables, per
    datum and, as `..._total`, summed: `log_evidence` (log p(x)), `bound` (the ELBO) and `gap`
    (KL(q || p(z|x))); per datum `loss` (minus the bound) and, where known, `reconstruction` and
    `kl`, the parts of the bound as in `fit`. `seconds` is the time the method itself took so far,
    without measuring; `data_passes` how often it went over the data.

    Args:
        model: A mixture of this package (or any `StatisticsModel`); for "generalized" also any
            program called as `model(x)` whose latents can all be enumerated.
        x: The data, shape (batch, features); for programs, their arguments as `fit` takes them.
        method: One of `METHODS`.
        max_iterations: Iterations at most; passes over the data for "incremental" and "online".
        tolerance: Stops when an iteration raises the bound by less, in nats per datum. 0 makes all
            iterations. "monte_carlo" and "online" are random and make all as well.
        initialization: "k-means++", "k-means" or "random"; "given" starts at the parameters in the
            model, as "generalized" does for programs in any case.
        num_restarts: Starts; the one with the highest final log p(x) (or bound, if hard) is kept.
        seed: Of starts, draws and orders. The caller's random state is left alone.
        sample_weights: How often each datum counts, shape (batch,).
        hold: Parameters left as they are, such as `("weights", "covariances")`.
        on_singular: What to do where a component loses its data or their spread: raise, or go on
            with another start, 20 times at most.
        batch_size: For "incremental" and "online"; a tenth of the data if None, and at least 100
            if so many there are.
        num_samples: Draws for each datum, for "monte_carlo".
        step_exponent: The a of "online", above 0.5 and at most 1.
        num_held: Data that "online" sees before its first M step.
        num_gradient_steps: In each M step of "generalized".
        optimizer: For "generalized": from parameters to a torch optimizer; L-BFGS with a line
            search if None.
        record: Whether "incremental" and "online" record every half step, at the price of a pass
            over all data each, or passes only; None decides by the size of the data.
        progress: Shows a bar where stderr is a terminal.

    Returns:
        The fit. The model passed in has the fitted parameters as well. Ctrl-C ends it after the
        half step at hand (`status` "interrupted").

    Raises:
        ValueError: If data or arguments cannot be used; a `ProgramError` if a program cannot.
        torch.linalg.LinAlgError: `SingularComponentError` if a component of a mixture is singular
            or starved and `on_singular` is "raise"; the model then is as it was.
        TrainingError: If the bound is not finite.

    Note: EM finds a local maximum; `num_restarts` looks at several. For the KL after exact M steps
        with more than 200,000 responsibilities, log p(x) - bound stands in (`config` says so).

    References:
        Dempster, Laird & Rubin (1977), JRSS B 39, 1-38. Neal & Hinton (1998), A view of the EM
        algorithm that justifies incremental, sparse, and other variants. Cappe & Moulines (2009),
        On-line expectation-maximization algorithm for latent data models, JRSS B 71, 593-613.
    """
    settings = _Settings(
        method=method,
        max_iterations=max_iterations,
        tolerance=float(tolerance),
        initialization=initialization,
        num_restarts=num_restarts,
        seed=seed,
        on_singular=on_singular,
        batch_size=batch_size,
        num_samples=num_samples,
        step_exponent=float(step_exponent),
        num_held=num_held,
        num_gradient_steps=num_gradient_steps,
        optimizer=optimizer,
        record=record,
        progress=progress,
    )
    settings.check()
    if method == "generalized":
        if sample_weights is not None or tuple(hold):
            raise ValueError(
                "the generalised method knows neither sample_weights nor hold; weight the model's "
                "sites with poutine.scale, and freeze parameters with requires_grad_(False)"
            )
        return _fit_generalized(model, x, settings)
    if not isinstance(model, StatisticsModel):
        raise ValueError(
            f"method={method!r} needs a model with sufficient statistics, such as a "
            "GaussianMixture (the mixture itself, not its .model); for any other program pass "
            "method='generalized'"
        )
    problem = model.prepare(x, sample_weights, hold=hold)
    best, failures, ends = _best_of_restarts(problem, settings)
    problem.write(best.parameters)
    config = _config(model, settings, x) | {"model": _describe(model)}
    config["fit_em"] |= {
        "converged": best.converged,
        "final_bounds": ends,
        "singular_starts": failures,
        "gap": "measured" if best.record.measures else "difference",
        "hold": list(hold),
        "weighted": sample_weights is not None,
    }
    state = _state_of(model, x)
    return EMFit(
        model=FittedProgram(model.model, state),
        guide=FittedProgram(model.guide, state),
        history=best.record.result(config, problem.measure),
        config=config,
        parameters={name: v.detach().clone() for name, v in model.fitted_values().items()},
        status=best.status,
    )


# --- settings and records -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """The arguments of `fit_em`."""

    method: str
    max_iterations: int
    tolerance: float
    initialization: str
    num_restarts: int
    seed: int
    on_singular: str
    batch_size: int | None
    num_samples: int
    step_exponent: float
    num_held: int
    num_gradient_steps: int
    optimizer: Any
    record: str | None
    progress: bool

    def check(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is one of {', '.join(METHODS)}, not {self.method!r}")
        for name in ("max_iterations", "num_restarts", "num_samples", "num_gradient_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        size = self.batch_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"batch_size must be a positive integer or None, not {size!r}")
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance must be 0 or positive, not {self.tolerance!r}")
        if not 0.5 < self.step_exponent <= 1:
            raise ValueError(
                f"step_exponent must lie above 0.5 and be at most 1, or the averages do not "
                f"settle; not {self.step_exponent!r}"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be 0 or a positive integer, not {self.seed!r}")
        if self.on_singular not in ("raise", "restart"):
            raise ValueError(f"on_singular is 'raise' or 'restart', not {self.on_singular!r}")
        if self.record not in (None, "half steps", "passes"):
            raise ValueError(f"record is 'half steps', 'passes' or None, not {self.record!r}")
        given = self.initialization == "given"
        if given and (self.num_restarts > 1 or self.on_singular == "restart"):
            raise ValueError(
                "restarts from the given parameters would all be the same; pass "
                "initialization='k-means++'"
            )

    @property
    def random(self) -> bool:
        """Whether the bound moves at random, so that a small gain means nothing."""
        return self.method in ("monte_carlo", "online")


def _stream(seed: int, *streams: int) -> torch.Generator:
    """A source of randomness of its own; the first start is that of `initialize(seed=seed)`."""
    if any(streams):
        seed = int(np.random.SeedSequence((seed, *streams)).generate_state(1)[0])
    return torch.Generator().manual_seed(seed)


def _config(model: Any, settings: _Settings, x: Any) -> dict[str, Any]:
    chosen = {
        "method": settings.method,
        "max_iterations": settings.max_iterations,
        "tolerance": settings.tolerance,
        "initialization": settings.initialization,
        "num_restarts": settings.num_restarts,
        "seed": settings.seed,
        "on_singular": settings.on_singular,
    }
    own: dict[str, tuple[str, ...]] = {
        "monte_carlo": ("num_samples",),
        "online": ("batch_size", "step_exponent", "num_held"),
        "incremental": ("batch_size",),
        "generalized": ("num_gradient_steps",),
    }
    chosen |= {name: getattr(settings, name) for name in own.get(settings.method, ())}
    chosen |= {
        "num_data": batch_length(x),
        "data_sha256": sha256_of(*_tensors(x)),
        "num_threads": torch.get_num_threads(),
    }
    return {"format": 1, "model": _describe(model), "fit_em": json.loads(json.dumps(chosen))}


def _tensors(x: Any) -> list[Tensor]:
    args, kwargs = as_arguments(x)
    return [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)] or [torch.empty(0)]


def _describe(model: Any) -> dict[str, Any]:
    owner = getattr(model, "__self__", model)
    if hasattr(owner, "config"):
        return {"class": type(owner).__name__, "arguments": owner.config}
    return {"program": getattr(model, "__qualname__", type(model).__name__)}


def _state_of(model: StatisticsModel, x: Tensor) -> dict[str, Any]:
    """The parameter store that the fitted programs run in."""
    like = next(iter(model.fitted_values().values()))
    with program_scope(), keep_random_state():
        store = pyro.get_param_store()
        before = set(store.keys())
        row = x[:1].to(like)
        model.model(row)
        model.guide(row)
        state = store.get_state()
    return {
        part: {name: value for name, value in values.items() if name not in before}
        for part, values in state.items()
    }


# --- restarts and the loop ------------------------------------------------------------------------


@dataclass
class _Reached:
    """Where an algorithm stands after an iteration, or ended."""

    parameters: Any
    objective: float
    record: HalfSteps
    converged: bool = False
    status: Literal["finished", "stopped early", "interrupted"] = "finished"


def _best_of_restarts(
    problem: StatisticsProblem, settings: _Settings
) -> tuple[_Reached, int, list[float]]:
    best: _Reached | None = None
    failures = attempt = 0
    ends: list[float] = []
    with deferred_interrupt() as interrupted:
        while len(ends) < settings.num_restarts:
            try:
                reached = _run_once(problem, settings, attempt, interrupted)
            except torch.linalg.LinAlgError as error:
                failures += 1
                if settings.on_singular == "raise":
                    raise
                if failures > _MAX_SINGULAR:
                    raise type(error)(*_arguments_of(error, failures)) from error
                attempt += 1
                continue
            attempt += 1
            ends.append(reached.objective / problem.total_weight)
            if best is None or reached.objective > best.objective:
                best = reached
            if reached.status == "interrupted":
                break
    assert best is not None
    return best, failures, ends


def _arguments_of(error: Any, failures: int) -> tuple[Any, ...]:
    """The error's own arguments, its text saying that other starts did not help."""
    text = f"{error} ({failures} starts ended like this.)"
    return (error.component, text) if hasattr(error, "component") else (text,)


def _run_once(
    problem: StatisticsProblem,
    settings: _Settings,
    attempt: int,
    interrupted: Callable[[], bool],
) -> _Reached:
    """One start to its end."""
    record = HalfSteps(problem.total_weight)
    record.measures = (
        settings.method != "exact"
        or problem.num_data * problem.num_components <= _MEASURED_RESPONSIBILITIES
    )
    record.every_half_step = settings.record == "half steps" or (
        settings.record is None and problem.num_data <= _RECORDED_DATA
    )
    if settings.initialization == "given":
        parameters = problem.read()
    else:
        generator = _stream(settings.seed, attempt)
        parameters = problem.initialize(settings.initialization, generator)
    algorithm = _ALGORITHMS[settings.method](
        problem, parameters, record, settings, _stream(settings.seed, attempt, 1)
    )
    return _drive(algorithm, settings, problem.total_weight, interrupted)


def _drive(
    algorithm: Iterator[_Reached],
    settings: _Settings,
    total_weight: float,
    interrupted: Callable[[], bool],
) -> _Reached:
    """Takes iterations until they gain nothing, are used up, or Ctrl-C comes."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    bar = tqdm(
        total=settings.max_iterations,
        unit="iteration",
        disable=not (settings.progress and terminal),
        leave=False,
    )
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


# --- methods on sufficient statistics -------------------------------------------------------------


def _exact(
    problem: StatisticsProblem, parameters: Any, record: HalfSteps, settings: _Settings, _: Any
) -> Iterator[_Reached]:
    """EM: one pass over the data an iteration, for the E step after an M step measures that one."""
    before, waiting = None, None
    for iteration in range(settings.max_iterations + 1):
        about = problem.origin(parameters)
        expected = problem.e_step(parameters, about=about, keep=record.measures)
        record.passes += 1
        stamp = record.stamp("E", iteration)
        evidence = expected.log_likelihood
        if waiting is not None:
            with record.paused():
                gap = evidence - waiting["elbo"]
                if before is not None:
                    gap = problem.divergence(before, expected.log_posterior)
                record.add(log_likelihood=evidence, divergence=gap, **waiting)
        joint = problem.expected_log_joint(expected.statistics, parameters)
        prior = problem.expected_log_prior(expected.statistics, parameters)
        entropy = expected.entropy
        record.add(stamp, evidence, joint + entropy, 0.0, kl=-entropy - prior)
        yield _Reached(parameters, evidence, record)
        if iteration == settings.max_iterations:
            return
        before = expected.log_posterior
        parameters = problem.m_step(expected.statistics, parameters)
        waiting = {
            "stamp": record.stamp("M", iteration + 1),
            "elbo": problem.expected_log_joint(expected.statistics, parameters) + entropy,
            "kl": -entropy - problem.expected_log_prior(expected.statistics, parameters),
        }


def _measure(
    problem: StatisticsProblem,
    record: HalfSteps,
    phase: str,
    iteration: int,
    parameters: Any,
    q: Tensor,
) -> float:
    """A row for any q that is held in memory; returns the bound."""
    stamp = record.stamp(phase, iteration)
    with record.paused():
        evidence, elbo, gap = problem.measure_bound(parameters, q)
        record.add(stamp, evidence, elbo, gap)
    return elbo


def _with_point_masses(
    choose: Callable[[Tensor, _Settings, torch.Generator], Tensor],
    problem: StatisticsProblem,
    parameters: Any,
    record: HalfSteps,
    settings: _Settings,
    generator: torch.Generator,
) -> Iterator[_Reached]:
    """EM whose E step replaces the posterior by components chosen from it."""
    for iteration in range(settings.max_iterations + 1):
        q = choose(problem.responsibilities(parameters), settings, generator)
        record.passes += 1
        elbo = _measure(problem, record, "E", iteration, parameters, q)
        objective = elbo if settings.method == "hard" else record.rows[-1]["log_evidence_total"]
        yield _Reached(parameters, objective, record)
        if iteration < settings.max_iterations:
            statistics = problem.statistics(q, about=problem.origin(parameters))
            record.passes += 1
            parameters = problem.m_step(statistics, parameters)
            _measure(problem, record, "M", iteration + 1, parameters, q)


def _most_probable(posterior: Tensor, _settings: _Settings, _generator: Any) -> Tensor:
    best = posterior.argmax(1, keepdim=True)
    return torch.zeros_like(posterior).scatter_(1, best, 1.0)


def _drawn(posterior: Tensor, settings: _Settings, generator: torch.Generator) -> Tensor:
    """The shares of the components among draws from the posterior."""
    draws = torch.multinomial(
        posterior.cpu(), settings.num_samples, replacement=True, generator=generator
    ).to(posterior.device)
    one = posterior.new_tensor(1.0 / settings.num_samples).expand(draws.shape)
    return torch.zeros_like(posterior).scatter_add_(1, draws, one)


def _batches(
    problem: StatisticsProblem, settings: _Settings, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """The data in a random order, cut into mini-batches."""
    length = problem.num_data
    size = settings.batch_size or max(math.ceil(length / _BATCHES_A_PASS), min(100, length))
    return torch.randperm(length, generator=generator).split(size)


def _incremental(
    problem: StatisticsProblem,
    parameters: Any,
    record: HalfSteps,
    settings: _Settings,
    generator: torch.Generator,
) -> Iterator[_Reached]:
    """Blocks take turns: the sum of statistics keeps what the others had when it was their turn."""
    q = problem.responsibilities(parameters)
    about = problem.origin(parameters)
    statistics = problem.statistics(q, about=about)
    record.passes += 1
    elbo = _measure(problem, record, "E", 0, parameters, q)
    yield _Reached(parameters, elbo, record)
    parameters = problem.m_step(statistics, parameters)
    _measure(problem, record, "M", 0, parameters, q)
    blocks = _batches(problem, settings, generator)
    for iteration in range(1, settings.max_iterations + 1):
        for number, rows in enumerate(blocks):
            shown = record.every_half_step or number == len(blocks) - 1
            new = problem.responsibilities(parameters, rows)
            change = problem.statistics(new, rows, about=about)
            statistics = statistics + (change - problem.statistics(q[rows], rows, about=about))
            q[rows] = new
            record.passes += len(rows) / problem.num_data
            if shown:
                _measure(problem, record, "E", iteration, parameters, q)
            parameters = problem.m_step(statistics, parameters)
            if shown:
                elbo = _measure(problem, record, "M", iteration, parameters, q)
        yield from _closing_row(problem, record, settings, iteration, parameters, elbo)


def _closing_row(
    problem: StatisticsProblem,
    record: HalfSteps,
    settings: _Settings,
    iteration: int,
    parameters: Any,
    objective: float,
) -> Iterator[_Reached]:
    """Yields an iteration of a mini-batch method; its last row is taken back if it goes on.

    The row is a full E step at the parameters reached, which the method itself would not make.
    """
    stamp = record.stamp("E", iteration)
    with record.paused():
        expected = problem.e_step(parameters, about=problem.origin(parameters))
        joint = problem.expected_log_joint(expected.statistics, parameters)
        record.add(stamp, expected.log_likelihood, joint + expected.entropy, 0.0)
    yield _Reached(parameters, objective, record)
    if iteration < settings.max_iterations:
        record.rows.pop()


def _online(
    problem: StatisticsProblem,
    parameters: Any,
    record: HalfSteps,
    settings: _Settings,
    generator: torch.Generator,
) -> Iterator[_Reached]:
    """Averages statistics over mini-batches with steps n^-a, and over the second half again."""
    q = problem.responsibilities(parameters)  # for the record: what each datum had when last seen
    elbo = _measure(problem, record, "E", 0, parameters, q)
    yield _Reached(parameters, elbo, record)
    about = problem.origin(parameters)
    statistics, total, counted = None, None, 0
    seen = number = 0
    for iteration in range(1, settings.max_iterations + 1):
        blocks = _batches(problem, settings, generator)
        for place, rows in enumerate(blocks):
            shown = record.every_half_step or place == len(blocks) - 1
            q[rows] = problem.responsibilities(parameters, rows)
            of_batch = problem.statistics(q[rows], rows, about=about)
            record.passes += len(rows) / problem.num_data
            if shown:
                _measure(problem, record, "E", iteration, parameters, q)
            of_batch = of_batch * (
                problem.total_weight / max(float(problem.counts(of_batch).sum()), 1e-300)
            )
            number += 1
            seen += len(rows)
            step = number**-settings.step_exponent
            statistics = (
                of_batch if statistics is None else statistics * (1 - step) + of_batch * step
            )
            if seen >= settings.num_held:
                parameters = problem.m_step(statistics, parameters)
            if number > settings.max_iterations * len(blocks) / 2:
                total = statistics if total is None else total + statistics
                counted += 1
            if shown:
                elbo = _measure(problem, record, "M", iteration, parameters, q)
        averaged = parameters
        if total is not None:
            averaged = problem.m_step(total * (1 / counted), parameters)
        yield from _closing_row(problem, record, settings, iteration, averaged, elbo)


_ALGORITHMS: dict[str, Callable[..., Iterator[_Reached]]] = {
    "exact": _exact,
    "hard": partial(_with_point_masses, _most_probable),
    "monte_carlo": partial(_with_point_masses, _drawn),
    "incremental": _incremental,
    "online": _online,
}


# --- any program ---------------------------------------------------------------------------------


def _generalized(
    program: EnumeratedProgram, record: HalfSteps, settings: _Settings
) -> Iterator[_Reached]:
    """Exact E steps, and M steps that go some way up and never down."""
    optimizer = None if settings.optimizer is None else settings.optimizer(program.parameters)
    waiting: dict[str, Any] | None = None
    for iteration in range(settings.max_iterations + 1):
        evidence, marginals = program.e_step()
        record.passes += 1
        stamp = record.stamp("E", iteration)
        if waiting is not None:
            record.add(
                log_likelihood=evidence, divergence=max(evidence - waiting["elbo"], 0.0), **waiting
            )
        with torch.no_grad():
            joint = float(program.expected_log_joint(marginals))
        entropy = evidence - joint
        record.add(stamp, evidence, joint + entropy, 0.0)
        yield _Reached(None, evidence, record)
        if iteration < settings.max_iterations:
            steps = settings.num_gradient_steps
            joint, passes = climb(program, marginals, joint, optimizer, steps)
            record.passes += passes
            waiting = {"stamp": record.stamp("M", iteration + 1), "elbo": joint + entropy}


def _fit_generalized(model: Any, x: Any, settings: _Settings) -> EMFit:
    """Generalised EM on any program; a mixture's is its `model`, from any number of starts."""
    if not isinstance(model, StatisticsModel):
        if not callable(model):
            raise ValueError(
                f"the model is called as model(x), but {type(model).__name__} cannot be"
            )
        reached, state, values, measure = _climb_once(model, no_guide, x, settings)
        return _generalized_fit(
            (model, no_guide), reached, state, values, measure, _config(model, settings, x)
        )
    problem = model.prepare(x)
    ends: list[float] = []
    best: tuple[Any, Any, Any] | None = None
    for attempt in range(settings.num_restarts):
        if settings.initialization != "given":
            generator = _stream(settings.seed, attempt)
            problem.write(problem.initialize(settings.initialization, generator))
        reached, state, _, _ = _climb_once(model.model, model.guide, x, settings)
        ends.append(reached.objective / problem.total_weight)
        if best is None or reached.objective > best[0].objective:
            best = reached, state, problem.read()
        if reached.status == "interrupted":
            break
    assert best is not None
    reached, state, parameters = best
    problem.write(parameters)
    values = {name: v.detach().clone() for name, v in model.fitted_values().items()}
    config = _config(model, settings, x)
    config["fit_em"]["final_bounds"] = ends
    return _generalized_fit(
        (model.model, model.guide), reached, state, values, problem.measure, config
    )


def _climb_once(
    model: Program, guide: Program, x: Any, settings: _Settings
) -> tuple[_Reached, dict[str, Any], dict[str, Tensor], str]:
    """One start: where it ended, the parameter store there, its values, what the data are."""
    start, model, guide = unwrap_programs(model, guide)
    with program_scope(settings.seed), torch.enable_grad():
        store = pyro.get_param_store()
        given = store.get_state()
        own = {n: v.detach().clone().requires_grad_() for n, v in given["params"].items()}
        store.set_state({"params": own, "constraints": given["constraints"]})
        store.set_state(start)
        program = EnumeratedProgram(model, x)
        record = HalfSteps(float(program.length))
        algorithm = _generalized(program, record, settings)
        with deferred_interrupt() as interrupted:
            reached = _drive(algorithm, settings, record.total_weight, interrupted)
        with torch.no_grad(), keep_random_state():  # registers what the guide has of its own
            guide(*program.arguments[0], **program.arguments[1])
        state = {
            part: {n: v for n, v in values.items() if n not in program.foreign}
            for part, values in store.get_state().items()
        }
        values = {n: v.detach().clone() for n, v in store.items() if n not in program.foreign}
    return reached, state, values, measure_of(program.elbo.trace)


def _generalized_fit(
    programs: tuple[Program, Program],
    reached: _Reached,
    state: dict[str, Any],
    values: dict[str, Tensor],
    measure: str,
    config: dict[str, Any],
) -> EMFit:
    config["fit_em"] |= {"converged": reached.converged, "gap": "difference"}
    _, model, guide = unwrap_programs(*programs)
    return EMFit(
        model=FittedProgram(model, state),
        guide=FittedProgram(guide, state),
        history=reached.record.result(config, measure),
        config=config,
        parameters=values,
        status=reached.status,
    )
