"""Named data sets as tensors, each with the measure its data live on.

A bound on data is a number about a measure: a probability of binary pixels, a density of grey ones
and a density of real ones are different things and cannot be compared. A `Dataset` therefore
carries its measure along, and binarising it is what changes the measure.

`digits` and `iris` come inside scikit-learn and need nothing. The others are read from a folder:
`root`, else the environment variable `PYRO_VAE_DATA`, else the user's cache folder. Every file is
checked by size and sha256 whenever it is loaded. The network is used only where `download=True` is
passed.

| name | train / validation / test | how they are split |
| --- | --- | --- |
| `digits` | 1437 / - / 360 | images ordered by class, every fifth to test; writers are in both |
| `iris` | 120 / - / 30 | flowers ordered by class, every fifth to test |
| `mnist`, `fashion_mnist` | 60000 / - / 10000 | the published split |
| `binarized_mnist` | 50000 / 10000 / 10000 | the published split |
| `omniglot` | 19280 / - / 13180 | Lake's background and evaluation alphabets, which differ |
| `frey_face` | 1565 / 200 / 200 | consecutive frames, in this order; a random split leaks |
| `faithful` | 272 / - / 0 | no split: EM is run on the whole set, so `test` has no rows |
"""

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from pyro_vae.data.catalogue import Measure, Pixels, describe_dataset
from pyro_vae.data.files import (
    DatasetError,
    fetch_missing,
    file_status,
    find_folder,
    require_files,
    sha256_of_arrays,
)
from pyro_vae.data.readers import READERS

__all__ = ["Dataset", "check_dataset", "load_dataset"]

