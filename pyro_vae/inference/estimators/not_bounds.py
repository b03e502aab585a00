r"""Objectives beside the bounds: the beta-ELBO, free bits, InfoVAE.

Each has reasons to be trained with, none is the ELBO, and none bounds log p(x) in general. Their
`bound_kind` is "objective", so that what they give is refused in a comparison with a bound: fit
with them, then measure with `log_evidence`. They work on any pair that has log weights and whose
guide is reparameterised.
"""

import math
from abc import abstractmethod
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Independent

from pyro_vae.inference.estimators.base import (
    Objective,
    Traces,
    Weights,
    is_number,
    log_p_of,
    log_q_of,
    scale_of,
    sites_without_path,
)
from pyro_vae.inference.estimators.direct import closed_kl
from pyro_vae.inference.programs import (
    Arguments,
    Program,
    ProgramError,
    ProgramStructure,
    Site,
    draw_traces,
    site_log_prob,
    subsamples,
    sum_dims,
    sum_traces,
    weighted_sites,
)

__all__ = ["BetaELBO", "FreeBits", "InfoVAE", "maximum_mean_discrepancy"]


class _Run(NamedTuple):
    """One evaluation of both programs."""

    model: Program
    arguments: Arguments
    structure: ProgramStructure
    traces: Traces


class _BoundsNothing(Objective):
    """An objective maximised by reparameterised gradients of its value; it bounds nothing."""

    bound_kind = "objective"

    @abstractmethod
    def _objective(self, run: _Run) -> Float[Tensor, " batch"]:
        """The objective of each datum in nats, attached."""

    def _surrogate(
        self, model: Program, guide: Program, arguments: Arguments
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, ""], float]:
        structure = self.structure_of(model, guide, arguments)
        self._check_structure(structure)
        traces = draw_traces(model, guide, arguments, structure, self.num_particles)
        fixed = sites_without_path(traces)
        if fixed:
            raise ProgramError(
                f"{type(self).__name__} needs reparameterised latents, but the guide's site "
                f"'{fixed[0]}' is not; use LeaveOneOut or VIMCO, which maximise bounds"
            )
        value = self._objective(_Run(model, arguments, structure, traces))
        return value, value.sum(), scale_of(traces, structure)

    def _check_structure(self, structure: ProgramStructure) -> None:
        if structure.enumerated:
            raise ProgramError(
                f"{type(self).__name__} treats likelihood and latents apart, which sums over the "
                f"enumerated site '{structure.enumerated[0]}' do not allow; sample it in the guide"
            )


@final
class BetaELBO(_BoundsNothing):
    r""":math:`\mathbb E_q \log p(x \mid z) - \beta\, \mathbb E_q [\log q(z \mid x) - \log p(z)]`.

    With :math:`\beta > 1` it lies below the ELBO wherever the KL term is positive, with
    :math:`\beta < 1` above it, and above log p(x) perhaps. Even at :math:`\beta = 1` the label
    stays: train with `PathwiseELBO` for the ELBO itself.

    Args:
        num_particles: Draws from the guide for each datum.
        beta: The weight, not negative.
        joint: True for models with global latents; None infers it.

    References:
        Higgins et al. (2017), beta-VAE: learning basic visual concepts with a constrained
        variational framework.
    """

    value_name = "beta-ELBO"
    linear = True

    def __init__(
        self, num_particles: int = 1, *, beta: float = 4.0, joint: bool | None = None
    ) -> None:
        _check_option("beta", beta)
        super().__init__(num_particles, joint=joint)
        self.beta = beta

    def _objective(self, run: _Run) -> Float[Tensor, " batch"]:
        likelihood, kl = _parts(run)
        return (likelihood - self.beta * kl).mean(0)


