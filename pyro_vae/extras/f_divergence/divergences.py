r"""f-divergences as the most that a critic can tell two laws apart: the table, and the bound.

.. math:: D_f(P \,\|\, Q) = \mathbb E_Q\, f\!\left(\frac{p}{q}\right)
    \;\ge\; \mathbb E_P\, T(x) - \mathbb E_Q\, f^*(T(x))

for every function T into the domain of the conjugate :math:`f^*(t) = \sup_u \{ut - f(u)\}`, with
equality at :math:`T = f'(p / q)`. A critic V with values in R gives :math:`T = g_f(V)`, where
g_f is increasing and maps R into that domain. (Below -2 the Pearson row's f* lies above the
supremum over positive ratios, which only lowers the bound.)

References:
    Nowozin, Cseke & Tomioka (2016), f-GAN: training generative neural samplers using variational
    divergence minimization, arXiv:1606.00709, of whose tables `F_DIVERGENCES` has rows; Nguyen,
    Wainwright & Jordan (2010), Estimating divergence functionals and the likelihood ratio by convex
    risk minimization, for the bound.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

__all__ = ["F_DIVERGENCES", "FDivergence", "divergence_bound", "get_divergence"]

_Elementwise = Callable[[Float[Tensor, "*any"]], Float[Tensor, "*any"]]


@dataclass(frozen=True)
class FDivergence:
    r"""A row of the table.

    Attributes:
        name: Its key in `F_DIVERGENCES`.
        formula: What D_f(P || Q) is, in words of densities p and q.
        in_nats: Whether it is a number of nats; the others have no unit.
        f: The convex function, of the ratio u = p / q > 0. It is 0 at 1 but for "gan".
        conjugate: The conjugate f*, on its domain.
        activation: The output activation g_f, from a critic's value v to T.
        penalty: f*(g_f(v)), written so that nothing overflows before its value does.
        optimal_critic: The value v of the best critic where log p(x) / q(x) is given: its T is
            f'(p / q).
        maximum: The largest value of the divergence, where the laws have disjoint supports; may be
            infinite.
    """

    name: str
    formula: str
    in_nats: bool
    f: _Elementwise
    conjugate: _Elementwise
    activation: _Elementwise
    penalty: _Elementwise
    optimal_critic: _Elementwise
    maximum: float


_LOG_2 = math.log(2)


def _jensen_shannon(u: Tensor) -> Tensor:
    return torch.special.xlogy(u, u) - (u + 1) * torch.log1p((u - 1) / 2)


_ROWS = (
    FDivergence(
        name="kl",
        formula="KL(P || Q) = int p log(p/q)",
        in_nats=True,
        f=lambda u: torch.special.xlogy(u, u),
        conjugate=lambda t: torch.exp(t - 1),
        activation=lambda v: v,
        penalty=lambda v: torch.exp(v - 1),
        optimal_critic=lambda log_ratio: 1 + log_ratio,
        maximum=math.inf,
    ),
    FDivergence(
        name="reverse_kl",
        formula="KL(Q || P) = int q log(q/p)",
        in_nats=True,
        f=lambda u: -torch.log(u),
        conjugate=lambda t: -1 - torch.log(-t),
        activation=lambda v: -torch.exp(-v),
        penalty=lambda v: v - 1,
        optimal_critic=lambda log_ratio: log_ratio,
        maximum=math.inf,
    ),
    FDivergence(
        name="pearson_chi2",
        formula="Pearson chi^2 = int (p-q)^2 / q",
        in_nats=False,
        f=lambda u: (u - 1).square(),
        conjugate=lambda t: t.square() / 4 + t,
        activation=lambda v: v,
        penalty=lambda v: v.square() / 4 + v,
        optimal_critic=lambda log_ratio: 2 * torch.expm1(log_ratio),
        maximum=math.inf,
    ),
    FDivergence(
        name="squared_hellinger",
        formula="squared Hellinger = int (sqrt(p) - sqrt(q))^2, from 0 to 2",
        in_nats=False,
        f=lambda u: (u.sqrt() - 1).square(),
        conjugate=lambda t: t / (1 - t),
        activation=lambda v: -torch.expm1(-v),
        penalty=lambda v: torch.expm1(v),
        optimal_critic=lambda log_ratio: log_ratio / 2,
        maximum=2.0,
    ),
    FDivergence(
        name="jensen_shannon",
        formula="twice the Jensen-Shannon divergence = KL(P || M) + KL(Q || M), M = (P + Q) / 2",
        in_nats=True,
        f=_jensen_shannon,
        conjugate=lambda t: -torch.log(2 - torch.exp(t)),
        activation=lambda v: _LOG_2 + functional.logsigmoid(v),
        penalty=lambda v: functional.softplus(v) - _LOG_2,
        optimal_critic=lambda log_ratio: log_ratio,
        maximum=2 * _LOG_2,
    ),
    FDivergence(
        name="gan",
        formula="the GAN objective = twice the Jensen-Shannon divergence - log 4, which is not 0 "
        "where P = Q",
        in_nats=True,
        f=lambda u: torch.special.xlogy(u, u) - (u + 1) * torch.log1p(u),
        conjugate=lambda t: -torch.log(-torch.expm1(t)),
        activation=functional.logsigmoid,
        penalty=functional.softplus,
        optimal_critic=lambda log_ratio: log_ratio,
        maximum=0.0,
    ),
)

F_DIVERGENCES: Mapping[str, FDivergence] = MappingProxyType({row.name: row for row in _ROWS})
"""The rows of the table by name.

Note: the paper's generator of the Jensen-Shannon row gives twice the divergence that its formula
column has; the row here says what the generator gives.
"""


def get_divergence(name: str) -> FDivergence:
    """The row of a divergence.

    Raises:
        ValueError: If there is none of that name; lists them.

    Example:
        >>> get_divergence("reverse_kl").formula
        'KL(Q || P) = int q log(q/p)'
    """
    if name not in F_DIVERGENCES:
        raise ValueError(f"Unknown divergence {name!r}: choose one of {sorted(F_DIVERGENCES)}")
    return F_DIVERGENCES[name]


def divergence_bound(
    name: str, critic_on_data: Float[Tensor, "*data"], critic_on_samples: Float[Tensor, "*samples"]
) -> Float[Tensor, ""]:
    r"""The lower bound on a divergence that a critic gives, estimated from draws.

    .. math:: \frac1N \sum_n g_f(V(x_n)) - \frac1M \sum_m f^*(g_f(V(y_m))),
        \qquad x_n \sim P, \quad y_m \sim Q

    Args:
        name: The divergence, a key of `F_DIVERGENCES`.
        critic_on_data: V at draws from P, any real numbers.
        critic_on_samples: V at draws from Q.

    Returns:
        The estimate, differentiable. Its expectation is at most D_f(P || Q) if the critic was
        chosen without sight of these draws. A critic that was trained on them can exceed it.

    Raises:
        ValueError: If the name is unknown.

    References:
        Nowozin et al. (2016); Nguyen et al. (2010).

    Example:
        >>> blind = torch.zeros(5)  # tells nothing apart, and says so
        >>> divergence_bound("jensen_shannon", blind, blind)
        tensor(0.)
    """
    row = get_divergence(name)
    return row.activation(critic_on_data).mean() - row.penalty(critic_on_samples).mean()
