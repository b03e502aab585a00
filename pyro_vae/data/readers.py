"""Readers: a folder whose files were checked -> the tensors of a `Dataset`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.catalogue import describe_dataset
from pyro_vae.data.files import load_frey

__all__ = ["READERS"]


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
    return {**parts, "label_names": describe_dataset("digits").label_names}


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
    return _read_idx(folder / "MNIST" / "raw", describe_dataset("mnist").label_names)


def _read_fashion_mnist(folder: Path) -> dict[str, Any]:
    return _read_idx(folder / "FashionMNIST" / "raw", describe_dataset("fashion_mnist").label_names)


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


def _read_frey_face(folder: Path) -> dict[str, Any]:
    frames = _grey(load_frey(folder / "frey_rawface.mat").T, 255)
    # Blocks of the usual sizes; the validation block keeps test frames away from training frames.
    train, validation, test = (part.clone() for part in frames.split([1565, 200, 200]))
    return {"train": train, "validation": validation, "test": test}


def _read_faithful(folder: Path) -> dict[str, Any]:
    table = np.loadtxt(folder / "faithful.csv", delimiter=",", skiprows=1, dtype=np.float32)
    return {"train": torch.from_numpy(table), "test": torch.empty(0, 2, dtype=torch.float32)}


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "digits": _read_digits,
    "iris": _read_iris,
    "mnist": _read_mnist,
    "fashion_mnist": _read_fashion_mnist,
    "binarized_mnist": _read_binarized_mnist,
    "omniglot": _read_omniglot,
    "frey_face": _read_frey_face,
    "faithful": _read_faithful,
}
"""By the name of the data set: a folder -> what a `Dataset` holds."""
