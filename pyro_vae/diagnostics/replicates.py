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
    Pair,
    Program,
    ProgramStructure,
    Site,
    fixed_draws,
    in_particle_plate,
    inspected_guide,
    simulate,
    site_log_probs,
    site_values,
    split_count,
    sum_traces,
    without_data,
)

__all__ = [
    "Replicates",
    "log_likelihood",
    "observed_data",
    "other_data",
    "replicate",
    "replicate_held_out",
]


class Replicates(NamedTuple):
    """Some draws of new data, and the given data at the same latents.

    Attributes:
        drawn: The model with new data.
        given: The model with the given data; None where latents owe nothing to them.
        num_draws: How many draws both hold.
    """

    drawn: Trace
    given: Trace | None
    num_draws: int


def observed_data(pair: Pair, *, prior: bool) -> dict[str, Tensor]:
    """The data by site, `[batch, inner plates, event]`, as replicates have them.

    Args:
        pair: The model with its guide and data.
        prior: Whether the latents are to be drawn from their prior later.

    Raises:
        ProgramError: If data, or with `prior` latents, cannot be drawn from the model.
    """
    ((guide_trace, trace, _),) = pair.draws(1)
    simulate(pair.model if prior else poutine.replay(pair.model, trace=guide_trace), pair.x)
    return {name: site_values(trace, name, pair.structure)[0] for name in pair.structure.observed}


def replicate(kind: str, pair: Pair, num_draws: int, most: int) -> Iterator[Replicates]:
    """Draws of the predictive distribution, at most so many at once.

    Args:
        kind: Whether the latents come from the guide (`"posterior"`) or the `"prior"`.
        pair: The model with its guide and data.
        num_draws: How many in all.
        most: How many at once.
    """
    draw = _from_posterior if kind == "posterior" else _from_prior
    for wanted in split_count(num_draws, most):
        with pyro.validation_enabled(False):
            yield from draw(pair, wanted)


def _from_posterior(pair: Pair, wanted: int) -> Iterator[Replicates]:
    for guide_trace, model_trace, count in pair.draws(wanted):
        latents = fixed_draws(guide_trace, model_trace)
        hold_enumerated(pair.model, latents, pair.arguments, pair.structure, count)
        drawn = _run(without_data(pair.model), latents, pair, count)
        yield Replicates(drawn, model_trace, count)


def _from_prior(pair: Pair, wanted: int) -> Iterator[Replicates]:
    count = wanted if pair.structure.vectorizable else 1
    for _ in range(wanted // count):
        drawn = _run(without_data(pair.model), Trace(), pair, count)
        latents = drawn.copy()
        for name in pair.structure.observed:
            latents.remove_node(name)
        yield Replicates(drawn, _run(pair.model, latents, pair, count), count)


def other_data(pair: Pair, test: Any) -> Pair:
    """The model with data that the guide has not seen, and the prior in the guide's place."""
    joint = None if pair.structure.split is not None else pair.joint
    return Pair.inspect(pair.model, inspected_guide(pair.model, None), test, joint=joint)


def replicate_held_out(pair: Pair, other: Pair, num_draws: int, most: int) -> Iterator[Replicates]:
    """Draws of other data: global latents come from the guide, those of the data from their prior.

    Args:
        pair: The model with its guide and the data that it was fitted to.
        other: From `other_data`.
        num_draws: How many in all.
        most: How many at once.
    """
    split = pair.structure.split
    for wanted in split_count(num_draws, most):
        with pyro.validation_enabled(False):
            if split is None:
                for part in _from_prior(other, wanted):
                    yield part._replace(given=None)
                continue
            for guide_trace, model_trace, count in pair.draws(wanted):
                latents = fixed_draws(guide_trace, model_trace)
                for name in [n for n in latents.nodes if n not in split.global_latents]:
                    latents.remove_node(name)
                drawn = _run(without_data(other.model), latents, other, count)
                yield Replicates(drawn, None, count)


def _run(program: Program, latents: Trace, pair: Pair, count: int) -> Trace:
    args, kwargs = pair.arguments
    program = in_particle_plate(program, count, -1 - pair.structure.max_plate_nesting)
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
