"""The data of runs: loaded by name, split for early stopping, found again to the byte."""

import os
from typing import Any

import torch
from torch import Tensor

from pyro_vae.data import Dataset, load_dataset
from pyro_vae.inference.svi import CheckpointError
from pyro_vae.progress import announced, say
from pyro_vae.runs.load import Run

__all__ = [
    "BINARIZATION_SEED",
    "describe_data",
    "load_run_data",
    "load_training_data",
    "split_training",
]

BINARIZATION_SEED = 0
"""The draws of binary test pixels; one for all runs, so that their numbers are comparable."""

_HELD_OUT_EVERY = 10


def load_training_data(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    binarization: str | None = None,
    download: bool = False,
) -> Dataset:
    """Loads a data set as runs use it: its binary pixels drawn with `BINARIZATION_SEED`.

    Args:
        name: As `load_dataset` takes it.
        root: Folder of the files, as for `load_dataset`.
        binarization: As for `Dataset.binarize`.
        download: Fetches files that are missing.

    Raises:
        ValueError: If there is no such data set, or it cannot be binarised as asked.
        DatasetError: If a file is missing, damaged or cannot be fetched.
    """
    draws = binarization in ("dynamic", "static")
    generator = torch.Generator().manual_seed(BINARIZATION_SEED) if draws else None
    with announced(f"reading {name}", say):
        return load_dataset(name, root, download, binarize=binarization, generator=generator)


def split_training(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Splits training data from data held out for early stopping; the test set is not touched.

    Held out is the data set's own validation part, else every tenth training datum (with its
    binary pixels drawn once, where binarisation is dynamic).

    Args:
        dataset: From `load_training_data`.

    Returns:
        Training data and held-out data, shapes (train, features) and (held out, features).

    Example:
        >>> train, held_out = split_training(load_training_data("iris"))
        >>> len(train), len(held_out)
        (108, 12)
    """
    if dataset.validation is not None:
        return dataset.train, dataset.validation
    place = torch.arange(len(dataset.train)) % _HELD_OUT_EVERY
    last = place == _HELD_OUT_EVERY - 1
    held_out = dataset.train[last]
    if dataset.transform is not None:
        generator = torch.Generator().manual_seed(BINARIZATION_SEED + 1)
        held_out = dataset.transform(held_out, generator)
    return dataset.train[~last], held_out


def load_run_data(
    run: Run, root: str | os.PathLike[str] | None = None, *, download: bool = False
) -> Dataset:
    """Loads the data a run was trained on, to the byte.

    Args:
        run: The run.
        root: Folder of the files, as for `load_dataset`.
        download: Fetches files that are missing.

    Raises:
        CheckpointError: If the run does not say its data, or those found are others.
        DatasetError: If a file is missing, damaged or cannot be fetched.
    """
    described = run.config.get("data", {})
    if "sha256" not in described:
        raise CheckpointError(
            f"{run.path} was trained on data of the caller, not on a named data set: pass them to "
            "log_evidence(run.model, run.guide, x) yourself"
        )
    dataset = load_training_data(
        described["name"], root, binarization=described["binarization"], download=download
    )
    if dataset.sha256() != described["sha256"]:
        raise CheckpointError(
            f"the data set {described['name']!r} found here is not the one that {run.path} was "
            "trained on (its sha256 differs): name the folder that holds those data"
        )
    return dataset


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """What ``config.json`` of a run says of its data."""
    held_out = (
        "the data set's validation part"
        if dataset.validation is not None
        else f"every {_HELD_OUT_EVERY}th training datum"
    )
    return {
        "name": dataset.name,
        "binarization": dataset.binarization,
        "binarization_seed": BINARIZATION_SEED,
        "measure": dataset.measure,
        "image_shape": list(dataset.image_shape) if dataset.image_shape else None,
        "pixels": dataset.pixels,
        "held_out": held_out,
        "sha256": dataset.sha256(),
    }
