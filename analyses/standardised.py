"""Standardised data for the analyses of EM: Old Faithful, or iris."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from analyses.command import out_folder, run_analysis
from pyro_vae import load_dataset
from pyro_vae.data import DatasetError

__all__ = ["DATA", "DATA_HELP", "Sample", "load", "run_on_sample"]

DATA = ("faithful", "iris")
DATA_HELP = "Old Faithful is read from the data folder (iris instead if it is not there)"


@dataclass(frozen=True)
class Sample:
    """Standardised data, and how to show them.

    Attributes:
        name: What they are called.
        x: Shape (batch, features), float64, with mean 0 and variance 1.
        names: Of the features.
        features: The two that are shown.
        num_components: Of the mixture that is shown.
        start: How the mixture of the second analysis is started, see `GaussianMixture.initialize`.
        crowded: Components of the mixture whose local optima are shown.
    """

    name: str
    x: Tensor
    names: tuple[str, ...]
    features: tuple[int, int]
    num_components: int
    start: str
    crowded: int


def load(name: str, root: str | None, say: Callable[[str], None]) -> Sample:
    """The data by name, standardised; iris where the file of Old Faithful is not there."""
    if name == "faithful":
        try:
            x = load_dataset("faithful", root).train
        except DatasetError:
            say(
                "Old Faithful is not in the data folder, so this is iris, which comes with "
                "scikit-learn (pyro-vae data --help says how to get the file)."
            )
        else:
            clock = ("eruption time (standardised)", "time to the next (standardised)")
            return Sample("Old Faithful", _standardised(x), clock, (0, 1), 2, "random", 4)
    iris = load_dataset("iris")
    x = torch.cat([iris.train, iris.test])
    parts = ("sepal length", "sepal width", "petal length", "petal width")
    names = tuple(f"{part} (standardised)" for part in parts)
    return Sample("iris", _standardised(x), names, (1, 2), 3, "k-means++", 4)


def _standardised(x: Tensor) -> Tensor:
    x = x.double()
    return (x - x.mean(0)) / x.std(0, correction=0)


def run_on_sample(analysis: Callable[..., Path], given: argparse.Namespace) -> int:
    """Runs an analysis of standardised data, passed as `sample` and `out`, as `run_analysis` does.

    Results of data that stand in for others do not replace the others'.
    """
    sample = load(given.data, given.root, print)
    used = sample.name if sample.name in DATA else given.data
    folder = out_folder(given, used)
    if used != given.data:
        print(f"Its files go to {folder}; results of Old Faithful stay as they are.")
    return run_analysis(lambda out: analysis(sample=sample, out=out), given, folder)
