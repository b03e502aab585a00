"""Labelled numbers: what every tool returns, and the rules that its numbers obey.

A number here says its unit, whether it is per datum or a total, what it bounds, how many particles
and which seed made it, how surely it is known, and what the data are (the probability of binary
pixels and the density of grey ones are different things). Numbers that differ in these are not
compared: `IncomparableError` says what differs.

Three names carry the conventions. A variable that has one value per datum has the dimension
``datum``. The Monte-Carlo standard error of the variable ``foo`` is the variable ``foo_se``.
`label` makes a variable's attributes.

A `Result` is an `xarray.Dataset`. Selecting from one (``sel``, ``isel``, ``result[["elbo"]]``,
``rename``) keeps the type and the labels. Computing with one (arithmetic, ``mean``, ``map``) gives
a plain dataset that makes no quantities, for a label belongs to the number that was measured: a
standard deviation of nats per datum is no longer a bound.
"""

import functools
import html
import importlib.metadata
import itertools
import json
import math
import os
import platform
import subprocess
import textwrap
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pyro_vae.files import atomic_path

__all__ = [
    "BOUNDS",
    "MEASURES",
    "REDUCTIONS",
    "UNITS",
    "IncomparableError",
    "Quantity",
    "Result",
    "label",
    "load_result",
    "make_result",
    "sha256_of",
]

UNITS = ("nats", "bits per dimension", "nats squared", "particles", "seconds", "bytes", "none")
"""Units of a labelled number; "none" is for pure numbers such as a k-hat."""

REDUCTIONS = ("per datum", "total", "none")
"""Whether a number is per datum or a total over them; "none" where data are not summed at all."""

BOUNDS = ("exact", "lower", "upper", "unbiased", "objective", "none")
"""What a number says about the quantity it is named after.

"objective" is what a procedure climbs and that bounds nothing (a MAP objective, a beta-ELBO);
"none" is a number that is neither (a k-hat, the difference of two lower bounds).
"""

MEASURES = ("binary", "grey", "real", "counts", "mixed")
"""What the data are, hence whether a likelihood is a probability or a density."""

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

_LABELS = ("unit", "reduction", "bound")
_MAX_STEPS = 12  # rows that a variable along one further dimension, as a history, takes in a table
_MAX_ROWS = 60  # the same along several
_END_ROWS = 2  # where there are more, so many from either end are shown
_WIDTH = 100


class IncomparableError(ValueError):
    """Raised when two quantities are compared whose labels say that they differ in kind."""


def _one_of(what: str, word: Any, words: Sequence[str]) -> str:
    if word not in words:
        listed = ", ".join(repr(w) for w in words)
        raise ValueError(f"{what} is {word!r}, but must be one of {listed}.")
    return str(word)


