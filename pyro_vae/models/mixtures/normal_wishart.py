"""Gaussian mixtures with normal-Wishart priors: their problem for variational Bayes."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from pyro_vae.models.mixtures.bayes import ConjugateProblem, MixturePosterior
from pyro_vae.models.mixtures.natural import flat_roots, roots_of
from pyro_vae.models.mixtures.problem import (
    MixtureParameters,
    Statistics,
)

__all__ = ["GaussianConjugate"]


@dataclass(frozen=True)
class _Wishart:
    """Precisions with density ~ |P|^((dof - d - 1) / 2) exp(-tr(inverse_scale P) / 2)."""

    dof: Float[Tensor, "*batch"]
    inverse_scale: Float[Tensor, "*batch d d"]

    @cached_property
    def root(self) -> Tensor:
        """The lower root of the inverse scale; LinAlgError if that is not positive definite."""
        return torch.linalg.cholesky(self.inverse_scale)

    @property
    def dim(self) -> int:
        return self.inverse_scale.shape[-1]

    @property
    def log_det_scale(self) -> Tensor:
        """The log of |inverse_scale|."""
        return 2 * self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @property
    def expected_log_det(self) -> Tensor:
        """E log |P| (Bishop 2006, eq. B.81)."""
        steps = torch.arange(self.dim, dtype=self.dof.dtype, device=self.dof.device)
        digammas = ((self.dof[..., None] - steps) / 2).digamma().sum(-1)
        return digammas + self.dim * math.log(2) - self.log_det_scale

    @property
    def mean_roots(self) -> Tensor:
        """W with W^T W the mean precision."""
        eye = torch.eye(self.dim, dtype=self.root.dtype, device=self.root.device)
        inverse = torch.linalg.solve_triangular(self.root, eye.expand_as(self.root), upper=False)
        return self.dof.sqrt()[..., None, None] * inverse

    @property
    def _log_normaliser(self) -> Tensor:
        half = self.dof / 2
        gamma = half.mvlgamma(self.dim) if self.dim > 1 else half.lgamma()
        return half * (self.log_det_scale - self.dim * math.log(2)) - gamma

    def divergence_from(self, prior: "_Wishart") -> Tensor:
        """KL(self || prior), summed over the batch; the prior's is broadcast to it."""
        white = torch.linalg.solve_triangular(
            self.root, prior.root.expand_as(self.root), upper=False
        )
        trace = white.square().sum((-2, -1))
        each = self._log_normaliser - prior._log_normaliser
        each = each + (self.dof - prior.dof) / 2 * self.expected_log_det
        return (each - self.dof / 2 * (self.dim - trace)).sum()


@dataclass(frozen=True)
class _NormalWishart:
    """q(theta) of a Gaussian mixture, in the problem's coordinates.

    Attributes:
        concentration: Of the Dirichlet of the weights, shape (components,).
        locs: Shape (components, features).
        loc_precisions: In units of the component's precision, shape (components,).
        precisions: Batch (components,) if full or spherical, (1,) if tied, (components, features)
            if diagonal, of the matrices or numbers that are free.
    """

    concentration: Tensor
    locs: Tensor
    loc_precisions: Tensor
    precisions: _Wishart


