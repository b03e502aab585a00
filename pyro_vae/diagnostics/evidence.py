r"""The log evidence log p(x) of each datum, with what each number bounds and how surely."""

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_vae.diagnostics.posterior import khat_threshold, pareto_khat
from pyro_vae.inference.inspection import inspect_programs
from pyro_vae.inference.log_weights import effective_sample_size, elbo, importance_bound
from pyro_vae.inference.programs import (
    Program,
    ProgramStructure,
    as_arguments,
    bytes_of_run,
    map_batch,
    program_scope,
    run_programs,
)
from pyro_vae.results import Result, label, make_result, sha256_of

__all__ = ["log_evidence"]


def log_evidence(
    model: Program,
    guide: Program | None,
    x: Any,
    *,
    method: str = "importance",
    num_particles: int = 1000,
    joint: bool = False,
    seed: int = 0,
    max_memory: float = 0.5,
    progress: bool = True,
) -> Result:
    r"""Estimates log p(x) of each datum, with the ELBO and the gap from the same draws.

    .. math:: \log \hat p(x_n) = \log \frac1K \sum_k w_{kn}, \qquad
              w_{kn} = \frac{p(x_n, z_{kn})}{q(z_{kn} \mid x_n)}

    In expectation this is below log p(x) and rises to it with K. The standard error is that of the
    delta method,
    sqrt(1/ESS - 1/K); where k-hat is bad it is unreliable, and the result says for how many data.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior; not needed for `"exact"`.
        x: The data; a tuple for several arguments, a dict for keywords.
        method: `"importance"`, or `"exact"` where the model's module has a method
            `log_evidence(x)`.
        num_particles: Draws from the guide for each datum, K.
        joint: True for models with global latents: one number for the full data, a total.
        seed: Seeds the draws; the caller's random state is left alone.
        max_memory: Roughly the memory that one chunk of data and particles may take, in GiB.
        progress: Shows a bar on stderr where that is a terminal.

    Returns:
        Variables over `datum`: `log_evidence`, `elbo` and `gap` (log evidence - ELBO, so in
        expectation at most the true gap), in nats
        with standard errors `*_se`; `ess` (particles) and `khat`. With `joint` there is no
        dimension.

    Raises:
        ProgramError: If the pair has no log weights; see `log_weights`.
        ValueError: If an argument is out of its range, or the model offers no exact evidence.

    References:
        Burda, Grosse & Salakhutdinov (2016), Importance weighted autoencoders, eq. 8.

    Example:
        >>> import torch
        >>> from pyro_vae import LinearGaussian
        >>> model = LinearGaussian(data_dim=3, latent_dim=2)
        >>> x = torch.zeros(2, 3)
        >>> found = log_evidence(model.model, model.exact_guide, x, num_particles=10)
        >>> exact = log_evidence(model.model, None, x, method="exact")
        >>> bool(abs(found.log_evidence - exact.log_evidence).max() < 1e-4)
        True
    """
    if method == "exact":
        return _exact(model, x)
    if method != "importance":
        raise ValueError(f"method is {method!r}, but must be 'importance' or 'exact'")
    if guide is None:
        raise ValueError("importance sampling draws from the guide; pass one")
    if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 1:
        raise ValueError(f"num_particles must be a positive integer, not {num_particles!r}")
    if not max_memory > 0:
        raise ValueError(f"max_memory is in GiB and must be positive, not {max_memory!r}")
    with torch.no_grad(), program_scope(seed):
        plan = _plan(model, guide, x, joint, num_particles, max_memory)
        shown = tqdm(
            total=plan.num_data, unit="datum", leave=False, disable=None if progress else True
        )
        columns: list[dict[str, Tensor]] = []
        with shown:
            for part in plan.parts():
                weights = torch.cat(
                    [
                        _log_weights(model, guide, part, plan.structure, k)
                        for k in plan.particles(num_particles)
                    ]
                )
                columns.append(_reduce(weights.double()))
                shown.update(weights.shape[1])
    found = {name: torch.cat([column[name] for column in columns]) for name in columns[0]}
    return _result(found, plan.structure, x, num_particles, joint, seed)


def _log_weights(
    model: Program, guide: Program, x: Any, structure: ProgramStructure, num_particles: int
) -> Float[Tensor, "particles batch"]:
    log_p, log_q, _ = run_programs(model, guide, as_arguments(x), structure, num_particles)
    return log_p - log_q


def _reduce(log_weights: Float[Tensor, "particles batch"]) -> dict[str, Float[Tensor, " batch"]]:
    """Every number of the result from the weights of a chunk of data."""
    particles = len(log_weights)
    ess = effective_sample_size(log_weights)
    bound, mean = importance_bound(log_weights), elbo(log_weights)
    relative = (log_weights - bound).exp() - 1  # the influence of each draw on the importance bound
    unknown = torch.full_like(mean, math.nan)
    return {
        "log_evidence": bound,
        "log_evidence_se": (1 / ess - 1 / particles).clamp_min(0).sqrt()
        if particles > 1
        else unknown,
        "elbo": mean,
        "elbo_se": log_weights.std(0) / math.sqrt(particles) if particles > 1 else unknown,
        "gap": bound - mean,
        "gap_se": (relative - log_weights + mean).std(0) / math.sqrt(particles)
        if particles > 1
        else unknown,
        "ess": ess,
        "khat": pareto_khat(log_weights),
    }


