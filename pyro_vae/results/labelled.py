"""Reading labelled variables: which there are, how surely they are known, what they are about."""

import json
import math
from collections.abc import Hashable, Mapping
from hashlib import sha256
from typing import Any

import numpy as np
import xarray as xr

from pyro_vae.intervals import enough_for_a_mean, mean_factor
from pyro_vae.results.labels import LABELS
from pyro_vae.results.provenance import sha256_of_index

__all__ = [
    "check_has_mean",
    "count_nan",
    "data_sha256",
    "label_at",
    "labelled_names",
    "labelled_variable",
    "nan_text",
    "num_data",
    "num_particles",
    "num_unreliable",
    "provenance",
    "spread_error",
    "spread_reliable",
    "standard_error",
]


def provenance(dataset: xr.Dataset) -> dict[str, Any]:
    """Function, version, commit, seed, config, data hash and more; {} if unknown."""
    return json.loads(dataset.attrs.get("provenance", "{}"))


def labelled_variable(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """The variable, if there is one of this name and it has a label."""
    if name not in dataset.data_vars:
        raise KeyError(
            f"there is no variable {name!r}; there are {', '.join(labelled_names(dataset))}"
        )
    variable = dataset[name]
    if not all(key in variable.attrs for key in LABELS):
        raise ValueError(
            f"{name} has no label, so its meaning is unknown: make its attributes with label()"
        )
    return variable


def labelled_names(dataset: xr.Dataset) -> list[str]:
    """The variables that have a label, without standard errors and biases."""
    return [
        str(name)
        for name, variable in dataset.data_vars.items()
        if not _is_error_of(name, dataset.data_vars) and all(k in variable.attrs for k in LABELS)
    ]


def label_at(variable: xr.DataArray, key: str) -> str | None:
    """A label of one place: that of the coordinate which `<key>_by` names, if it has one there.

    So values along a dimension may be of several kinds, and each keeps its own when it is selected.
    """
    chosen = variable.coords.get(variable.attrs.get(f"{key}_by"))
    if chosen is not None and not chosen.ndim:
        return str(chosen.values[()])
    return variable.attrs.get(key)


def standard_error(dataset: xr.Dataset, name: str, value: float) -> float | None:
    """Monte-Carlo error of the mean of a variable over the data; None if unknown.

    Noise averages out over the data, bias does not.
    """
    if f"{name}_se" not in dataset.data_vars or not math.isfinite(value):
        return None
    errors = np.atleast_1d(dataset[f"{name}_se"].values.astype(np.float64))
    if f"{name}_bias" not in dataset.data_vars:
        total = float(np.linalg.norm(errors)) / errors.size
    else:
        bias = np.atleast_1d(dataset[f"{name}_bias"].values.astype(np.float64))
        noise = float(np.maximum(errors**2 - bias**2, 0.0).sum()) ** 0.5 / errors.size
        total = math.hypot(noise, float(bias.mean()))
    return None if math.isnan(total) else total


def num_unreliable(dataset: xr.Dataset, name: str) -> int:
    """For how many values the standard error is not to be relied upon.

    The attribute `reliable_by` of a variable names the variable that says so.
    """
    by = dataset[name].attrs.get("reliable_by")
    return 0 if by not in dataset.data_vars else int((~dataset[by].values.astype(bool)).sum())


def num_particles(variable: xr.DataArray) -> int | None:
    """Particles behind each value, or None."""
    if "num_particles" in variable.attrs:
        return int(variable.attrs["num_particles"])
    chosen = variable.coords.get("num_particles")
    return None if chosen is None or chosen.ndim else int(chosen)


def num_data(dataset: xr.Dataset, variable: xr.DataArray) -> int | None:
    """How many data a variable is about, or None if unknown."""
    if "datum" in variable.dims:
        return variable.sizes["datum"]
    if variable.attrs.get("reduction") == "none":
        return None
    return 1 if "datum" in variable.coords else provenance(dataset).get("num_data")


def data_sha256(dataset: xr.Dataset, variable: xr.DataArray) -> str | None:
    """Hash of the data that a variable is about; a selection has a hash of its own."""
    known = provenance(dataset)
    whole = known.get("data_sha256")
    if "datum" in variable.coords:
        chosen = sha256_of_index(variable.coords["datum"].values)
        if chosen != known.get("datum_sha256"):
            return sha256(f"{whole} {chosen}".encode()).hexdigest()
    elif "datum" in variable.dims:
        return None  # the coordinate was dropped, so which data these are is unknown
    return whole


def _is_error_of(name: Hashable, names: Mapping[Hashable, Any]) -> bool:
    owner, _, kind = str(name).rpartition("_")
    return kind in ("se", "bias") and owner in names


def check_has_mean(name: str, values: np.ndarray) -> None:
    """Raises a ValueError that says why there is no mean, where there is none."""
    if values.size == 0:
        raise ValueError(f"{name} has no data to take a mean over")
    bad = count_nan(values)
    if bad:
        raise ValueError(
            f"{name} is {nan_text(bad, values.size)}, so its mean is undefined: look at those "
            "data, or leave them out with result.isel(datum=...) and say so"
        )
    if np.isposinf(values).any() and np.isneginf(values).any():
        raise ValueError(
            f"{name} is inf for some data and -inf for others, so its mean is undefined"
        )


def count_nan(values: np.ndarray) -> int:
    """How many values are unknown."""
    return int(np.isnan(values.astype(np.float64)).sum())


def nan_text(bad: int, size: int) -> str:
    """How many values are nan."""
    return f"nan ({bad} of {size} data)" if size > 1 else "nan"


def spread_error(values: np.ndarray, mean: float) -> float | None:
    """Error of the mean over the population the data were drawn from; see `Result.quantity`."""
    if values.size < 2 or not math.isfinite(mean):
        return None
    with np.errstate(over="ignore"):
        return float(values.std(ddof=1)) / math.sqrt(values.size) * mean_factor(values)


def spread_reliable(values: np.ndarray, mean: float) -> bool:
    """Whether `spread_error` is to be relied upon: enough data for how skewed they are."""
    return values.size < 2 or not math.isfinite(mean) or enough_for_a_mean(values)