class GaussianConjugate(ConjugateProblem):
    r"""Dirichlet weights, normal-Wishart means and precisions.

    .. math:: \pi \sim \mathrm{Dir}(\alpha), \quad \Lambda_k \sim \mathcal W(V^{-1}, \nu), \quad
              \mu_k \mid \Lambda_k \sim \mathcal N(m, (\kappa \Lambda_k)^{-1})

    Tied components share one :math:`\Lambda`. A diagonal one has
    :math:`\lambda_{kd} \sim \mathrm{Gamma}(\nu / 2, V_d / 2)`, a spherical one
    :math:`\lambda_k \sim \mathrm{Gamma}(D \nu / 2, D V / 2)`. The names are `concentration` alpha,
    `loc` m, `loc_precision` kappa, `degrees_of_freedom` nu and `inverse_scale` V, with the defaults
    of scikit-learn's `BayesianGaussianMixture`: 1 / K, the mean of the data, 1, D, and their
    covariance, to whose diagonal the mixture's `reg_covar` is added. Its full covariances are
    these; its other three take moments of a Wishart all the same, and equal these in one dimension
    only (of tied ones, with one component).
    """

    names = ("concentration", "loc", "loc_precision", "degrees_of_freedom", "inverse_scale")

    def __init__(self, points: Any, prior: Mapping[str, Any] | None = None) -> None:
        self._kind, self._dim = points.mixture.covariance, points.mixture.dim
        self._dense = self._kind in ("full", "tied")
        super().__init__(points, prior)
        least = self._dim - 1 if self._dense else 0
        if not bool(self.prior["degrees_of_freedom"] > least):
            raise ValueError(f"prior['degrees_of_freedom'] must lie above {least}")
        scale = points._scale
        units = scale.outer(scale) if self._dense else scale.square()
        units = units.mean() if self._kind == "spherical" else units
        self._loc = (self.prior["loc"] - points._center) / scale
        self._inverse_scale = self.prior["inverse_scale"] / units
        none = scale.new_zeros(self.num_components)
        shape = (self._dim, self._dim) if self._dense else (self._dim,)
        shape = shape if self._kind == "tied" else (self.num_components, *shape)
        self._precisions = self._wishart(scale.new_zeros(shape), none)
        try:
            self._precisions.root  # noqa: B018
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                "prior['inverse_scale'] is not positive definite: pass another one, or, where it "
                "is the covariance of the data, reg_covar to the mixture"
            ) from error

    def _hyperparameters(self) -> dict[str, Tensor]:
        one = torch.ones((), dtype=torch.float64, device=self.points._x.device)
        loc, covariance = self._moments()
        return {
            "concentration": one / self.num_components,
            "loc": loc,
            "loc_precision": one,
            "degrees_of_freedom": one * self._dim,
            "inverse_scale": covariance,
        }

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the data; of a diagonal model the variances, or their mean."""
        points = self.points
        chunks = [chunk for _, chunk in points._chunks(None)]
        weights = [c.x.new_ones(c.x.shape[1]) if c.weights is None else c.weights for c in chunks]
        total = points.total_weight
        loc = sum(c.x @ w for c, w in zip(chunks, weights, strict=True)) / total
        away = [chunk.x - loc[:, None] for chunk in chunks]
        scatter = sum((a * w) @ a.mT for a, w in zip(away, weights, strict=True))
        covariance = scatter / (total - 1 if total > 1 else total)
        covariance = covariance * points._scale.outer(points._scale)
        covariance = covariance + points.mixture.reg_covar * torch.eye(self._dim).to(covariance)
        if not self._dense:
            covariance = covariance.diagonal()
        if self._kind == "spherical":
            covariance = covariance.mean()
        return loc * points._scale + points._center, covariance

    def _wishart(self, scatter: Tensor, counts: Tensor) -> _Wishart:
        """The prior of the precisions with a scatter, in the form of `_scatter`, added to it."""
        dof, inverse_scale = self.prior["degrees_of_freedom"], self._inverse_scale
        if self._kind == "full":
            return _Wishart(dof + counts, inverse_scale + scatter)
        if self._kind == "tied":
            return _Wishart((dof + counts.sum())[None], (inverse_scale + scatter)[None])
        if self._kind == "diag":
            dofs = (dof + counts)[:, None].expand_as(scatter)
            return _Wishart(dofs, (inverse_scale + scatter)[..., None, None])
        summed = self._dim * inverse_scale + scatter.sum(-1)
        return _Wishart(self._dim * (dof + counts), summed[:, None, None])

    def m_step(self, statistics: Statistics, current: Any) -> _NormalWishart:
        """The best q(theta) for these statistics: the prior, with them added."""
        counts, first, _ = self.points._unpack(statistics)
        about = 0.0 if statistics.about is None else statistics.about
        prior = self.prior["loc_precision"]
        loc_precisions = prior + counts
        locs = about + (first + prior * (self._loc - about)) / loc_precisions[:, None]
        _, scatter = self.points._scatter(statistics, locs)
        moved = locs - self._loc
        if self._dense:
            outer = prior * moved[:, :, None] * moved[:, None, :]
            scatter = scatter + (outer.sum(0) if self._kind == "tied" else outer)
        else:
            scatter = scatter + prior * moved.square()
        return _NormalWishart(
            concentration=self.prior["concentration"] + counts,
            locs=locs,
            loc_precisions=loc_precisions,
            precisions=self._wishart(scatter, counts),
        )

    def _roots(self, precisions: _Wishart) -> Tensor:
        """Roots of the mean precisions, in the form of `MixtureParameters`."""
        roots = precisions.mean_roots
        if self._dense:
            return roots
        numbers = roots[..., 0, 0]
        return numbers if numbers.dim() == 2 else numbers[:, None].expand(-1, self._dim)

    def expected(self, posterior: _NormalWishart) -> MixtureParameters:
        """Gaussians at the means of locs and precisions, with what that leaves out as weights."""
        precisions = posterior.precisions
        mean_log_det = 2 * precisions.mean_roots.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        excess = precisions.expected_log_det - mean_log_det
        if self._kind == "diag":
            excess = excess.sum(-1)
        elif self._kind == "spherical":
            excess = excess * self._dim
        correction = 0.5 * (excess - self._dim / posterior.loc_precisions)
        log_weights = self._expected_log_weights(posterior.concentration) + correction
        return MixtureParameters(log_weights, posterior.locs, self._roots(precisions))

    def estimate(self, posterior: _NormalWishart) -> MixtureParameters:
        """Mean weights and locs, and the inverses of the mean precisions."""
        weights = posterior.concentration / posterior.concentration.sum()
        return MixtureParameters(weights.log(), posterior.locs, self._roots(posterior.precisions))

    def divergence_from_prior(self, posterior: _NormalWishart) -> float:
        """KL(q(theta) || p(theta)), in nats."""
        ratio = self.prior["loc_precision"] / posterior.loc_precisions
        away = (posterior.locs - self._loc)[..., None]
        roots = self._roots(posterior.precisions)
        white = (roots @ away)[..., 0] if self._dense else roots * away[..., 0]
        locs = self._dim * (ratio - 1 - ratio.log()).sum()
        locs = 0.5 * (locs + self.prior["loc_precision"] * white.square().sum())
        precisions = posterior.precisions.divergence_from(self._precisions)
        return float(self._weights_divergence(posterior.concentration) + locs + precisions)

    def unconstrained(self, posterior: _NormalWishart) -> Tensor:
        """Logarithms of what is positive, locs, and the free numbers of the roots."""
        precisions = posterior.precisions
        free = (precisions.dof - (precisions.dim - 1)).log()
        positive = (posterior.concentration.log(), posterior.loc_precisions.log(), free.flatten())
        return torch.cat([*positive, posterior.locs.flatten(), flat_roots(precisions.root)])

    def constrained(self, vector: Tensor) -> _NormalWishart:
        """The posterior that `unconstrained` makes this vector of."""
        number, prior = self.num_components, self._precisions
        batch, dim = prior.dof.shape, prior.dim
        sizes = (number, number, prior.dof.numel(), number * self._dim)
        *parts, flat = vector.tensor_split(list(itertools.accumulate(sizes)))
        concentration, known, free, locs = parts
        root = roots_of(flat, *batch, dim)
        return _NormalWishart(
            concentration=concentration.exp(),
            locs=locs.reshape(number, self._dim),
            loc_precisions=known.exp(),
            precisions=_Wishart(free.exp().reshape(batch) + dim - 1, root @ root.mT),
        )

    def described(self, posterior: _NormalWishart) -> MixturePosterior:
        """The posterior in the data's units."""
        points, precisions = self.points, posterior.precisions
        scale = points._scale
        units = scale.outer(scale) if self._dense else scale.square()[:, None, None]
        units = units[0] if self._kind == "spherical" else units
        precisions = _Wishart(precisions.dof, precisions.inverse_scale * units)
        locs = posterior.locs * scale + points._center
        known = posterior.loc_precisions
        free = dist.Gamma(precisions.dof / 2, precisions.inverse_scale[..., 0, 0] / 2)
        if self._dense:
            free = torch.distributions.Wishart(
                precisions.dof, precision_matrix=precisions.inverse_scale
            )
        return MixturePosterior(
            prior=dict(self.prior),
            hyperparameters={
                "concentration": posterior.concentration,
                "loc": locs,
                "loc_precision": known,
                "degrees_of_freedom": precisions.dof,
                "inverse_scale": precisions.inverse_scale,
            },
            marginals={
                "weights": dist.Dirichlet(posterior.concentration),
                "locs": self._student(locs, precisions, 1 / known),
                "precisions": free,
            },
            predictive=self._student(locs, precisions, 1 + 1 / known),
        )

    def _student(self, locs: Tensor, precisions: _Wishart, factor: Tensor) -> Distribution:
        """Gaussians of covariance factor / precision, with the precisions integrated out."""
        if self._kind == "diag":
            spread = precisions.inverse_scale[..., 0, 0] / precisions.dof * factor[:, None]
            return dist.StudentT(precisions.dof, locs, spread.sqrt()).to_event(1)
        freedom = precisions.dof - precisions.dim + 1
        lower = precisions.root * (1 / freedom).sqrt()[:, None, None]
        if self._kind == "spherical":
            lower = lower * torch.eye(self._dim).to(lower)
        lower = lower * factor.sqrt()[:, None, None]
        return dist.MultivariateStudentT(freedom.expand_as(factor), locs, lower)
