"""Results as NetCDF files that give back exactly what was written."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pyro_vae.results.files import atomic_path

__all__ = ["plain_attrs", "read_dataset", "save_dataset"]


def save_dataset(dataset: xr.Dataset, path: str | os.PathLike[str]) -> Path:
    """Writes a dataset wholly or not at all; see `Result.save`."""
    target = Path(path)
    if target.suffix != ".nc":
        raise ValueError(
            f"a result is saved as NetCDF: name the file {target.stem or 'result'}.nc, not "
            f"{target.name or target}"
        )
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: name a file in it")
    target = Path(os.path.realpath(target))  # writes through a link instead of replacing it
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} does not exist: make it first")
    with atomic_path(target) as temporary:
        _write(dataset, temporary)
    return Path(path)


def read_dataset(path: str | os.PathLike[str]) -> xr.Dataset:
    """Reads what `save_dataset` wrote.

    Raises:
        ValueError: If the file is damaged or no NetCDF file.
    """
    try:
        return _read(path)
    except PermissionError:
        raise
    except Exception as error:  # a damaged file makes HDF5 raise almost anything
        raise ValueError(
            f"{path} is not a NetCDF file or is damaged: make it again ({error})"
        ) from error


def plain_attrs(attrs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Attributes in Python's own types, without those that are None."""
    plain = {
        k: v.item() if isinstance(v, np.generic) else v for k, v in attrs.items() if v is not None
    }
    _to_disk(plain, where)
    return plain


def _write(dataset: xr.Dataset, path: Path) -> None:
    disk = dataset.copy(deep=False).drop_encoding()
    disk.attrs = _to_disk(disk.attrs, "the result")
    for name, variable in disk.variables.items():
        variable.attrs = _to_disk(variable.attrs, str(name))
    try:
        disk.to_netcdf(path, engine="h5netcdf")
        same = _identical(_read(path), dataset)
    except OSError:
        raise
    except Exception as error:  # xarray and h5netcdf raise many kinds for what NetCDF cannot hold
        raise ValueError(f"the result cannot be written as NetCDF: {error}") from error
    if not same:
        raise ValueError(
            "NetCDF would change the result: rename attributes that it gives a meaning (units, "
            "dtype, scale_factor, _FillValue, ...), and use only numbers, bools and text"
        )


def _read(path: str | os.PathLike[str]) -> xr.Dataset:
    with xr.open_dataset(path, engine="h5netcdf") as lazy:
        dataset = lazy.load().drop_encoding()
    dataset.attrs = {key: _from_disk(value) for key, value in dataset.attrs.items()}
    for variable in dataset.variables.values():
        variable.attrs = {key: _from_disk(value) for key, value in variable.attrs.items()}
    return dataset


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
        "what belongs to the whole result goes into config"
    )


def _from_disk(value: Any) -> Any:
    if isinstance(value, np.int8):
        return bool(value)
    return value.item() if isinstance(value, np.generic) else value


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
