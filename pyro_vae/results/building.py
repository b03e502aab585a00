"""Results out of arrays: every label checked, every value copied."""

import json
from collections.abc import Hashable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import xarray as xr

from pyro_vae.results.disk import plain_attrs
from pyro_vae.results.labels import LABELS, label
from pyro_vae.results.provenance import sha256_of_index, software, to_json
from pyro_vae.results.result import Result

__all__ = ["make_result"]


def make_result(
    variables: Mapping[str, tuple[Any, Any, Mapping[str, Any]]],
    *,
    function: str,
    config: Mapping[str, Any],
    seed: int | None,
    data_sha256: str | None,
    coords: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    verdict: Sequence[str] = (),
) -> Result:
    """Builds a `Result` from arrays, checks its labels, and records where it came from.

    Args:
        variables: Name -> (dims, array or tensor, attributes made by `label`). Values are copied.
            Every variable of floating point needs a label, except ``foo_se`` and ``foo_bias``, the
            standard error and the estimated bias of ``foo``; bools, whole numbers and text may do
            without. Further attributes may be text, bools and numbers; None is dropped.
        function: The function that made the numbers, such as ``log_evidence``.
        config: Its arguments, of JSON's types (tuples become lists, paths become text).
        seed: Its seed.
        data_sha256: Hash of the data, from `sha256_of`.
        coords: Coordinates as `xarray` takes them. The data are numbered from 0 if ``datum`` is not
            given.
        notes: Sentences that must not be parted from the numbers.
        verdict: Sentences that answer the question before any number does; they are shown first.

    Raises:
        ValueError: If a label is missing or wrong, a per-datum variable is called a total, or a
            standard error is negative, or belongs to no variable or to one of another shape.
        TypeError: If a value cannot be recorded; says which.
    """
    arrays = {
        name: (dims, _as_array(name, values), plain_attrs(attrs, name))
        for name, (dims, values, attrs) in variables.items()
    }
    result = Result(arrays, {n: _as_coordinate(n, c) for n, c in (coords or {}).items()})
    if "datum" in result.sizes and "datum" not in result.coords:
        result = result.assign_coords(datum=np.arange(result.sizes["datum"]))
    for name in result.data_vars:
        _check_variable(result, str(name))
    for what, sentences in (("notes", notes), ("verdict", verdict)):
        if isinstance(sentences, str):
            raise TypeError(f"{what} is one string, but must be a sequence of sentences")
    provenance = {
        "function": str(function),
        "seed": None if seed is None else int(seed),
        "config": to_json(config, "config"),
        "data_sha256": data_sha256,
        "num_data": result.sizes.get("datum"),
        "datum_sha256": sha256_of_index(result["datum"].values)
        if "datum" in result.coords
        else None,
        "notes": [str(note) for note in notes],
        **({"verdict": [str(sentence) for sentence in verdict]} if verdict else {}),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **software(),
    }
    result.attrs["provenance"] = json.dumps(provenance)  # ASCII, so that every text survives NetCDF
    return result


def _as_array(name: str, values: Any) -> np.ndarray:
    """A copy in numpy; text in its shortest type, which is what NetCDF gives back."""
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, and NetCDF drops the mask: fill it with nan first"
        )
    array = np.array(values.detach().cpu().numpy() if hasattr(values, "detach") else values)
    if array.dtype.kind in "OTU":
        if not all(isinstance(value, str) for value in array.flat):
            raise TypeError(f"{name} holds Python objects: make it numeric, or text throughout")
        return array.astype(str) if array.dtype.kind != "U" else np.array(array.tolist(), dtype=str)
    return array


def _as_coordinate(name: Hashable, given: Any) -> Any:
    if isinstance(given, tuple):
        dims, values, *rest = given
        return (dims, _as_array(str(name), values), *(plain_attrs(a, str(name)) for a in rest))
    return given if isinstance(given, xr.DataArray) else _as_array(str(name), given)


def _check_variable(result: Result, name: str) -> None:
    variable = result[name]
    if name.endswith(("_se", "_bias")):
        _check_error(result, name)
        if not any(key in variable.attrs for key in LABELS):
            return
    present = [key for key in LABELS if key in variable.attrs]
    if not present and variable.dtype.kind not in "fc":
        return
    if len(present) < len(LABELS):
        raise ValueError(
            f"{name} has no label: give it attributes made by label(unit=..., bound=...)"
        )
    if variable.dtype.kind not in "fiub":
        raise ValueError(f"{name} is labelled as a number, but holds {variable.dtype}")
    known = ("unit", "reduction", "bound", "measure", "num_particles", "seed", "description")
    label(**{key: variable.attrs[key] for key in known if key in variable.attrs})
    if "datum" in variable.dims and variable.attrs["reduction"] == "total":
        raise ValueError(
            f"{name} has one value per datum, so its reduction is 'per datum', not 'total'"
        )


def _check_error(result: Result, name: str) -> None:
    owner, _, kind = name.rpartition("_")
    said = {"se": "standard error", "bias": "bias"}[kind]
    if owner not in result.data_vars:
        raise ValueError(
            f"{name} is the {said} of {owner}, which is missing: add it or rename {name}"
        )
    if result[name].dims != result[owner].dims:
        raise ValueError(
            f"{name} has dims {result[name].dims}, but {owner} has {result[owner].dims}"
        )
    if result[name].dtype.kind not in "fiu":
        raise ValueError(f"{name} is a {said}, so it cannot be anything but numbers")
    if kind == "se" and bool((result[name].values < 0).any()):
        raise ValueError(f"{name} is a standard error, so it cannot be negative")