def _result(
    found: Mapping[str, Tensor],
    structure: ProgramStructure,
    x: Any,
    num_particles: int,
    joint: bool,
    seed: int,
) -> Result:
    texts = {
        "log_evidence": ("nats", "lower", "importance-weighted estimate of log p(x)"),
        "elbo": ("nats", "lower", "evidence lower bound of the guide"),
        "gap": ("nats", "lower", "log evidence - ELBO, estimates KL(q(z|x) || p(z|x)) from below"),
        "ess": ("particles", "none", "effective sample size of the importance weights"),
        "khat": ("none", "none", "Pareto k-hat of the importance weights"),
    }
    variables: dict[str, Any] = {}
    for name, values in found.items():
        unit, bound, description = texts[name.removesuffix("_se")]
        attrs = label(
            unit=unit,
            bound=bound,
            reduction=("total" if joint else "per datum")
            if unit == "nats"
            else "none"
            if joint
            else "per datum",
            measure=structure.measure if unit == "nats" else None,
            num_particles=num_particles,
            description=description,
        )
        variables[name] = ((), values[0], attrs) if joint else ("datum", values, attrs)
    args, kwargs = as_arguments(x)
    return make_result(
        variables,
        function="log_evidence",
        config={
            "method": "importance",
            "num_particles": num_particles,
            "joint": joint,
            "subsample_factor": structure.scale,
        },
        seed=seed,
        data_sha256=sha256_of(*[a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]),
        notes=_notes(found["khat"], num_particles),
    )


def _notes(khat: Tensor, num_particles: int) -> list[str]:
    """What must not be parted from the numbers."""
    threshold = khat_threshold(num_particles)
    bad = int((~(khat <= threshold)).sum())
    notes = [
        "k-hat, ESS and every importance estimate are blind to a mode that the guide never visits."
    ]
    if bad:
        notes.insert(
            0,
            f"k-hat is above {threshold:.2f} (or unknown) for {bad} of {len(khat)} data: there "
            "the log evidence is a lower bound "
            "whose error is unreliable, not an estimate. More particles or a better guide mend it.",
        )
    return notes


def _exact(model: Program, x: Any) -> Result:
    owner = getattr(model, "__self__", None)
    if not isinstance(owner, nn.Module) or not hasattr(owner, "log_evidence"):
        raise ValueError(
            "this model offers no exact log evidence (a method log_evidence(x)); use "
            "method='importance'"
        )
    with torch.no_grad():
        values: Tensor = cast(Any, owner).log_evidence(x)
    attrs = label(bound="exact", measure="real", description="log p(x) in closed form")
    return make_result(
        {"log_evidence": ("datum", values, attrs)},
        function="log_evidence",
        config={"method": "exact"},
        seed=None,
        data_sha256=sha256_of(x),
    )


# --- chunks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """How data and particles are cut so that a chunk fits in memory."""

    x: Any
    structure: ProgramStructure
    num_data: int
    data_chunk: int
    particle_chunk: int

    def parts(self) -> Iterator[Any]:
        if self.data_chunk == self.num_data:
            yield self.x
            return
        for start in range(0, self.num_data, self.data_chunk):
            part = slice(start, start + self.data_chunk)
            yield map_batch(self.x, operator.itemgetter(part))

    def particles(self, num_particles: int) -> list[int]:
        full, rest = divmod(num_particles, self.particle_chunk)
        return [self.particle_chunk] * full + [rest] * (rest > 0)


def _plan(
    model: Program, guide: Program, x: Any, joint: bool, num_particles: int, max_memory: float
) -> _Plan:
    arguments = as_arguments(x)
    structure = inspect_programs(
        model, guide, arguments, joint=joint, num_particles=min(num_particles, 2)
    )
    num_data = 1 if joint else structure.batch_size
    per_particle = max(bytes_of_run(model, guide, arguments) / num_data, 64.0)
    room = max_memory * 2**30 / per_particle  # particles times data
    particles = int(min(num_particles, max(room, 1)))
    data = int(min(num_data, max(room // particles, 1)))
    part = map_batch(x, lambda a: a[:data])
    if data < num_data and not _can_slice(model, guide, part, structure, data):
        data, particles = num_data, int(min(num_particles, max(room / num_data, 1)))
    return _Plan(x, structure, num_data, data, particles)


def _can_slice(
    model: Program, guide: Program, part: Any, structure: ProgramStructure, length: int
) -> bool:
    """Whether the programs take a part of the data as they take all of them."""
    if structure.scale != 1.0 or structure.batch_dim is None:
        return False
    try:
        found = inspect_programs(model, guide, as_arguments(part), num_particles=1)
    except (RuntimeError, ValueError, IndexError):  # plates or parameters of a fixed size
        return False
    return found.batch_size == length
