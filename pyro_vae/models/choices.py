"""A model for a data set, chosen by names: what there is, what fits the data, what goes together.

A part is a name or a mapping of a name and arguments; `models.parts` writes it in one word.
"""

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.data import Dataset
from pyro_vae.models.autoencoder import Autoencoder, make_kind
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.models.parts import (
    Part,
    VampPrior,
    make_checked,
    make_likelihood,
    make_network,
    make_posterior,
    make_prior,
    name_of,
)
from pyro_vae.models.vae import VAE, TwoLayerVAE

__all__ = [
    "AUTOENCODERS",
    "CLASSES",
    "MODELS",
    "ModelSpec",
    "build_model",
    "choose_binarization",
    "choose_likelihood",
    "data_pseudo_inputs",
    "find_levels",
    "model_name",
    "on_levels",
]

AUTOENCODERS = ("undercomplete", "sparse", "denoising", "contractive")
"""The kinds of autoencoder, whose guide is a point."""

MODELS = ("vae", "two_layer", *AUTOENCODERS)
"""What `build_model` knows; the arguments of "two_layer" are those of its upper layer."""

CLASSES: Mapping[str, type[nn.Module]] = MappingProxyType(
    {
        "VAE": VAE,
        "TwoLayerVAE": TwoLayerVAE,
        "Autoencoder": Autoencoder,
        "LinearGaussian": LinearGaussian,
    }
)
"""The classes that a run folder may name."""

_LEVELS = ("discretized_logistic", "categorical")
_LIKELIHOODS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {  # by measure; the first is the default
        "binary": ("bernoulli",),
        "grey": ("continuous_bernoulli", "gaussian", *_LEVELS),
        "real": ("gaussian",),
        "counts": _LEVELS,
    }
)
_FARTHEST, _HALVINGS = 200.0, 60  # of decoder outputs: where a mean is looked for, and how long
_MOST_LEVELS = 256
_PROBED = 1000  # rows in which a grid is looked for before all are checked


# --- what fits the data ---------------------------------------------------------------------------


def choose_binarization(measure: str, likelihood: Part | None, pixels: str = "ink") -> str | None:
    """How to binarise where nobody says: dynamically, if pixels are grey and wanted binary.

    Args:
        measure: That of the data as loaded.
        likelihood: The likelihood asked for, or None. Grey pixels are binarised for
            `"bernoulli"`, and left grey for other ones.
        pixels: What the pixels are, see `Dataset`. Without a likelihood ink is binarised; grey
            levels of a photograph are no probabilities of ink, and stay.
    """
    wanted = pixels == "ink" if likelihood is None else name_of(likelihood) == "bernoulli"
    return "dynamic" if measure == "grey" and wanted else None


def choose_likelihood(measure: str, likelihood: Part | None = None, pixels: str = "ink") -> Part:
    """The likelihood for data of a measure: the one asked for if it fits, else the usual one.

    Args:
        measure: That of the data, after binarisation.
        likelihood: The one asked for, or None.
        pixels: What the pixels are, see `Dataset`: grey photographs get a likelihood of their grey
            levels.

    Raises:
        ValueError: If the likelihood does not fit the measure; says which does.

    Example:
        >>> choose_likelihood("grey")
        'continuous_bernoulli'
    """
    fitting = _LIKELIHOODS.get(measure, ())
    if likelihood is None:
        return _LEVELS[0] if (measure, pixels) == ("grey", "light") else fitting[0]
    if name_of(likelihood) in fitting:
        return likelihood
    make_checked("likelihood", make_likelihood, likelihood)  # an unknown name is another fault
    way_out = _either(fitting)
    name = name_of(likelihood)
    binarise = ", or binarise the data" if (measure, name) == ("grey", "bernoulli") else ""
    grey = ", or leave them grey" if measure == "binary" else ""
    raise ValueError(
        f"a {name} likelihood on {measure} data is not a probability or density of these data: "
        f"use {way_out}{binarise}{grey}"
    )


