"""Data replicated by a model, of the size of the given: prior and posterior predictive draws."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro
from jaxtyping import Float
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae.inference.predictive import hold_enumerated
from pyro_vae.inference.programs import (
    Arguments,
    Program,
    ProgramStructure,
    Site,
    as_arguments,
    draw_traces,
    fixed_draws,
    in_particle_plate,
    simulate,
    site_log_probs,
    site_values,
    sum_traces,
    without_data,
)

__all__ = ["Replicates", "log_likelihood", "observed_data", "replicate"]


class Replicates(NamedTuple):
    """Some draws of new data, and the given data at the same latents.

    Attributes:
        drawn: The model with new data.
        given: The model with the given data.
        num_draws: How many draws both hold.
    """

    drawn: Trace
    given: Trace
    num_draws: int


def observed_data(
    model: Program, guide: Program, x: Any, structure: ProgramStructure, *, prior: bool
) -> dict[str, Tensor]:
    """The data by site, `[batch, inner plates, event]`, as replicates have them.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        x: The data.
        structure: From `inspect_programs`.
        prior: Whether the latents are to be drawn from their prior later.

    Raises:
        ProgramError: If data, or with `prior` latents, cannot be drawn from the model.
    """
    ((guide_trace, trace, _),) = draw_traces(model, guide, as_arguments(x), structure, 1)
    simulate(model if prior else poutine.replay(model, trace=guide_trace), x)
    return {name: site_values(trace, name, structure)[0] for name in structure.observed}


def replicate(
    kind: str,
    model: Program,
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
    num_draws: int,
    most: int,
) -> Iterator[Replicates]:
    """Draws of the predictive distribution, at most so many at once.

    Args:
        kind: Whether the latents come from the guide (`"posterior"`) or the `"prior"`.
        model: The generative program.
        guide: The program of the approximate posterior.
        arguments: From `as_arguments`.
        structure: From `inspect_programs`.
        num_draws: How many in all.
        most: How many at once.
    """
    full, rest = divmod(num_draws, most)
    for wanted in [most] * full + [rest] * (rest > 0):
        with pyro.validation_enabled(False):
            if kind == "posterior":
                yield from _from_posterior(model, guide, arguments, structure, wanted)
            else:
                yield from _from_prior(model, arguments, structure, wanted)


def _from_posterior(
    model: Program, guide: Program, arguments: Arguments, structure: ProgramStructure, wanted: int
) -> Iterator[Replicates]:
    found = draw_traces(model, guide, arguments, structure, wanted)
    for guide_trace, model_trace, count in found:
        latents = fixed_draws(guide_trace, model_trace)
        hold_enumerated(model, latents, arguments, structure, count)
        drawn = _run(without_data(model), latents, arguments, structure, count)
        yield Replicates(drawn, model_trace, count)


def _from_prior(
    model: Program, arguments: Arguments, structure: ProgramStructure, wanted: int
) -> Iterator[Replicates]:
    count = wanted if structure.vectorizable else 1
    for _ in range(wanted // count):
        drawn = _run(without_data(model), Trace(), arguments, structure, count)
        latents = drawn.copy()
        for name in structure.observed:
            latents.remove_node(name)
        yield Replicates(drawn, _run(model, latents, arguments, structure, count), count)


def _run(
    program: Program, latents: Trace, arguments: Arguments, structure: ProgramStructure, count: int
) -> Trace:
    args, kwargs = arguments
    if count > 1:
        program = in_particle_plate(program, count, -1 - structure.max_plate_nesting)
    # Replay stands outside the particle plate: a replayed site skips the plates inside replay.
    return poutine.trace(poutine.replay(program, trace=latents)).get_trace(*args, **kwargs)


def log_likelihood(
    trace: Trace, count: int, structure: ProgramStructure
) -> Float[Tensor, "draws data"] | None:
    """Of each datum; jointly, of each entry of a single observed site in one plate."""
    if structure.enumerated or not structure.observed:
        return None
    if structure.batch_dim is not None:

        def keep(name: str, _site: Site) -> bool:
            return name in structure.observed

        return sum_traces([(trace, count)], structure, keep).expand(count, -1)
    if len(structure.observed) > 1:
        return None
    entries = site_log_probs(trace, structure.observed[0], structure, count)
    return entries if entries.dim() == 2 else None
