r"""Estimators of a bound and of its gradient: one table, right per datum.

An estimator is a *value*, a reduction of the log weights of a datum, and the weights of three
gradients, of which the first and the last are taken at latents held fixed:

.. math::
    \sum_k \; \theta_k \, \nabla \log p(x, z_k)
    + \pi_k \, \nabla_{z_k} [\log p(x, z_k) - \log q(z_k)] \, \nabla z_k
    + \sigma_k \, \nabla \log q(z_k)

L is the value, w the softmax of the log weights over particles (of 1 - a times them for Renyi),
v the same within a group, divided by the number of groups M. L_-k is the bound with particle k
replaced by the geometric mean of the others. "-" where no latent is reparameterised.

=================== =================== =============== ==================== ==================
class               value               theta           path                 score
=================== =================== =============== ==================== ==================
PathwiseELBO        mean                1/K             1/K                  -1/K
StickingTheLanding  mean                1/K             1/K                  0
ScoreFunction       mean                1/K             -                    log w / K
LeaveOneOut         mean                1/K             -                    (log w - others)/K
ImportanceWeighted  log-mean-exp        w               w                    -w
DReG                log-mean-exp        w               w^2                  0
VIMCO               log-mean-exp        w               -                    L - L_-k - w
Renyi               Renyi bound         w               w                    -w
RenyiDReG           Renyi bound         w               a w + (1 - a) w^2    0
ReweightedWakeSleep log-mean-exp        w               -                    w
WakeDReG            log-mean-exp        w               w - w^2              0
PIWAE               log-mean-exp        w               v                    -v
MIWAE               mean of M bounds    v               v                    -v
CIWAE               b ELBO + (1-b) IWAE b/K + (1 - b) w the same             minus the same
=================== =================== =============== ==================== ==================

`AnalyticELBO`, `StraightThrough`, `SleepPhi` and `WakeSleep` are direct estimators (`direct.py`).
In a guide that mixes both kinds of latents, those that cannot be reparameterised add the score
weight of `LeaveOneOut` or `VIMCO`, as the value has it. The factor N/B of a mini-batch stands
outside the reduction, so a subsampled bound stays a bound.
"""

import math
from collections.abc import Callable
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.checks import check_count
from pyro_vae.inference.estimators.base import (
    Coefficients,
    Estimator,
    Objective,
    Weights,
    is_number,
)
from pyro_vae.inference.estimators.direct import (
    AnalyticELBO,
    SleepPhi,
    StraightThrough,
    WakeSleep,
)
from pyro_vae.inference.log_weights import elbo, importance_bound

__all__ = [
    "CIWAE",
    "MIWAE",
    "PIWAE",
    "VIMCO",
    "AnalyticELBO",
    "Coefficients",
    "DReG",
    "Estimator",
    "ImportanceWeighted",
    "LeaveOneOut",
    "PathwiseELBO",
    "Renyi",
    "RenyiDReG",
    "ReweightedWakeSleep",
    "ScoreFunction",
    "SleepPhi",
    "StickingTheLanding",
    "StraightThrough",
    "WakeDReG",
    "WakeSleep",
    "estimator_names",
    "make_estimator",
]


@final
class PathwiseELBO(Estimator):
    """The ELBO with the reparameterised gradient.

    References:
        Kingma & Welling (2014), Auto-encoding variational Bayes; Rezende et al. (2014).
    """

    value_name = "ELBO"
    linear = True

    def coefficients(self, log_weights: Weights) -> Coefficients:
        each = torch.full_like(log_weights, 1 / len(log_weights))
        return Coefficients(elbo(log_weights), each, each, -each, _leave_one_out(log_weights))


@final
class StickingTheLanding(Estimator):
    """The ELBO without the score term: no variance where the guide is the posterior.

    References:
        Roeder, Wu & Duvenaud (2017), Sticking the landing.
    """

    value_name = "ELBO"
    linear = True

    def coefficients(self, log_weights: Weights) -> Coefficients:
        each = torch.full_like(log_weights, 1 / len(log_weights))
        zero = torch.zeros_like(log_weights)
        return Coefficients(elbo(log_weights), each, each, zero, _leave_one_out(log_weights))


