"""What the gallery says of one model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_median, init_to_value
from torch import Tensor

__all__ = ["Example", "Simulated", "make_global_guide"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class Simulated:
    """Data of known parameters.

    Attributes:
        x: The data, as the model and every tool take them: a tensor, or a tuple of arguments.
        truth: The value of each global latent, by its site's name.
    """

    x: Any
    truth: dict[str, Tensor]


@dataclass(frozen=True)
class Example:
    """A model of the gallery.

    Attributes:
        title: What it is.
        model: The generative program.
        simulate: From a seed to data and truth; the caller's random state is left alone.
        make_guide: Makes a guide that has not been fitted.
        simpler: A model of the same data that lacks what makes this one: what `loo` should prefer
            less.
        make_simpler_guide: Its guide.
        lacks: What the simpler model lacks.
        batch_size: Data of a mini-batch that make sense; None for all of them.
    """

    title: str
    model: Program
    simulate: Callable[[int], Simulated]
    make_guide: Callable[[], Program]
    simpler: Program
    make_simpler_guide: Callable[[], Program]
    lacks: str
    batch_size: int | None = None


def make_global_guide(
    model: Program, *local_sites: str, start: dict[str, Tensor] | None = None
) -> AutoMultivariateNormal:
    """A normal over all latents of a model, in unconstrained space, but those of each datum.

    Args:
        model: The generative program.
        local_sites: Sites that it leaves out.
        start: Where it begins, by site; the prior's median where nothing is said.
    """
    begin = init_to_value(values=start or {}, fallback=init_to_median)
    blocked = poutine.block(model, hide=list(local_sites))
    return AutoMultivariateNormal(blocked, init_loc_fn=begin, init_scale=0.1)