@final
class FreeBits(_BoundsNothing):
    r"""The ELBO whose KL is free up to :math:`\lambda` nats in each group of latents.

    .. math:: \mathbb E_q \log p(x \mid z)
        - \sum_j \max\Bigl(\lambda, \frac1B \sum_n \mathrm{KL}_{nj}\Bigr)

    with the KL of a group averaged over the mini-batch, and over particles. It is in closed form
    where one is registered and the guide draws the latents that the prior depends on first,
    otherwise by the draws at hand. The value is never above the ELBO that has the same KL; the
    gradient of a group below :math:`\lambda` is zero.

    Args:
        num_particles: Draws from the guide for each datum.
        nats: The free :math:`\lambda` of each group.
        groups: `"dimension"`: each dimension of each latent, for which model and guide must have
            independent dimensions; `"site"`: each latent site.
        joint: True for models with global latents; None infers it.

    Raises:
        ProgramError: If groups are dimensions, and a site's dimensions depend on each other.

    References:
        Kingma et al. (2016), Improved variational inference with inverse autoregressive flow,
        arXiv:1606.04934.
    """

    value_name = "free bits"

    def __init__(
        self,
        num_particles: int = 1,
        *,
        nats: float = 0.1,
        groups: str = "dimension",
        joint: bool | None = None,
    ) -> None:
        _check_option("nats", nats)
        if groups not in ("dimension", "site"):
            raise ValueError(f"groups is 'dimension' or 'site', not {groups!r}")
        super().__init__(num_particles, joint=joint)
        self.nats = nats
        self.groups = groups

    def _objective(self, run: _Run) -> Float[Tensor, " batch"]:
        likelihood, _ = _parts(run)
        self._check_auxiliary(run.traces)
        cost = likelihood.new_zeros(())
        for name in run.structure.latents:
            parts = [self._kl(name, *trace, run.structure) for trace in run.traces]
            kl = torch.cat(parts, dim=1).mean((1, 2))  # over particles and data
            cost = cost + kl.clamp_min(self.nats).sum()
        return likelihood.mean(0) - cost

    def _kl(
        self, name: str, guide: Trace, model: Trace, count: int, structure: ProgramStructure
    ) -> Float[Tensor, "groups particles batch"]:
        """KL(q || p) at one site, or its estimate by the draw, for each group."""
        q, p = guide.nodes[name], model.nodes[name]
        if self.groups == "site":
            kl = closed_kl(name, guide, model)
            kl = site_log_prob(q) - site_log_prob(p) if kl is None else kl
            return sum_dims(kl, structure, count)[None]
        for role, site in (("guide", q), ("model", p)):
            if not _has_independent_dims(site["fn"]):
                raise ProgramError(
                    f"the dimensions of the {role}'s site '{name}' ({type(site['fn']).__name__}) "
                    "depend on each other, so that none has a KL of its own; pass groups='site'"
                )
        kl = closed_kl(name, guide, model, by_dimension=True)
        if kl is None:
            kl = _log_prob_by_dimension(q) - _log_prob_by_dimension(p)
        kl = kl[(None,) * (structure.max_plate_nesting + 2 - kl.dim())]
        return sum_dims(kl.movedim(-1, 0), structure, count)  # groups lie left of the particles

    def _check_auxiliary(self, traces: Traces) -> None:
        for name, site in weighted_sites(traces[0][0]).items():
            if site["infer"].get("is_auxiliary"):
                raise ProgramError(
                    f"FreeBits needs the KL of each latent, which the guide's auxiliary site "
                    f"'{name}' mixes; use a guide that draws each latent at its own site"
                )


@final
class InfoVAE(_BoundsNothing):
    r"""InfoVAE: a KL of weight :math:`1 - \alpha`, and a distance of q(z) from the prior.

    .. math:: \mathbb E_q \log p(x \mid z) - (1 - \alpha)\, \mathrm{KL}(q(z \mid x) \| p(z))
        - (\alpha + \lambda - 1)\, \mathrm{MMD}^2(q(z), p(z))

    The distance is `maximum_mean_discrepancy` between the latents drawn for the mini-batch and one
    draw from the prior for each datum, all latents of a datum taken as one vector. Every datum's
    value has the same.

    Args:
        num_particles: Draws from the guide for each datum.
        alpha: At 1, the default, the KL has no weight: the MMD-VAE of the paper.
        weight: :math:`\lambda`.
        bandwidth: That of the kernel; None for the square root of the number of latents.
        joint: Must not be True: global latents have no aggregate posterior.

    Note: the distance moves a learned prior through reparameterised draws alone. One without them
        (a mixture, a VampPrior) learns from the KL, so it needs alpha < 1.

    References:
        Zhao, Song & Ermon (2019), InfoVAE: balancing learning and inference in variational
        autoencoders, arXiv:1706.02262.
    """

    value_name = "InfoVAE"

    def __init__(
        self,
        num_particles: int = 1,
        *,
        alpha: float = 1.0,
        weight: float = 10.0,
        bandwidth: float | None = None,
        joint: bool | None = None,
    ) -> None:
        if not (is_number(alpha) and math.isfinite(alpha) and alpha <= 1):
            raise ValueError(f"alpha must be a number up to 1, not {alpha!r}")
        _check_option("weight", weight)
        if alpha + weight < 1:
            raise ValueError(
                f"alpha + weight must be at least 1, not {alpha + weight}: the objective would "
                "push q(z) away from the prior"
            )
        if bandwidth is not None and not (is_number(bandwidth) and 0 < bandwidth < math.inf):
            raise ValueError(f"bandwidth must be positive or None, not {bandwidth!r}")
        if joint:
            raise ValueError("global latents have no aggregate posterior; use BetaELBO")
        super().__init__(num_particles, joint=False)
        self.alpha = alpha
        self.weight = weight
        self.bandwidth = bandwidth

    def _objective(self, run: _Run) -> Float[Tensor, " batch"]:
        likelihood, kl = _parts(run)
        drawn = torch.cat([_vectors(guide, run.structure) for guide, _, _ in run.traces])
        args, kwargs = run.arguments
        same_data = poutine.replay(run.model, trace=subsamples(run.traces[0][1]))
        simulated = poutine.trace(poutine.uncondition(same_data)).get_trace(*args, **kwargs)
        prior = _vectors(simulated, run.structure)
        bandwidth = self.bandwidth or math.sqrt(drawn.shape[1])
        distance = maximum_mean_discrepancy(drawn, prior, bandwidth)
        objective = (likelihood - (1 - self.alpha) * kl).mean(0)
        return objective - (self.alpha + self.weight - 1) * distance


