"""The measurement itself: which estimators take the pair, and what each comes to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from pyro.infer import ELBO

from pyro_vae.diagnostics.gradients.memory import peak_bytes
from pyro_vae.diagnostics.gradients.references import Reference, References
from pyro_vae.diagnostics.gradients.sampler import (
    CannotMakeError,
    Draws,
    GradientSampler,
    count_passes,
)
from pyro_vae.diagnostics.gradients.specs import EstimatorSpec
from pyro_vae.diagnostics.gradients.statistics import Gradients, of_all, statistics
from pyro_vae.inference.programs import ProgramError
from pyro_vae.progress import progress_bar

__all__ = ["Measured", "Row", "measure"]

_TIMING_ROUNDS = 30


class Pair(NamedTuple):
    """An estimator that takes the programs with so many particles."""

    spec: EstimatorSpec
    num_particles: int
    elbo: ELBO
    bytes: int


@dataclass
class Row:
    """What one estimator came to with one number of particles."""

    spec: EstimatorSpec
    num_particles: int
    numbers: dict[str, float]
    groups: dict[str, dict[str, float]]


@dataclass
class Measured:
    """All rows, and what else the result tells."""

    specs: list[EstimatorSpec]
    particles: tuple[int, ...]
    repeats: int
    rows: list[Row]
    scales: dict[str, float]  # the size of single gradients, against which rounding is judged
    notes: list[str]


def measure(
    sampler: GradientSampler,
    specs: Sequence[EstimatorSpec],
    particles: tuple[int, ...],
    repeats: int,
    reference: Reference | None,
    progress: bool,
) -> Measured:
    """Measures every estimator that takes the pair, with every number of particles it takes.

    Raises:
        ProgramError: If none takes the pair, or one that was asked for refuses it for every K.
    """
    pairs = _usable_estimators(sampler, specs, particles)
    elbos = [pair.elbo for pair in pairs]
    times = sampler.time(elbos, min(repeats, _TIMING_ROUNDS))
    counts = [(pair.spec, pair.num_particles) for pair in pairs]
    references = References(sampler, reference, counts, repeats)
    scales = dict.fromkeys(sampler.groups, 0.0)
    rows: dict[int, Row] = {}
    total = len(pairs) * repeats + references.num_gradients
    with progress_bar(total, "gradient", show=progress) as bar:
        bar.set_description("references")
        references.draw(bar.update)
        bar.set_description("estimators")
        for place, drawn in sampler.draw(elbos, repeats, sampler.seed, bar.update):
            pair = pairs[place]
            _note_sampled(sampler, pair)
            groups = _groups_of(sampler, pair, drawn, references)
            for name, gradients in drawn.gradients.items():
                scales[name] = max(scales[name], float(gradients.square().sum(1).mean()) ** 0.5)
            numbers = {
                "value": float(drawn.values.mean()),
                "value_se": float(drawn.values.std()) / math.sqrt(repeats),
                "passes": float(
                    count_passes(pair.elbo, sampler.model, sampler.guide, sampler.arguments)
                ),
                **_time_statistics(times[:, place]),
                "bytes": float(pair.bytes),
            }
            rows[place] = Row(pair.spec, pair.num_particles, numbers, groups)
    kept = [c for c in specs if any(row.spec is c for row in rows.values())]
    ordered = [rows[place] for place in sorted(rows)]
    return Measured(kept, particles, repeats, ordered, scales, [*references.notes, *sampler.notes])


def _groups_of(
    sampler: GradientSampler, pair: Pair, drawn: Draws, references: References
) -> dict[str, dict[str, float]]:
    """The statistics of every group of parameters."""
    centre = references.get(pair.spec, pair.num_particles)
    found = {}
    for name, gradients in drawn.gradients.items():
        numbers = statistics(gradients, None if centre is None else centre[name])
        found[name] = of_all(numbers, sampler.share(name))
        _note_odd(sampler, pair, name, gradients)
    return found


def _time_statistics(timed: np.ndarray) -> dict[str, float]:
    """Median and its standard error, from the median absolute deviation."""
    seconds = float(np.median(timed))
    spread = 1.4826 * float(np.median(np.abs(timed - seconds)))
    return {"seconds": seconds, "seconds_se": 1.2533 * spread / math.sqrt(len(timed))}


def _usable_estimators(
    sampler: GradientSampler, specs: Sequence[EstimatorSpec], particles: tuple[int, ...]
) -> list[Pair]:
    """Which estimators take the pair with how many particles; notes about the others."""
    pairs: list[Pair] = []
    relaxes = sampler.has_unreparameterised()
    for spec in specs:
        if spec.name == "StraightThrough" and not spec.asked_for and not relaxes:
            continue  # with nothing to relax it is PathwiseELBO
        refusals: dict[int, Exception] = {}
        for k in particles:
            try:
                elbo = sampler.make(spec, k)
                size = peak_bytes(partial(sampler.step, elbo))  # refusals and first-time costs too
            except (ProgramError, NotImplementedError, CannotMakeError) as error:
                refusals[k] = error
            else:
                pairs.append(Pair(spec, k, elbo, size))
        if len(refusals) == len(particles) and spec.asked_for:
            raise next(iter(refusals.values()))
        for text in dict.fromkeys(str(error) for error in refusals.values()):
            which = [str(k) for k, error in refusals.items() if str(error) == text]
            at = "" if len(which) == len(particles) else f" with K = {', '.join(which)}"
            sampler.notes.append(f"{spec.name} is left out{at}: {text}.")
    if not pairs:
        raise ProgramError("no estimator takes this model and guide: " + " ".join(sampler.notes))
    return pairs


def _note_sampled(sampler: GradientSampler, pair: Pair) -> None:
    sampled = getattr(pair.elbo, "sampled_sites", ())
    note = f"{pair.spec.name} draws the KL of {', '.join(sampled)}: no closed form is known."
    if sampled and note not in sampler.notes:
        sampler.notes.append(note)


def _note_odd(sampler: GradientSampler, pair: Pair, group: str, gradients: Gradients) -> None:
    of = f"{pair.spec.name} with K = {pair.num_particles}"
    bad = int((~gradients.isfinite().all(1)).sum())
    if bad:
        sampler.notes.append(
            f"{of}: {bad} of {len(gradients)} gradients of '{group}' "
            "are not finite, so their statistics are nan."
        )
    elif not gradients.any():
        sampler.notes.append(f"{of} gives '{group}' no gradient at all.")
