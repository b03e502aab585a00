"""Real and embedded data sets: `load_dataset(name)`, with sources, licences and checksums."""

from pyro_vae.data.datasets import (
    Dataset,
    DatasetError,
    check_dataset,
    dataset_names,
    describe_dataset,
    load_dataset,
)

__all__ = [
    "Dataset",
    "DatasetError",
    "check_dataset",
    "dataset_names",
    "describe_dataset",
    "load_dataset",
]