def label(
    *,
    unit: str = "nats",
    reduction: str = "per datum",
    bound: str,
    measure: str | None = None,
    num_particles: int | None = None,
    seed: int | None = None,
    description: str | None = None,
) -> dict[str, str | int]:
    """Makes the attributes of one variable of a `Result`.

    Args:
        unit: One of `UNITS`.
        reduction: One of `REDUCTIONS`.
        bound: One of `BOUNDS`.
        measure: One of `MEASURES`, or None for a number that is not about the likelihood of data.
        num_particles: Particles behind each value, at least 1; None where there are none.
        seed: The seed the values were drawn with, if it is not the seed of the whole result.
        description: One line for the reader.

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
    if measure is not None:
        attrs["measure"] = _one_of("measure", measure, MEASURES)
    if num_particles is not None:
        if (
            isinstance(num_particles, bool)
            or int(num_particles) != num_particles
            or num_particles < 1
        ):
            raise ValueError(
                f"num_particles is {num_particles!r}, but must be a whole number from 1."
            )
        attrs["num_particles"] = int(num_particles)
    if seed is not None:
        attrs["seed"] = int(seed)
    if description is not None:
        attrs["description"] = str(description)
    return attrs


@dataclass(frozen=True)
class Quantity:
    """One number with everything needed to know what it means.

    Comparison with ``<`` and ``>`` is of the values alone; whether a difference is more than noise
    is for the standard error of `difference` to say.

    Attributes:
        name: What it is, such as ``log_evidence``.
        value: The number; for per-datum variables the mean over the data. Never nan; may be
            infinite.
        standard_error: Monte-Carlo error of `value` for **these** data, taking the errors of
            different data as independent; None if unknown.
        data_standard_error: Standard error of `value` as an estimate for the population the data
            were drawn from, sd / sqrt(number of data); None if unknown.
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

    def __str__(self) -> str:
        text = f"{self.name.replace('_', ' ')} = {_number(self.value, self.standard_error)}"
        if self.standard_error is not None:
            text += f" +- {_error(self.standard_error)}"
        if self.unit != "none":
            text += f" {self.unit}"
        if self.unit in ("nats", "nats squared"):
            text += {"per datum": " per datum", "total": " in total", "none": ""}[self.reduction]
        details = list(self._details())
        return f"{text} ({', '.join(details)})" if details else text

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
        if self.num_particles is not None:
            yield f"{self.num_particles} particle{'s' * (self.num_particles != 1)}"
        if self.num_data is not None:
            mean = "" if self.reduction == "total" else "mean over "
            yield "1 datum" if self.num_data == 1 else f"{mean}{self.num_data} data"
        if self.data_standard_error is not None:
            yield f"their spread alone gives +- {_error(self.data_standard_error)}"
        if self.measure is not None:
            yield _MEASURE_TEXT[self.measure]
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
                f"What to do: {advice}."
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
            not tell how the data pair up: subtract the per-datum variables for that.

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
                "undefined: look at the data for which they are infinite."
            )
        return replace(
            self,
            name=f"{self.name} - {other.name}",
            value=value,
            standard_error=_combined_error(self, other),
            data_standard_error=None,
            bound=_bound_of_difference(self.bound, other.bound),
            num_particles=_common(self.num_particles, other.num_particles),
            seed=_common(self.seed, other.seed),
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
                "to bits per dimension."
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
                f"{self.name} is in {self.unit}; only bits per dimension convert to nats."
            )
        dimensions = self.num_dimensions if num_dimensions is None else num_dimensions
        if dimensions is None:
            raise ValueError(
                f"{self.name} does not say how many dimensions a datum has: pass num_dimensions."
            )
        if self.num_dimensions not in (None, dimensions):
            raise ValueError(
                f"{self.name} was converted with {self.num_dimensions} dimensions, not "
                f"{dimensions}: leave num_dimensions out."
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


def _check_dimensions(num_dimensions: int) -> None:
    if int(num_dimensions) != num_dimensions or num_dimensions < 1:
        raise ValueError(
            f"num_dimensions is {num_dimensions!r}, but must be a whole number from 1."
        )


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


def _number(value: float, error: float | None = None) -> str:
    """Formats a value to the second digit of its standard error, or to six digits without one."""
    if not math.isfinite(value):
        return str(value)
    if error is None or not math.isfinite(error) or error <= 0.0:
        return f"{value:.6g}"
    decimals = 1 - math.floor(math.log10(error))
    if decimals > 10 or abs(value) >= 1e9:
        return f"{value:.6g}"
    return f"{value:.{max(decimals, 0)}f}"


def _error(error: float) -> str:
    if not math.isfinite(error) or not 1e-9 < error < 1e9:
        return f"{error:.2g}"
    return f"{error:.{max(1 - math.floor(math.log10(error)), 0)}f}"


def _unlabelled(computed: xr.Dataset, keep_attrs: bool | None = None) -> xr.Dataset:
    """A plain dataset of the same numbers, without the labels that are no longer true of them."""
    if not isinstance(computed, xr.Dataset):  # an operator may return NotImplemented
        return computed
    plain = xr.Dataset(computed.data_vars, computed.coords, computed.attrs)
    return plain if keep_attrs else plain.drop_attrs()


class Result(xr.Dataset):
    """What every tool returns: an `xarray.Dataset` of labelled variables with their provenance.

    Build one with `make_result`, read one with `load_result`. Selection keeps the type and the
    labels; computation gives a plain `xarray.Dataset`, which has no `quantity` (see the module's
    docstring). Assigning to an array's values is not guarded, nor are a few methods that xarray
    builds from selections, such as ``shift``.
    """

    __slots__ = ()

    # xarray's operators all pass through these two; the in-place ones would overwrite what was
    # measured, and Python falls back to the plain operators when they decline.
    def _binary_op(self, *args: Any, **kwargs: Any) -> Any:
        return _unlabelled(super()._binary_op(*args, **kwargs))

    def _unary_op(self, *args: Any, **kwargs: Any) -> Any:
        return _unlabelled(super()._unary_op(*args, **kwargs))

    def _decline(self, other: Any) -> Any:
        return NotImplemented

    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ifloordiv__ = __imod__ = __ipow__ = _decline
    __iand__ = __ior__ = __ixor__ = __ilshift__ = __irshift__ = _decline

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        """As in xarray (``mean`` calls it), without labels unless ``keep_attrs=True``."""
        return _unlabelled(super().reduce(*args, **kwargs), kwargs.get("keep_attrs"))

    def map(self, *args: Any, **kwargs: Any) -> Any:
        """As in xarray, without labels unless ``keep_attrs=True``."""
        return _unlabelled(super().map(*args, **kwargs), kwargs.get("keep_attrs"))

    def quantile(self, *args: Any, **kwargs: Any) -> Any:
        """As in xarray, without labels unless ``keep_attrs=True``."""
        return _unlabelled(super().quantile(*args, **kwargs), kwargs.get("keep_attrs"))

    def diff(self, *args: Any, **kwargs: Any) -> Any:
        """As in xarray, without labels."""
        return _unlabelled(super().diff(*args, **kwargs))

    def interp(self, *args: Any, **kwargs: Any) -> Any:
        """As in xarray, without labels."""
        return _unlabelled(super().interp(*args, **kwargs))

    @property
    def provenance(self) -> dict[str, Any]:
        """Function, version, commit, seed, config, data hash and more; {} if unknown."""
        return json.loads(self.attrs.get("provenance", "{}"))

    def quantity(self, name: str) -> Quantity:
        r"""The one number a variable comes to: for per-datum variables the mean over the data.

        Two errors are carried, with s_n the standard error of datum n and sd the spread of the
        values:

        .. math:: \text{standard\_error} = \frac1N \sqrt{\sum_n s_n^2}, \qquad
                  \text{data\_standard\_error} = \frac{\mathrm{sd}}{\sqrt N}

        The first is the Monte-Carlo error for these data, the second says how the mean would move
        with other data.

        An infinite value makes an infinite mean, which is honest, and leaves both errors unknown. A
        nan makes no mean.

        Args:
            name: A labelled variable with no dimension but ``datum``; select along the others
                first.

        Raises:
            KeyError: If there is no such variable; lists those there are.
            ValueError: If it has no label or no data, if it has further dimensions, or if a value
                is nan (says for how many data) or infinities of both signs meet.
        """
        variable = self._labelled(name)
        others = [str(d) for d in variable.dims if d != "datum"]
        if others:
            raise ValueError(
                f"{name} varies over {' and '.join(others)}: select one value of each first, as in "
                f"result.sel({others[0]}=...).quantity({name!r})."
            )
        values = np.atleast_1d(variable.values.astype(np.float64))
        _check_has_mean(name, values)
        with np.errstate(over="ignore"):
            value = float(values.mean())
        return Quantity(
            name=name,
            value=value,
            standard_error=self._standard_error(name, value),
            data_standard_error=_spread_error(values, value),
            num_particles=self._num_particles(variable),
            num_data=self._num_data(variable),
            seed=variable.attrs.get("seed", self.provenance.get("seed")),
            data_sha256=self._data_sha256(variable),
            measure=variable.attrs.get("measure"),
            **{key: variable.attrs[key] for key in _LABELS},
        )

    def _labelled(self, name: str) -> xr.DataArray:
        if name not in self.data_vars:
            raise KeyError(
                f"there is no variable {name!r}; there are {', '.join(self._labelled_names())}."
            )
        variable = self[name]
        if not all(key in variable.attrs for key in _LABELS):
            raise ValueError(
                f"{name} has no label, so its meaning is unknown: make its attributes with label()."
            )
        return variable

    def _labelled_names(self) -> list[str]:
        return [
            str(name)
            for name, variable in self.data_vars.items()
            if not _is_error_of(name, self.data_vars) and all(k in variable.attrs for k in _LABELS)
        ]

    def _standard_error(self, name: str, value: float) -> float | None:
        if f"{name}_se" not in self.data_vars or not math.isfinite(value):
            return None
        errors = np.atleast_1d(self[f"{name}_se"].values.astype(np.float64))
        total = float(np.linalg.norm(errors)) / errors.size
        return None if math.isnan(total) else total

    def _num_particles(self, variable: xr.DataArray) -> int | None:
        if "num_particles" in variable.attrs:
            return int(variable.attrs["num_particles"])
        chosen = variable.coords.get("num_particles")
        return None if chosen is None or chosen.ndim else int(chosen)

    def _num_data(self, variable: xr.DataArray) -> int | None:
        if "datum" in variable.dims:
            return variable.sizes["datum"]
        return 1 if "datum" in variable.coords else self.provenance.get("num_data")

    def _data_sha256(self, variable: xr.DataArray) -> str | None:
        provenance = self.provenance
        whole = provenance.get("data_sha256")
        if "datum" in variable.coords:
            chosen = _sha256_of_index(variable.coords["datum"].values)
            if chosen != provenance.get("datum_sha256"):
                return sha256(f"{whole} {chosen}".encode()).hexdigest()
        elif "datum" in variable.dims:
            return None  # the coordinate was dropped, so which data these are is unknown
        return whole

    def _rows(self) -> Iterator[tuple[str, ...]]:
        """The cells of the table, row by row."""
        for name in self._labelled_names():
            part = self[[n for n in (name, f"{name}_se") if n in self.data_vars]]
            others = [d for d in self[name].dims if d != "datum"]
            places = list(itertools.product(*(range(self.sizes[d]) for d in others)))
            limit = _MAX_STEPS if len(others) == 1 else _MAX_ROWS
            left_out = len(places) - 2 * _END_ROWS if len(places) > limit else 0
            for number, place in enumerate(places):
                if left_out and _END_ROWS <= number < len(places) - _END_ROWS:
                    if number == _END_ROWS:
                        yield (f"  ... {left_out} more", "", "", "", "", "", "")
                    continue
                chosen = part.isel(dict(zip(others, place, strict=True)))
                where = ", ".join(_place(chosen, d, i) for d, i in zip(others, place, strict=True))
                yield _row(f"{name} ({where})" if where else name, name, chosen)

    def table(self) -> str:
        """Every labelled number as an aligned table, at most 100 columns wide up to 10^5 data.

        For per-datum variables the value is the mean over the data, and the standard error is the
        Monte-Carlo error of that mean for these data. A mean that a nan spoils says for how many
        data.
        """
        rows = [_HEADER, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        widths[0] = max(min(widths[0], _WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)), 6)
        lines = [_aligned(row, widths) for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(lines)

    def summary(self) -> str:
        """One sentence for each labelled number, and the notes."""
        lines = []
        for name in self._labelled_names():
            others = [str(d) for d in self[name].dims if d != "datum"]
            if others:
                lines.append(
                    f"{name.replace('_', ' ')} varies over {' and '.join(others)}: see table()."
                )
                continue
            try:
                lines.append(f"{self.quantity(name)}.")
            except ValueError as error:
                lines.append(str(error))
        return "\n".join(lines + [f"Note: {note}" for note in self._notes()])

    def _notes(self) -> list[str]:
        return list(self.provenance.get("notes", []))

    def __repr__(self) -> str:
        if not self._labelled_names():
            return super().__repr__()
        sizes = ", ".join(f"{name} {size}" for name, size in self.sizes.items()) or "none"
        notes = [textwrap.fill(f"note: {note}", _WIDTH) for note in self._notes()]
        return "\n".join([self.table(), f"dimensions: {sizes}", *notes])

    def _repr_html_(self) -> str:
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self._rows()
        )
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in _HEADER)
        notes = "".join(f"<li>{html.escape(str(note))}</li>" for note in self._notes())
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        return f"<div>{table}<ul>{notes}</ul></div>{super()._repr_html_()}"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the result to a NetCDF file, wholly or not at all.

        The file is written under a temporary name in the same folder, read back and compared,
        fsynced, and renamed. NetCDF is an export for other programs: runs are not restored from it.

        Args:
            path: Ends in ``.nc``; its folder exists. A file of that name is replaced.

        Returns:
            The path.

        Raises:
            ValueError: If the suffix is another one, or the file would not give back exactly what
                is written.
            TypeError: If an attribute is neither text, a bool nor a number.
            OSError: If the folder is missing, or the file system refuses; an older file is then
                left as it was.
        """
        target = Path(path)
        if target.suffix != ".nc":
            raise ValueError(
                f"a result is saved as NetCDF: name the file {target.stem or 'result'}.nc, not "
                f"{target.name or target}."
            )
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder: name a file in it.")
        target = Path(os.path.realpath(target))  # writes through a link instead of replacing it
        if not target.parent.is_dir():
            raise FileNotFoundError(f"the folder {target.parent} does not exist: make it first.")
        with atomic_path(target) as temporary:
            self._write(temporary)
        return Path(path)

    def _write(self, path: Path) -> None:
        disk = self.copy(deep=False).drop_encoding()
        disk.attrs = _to_disk(disk.attrs, "the result")
        for name, variable in disk.variables.items():
            variable.attrs = _to_disk(variable.attrs, str(name))
        try:
            disk.to_netcdf(path, engine="h5netcdf")
            same = _identical(_read(path), self)
        except OSError:
            raise
        except (
            Exception
        ) as error:  # xarray and h5netcdf raise many kinds for what NetCDF cannot hold
            raise ValueError(f"the result cannot be written as NetCDF: {error}") from error
        if not same:
            raise ValueError(
                "NetCDF would change the result: rename attributes that it gives a meaning (units, "
                "dtype, scale_factor, _FillValue, ...), and use only numbers, bools and text."
            )


def make_result(
    variables: Mapping[str, tuple[Any, Any, Mapping[str, Any]]],
    *,
    function: str,
    config: Mapping[str, Any],
    seed: int | None,
    data_sha256: str | None,
    coords: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Result:
    """Builds a `Result` from arrays, checks its labels, and records where it came from.

    Args:
        variables: Name -> (dims, array or tensor, attributes made by `label`). Values are copied.
            Every variable of floating point needs a label, except ``foo_se``, the standard error of
            ``foo``; bools, whole numbers and text may do without. Further attributes may be text,
            bools and numbers; those that are None are dropped.
        function: The function that made the numbers, such as ``log_evidence``.
        config: Its arguments, of JSON's types (tuples become lists, paths become text).
        seed: Its seed.
        data_sha256: Hash of the data, from `sha256_of`.
        coords: Coordinates as `xarray` takes them. The data are numbered from 0 if ``datum`` is not
            given.
        notes: Sentences that must not be parted from the numbers.

    Raises:
        ValueError: If a label is missing or wrong, a per-datum variable is called a total, or a
            standard error is negative, or belongs to no variable or to one of another shape.
        TypeError: If a value cannot be recorded; says which.
    """
    arrays = {
        name: (dims, _as_array(name, values), _plain_attrs(attrs, name))
        for name, (dims, values, attrs) in variables.items()
    }
    result = Result(arrays, {n: _as_coordinate(n, c) for n, c in (coords or {}).items()})
    if "datum" in result.sizes and "datum" not in result.coords:
        result = result.assign_coords(datum=np.arange(result.sizes["datum"]))
    for name in result.data_vars:
        _check_variable(result, str(name))
    if isinstance(notes, str):
        raise TypeError("notes is one string, but must be a sequence of sentences.")
    provenance = {
        "function": str(function),
        "seed": None if seed is None else int(seed),
        "config": _to_json(config, "config"),
        "data_sha256": data_sha256,
        "num_data": result.sizes.get("datum"),
        "datum_sha256": _sha256_of_index(result["datum"].values)
        if "datum" in result.coords
        else None,
        "notes": [str(note) for note in notes],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **_software(),
    }
    result.attrs["provenance"] = json.dumps(provenance)  # ASCII, so that every text survives NetCDF
    return result


def load_result(path: str | os.PathLike[str]) -> Result:
    """Reads a file that `Result.save` wrote, and gives back exactly what was written.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, is no NetCDF file, or was not written by `Result.save`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no file {path}: check the name, or run the analysis that writes it."
        )
    try:
        result = _read(path)
    except PermissionError:
        raise
    except Exception as error:  # a damaged file makes HDF5 raise almost anything
        raise ValueError(
            f"{path} is no NetCDF file or is damaged: make it again ({error})."
        ) from error
    try:
        provenance = result.provenance
        ours = isinstance(provenance, dict) and "function" in provenance
    except (TypeError, ValueError):
        ours = False
    if not ours:
        raise ValueError(
            f"{path} was not written by Result.save: open it with xarray.open_dataset instead."
        )
    return result