def on_levels(dataset: Dataset, likelihood: Part) -> tuple[Dataset, Part]:
    """The data as a likelihood takes them: as counts, if it gives grey levels probabilities.

    Args:
        dataset: The data.
        likelihood: From `choose_likelihood`.

    Returns:
        The data set, of measure "counts" where the likelihood is one of grey levels, and the
        likelihood with the number of levels that these data have, unless it says another.

    Raises:
        ValueError: If the data are not on a grid, or not on the one that was asked for.
    """
    if name_of(likelihood) not in _LEVELS:
        return dataset, likelihood
    asked = {} if isinstance(likelihood, str) else dict(likelihood)
    part = {"name": name_of(likelihood), **asked}
    if "levels" not in part:
        part["levels"] = find_levels(dataset)
    made = make_checked("likelihood", make_likelihood, part)
    for x in _tensors(dataset):
        made.check(x)
    return dataclasses.replace(dataset, measure="counts"), part


def find_levels(dataset: Dataset) -> int:
    """The number L of grey levels of data: the least for which all are k / (L - 1).

    Raises:
        ValueError: If there is no such number up to 256.

    Example:
        >>> from pyro_vae.data.datasets import load_dataset
        >>> find_levels(load_dataset("digits"))
        17
    """
    values = dataset.train[:_PROBED].unique().double()
    for levels in range(2, _MOST_LEVELS + 1):
        if _are_on_grid(values, levels) and all(_are_on_grid(x, levels) for x in _tensors(dataset)):
            return levels
    raise ValueError(
        f"the data set {dataset.name!r} has no grid of up to {_MOST_LEVELS} grey levels k / (L - 1)"
        f" in [0, 1]: use {_either(_LIKELIHOODS['grey'][:2])}"
    )


def _are_on_grid(x: Tensor, levels: int) -> bool:
    try:
        make_likelihood({"name": "categorical", "levels": levels}).check(x)
    except ValueError:
        return False
    return True


def _tensors(dataset: Dataset) -> list[Tensor]:
    parts = (dataset.train, dataset.validation, dataset.test)
    return [x for x in parts if x is not None and len(x)]


def _either(names: Sequence[str]) -> str:
    *first, last = map(repr, names)
    return f"{', '.join(first)} or {last}" if first else last


# --- models ---------------------------------------------------------------------------------------


