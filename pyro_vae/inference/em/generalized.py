"""Generalised EM, on any program whose latents can be enumerated."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyro
import torch

from pyro_vae.inference.em.history import HalfSteps
from pyro_vae.inference.em.loop import (
    EMSettings,
    Ending,
    Reached,
    best_of_starts,
    drive,
    random_stream,
)
from pyro_vae.inference.em.protocol import StatisticsModel
from pyro_vae.inference.programs import (
    EnumeratedProgram,
    FilledGaps,
    Program,
    gradient_m_step,
    keep_random_state,
    measure_of,
    no_guide,
    own_parameters,
    program_scope,
    remember_fitted,
    store_state,
    unwrap_programs,
)
from pyro_vae.inference.svi import deferred_interrupt

__all__ = ["fit_generalized"]


def fit_generalized(model: StatisticsModel | Program, x: Any, settings: EMSettings) -> Ending:
    """Generalised EM on any program; a mixture's is its `model`, from any number of starts."""
    if isinstance(model, StatisticsModel):
        return _best_of_starts(model, x, settings)
    if not callable(model):
        raise ValueError(f"the model is called as model(x), but {type(model).__name__} cannot be")
    return _fit_once(model, no_guide, x, settings)


def _best_of_starts(model: StatisticsModel, x: Any, settings: EMSettings) -> Ending:
    problem = model.prepare(x)

    def run(attempt: int) -> tuple[Ending, Any]:
        assert isinstance(settings.initialization, str)
        if settings.initialization != "given":
            generator = random_stream(settings.seed, attempt)
            problem.write(problem.initialize(settings.initialization, generator))
        ending = _fit_once(model.model, model.guide, x, settings)
        return ending, problem.read()

    kept, runs, _ = best_of_starts(run, settings, lambda one: one[0].reached)
    ends = [ending.reached.objective / problem.total_weight for ending, _ in runs]
    ending, parameters = runs[kept]
    problem.write(parameters)
    return replace(
        ending,
        parameters={name: v.detach().clone() for name, v in model.fitted_values().items()},
        measure=problem.measure,
        facts={"final_bounds": ends, "kept_start": kept, **ending.facts},
    )


def _fit_once(model: Program, guide: Program, x: Any, settings: EMSettings) -> Ending:
    """One start to its end."""
    start, model, guide = unwrap_programs(model, guide)
    with program_scope(settings.seed), FilledGaps(), torch.enable_grad():
        own_parameters(start)
        store = pyro.get_param_store()
        program = EnumeratedProgram(model, x)
        begun = {n: v.detach().clone() for n, v in store.named_parameters()}
        record = HalfSteps(float(program.length), of_point=bool(program.points))
        guide = program.guide if program.points else guide
        algorithm = _generalized(program, record, settings)
        with deferred_interrupt() as interrupted:
            reached = drive(algorithm, settings, record.total_weight, interrupted)
        with torch.no_grad(), keep_random_state():  # registers what the guide has of its own
            guide(*program.arguments[0], **program.arguments[1])
        state = store_state(lambda name: name not in program.foreign)
        values = {n: v.detach().clone() for n, v in store.items() if n not in program.foreign}
    remember_fitted(model, begun, state["params"])
    facts = {"num_data": program.length, "converged": reached.converged, "gap": "difference"}
    facts |= {"at_a_point": program.points} if program.points else {}
    return Ending(model, guide, state, values, measure_of(program.elbo.trace), reached, facts)


def _generalized(
    program: EnumeratedProgram, record: HalfSteps, settings: EMSettings
) -> Iterator[Reached]:
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
        yield Reached(None, evidence, record)
        if iteration < settings.max_iterations:
            steps = settings.num_gradient_steps
            joint, passes = gradient_m_step(program, marginals, joint, optimizer, steps)
            record.passes += passes
            waiting = {"stamp": record.stamp("M", iteration + 1), "elbo": joint + entropy}
