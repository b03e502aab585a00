"""Pairs of latents and data drawn from a model, the log joint of each, and the guide's draws."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from pyro import poutine
from torch import Tensor

from pyro_vae.diagnostics.evidence import ChunkPlan
from pyro_vae.inference.draws import flat_latents, latent_names
from pyro_vae.inference.programs import (
    Program,
    ProgramError,
    ProgramStructure,
    Simulation,
    draw_traces,
    enumerating,
    simulate,
    site_values,
    sum_traces,
)

__all__ = ["GuideDraws", "Pairs", "References", "draw_guide", "fit_references", "simulate_pairs"]

Refit = Callable[[Program, Any], Program]

_PENALTIES = (1.0, 10.0, 100.0, 1000.0, 1e4)
_OFFSET = 0.5  # of the points from the line, in standard deviations of what it leaves unexplained
_CLIP = 5.0  # standard deviations beyond which a number of the data tells a line no more


class GuideDraws(NamedTuple):
    """Draws from the guide at simulated data, and log p(x, z) in nats at each."""

    latents: Float64[np.ndarray, "draws simulations dim"]
    log_joint: Float64[np.ndarray, "draws simulations"]


@dataclass(frozen=True)
class Pairs:
    """Latents and data of some simulations.

    Attributes:
        simulation: Where they come from.
        names: One for each latent number.
        latents: What the model drew.
        log_joint: log p(x, z) at it, in nats; discrete latents that are summed out are left out.
        data: All simulated numbers of a datum.
        precision: Relative precision of `log_joint`.
    """

    simulation: Simulation
    names: list[str]
    latents: Float64[np.ndarray, "simulations dim"]
    log_joint: Float64[np.ndarray, " simulations"]
    data: Float64[np.ndarray, "simulations numbers"]
    precision: float

    @property
    def x(self) -> Any:
        """The simulated data, as the `x` of every tool."""
        args, kwargs = self.simulation.arguments
        return kwargs if kwargs and not args else args


def simulate_pairs(plan: ChunkPlan) -> Iterator[Pairs]:
    """Draws pairs in the shapes of the plan's chunks, round after round without end."""
    for _ in itertools.count():
        for _, part in plan.parts():
            yield _pairs(simulate(part.model, part.x), plan.structure)


def _pairs(drawn: Simulation, structure: ProgramStructure) -> Pairs:
    args, kwargs = drawn.arguments
    truth = {name: drawn.latents[name] for name in structure.latents}
    model = enumerating(poutine.condition(drawn.model, data=truth), structure)
    trace = poutine.trace(model).get_trace(*args, **kwargs)
    joint = structure.batch_dim is None
    latents = {name: site_values(trace, name, structure) for name in structure.latents}
    data = {name: site_values(trace, name, structure) for name in structure.observed}
    log_joint = sum_traces([(trace, 1)], structure)[0]
    return Pairs(
        drawn,
        latent_names(latents, joint=joint),
        _array(flat_latents(latents, joint=joint)[0]),
        _array(log_joint),
        _array(flat_latents(data, joint=joint)[0]),
        torch.finfo(log_joint.dtype).eps,
    )


def draw_guide(pairs: Pairs, guide: Program, plan: ChunkPlan, num_draws: int) -> GuideDraws:
    """Runs the guide on simulated data.

    Raises:
        ProgramError: If it cannot be run on them.
    """
    structure, joint = plan.structure, plan.structure.batch_dim is None
    latents, log_joint = [], []
    try:
        for wanted in plan.particles(num_draws):
            found = draw_traces(
                pairs.simulation.model, guide, pairs.simulation.arguments, structure, wanted
            )
            for _, trace, _ in found:
                values = {name: site_values(trace, name, structure) for name in structure.latents}
                latents.append(_array(flat_latents(values, joint=joint)))
            log_joint.append(_array(sum_traces([(t, k) for _, t, k in found], structure)))
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        raise ProgramError(
            f"the guide or the model cannot be run on data simulated from the model ({error}); "
            "calibration needs a guide that takes new data of the same shapes"
        ) from error
    drawn = GuideDraws(np.concatenate(latents), np.concatenate(log_joint))
    if drawn.latents.shape[1:] != pairs.latents.shape:
        raise ProgramError(
            f"on simulated data the guide's draws have the shape {drawn.latents.shape[1:]}, the "
            f"model's latents {pairs.latents.shape}; both need the same plates"
        )
    return drawn


# --- reference points -----------------------------------------------------------------------------


@dataclass(frozen=True)
class References:
    """Reference points for `ranks.tarp`, and the coordinates to measure distances in.

    Both come from simulations that are not judged: a line that predicts the latents by the data,
    and what it leaves unexplained, which has unit covariance in these coordinates. There a wrong
    correlation changes distances as much as a wrong width does.

    Attributes:
        predict: The line.
        axes: Latents times these are the coordinates.
    """

    predict: Callable[[np.ndarray], np.ndarray]
    axes: Float64[np.ndarray, "dim dim"]

    def points(
        self, data: Float64[np.ndarray, "simulations numbers"], rng: np.random.Generator
    ) -> Float64[np.ndarray, "simulations dim"]:
        """A point near the line for each simulation; given its data, independent of its latents."""
        centre = self.predict(data) @ self.axes
        return centre + _OFFSET * rng.standard_normal(centre.shape)


def fit_references(pairs: list[Pairs]) -> References:
    """Fits the latents by the data, linearly, with a penalty chosen by cross-validation."""
    from sklearn.covariance import ledoit_wolf
    from sklearn.linear_model import RidgeCV

    latents = np.concatenate([p.latents for p in pairs])
    data = np.concatenate([p.data for p in pairs])
    middle, width = _moments(data)
    centre, scale = _moments(latents)

    def features(numbers: np.ndarray) -> np.ndarray:
        return np.clip(np.nan_to_num((numbers - middle) / width), -_CLIP, _CLIP)

    targets = np.clip((latents - centre) / scale, -_CLIP, _CLIP)
    fitted = RidgeCV(_PENALTIES).fit(features(data), targets)

    def predict(numbers: np.ndarray) -> np.ndarray:
        return centre + scale * fitted.predict(features(numbers)).reshape(len(numbers), -1)

    rest = latents - predict(data)
    _, unexplained = _moments(rest)
    covariance, _ = ledoit_wolf(rest / unexplained)  # regular also where the latents are many
    values, vectors = np.linalg.eigh(covariance)
    return References(predict, vectors / np.sqrt(values.clip(1e-9)) / unexplained[:, None])


def _moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    finite = np.where(np.isfinite(rows), rows, 0.0)
    spread = finite.std(0)
    return finite.mean(0), np.where(spread > 0, spread, 1.0)


def _array(values: Float[Tensor, "..."]) -> np.ndarray:
    return values.detach().cpu().double().numpy()
