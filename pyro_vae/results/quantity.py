"""One number with everything needed to know what it means, and when two may be compared."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pyro_vae.results.digits import error_text, number_text

__all__ = ["IncomparableError", "Quantity", "difference_text"]

_MEASURE_TEXT = {
    "binary": "probability of binary pixels",
    "grey": "density of grey pixels",
    "real": "density of real values",
    "counts": "probability of counts",
    "mixed": "density of mixed data",
}

_ADVICE = {
    "unit": "convert one of them, with to_bits_per_dimension or to_nats",
    "reduction": "divide the total by its number of data first",
    "bound": "an objective compares only with the same objective: estimate a bound for both",
    "objective": "an objective compares only with the same objective: estimate a bound for both",
    "measure": "evaluate both on data of the same kind",
    "num_data": "evaluate both on the same data",
    "data_sha256": "evaluate both on the same data",
    "num_dimensions": "count the dimensions of the data in the same way for both",
}

# What a - b says about A - B. An unbiased number counts as exact, in expectation.
_BOUND_OF_DIFFERENCE = {
    ("exact", "exact"): "exact",
    ("exact", "lower"): "upper",
    ("exact", "upper"): "lower",
    ("lower", "exact"): "lower",
    ("lower", "upper"): "lower",
    ("upper", "exact"): "upper",
    ("upper", "lower"): "upper",
    ("objective", "objective"): "objective",
}


class IncomparableError(ValueError):
    """Raised when two quantities are compared whose labels say that they differ in kind."""


@dataclass(frozen=True, repr=False)
class Quantity:
    """One number with everything needed to know what it means.

    Comparison with ``<`` and ``>`` is of the values alone; whether a difference is more than noise
    is for the standard error of `difference` to say.

    Attributes:
        name: What it is, such as ``log_evidence``.
        value: The number; for per-datum variables the mean over the data. Never nan; may be
            infinite.
        standard_error: Monte-Carlo error of `value` for **these** data, taking the noise of
            different data as independent and their biases as they add up; None if unknown.
        data_standard_error: Standard error of `value` as an estimate for the population the data
            were drawn from, sd / sqrt(number of data), larger for few and for skewed data (see
            `Result.quantity`); None if unknown.
        unit: One of `UNITS`.
        reduction: One of `REDUCTIONS`.
        bound: One of `BOUNDS`.
        measure: One of `MEASURES`, or None.
        num_particles: Particles behind each value, or None.
        num_data: How many data the value is about, or None if unknown.
        seed: The seed of the values, or None.
        data_sha256: Hash of the data; a selection of the data has a hash of its own. None if
            unknown.
        num_dimensions: Dimensions of a datum, where the unit is bits per dimension and they are
            known.
        objective: Which objective it is, where `bound` is "objective" and it is known.
        num_unreliable: For how many of the data `standard_error` is not to be relied upon.
        data_error_reliable: Whether `data_standard_error` is: not below 30 data, nor below 25 times
            their squared skewness.
    """

    name: str
    value: float
    standard_error: float | None
    data_standard_error: float | None
    unit: str
    reduction: str
    bound: str
    measure: str | None
    num_particles: int | None
    num_data: int | None
    seed: int | None
    data_sha256: str | None
    num_dimensions: int | None = None
    objective: str | None = None
    num_unreliable: int = 0
    data_error_reliable: bool = True

    def __str__(self) -> str:
        text = f"{self.name.replace('_', ' ')} = {number_text(self.value, self.standard_error)}"
        if self.standard_error is not None:
            text += f" +- {error_text(self.standard_error)}"
        if self.unit != "none":
            text += f" {self.unit}"
        if self.unit in ("nats", "nats squared"):
            text += {"per datum": " per datum", "total": " in total", "none": ""}[self.reduction]
        details = list(self._details())
        return f"{text} ({', '.join(details)})" if details else text

    def __repr__(self) -> str:
        return f"<{self}>"

    @property
    def measure_text(self) -> str:
        """What the number is a probability or a density of; empty if it is of no data."""
        return "" if self.measure is None else _MEASURE_TEXT[self.measure]

    def _details(self) -> Iterator[str]:
        if self.bound in ("lower", "upper"):
            sampled = self.num_particles is not None or bool(self.standard_error)
            yield f"{self.bound} bound in expectation" if sampled else f"{self.bound} bound"
        elif self.bound == "objective":
            yield "an objective, which bounds nothing"
        elif self.bound != "none":
            yield self.bound
        if self.standard_error is None and self.bound != "exact":
            yield "Monte-Carlo error unknown"
        elif " - " in self.name and self.data_standard_error is None and self.num_data != 1:
            yield "error of the draws alone, not over data: see paired_difference"
        if self.num_unreliable:
            several = self.num_data not in (None, 1)
            where = f" for {self.num_unreliable} of {self.num_data} data" if several else ""
            yield f"error unreliable{where}"
        if self.num_particles is not None:
            yield f"{self.num_particles} particle{'s' * (self.num_particles != 1)}"
        if self.num_data is not None:
            mean = "" if self.reduction == "total" else "mean over "
            yield "1 datum" if self.num_data == 1 else f"{mean}{self.num_data} data"
        if self.data_standard_error is not None:
            few = "" if self.data_error_reliable else " or more, for they are few or skewed"
            yield f"their spread alone gives +- {error_text(self.data_standard_error)}{few}"
        if self.measure is not None:
            yield self.measure_text
        if self.seed is not None:
            yield f"seed {self.seed}"

    def _check_comparable(self, other: "Quantity") -> None:
        differs = {
            name: (getattr(self, name), getattr(other, name))
            for name in ("unit", "reduction", "measure", "num_data", "data_sha256")
            if getattr(self, name) != getattr(other, name)
        }
        if (self.bound == "objective") != (other.bound == "objective"):
            differs["bound"] = (self.bound, other.bound)
        elif self.bound == "objective" and self.objective != other.objective:
            differs["objective"] = (self.objective, other.objective)
        if (
            self.unit == other.unit == "bits per dimension"
            and self.num_dimensions != other.num_dimensions
        ):
            differs["num_dimensions"] = (self.num_dimensions, other.num_dimensions)
        if differs:
            listed = "; ".join(
                f"{name}: {_short(a)} against {_short(b)}" for name, (a, b) in differs.items()
            )
            advice = "; ".join(dict.fromkeys(_ADVICE[name] for name in differs))
            raise IncomparableError(
                f"{self.name} and {other.name} cannot be compared, for they differ in {listed}. "
                f"What to do: {advice}"
            )

    def difference(self, other: "Quantity") -> "Quantity":
        """Subtracts another quantity, if the two measure the same thing.

        The bound label follows the subtraction: exact - lower is an upper bound, lower - upper a
        lower one, and lower - lower bounds nothing ("none"). An unbiased number counts as exact, in
        expectation.

        Args:
            other: What to subtract.

        Returns:
            The difference. Its standard error takes the two as independent: for two numbers from
            the same draws it is too large where they go up and down together. An exact number
            without one counts as having none. Its `data_standard_error` is None, since two means do
            not tell how the data pair up: `paired_difference` of the two results knows.

        Raises:
            IncomparableError: If unit, reduction, measure or data differ, or one is an objective
                and the other not.
            ValueError: If both are the same infinity.
        """
        self._check_comparable(other)
        value = self.value - other.value
        if math.isnan(value):
            raise ValueError(
                f"{self.name} and {other.name} are both {self.value}, so their difference is "
                "undefined: look at the data for which they are infinite"
            )
        return replace(
            self,
            name=f"{self.name} - {other.name}",
            value=value,
            standard_error=_combined_error(self, other),
            data_standard_error=None,
            data_error_reliable=True,
            bound=_bound_of_difference(self.bound, other.bound),
            num_particles=_common(self.num_particles, other.num_particles),
            seed=_common(self.seed, other.seed),
            num_unreliable=max(self.num_unreliable, other.num_unreliable),
        )

    def __lt__(self, other: "Quantity") -> bool:
        if not isinstance(other, Quantity):
            return NotImplemented
        self._check_comparable(other)
        return self.value < other.value

    def __gt__(self, other: "Quantity") -> bool:
        if not isinstance(other, Quantity):
            return NotImplemented
        self._check_comparable(other)
        return self.value > other.value

    def to_bits_per_dimension(self, num_dimensions: int) -> "Quantity":
        r"""Converts nats per datum into bits per dimension of the datum.

        .. math:: b = \frac{v}{D \ln 2}

        The sign stays, so that higher is still better and a lower bound is still a lower bound;
        published "bits per dimension" are usually code lengths, minus this number.

        Args:
            num_dimensions: Dimensions D of one datum, such as its number of pixels; at least 1.

        Raises:
            ValueError: If the quantity is not in nats per datum, or `num_dimensions` is below 1.
        """
        if (self.unit, self.reduction) != ("nats", "per datum"):
            raise ValueError(
                f"{self.name} is in {self.unit}, {self.reduction}: only nats per datum convert "
                "to bits per dimension"
            )
        _check_dimensions(num_dimensions)
        factor = 1.0 / (num_dimensions * math.log(2.0))
        return self._scaled(factor, unit="bits per dimension", num_dimensions=num_dimensions)

    def to_nats(self, num_dimensions: int | None = None) -> "Quantity":
        r"""Converts bits per dimension back into nats per datum.

        Args:
            num_dimensions: Dimensions D of one datum; may be left out where the quantity knows
                them.

        Raises:
            ValueError: If the unit is not bits per dimension, or `num_dimensions` is unknown, below
                1, or another number than the one it was converted with.
        """
        if self.unit != "bits per dimension":
            raise ValueError(
                f"{self.name} is in {self.unit}; only bits per dimension convert to nats"
            )
        dimensions = self.num_dimensions if num_dimensions is None else num_dimensions
        if dimensions is None:
            raise ValueError(
                f"{self.name} does not say how many dimensions a datum has: pass num_dimensions"
            )
        if self.num_dimensions not in (None, dimensions):
            raise ValueError(
                f"{self.name} was converted with {self.num_dimensions} dimensions, not "
                f"{dimensions}: leave num_dimensions out"
            )
        _check_dimensions(dimensions)
        return self._scaled(dimensions * math.log(2.0), unit="nats", num_dimensions=None)

    def _scaled(self, factor: float, **changes: Any) -> "Quantity":
        def times(x: float | None) -> float | None:
            return None if x is None else x * factor

        return replace(
            self,
            value=self.value * factor,
            standard_error=times(self.standard_error),
            data_standard_error=times(self.data_standard_error),
            **changes,
        )


def difference_text(difference: Quantity) -> str:
    """A difference with its error over the data, and that of the draws alone beside it.

    Args:
        difference: From `paired_difference`.
    """
    paired, drawn = difference.data_standard_error, difference.standard_error
    error = drawn if paired is None else paired
    unit = difference.unit + (" per datum" if difference.reduction == "per datum" else "")
    text = number_text(difference.value, error)
    if error is None:
        return f"{text} {unit} (standard error unknown)"
    text += f" ± {error_text(error)} {unit}"
    count = difference.num_data
    if paired is None:
        data = "the one datum" if count == 1 else "these data"
        return f"{text} (standard error of the draws alone, for {data})"
    alone = "" if difference.data_error_reliable else " and more, for they are few or skewed"
    alone += "" if drawn is None else f"; that of the draws alone is {error_text(drawn)}"
    return f"{text} (standard error over the {count:,} data, paired{alone})"


def _check_dimensions(num_dimensions: int) -> None:
    if int(num_dimensions) != num_dimensions or num_dimensions < 1:
        raise ValueError(f"num_dimensions is {num_dimensions!r}, but must be a whole number from 1")


def _bound_of_difference(first: str, second: str) -> str:
    if "unbiased" in (first, second) and {first, second} <= {"unbiased", "exact"}:
        return "unbiased"
    exact = {"unbiased": "exact"}
    return _BOUND_OF_DIFFERENCE.get((exact.get(first, first), exact.get(second, second)), "none")


def _combined_error(a: Quantity, b: Quantity) -> float | None:
    errors = [
        0.0 if q.standard_error is None and q.bound == "exact" else q.standard_error for q in (a, b)
    ]
    if errors[0] is None or errors[1] is None or not math.isfinite(a.value - b.value):
        return None
    if a.standard_error is None and b.standard_error is None:
        return None
    return math.hypot(errors[0], errors[1])


def _common(a: Any, b: Any) -> Any:
    return a if a == b else None


def _short(value: Any) -> str:
    if value is None:
        return "unknown"
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text  # a hash