def sha256_of(*arrays: Any) -> str:
    """Hashes the dtype, the shape and the bytes of arrays or tensors, in order.

    A tensor and a numpy array of the same dtype, shape and values have the same hash, on every
    device and machine.

    Raises:
        ValueError: If there is nothing to hash.
        TypeError: If an array holds Python objects.
    """
    if not arrays:
        raise ValueError("sha256_of needs at least one array.")
    digest = sha256()
    for array in arrays:
        dtype, shape, content = _contents(array)
        digest.update(json.dumps([dtype, shape]).encode())
        digest.update(content)
    return digest.hexdigest()


def _contents(array: Any) -> tuple[str, list[int], memoryview]:
    if hasattr(array, "detach"):
        import torch

        tensor = array.detach().cpu().resolve_conj().resolve_neg().contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy()  # also takes types that numpy lacks
        return str(tensor.dtype).removeprefix("torch."), list(tensor.shape), raw.data
    values = np.asarray(array)
    if values.dtype.hasobject:
        raise TypeError(
            "an array of Python objects has no bytes to hash: make it numeric or text first."
        )
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    raw = np.ascontiguousarray(little).reshape(-1).view(np.uint8)
    return values.dtype.name, list(values.shape), raw.data


def _sha256_of_index(values: np.ndarray) -> str:
    """Hash of which data these are, in any order."""
    return sha256_of(np.sort(_without_objects(np.atleast_1d(values))))


