"""The measurement itself: which estimators take the pair, and what each comes to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from pyro.infer import ELBO

from pyro_vae.diagnostics.gradients.candidates import Candidate
from pyro_vae.diagnostics.gradients.memory import peak_bytes
from pyro_vae.diagnostics.gradients.references import Reference, References
from pyro_vae.diagnostics.gradients.sampler import Bench, CannotMakeError
from pyro_vae.diagnostics.gradients.statistics import Gradients, of_all, statistics
from pyro_vae.inference.programs import ProgramError
from pyro_vae.progress import progress_bar

__all__ = ["Measured", "Row", "measure"]

_TIMING_ROUNDS = 30


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
    rows: list[Row] = []
    scales = dict.fromkeys(bench.groups, 0.0)
    references = References(bench, reference, particles, repeats)
    pairs = _admit(bench, candidates, particles)
    times = bench.time([elbo for _, _, elbo in pairs], min(repeats, _TIMING_ROUNDS))
    bar = progress_bar(len(pairs) * repeats, "gradient", show=progress)
    with bar:
        for (candidate, k, elbo), timed in zip(pairs, times.T, strict=True):
            bar.set_description(f"{candidate.name}, K={k}")
            _note_sampled(bench, candidate, elbo)
            size = peak_bytes(partial(bench.step, elbo))
            drawn = bench.draw(elbo, repeats, bench.seed, bar.update)
            centre = references.get(candidate, k)
            groups = {}
            for name, gradients in drawn.gradients.items():
                given = None if centre is None else centre[name]
                groups[name] = of_all(statistics(gradients, given), bench.share(name))
                scales[name] = max(scales[name], float(gradients.square().sum(1).mean()) ** 0.5)
                _note_odd(bench, candidate, k, name, gradients)
            numbers = {
                "value": float(drawn.values.mean()),
                "value_se": float(drawn.values.std()) / math.sqrt(repeats),
                **_time_statistics(timed),
                "bytes": float(size),
            }
            rows.append(Row(candidate, k, numbers, groups))
    kept = [c for c in candidates if any(row.candidate is c for row in rows)]
    return Measured(kept, particles, repeats, rows, scales, [*references.notes, *bench.notes])


def _time_statistics(timed: np.ndarray) -> dict[str, float]:
    """Median and its standard error, from the median absolute deviation."""
    seconds = float(np.median(timed))
    spread = 1.4826 * float(np.median(np.abs(timed - seconds)))
    return {"seconds": seconds, "seconds_se": 1.2533 * spread / math.sqrt(len(timed))}


def _admit(
    bench: Bench, candidates: Sequence[Candidate], particles: tuple[int, ...]
) -> list[tuple[Candidate, int, ELBO]]:
    """Which estimators take the pair with how many particles; notes about the others."""
    pairs: list[tuple[Candidate, int, ELBO]] = []
    relaxes = bench.has_unreparameterised()
    for candidate in candidates:
        if candidate.name == "StraightThrough" and not candidate.asked_for and not relaxes:
            continue  # with nothing to relax it is PathwiseELBO
        refusals: dict[int, Exception] = {}
        for k in particles:
            try:
                elbo = bench.make(candidate, k)
                bench.step(elbo)  # refusals and first-time costs come now
            except (ProgramError, NotImplementedError, CannotMakeError) as error:
                refusals[k] = error
            else:
                pairs.append((candidate, k, elbo))
        if len(refusals) == len(particles) and candidate.asked_for:
            raise next(iter(refusals.values()))
        for text in dict.fromkeys(str(error) for error in refusals.values()):
            which = [str(k) for k, error in refusals.items() if str(error) == text]
            at = "" if len(which) == len(particles) else f" with K = {', '.join(which)}"
            bench.notes.append(f"{candidate.name} is left out{at}: {text}.")
    if not pairs:
        raise ProgramError("no estimator takes this model and guide: " + " ".join(bench.notes))
    return pairs


def _note_sampled(bench: Bench, candidate: Candidate, elbo: ELBO) -> None:
    sampled = getattr(elbo, "sampled_sites", ())
    note = f"{candidate.name} draws the KL of {', '.join(sampled)}: no closed form is known."
    if sampled and note not in bench.notes:
        bench.notes.append(note)


def _note_odd(bench: Bench, candidate: Candidate, k: int, group: str, gradients: Gradients) -> None:
    bad = int((~gradients.isfinite().all(1)).sum())
    if bad:
        bench.notes.append(
            f"{candidate.name} with K = {k}: {bad} of {len(gradients)} gradients of '{group}' "
            "are not finite, so their statistics are nan."
        )
    elif not gradients.any():
        bench.notes.append(f"{candidate.name} with K = {k} gives '{group}' no gradient at all.")
