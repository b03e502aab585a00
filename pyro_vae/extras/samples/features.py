r"""Feature spaces that generated samples are measured in, each of which says by name what it is.

A Frechet distance, a precision or a recall is a number about a space of features as much as about
the samples: the same samples have other numbers in the pixels, in principal components and in a
classifier's last hidden layer, and none of them is the "FID" of the Inception network. So a space
has a `name` that says what made it and from which data, and a `fingerprint` of its numbers, which
`sample_quality` keeps with its result. Everything is made here, from the data at hand.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from torch.nn import functional

from pyro_vae.data import Seed, as_seed
from pyro_vae.inference.programs import program_scope
from pyro_vae.models.parts import Convolutional, Perceptron
from pyro_vae.results import sha256_of

__all__ = ["FEATURES", "Features", "check_rows", "make_features"]

FEATURES = ("pixels", "pca", "classifier")
"""The kinds of feature spaces that `make_features` knows."""

_CHUNK = 4096  # rows mapped at once; bounds memory
_DIM = {"pca": 32, "classifier": 64}
_BATCH, _STEPS, _RATE = 64, 1500, 2e-3  # of the classifier's training
_HELD_OUT = 0.2


@dataclass(frozen=True, repr=False)
class Features:
    """A map from data to features in which distances are taken; made by `make_features`.

    Attributes:
        kind: One of `FEATURES`.
        name: What the space is, in words: how it was made, its dimension and from which data.
        data_dim: Features of one observation that it takes.
        dim: Features that it gives.
        fingerprint: Hash of the numbers that the map consists of; two spaces with one name and
            different fingerprints are different spaces.
        accuracy: Of the classifier on the labelled data it was not trained on; None for the others.
    """

    kind: str
    name: str
    data_dim: int
    dim: int
    fingerprint: str
    accuracy: float | None = None
    _map: Callable[[Tensor], Tensor] = field(default=lambda rows: rows, compare=False)

    def __call__(self, x: Float[Tensor, "batch data"]) -> Float64[Tensor, "batch features"]:
        """Maps data to features, on the CPU and without gradients.

        Raises:
            ValueError: If the rows are not as long as those the space was made from, or a value is
                not finite.
        """
        rows = check_rows("x", x, data_dim=self.data_dim)
        with torch.no_grad():
            return torch.cat([self._map(part).double() for part in rows.split(_CHUNK)])

    def __repr__(self) -> str:
        return f"Features({self.name})"


def check_rows(
    name: str, x: Float[Tensor, "batch data"], *, minimum: int = 1, data_dim: int | None = None
) -> Float64[Tensor, "batch data"]:
    """Rows on the CPU in float64.

    Raises:
        ValueError: If there are fewer than `minimum` rows, they are not `data_dim` long, or a value
            is not finite.
    """
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, but must be one row a datum: flatten images first"
        )
    if data_dim is not None and x.shape[1] != data_dim:
        raise ValueError(
            f"{name} has {x.shape[1]} features, but {data_dim} are needed: give data of one kind"
        )
    if len(x) < minimum:
        raise ValueError(f"{name} has {len(x)} rows, but at least {minimum} are needed: give more")
    rows = x.detach().to(device="cpu", dtype=torch.float64)
    bad = int((~rows.isfinite()).any(1).sum())
    if bad:
        raise ValueError(
            f"{name} has values that are not finite in {bad} of {len(x)} rows: look where they "
            "come from, or leave those rows out and say so"
        )
    return rows


def make_features(
    kind: str,
    data: Float[Tensor, "batch data"],
    labels: Int[Tensor, " _batch"] | None = None,
    *,
    image_shape: Sequence[int] | None = None,
    dim: int | None = None,
    data_name: str = "the given data",
    seed: Seed = 0,
) -> Features:
    """Makes a feature space from data; no weights are downloaded.

    Args:
        kind: "pixels": the data themselves. "pca": the scores on the first principal components.
            "classifier": the last hidden layer of a small network that was trained to tell the
            labels apart: convolutions of stride 2 for images, a perceptron otherwise.
        data: What the space is made from, shape (batch, data); the training data, as a rule, so
            that samples and held-out data are equally new to it.
        labels: Classes, shape (batch,), whole numbers; needed by, and only used for, "classifier".
        image_shape: (height, width) or (channels, height, width) of the images in the rows, if they
            are images; only used by "classifier".
        dim: Features; 32 for "pca" and 64 for "classifier" if not given (for "pca" fewer where the
            data have fewer), and not to be chosen for "pixels".
        data_name: How the name calls the data, such as "digits' training images".
        seed: Of the classifier: what is held out for its accuracy, how it starts, the order of the
            batches. The caller's random state stays as it is.

    Returns:
        A `Features`, to be called on data.

    Raises:
        ValueError: If the kind is unknown, labels are missing or of another number than the data,
            `dim` is impossible, there are too few data, or a value is not finite.

    Note: The classifier sees what tells the classes apart and may be blind to the rest, and
        principal components see no detail of small variance: take more than one space.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> make_features("pca", x, dim=1, data_name="a cross")
        Features(PCA, 1 component (90.0 % of the variance) of 4 rows of a cross)
    """
    seed = as_seed(seed)
    if kind not in FEATURES:
        raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(map(repr, FEATURES))}")
    if dim is not None and (kind == "pixels" or dim < 1):
        raise ValueError(
            "the pixels' space has the dimension of the data: leave dim out."
            if kind == "pixels"
            else f"dim is {dim}, but must be at least 1."
        )
    rows = check_rows("data", data, minimum=2)
    if kind == "pixels":
        name = f"pixels, the {rows.shape[1]} features of the data as they are"
        return Features(kind, name, rows.shape[1], rows.shape[1], sha256_of(rows[:0]))
    origin = f"{len(rows)} rows of {data_name}"
    if kind == "pca":
        return _principal_components(rows, dim, origin)
    return _classifier(rows, labels, image_shape, dim or _DIM[kind], origin, seed)


def _principal_components(
    rows: Float64[Tensor, "batch data"], dim: int | None, origin: str
) -> Features:
    from sklearn.decomposition import PCA

    most = min(len(rows) - 1, rows.shape[1])
    if dim is not None and dim > most:
        raise ValueError(f"{len(rows)} rows of {rows.shape[1]} features have {most} components")
    size = min(_DIM["pca"], most) if dim is None else dim
    fitted = PCA(size, svd_solver="covariance_eigh").fit(rows.numpy())
    mean, components = torch.as_tensor(fitted.mean_), torch.as_tensor(fitted.components_)
    kept = 100 * float(fitted.explained_variance_ratio_.sum())
    name = f"PCA, {size} component{'s' * (size != 1)} ({kept:.1f} % of the variance) of {origin}"
    fingerprint = sha256_of(mean, components)
    return Features(
        "pca", name, rows.shape[1], size, fingerprint, None, lambda x: (x - mean) @ components.T
    )


def _classifier(
    rows: Float64[Tensor, "batch data"],
    labels: Int[Tensor, " _batch"] | None,
    image_shape: Sequence[int] | None,
    dim: int,
    origin: str,
    seed: int,
) -> Features:
    from sklearn.model_selection import train_test_split

    if labels is None or len(labels) != len(rows):
        raise ValueError(
            "a classifier needs a label for each row: pass labels"
            + ("." if labels is None else f", of which there are {len(labels)} for {len(rows)}.")
        )
    classes, targets = labels.detach().cpu().unique(return_inverse=True)
    smallest = int(targets.bincount().min())
    if len(classes) < 2 or smallest < 5:
        raise ValueError(
            f"a classifier needs two classes of at least 5 rows; there are {len(classes)}, the "
            f"smallest of {smallest}"
        )
    kept, held_out = train_test_split(
        torch.arange(len(rows)), test_size=_HELD_OUT, random_state=seed, stratify=targets.numpy()
    )
    builder = Perceptron() if image_shape is None else Convolutional((16, 32), image_shape)
    mean, scale = rows[kept].mean(), rows[kept].std().clamp_min(torch.finfo().tiny)
    with program_scope(seed):
        torch.set_default_dtype(torch.float32)  # so that the start depends on the seed alone
        torch.set_num_threads(1)  # so does the end; steps this small gain nothing by more
        body = nn.Sequential(builder.encoder(rows.shape[1], (128,), dim, "relu"), nn.ReLU())
        network = nn.Sequential(body, nn.Linear(dim, len(classes)))
        inputs = ((rows - mean) / scale).float()
        _train(network, inputs[kept], targets[kept])
    network.requires_grad_(False).eval()
    found = torch.cat([network(part).argmax(1) for part in inputs[held_out].split(_CHUNK)])
    accuracy = float((found == targets[held_out]).double().mean())
    layers = "perceptron" if image_shape is None else "convolutional network"
    name = (
        f"classifier, the {dim} units of the last hidden layer of a {layers} that tells "
        f"{len(classes)} classes apart, trained on {len(kept)} of {origin}, accuracy "
        f"{accuracy:.3f} on the other {len(held_out)}"
    )
    fingerprint = sha256_of(mean, scale, *body.state_dict().values())
    return Features(
        "classifier",
        name,
        rows.shape[1],
        dim,
        fingerprint,
        accuracy,
        lambda x: body(((x - mean) / scale).float()),
    )


def _train(
    network: nn.Module, inputs: Float[Tensor, "batch data"], targets: Int[Tensor, " batch"]
) -> None:
    """Cross-entropy by Adam under a one-cycle rate."""
    optimizer = torch.optim.Adam(network.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_STEPS)
    epochs = math.ceil(_STEPS * _BATCH / len(inputs)) + 1
    batches = (i for _ in range(epochs) for i in torch.randperm(len(inputs)).split(_BATCH))
    for index in islice(batches, _STEPS):
        optimizer.zero_grad()
        functional.cross_entropy(network(inputs[index]), targets[index]).backward()
        optimizer.step()
        schedule.step()
