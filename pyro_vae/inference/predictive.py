"""Draws of the data: from the prior, and from the posterior whatever its draws came from."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae.data import Seed, as_seed
from pyro_vae.inference.draws import PosteriorDraws, draw_posterior, labelled_draws
from pyro_vae.inference.programs import (
    Arguments,
    LabelledSites,
    Program,
    ProgramError,
    ProgramStructure,
    Site,
    as_arguments,
    as_run,
    bytes_of_run,
    in_particle_plate,
    inspected_guide,
    is_factor,
    particles_at_once,
    program_scope,
    site_values,
    tool_of_model,
    warn_of_unfitted,
    without_data,
)
from pyro_vae.inference.supports import family_of
from pyro_vae.results import ArvizGroups, ShortRepr

__all__ = ["PredictiveDraws", "PriorDraws", "draw_predictive", "draw_prior", "hold_enumerated"]


@runtime_checkable
class LatentDraws(Protocol):
    """What data can be predicted from: `PosteriorDraws` and `PosteriorSample`."""

    @property
    def latents(self) -> dict[str, Tensor]:
        """By site, `[sample dims, batch, inner plates, event]`."""

    @property
    def structure(self) -> ProgramStructure:
        """What `inspect_programs` found."""

    @property
    def sites(self) -> LabelledSites:
        """Names and places of the dims."""

    @property
    def sample_dims(self) -> tuple[str, ...]:
        """Names of the dims of the draws."""


@dataclass(frozen=True, repr=False)
class PredictiveDraws(ShortRepr):
    """Data drawn from the posterior predictive.

    Attributes:
        values: By observed site, `[sample dims, batch, inner plates, event]`.
        sites: Names of the dims.
        sample_dims: Names of the dims of the draws.
    """

    values: dict[str, Tensor]
    sites: LabelledSites
    sample_dims: tuple[str, ...]

    def arviz_groups(self) -> ArvizGroups:
        """What `pyro_vae.results.to_arviz` reads."""
        drawn = labelled_draws(self.values, self.sites, self.sample_dims)
        return ArvizGroups({"posterior_predictive": drawn})


@dataclass(frozen=True, repr=False)
class PriorDraws(ShortRepr):
    """Latents drawn from the prior, and data drawn at them.

    Attributes:
        latents: By site, `[draws, batch, inner plates, event]`; without batch if joint.
        values: By observed site, `[draws, batch, inner plates, event]`.
        sites: Names of the dims.
    """

    latents: dict[str, Tensor]
    values: dict[str, Tensor]
    sites: LabelledSites

    def arviz_groups(self) -> ArvizGroups:
        """What `pyro_vae.results.to_arviz` reads."""
        return ArvizGroups(
            {
                "prior": labelled_draws(self.latents, self.sites),
                "prior_predictive": labelled_draws(self.values, self.sites),
            }
        )


@tool_of_model(observes=False)
def draw_prior(
    model: Program,
    x: Any,
    *,
    num_draws: int = 1000,
    joint: bool | None = None,
    seed: Seed = 0,
    max_memory: float = 0.5,
) -> PriorDraws:
    """Draws latents from the prior and data at them, in the shapes of the data given.

    Args:
        model: The generative program.
        x: The data, of which only the shapes matter; a tuple for several arguments, a dict for
            keywords.
        num_draws: Draws for each datum.
        joint: True for all data as one; None for that where latents are global.
        seed: Seeds the draws; the caller's random state is left alone.
        max_memory: Roughly the memory that the draws made at once may take, in GiB.

    Raises:
        ProgramError: If the model's sites do not all lie in one batch plate, and it is not joint.
        ValueError: If an argument is out of its range.

    Note: discrete latents marked for enumeration are drawn for the data, and not returned.
    """
    seed = as_seed(seed)
    with program_scope(seed):
        drawn = draw_posterior(
            model,
            inspected_guide(model, None),
            x,
            num_draws=num_draws,
            joint=joint,
            seed=None,
            max_memory=max_memory,
        )
        values = _draw_data(model, drawn, as_arguments(x), max_memory, prior=True)
    return PriorDraws(drawn.latents, values, drawn.sites)


@tool_of_model(observes=False)
def draw_predictive(
    model: Program, draws: LatentDraws, x: Any, *, seed: Seed = 0, max_memory: float = 0.5
) -> PredictiveDraws:
    """Draws data from the posterior predictive, one for each draw of the latents.

    Args:
        model: The generative program that the draws are of.
        draws: From `draw_posterior`, its ``resampled``, or `sample_posterior`.
        x: The data that the draws are of.
        seed: Seeds the draws; the caller's random state is left alone.
        max_memory: Roughly the memory that the draws made at once may take, in GiB.

    Raises:
        ProgramError: If an observed site cannot be drawn from (a `pyro.factor`); names it.

    Note: discrete latents that were summed out are drawn from their posterior given the data and
    the other latents.
    """
    seed = as_seed(seed)
    outer = len(draws.sample_dims)
    flat = {name: value.flatten(0, outer - 1) for name, value in draws.latents.items()}
    shape = next(iter(draws.latents.values())).shape[:outer]
    with program_scope(seed):
        warn_of_unfitted(model)
        flattened = _Flat(flat, draws.structure, draws.sites)
        values = _draw_data(model, flattened, as_arguments(x), max_memory, prior=False)
    return PredictiveDraws(
        {name: value.unflatten(0, shape) for name, value in values.items()},
        draws.sites,
        draws.sample_dims,
    )


@dataclass(frozen=True)
class _Flat:
    """Draws of the latents along one dim."""

    latents: dict[str, Tensor]
    structure: ProgramStructure
    sites: LabelledSites


def _draw_data(
    model: Program,
    draws: "_Flat | PosteriorDraws",
    arguments: Arguments,
    max_memory: float,
    *,
    prior: bool,
) -> dict[str, Tensor]:
    """Data at given latents, `[draws, batch, inner plates, event]` by observed site."""
    structure = draws.structure
    args, kwargs = arguments
    found: dict[str, list[Tensor]] = {name: [] for name in structure.observed}
    with torch.no_grad(), pyro.validation_enabled(False):
        ((first, _),) = itertools.islice(_runs(draws, 1), 1)
        at_first = poutine.replay(without_data(model), trace=first)
        size = bytes_of_run(at_first, _empty_guide, arguments)
        # As many as there is room for, or one by one.
        most = particles_at_once(2**31, max_memory, size) if structure.vectorizable else 1
        for given, count in _runs(draws, most):
            if not prior:
                hold_enumerated(model, given, arguments, structure, count)
            program = poutine.replay(_in_plate(without_data(model), structure, count), trace=given)
            drawn = poutine.trace(program).get_trace(*args, **kwargs)
            for name, parts in found.items():
                if is_factor(drawn.nodes[name]):
                    raise ProgramError(
                        f"the model's site '{name}' is a pyro.factor, from which no data can be "
                        "drawn; write it as a distribution with sample(..., obs=...)"
                    )
                parts.append(site_values(drawn, name, structure))
    return {name: torch.cat(parts) for name, parts in found.items()}


def hold_enumerated(
    model: Program, given: Trace, arguments: Arguments, structure: ProgramStructure, count: int
) -> None:
    """Draws latents that were summed out from their posterior, given the data and the others.

    Args:
        model: The generative program.
        given: The other latents; gets those drawn.
        arguments: From `as_arguments`.
        structure: From `inspect_programs`.
        count: Draws that `given` holds side by side.

    Raises:
        ProgramError: If such a latent is in a plate without a size, which cannot tell data apart,
            or its states are vectors.
    """
    if not structure.enumerated:
        return
    args, kwargs = arguments
    held = poutine.replay(_in_plate(model, structure, count), trace=given)
    alone = poutine.trace(held).get_trace(*args, **kwargs)
    for name in structure.enumerated:
        _check_drawable(name, alone.nodes[name])
    discrete = infer_discrete(held, first_available_dim=-2 - structure.max_plate_nesting)
    run = poutine.trace(discrete).get_trace(*args, **kwargs)
    for name in structure.enumerated:
        _hold(given, name, run.nodes[name]["value"])


def _check_drawable(name: str, site: Site) -> None:
    """Refuses a latent that Pyro does not draw from its posterior, or not for each datum."""
    if site["fn"].event_shape:
        raise ProgramError(
            f"the states of the enumerated site '{name}' ({family_of(site['fn'])}) are vectors, "
            "which cannot be drawn from their posterior; write it as a Categorical"
        )
    for plate in site["cond_indep_stack"]:
        if plate.vectorized and plate.size == -1:
            raise ProgramError(
                f"the plate '{plate.name}' around the enumerated site '{name}' has no size, so "
                "states cannot be drawn for each of its data; write "
                f"pyro.plate('{plate.name}', len(x))"
            )


def _empty_guide(*_args: Any, **_kwargs: Any) -> None:
    """A guide without sites, so that the model draws all of its own."""


def _in_plate(program: Program, structure: ProgramStructure, count: int) -> Program:
    return in_particle_plate(program, count, -1 - structure.max_plate_nesting)


def _runs(draws: "_Flat | PosteriorDraws", most: int) -> Iterator[tuple[Trace, int]]:
    """Traces that hold the latents, at most so many draws at once, with their number."""
    total = len(next(iter(draws.latents.values())))
    for start in range(0, total, most):
        count = min(most, total - start)
        given = Trace()
        for name, index in draws.sites.subsamples.items():
            _hold(given, name, index)
        for name, value in draws.latents.items():
            part = value[start] if count == 1 else value[start : start + count]
            placed = as_run(part, draws.sites.places[name], draws.structure, one=count == 1)
            _hold(given, name, placed)
        yield given, count


def _hold(given: Trace, name: str, value: Tensor) -> None:
    """Adds a site's value to a trace to replay."""
    given.add_node(name, type="sample", value=value, infer={}, is_observed=False)