def _without_objects(values: np.ndarray) -> np.ndarray:
    return np.array([str(v) for v in values.tolist()]) if values.dtype.kind in "OTU" else values


def _as_array(name: str, values: Any) -> np.ndarray:
    """A copy in numpy; text in its shortest type, which is what NetCDF gives back."""
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, and NetCDF drops the mask: fill it with nan first."
        )
    array = np.array(values.detach().cpu().numpy() if hasattr(values, "detach") else values)
    if array.dtype.kind in "OTU":
        if not all(isinstance(value, str) for value in array.flat):
            raise TypeError(f"{name} holds Python objects: make it numeric, or text throughout.")
        return array.astype(str) if array.dtype.kind != "U" else np.array(array.tolist(), dtype=str)
    return array


def _as_coordinate(name: Hashable, given: Any) -> Any:
    if isinstance(given, tuple):
        dims, values, *rest = given
        return (dims, _as_array(str(name), values), *(_plain_attrs(a, str(name)) for a in rest))
    return given if isinstance(given, xr.DataArray) else _as_array(str(name), given)


def _plain_attrs(attrs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Attributes in Python's own types, without those that are None."""
    plain = {
        k: v.item() if isinstance(v, np.generic) else v for k, v in attrs.items() if v is not None
    }
    _to_disk(plain, where)
    return plain


def _to_disk(attrs: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """NetCDF has no bools, so they are written as the only 8-bit numbers; see `_from_disk`."""
    return {
        str(key): _value_to_disk(value, f"attribute {key!r} of {where}")
        for key, value in attrs.items()
    }


def _value_to_disk(value: Any, where: str) -> Any:
    if isinstance(value, bool):
        return np.int8(value)
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return np.int64(value) if value < 2**63 else np.uint64(value)
    if isinstance(value, float):
        return np.float64(value)
    if isinstance(value, str):
        return value
    raise TypeError(
        f"{where} is {value!r}, but must be text, a bool or a number of at most 64 bits; "
        "what belongs to the whole result goes into config."
    )


def _from_disk(value: Any) -> Any:
    if isinstance(value, np.int8):
        return bool(value)
    return value.item() if isinstance(value, np.generic) else value


def _read(path: str | os.PathLike[str]) -> Result:
    with xr.open_dataset(path, engine="h5netcdf") as lazy:
        data = lazy.load().drop_encoding()
    result = Result(data.data_vars, data.coords, data.attrs)
    result.attrs = {key: _from_disk(value) for key, value in result.attrs.items()}
    for variable in result.variables.values():
        variable.attrs = {key: _from_disk(value) for key, value in variable.attrs.items()}
    return result


def _identical(a: xr.Dataset, b: xr.Dataset) -> bool:
    """Whether values, dims, attributes and all types agree (however wide a type of text is)."""

    def kinds(dataset: xr.Dataset) -> list[Any]:
        return [
            (
                n,
                str(v.dtype) if v.dtype.kind != "U" else "text",
                {k: type(x) for k, x in v.attrs.items()},
            )
            for n, v in sorted(dataset.variables.items(), key=lambda item: str(item[0]))
        ]

    same_attrs = {k: type(v) for k, v in a.attrs.items()} == {
        k: type(v) for k, v in b.attrs.items()
    }
    return same_attrs and a.identical(b) and kinds(a) == kinds(b)


def _check_variable(result: Result, name: str) -> None:
    variable = result[name]
    if name.endswith("_se"):
        _check_standard_error(result, name)
        if not any(key in variable.attrs for key in _LABELS):
            return
    present = [key for key in _LABELS if key in variable.attrs]
    if not present and variable.dtype.kind not in "fc":
        return
    if len(present) < len(_LABELS):
        raise ValueError(
            f"{name} has no label: give it attributes made by label(unit=..., bound=...)."
        )
    if variable.dtype.kind not in "fiub":
        raise ValueError(f"{name} is labelled as a number, but holds {variable.dtype}.")
    known = ("unit", "reduction", "bound", "measure", "num_particles", "seed", "description")
    label(**{key: variable.attrs[key] for key in known if key in variable.attrs})
    if "datum" in variable.dims and variable.attrs["reduction"] == "total":
        raise ValueError(
            f"{name} has one value per datum, so its reduction is 'per datum', not 'total'."
        )


def _check_standard_error(result: Result, name: str) -> None:
    owner = name.removesuffix("_se")
    if owner not in result.data_vars:
        raise ValueError(
            f"{name} is the standard error of {owner}, which is missing: add it or rename {name}."
        )
    if result[name].dims != result[owner].dims:
        raise ValueError(
            f"{name} has dims {result[name].dims}, but {owner} has {result[owner].dims}."
        )
    if result[name].dtype.kind not in "fiu" or bool((result[name].values < 0).any()):
        raise ValueError(
            f"{name} is a standard error, so it cannot be negative or anything but numbers."
        )


def _is_error_of(name: Hashable, names: Mapping[Hashable, Any]) -> bool:
    return str(name).endswith("_se") and str(name).removesuffix("_se") in names


def _check_has_mean(name: str, values: np.ndarray) -> None:
    if values.size == 0:
        raise ValueError(f"{name} has no data to take a mean over.")
    bad = int(np.isnan(values).sum())
    if bad:
        raise ValueError(
            f"{name} is {_nan_text(bad, values.size)}, so its mean is undefined: look at those "
            "data, or leave them out with result.isel(datum=...) and say so."
        )
    if np.isposinf(values).any() and np.isneginf(values).any():
        raise ValueError(
            f"{name} is inf for some data and -inf for others, so its mean is undefined."
        )


def _nan_text(bad: int, size: int) -> str:
    return f"nan ({bad} of {size} data)" if size > 1 else "nan"


def _spread_error(values: np.ndarray, mean: float) -> float | None:
    if values.size < 2 or not math.isfinite(mean):
        return None
    with np.errstate(over="ignore"):
        return float(values.std(ddof=1)) / math.sqrt(values.size)


_HEADER = ("quantity", "value", "std. error", "unit", "kind", "particles", "data")


def _row(title: str, name: str, chosen: Result) -> tuple[str, ...]:
    attrs = chosen[name].attrs
    unit = {"bits per dimension": "bits/dim", "nats squared": "nats^2", "none": "-"}.get(
        attrs["unit"], attrs["unit"]
    )
    if attrs["unit"] in ("nats", "nats squared") and attrs["reduction"] != "none":
        unit += "/datum" if attrs["reduction"] == "per datum" else " total"
    kind = {"lower": "lower bound", "upper": "upper bound", "none": "-"}.get(
        attrs["bound"], attrs["bound"]
    )
    values = np.atleast_1d(chosen[name].values.astype(np.float64))
    num_data = chosen._num_data(chosen[name])
    particles = chosen._num_particles(chosen[name])
    try:
        _check_has_mean(name, values)
    except ValueError:
        bad = int(np.isnan(values).sum())
        value, error = (
            (_nan_text(bad, values.size) if bad else "nan (inf - inf)")
            if values.size
            else "no data",
            None,
        )
    else:
        with np.errstate(over="ignore"):
            mean = float(values.mean())
        error = chosen._standard_error(name, mean)
        value = _number(mean, error)
        infinite = int(np.isinf(values).sum())
        if infinite and values.size > 1:
            value += f" ({infinite} of {values.size} data)"
    return (
        title,
        value,
        "-" if error is None else _error(error),
        unit,
        kind,
        "-" if particles is None else str(particles),
        " ".join(str(x) for x in (num_data, attrs.get("measure")) if x is not None) or "-",
    )


def _place(chosen: Result, dim: Hashable, index: int) -> str:
    if dim not in chosen.coords:
        return f"{dim} {index}"
    value = chosen.coords[dim].values[()]
    return f"{value:.6g}" if isinstance(value, np.floating) else str(value)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """Numbers to the right, words to the left."""
    cells = [_shortened(row[0], widths[0]).ljust(widths[0])]
    for i, (cell, width) in enumerate(zip(row[1:], widths[1:], strict=True), start=1):
        cells.append(
            cell.rjust(width)
            if _HEADER[i] in ("value", "std. error", "particles")
            else cell.ljust(width)
        )
    return "  ".join(cells).rstrip()


def _shortened(text: str, width: int) -> str:
    """Leaves out the middle, since names differ at either end."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def _to_json(value: Any, where: str) -> Any:
    """The value in JSON's types, or an error that names the entry that has none."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(
                f"{where} has a key that is not text, which JSON would change: use text keys."
            )
        return {key: _to_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(
        f"{where} is of type {type(value).__name__}, which cannot be recorded: give its name or "
        "its numbers instead."
    )


def _software() -> dict[str, Any]:
    import torch

    commit, dirty = _git_state()
    return {
        "version": _version("pyro-vae"),
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": _version("pyro-ppl"),
        "num_threads": torch.get_num_threads(),
    }


@functools.cache
def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _git_state() -> tuple[str | None, bool | None]:
    """The commit the package runs from and whether its code differs; None, None if no checkout."""
    package = Path(__file__).resolve().parent
    if not (package.parent / ".git").exists():
        return None, None
    # A hook's GIT_DIR would point git elsewhere, and the optional locks would get in the way of a
    # commit.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = [
        "git",
        "--no-optional-locks",
        "status",
        "--porcelain=v2",
        "--branch",
        "--",
        package.name,
    ]
    try:
        answer = subprocess.run(
            command,
            cwd=package.parent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
    lines = answer.stdout.splitlines()
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid")), None)
    if commit is None or commit == "(initial)":
        return None, None
    return commit, any(not line.startswith("#") for line in lines)
