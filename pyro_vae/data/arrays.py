"""Data as people have them: arrays, frames, lists, sparse matrices and data sets become tensors.

Nothing is converted that would lose something without a word: integers that a float cannot hold,
numbers that overflow and columns that hold no numbers are refused in a sentence.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    default_collate,
)
from torch.utils.data import Dataset as TorchDataset

from pyro_vae.data.datasets import Dataset

__all__ = ["as_data", "as_tensor", "read_table", "takes_arrays"]

_Method = TypeVar("_Method", bound=Callable[..., Any])

_READABLE = (
    "give a tensor, a NumPy array, a data frame with columns of numbers, an xarray DataArray, a "
    "sparse matrix, lists of equal length, or a torch Dataset or DataLoader"
)
_NARROW = (torch.bool, torch.uint8)  # never indices, so they become floats also as tensors


def read_table(
    path: str | os.PathLike[str], columns: Sequence[str] | None = None
) -> tuple[list[str], Tensor]:
    """A table of numbers from a CSV file, whose first row names the columns.

    Args:
        path: The file.
        columns: The columns to take; None for all.

    Returns:
        Their names, and their numbers in float64, shape (rows, columns).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no table, a column is missing or holds no numbers, a number is missing,
            or the first row holds numbers instead of names.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        table = pandas.read_csv(path, skipinitialspace=True)
    except (ValueError, pandas.errors.ParserError) as error:  # also what is no text
        raise ValueError(f"{path} is no table of comma-separated values: {error}") from error
    known = [str(name) for name in table.columns]
    if unknown := sorted(set(columns or ()) - set(known)):
        raise ValueError(f"{path} has no column {unknown[0]!r}; its columns are {', '.join(known)}")
    if known and all(name.replace(".", "").lstrip("-").isdigit() for name in known):
        raise ValueError(f"the first row of {path} holds numbers: put the columns' names above it")
    chosen = list(columns or known)
    if table.empty or not chosen:
        raise ValueError(f"{path} holds no rows of data")
    for name in chosen:
        if not pandas.api.types.is_numeric_dtype(table[name]):
            raise ValueError(
                f"column {name!r} of {path} holds no numbers: name the columns to take"
            )
        if missing := int(table[name].isna().sum()):
            raise ValueError(
                f"column {name!r} of {path} misses {missing} numbers: leave these rows or the "
                "column out"
            )
    return chosen, torch.from_numpy(table[chosen].to_numpy(dtype=np.float64))


def as_tensor(x: Any, dtype: torch.dtype | None = None) -> Tensor:
    """One array of numbers as a tensor.

    Args:
        x: A tensor, or anything that `as_data` reads as one array, with equal rows if it is a list.
        dtype: The floating-point type wanted, to which integers are converted as well; None keeps
            the numbers' own type, with integers as int64.

    Returns:
        A dense tensor; x itself if it is one of that type.

    Raises:
        TypeError: If x holds no numbers, or several arrays.
        ValueError: If a number cannot be held by `dtype`.
    """
    read = _read(x)
    if isinstance(read, list):
        read = _from_list(read)
    if isinstance(read, tuple):
        raise TypeError(f"the data hold {len(read)} arrays where one is needed: choose one of them")
    if not isinstance(read, Tensor | np.ndarray):
        raise TypeError(f"a {type(x).__name__} cannot be read as data: {_READABLE}")
    return _to_tensor(read, dtype)


def as_data(x: Any, dtype: torch.dtype | None = None) -> Any:
    """The `x` of a tool with arrays, frames, lists and data sets in it converted to tensors.

    Read are NumPy arrays, pandas and polars frames and series, xarray DataArrays, sparse matrices
    (made dense), a list of numbers or of lists of them where it is the whole of x, and torch
    Datasets and DataLoaders, which are stacked in the order of the data. Everything else a program
    may take is passed on.

    Args:
        x: One argument; a tuple of several; a mapping of keywords.
        dtype: That of the programs' parameters, which floating-point numbers are converted to;
            None leaves tensors as they are and gives the rest torch's default type. Where x is one
            argument, integers and booleans become floats too, but for integer tensors: a program
            that indexes by its data takes those.

    Returns:
        A tensor, or a tuple or dict with tensors; x itself where nothing had to be done.

    Raises:
        TypeError: If something holds no numbers.
        ValueError: If a number cannot be held by `dtype`.
    """
    x = _read(x)
    if isinstance(x, tuple):
        changed = tuple(_one_of_several(a, dtype) for a in x)
        return x if all(a is b for a, b in zip(x, changed, strict=True)) else changed
    if isinstance(x, Mapping):
        return {name: _one_of_several(a, dtype) for name, a in x.items()}
    if isinstance(x, Tensor):
        known = dtype is not None and (x.is_floating_point() or x.dtype in _NARROW)
        return _to_tensor(x, dtype if known else x.dtype)
    if isinstance(x, list):
        if not _holds_numbers(x):
            return x
        x = _from_list(x)
    return _to_tensor(x, dtype or torch.get_default_dtype()) if isinstance(x, np.ndarray) else x