@final
class ScoreFunction(Estimator):
    """The ELBO with the score-function gradient (REINFORCE): any latent, high variance.

    References:
        Ranganath, Gerrish & Blei (2014), Black box variational inference; Williams (1992).
    """

    value_name = "ELBO"
    linear = True

    def coefficients(self, log_weights: Weights) -> Coefficients:
        each = torch.full_like(log_weights, 1 / len(log_weights))
        zero = torch.zeros_like(log_weights)
        return Coefficients(elbo(log_weights), each, None, zero, log_weights * each)


@final
class LeaveOneOut(Estimator):
    """The ELBO with the score-function gradient and a leave-one-out baseline (RLOO, VarGrad).

    References:
        Kool, van Hoof & Welling (2019), Buy 4 REINFORCE samples, get a baseline for free!; Richter
        et al. (2020), VarGrad.
    """

    value_name = "ELBO"
    linear = True
    min_particles = 2

    def coefficients(self, log_weights: Weights) -> Coefficients:
        each = torch.full_like(log_weights, 1 / len(log_weights))
        zero = torch.zeros_like(log_weights)
        return Coefficients(elbo(log_weights), each, None, zero, _leave_one_out(log_weights))


@final
class ImportanceWeighted(Estimator):
    """The importance-weighted bound with the reparameterised gradient (IWAE).

    References:
        Burda, Grosse & Salakhutdinov (2016), Importance weighted autoencoders.
    """

    value_name = "IWAE"

    def coefficients(self, log_weights: Weights) -> Coefficients:
        w = log_weights.softmax(0)
        return Coefficients(importance_bound(log_weights), w, w, -w, _vimco(log_weights))


@final
class DReG(Estimator):
    """The importance-weighted bound with the doubly reparameterised gradient.

    References:
        Tucker, Lawson, Gu & Maddison (2019), Doubly reparameterized gradient estimators.
    """

    value_name = "IWAE"

    def coefficients(self, log_weights: Weights) -> Coefficients:
        w = log_weights.softmax(0)
        return Coefficients(importance_bound(log_weights), w, w**2, torch.zeros_like(w), None)


@final
class VIMCO(Estimator):
    """The importance-weighted bound for latents of any kind, with a baseline for each particle.

    References:
        Mnih & Rezende (2016), Variational inference for Monte Carlo objectives.
    """

    value_name = "IWAE"
    min_particles = 2

    def coefficients(self, log_weights: Weights) -> Coefficients:
        w = log_weights.softmax(0)
        return Coefficients(importance_bound(log_weights), w, None, -w, _vimco(log_weights))


class _RenyiBound(Estimator):
    """What the two Renyi estimators share: alpha and its check."""

    def __init__(
        self, num_particles: int = 1, *, alpha: float = 0.5, joint: bool | None = None
    ) -> None:
        if not (is_number(alpha) and 0 <= alpha < math.inf and alpha != 1):
            raise ValueError(
                f"alpha must be at least 0 and not 1 (where the bound is the ELBO), not {alpha!r}"
            )
        super().__init__(num_particles, joint=joint)
        self.alpha = alpha

    def _value_and_weights(self, log_weights: Weights) -> tuple[Float[Tensor, " batch"], Weights]:
        scaled = (1 - self.alpha) * log_weights
        return importance_bound(scaled) / (1 - self.alpha), scaled.softmax(0)


