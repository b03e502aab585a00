"""Draws from the guide, with everything that the diagnostics of a posterior read off them."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae.inference.inspection import inspect_programs
from pyro_vae.inference.programs import (
    Program,
    ProgramStructure,
    as_arguments,
    bytes_of_run,
    draw_traces,
    fixed_draws,
    in_particle_plate,
    program_scope,
    site_log_probs,
    site_values,
    sum_traces,
)
from pyro_vae.inference.simulation import without_data

__all__ = ["PosteriorDraws", "draw_posterior", "flat_latents", "latent_names", "predict"]


@dataclass(frozen=True)
class PosteriorDraws:
    """Draws of the latents from the guide, per datum.

    Attributes:
        latents: By site, `[draws, batch, inner plates, event]`; without batch if joint.
        log_joint: log p(x, z) in nats, `[draws, batch]`; batch 1 if joint.
        log_guide: log q(z | x) in nats, `[draws, batch]`.
        log_likelihood: By observed site, log p(x | z) in nats, `[draws, batch, inner plates]`;
            `[draws, plates]` if joint. Empty where discrete latents were summed out.
        structure: What `inspect_programs` found.
        seed: The seed of the draws.
    """

    latents: dict[str, Tensor]
    log_joint: Float[Tensor, "draws batch"]
    log_guide: Float[Tensor, "draws batch"]
    log_likelihood: dict[str, Tensor]
    structure: ProgramStructure
    seed: int | None

    @property
    def log_weights(self) -> Float[Tensor, "draws batch"]:
        """Log importance weights log p(x, z) - log q(z | x), in nats."""
        return self.log_joint - self.log_guide


def draw_posterior(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_draws: int = 1000,
    joint: bool = False,
    seed: int | None = 0,
    max_memory: float = 0.5,
) -> PosteriorDraws:
    r"""Draws the latents of each datum from the guide, with their log weights.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        x: The data; a tuple for several arguments, a dict for keywords.
        num_draws: Draws for each datum.
        joint: True for models with global latents: one posterior on the full data.
        seed: Seeds the draws; the caller's random state is left alone.
        max_memory: Roughly the memory that the draws made at once may take, in GiB.

    Raises:
        ProgramError: If the pair has no log weights; see `log_weights`.
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from pyro_vae import LinearGaussian
        >>> model = LinearGaussian(data_dim=3, latent_dim=2)
        >>> found = draw_posterior(model.model, model.exact_guide, torch.zeros(5, 3), num_draws=7)
        >>> found.latents["z"].shape, found.log_weights.shape
        (torch.Size([7, 5, 2]), torch.Size([7, 5]))
    """
    if isinstance(num_draws, bool) or not isinstance(num_draws, int) or num_draws < 1:
        raise ValueError(f"num_draws must be a positive integer, not {num_draws!r}")
    if not max_memory > 0:
        raise ValueError(f"max_memory is in GiB and must be positive, not {max_memory!r}")
    arguments = as_arguments(x)
    with torch.no_grad(), program_scope(seed):
        structure = inspect_programs(
            model, guide, arguments, joint=joint, num_particles=min(num_draws, 2)
        )
        room = max_memory * 2**30 / max(bytes_of_run(model, guide, arguments), 64)
        most = max(1, int(min(num_draws, room)))
        full, rest = divmod(num_draws, most)
        parts = [
            _read(draw_traces(model, guide, arguments, structure, count), structure, seed)
            for count in [most] * full + [rest] * (rest > 0)
        ]
    return PosteriorDraws(
        _join([part.latents for part in parts]),
        torch.cat([part.log_joint for part in parts]),
        torch.cat([part.log_guide for part in parts]),
        _join([part.log_likelihood for part in parts]),
        structure,
        seed,
    )


def predict(
    model: Program, guide: Program, x: Any, *, num_draws: int, joint: bool = False
) -> dict[str, Tensor]:
    """Draws of the observed sites from the posterior predictive of the guide.

    Call it inside `programs.program_scope`, which seeds it.

    Returns:
        By observed site, `[draws, batch, inner plates, event]`; `[draws, plates, event]` if joint.

    Raises:
        ProgramError: If the pair has no log weights; see `log_weights`.
    """
    arguments = as_arguments(x)
    args, kwargs = arguments
    with torch.no_grad(), pyro.validation_enabled(False):
        structure = inspect_programs(
            model, guide, arguments, joint=joint, num_particles=min(num_draws, 2)
        )
        found = []
        for guide_trace, model_trace, count in draw_traces(
            model, guide, arguments, structure, num_draws
        ):
            program = without_data(model)
            if count > 1:
                program = in_particle_plate(program, count, -1 - structure.max_plate_nesting)
            given = fixed_draws(guide_trace, model_trace)
            drawn = poutine.trace(poutine.replay(program, trace=given)).get_trace(*args, **kwargs)
            found.append({name: site_values(drawn, name, structure) for name in structure.observed})
    return _join(found)


def flat_latents(latents: dict[str, Tensor], *, joint: bool) -> Float[Tensor, "draws batch dim"]:
    """All latents of a datum as one vector, in the order of the sites; batch 1 if joint."""
    outer = 1 if joint else 2
    flat = [value.reshape(*value.shape[:outer], -1) for value in latents.values()]
    dtype = next((v.dtype for v in flat if v.is_floating_point()), torch.get_default_dtype())
    vectors = torch.cat([value.to(dtype) for value in flat], -1)
    return vectors[:, None] if joint else vectors


def latent_names(latents: dict[str, Tensor], *, joint: bool) -> list[str]:
    """Names for the entries of `flat_latents`: `z[0]`, `w[1,2]`, or `z` for a single one."""
    names = []
    for name, value in latents.items():
        shape = value.shape[1 if joint else 2 :]
        if math.prod(shape) == 1:
            names.append(name)
        else:
            names += [f"{name}[{','.join(map(str, index))}]" for index in np.ndindex(*shape)]
    return names


def _read(
    traces: list[tuple[Trace, Trace, int]], structure: ProgramStructure, seed: int | None
) -> PosteriorDraws:
    guides = [(guide, count) for guide, _, count in traces]
    models = [(model, count) for _, model, count in traces]
    latents = _join(
        [{n: site_values(model, n, structure) for n in structure.latents} for model, _ in models]
    )
    likelihood: dict[str, Tensor] = {}
    if not structure.enumerated:
        likelihood = _join(
            [
                {n: site_log_probs(model, n, structure, count) for n in structure.observed}
                for model, count in models
            ]
        )
    log_joint, log_guide = sum_traces(models, structure), sum_traces(guides, structure)
    log_guide = log_guide.to(log_joint).expand_as(log_joint)
    return PosteriorDraws(latents, log_joint, log_guide, likelihood, structure, seed)


def _join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
