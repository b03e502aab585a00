r"""The Gaussian mixture as a Pyro program.

.. math:: p(x) = \sum_k \pi_k \, \mathcal N(x \mid \mu_k, \Sigma_k)
"""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.checks import refuses_in_words
from pyro_vae.models.mixtures.exponential import ExponentialMixture
from pyro_vae.models.mixtures.gaussian_problem import GaussianProblem
from pyro_vae.models.mixtures.missing import MissingGaussianProblem
from pyro_vae.models.mixtures.natural import NaturalForm, gaussian_form
from pyro_vae.models.mixtures.normal_wishart import GaussianConjugate
from pyro_vae.models.mixtures.problem import MixtureProblem, check_weights
from pyro_vae.models.parts import check_finite

__all__ = ["COVARIANCES", "GaussianMixture"]

COVARIANCES = ("full", "tied", "diag", "spherical")
"""What the covariances may be: one each, one for all, diagonal, or a multiple of the identity."""


class GaussianMixture(ExponentialMixture):
    r"""A Gaussian mixture as a Pyro model with an exact or amortised guide.

    Its parameters start at random; `initialize` sets them to a start for data, `fit_em` and `fit`
    fit them. `from_parameters` builds a mixture with given ones.

    Args:
        num_components: Number K of components.
        dim: Number D of features of one observation.
        covariance: One of `COVARIANCES`.
        reg_covar: Added to the diagonal of every fitted covariance, in squared units of the data.
            Where it is positive an M step no longer maximises the bound exactly, so that the bound
            may fall by a little near the end.
        missing: None refuses NaN in the data; "marginalise" (or "marginalize") integrates such
            entries out, in `fit_em` and in scores, predictions and starts. Exact where an entry is
            missing at random given those observed. `model` and `guide` take complete data only.
        guide: `"exact"` (the responsibilities) or `"amortized"` (a network from x to logits).
        hidden: Hidden layers of the amortised guide's network.
        enumerate: Whether `model` marks its component for enumeration, so that `TraceEnum_ELBO`
            sums it out; otherwise it is sampled.

    References:
        Bishop (2006), Pattern Recognition and Machine Learning, section 9.2.

    Example:
        >>> x = torch.tensor([[0.0], [0.2], [-0.1], [8.1], [7.9]])
        >>> mixture = GaussianMixture(num_components=2, dim=1).initialize(x)
        >>> bool((mixture.predict(x)[:3] != mixture.predict(x)[3]).all())
        True
    """

    measure = "real"
    _conjugate = GaussianConjugate

    @refuses_in_words
    def __init__(
        self,
        num_components: int,
        dim: int,
        covariance: str = "full",
        *,
        reg_covar: float = 0.0,
        missing: str | None = None,
        guide: str = "exact",
        hidden: Sequence[int] = (32,),
        enumerate: bool = True,
    ) -> None:
        if covariance not in COVARIANCES:
            raise ValueError(f"covariance is one of {COVARIANCES}, not {covariance!r}")
        if not 0 <= reg_covar < math.inf:
            raise ValueError(f"reg_covar must be 0 or a positive number, not {reg_covar!r}")
        if missing not in (None, "marginalise", "marginalize"):
            raise ValueError(f"missing is 'marginalise' or None, not {missing!r}")
        self.covariance = covariance
        self.reg_covar = float(reg_covar)
        self.missing = "marginalise" if missing else None
        super().__init__(num_components, dim, guide=guide, hidden=hidden, enumerate=enumerate)

    @classmethod
    def from_parameters(
        cls,
        weights: Float[Tensor, " components"],
        locs: Float[Tensor, "components features"],
        covariances: Float[Tensor, "..."],
        covariance: str = "full",
        **arguments: Any,
    ) -> "GaussianMixture":
        """Builds the mixture with given parameters, in the dtype of `locs`.

        Args:
            weights: Positive, with sum 1, shape (components,).
            locs: Means, shape (components, features).
            covariances: (components, features, features) if full, (features, features) if tied,
                (components, features) if diagonal, (components,) if spherical, as scikit-learn
                has them.
            covariance: One of `COVARIANCES`.
            **arguments: The other arguments of the class.

        Raises:
            ValueError: If shapes disagree, weights are no distribution, or a covariance is not
                positive definite.
        """
        check_weights(weights, len(locs))
        num_components, dim = locs.shape
        mixture = cls(num_components, dim, covariance, **arguments).to(locs)
        if covariances.shape != mixture.covariances.shape:
            raise ValueError(
                f"With covariance={covariance!r} and {len(locs)} components of {locs.shape[1]} "
                f"features, covariances has shape {tuple(mixture.covariances.shape)}, not "
                f"{tuple(covariances.shape)}"
            )
        if covariance in ("full", "tied"):
            scales, info = torch.linalg.cholesky_ex(covariances.detach())
            bad = bool(info.any())
        else:
            scales, bad = covariances.detach().sqrt(), not bool((covariances > 0).all())
        if bad:
            raise ValueError("a covariance is not positive definite")
        mixture.generative.set(weights.detach().log(), locs.detach(), scales)
        return mixture

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments: `GaussianMixture(**config)` has this architecture."""
        own = {"covariance": self.covariance, "reg_covar": self.reg_covar, "missing": self.missing}
        return {**super().config, **own}

    @property
    def num_parameters(self) -> int:
        """Weights, less one for their sum, means and distinct entries of the covariances."""
        entries = {
            "full": self.num_components * self.dim * (self.dim + 1) // 2,
            "tied": self.dim * (self.dim + 1) // 2,
            "diag": self.num_components * self.dim,
            "spherical": self.num_components,
        }
        return self.num_components - 1 + self.num_components * self.dim + entries[self.covariance]

    @property
    def locs(self) -> Float[Tensor, "components features"]:
        """The means, in the data's units."""
        return self.generative.locs

    @property
    def covariances(self) -> Float[Tensor, "..."]:
        """The covariances, in the shapes of `from_parameters`, which are scikit-learn's."""
        scales = self.generative.scales()
        return scales @ scales.mT if self.covariance in ("full", "tied") else scales.square()

    @property
    def dense_covariances(self) -> Float[Tensor, "components features features"]:
        """The covariance matrix of each component, whatever is shared: what an ellipse needs."""
        covariances = self.covariances
        if self._dense:
            return covariances.expand(self.num_components, self.dim, self.dim)
        wide = covariances if covariances.dim() == 2 else covariances[:, None]
        return wide.expand(self.num_components, self.dim).diag_embed()

    def fitted_values(self) -> dict[str, Tensor]:
        """Weights, means and covariances, the latter in scikit-learn's shapes."""
        return {"weights": self.weights, "locs": self.locs, "covariances": self.covariances}

    @property
    def _dense(self) -> bool:
        return self.covariance in ("full", "tied")

    def _make_generative(self) -> nn.Module:
        return _Gaussians(self.num_components, self.dim, self.covariance)

    def _problem(
        self, x: Tensor, sample_weights: Tensor | None, hold: Sequence[str], coordinates: Any
    ) -> MixtureProblem:
        if self.missing:
            return MissingGaussianProblem(self, x, sample_weights, hold, coordinates)
        return GaussianProblem(self, x, sample_weights, hold, coordinates)

    def _natural_form(self, problem: MixtureProblem) -> NaturalForm:
        return gaussian_form(problem)

    @torch.no_grad()
    def _coordinates(self) -> tuple[Tensor, Tensor]:
        """The mean of the mixture and the standard deviations of its components."""
        weights, locs = self.weights.double(), self.locs.double()
        within = weights @ self.dense_covariances.diagonal(dim1=1, dim2=2).double()
        if self.covariance == "spherical":
            within = within.mean().expand(self.dim)
        return weights @ locs, within.sqrt()

    def _check_support(self, x: Tensor) -> None:
        check_finite(
            x,
            "remove or impute them first, or pass missing='marginalise' to the mixture, which "
            "integrates NaN out",
        )

    def components(self) -> Distribution:
        """The components p(x | z = k): batch shape (components,), event shape (features,)."""
        return self._component(torch.arange(self.num_components, device=self.locs.device))

    def _component(self, z: Tensor) -> Distribution:
        locs, scales = self.generative.locs[z], self.generative.scales()
        if self._dense:
            chosen = scales[z] if self.covariance == "full" else scales
            return dist.MultivariateNormal(locs, scale_tril=chosen)
        chosen = scales[z] if self.covariance == "diag" else scales[z][..., None]
        return dist.Normal(locs, chosen).to_event(1)

    def _draw(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        locs, scales = self.generative.locs[z], self.generative.scales()
        noise = torch.empty_like(locs).normal_(generator=generator)
        if self.covariance == "tied":
            return locs + noise @ scales.mT
        if self.covariance == "full":
            return locs + torch.linalg.vecdot(scales[z], noise[:, None])
        return locs + noise * (scales[z] if self.covariance == "diag" else scales[z][:, None])


class _Gaussians(nn.Module):
    """Logits of the weights, means, and lower roots of the covariances with log diagonals."""

    def __init__(self, num_components: int, dim: int, covariance: str) -> None:
        super().__init__()
        shape = {
            "full": (num_components, dim),
            "tied": (dim,),
            "diag": (num_components, dim),
            "spherical": (num_components,),
        }[covariance]
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.locs = nn.Parameter(torch.randn(num_components, dim))
        self.log_scales = nn.Parameter(torch.zeros(shape))
        dense = covariance in ("full", "tied")
        # What lies on and above its diagonal is not used and stays 0.
        self.lower = nn.Parameter(torch.zeros(*shape, dim)) if dense else None

    def scales(self) -> Tensor:
        """Lower roots of the covariances, or standard deviations."""
        if self.lower is None:
            return self.log_scales.exp()
        return self.lower.tril(-1) + self.log_scales.exp().diag_embed()

    @torch.no_grad()
    def set(self, log_weights: Tensor, locs: Tensor, scales: Tensor) -> None:
        self.logits.copy_(log_weights)
        self.locs.copy_(locs)
        if self.lower is None:
            self.log_scales.copy_(scales.log())
        else:
            self.log_scales.copy_(scales.diagonal(dim1=-2, dim2=-1).log())
            self.lower.copy_(scales.tril(-1))
