"""Data as people have them, and seeds."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
import xarray as xr
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyro_vae.data import as_data, as_seed, as_tensor, load_dataset

X = np.arange(12.0).reshape(4, 3) / 7
WANTED = torch.tensor(X.tolist(), dtype=torch.float32)


class Column:
    """What a polars series shows of itself."""

    def __init__(self, values, dtype):
        self.values, self.dtype = np.asarray(values), dtype

    def to_numpy(self):
        return self.values


class Frame:
    """What a polars frame shows of itself."""

    def __init__(self, **columns):
        self.data, self.columns = columns, list(columns)

    def to_numpy(self):
        return np.stack([c.values.astype(object) for c in self.data.values()], 1)

    def __getitem__(self, name):
        return self.data[name]


class Rows(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return torch.from_numpy(X[i])


class Labelled(Rows):
    def __getitem__(self, i):
        return torch.from_numpy(X[i]), i


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


FORMS = {
    "array": X,
    "a view from the right": X[:, ::-1][:, ::-1],
    "big-endian": X.astype(">f8"),
    "frame": pd.DataFrame(X, columns=list("abc")),
    "nullable frame": pd.DataFrame(X, columns=list("abc")).convert_dtypes(),
    "polars-like": Frame(**{name: Column(X[:, i], "Float64") for i, name in enumerate("abc")}),
    "DataArray": xr.DataArray(X, dims=("row", "column")),
    "lists": X.tolist(),
    "sparse": scipy.sparse.csr_matrix(X),
    "sparse tensor": torch.from_numpy(X).to_sparse(),
    "TensorDataset": TensorDataset(torch.from_numpy(X)),
    "Dataset": Rows(),
    "stream": Stream(),
    "shuffling loader": DataLoader(Rows(), batch_size=3, shuffle=True),
    "loader": DataLoader(Rows(), batch_size=3),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_tensor(form):
    assert torch.equal(as_data(FORMS[form], torch.float32), WANTED)
    assert torch.equal(as_tensor(FORMS[form], torch.float32), WANTED)


def test_types_of_numbers():
    counts = np.array([[0, 255], [3, 4]])
    for kind in (np.uint8, np.int16, np.int64, np.float16, np.float64):
        assert torch.equal(
            as_data(counts.astype(kind), torch.float64), torch.from_numpy(counts).double()
        )
    assert as_data(torch.from_numpy(counts).to(torch.uint8), torch.float32).dtype == torch.float32
    assert as_data(np.array([True, False]), torch.float32).tolist() == [1.0, 0.0]
    # A program that indexes by its data has integer tensors; masks and labels come beside data.
    tokens = torch.tensor([1, 2])
    assert as_data(tokens, torch.float32) is tokens
    x, mask, labels = as_data((X, X > 0.5, np.arange(4)), torch.float32)
    assert (x.dtype, mask.dtype, labels.dtype) == (torch.float32, torch.bool, torch.int64)
    assert as_tensor(counts).dtype == torch.int64
    assert as_data(X).dtype == torch.get_default_dtype()
    holes = pd.DataFrame({"a": pd.array([1, None], dtype="Int64"), "b": [0.5, 2.0]})
    assert np.array_equal(as_tensor(holes), [[1, 0.5], [np.nan, 2]], equal_nan=True)
    assert as_tensor(np.ma.masked_greater(X, 1.0)).isnan().sum() == 4


def test_what_a_program_may_take_is_passed_on():
    ragged = [torch.ones(2), torch.ones(3)]
    x = torch.ones(2)
    for given in (x, None, 7, "text", ragged, (x, [3, 4]), (), ["a"]):
        assert as_data(given, torch.get_default_dtype()) is given
    read = as_data(xr.Dataset({"x": ("row", [1.0, 2.0])}), torch.float32)
    assert read["x"].tolist() == [1.0, 2.0]


def test_labels_come_along():
    x, labels = as_data(DataLoader(Labelled(), batch_size=3), torch.float32)
    assert torch.equal(x, WANTED)
    assert labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (pd.DataFrame({"size": [1.0], "species": ["setosa"]}), "column 'species' holds .*drop it"),
        (Frame(day=Column(["2020-01-01"], "Date")), "column 'day' holds Date, not numbers"),
        (np.array([1 + 2j]), "complex128, which holds no real numbers"),
        (np.array([[1.0], None], dtype=object), "array of object"),
        ([[1.0, 2.0], [3.0]], "between 1 and 2 entries: pad"),
        (np.array([1e300]), r"1 of the data, such as 1e\+300, overflow in torch.float32"),
        (np.array([2**24 + 1, 3]), "such as 16777217, cannot be held exactly in torch.float32"),
        (load_dataset("iris"), r"iris has several parts: give its .train"),
        (["a"], "a list cannot be read|<U1"),
        (Labelled(), "hold 2 arrays where one is needed"),
        (object(), "a object cannot be read as data: give a tensor"),
    ],
)
def test_what_would_lose_something_is_refused(x, says):
    with pytest.raises((TypeError, ValueError), match=says):
        as_tensor(x, torch.float32)


def test_seeds():
    assert as_seed(None) is None
    assert as_seed(np.int64(5)) == 5
    for make in (np.random.default_rng, lambda s: torch.Generator().manual_seed(s)):
        first, second = make(1), make(1)
        assert as_seed(first) == as_seed(second)
        assert as_seed(first) != as_seed(make(1))
        assert 0 <= as_seed(first) < 2**31
    for bad in (1.5, True, "1"):
        with pytest.raises(TypeError, match=r"seed is an integer, a numpy\.random\.Generator"):
            as_seed(bad)
