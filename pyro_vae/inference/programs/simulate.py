"""Data drawn from a model, with the latents behind them."""

from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.inference.programs.arguments import Arguments, Program, ProgramError, as_arguments
from pyro_vae.inference.programs.traces import weighted_sites
from pyro_vae.results import ShortRepr

__all__ = ["Simulation", "simulate", "without_data"]


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