@final
class Renyi(_RenyiBound):
    """The variational Renyi bound of order alpha with the reparameterised gradient.

    alpha = 0 is the importance-weighted bound, alpha -> 1 the ELBO. What K particles give is, in
    expectation, the VR-IWAE bound: below log p(x) for every K and alpha, the ELBO at K = 1, and
    from there with K up (alpha < 1) or down (alpha > 1) to the Renyi bound. Values and gradients
    are unbiased for it, and biased for the Renyi bound itself.

    References:
        Li & Turner (2016), Renyi divergence variational inference; Daudel, Benton, Shi & Doucet
        (2023), Alpha-divergence variational inference meets importance weighted auto-encoders:
        methodology and asymptotics, JMLR 24 (the VR-IWAE bound, for alpha below 1).
    """

    value_name = "Renyi"

    def coefficients(self, log_weights: Weights) -> Coefficients:
        value, w = self._value_and_weights(log_weights)
        return Coefficients(value, w, w, -w, _vimco(log_weights, 1 - self.alpha))


@final
class RenyiDReG(_RenyiBound):
    """The variational Renyi bound with the doubly reparameterised gradient.

    References:
        Li & Turner (2016), with the identity of Tucker et al. (2019); Daudel et al. (2023), see
        `Renyi` for what K particles bound.
    """

    value_name = "Renyi"

    def coefficients(self, log_weights: Weights) -> Coefficients:
        value, w = self._value_and_weights(log_weights)
        path = self.alpha * w + (1 - self.alpha) * w**2
        return Coefficients(value, w, path, torch.zeros_like(w), None)


@final
class ReweightedWakeSleep(Estimator):
    """Wake-theta maximises the importance bound, wake-phi lowers KL(p || q) by reweighting draws.

    The guide's gradient is not that of the value; at finite K it is a biased estimate of grad KL(p
    || q).

    References:
        Bornschein & Bengio (2015), Reweighted wake-sleep; Le et al. (2020),
        Revisiting RWS.
    """

    value_name = "IWAE"
    unbiased = False
    min_particles = 2

    def coefficients(self, log_weights: Weights) -> Coefficients:
        w = log_weights.softmax(0)
        return Coefficients(importance_bound(log_weights), w, None, w, None)


@final
class WakeDReG(Estimator):
    """Reweighted wake-sleep with the doubly reparameterised wake-phi gradient.

    References:
        Tucker et al. (2019), Doubly reparameterized gradient estimators.
    """

    value_name = "IWAE"
    unbiased = False
    min_particles = 2

    def coefficients(self, log_weights: Weights) -> Coefficients:
        w = log_weights.softmax(0)
        return Coefficients(importance_bound(log_weights), w, w - w**2, torch.zeros_like(w), None)


class _Grouped(Estimator):
    """What PIWAE and MIWAE share: particles in `num_groups` groups of equal size."""

    def __init__(
        self, num_particles: int = 4, *, num_groups: int = 2, joint: bool | None = None
    ) -> None:
        super().__init__(num_particles, joint=joint)
        check_count("num_groups", num_groups)
        if num_particles % num_groups:
            raise ValueError(
                f"num_particles ({num_particles}) must be a multiple of num_groups ({num_groups})"
            )
        self.num_groups = num_groups

    def _groups(self, log_weights: Weights) -> tuple[Float[Tensor, " batch"], Weights, Weights]:
        """Mean of the group bounds, weights within groups / M, and their score weights / M."""
        parts = log_weights.chunk(self.num_groups)
        value = torch.stack([importance_bound(part) for part in parts]).mean(0)
        w = torch.cat([part.softmax(0) for part in parts]) / self.num_groups
        return value, w, torch.cat([_vimco(part) for part in parts]) / self.num_groups


@final
class MIWAE(_Grouped):
    """The mean of M importance-weighted bounds of K/M particles each.

    References:
        Rainforth et al. (2018), Tighter variational bounds are not necessarily better.
    """

    value_name = "MIWAE"

    def coefficients(self, log_weights: Weights) -> Coefficients:
        value, w, reinforce = self._groups(log_weights)
        return Coefficients(value, w, w, -w, reinforce)


