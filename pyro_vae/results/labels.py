"""The words that every labelled number is described in."""

from collections.abc import Sequence
from typing import Any

__all__ = ["BOUNDS", "LABELS", "MEASURES", "REDUCTIONS", "UNITS", "label"]

UNITS = ("nats", "bits per dimension", "nats squared", "particles", "seconds", "bytes", "none")
"""Units of a labelled number; "none" is for pure numbers such as a k-hat."""

REDUCTIONS = ("per datum", "total", "none")
"""Whether a number is per datum or a total over them; "none" where data are not summed at all."""

BOUNDS = ("exact", "lower", "upper", "unbiased", "objective", "none")
"""What a number says about the quantity it is named after.

"objective" is what a procedure maximises and that bounds nothing (a MAP objective, a beta-ELBO);
"none" is a number that is neither (a k-hat, the difference of two lower bounds).
"""

MEASURES = ("binary", "grey", "real", "counts", "mixed")
"""What the data are, hence whether a likelihood is a probability or a density."""

LABELS = ("unit", "reduction", "bound")
"""The attributes that every labelled variable has."""


def label(
    *,
    unit: str = "nats",
    reduction: str = "per datum",
    bound: str,
    objective: str | None = None,
    measure: str | None = None,
    num_particles: int | None = None,
    seed: int | None = None,
    description: str | None = None,
    reliable_by: str | None = None,
) -> dict[str, str | int]:
    """Makes the attributes of one variable of a `Result`.

    Args:
        unit: One of `UNITS`.
        reduction: One of `REDUCTIONS`.
        bound: One of `BOUNDS`.
        objective: Which one, where `bound` is "objective": two compare only if they are the same.
        measure: One of `MEASURES`, or None for a number that is not about the likelihood of data.
        num_particles: Particles behind each value, at least 1; None where there are none.
        seed: The seed the values were drawn with, if it is not the seed of the whole result.
        description: One line for the reader.
        reliable_by: The variable, of bools, that says for which data the standard error holds.

    Returns:
        The attributes, without those that are None, which NetCDF cannot hold.

    Raises:
        ValueError: If a word is not in its list (the message lists them), or `num_particles` is
            below 1.
    """
    attrs: dict[str, str | int] = {
        "unit": _one_of("unit", unit, UNITS),
        "reduction": _one_of("reduction", reduction, REDUCTIONS),
        "bound": _one_of("bound", bound, BOUNDS),
    }
    if objective is not None:
        attrs["objective"] = str(objective)
    if measure is not None:
        attrs["measure"] = _one_of("measure", measure, MEASURES)
    if num_particles is not None:
        if (
            isinstance(num_particles, bool)
            or int(num_particles) != num_particles
            or num_particles < 1
        ):
            raise ValueError(
                f"num_particles is {num_particles!r}, but must be a whole number from 1"
            )
        attrs["num_particles"] = int(num_particles)
    if seed is not None:
        attrs["seed"] = int(seed)
    if description is not None:
        attrs["description"] = str(description)
    if reliable_by is not None:
        attrs["reliable_by"] = str(reliable_by)
    return attrs


def _one_of(what: str, word: Any, words: Sequence[str]) -> str:
    if word not in words:
        listed = ", ".join(repr(w) for w in words)
        raise ValueError(f"{what} is {word!r}, but must be one of {listed}")
    return str(word)
