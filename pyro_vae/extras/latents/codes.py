r"""What an autoencoder's code does: how sparse it is, and along which directions it moves.

Codes are rows of numbers and an encoder is any differentiable function of rows, as in
`latent_space`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.results import Result, label, make_result, sha256_of

__all__ = ["code_activity", "directional_sensitivity", "local_tangents"]

_ORTHONORMAL = 1e-4


def _number(description: str) -> dict[str, Any]:
    return label(unit="none", reduction="none", bound="none", description=description)


# --- sparsity -------------------------------------------------------------------------------------


@torch.no_grad()
def code_activity(
    codes: Float[Tensor, "data code"],
    *,
    threshold: float | None = None,
    rate: float | None = None,
) -> Result:
    r"""Measures how often and how far each unit of a code is away from zero.

    Args:
        codes: Of some data, such as `autoencoder.encode(x)`.
        threshold: A unit is active where :math:`\lvert h \rvert` exceeds it; None for a tenth of
            the root mean square of all codes, so that the scale of a code does not matter.
        rate: The rate :math:`\lambda` of the Laplace prior (`Sparse.strength`), if there is one:
            codes that follow it have :math:`\mathbb E \lvert h \rvert = 1 / \lambda` and exceed the
            threshold t with probability :math:`e^{-\lambda t}`, the targets in the result.

    Returns:
        Pure numbers, or in units of the code; none is a bound:

        ===================  =====  ================================================================
        name                 dims   meaning
        ===================  =====  ================================================================
        `mean_activation`    unit   mean of abs(h), in units of the code
        `active_share`       unit   share of data for which the unit is active
        `active_units`       datum  share of units that are active
        `hoyer`              datum  0 where all units are equally far from zero, 1 where one alone
                                    is not; nan for a code of zeros
        `threshold`          none   above which a unit is active
        `target_activation`  none   mean of abs(h) under the prior, where a rate is given
        `target_share`       none   share above the threshold under the prior, where a rate is given
        ===================  =====  ================================================================

        The first two have standard errors `*_se`, over data.

    Raises:
        ValueError: If there are fewer than 2 data or 2 units, or a setting is not positive.

    References:
        Olshausen & Field (1996), Emergence of simple-cell receptive field properties by learning a
        sparse code for natural images; Hoyer (2004), Non-negative matrix factorization with
        sparseness constraints, JMLR 5, equation 4.

    Example:
        >>> codes = torch.tensor([[0.0, 3.0], [0.0, -1.0]])
        >>> code_activity(codes).active_share.values.tolist()
        [0.0, 1.0]
    """
    if min(codes.shape) < 2:
        raise ValueError(f"codes must be of 2 data and 2 units or more, not {tuple(codes.shape)}")
    size = codes.detach().double().cpu().abs()
    if threshold is None:
        threshold = max(0.1 * float(size.square().mean().sqrt()), torch.finfo(size.dtype).tiny)
    for name, value in (("threshold", threshold), ("rate", rate)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {value!r}")
    active = (size > threshold).double()
    root = math.sqrt(size.shape[1])
    hoyer = (root - size.sum(1) / size.square().sum(1).sqrt()) / (root - 1)
    error = math.sqrt(len(size))
    columns: dict[str, tuple[Any, Any, str]] = {
        "mean_activation": ("unit", size.mean(0), "mean of |h|"),
        "mean_activation_se": ("unit", size.std(0) / error, "over data"),
        "active_share": ("unit", active.mean(0), "share of data with |h| above the threshold"),
        "active_share_se": ("unit", active.std(0) / error, "over data"),
        "active_units": ("datum", active.mean(1), "share of units with |h| above the threshold"),
        "hoyer": ("datum", hoyer, "sparseness, from 0 to 1"),
        "threshold": ((), threshold, "above which a unit is active"),
    }
    if rate is not None:
        columns["target_activation"] = ((), 1 / rate, "mean of |h| under the prior")
        share = math.exp(-rate * threshold)
        columns["target_share"] = ((), share, "share above the threshold under the prior")
    return make_result(
        {name: (over, values, _number(text)) for name, (over, values, text) in columns.items()},
        function="code_activity",
        config={"threshold": threshold, "rate": rate},
        seed=None,
        data_sha256=sha256_of(codes),
        coords={"unit": list(range(size.shape[1]))},
    )


# --- directions -----------------------------------------------------------------------------------


@torch.no_grad()
def local_tangents(
    x: Float[Tensor, "batch features"],
    data: Float[Tensor, "data features"],
    num_tangents: int,
    *,
    num_neighbours: int = 20,
) -> Float[Tensor, "batch features tangents"]:
    """Orthonormal directions in which the data near each x extend most: local PCA.

    Args:
        x: Where.
        data: The data that outline the manifold; x may be among them.
        num_tangents: The dimension of the manifold.
        num_neighbours: Of each x among the data, more than `num_tangents`.

    Raises:
        ValueError: If there are too few neighbours, data or features for so many directions.

    References:
        Kambhatla & Leen (1997), Dimension reduction by local principal component analysis.
    """
    least, most = num_tangents + 1, len(data)
    if not 1 <= num_tangents < x.shape[1] or not least <= num_neighbours <= most:
        raise ValueError(
            f"{num_tangents} tangents need more features (there are {x.shape[1]}) and from {least} "
            f"to {most} neighbours, not {num_neighbours}"
        )
    nearest = torch.cdist(x, data).topk(num_neighbours, largest=False).indices
    near = data[nearest]
    axes = torch.linalg.svd(near - near.mean(1, keepdim=True), full_matrices=False).Vh
    return axes[:, :num_tangents].mT


def directional_sensitivity(
    network: Callable[[Tensor], Tensor],
    x: Float[Tensor, "batch features"],
    tangents: Float[Tensor, "batch features tangents"],
) -> Result:
    r"""Measures how far a code moves when x moves along the data's manifold, and across it.

    .. math:: s_\parallel^2 = \lVert J T \rVert_F^2 / d, \qquad
              s_\perp^2 = (\lVert J \rVert_F^2 - \lVert J T \rVert_F^2) / (D - d)

    with J the Jacobian of the network at x and T its d tangents: the root mean square length of
    what a unit step becomes, over all directions along and over all across. A contractive
    autoencoder is meant to lose the steps across and to keep those along.

    Args:
        network: Works row by row, such as `autoencoder.encode`, or `autoencoder.reconstruct` for
            the sensitivity of reconstructions.
        x: Where.
        tangents: Orthonormal columns, known or from `local_tangents`; fewer than features.

    Returns:
        Over `datum`, none of them a bound: `along` and `across`, in units of the code for each unit
        of x, and `ratio`, along / across (infinite where nothing across moves the code).

    Raises:
        ValueError: If the tangents are not orthonormal, or leave no direction across.

    References:
        Rifai, Vincent, Muller, Glorot & Bengio (2011), Contractive auto-encoders: explicit
        invariance during feature extraction, section 5.3; Rifai et al. (2011), The manifold tangent
        classifier.

    Example:
        >>> tangent = torch.tensor([[[1.0], [0.0], [0.0]]])
        >>> found = directional_sensitivity(lambda x: x[..., :1], torch.zeros(1, 3), tangent)
        >>> found.along.item(), found.across.item()
        (1.0, 0.0)
    """
    features, count = tangents.shape[1:]
    gram = tangents.mT @ tangents
    if count >= features or not torch.allclose(gram, torch.eye(count).to(gram), atol=_ORTHONORMAL):
        raise ValueError(
            f"tangents must be fewer than the {features} features, and orthonormal columns; pass "
            "torch.linalg.qr(tangents).Q"
        )

    jacobian = _jacobian(network, x).double()
    whole = jacobian.square().sum((-2, -1))
    kept = (jacobian @ tangents.double()).square().sum((-2, -1))
    along = (kept / count).sqrt()
    across = ((whole - kept).clamp_min(0) / (features - count)).sqrt()
    columns = {
        "along": (along, "length of a unit step along the manifold, root mean square"),
        "across": (across, "length of a unit step across the manifold, root mean square"),
        "ratio": (along / across, "along / across"),
    }
    return make_result(
        {name: ("datum", values.cpu(), _number(text)) for name, (values, text) in columns.items()},
        function="directional_sensitivity",
        config={"num_tangents": count, "num_features": features},
        seed=None,
        data_sha256=sha256_of(x),
    )


def _jacobian(
    network: Callable[[Tensor], Tensor], x: Float[Tensor, "batch features"]
) -> Float[Tensor, "batch code features"]:
    """The Jacobian at each row, by a backward pass for each output."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        outputs = network(x).sum(0)  # rows do not meet, so a sum keeps their gradients apart
        rows = [torch.autograd.grad(one, x, retain_graph=True)[0] for one in outputs]
    return torch.stack(rows, 1)
