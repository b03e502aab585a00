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
import difflib
import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

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

Measure = Literal["binary", "grey", "real", "counts"]
_BINARIZATIONS = ("dynamic", "static", "threshold")


class DatasetError(RuntimeError):
    """A data set's file is missing, damaged or could not be fetched; the text says what to do."""


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

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise ValueError(f"measure must be one of {get_args(Measure)}, not {self.measure!r}.")
        for part, x in self._parts():
            if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != self.train.shape[1]:
                raise ValueError(
                    f"{part} of data set {self.name!r} must be float32 of shape [N, D] with the "
                    f"D of train, not {x.dtype} of shape {list(x.shape)}."
                )
        for part, x, labels in (
            ("train", self.train, self.train_labels),
            ("test", self.test, self.test_labels),
        ):
            if labels is not None and (labels.dtype != torch.int64 or labels.shape != x.shape[:1]):
                raise ValueError(
                    f"{part}_labels of data set {self.name!r} must be int64 of shape "
                    f"[{len(x)}], not {labels.dtype} of shape {list(labels.shape)}."
                )
        if self.image_shape is not None and math.prod(self.image_shape) != self.train.shape[1]:
            raise ValueError(
                f"image_shape {self.image_shape} of data set {self.name!r} does not have the "
                f"{self.train.shape[1]} pixels of its rows."
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
            (static); Burda, Grosse and Salakhutdinov (2015), Importance weighted autoencoders,
            section 5 (dynamic).
        """
        _check_binarization(self.name, self.measure, method, generator)
        if method is None:
            return self
        for part, x in self._parts():
            if not bool(((x >= 0) & (x <= 1)).all()):  # written so that nan fails too
                raise ValueError(
                    f"{part} of data set {self.name!r} has values outside [0, 1]: divide grey "
                    "levels by their maximum before binarize()."
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
        return _sha256_of((part, x.detach().cpu().numpy()) for part, x in present)

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


def dataset_names() -> tuple[str, ...]:
    """Names that `load_dataset` takes."""
    return tuple(_CATALOGUE)


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
    return _entry(name).info


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
    folder, _ = _find_folder(root)
    return [(file.path, _status(file, folder)) for file in info.files]


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
    entry = _entry(name)
    info = entry.info
    _check_binarization(info.name, info.measure, binarize, generator)
    folder = Path()
    if info.files:
        folder, whence = _find_folder(root, create=download)
        if download:
            _fetch_missing(entry, folder)
        _require_files(info, folder, whence)
    try:
        arrays = entry.read(folder)
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
        **arrays,
    )
    return dataset.binarize(binarize, generator)


# Binarisation


def _check_binarization(
    name: str, measure: Measure, method: str | None, generator: torch.Generator | None
) -> None:
    """Refuses what cannot be done, before any file is read."""
    if method is not None and method not in _BINARIZATIONS:
        raise ValueError(f"binarize must be one of {_BINARIZATIONS} or None, not {method!r}.")
    if method is not None and measure == "binary":
        raise ValueError(f"data set {name!r} is already binary: leave out binarize.")
    if method is not None and measure != "grey":
        raise ValueError(
            f"data set {name!r} is of measure {measure!r}: only grey levels in [0, 1] can be "
            "binarised."
        )
    draws = method in ("dynamic", "static")
    if draws and generator is None:
        raise ValueError(
            f"binarize={method!r} draws pixels: pass generator=torch.Generator().manual_seed(0)."
        )
    if generator is not None and not draws:
        raise ValueError(
            f"binarize={method!r} draws nothing: leave out the generator, or choose 'dynamic' or "
            "'static'."
        )


def _draw_pixels(
    x: Float32[Tensor, "batch features"], generator: torch.Generator
) -> Float32[Tensor, "batch features"]:
    return torch.bernoulli(x, generator=generator)


# Hashes


def _sha256_of(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays:
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _contents_sha256(path: Path) -> str | None:
    """Hashes the arrays in an .npz or .mat file; None if it holds no such thing."""
    try:
        if path.suffix == ".npz":
            # np.load leaves a file that it opened itself open when the archive is damaged.
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
                return _sha256_of((key, archive[key]) for key in sorted(archive.files))
        return _sha256_of([("ff", _load_frey(path))])
    except Exception:  # a crafted archive makes its readers raise nearly anything
        return None


# Files


def _entry(name: str) -> "_Entry":
    if name in _CATALOGUE:
        return _CATALOGUE[name]
    plain = str(name).lower().replace("-", "_").replace(" ", "_")
    nearest = difflib.get_close_matches(plain, _CATALOGUE, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"no data set {name!r}; there are {', '.join(_CATALOGUE)}.{hint}")


def _find_folder(root: str | os.PathLike[str] | None, create: bool = False) -> tuple[Path, str]:
    """The data folder, and in words who chose it; makes nothing."""
    chosen = os.environ.get("PYRO_VAE_DATA")
    if root is not None:
        folder, whence = Path(os.path.expanduser(root)), "given as root"
    elif chosen:
        folder, whence = Path(os.path.expanduser(chosen)), "given by $PYRO_VAE_DATA"
    else:
        import pooch

        whence = "the user's cache folder, since neither root nor $PYRO_VAE_DATA is set"
        return Path(pooch.os_cache("pyro_vae")), whence
    if not os.path.isdir(folder) and (os.path.exists(folder) or not create):
        raise DatasetError(
            f"{folder}, {whence}, is not a folder: name the one that holds the data files."
        )
    return folder, whence


def _status(file: DataFile, folder: Path) -> str:
    path = folder / file.path
    try:
        if not path.is_file():
            return "missing"
        size = path.stat().st_size
        if size == file.bytes:
            with path.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256:
                    return "ok"
    except OSError:
        return "unreadable"
    # Unknown bytes are parsed only where they may be a copy written by another program, and only
    # up to a size that no such copy exceeds.
    if file.contents_sha256 is not None and size <= 8 * file.bytes:
        if _contents_sha256(path) == file.contents_sha256:
            return "ok"
    return "wrong sha256" if size == file.bytes else "wrong size"


def _require_files(info: DatasetInfo, folder: Path, whence: str) -> None:
    for file in info.files:
        status = _status(file, folder)
        if status == "ok":
            continue
        again = "pass download=True" if info.downloadable else "put a sound copy there"
        if status == "missing":
            fault, remedy = "is missing", f"{again}, or name the folder that has it"
        elif status == "unreadable":
            fault, remedy = "cannot be opened", "change its permissions"
        else:
            fault = f"is damaged ({status}; {file.bytes} bytes with sha256 {file.sha256} expected)"
            remedy = f"delete it and {again}"
        raise DatasetError(
            f"file {file.path} of data set {info.name!r} {fault} in {folder} ({whence}): {remedy}; "
            f"{info.obtain}."
        )


# Downloads


def _fetch_missing(entry: "_Entry", folder: Path) -> None:
    """Downloads what is missing, checks it, and only then gives it its name in the folder."""
    info = entry.info
    missing = [file for file in info.files if _status(file, folder) == "missing"]
    if not missing:
        return
    if entry.fetch is None:
        raise DatasetError(
            f"file {missing[0].path} of data set {info.name!r} cannot be downloaded to "
            f"{folder}: {info.obtain}."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as name:
            scratch = Path(name)
            entry.fetch(scratch)
            for file in missing:
                status = _status(file, scratch)
                if status != "ok":
                    raise DatasetError(
                        f"file {file.path} of data set {info.name!r} came from the network with "
                        f"fault '{status}' and was not kept: try again later, or copy it to "
                        f"{folder} by hand."
                    )
                (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(scratch / file.path, folder / file.path)
    except DatasetError:
        raise
    except Exception as error:  # whatever the network, the disk or a downloader raises
        raise DatasetError(
            f"data set {info.name!r} could not be downloaded to {folder} ({error}): check the "
            "network and the folder, or copy its files there by hand."
        ) from error


def _fetch_mnist(scratch: Path) -> None:
    import torchvision

    torchvision.datasets.MNIST(root=scratch, download=True)


def _fetch_fashion_mnist(scratch: Path) -> None:
    import torchvision

    torchvision.datasets.FashionMNIST(root=scratch, download=True)


def _fetch_binarized_mnist(scratch: Path) -> None:
    """Packs Larochelle's text files (a zero or one and a separator a pixel) into bits."""
    import pooch

    packed: dict[str, Any] = {}
    for part, known_hash in _AMAT_SHA256.items():
        name = f"binarized_mnist_{part}.amat"
        text = Path(pooch.retrieve(_AMAT_URL + name, known_hash, fname=name, path=scratch))
        pixels = np.frombuffer(text.read_bytes(), np.uint8)[::2].reshape(-1, 784) == ord("1")
        packed[part] = np.packbits(pixels, axis=1)
    np.savez_compressed(scratch / "binarized_mnist.npz", **packed)


def _fetch_faithful(scratch: Path) -> None:
    """Takes R's table without its column of row numbers; the result has a known sha256."""
    import pooch

    name = "faithful_with_row_numbers.csv"
    table = Path(pooch.retrieve(_FAITHFUL_URL, None, fname=name, path=scratch))
    rows = [line.partition(",")[2] for line in table.read_text(encoding="ascii").splitlines()]
    (scratch / "faithful.csv").write_bytes("".join(f"{row}\n" for row in rows).encode())


# Readers: a folder whose files were checked -> fields of `Dataset`


def _grey(images: np.ndarray | Tensor, maximum: int) -> Tensor:
    return torch.as_tensor(images).flatten(1).to(torch.float32).div_(maximum)


def _split_by_class(x: Tensor, labels: Tensor) -> dict[str, Any]:
    """Every fifth row, counted through the rows ordered by class, goes to test: stratified."""
    test = torch.zeros(len(x), dtype=torch.bool)
    test[torch.argsort(labels, stable=True)[::5]] = True
    return {
        "train": x[~test],
        "train_labels": labels[~test],
        "test": x[test],
        "test_labels": labels[test],
    }


def _read_digits(_: Path) -> dict[str, Any]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    parts = _split_by_class(_grey(images, 16), torch.tensor(labels, dtype=torch.int64))
    return {**parts, "label_names": _NUMERALS}


def _read_iris(_: Path) -> dict[str, Any]:
    from sklearn.datasets import load_iris

    iris = load_iris()
    x = torch.tensor(iris.data, dtype=torch.float32)
    parts = _split_by_class(x, torch.tensor(iris.target, dtype=torch.int64))
    return {**parts, "label_names": tuple(str(name) for name in iris.target_names)}


def _read_idx(raw: Path, label_names: tuple[str, ...]) -> dict[str, Any]:
    # The functions rather than the classes: those would prefer a stray `processed` folder, which
    # nobody checked, to the files.
    from torchvision.datasets.mnist import read_image_file, read_label_file

    return {
        "train": _grey(read_image_file(str(raw / "train-images-idx3-ubyte")), 255),
        "train_labels": read_label_file(str(raw / "train-labels-idx1-ubyte")),
        "test": _grey(read_image_file(str(raw / "t10k-images-idx3-ubyte")), 255),
        "test_labels": read_label_file(str(raw / "t10k-labels-idx1-ubyte")),
        "label_names": label_names,
    }


def _read_mnist(folder: Path) -> dict[str, Any]:
    return _read_idx(folder / "MNIST" / "raw", _NUMERALS)


def _read_fashion_mnist(folder: Path) -> dict[str, Any]:
    return _read_idx(folder / "FashionMNIST" / "raw", _GARMENTS)


def _read_binarized_mnist(folder: Path) -> dict[str, Any]:
    with np.load(folder / "binarized_mnist.npz", allow_pickle=False) as packed:
        parts = {part: np.unpackbits(packed[part], axis=1) for part in ("train", "valid", "test")}
    return {
        "train": torch.from_numpy(parts["train"]).to(torch.float32),
        "validation": torch.from_numpy(parts["valid"]).to(torch.float32),
        "test": torch.from_numpy(parts["test"]).to(torch.float32),
        "binarization": "static",
    }


def _read_omniglot(folder: Path) -> dict[str, Any]:
    with np.load(folder / "omniglot_28x28.npz", allow_pickle=False) as archive:
        background = torch.from_numpy(archive["background"])
        x = _grey(archive["images"], 255)
        labels = torch.from_numpy(archive["alphabet"]).to(torch.int64)
        names = tuple(str(name) for name in archive["alphabet_names"])
    return {
        "train": x[background],
        "train_labels": labels[background],
        "test": x[~background],
        "test_labels": labels[~background],
        "label_names": names,
    }


def _load_frey(path: Path) -> np.ndarray:
    from scipy.io import loadmat

    # Takes the one array and nothing else, since a .mat file may hold objects of any kind.
    return loadmat(path, appendmat=False, variable_names=["ff"])["ff"]


def _read_frey_face(folder: Path) -> dict[str, Any]:
    frames = _grey(_load_frey(folder / "frey_rawface.mat").T, 255)
    # Blocks of the usual sizes; the validation block keeps test frames away from training frames.
    train, validation, test = (part.clone() for part in frames.split([1565, 200, 200]))
    return {"train": train, "validation": validation, "test": test}


def _read_faithful(folder: Path) -> dict[str, Any]:
    table = np.loadtxt(folder / "faithful.csv", delimiter=",", skiprows=1, dtype=np.float32)
    return {"train": torch.from_numpy(table), "test": torch.empty(0, 2, dtype=torch.float32)}


# The catalogue


@dataclass(frozen=True)
class _Entry:
    info: DatasetInfo
    read: Callable[[Path], dict[str, Any]]
    fetch: Callable[[Path], None] | None = None


_NUMERALS = tuple("0123456789")
_GARMENTS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_AMAT_URL = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
_AMAT_SHA256 = {
    "train": "sha256:ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    "valid": "sha256:1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
    "test": "sha256:e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
}
_FAITHFUL_URL = (
    "https://raw.githubusercontent.com/vincentarelbundock/Rdatasets/"
    "cc03c29690889dbe83089f5206e2422db8c3f71f/csv/datasets/faithful.csv"
)


def _idx_files(folder: str, *sha256: str) -> tuple[DataFile, ...]:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    sizes = (47040016, 60008, 7840016, 10008)
    return tuple(
        DataFile(f"{folder}/raw/{name}-ubyte", size, digest)
        for name, size, digest in zip(names, sizes, sha256, strict=True)
    )


_ENTRIES = (
    _Entry(
        DatasetInfo(
            name="digits",
            title="Optical recognition of handwritten digits (the UCI test set)",
            citation=(
                "E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine "
                "Learning Repository, 1998"
            ),
            license="CC BY 4.0",
            measure="grey",
            shape=(8, 8),
            sizes=(1437, 0, 360),
            files=(),
            downloadable=False,
            obtain="it comes with scikit-learn",
        ),
        _read_digits,
    ),
    _Entry(
        DatasetInfo(
            name="iris",
            title="Sepals and petals of three species of iris, in centimetres",
            citation=(
                "R. A. Fisher, The use of multiple measurements in taxonomic problems, Annals of "
                "Eugenics 7(2), 1936"
            ),
            license="CC BY 4.0",
            measure="real",
            shape=(4,),
            sizes=(120, 0, 30),
            files=(),
            downloadable=False,
            obtain="it comes with scikit-learn",
        ),
        _read_iris,
    ),
    _Entry(
        DatasetInfo(
            name="mnist",
            title="MNIST handwritten digits",
            citation=(
                "Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-based learning applied to "
                "document recognition, Proc. IEEE 86(11), 1998"
            ),
            license="usually given as CC BY-SA 3.0 (Y. LeCun and C. Cortes hold the copyright)",
            measure="grey",
            shape=(28, 28),
            sizes=(60000, 0, 10000),
            files=_idx_files(
                "MNIST",
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
            downloadable=True,
            obtain="torchvision.datasets.MNIST makes the same uncompressed files",
        ),
        _read_mnist,
        _fetch_mnist,
    ),
    _Entry(
        DatasetInfo(
            name="fashion_mnist",
            title="Fashion-MNIST, Zalando's article images",
            citation=(
                "H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST: a novel image dataset for "
                "benchmarking machine learning algorithms, arXiv:1708.07747, 2017"
            ),
            license="MIT (Copyright 2017 Zalando SE)",
            measure="grey",
            shape=(28, 28),
            sizes=(60000, 0, 10000),
            files=_idx_files(
                "FashionMNIST",
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            ),
            downloadable=True,
            obtain="torchvision.datasets.FashionMNIST makes the same uncompressed files",
        ),
        _read_fashion_mnist,
        _fetch_fashion_mnist,
    ),
    _Entry(
        DatasetInfo(
            name="binarized_mnist",
            title="MNIST with the fixed binarization of published log-likelihoods",
            citation=(
                "R. Salakhutdinov and I. Murray, On the quantitative analysis of deep belief "
                "networks, ICML 2008; distributed by H. Larochelle (H. Larochelle and I. Murray, "
                "The neural autoregressive distribution estimator, AISTATS 2011)"
            ),
            license="none stated; derived from MNIST",
            measure="binary",
            shape=(28, 28),
            sizes=(50000, 10000, 10000),
            files=(
                DataFile(
                    "binarized_mnist.npz",
                    2295919,
                    "50de2c8299a5a297789293ab2c30f6fc3cb8c359a15e5e88d5501aa18ebb8fa5",
                    contents_sha256="b766eb5657d7fe2747e950581d5fb775e250f96c44fd422d677dd9a178c7c30d",
                ),
            ),
            downloadable=True,
            obtain=(
                "it holds H. Larochelle's binarized_mnist_{train,valid,test}.amat with 8 pixels "
                "packed to a byte (numpy.packbits), arrays train, valid and test"
            ),
        ),
        _read_binarized_mnist,
        _fetch_binarized_mnist,
    ),
    _Entry(
        DatasetInfo(
            name="omniglot",
            title="Omniglot reduced to 28 x 28 (not the reduction and split of the IWAE paper)",
            citation=(
                "B. M. Lake, R. Salakhutdinov and J. B. Tenenbaum, Human-level concept learning "
                "through probabilistic program induction, Science 350(6266), 2015"
            ),
            license="MIT (brendenlake/omniglot)",
            measure="grey",
            shape=(28, 28),
            sizes=(19280, 0, 13180),
            files=(
                DataFile(
                    "omniglot_28x28.npz",
                    4141588,
                    "2ce7f6a5de136745eccc8b7b13ef30a1ab13e7e6a42348fb7bd833f358a0b221",
                    contents_sha256="8be525b493e919c0fa66421db30eb05c39467cbb2b097872874cd366e2724227",
                ),
            ),
            downloadable=False,
            obtain=(
                "this file has no public address, so copy it from where you have it, or make it "
                "from the 105 x 105 drawings of github.com/brendenlake/omniglot by exact area "
                "averaging with ink = 255 (arrays images, alphabet, alphabet_names, character, "
                "drawer, background)"
            ),
        ),
        _read_omniglot,
    ),
    _Entry(
        DatasetInfo(
            name="frey_face",
            title="Frey Face, consecutive video frames of one face",
            citation=(
                "B. Frey, Frey Face, from S. Roweis's data page; used by D. P. Kingma and M. "
                "Welling, Auto-encoding variational Bayes, arXiv:1312.6114, 2013"
            ),
            license="none stated",
            measure="grey",
            shape=(28, 20),
            sizes=(1565, 200, 200),
            files=(
                DataFile(
                    "frey_rawface.mat",
                    996854,
                    "2db3139f40a5e5957c1f2c159750f7977d466bc1c0362f253ae52d076fb5c266",
                    contents_sha256="a0d8ea5eae063ab3dd1cd749d1471e3a1768f516757dcbff1d75cfbc3d721ab3",
                ),
            ),
            downloadable=False,
            obtain=(
                "this file has no public address, but the original frey_rawface.mat of S. Roweis's "
                "data page (cs.nyu.edu/~roweis/data.html) does as well, and so does any MATLAB 5 "
                "file of that name with the frames of github.com/jmtomczak/vae_vampprior as a "
                "uint8 array ff of shape 560 x 1965"
            ),
        ),
        _read_frey_face,
    ),
    _Entry(
        DatasetInfo(
            name="faithful",
            title="Old Faithful: length of an eruption and waiting time to the next, in minutes",
            citation=(
                "W. Härdle, Smoothing Techniques with Implementation in S, Springer, 1991; R's "
                "data set faithful"
            ),
            license="GPL-2 or GPL-3 (R)",
            measure="real",
            shape=(2,),
            sizes=(272, 0, 0),
            files=(
                DataFile(
                    "faithful.csv",
                    2271,
                    "d40b983752ab7ec0b15b740089c3ca7b7b59d0c7433a029a1714d134de1e8d14",
                ),
            ),
            downloadable=True,
            obtain=(
                "it is csv/datasets/faithful.csv of github.com/vincentarelbundock/Rdatasets "
                "without the column of row numbers"
            ),
        ),
        _read_faithful,
        _fetch_faithful,
    ),
)
_CATALOGUE = {entry.info.name: entry for entry in _ENTRIES}