def takes_arrays(*, keep_dtype: bool = False) -> Callable[[_Method], _Method]:
    """Lets a model's method take its first argument in any form that `as_tensor` reads.

    Tensors are passed on as they are.

    Args:
        keep_dtype: Whether other forms keep their numbers' own type. If not, they take that of the
            model's parameters, and float64 in a class method.
    """

    def decorate(method: _Method) -> _Method:
        @wraps(method)
        def call(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(x, Tensor):
                module = isinstance(self, nn.Module)
                dtype = next(self.parameters()).dtype if module else torch.float64
                x = as_tensor(x, None if keep_dtype else dtype)
            return method(self, x, *args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


# --- reading --------------------------------------------------------------------------------------


def _read(x: Any) -> Any:
    """Arrays as NumPy's, data sets as a tensor or a tuple of them; what is none is passed on."""
    if isinstance(x, Tensor):
        return x if x.layout == torch.strided else x.to_dense()
    if isinstance(x, Dataset):
        raise TypeError(f"{x.name} has several parts: give its .train or its .test")
    if isinstance(x, DataLoader | TorchDataset):
        return _stacked(x)
    if isinstance(x, np.ma.MaskedArray):
        return _numeric(np.ma.filled(x.astype(np.float64), np.nan))
    if isinstance(x, np.ndarray):
        return _numeric(x)
    if hasattr(x, "toarray") and hasattr(x, "nnz"):
        return _numeric(x.toarray())
    if hasattr(x, "to_numpy") and hasattr(x, "columns"):
        return _from_frame(x)
    if hasattr(x, "to_numpy") and hasattr(x, "dtype"):
        return _from_column(x, getattr(x, "name", None))
    return x


def _numeric(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"the data are an array of {array.dtype}, which holds no real numbers: convert it, for "
            "example with .astype(float)"
        )
    return array


def _from_frame(frame: Any) -> np.ndarray:
    array = frame.to_numpy()
    if array.dtype.kind in "biuf":
        return array
    return np.stack([_from_column(frame[name], name) for name in frame.columns], axis=1)


def _from_column(column: Any, name: Any) -> np.ndarray:
    array = column.to_numpy()
    if array.dtype == object and getattr(column.dtype, "kind", "O") in tuple("biuf"):
        array = column.to_numpy(dtype=np.float64, na_value=np.nan)  # pandas' own missing value
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"column {name!r} holds {column.dtype}, not numbers: drop it, or code it as numbers "
            "(one column for each value)"
        )
    return array


def _holds_numbers(x: Any) -> bool:
    """Whether a list has numbers at its leaves; tensors in a list are a program's own business."""
    while isinstance(x, list | tuple) and len(x):
        x = x[0]
    return isinstance(x, int | float | np.ndarray | np.number)


def _from_list(x: list[Any]) -> np.ndarray:
    if x and all(isinstance(row, Tensor) for row in x):
        x = [row.detach().cpu().numpy() for row in x]
    try:
        return _numeric(np.asarray(x))
    except ValueError as error:
        lengths = {len(row) for row in x if hasattr(row, "__len__")}
        raise ValueError(
            f"the rows of the list have between {min(lengths)} and {max(lengths)} entries: pad "
            "them to one length and mask the padding in the model (poutine.mask)"
        ) from error


def _stacked(data: Any) -> Any:
    """A data set in its own order, all at once: one tensor, a tuple, or a dict of keywords."""
    loader = data if isinstance(data, DataLoader) else None
    if loader is not None and isinstance(loader.sampler, RandomSampler):
        # Shuffling is the business of training; per-datum results want the order of the data.
        loader = DataLoader(
            loader.dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn
        )
    if isinstance(data, TensorDataset):
        return data.tensors[0] if len(data.tensors) == 1 else data.tensors
    try:
        if loader is None and isinstance(data, IterableDataset):
            whole = default_collate(list(data))
        elif loader is None:
            whole = default_collate([data[i] for i in range(len(data))])
        else:
            whole = _joined(list(loader))
    except TypeError as error:
        raise TypeError(
            f"the items of {type(data).__name__} are not numbers: {error}. Give it a transform to "
            "tensors, such as torchvision's ToTensor()"
        ) from error
    if isinstance(whole, list | tuple):
        return whole[0] if len(whole) == 1 else tuple(whole)
    return whole


def _joined(batches: list[Any]) -> Any:
    """Batches of a loader as one: tensors end to end, in whatever tuple or dict they come."""
    first = batches[0]
    if isinstance(first, Mapping):
        return {name: _joined([b[name] for b in batches]) for name in first}
    if isinstance(first, list | tuple):
        return tuple(_joined(list(parts)) for parts in zip(*batches, strict=True))
    return torch.cat([torch.as_tensor(b) for b in batches])


# --- converting -----------------------------------------------------------------------------------


def _one_of_several(a: Any, dtype: torch.dtype | None) -> Any:
    """An argument among others: masks, labels and lengths stay what they are."""
    if isinstance(a, list | tuple | Mapping) or isinstance(read := _read(a), tuple | Mapping):
        return a
    if isinstance(read, Tensor):
        return _to_tensor(read, dtype if read.is_floating_point() else None)
    if isinstance(read, np.ndarray):
        wanted = dtype or torch.get_default_dtype()
        return _to_tensor(read, wanted if read.dtype.kind == "f" else None)
    return read


def _to_tensor(array: Tensor | np.ndarray, dtype: torch.dtype | None) -> Tensor:
    if isinstance(array, np.ndarray):
        own = {"f": np.float64, "b": np.bool_}.get(array.dtype.kind, np.int64)
        if array.dtype.type is np.float32:
            own = np.float32
        array = torch.from_numpy(np.array(array, dtype=own, order="C"))
    if dtype is None or array.dtype == dtype:
        return array
    converted = array.to(dtype)
    if array.dtype in _NARROW or not array.numel():
        return converted
    if array.is_floating_point():
        lost = array.isfinite() & ~converted.isfinite()
        what = "overflow"
    else:
        lost = converted.double().to(array.dtype) != array
        what = "cannot be held exactly"
    if bool(lost.any()):
        raise ValueError(
            f"{int(lost.sum())} of the data, such as {array[lost][0].item()}, {what} in {dtype}, "
            "the type of the parameters: rescale the data, or use .double() on the model"
        )
    return converted
