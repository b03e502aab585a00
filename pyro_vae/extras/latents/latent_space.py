r"""What lies in a latent space: attributes, what each unit does, and what a code can hold.

Nothing here knows a model: a decoder is any function from (*batch, latent) to (*batch, features),
codes are rows of numbers. Distances along curves are in `paths`, classifiers of codes in `probes`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_vae.data import Seed, as_seed
from pyro_vae.extras.latents.paths import Decoder
from pyro_vae.results import Result, label, make_result, sha256_of

__all__ = [
    "attribute_effect",
    "attribute_vector",
    "compression",
    "kl_from_standard_normal",
    "relative_error",
    "traverse",
    "unit_effects",
]

Map = Callable[[Tensor], Tensor]


def _number(bound: str, description: str) -> dict[str, Any]:
    return label(unit="none", reduction="none", bound=bound, description=description)


# --- attributes -----------------------------------------------------------------------------------


def attribute_vector(
    codes: Float[Tensor, "data latent"], has: Bool[Tensor, " data"]
) -> Float[Tensor, " latent"]:
    """The mean code of the data that have an attribute less that of the data without.

    Raises:
        ValueError: If all or no data have it.

    References:
        Larsen et al. (2016), Autoencoding beyond pixels, arXiv:1512.09300; Hou, Shen,
        Sun & Qiu (2017), Deep feature consistent variational autoencoder, arXiv:1610.00291.

    Example:
        >>> codes = torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, 5.0]])
        >>> attribute_vector(codes, torch.tensor([False, False, True]))
        tensor([4., 4.])
    """
    if not 0 < int(has.sum()) < len(has):
        raise ValueError(
            f"{int(has.sum())} of {len(has)} data have the attribute: a vector needs data with it "
            "and data without"
        )
    return codes[has].mean(0) - codes[~has].mean(0)


@torch.no_grad()
def attribute_effect(
    decoder: Decoder,
    codes: Float[Tensor, "data latent"],
    vector: Float[Tensor, " latent"],
    probability: Callable[[Tensor], Any],
    *,
    strengths: Sequence[float] = (0.0, 0.5, 1.0, 1.5),
    num_controls: int = 20,
    seed: Seed = 0,
) -> Result:
    """Measures what adding a vector to codes does to the pictures they decode to.

    The control adds other vectors in its place, as long as it and with directions drawn from a
    normal of the codes' covariance: they move the codes as far, but not where the attribute lies.

    Args:
        decoder: The decoder.
        codes: Of data without the attribute, at least 2.
        vector: From `attribute_vector`.
        probability: The probability of the attribute in each decoded picture, by a judge that has
            never seen the codes, such as a classifier of pixels.
        strengths: Multiples of the vector that are added.
        num_controls: Other directions; at least 2.
        seed: Seeds their draws; the caller's random state is left alone.

    Returns:
        Over `strength`, without a unit or bound: `probability`, the mean over codes, and `control`,
        that of the other directions, with standard errors `*_se`, over codes and over directions.

    Raises:
        ValueError: If there are too few codes or directions.
    """
    seed = as_seed(seed)
    if len(codes) < 2 or num_controls < 2:
        raise ValueError(
            f"{len(codes)} codes and {num_controls} controls give no errors: both must be at "
            "least 2"
        )
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_controls, len(codes), generator=generator).to(codes)
    others = noise @ (codes - codes.mean(0))  # normal, with the codes' covariance
    others *= vector.norm() / others.norm(dim=1, keepdim=True)
    columns: dict[str, list[float]] = {name: [] for name in _EFFECTS}
    for strength in strengths:
        found = _judged(decoder, probability, codes + strength * vector)
        controls = torch.stack(
            [_judged(decoder, probability, codes + strength * other).mean() for other in others]
        )
        for name, draws in (("probability", found), ("control", controls)):
            columns[name].append(float(draws.mean()))
            columns[f"{name}_se"].append(float(draws.std()) / math.sqrt(len(draws)))
    return make_result(
        {
            name: ("strength", values, _number("none", _EFFECTS[name]))
            for name, values in columns.items()
        },
        function="attribute_effect",
        config={"num_codes": len(codes), "num_controls": num_controls},
        seed=seed,
        data_sha256=sha256_of(codes, vector),
        coords={"strength": list(strengths)},
    )


_EFFECTS = {
    "probability": "probability of the attribute after adding its vector",
    "probability_se": "over codes",
    "control": "the same after adding vectors of equal length in other directions",
    "control_se": "over directions",
}


def _judged(
    decoder: Decoder, probability: Callable[[Tensor], Any], codes: Float[Tensor, "data latent"]
) -> Float[Tensor, " data"]:
    return torch.as_tensor(probability(decoder(codes))).double()


# --- units ----------------------------------------------------------------------------------------


def traverse(
    decoder: Decoder,
    code: Float[Tensor, " latent"],
    units: Sequence[int],
    values: Float[Tensor, " values"],
) -> Float[Tensor, "units values features"]:
    """Decodes a code with one unit after the other set to the given values."""
    moved = code.repeat(len(units), len(values), 1)
    for row, unit in zip(moved, units, strict=True):
        row[:, unit] = values.to(code)
    return decoder(moved)


@torch.no_grad()
def unit_effects(
    decoder: Decoder, codes: Float[Tensor, "data latent"], *, num_values: int = 16
) -> Result:
    r"""Measures how much each latent unit moves what the decoder makes.

    .. math:: e_i = \Bigl( \mathbb E_{z_{-i}} \operatorname{Var}_{z_i \sim \mathcal N(0, 1)}
                    f_d(z) \Bigr)^{1/2} \quad \text{averaged over the features } d

    with the other units at the codes given. A unit that the decoder ignores has exactly 0. The
    variance is taken by Gauss-Hermite quadrature, which is exact where the decoder is a polynomial
    of the unit of a degree below `num_values`.

    Args:
        decoder: The decoder.
        codes: Where the other units are, such as codes of data; at least 2.
        num_values: Nodes of the quadrature, at least 3.

    Returns:
        Over `unit`, in the data's own units, labelled with no bound: `effect`, a standard
        deviation, with its standard error over codes `effect_se`; `quadrature_error`, by how much
        the rule with one node fewer differs (near kinks and steps of the decoder the two err to
        opposite sides).

    Raises:
        ValueError: If there are too few codes or values.
    """
    if len(codes) < 2 or num_values < 3:
        raise ValueError("unit_effects needs at least 2 codes and 3 values")
    columns: dict[str, list[float]] = {name: [] for name in _UNIT_COLUMNS}
    for unit in range(codes.shape[1]):
        variance = _variance_over_unit(decoder, codes, unit, num_values)
        effect = variance.mean().sqrt()
        other = _variance_over_unit(decoder, codes, unit, num_values - 1).mean().sqrt()
        error = variance.std() / math.sqrt(len(codes))
        columns["effect"].append(float(effect))
        # d sqrt(v) = dv / 2 sqrt(v)
        columns["effect_se"].append(float(error / (2 * effect)) if effect > 0 else 0.0)
        columns["quadrature_error"].append(abs(float(effect - other)))
    return make_result(
        {
            name: ("unit", values, _number("none", _UNIT_COLUMNS[name]))
            for name, values in columns.items()
        },
        function="unit_effects",
        config={"num_codes": len(codes), "num_values": num_values},
        seed=None,
        data_sha256=sha256_of(codes),
        coords={"unit": list(range(codes.shape[1]))},
    )


_UNIT_COLUMNS = {
    "effect": "standard deviation of a feature while this unit is drawn from N(0, 1)",
    "effect_se": "over codes",
    "quadrature_error": "change of the effect with one node fewer",
}


def _variance_over_unit(
    decoder: Decoder, codes: Float[Tensor, "data latent"], unit: int, num_values: int
) -> Float[Tensor, " data"]:
    """The variance of a feature, averaged over features, under N(0, 1) of one unit."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_values)
    moved = codes.repeat(num_values, 1, 1)
    moved[..., unit] = torch.as_tensor(nodes).to(codes)[:, None]
    decoded = decoder(moved).double()
    away = decoded - decoded[num_values // 2]  # exactly 0 where the decoder ignores the unit
    share = torch.as_tensor(weights / weights.sum()).to(away)
    mean = torch.tensordot(share, away, 1)
    return torch.tensordot(share, (away - mean).square(), 1).mean(-1)


# --- what a code holds ----------------------------------------------------------------------------


def relative_error(
    x: Float[Tensor, "data features"], reconstruction: Float[Tensor, "rows columns"]
) -> tuple[float, float]:
    r"""The squared error as a share of the data's own variance, and its standard error.

    .. math:: r = \frac{\sum_n \lVert x_n - \hat x_n \rVert^2}{\sum_n \lVert x_n - \bar x \rVert^2}

    0 is perfect; 1 is as good as sending nothing but the mean of these data; there is no upper end.
    The error is that of a ratio of means, by the delta method, over the draw of the data.

    Raises:
        ValueError: If shapes differ, there are fewer than 2 data, or all are equal.
    """
    if x.shape != reconstruction.shape or len(x) < 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and its reconstruction {tuple(reconstruction.shape)}: "
            "both need the same at least 2 rows"
        )
    x, reconstruction = x.double(), reconstruction.double()
    error = (x - reconstruction).square().sum(1)
    variance = (x - x.mean(0)).square().sum(1)
    if not variance.mean() > 0:
        raise ValueError("all data are equal, so that there is no variance to compare with")
    ratio = error.mean() / variance.mean()
    se = (error - ratio * variance).std() / (variance.mean() * math.sqrt(len(x)))
    return float(ratio), float(se)


