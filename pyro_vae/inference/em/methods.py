"""EM, hard, sampled, incremental and online EM, on models with sufficient statistics.

Variational Bayes is EM on a problem whose parameters are a posterior, and its stochastic form is
online EM on it: natural gradients of conjugate models are differences of statistics.

Each is a generator: it yields where it stands after every iteration, and `em_loop.drive` decides
whether it goes on.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_vae.inference.em.acceleration import Extrapolation
from pyro_vae.inference.em.history import HalfSteps
from pyro_vae.inference.em.loop import EMSettings, Reached
from pyro_vae.inference.em.online import step_size
from pyro_vae.inference.em.protocol import StatisticsProblem

__all__ = ["ALGORITHMS"]

_BATCHES_A_PASS = 10


def _exact(
    problem: StatisticsProblem, parameters: Any, record: HalfSteps, settings: EMSettings, _: Any
) -> Iterator[Reached]:
    """EM: one pass over the data an iteration, for the E step after an M step measures that one."""
    before, waiting = None, None
    path = Extrapolation(problem) if settings.acceleration else None
    for iteration in range(settings.max_iterations + 1):
        jumped = None
        if path is not None:
            path.add(parameters)
            jumped = _jump(problem, path, record, waiting)
        at = parameters
        parameters, expected = jumped or (at, _e_step(problem, at, record))
        stamp = record.stamp("E", iteration)
        evidence = expected.log_likelihood
        if waiting is not None:
            with record.paused():
                _add_waiting(problem, record, waiting, before, at if jumped else None, expected)
        joint = problem.expected_log_joint(expected.statistics, parameters)
        prior = problem.expected_log_prior(expected.statistics, parameters)
        entropy = expected.entropy
        residual = _residual(problem, expected.statistics, parameters)
        record.add(stamp, evidence, joint + entropy, 0.0, kl=-entropy - prior, residual=residual)
        yield Reached(parameters, evidence, record)
        if iteration == settings.max_iterations:
            return
        before = expected.log_posterior
        parameters = problem.m_step(expected.statistics, parameters)
        waiting = {
            "stamp": record.stamp("M", iteration + 1),
            "elbo": problem.expected_log_joint(expected.statistics, parameters) + entropy,
            "kl": -entropy - problem.expected_log_prior(expected.statistics, parameters),
        }


def _e_step(problem: StatisticsProblem, parameters: Any, record: HalfSteps) -> Any:
    record.passes += 1
    about = problem.origin(parameters)
    return problem.e_step(parameters, about=about, keep=record.measures)


def _add_waiting(
    problem: StatisticsProblem,
    record: HalfSteps,
    waiting: dict[str, Any],
    before: Tensor | None,
    at: Any,
    expected: Any,
) -> None:
    """The row of an M step, once the E step after it is made.

    After a jump that E step speaks of other parameters: the row takes one at its own, `at`, or is
    left out where data are too large for that.
    """
    if at is not None:
        if not record.measures:
            return
        expected = problem.e_step(at, about=problem.origin(at), keep=True)
    gap = expected.log_likelihood - waiting["elbo"]
    if before is not None:
        gap = problem.divergence(before, expected.log_posterior)
    record.add(log_likelihood=expected.log_likelihood, divergence=gap, **waiting)


def _jump(
    problem: StatisticsProblem,
    path: Extrapolation,
    record: HalfSteps,
    waiting: dict[str, Any] | None,
) -> tuple[Any, Any] | None:
    """Parameters ahead of EM with their E step, if the bound there is no lower than reached."""
    parameters = path.jump()
    if parameters is None or waiting is None:
        return None
    expected = _e_step(problem, parameters, record)
    made = math.isfinite(expected.log_likelihood) and expected.log_likelihood >= waiting["elbo"]
    path.settle(made)
    return (parameters, expected) if made else None


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
        residual = math.nan  # of an M step it is zero, whatever q is
        if phase == "E" and hasattr(problem, "entropy_residual"):
            statistics = problem.statistics(q, about=problem.origin(parameters), at=parameters)
            residual = _residual(problem, statistics, parameters)
        record.add(stamp, evidence, elbo, gap, residual=residual)
    return elbo


def _residual(problem: StatisticsProblem, statistics: Any, parameters: Any) -> float:
    """How far the bound is from a sum of entropies, a total; nan where no theorem says that."""
    measure = getattr(problem, "entropy_residual", None)
    return math.nan if measure is None else measure(statistics, parameters)


def _with_point_masses(
    choose: Callable[[Tensor, EMSettings, torch.Generator], Tensor],
    problem: StatisticsProblem,
    parameters: Any,
    record: HalfSteps,
    settings: EMSettings,
    generator: torch.Generator,
) -> Iterator[Reached]:
    """EM whose E step replaces the posterior by components chosen from it.

    Stochastic approximation takes a mean of the statistics of all iterations, the last of which
    has the share n^-a: draws average out, which from step to step they do not.
    """
    averages, about = settings.method == "stochastic_approximation", problem.origin(parameters)
    statistics = None
    for iteration in range(settings.max_iterations + 1):
        q = choose(problem.responsibilities(parameters), settings, generator)
        record.passes += 1
        elbo = _measure(problem, record, "E", iteration, parameters, q)
        objective = elbo if settings.method == "hard" else record.rows[-1]["log_evidence_total"]
        yield Reached(parameters, objective, record)
        if iteration < settings.max_iterations:
            about = about if averages else problem.origin(parameters)
            drawn = problem.statistics(q, about=about, at=parameters)
            if statistics is None or not averages:
                statistics = drawn
            else:
                step = step_size(iteration + 1, settings.step_exponent, settings.step_delay)
                statistics = statistics * (1 - step) + drawn * step
            record.passes += 1
            parameters = problem.m_step(statistics, parameters)
            _measure(problem, record, "M", iteration + 1, parameters, q)


def _most_probable(posterior: Tensor, _settings: EMSettings, _generator: Any) -> Tensor:
    best = posterior.argmax(1, keepdim=True)
    return torch.zeros_like(posterior).scatter_(1, best, 1.0)


def _drawn(posterior: Tensor, settings: EMSettings, generator: torch.Generator) -> Tensor:
    """The shares of the components among draws from the posterior."""
    draws = torch.multinomial(
        posterior.cpu(), settings.num_samples, replacement=True, generator=generator
    ).to(posterior.device)
    one = posterior.new_tensor(1.0 / settings.num_samples).expand(draws.shape)
    return torch.zeros_like(posterior).scatter_add_(1, draws, one)


def _batches(
    problem: StatisticsProblem, settings: EMSettings, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """The data in a random order, cut into mini-batches."""
    length = problem.num_data
    size = settings.batch_size or max(math.ceil(length / _BATCHES_A_PASS), min(100, length))
    return torch.randperm(length, generator=generator).split(size)


def _incremental(
    problem: StatisticsProblem,
    parameters: Any,
    record: HalfSteps,
    settings: EMSettings,
    generator: torch.Generator,
) -> Iterator[Reached]:
    """Blocks take turns: the sum of statistics keeps what the others had when it was their turn."""
    q = problem.responsibilities(parameters)
    about = problem.origin(parameters)
    statistics = problem.statistics(q, about=about)
    record.passes += 1
    elbo = _measure(problem, record, "E", 0, parameters, q)
    yield Reached(parameters, elbo, record)
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
    settings: EMSettings,
    iteration: int,
    parameters: Any,
    objective: float,
) -> Iterator[Reached]:
    """Yields an iteration of a mini-batch method; its last row is taken back if it goes on.

    The row is a full E step at the parameters reached, which the method itself would not make.
    """
    stamp = record.stamp("E", iteration)
    with record.paused():
        expected = problem.e_step(parameters, about=problem.origin(parameters))
        joint = problem.expected_log_joint(expected.statistics, parameters)
        residual = _residual(problem, expected.statistics, parameters)
        bound = joint + expected.entropy
        record.add(stamp, expected.log_likelihood, bound, 0.0, residual=residual)
    yield Reached(parameters, objective, record)
    if iteration < settings.max_iterations:
        record.rows.pop()


def _online(
    averages: bool,
    problem: StatisticsProblem,
    parameters: Any,
    record: HalfSteps,
    settings: EMSettings,
    generator: torch.Generator,
) -> Iterator[Reached]:
    """Averages statistics over mini-batches with steps (n + delay)^-a; the second half's again.

    The latter with `averages` only. Where a posterior is the prior with statistics added, such a
    step is one along the natural gradient (Hoffman et al. 2013, section 2.4).
    """
    q = problem.responsibilities(parameters)  # for the record: what each datum had when last seen
    elbo = _measure(problem, record, "E", 0, parameters, q)
    yield Reached(parameters, elbo, record)
    about = problem.origin(parameters)
    statistics, total, counted = None, None, 0
    seen = number = 0
    for iteration in range(1, settings.max_iterations + 1):
        blocks = _batches(problem, settings, generator)
        for place, rows in enumerate(blocks):
            shown = record.every_half_step or place == len(blocks) - 1
            q[rows] = problem.responsibilities(parameters, rows)
            of_batch = problem.statistics(q[rows], rows, about=about, at=parameters)
            record.passes += len(rows) / problem.num_data
            if shown:
                _measure(problem, record, "E", iteration, parameters, q)
            # By the share of rows, not of weight: so each batch is unbiased for all of the data.
            of_batch = of_batch * (problem.num_data / len(rows))
            number += 1
            seen += len(rows)
            step = step_size(number, settings.step_exponent, settings.step_delay)
            statistics = (
                of_batch if statistics is None else statistics * (1 - step) + of_batch * step
            )
            if seen >= settings.num_held:
                parameters = problem.m_step(statistics, parameters)
            if averages and number > settings.max_iterations * len(blocks) / 2:
                total = statistics if total is None else total + statistics
                counted += 1
            if shown:
                elbo = _measure(problem, record, "M", iteration, parameters, q)
        averaged = parameters
        if total is not None:
            averaged = problem.m_step(total * (1 / counted), parameters)
        yield from _closing_row(problem, record, settings, iteration, averaged, elbo)


ALGORITHMS: dict[str, Callable[..., Iterator[Reached]]] = {
    "exact": _exact,
    "hard": partial(_with_point_masses, _most_probable),
    "monte_carlo": partial(_with_point_masses, _drawn),
    "stochastic_approximation": partial(_with_point_masses, _drawn),
    "incremental": _incremental,
    "online": partial(_online, True),
    "variational_bayes": _exact,
    "stochastic_variational_bayes": partial(_online, False),
}
"""The generator of each method: called with problem, start, record, settings and randomness."""