def model_name(model: Part) -> str:
    """The name of a model.

    Raises:
        ValueError: If there is none of that name; says which there are.
    """
    name = name_of(model)
    if name not in MODELS:
        nearest = difflib.get_close_matches(name, MODELS, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"no model {name!r}; there are {', '.join(MODELS)}.{hint}")
    return name


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Which model, of which parts; a part is a name, or a mapping of a name and arguments.

    Attributes:
        model: One of `MODELS`: a `VAE`, a `TwoLayerVAE`, or an `Autoencoder` of that kind. A
            mapping may have the arguments of the kind, or, for "two_layer", `upper_dim` and
            `upper_hidden`; without them the upper layer has half of everything, as Burda et al.'s
            has.
        latent_dim: Number of latents (or codes) of a datum; with two layers, of the lower one.
        hidden: Sizes of the encoder's hidden layers; the decoder has them in reverse order.
        likelihood: None for the one that suits the data's measure. A decoder of binary or grey
            pixels starts at the mean of the training data (with "conv" it does not).
        prior: That of the latents; None for a standard normal, or an autoencoder's own.
        posterior: None for a diagonal one; an autoencoder has none.
        network: None for perceptrons; a convolutional one gets the data's picture shape.
        activation: As for `VAE`.
    """

    model: Part = "vae"
    latent_dim: int = 20
    hidden: Sequence[int] = (400,)
    likelihood: Part | None = None
    prior: Part | None = None
    posterior: Part | None = None
    network: Part | None = None
    activation: str = "tanh"


def build_model(dataset: Dataset, spec: ModelSpec) -> Any:
    """Builds a model for data from the names of its parts.

    Args:
        dataset: The data, of the measure that `on_levels` gave them.
        spec: Which model.

    Raises:
        ValueError: If a part is unknown, does not fit the data, or cannot stand in this model; says
            what can.
    """
    name, latent_dim, hidden = model_name(spec.model), spec.latent_dim, spec.hidden
    chosen = choose_likelihood(dataset.measure, spec.likelihood, dataset.pixels)
    make_checked("likelihood", make_likelihood, chosen)
    shape: dict[str, Any] = {
        "data_dim": dataset.train.shape[1],
        "likelihood": chosen,
        "activation": spec.activation,
        "network": _network(dataset, spec.network or "mlp"),
    }
    if name in AUTOENCODERS:
        given = [what for what in ("prior", "posterior") if getattr(spec, what)]
        if given:
            raise ValueError(
                f"the {name} autoencoder takes no {given[0]}: its guide is a point, and its kind "
                "says which prior it has. Leave it out, or use the model 'vae'"
            )
        kind = make_checked("autoencoder", make_kind, spec.model)
        return _at_mean(
            Autoencoder(code_dim=latent_dim, hidden=hidden, kind=kind, **shape), dataset
        )
    shape["prior"] = spec.prior or "normal"
    shape["posterior"] = spec.posterior or "diagonal"
    if name == "vae":
        _only(spec.model, ())
        _check_parts(shape, latent_dim, latent_dim, dataset.train.shape[1])
        return _at_mean(VAE(latent_dim=latent_dim, hidden=hidden, **shape), dataset)
    _only(spec.model, ("upper_dim", "upper_hidden"))
    asked = {} if isinstance(spec.model, str) else spec.model
    upper_dim = asked.get("upper_dim", max(latent_dim // 2, 1))
    upper_hidden = asked.get("upper_hidden", [max(size // 2, 1) for size in hidden])
    _check_parts(shape, min(latent_dim, upper_dim), upper_dim, None)
    layers: dict[str, Any] = {
        "latent_dims": (latent_dim, upper_dim),
        "hidden": (hidden, upper_hidden),
    }
    return _at_mean(TwoLayerVAE(**layers, **shape), dataset)


def _at_mean(module: Any, dataset: Dataset) -> Any:
    """Starts a decoder of pixels in [0, 1] at the mean of the data, by its last biases.

    From biases of 0 it is hidden units that learn the background, by the sign that they have at the
    data; where the prior has latents that no datum has, they may have the other sign, and a decoder
    that was trained for a few epochs then draws light on dark.
    """
    last = module.decoder[-1]
    of_pixels = module.likelihood.num_parameters(module.data_dim) == module.data_dim
    if module.likelihood.measure not in ("binary", "grey") or not of_pixels:
        return module
    if not isinstance(last, nn.Linear):  # a convolution's biases are those of whole pictures
        return module
    wanted = dataset.train.mean(0).clamp(0.01, 0.99).to(last.bias)
    low, high = torch.full_like(wanted, -_FARTHEST), torch.full_like(wanted, _FARTHEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = module.likelihood.mean(middle) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    with torch.no_grad():
        last.bias.copy_((low + high) / 2)
    return module


def _network(dataset: Dataset, network: Part) -> Part:
    """The network, with the shape of the pictures if it works on pictures."""
    make_checked("network", make_network, network)
    if name_of(network) != "conv":
        return network
    own = {} if isinstance(network, str) else dict(network)
    shape = own.get("image_shape") or dataset.image_shape
    if shape is None:
        raise ValueError(
            f"the data set {dataset.name!r} has no pictures to convolve: use the network 'mlp' or "
            "'residual', or name the shape, conv:image_shape=ROWS-COLUMNS"
        )
    return {**own, "name": "conv", "image_shape": list(shape)}


def _check_parts(
    parts: Mapping[str, Any], least_dim: int, top_dim: int, data_dim: int | None
) -> None:
    """Finds arguments that no part has before anything is built."""
    make_checked("posterior", lambda part: make_posterior(part, least_dim), parts["posterior"])
    make_checked("prior", lambda part: make_prior(part, top_dim, data_dim=data_dim), parts["prior"])


def _only(model: Part, known: Collection[str]) -> None:
    given = [] if isinstance(model, str) else [key for key in model if key != "name"]
    unknown = [key for key in given if key not in known]
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"the model {name_of(model)!r} has no argument {unknown[0]!r}: {has}")


def data_pseudo_inputs(module: nn.Module, x: Tensor) -> None:
    """Sets the pseudo-inputs of a model's VampPrior, if it has one, to rows of the data.

    Args:
        module: The model.
        x: The training data; rows are drawn from torch's global stream. With fewer rows than
            pseudo-inputs, they stay what they are.
    """
    prior = getattr(module, "prior", None)
    if isinstance(prior, VampPrior) and len(x) >= prior.num_pseudo_inputs:
        prior.initialize(x[torch.randperm(len(x))[: prior.num_pseudo_inputs]])