@final
class PIWAE(_Grouped):
    """The model maximises the importance bound of all K particles, the guide the MIWAE bound.

    The guide's gradient is not that of the value, which is the bound of all K.

    References:
        Rainforth et al. (2018), Tighter variational bounds are not necessarily better.
    """

    value_name = "IWAE"
    unbiased = False

    def coefficients(self, log_weights: Weights) -> Coefficients:
        _, w, reinforce = self._groups(log_weights)
        return Coefficients(importance_bound(log_weights), log_weights.softmax(0), w, -w, reinforce)


@final
class CIWAE(Estimator):
    """A convex combination, beta ELBO + (1 - beta) IWAE.

    References:
        Rainforth et al. (2018), Tighter variational bounds are not necessarily better.
    """

    value_name = "CIWAE"

    def __init__(
        self, num_particles: int = 2, *, beta: float = 0.5, joint: bool | None = None
    ) -> None:
        if not (is_number(beta) and 0 <= beta <= 1):
            raise ValueError(f"beta must lie in [0, 1], not {beta!r}")
        super().__init__(num_particles, joint=joint)
        self.beta = beta

    def coefficients(self, log_weights: Weights) -> Coefficients:
        b = self.beta
        value = b * elbo(log_weights) + (1 - b) * importance_bound(log_weights)
        w = b / len(log_weights) + (1 - b) * log_weights.softmax(0)
        reinforce = b * _leave_one_out(log_weights) + (1 - b) * _vimco(log_weights)
        return Coefficients(value, w, w, -w, reinforce)


# --- reductions -----------------------------------------------------------------------------------


def _over_others(
    values: Weights, scan: Callable[..., Tensor], join: Callable[..., Tensor], empty: float
) -> Weights:
    """Reduces over the other particles: scans from both ends, O(K) memory, nothing subtracted."""
    edge = torch.full_like(values[:1], empty)
    before = torch.cat([edge, scan(values, 0)[:-1]])
    after = torch.cat([scan(values.flip(0), 0).flip(0)[1:], edge])
    return join(before, after)


def _others_mean(values: Weights) -> Weights:
    """The mean over the other particles; 0 if there are none."""
    return _over_others(values, torch.cumsum, torch.add, 0.0) / max(len(values) - 1, 1)


def _leave_one_out(log_weights: Weights) -> Weights:
    """The score weight of RLOO, (log w_k - mean of the others) / K."""
    return (log_weights - _others_mean(log_weights)) / len(log_weights)


def _vimco(log_weights: Weights, power: float = 1.0) -> Weights:
    """L - L_{-k}, with particle k replaced by the geometric mean of the others."""
    if len(log_weights) == 1:
        return log_weights  # there are no others to compare with
    scaled = power * log_weights
    others = _over_others(scaled, torch.logcumsumexp, torch.logaddexp, -math.inf)
    replaced = torch.logaddexp(others, _others_mean(scaled))
    return (scaled.logsumexp(0) - replaced) / power


# --- by name --------------------------------------------------------------------------------------

_BY_NAME: dict[str, type[Objective]] = {
    kind.__name__: kind
    for kind in (
        PathwiseELBO,
        AnalyticELBO,
        StickingTheLanding,
        ScoreFunction,
        LeaveOneOut,
        ImportanceWeighted,
        DReG,
        VIMCO,
        Renyi,
        RenyiDReG,
        ReweightedWakeSleep,
        WakeDReG,
        WakeSleep,
        SleepPhi,
        PIWAE,
        MIWAE,
        CIWAE,
        StraightThrough,
    )
}


def estimator_names() -> tuple[str, ...]:
    """The names that `make_estimator` knows."""
    return tuple(_BY_NAME)


def make_estimator(name: str, num_particles: int = 1, **options: Any) -> Objective:
    """Builds an estimator from its class name.

    Args:
        name: One of `estimator_names()`.
        num_particles: Draws from the guide for each datum.
        options: What the class takes besides, such as `alpha`.

    Raises:
        ValueError: If the name is unknown; lists those there are.
    """
    if name not in _BY_NAME:
        raise ValueError(f"there is no estimator {name!r}; there are {', '.join(_BY_NAME)}")
    return _BY_NAME[name](num_particles, **options)
