"""Real and embedded data sets by name (`load_dataset`), and people's own data as tensors."""

from pyro_vae.data.arrays import as_data, as_tensor, read_table, takes_arrays
from pyro_vae.data.catalogue import DataFile, DatasetInfo, dataset_names, describe_dataset
from pyro_vae.data.datasets import Dataset, check_dataset, load_dataset
from pyro_vae.data.files import DatasetError
from pyro_vae.data.seeds import Seed, as_seed, known_seed

__all__ = [
    "DataFile",
    "Dataset",
    "DatasetError",
    "DatasetInfo",
    "Seed",
    "as_data",
    "as_seed",
    "as_tensor",
    "check_dataset",
    "dataset_names",
    "describe_dataset",
    "known_seed",
    "load_dataset",
    "read_table",
    "takes_arrays",
]
