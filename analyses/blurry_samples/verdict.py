"""What `analyses.blurry_samples` found: its table and the verdict in words."""

import math
from collections.abc import Sequence

import torch

from analyses.blurry_samples.generators import SUSPECTS, Measured
from pyro_vae.results import Result

# Rybkin, Daniilidis & Levine (2021), table 3: MNIST, -log p (upper bound) and FID.
PUBLISHED = (
    ("Gaussian, variance fixed at 1", "740.5", "59.9"),
    ("Gaussian, beta tuned", "-796.2", "53.23"),
    ("Gaussian, scale per pixel", "-2895", "132.5"),
    ("Gaussian, shared scale", "-896.1", "32.18"),
    ("Bernoulli", "not given", "32.22"),
)


def number(result: Result, name: str, digits: int = 2) -> str:
    """A number with its error."""
    return f"{float(result[name]):.{digits}f} ± {float(result[f'{name}_se']):.{digits}f}"


def row_of(measured: Measured) -> dict[str, str]:
    """The line of one generator in the table."""
    evidence = measured.evidence.quantity("log_evidence")
    return {
        "suspect": measured.case.suspect,
        "generator": measured.case.title,
        "log p(x) at least": f"{evidence.value:.2f}",
        "of": evidence.measure_text,
        "Frechet, means": number(measured.quality, "frechet_distance", 1),
        "Frechet, draws": number(measured.noisy, "frechet_distance", 1),
        "precision": number(measured.quality, "precision"),
        "recall": number(measured.quality, "recall"),
        "high freq., means": number(measured.quality, "high_frequency_ratio"),
        "high freq., draws": number(measured.noisy, "high_frequency_ratio"),
        "nearest distance": number(measured.quality, "nearest_distance_ratio"),
    }


def held_out_row(measured: Measured) -> dict[str, str]:
    """What held-out data get: what perfect samples would."""
    quality = measured.quality
    return {
        "suspect": "",
        "generator": "held-out data",
        "log p(x) at least": "",
        "of": "",
        "Frechet, means": number(quality, "frechet_distance_held_out", 1),
        "Frechet, draws": "",
        "precision": number(quality, "precision_held_out"),
        "recall": number(quality, "recall_held_out"),
        "high freq., means": number(quality, "high_frequency_ratio_held_out"),
        "high freq., draws": "",
        "nearest distance": "1",
    }


def published_rows() -> list[dict[str, str]]:
    """The published table."""
    return [dict(zip(("MNIST", "-log p(x) at most", "FID"), row, strict=True)) for row in PUBLISHED]


def spread(starts: Sequence[Measured]) -> float:
    """Standard deviation over trainings of the Frechet distance; 0 if there is only one."""
    values = torch.tensor([frechet(m) for m in starts], dtype=torch.float64)
    return float(values.std()) if len(values) > 1 else 0.0


def sharpness(measured: Measured) -> float:
    """Power of the means above the cutoff, over that of the training data."""
    return float(measured.quality["high_frequency_ratio"])


def frechet(measured: Measured) -> float:
    """Squared Frechet distance of the means to the training data."""
    return float(measured.quality["frechet_distance"])


def verdicts(found: Sequence[Measured], starts: Sequence[Measured]) -> list[str]:
    """A sentence for each suspect, then what they say together; all from the numbers."""
    base, luck = found[0], spread(starts)
    floor = float(base.quality["high_frequency_ratio_held_out"])
    sentences = [
        f"The base ({base.case.title}) has {sharpness(base):.2f} of the data's power at high "
        f"frequencies in its means and {float(base.noisy['high_frequency_ratio']):.2f} in its "
        f"draws (held-out data: {floor:.2f}); its Frechet distance is {frechet(base):.1f}, with a "
        f"standard deviation of {luck:.1f} over {len(starts)} trainings."
    ]
    helped: dict[str, float] = {}
    for suspect, words in SUSPECTS.items():
        own = [m for m in found if m.case.suspect == suspect]
        if not own:
            continue
        best = min(own, key=frechet)
        sharpest = max(own, key=sharpness)
        change = frechet(best) - frechet(base)
        errors = (float(m.quality["frechet_distance_se"]) for m in (base, best))
        error = math.hypot(*errors, math.sqrt(2) * luck)
        clear = "" if abs(change) > 2 * error else ", within its error,"
        if change < -2 * error:
            helped[suspect] = change
        worst = max(own, key=frechet)
        effect = f"changes the Frechet distance{clear} by {change:+.1f} ± {error:.1f}"
        if len(own) == 1:
            sentences.append(
                f"{words[0].upper()}{words[1:]}: {best.case.title} {effect}; high frequencies are "
                f"{sharpness(best):.2f} of the data's."
            )
            continue
        sentences.append(
            f"{words[0].upper()}{words[1:]}: the best here, {best.case.title}, {effect}, the "
            f"worst, {worst.case.title}, by {frechet(worst) - frechet(base):+.1f}; high "
            f"frequencies go from {min(map(sharpness, own)):.2f} to {sharpness(sharpest):.2f} "
            f"({sharpest.case.title})."
        )
    sentences += likelihood_and_pictures(found)
    if helped:
        culprit = min(helped, key=lambda name: helped[name])
        sentences.append(f"Largest improvement of the Frechet distance: {SUSPECTS[culprit]}.")
    elif len(found) > 1:
        sentences.append("No change improves the Frechet distance beyond its error.")
    return sentences


def likelihood_and_pictures(found: Sequence[Measured]) -> list[str]:
    """Whether the most probable held-out data and the best samples come from one generator.

    Numbers that live on another measure than the base's are not compared with it.
    """
    levels = {m.case.title: m.evidence.quantity("log_evidence") for m in found}
    measure = levels[found[0].case.title].measure
    alike = [m for m in found if levels[m.case.title].measure == measure]
    if len(alike) < 2:
        return []
    likely = alike[0]
    for m in alike[1:]:  # refuses what cannot be compared
        likely = m if levels[m.case.title] > levels[likely.case.title] else likely
    best, near = levels[likely.case.title], min(alike, key=frechet)
    others = [
        f"{title} ({level.measure_text})"
        for title, level in levels.items()
        if level.measure != measure
    ]
    source = "one generator" if likely is near else "different generators"
    return [
        f"The best held-out {best.measure_text} ({likely.case.title}, {best.value:.1f} nats) and "
        f"the best samples ({near.case.title}, Frechet {frechet(near):.1f} against "
        f"{frechet(likely):.1f}) come from {source}"
        + (f"; not compared with it: {', '.join(others)}." if others else ".")
    ]