_BINARIZATIONS = ("dynamic", "static", "threshold")


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Data in memory, with the measure that they live on.

    Attributes:
        name: Its name, as `load_dataset` takes it.
        train: Training data, shape (train, features), float32.
        test: Test data, shape (test, features), float32; no rows where there is no split.
        measure: "binary" (a probability of pixels in {0, 1}), "grey" (a density on [0, 1]), "real"
            (a density, in the data's own units) or "counts" (a probability of counts).
        validation: Data for early stopping, shape (validation, features), or None.
        train_labels: Classes of the training data, shape (train,), int64, or None.
        test_labels: Classes of the test data, shape (test,), int64, or None.
        label_names: `label_names[k]` is the name of class k.
        image_shape: Rows and columns; features are stored row by row. None if not images.
        transform: What to apply to each training minibatch, as `transform(x, generator)`. Only
            dynamic binarisation sets it; `train` then holds the probability of each pixel, while
            `measure` says what the transformed data are.
        binarization: How the pixels became binary, or None.
        source: Whom to cite.
        license: The licence of the data.
        pixels: What a pixel of an image counts: "ink", so that 1 is drawn black (writing, or
            garments on a white ground), or "light", so that 1 is drawn white (photographs).
    """

    name: str
    train: Float32[Tensor, "train features"]
    test: Float32[Tensor, "test features"]
    measure: Measure
    validation: Float32[Tensor, "validation features"] | None = None
    train_labels: Int64[Tensor, " train"] | None = None
    test_labels: Int64[Tensor, " test"] | None = None
    label_names: tuple[str, ...] | None = None
    image_shape: tuple[int, int] | None = None
    transform: Callable[[Tensor, torch.Generator], Tensor] | None = None
    binarization: str | None = None
    source: str = ""
    license: str = ""
    pixels: Pixels = "ink"

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise ValueError(f"measure must be one of {get_args(Measure)}, not {self.measure!r}")
        for part, x in self._parts():
            if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != self.train.shape[1]:
                raise ValueError(
                    f"{part} of data set {self.name!r} must be float32 of shape [N, D] with the "
                    f"D of train, not {x.dtype} of shape {list(x.shape)}"
                )
        for part, x, labels in (
            ("train", self.train, self.train_labels),
            ("test", self.test, self.test_labels),
        ):
            if labels is not None and (labels.dtype != torch.int64 or labels.shape != x.shape[:1]):
                raise ValueError(
                    f"{part}_labels of data set {self.name!r} must be int64 of shape "
                    f"[{len(x)}], not {labels.dtype} of shape {list(labels.shape)}"
                )
        if self.image_shape is not None and math.prod(self.image_shape) != self.train.shape[1]:
            raise ValueError(
                f"image_shape {self.image_shape} of data set {self.name!r} does not have the "
                f"{self.train.shape[1]} pixels of its rows"
            )

    def binarize(self, method: str | None, generator: torch.Generator | None = None) -> "Dataset":
        r"""Turns grey levels into binary pixels, which changes what a likelihood means.

        .. math:: b_{nd} \sim \mathrm{Bernoulli}(x_{nd})

        The generator is used for test first, then validation, then train: with the same seed,
        "dynamic" and "static" have the same test pixels.

        Args:
            method: "dynamic": fresh training pixels for each minibatch, by `transform`, while
                `train` stays grey; test and validation are drawn once. "static": all are drawn
                once. "threshold": b = 1 where x > 0.5. None: returns this data set itself.
            generator: Where the draws come from. Needed for "dynamic" and "static", refused
                elsewhere, since nothing would be drawn from it.

        Returns:
            A data set of measure "binary"; if "dynamic", its `train` is this one's.

        Raises:
            ValueError: If the data are not grey levels in [0, 1], the method is unknown, or the
                generator is missing or of no use.

        References:
            Salakhutdinov and Murray (2008), On the quantitative analysis of deep belief networks
            (static); Burda, Grosse and Salakhutdinov (2015), Importance weighted autoencoders
            (dynamic).
        """
        _check_binarization(self.name, self.measure, method, generator)
        if method is None:
            return self
        for part, x in self._parts():
            if not bool(((x >= 0) & (x <= 1)).all()):  # written so that nan fails too
                raise ValueError(
                    f"{part} of data set {self.name!r} has values outside [0, 1]: divide grey "
                    "levels by their maximum before binarize()"
                )

        def draw(x: Tensor) -> Tensor:
            return (x > 0.5).float() if generator is None else _draw_pixels(x, generator)

        test = draw(self.test)
        validation = None if self.validation is None else draw(self.validation)
        return dataclasses.replace(
            self,
            train=self.train if method == "dynamic" else draw(self.train),
            test=test,
            validation=validation,
            measure="binary",
            transform=_draw_pixels if method == "dynamic" else None,
            binarization=method,
        )

    def sha256(self) -> str:
        """Hashes the tensors: their names, dtypes, shapes and bytes, in hexadecimal."""
        labels = (("train_labels", self.train_labels), ("test_labels", self.test_labels))
        present = [(part, x) for part, x in (*self._parts(), *labels) if x is not None]
        return sha256_of_arrays((part, x.detach().cpu().numpy()) for part, x in present)

    def _parts(self) -> list[tuple[str, Tensor]]:
        parts = (("train", self.train), ("validation", self.validation), ("test", self.test))
        return [(part, x) for part, x in parts if x is not None]

    def __repr__(self) -> str:
        rows = ", ".join(f"{part} {len(x)}" for part, x in self._parts())
        pixels = "" if self.image_shape is None else " ({} x {} pixels)".format(*self.image_shape)
        how = "" if self.binarization is None else f" ({self.binarization} binarization)"
        return (
            f"Dataset({self.name!r}: {rows}; {self.train.shape[1]} features{pixels}; "
            f"measure {self.measure}{how})"
        )


def check_dataset(name: str, root: str | os.PathLike[str] | None = None) -> list[tuple[str, str]]:
    """Checks the files of a data set without loading it.

    Args:
        name: One of `dataset_names()`.
        root: The folder, as for `load_dataset`.

    Returns:
        For each file, its path in the folder and "ok", "missing", "wrong size", "wrong sha256" or
        "unreadable". Empty for a data set that needs no files.

    Raises:
        ValueError: If there is no such data set.
        DatasetError: If `root` or `$PYRO_VAE_DATA` is not a folder.

    Example:
        >>> check_dataset("iris")
        []
    """
    info = describe_dataset(name)
    if not info.files:
        return []
    folder, _ = find_folder(root)
    return [(file.path, file_status(file, folder)) for file in info.files]


def load_dataset(
    name: str,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    *,
    binarize: str | None = None,
    generator: torch.Generator | None = None,
) -> Dataset:
    """Loads a named data set into memory, its files checked by sha256.

    Args:
        name: One of `dataset_names()`; the module's text says how each is split.
        root: Folder of the files; if None, `$PYRO_VAE_DATA`, else the user's cache folder. `digits`
            and `iris` need neither a folder nor a download.
        download: Fetches files that are missing; nothing else here uses the network or
            writes to disk.
        binarize: As for `Dataset.binarize`.
        generator: As for `Dataset.binarize`.

    Returns:
        The data set in fresh tensors. Grey levels are divided by their maximum, real data are in
        their own units.

    Raises:
        ValueError: If there is no such data set, or it cannot be binarised as asked.
        DatasetError: If a file is missing, damaged or cannot be fetched.

    Example:
        >>> load_dataset("digits")
        Dataset('digits': train 1437, test 360; 64 features (8 x 8 pixels); measure grey)
        >>> load_dataset("digits", binarize="threshold").measure
        'binary'
    """
    info = describe_dataset(name)
    _check_binarization(info.name, info.measure, binarize, generator)
    folder = Path()
    if info.files:
        folder, whence = find_folder(root, create=download)
        if download:
            fetch_missing(info, folder)
        require_files(info, folder, whence)
    try:
        arrays = READERS[info.name](folder)
    except Exception as error:  # a file changed after its check, or a reader cannot be imported
        raise DatasetError(
            f"data set {name!r} could not be read although its files are as they should be: {error}"
        ) from error
    dataset = Dataset(
        name=info.name,
        measure=info.measure,
        image_shape=(info.shape[0], info.shape[1]) if len(info.shape) == 2 else None,
        source=info.citation,
        license=info.license,
        pixels=info.pixels,
        **arrays,
    )
    return dataset.binarize(binarize, generator)


def _check_binarization(
    name: str, measure: Measure, method: str | None, generator: torch.Generator | None
) -> None:
    """Refuses what cannot be done, before any file is read."""
    if method is not None and method not in _BINARIZATIONS:
        raise ValueError(f"binarize must be one of {_BINARIZATIONS} or None, not {method!r}")
    if method is not None and measure == "binary":
        raise ValueError(f"data set {name!r} is already binary: leave out binarize")
    if method is not None and measure != "grey":
        raise ValueError(
            f"data set {name!r} is of measure {measure!r}: only grey levels in [0, 1] can be "
            "binarised"
        )
    draws = method in ("dynamic", "static")
    if draws and generator is None:
        raise ValueError(
            f"binarize={method!r} draws pixels: pass generator=torch.Generator().manual_seed(0)"
        )
    if generator is not None and not draws:
        raise ValueError(
            f"binarize={method!r} draws nothing: leave out the generator, or choose 'dynamic' or "
            "'static'"
        )


def _draw_pixels(
    x: Float32[Tensor, "batch features"], generator: torch.Generator
) -> Float32[Tensor, "batch features"]:
    return torch.bernoulli(x, generator=generator)
