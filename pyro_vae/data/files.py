"""The files of a data set: where they lie, whether they are sound, how to get them."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.data.catalogue import DataFile, DatasetInfo

__all__ = [
    "DatasetError",
    "fetch_missing",
    "file_status",
    "find_folder",
    "load_frey",
    "require_files",
    "sha256_of_arrays",
]

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


class DatasetError(RuntimeError):
    """A data set's file is missing, damaged or could not be fetched; the text says what to do."""


def sha256_of_arrays(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """Of named arrays: names, types, shapes and contents, in this order."""
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
                return sha256_of_arrays((key, archive[key]) for key in sorted(archive.files))
        return sha256_of_arrays([("ff", load_frey(path))])
    except Exception:  # a crafted archive makes its readers raise nearly anything
        return None


def load_frey(path: Path) -> np.ndarray:
    """The frames of a MATLAB file, pixels x frames."""
    from scipy.io import loadmat

    # Takes the one array and nothing else, since a .mat file may hold objects of any kind.
    return loadmat(path, appendmat=False, variable_names=["ff"])["ff"]


def find_folder(root: str | os.PathLike[str] | None, create: bool = False) -> tuple[Path, str]:
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
            f"{folder}, {whence}, is not a folder: name the one that holds the data files"
        )
    return folder, whence


def file_status(file: DataFile, folder: Path) -> str:
    """One of "ok", "missing", "wrong size", "wrong sha256" and "unreadable"."""
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


def require_files(info: DatasetInfo, folder: Path, whence: str) -> None:
    """Raises a `DatasetError` that says what to do, unless every file is as it should be."""
    for file in info.files:
        status = file_status(file, folder)
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
            f"{info.obtain}"
        )


def fetch_missing(info: DatasetInfo, folder: Path) -> None:
    """Downloads what is missing, checks it, and only then gives it its name in the folder."""
    missing = [file for file in info.files if file_status(file, folder) == "missing"]
    if not missing:
        return
    if info.name not in _FETCHERS:
        raise DatasetError(
            f"file {missing[0].path} of data set {info.name!r} cannot be downloaded to "
            f"{folder}: {info.obtain}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as name:
            scratch = Path(name)
            _FETCHERS[info.name](scratch)
            for file in missing:
                status = file_status(file, scratch)
                if status != "ok":
                    raise DatasetError(
                        f"file {file.path} of data set {info.name!r} came from the network with "
                        f"fault '{status}' and was not kept: try again later, or copy it to "
                        f"{folder} by hand"
                    )
                (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(scratch / file.path, folder / file.path)
    except DatasetError:
        raise
    except Exception as error:  # whatever the network, the disk or a downloader raises
        raise DatasetError(
            f"data set {info.name!r} could not be downloaded to {folder} ({error}): check the "
            "network and the folder, or copy its files there by hand"
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


_FETCHERS: dict[str, Callable[[Path], None]] = {
    "mnist": _fetch_mnist,
    "fashion_mnist": _fetch_fashion_mnist,
    "binarized_mnist": _fetch_binarized_mnist,
    "faithful": _fetch_faithful,
}
