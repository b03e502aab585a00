"""What is known of the named data sets without reading them: the table `catalogue.toml`."""

import difflib
import functools
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

__all__ = ["DataFile", "DatasetInfo", "Measure", "Pixels", "dataset_names", "describe_dataset"]

Measure = Literal["binary", "grey", "real", "counts"]
Pixels = Literal["ink", "light"]


@dataclass(frozen=True)
class DataFile:
    """One file of a data set.

    Attributes:
        path: Relative to the data folder, with forward slashes.
        bytes: Its size.
        sha256: Of its bytes, in hexadecimal.
        contents_sha256: Of the arrays in it, for archives whose bytes depend on the program that
            wrote them: another file with these arrays is accepted as well.
    """

    path: str
    bytes: int
    sha256: str
    contents_sha256: str | None = None


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set without loading it.

    Attributes:
        name: As `load_dataset` takes it.
        title: In words.
        citation: Whom to cite.
        license: The licence of the data.
        measure: The measure that the data live on as loaded, see `Dataset`.
        shape: Of one datum: (rows, columns) of an image, else (features,).
        sizes: Rows of train, validation and test.
        files: What must lie in the data folder; none if it comes with a dependency.
        downloadable: Whether `download=True` can fetch the files.
        obtain: One sentence on where the files come from.
        label_names: Of the labels 0, 1, ..., where the files do not say them.
        pixels: Of images: what a pixel counts, see `Dataset`.
    """

    name: str
    title: str
    citation: str
    license: str
    measure: Measure
    shape: tuple[int, ...]
    sizes: tuple[int, int, int]
    files: tuple[DataFile, ...]
    downloadable: bool
    obtain: str
    label_names: tuple[str, ...] = ()
    pixels: Pixels = "ink"


def dataset_names() -> tuple[str, ...]:
    """Names that `load_dataset` takes."""
    return tuple(_catalogue())


def describe_dataset(name: str) -> DatasetInfo:
    """Describes a data set without reading it.

    Args:
        name: One of `dataset_names()`.

    Returns:
        Its title, citation, licence, measure, sizes and files.

    Raises:
        ValueError: If there is no such data set; names those there are and the nearest one.

    Example:
        >>> describe_dataset("digits").shape
        (8, 8)
    """
    known = _catalogue()
    if name in known:
        return known[name]
    plain = str(name).lower().replace("-", "_").replace(" ", "_")
    nearest = difflib.get_close_matches(plain, known, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"no data set {name!r}; there are {', '.join(known)}.{hint}")


@functools.cache
def _catalogue() -> dict[str, DatasetInfo]:
    table = resources.files("pyro_vae.data").joinpath("catalogue.toml").read_text(encoding="utf-8")
    return {name: _read_info(name, row) for name, row in tomllib.loads(table).items()}


def _read_info(name: str, row: dict[str, Any]) -> DatasetInfo:
    files = tuple(DataFile(**file) for file in row.pop("files", ()))
    plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}
    return DatasetInfo(name=name, files=files, **plain)
