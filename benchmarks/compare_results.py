"""Are the numbers of two runs of the analyses the same? Compares their NetCDF files.

Run the analyses twice, in two versions of the package, and name the two folders:

    python -m benchmarks.compare_results old/results new/results

A line for each variable that differs, with the largest difference and how many of its standard
errors that is; times and numbers of bytes are left out. The exit status is 1 if anything differs.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xarray as xr

__all__ = ["compare_folders", "main"]

_OF_THE_MACHINE = {"s", "bytes"}  # units of what differs from run to run


def compare_folders(before: Path, after: Path) -> Iterator[str]:
    """Yields a sentence for each difference between the NetCDF files of two folders.

    Args:
        before: The folder of the one run; files are matched by their path below it.
        after: The folder of the other.
    """
    names = [{p.relative_to(folder) for p in folder.rglob("*.nc")} for folder in (before, after)]
    if not names[0]:
        yield f"{before}: no NetCDF file"
    for name in sorted(names[0] ^ names[1]):
        yield f"{name}: only in {before if name in names[0] else after}"
    for name in sorted(names[0] & names[1]):
        with xr.open_dataset(before / name) as old, xr.open_dataset(after / name) as new:
            yield from (f"{name}: {sentence}" for sentence in _compare(old, new))


def _compare(old: xr.Dataset, new: xr.Dataset) -> Iterator[str]:
    for variable in sorted({*map(str, old.variables), *map(str, new.variables)}):
        if variable not in old.variables or variable not in new.variables:
            yield f"{variable}: only {'before' if variable in old.variables else 'after'}"
            continue
        one, other = old[variable], new[variable]
        if one.attrs.get("unit") in _OF_THE_MACHINE or "seconds" in variable:
            continue
        if one.shape != other.shape:
            yield f"{variable}: shape {one.shape} before, {other.shape} after"
        elif one.dtype.kind not in "fiu":
            if not np.array_equal(one.values, other.values):
                yield f"{variable}: other words"
        elif not np.array_equal(one.values, other.values, equal_nan=True):
            yield f"{variable}: {_difference(variable, one.values, other.values, new)}"


def _difference(variable: str, one: np.ndarray, other: np.ndarray, new: xr.Dataset) -> str:
    apart = np.abs(one.astype(float) - other.astype(float))
    unknown = int((np.isnan(one.astype(float)) ^ np.isnan(other.astype(float))).sum())
    text = f"differs by up to {np.nanmax(apart, initial=0.0):.3g}"
    if (name := f"{variable}_se") in new.variables and new[name].shape == apart.shape:
        errors = np.divide(apart, new[name].values, where=new[name].values > 0)
        text += f", {np.nanmax(errors, initial=0.0):.2g} standard errors"
    return text + (f"; known in one only: {unknown}" if unknown else "")


def main() -> int:
    """Prints the differences; 1 if there are any."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare_results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path, help="a folder with the NetCDF files of one run")
    parser.add_argument("after", type=Path, help="the same of another")
    chosen = parser.parse_args()
    differences = list(compare_folders(chosen.before, chosen.after))
    print("\n".join(differences) or "no number differs")
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())