@torch.no_grad()
def compression(
    reconstruct: Mapping[str, Map], data: Mapping[str, Float[Tensor, "data features"]]
) -> Result:
    """Measures how well each code holds each distribution, by `relative_error`.

    Args:
        reconstruct: For each code the function from data to their reconstructions.
        data: For each distribution its data, of as many features.

    Returns:
        Over `code` and `distribution`, without a bound: `relative_error`, a pure number, with
        `relative_error_se`, and `squared_error`, the mean over features and data, in squared units
        of the data.

    Raises:
        ValueError: As `relative_error`.
    """
    ratios, errors, squares = [], [], []
    for function in reconstruct.values():
        found = [(x, function(x)) for x in data.values()]
        pairs = [relative_error(x, again) for x, again in found]
        ratios.append([value for value, _ in pairs])
        errors.append([error for _, error in pairs])
        squares.append([float((x - again).double().square().mean()) for x, again in found])
    dims = ("code", "distribution")
    return make_result(
        {
            "relative_error": (
                dims,
                ratios,
                _number("none", "squared error as a share of the data's own variance"),
            ),
            "relative_error_se": (dims, errors, _number("none", "over the draw of the data")),
            "squared_error": (dims, squares, _number("none", "mean squared error of a feature")),
        },
        function="compression",
        config={"num_data": [len(x) for x in data.values()]},
        seed=None,
        data_sha256=sha256_of(*data.values()),
        coords={"code": list(reconstruct), "distribution": list(data)},
    )


# --- from autoencoder to VAE ----------------------------------------------------------------------


def kl_from_standard_normal(codes: Float[Tensor, "data latent"]) -> float:
    r"""KL of the normal with the codes' moments from N(0, I), in nats.

    .. math:: \tfrac12 \bigl( \operatorname{tr} S + m^\top m - d - \log\det S \bigr)

    Of draws from q(z | x), one for each datum, it measures how far codes are from where the
    prior of a VAE expects them; 0 if their first two moments are those of N(0, I).

    Raises:
        ValueError: If there are not more codes than latents.
    """
    count, size = codes.shape
    if count <= size:
        raise ValueError(f"{count} codes of {size} latents have no covariance: give more")
    codes = codes.double()
    mean, covariance = codes.mean(0), codes.T.cov(correction=0).reshape(size, size)
    return float(0.5 * (covariance.trace() + mean @ mean - size - covariance.logdet()))
