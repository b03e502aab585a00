"""Data drawn from a model and its latents; local latents drawn anew; the prior as a guide."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.inference.programs.arguments import (
    Arguments,
    Program,
    ProgramError,
    ProgramStructure,
    as_arguments,
    messenger_of,
)
from pyro_vae.inference.programs.traces import (
    enumerating,
    in_particle_plate,
    map_draw,
    weighted_sites,
)
from pyro_vae.inference.supports import transform_of
from pyro_vae.results import ShortRepr

__all__ = [
    "Simulation",
    "inspected_guide",
    "layers",
    "prior_guide",
    "redraw_local",
    "simulate",
    "without_data",
]


@dataclass(frozen=True, repr=False)
class Simulation(ShortRepr):
    """Data drawn from a model, with the latents behind them.

    Attributes:
        model: The model at the simulated data.
        arguments: Its arguments, the simulated data in place of the given.
        replaced: Whether every observed site was found among the arguments: a guide then sees the
            simulated data.
        latents: The latents by site, as the model drew them.
        data: The simulated data by observed site.
    """

    model: Program
    arguments: Arguments
    replaced: bool
    latents: dict[str, Tensor]
    data: dict[str, Tensor]


class _DrawObserved(Messenger):
    """Draws the observed sites, where `poutine.uncondition` would draw `pyro.deterministic` too."""

    def _pyro_sample(self, msg: Any) -> None:
        given = msg["is_observed"] and not msg["infer"].get("_deterministic")
        if given and not site_is_subsample(msg):
            msg.update(is_observed=False, value=None, done=False)


def without_data(model: Program) -> Program:
    """The model with its observed sites drawn, whatever data it is given."""
    return _DrawObserved()(model)


def simulate(model: Program, x: Any) -> Simulation:
    """Draws latents and data from a model, in the shapes of the data given.

    Uses the global random stream, and the caller's parameter store: call it inside
    `programs.program_scope`.

    Raises:
        ProgramError: If an observed site cannot be drawn (a `pyro.factor`), or a latent has no
            prior to draw from; names it.
    """
    args, kwargs = as_arguments(x)
    with torch.no_grad(), pyro.validation_enabled(False):
        sites = weighted_sites(poutine.trace(model).get_trace(*args, **kwargs))
        observed = {name: s["value"] for name, s in sites.items() if s["is_observed"]}
        for name in observed:
            if type(sites[name]["fn"]).__name__ == "Unit":
                raise ProgramError(
                    f"the model's site '{name}' is a pyro.factor, from which no data can be "
                    "simulated; write it as a distribution with sample(..., obs=...), or leave out "
                    "what needs simulated data"
                )
        try:
            trace = poutine.trace(without_data(model)).get_trace(*args, **kwargs)
        except NotImplementedError as error:
            raise ProgramError(
                f"the model's observed sites {', '.join(observed)} cannot all be drawn from, so no "
                "data can be simulated; leave out what needs simulated data"
            ) from error
    drawn = {name: trace.nodes[name]["value"].detach() for name in observed}
    replaced = set()

    def replace(argument: Any) -> Any:
        for name, value in observed.items():
            same = isinstance(argument, Tensor) and argument.shape == value.shape
            if same and torch.equal(argument.nan_to_num(), value.nan_to_num()):
                replaced.add(name)
                new = drawn[name].to(argument)
                return torch.where(argument.isnan(), argument, new)  # what was missing stays so
        return argument

    new = tuple(map(replace, args)), {name: replace(value) for name, value in kwargs.items()}
    latents = {
        name: site["value"].detach()
        for name, site in weighted_sites(trace).items()
        if name not in observed
    }
    fixed = poutine.condition(without_data(model), data=drawn)
    return Simulation(fixed, new, replaced == set(observed), latents, drawn)


def redraw_local(
    model: Program,
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
    traces: list[tuple[Trace, Trace, int]],
    num_inner: int,
) -> list[tuple[Trace, Trace, int]]:
    """So many fresh draws of the latents of the data beside each draw of the global ones.

    Particles are in the order of `traces`, those with the same global latents next to each other.
    """
    assert structure.split is not None
    args, kwargs = arguments
    model = enumerating(model, structure)
    if messenger_of(guide) is not None:  # runs the model: what is observed is no guide
        guide = poutine.block(guide, hide_fn=lambda site: site["is_observed"])
    inner, runs = (num_inner, 1) if structure.vectorizable else (1, num_inner)
    drawn: list[tuple[Trace, Trace, int]] = []
    for guide_trace, _, count in traces:
        given = Trace()
        for name, site in weighted_sites(guide_trace).items():
            if name in structure.split.local_sites:
                continue
            value = site["value"]
            dim = value.dim() - len(site["fn"].event_shape) - structure.max_plate_nesting - 1
            if inner > 1 and dim >= 0 and value.shape[dim] == count:
                value = map_draw(partial(torch.repeat_interleave, repeats=inner, dim=dim), value)
            given.add_node(
                name, **{**{k: v for k, v in site.items() if k != "name"}, "value": value}
            )
            given.nodes[name].pop("masked_log_prob", None)
        particles, place = count * inner, -1 - structure.max_plate_nesting
        for _ in range(runs):
            again = poutine.replay(in_particle_plate(guide, particles, place), trace=given)
            locals_ = poutine.trace(again).get_trace(*args, **kwargs)
            replayed = poutine.replay(in_particle_plate(model, particles, place), trace=locals_)
            drawn.append((locals_, poutine.trace(replayed).get_trace(*args, **kwargs), particles))
    return drawn


def inspected_guide(model: Program, guide: Program | None) -> Program:
    """The guide, or one in its place that `inspect_programs` takes: the prior of the latents.

    Enumerated sites, from which latents may be drawn, are held at their first value.
    """
    return prior_guide(_FirstOfSupport()(model)) if guide is None else guide


def prior_guide(model: Program) -> Program:
    """The model without its observations: a guide that draws the latents from the prior.

    Sites without a normalisable prior (`ImproperUniform`) are drawn within two units of zero in
    unconstrained space.
    """

    def hidden(msg: Any) -> bool:
        return msg["type"] == "sample" and (
            msg["is_observed"] or msg["infer"].get("enumerate") == "parallel"
        )

    return poutine.block(_DrawImproper()(model), hide_fn=hidden)


class _DrawImproper(Messenger):
    """Draws sites that have no distribution to draw from."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and isinstance(layers(msg["fn"])[-1], dist.ImproperUniform):
            fn = msg["fn"]
            transform = transform_of(fn)
            free = transform.inverse_shape(fn.shape())
            near_zero = dist.Uniform(-2.0, 2.0).expand(free)
            near_zero = near_zero.to_event(len(free) - len(fn.batch_shape))
            msg["fn"] = dist.TransformedDistribution(near_zero, [transform])


class _FirstOfSupport(Messenger):
    """Holds the enumerated sites at their first value."""

    def _pyro_sample(self, msg: Any) -> None:
        marked = msg["infer"].get("enumerate") == "parallel"
        if marked and msg["value"] is None and msg["fn"].has_enumerate_support:
            first = msg["fn"].enumerate_support(expand=False)[0]
            msg["value"], msg["done"] = first.expand(msg["fn"].shape()), True


def layers(fn: Any) -> list[Any]:
    """A distribution, and what it wraps, down to the innermost."""
    layers = [fn]
    while hasattr(layers[-1], "base_dist"):
        layers.append(layers[-1].base_dist)
    return layers
