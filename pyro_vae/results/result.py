"""The type of a result: an `xarray.Dataset` whose labels hold as long as its numbers do."""

import html
import math
import os
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pyro_vae.results import labelled
from pyro_vae.results.disk import read_dataset, save_dataset
from pyro_vae.results.labels import LABELS
from pyro_vae.results.quantity import Quantity
from pyro_vae.results.table import WIDTH, hidden_rows, table_html, table_text

__all__ = ["Result", "load_result", "paired_difference"]


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
        return labelled.provenance(self)

    def quantity(self, name: str) -> Quantity:
        r"""The one number a variable comes to: for per-datum variables the mean over the data.

        Two errors are carried, with s_n the standard error of datum n, b_n the part of it that is
        bias (0 where there is no variable ``..._bias``) and sd the spread of the values:

        .. math:: \text{standard\_error} = \frac1N \sqrt{\sum_n (s_n^2 - b_n^2)
                  + \Bigl(\sum_n b_n\Bigr)^2}, \qquad
                  \text{data\_standard\_error} = c \, \frac{\mathrm{sd}}{\sqrt N}

        The first is the Monte-Carlo error for these data, the second says how the mean would move
        with other data. There c widens for few and for skewed values (see
        `intervals.mean_factor`): 1.2 for 8 normal ones, 1.01 for 100. Means of 60 ELBOs as skewed
        as minus a chi-square with one degree of freedom then hold 94 %, of 8 such 89 %;
        `data_error_reliable` is False there.

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
        variable = labelled.labelled_variable(self, name)
        others = [str(d) for d in variable.dims if d != "datum"]
        if others:
            raise ValueError(
                f"{name} varies over {' and '.join(others)}: select one value of each first, as in "
                f"result.sel({others[0]}=...).quantity({name!r})"
            )
        values = np.atleast_1d(variable.values.astype(np.float64))
        labelled.check_has_mean(name, values)
        with np.errstate(over="ignore"):
            value = float(values.mean())
        bound = str(labelled.label_at(variable, "bound"))
        return Quantity(
            name=name,
            value=value,
            standard_error=labelled.standard_error(self, name, value),
            data_standard_error=labelled.spread_error(values, value),
            data_error_reliable=labelled.spread_reliable(values, value),
            num_particles=labelled.num_particles(variable),
            num_data=labelled.num_data(self, variable),
            seed=variable.attrs.get("seed", self.provenance.get("seed")),
            data_sha256=labelled.data_sha256(self, variable),
            measure=variable.attrs.get("measure"),
            num_unreliable=labelled.num_unreliable(self, name),
            objective=labelled.label_at(variable, "objective") if bound == "objective" else None,
            bound=bound,
            **{key: variable.attrs[key] for key in LABELS if key != "bound"},
        )

    def table(self) -> str:
        """Every labelled number as an aligned table, at most 100 columns wide up to 10^5 data.

        For per-datum variables the value is the mean over the data, and the standard error is the
        Monte-Carlo error of that mean for these data, with a question mark where that of some datum
        is not to be relied upon. A mean that a nan spoils says for how many data.
        """
        return table_text(self)

    def summary(self) -> str:
        """The verdict, if there is one; a sentence for each labelled number; the notes."""
        lines, several, unknown = [], [], []
        for name in labelled.labelled_names(self):
            others = [str(d) for d in self[name].dims if d != "datum"]
            if others:
                several.append(f"{name.replace('_', ' ')} ({', '.join(others)})")
                continue
            if missing := labelled.count_nan(self[name].values):
                counted = f" ({missing} of {self[name].size})" if self[name].ndim else ""
                unknown.append(f"{name.replace('_', ' ')}{counted}")
                continue
            try:
                lines.append(f"{self.quantity(name)}.")
            except ValueError as error:
                lines.append(str(error))
        if unknown:
            lines.append(f"Unknown (nan), so without a mean: {'; '.join(unknown)}.")
        if several:
            lines.append(f"In table(), several numbers each: {'; '.join(several)}.")
        return "\n".join(self._verdict() + lines + [f"Note: {note}" for note in self._notes()])

    def numbers(self) -> dict[str, Any]:
        """What the table shows as plain values, for JSON; what is not finite is None.

        Returns:
            `function`, `seed`, `verdict` and `notes`; and `quantities`: of each number the fields
            of `Quantity` that are known, of one over further dimensions their `coords` and all
            `values`, averaged over the data.
        """
        told = self.provenance
        quantities = {name: self._plain(name) for name in labelled.labelled_names(self)}
        about = {key: told.get(key) for key in ("function", "seed")}
        return {
            **about,
            "verdict": self._verdict(),
            "notes": self._notes(),
            "quantities": _finite(quantities),
        }

    def _plain(self, name: str) -> dict[str, Any]:
        others = [str(d) for d in self[name].dims if d != "datum"]
        if not others:
            try:
                known = vars(self.quantity(name))
            except ValueError as error:
                return {"value": None, "why": str(error)}
            return {key: value for key, value in known.items() if value is not None}
        mean = xr.DataArray(self[name]).mean("datum") if "datum" in self[name].dims else self[name]
        coords = {d: mean[d].values.tolist() for d in others if d in mean.coords}
        return {"dims": others, "coords": coords, "values": mean.values.tolist()}

    def _verdict(self) -> list[str]:
        return [text[:1].upper() + text[1:] for text in self.provenance.get("verdict", [])]

    def _notes(self) -> list[str]:
        return list(self.provenance.get("notes", []))

    def __repr__(self) -> str:
        if not labelled.labelled_names(self):
            return super().__repr__()
        sizes = ", ".join(f"{name} {size}" for name, size in self.sizes.items()) or "none"
        notes = [textwrap.fill(f"note: {note}", WIDTH) for note in self._notes()]
        verdict = [textwrap.fill(text, WIDTH) for text in self._verdict()]
        table = table_text(self, brief=True)
        rest = f"; all {rows:,} rows in table()" if (rows := hidden_rows(self)) else ""
        return "\n".join([*verdict, table, f"dimensions: {sizes}{rest}", *notes])

    def _repr_html_(self) -> str:
        notes = "".join(f"<li>{html.escape(str(note))}</li>" for note in self._notes())
        verdict = "".join(f"<p>{html.escape(text)}</p>" for text in self._verdict())
        table = table_html(self, brief=True)
        return f"<div>{verdict}{table}<ul>{notes}</ul></div>{super()._repr_html_()}"

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
        return save_dataset(self, path)


def _finite(value: Any) -> Any:
    """The same with None for every nan and infinity."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def paired_difference(first: Result, second: Result, name: str) -> Quantity:
    r"""The mean difference of a variable between two results of the same data, paired over them.

    .. math:: \bar d = \frac1N \sum_n (a_n - b_n), \qquad
              \text{data\_standard\_error} = c \, \mathrm{sd}(a_n - b_n) / \sqrt N

    The second says how the difference would move with other data, with c as in `Result.quantity`;
    the draws behind the values are in it, another training of either model is not.

    Args:
        first: What is measured against `second`.
        second: Of the same data in the same order.
        name: A labelled variable with the dimension ``datum`` alone.

    Returns:
        The difference, with both errors; its `standard_error`, that of the draws alone, takes the
        draws of the two as independent.

    Raises:
        IncomparableError: If the two differ in unit, measure or data.
        ValueError: If the variable has no value for each datum.
    """
    difference = first.quantity(name).difference(second.quantity(name))
    values = [result[name].values.astype(np.float64) for result in (first, second)]
    if first[name].dims != ("datum",):
        raise ValueError(f"{name} has no value for each datum to pair: compare its quantities")
    apart = values[0] - values[1]
    return replace(
        difference,
        data_standard_error=labelled.spread_error(apart, difference.value),
        data_error_reliable=labelled.spread_reliable(apart, difference.value),
    )


def load_result(path: str | os.PathLike[str]) -> Result:
    """Reads a file that `Result.save` wrote, and gives back exactly what was written.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, is no NetCDF file, or was not written by `Result.save`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no file {path}: check the name, or run the analysis that writes it"
        )
    dataset = read_dataset(path)
    try:
        provenance = labelled.provenance(dataset)
        ours = isinstance(provenance, dict) and "function" in provenance
    except (TypeError, ValueError):
        ours = False
    if not ours:
        raise ValueError(
            f"{path} was not written by Result.save: open it with xarray.open_dataset instead"
        )
    return Result(dataset.data_vars, dataset.coords, dataset.attrs)
