"""Real and embedded data sets: `load_dataset(name)`, with sources, licences and checksums."""

from pyro_vae.data.catalogue import DataFile, DatasetInfo, dataset_names, describe_dataset
from pyro_vae.data.datasets import Dataset, check_dataset, load_dataset
from pyro_vae.data.files import DatasetError

__all__ = [
    "DataFile",
    "Dataset",
    "DatasetError",
    "DatasetInfo",
    "check_dataset",
    "dataset_names",
    "describe_dataset",
    "load_dataset",
]