def maximum_mean_discrepancy(
    a: Float[Tensor, "first dim"], b: Float[Tensor, "second dim"], bandwidth: float
) -> Float[Tensor, ""]:
    r"""The squared distance of two samples in the feature space of a Gaussian kernel.

    .. math:: \mathrm{MMD}^2 = \overline{k(a, a')} + \overline{k(b, b')} - 2\, \overline{k(a, b)},
              \qquad k(u, v) = e^{-\lVert u - v \rVert^2 / 2 h^2}

    with means over all pairs, equal ones included: it is never negative, and its expectation is
    above the distance of the two distributions by O(1 / size).

    Args:
        a: The first sample, a row each.
        b: The second sample.
        bandwidth: The kernel's h.

    References:
        Gretton, Borgwardt, Rasch, Schoelkopf & Smola (2012), A kernel two-sample test.
    """

    def mean_kernel(u: Tensor, v: Tensor) -> Tensor:
        squares = u.square().sum(1)[:, None] + v.square().sum(1) - 2 * u @ v.mT
        return torch.exp(-squares.clamp_min(0) / (2 * bandwidth**2)).mean()

    return mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)


def _parts(run: _Run) -> tuple[Weights, Weights]:
    """Log p(x | z), and log q(z | x) - log p(z), of each particle and datum."""
    models = [(model, count) for _, model, count in run.traces]
    likelihood = sum_traces(models, run.structure, lambda _, site: site["is_observed"])
    prior = log_p_of(run.traces, run.structure) - likelihood
    return likelihood, log_q_of(run.traces, run.structure) - prior


def _vectors(trace: Trace, structure: ProgramStructure) -> Float[Tensor, "draws dim"]:
    """All latents of a datum as one vector, a row for each datum and particle."""
    assert structure.batch_dim is not None  # joint is refused
    vectors = []
    for name in structure.latents:
        site = trace.nodes[name]
        events = len(site["fn"].event_shape)
        value = site["value"]
        value = value[(None,) * (structure.max_plate_nesting + 1 + events - value.dim())]
        value = value.movedim((0, structure.batch_dim - events), (0, 1))
        vectors.append(value.reshape(value.shape[0] * value.shape[1], -1))
    return torch.cat(vectors, dim=1)


def _has_independent_dims(fn: Any) -> bool:
    plain = isinstance(fn, Independent) and fn.reinterpreted_batch_ndims == 1
    return plain and not fn.base_dist.event_shape


def _log_prob_by_dimension(site: Site) -> Tensor:
    """The log-probability of each dimension of a site's event, with the site's mask."""
    mask = site["mask"][..., None] if isinstance(site["mask"], Tensor) else site["mask"]
    return scale_and_mask(site["fn"].base_dist.log_prob(site["value"]), 1.0, mask)


def _check_option(name: str, value: Any) -> None:
    if not (is_number(value) and 0 <= value < math.inf):
        raise ValueError(f"{name} must be a number that is not negative, not {value!r}")
