"""The measurement itself: which estimators take the pair, and what each comes to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from pyro.infer import ELBO

from pyro_vae.diagnostics.gradients.candidates import Candidate
from pyro_vae.diagnostics.gradients.memory import peak_bytes
from pyro_vae.diagnostics.gradients.references import Reference, References
from pyro_vae.diagnostics.gradients.sampler import Bench, CannotMakeError, Draws, count_passes
from pyro_vae.diagnostics.gradients.statistics import Gradients, of_all, statistics
from pyro_vae.inference.programs import ProgramError
from pyro_vae.progress import progress_bar

__all__ = ["Measured", "Row", "measure"]

_TIMING_ROUNDS = 30


class Pair(NamedTuple):
    """An estimator that takes the programs with so many particles."""

    candidate: Candidate
    num_particles: int
    elbo: ELBO
    bytes: int


@dataclass
class Row:
    """What one estimator came to with one number of particles."""

    candidate: Candidate
    num_particles: int
    numbers: dict[str, float]
    groups: dict[str, dict[str, float]]


@dataclass
class Measured:
    """All rows, and what else the result tells."""

    candidates: list[Candidate]
    particles: tuple[int, ...]
    repeats: int
    rows: list[Row]
    scales: dict[str, float]  # the size of single gradients, against which rounding is judged
    notes: list[str]


def measure(
    bench: Bench,
    candidates: Sequence[Candidate],
    particles: tuple[int, ...],
    repeats: int,
    reference: Reference | None,
    progress: bool,
) -> Measured:
    """Measures every estimator that takes the pair, with every number of particles it takes.

    Raises:
        ProgramError: If none takes the pair, or one that was asked for refuses it for every K.
    """
    pairs = _admit(bench, candidates, particles)
    elbos = [pair.elbo for pair in pairs]
    times = bench.time(elbos, min(repeats, _TIMING_ROUNDS))
    counts = [(pair.candidate, pair.num_particles) for pair in pairs]
    references = References(bench, reference, counts, repeats)
    scales = dict.fromkeys(bench.groups, 0.0)
    rows: dict[int, Row] = {}
    total = len(pairs) * repeats + references.num_gradients
    with progress_bar(total, "gradient", show=progress) as bar:
        bar.set_description("references")
        references.draw(bar.update)
        bar.set_description("estimators")
        for place, drawn in bench.draw(elbos, repeats, bench.seed, bar.update):
            pair = pairs[place]
            _note_sampled(bench, pair)
            groups = _groups_of(bench, pair, drawn, references)
            for name, gradients in drawn.gradients.items():
                scales[name] = max(scales[name], float(gradients.square().sum(1).mean()) ** 0.5)
            numbers = {
                "value": float(drawn.values.mean()),
                "value_se": float(drawn.values.std()) / math.sqrt(repeats),
                "passes": float(count_passes(pair.elbo, bench.model, bench.guide, bench.arguments)),
                **_time_statistics(times[:, place]),
                "bytes": float(pair.bytes),
            }
            rows[place] = Row(pair.candidate, pair.num_particles, numbers, groups)
    kept = [c for c in candidates if any(row.candidate is c for row in rows.values())]
    ordered = [rows[place] for place in sorted(rows)]
    return Measured(kept, particles, repeats, ordered, scales, [*references.notes, *bench.notes])


def _groups_of(
    bench: Bench, pair: Pair, drawn: Draws, references: References
) -> dict[str, dict[str, float]]:
    """The statistics of every group of parameters."""
    centre = references.get(pair.candidate, pair.num_particles)
    found = {}
    for name, gradients in drawn.gradients.items():
        numbers = statistics(gradients, None if centre is None else centre[name])
        found[name] = of_all(numbers, bench.share(name))
        _note_odd(bench, pair, name, gradients)
    return found


def _time_statistics(timed: np.ndarray) -> dict[str, float]:
    """Median and its standard error, from the median absolute deviation."""
    seconds = float(np.median(timed))
    spread = 1.4826 * float(np.median(np.abs(timed - seconds)))
    return {"seconds": seconds, "seconds_se": 1.2533 * spread / math.sqrt(len(timed))}


def _admit(bench: Bench, candidates: Sequence[Candidate], particles: tuple[int, ...]) -> list[Pair]:
    """Which estimators take the pair with how many particles; notes about the others."""
    pairs: list[Pair] = []
    relaxes = bench.has_unreparameterised()
    for candidate in candidates:
        if candidate.name == "StraightThrough" and not candidate.asked_for and not relaxes:
            continue  # with nothing to relax it is PathwiseELBO
        refusals: dict[int, Exception] = {}
        for k in particles:
            try:
                elbo = bench.make(candidate, k)
                size = peak_bytes(partial(bench.step, elbo))  # refusals and first-time costs too
            except (ProgramError, NotImplementedError, CannotMakeError) as error:
                refusals[k] = error
            else:
                pairs.append(Pair(candidate, k, elbo, size))
        if len(refusals) == len(particles) and candidate.asked_for:
            raise next(iter(refusals.values()))
        for text in dict.fromkeys(str(error) for error in refusals.values()):
            which = [str(k) for k, error in refusals.items() if str(error) == text]
            at = "" if len(which) == len(particles) else f" with K = {', '.join(which)}"
            bench.notes.append(f"{candidate.name} is left out{at}: {text}.")
    if not pairs:
        raise ProgramError("no estimator takes this model and guide: " + " ".join(bench.notes))
    return pairs


def _note_sampled(bench: Bench, pair: Pair) -> None:
    sampled = getattr(pair.elbo, "sampled_sites", ())
    note = f"{pair.candidate.name} draws the KL of {', '.join(sampled)}: no closed form is known."
    if sampled and note not in bench.notes:
        bench.notes.append(note)


def _note_odd(bench: Bench, pair: Pair, group: str, gradients: Gradients) -> None:
    of = f"{pair.candidate.name} with K = {pair.num_particles}"
    bad = int((~gradients.isfinite().all(1)).sum())
    if bad:
        bench.notes.append(
            f"{of}: {bad} of {len(gradients)} gradients of '{group}' "
            "are not finite, so their statistics are nan."
        )
    elif not gradients.any():
        bench.notes.append(f"{of} gives '{group}' no gradient at all.")
