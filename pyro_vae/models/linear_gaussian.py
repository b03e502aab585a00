r"""The linear Gaussian model, of which everything is known: the oracle of this library.

.. math:: p(z) = \mathcal N(0, I), \quad p(x \mid z) = \mathcal N(W z + b, \Psi)

With :math:`\Psi = \sigma^2 I` it is probabilistic PCA, with a diagonal :math:`\Psi` factor
analysis; with an affine encoder it is the linear VAE. Evidence, posterior, bound, gaps and (for
probabilistic PCA) the maximum likelihood fit have closed forms, so every estimator can be checked.

The posterior is :math:`\mathcal N(L^{-1} W^\top \Psi^{-1} (x - b), L^{-1})` with the precision
:math:`L = I + W^\top \Psi^{-1} W` the same for every x. Only L, of size (latent, latent), is ever
factorised, and quadratic forms are sums of squares, so that nothing cancels.
"""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal

from pyro_vae.checks import refuses_in_words
from pyro_vae.data import takes_arrays
from pyro_vae.models.parts import check_batch, check_finite

__all__ = ["LinearGaussian"]

_LEAST_NOISE = 1e-12


class LinearGaussian(nn.Module):
    r"""Probabilistic PCA or factor analysis as a Pyro model, with three guides.

    `guide` is the amortised guide of the linear VAE, :math:`q(z \mid x) = \mathcal N(V x + c, D)`
    with a diagonal D shared by all x and trainable V, c and D. `exact_guide` is the posterior, and
    `best_diagonal_guide` the closest diagonal normal to it in KL(q || p): both have no parameters
    of their own. Each program registers with Pyro just the parameters that it uses.

    Args:
        data_dim: Number of features of one observation.
        latent_dim: Number of latents of one observation.
        covariance: Of the noise: `"isotropic"` (probabilistic PCA) or `"diagonal"` (factor
            analysis).

    Attributes:
        generative: The affine map W, b and the log-scale of the noise.
        recognition: The affine map V, c and the log-scale of `guide`.

    References:
        Tipping & Bishop (1999), Probabilistic principal component analysis, JRSS B 61, 611-622.
        Lucas, Tucker, Grosse & Norouzi (2019), Don't blame the ELBO! A linear VAE perspective on
        posterior collapse, arXiv:1911.02469.

    Example:
        >>> model = LinearGaussian(data_dim=5, latent_dim=2).double()
        >>> x = model.sample(3)
        >>> exact = model.posterior(x)
        >>> bound = model.elbo(x, exact.mean, exact.covariance_matrix)
        >>> torch.allclose(bound, model.log_evidence(x))
        True
    """

    @refuses_in_words
    def __init__(self, data_dim: int, latent_dim: int, *, covariance: str = "isotropic") -> None:
        super().__init__()
        if covariance not in ("isotropic", "diagonal"):
            raise ValueError(f"covariance is 'isotropic' or 'diagonal', not {covariance!r}")
        if data_dim < 1 or latent_dim < 1:
            raise ValueError(
                f"data_dim and latent_dim must be positive, not {data_dim} and {latent_dim}"
            )
        self.data_dim = data_dim
        self.latent_dim = latent_dim
        self.covariance = covariance
        num_scales = 1 if covariance == "isotropic" else data_dim
        self.generative = _AffineNormal(latent_dim, data_dim, num_scales)
        self.recognition = _AffineNormal(data_dim, latent_dim, latent_dim)

    @classmethod
    def from_parameters(
        cls,
        weight: Float[Tensor, "features latent"],
        bias: Float[Tensor, " features"],
        noise_variance: Float[Tensor, "*scales"],
    ) -> "LinearGaussian":
        """Builds the model with given generative parameters, in the dtype of `weight`.

        Args:
            weight: W, shape (features, latent).
            bias: b, shape (features,).
            noise_variance: A scalar tensor for probabilistic PCA, or shape (features,) for factor
                analysis.

        Returns:
            The model; the affine map of its `guide` is at a random start.

        Raises:
            ValueError: If a noise variance is not positive, or shapes disagree.
        """
        data_dim, latent_dim = weight.shape
        if bias.shape != (data_dim,) or noise_variance.shape not in ((), (data_dim,)):
            raise ValueError(
                f"With a weight of shape {tuple(weight.shape)}, bias must have shape ({data_dim},) "
                f"and noise_variance () or ({data_dim},), not {tuple(bias.shape)} and "
                f"{tuple(noise_variance.shape)}"
            )
        if not (noise_variance > 0).all():
            raise ValueError("every noise variance must be positive")
        covariance = "isotropic" if noise_variance.ndim == 0 else "diagonal"
        model = cls(data_dim, latent_dim, covariance=covariance).to(weight)
        model.generative.set(weight, bias, noise_variance.sqrt())
        return model

    @classmethod
    @takes_arrays()
    def ppca_optimum(cls, x: Float[Tensor, "batch features"], latent_dim: int) -> "LinearGaussian":
        r"""The maximum likelihood fit of probabilistic PCA, and of the linear VAE.

        .. math:: W = U_H (\Lambda_H - \sigma^2 I)^{1/2}, \quad
                  \sigma^2 = \frac{1}{D - H} \sum_{i > H} \lambda_i

        from the eigenvalues :math:`\lambda` and eigenvectors U of the covariance of x (divided by
        the batch size). The columns of W are orthogonal, so the posterior is diagonal and `guide`,
        which is set to it, is exact: the ELBO equals the log evidence.

        Args:
            x: Data, shape (batch, features).
            latent_dim: The number H of latents, less than the number of features.

        Raises:
            ValueError: If the data leave no variance for the noise.

        Note: W is unique up to a rotation of the latents; here they are the principal axes.

        References:
            Tipping & Bishop (1999); Lucas et al. (2019).
        """
        eigenvalues, axes, noise_variance = _ppca_spectrum(x, latent_dim)
        scales = (eigenvalues[:latent_dim] - noise_variance).clamp(min=0).sqrt()
        weight = (axes[:, :latent_dim] * scales).to(x.dtype)
        bias = x.double().mean(0).to(x.dtype)
        model = cls.from_parameters(weight, bias, noise_variance.to(x.dtype))
        scale_tril = model._posterior_scale_tril()
        gain = scale_tril @ scale_tril.mT @ (weight / noise_variance.to(x.dtype)).mT
        model.recognition.set(gain, -gain @ bias, model.posterior_precision.diagonal().rsqrt())
        return model

    @classmethod
    @takes_arrays()
    def factor_analysis(
        cls,
        x: Float[Tensor, "batch features"],
        latent_dim: int,
        *,
        tolerance: float = 1e-8,
        max_iterations: int = 1000,
    ) -> tuple["LinearGaussian", list[float]]:
        r"""The maximum likelihood fit of factor analysis, by alternating W and Psi.

        With Psi held fixed the best W has a closed form, from the singular values s and right
        vectors V of the data scaled to unit noise; with W held fixed, the best Psi is what the
        factors leave of each feature's variance:

        .. math:: W = \Psi^{1/2} V (s^2 - 1)_+^{1/2}, \qquad
                  \Psi = \operatorname{diag}(S - W W^\top)

        Args:
            x: Data, shape (batch, features).
            latent_dim: Number of factors, at most the number of features.
            tolerance: Stops when a round raises the total log-likelihood by less, in nats.
            max_iterations: Rounds at most.

        Returns:
            The model, and the total log-likelihood of x after each round, in nats.

        Raises:
            ValueError: If there are more factors than features.

        Note: where the likelihood rises as the noise of a feature falls to zero (a Heywood case),
            its variance stops at 1e-12.

        References:
            Barber (2012), Bayesian Reasoning and Machine Learning, section 21.2.
        """
        check_finite(x)
        data = x.detach().double()
        if not 0 < latent_dim <= data.shape[1]:
            raise ValueError(
                f"latent_dim must lie between 1 and {data.shape[1]}, the features of the data, "
                f"not {latent_dim}"
            )
        bias, variance = data.mean(0), data.var(0, correction=0)
        noise = torch.ones_like(variance)
        path: list[float] = []
        while True:
            root = noise.sqrt() + _LEAST_NOISE
            scaled = (data - bias) / (root * math.sqrt(len(data)))
            _, values, axes = torch.linalg.svd(scaled, full_matrices=False)
            values, axes = values[:latent_dim].square(), axes[:latent_dim]
            weight = ((values - 1).clamp(min=0).sqrt()[:, None] * axes * root).mT
            unexplained = scaled.square().sum() - values.sum()
            log_det = values.clamp(min=1).log().sum() + 2 * root.log().sum()
            constant = data.shape[1] * math.log(2 * math.pi) + values.clamp(max=1).sum()
            path.append(-len(data) / 2 * float(constant + log_det + unexplained))
            if len(path) == max_iterations or (len(path) > 1 and path[-1] - path[-2] < tolerance):
                break
            noise = (variance - weight.square().sum(1)).clamp(min=_LEAST_NOISE)
        weight = torch.nn.functional.pad(weight, (0, latent_dim - weight.shape[1]))
        return cls.from_parameters(weight, bias, noise), path

    @classmethod
    @takes_arrays()
    def ppca_log_likelihood(
        cls, x: Float[Tensor, "batch features"], latent_dim: int
    ) -> Float[Tensor, ""]:
        r"""The log-likelihood of x at the maximum, from the eigenvalues alone.

        .. math:: -\frac{N}{2} \Bigl[ D \log 2\pi + \sum_{i \le H} \log \lambda_i
                  + (D - H) \log \sigma^2 + D \Bigr]

        Returns:
            A float64 scalar: a sum over the batch, in nats.

        Raises:
            ValueError: If the data leave no variance for the noise.

        References:
            Tipping & Bishop (1999): their likelihood at its maximum.
        """
        eigenvalues, _, noise_variance = _ppca_spectrum(x, latent_dim)
        num_data, data_dim = x.shape
        log_det = eigenvalues[:latent_dim].log().sum()
        log_det = log_det + (data_dim - latent_dim) * noise_variance.log()
        return -num_data / 2 * (data_dim * math.log(2 * math.pi) + log_det + data_dim)

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments: `LinearGaussian(**config)` has this architecture."""
        return {
            "data_dim": self.data_dim,
            "latent_dim": self.latent_dim,
            "covariance": self.covariance,
        }

    @property
    def bound_ends_at_entropies(self) -> bool:
        """Whether noise and loadings are free to scale, so that `fit` reports a residual."""
        return all(p.requires_grad for p in self.generative.parameters())

    @property
    def weight(self) -> Float[Tensor, "features latent"]:
        """The loadings W."""
        return self.generative.affine.weight

    @property
    def bias(self) -> Float[Tensor, " features"]:
        """The mean b of the data."""
        return self.generative.affine.bias

    @property
    def noise_variance(self) -> Float[Tensor, " features"]:
        """The diagonal of the noise covariance, one entry per feature also if isotropic."""
        return (2 * self.generative.log_scale).exp().expand(self.data_dim)

    @property
    def posterior_precision(self) -> Float[Tensor, "latent latent"]:
        r""":math:`L = I + W^\top \Psi^{-1} W`, the same for every x."""
        loadings = self.weight / self._noise_scale[:, None]
        signal = loadings.mT @ loadings
        return _identity_like(signal) + signal

    def model(self, x: Float[Tensor, "batch features"]) -> None:
        """The generative program: sites "z" and, observed, "x", in the plate "data".

        Raises:
            ValueError: If x has the wrong shape or dtype, or holds NaN or infinite values.
        """
        self._check(x)
        generative = pyro.module("generative", self.generative)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", generative(z), obs=x)

    def guide(self, x: Float[Tensor, "batch features"]) -> None:
        """The amortised guide of the linear VAE: samples "z" from `amortized_posterior`.

        Raises:
            ValueError: As `model`.
        """
        pyro.module("recognition", self.recognition)
        posterior = self.amortized_posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior)

    def exact_guide(self, x: Float[Tensor, "batch features"]) -> None:
        """The exact posterior as a guide: the bound is tight and has no variance.

        Raises:
            ValueError: As `model`.
        """
        pyro.module("generative", self.generative)
        posterior = self.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior)

    def best_diagonal_guide(self, x: Float[Tensor, "batch features"]) -> None:
        """The best diagonal normal as a guide: what is left is `diagonal_gap` for every datum.

        Raises:
            ValueError: As `model`.
        """
        pyro.module("generative", self.generative)
        posterior = self.best_diagonal_posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior)

    @torch.no_grad()
    def sample(
        self, num_samples: int, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "samples features"]:
        """Draws data from p(x), without gradient.

        Args:
            num_samples: How many draws.
            generator: The source of randomness, on the parameters' device; torch's global one if
                omitted.
        """
        like = self.weight
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        z = torch.randn(num_samples, self.latent_dim, generator=generator, **options)
        noise = torch.randn(num_samples, self.data_dim, generator=generator, **options)
        return z @ self.weight.mT + self.bias + noise * self._noise_scale

    @takes_arrays()
    def amortized_posterior(self, x: Float[Tensor, "batch features"]) -> Independent:
        """The q(z | x) of `guide`: diagonal normals with batch shape (batch,)."""
        self._check(x)
        return self.recognition(x)

    @takes_arrays()
    def posterior(self, x: Float[Tensor, "batch features"]) -> MultivariateNormal:
        """The exact posterior p(z | x): normals with batch shape (batch,)."""
        self._check(x)
        return dist.MultivariateNormal(
            self._posterior_mean(x), scale_tril=self._posterior_scale_tril()
        )

    @takes_arrays()
    def best_diagonal_posterior(self, x: Float[Tensor, "batch features"]) -> Independent:
        """The diagonal q that minimises KL(q || p(z | x)): the posterior's mean and diag(L).

        References:
            Bishop (2006), Pattern Recognition and Machine Learning, eqs 10.12-10.15.
        """
        self._check(x)
        scale = self.posterior_precision.diagonal().rsqrt()
        return dist.Normal(self._posterior_mean(x), scale).to_event(1)

    @takes_arrays()
    def log_evidence(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, " batch"]:
        r"""The exact log p(x), in nats per datum, differentiable.

        .. math:: -\tfrac12 \bigl[ \|\Psi^{-1/2}(x - b - W m)\|^2 + \|m\|^2
                  + \log|2\pi\Psi| + \log|L| \bigr]

        with m the posterior mean; by Woodbury the two squares are the Mahalanobis distance of x.
        """
        self._check(x)
        half_log_det = -self._posterior_scale_tril().diagonal().log().sum()
        return self._log_joint(x, self._posterior_mean(x)) - half_log_det

    @takes_arrays()
    def elbo(
        self,
        x: Float[Tensor, "batch features"],
        loc: Float[Tensor, "batch latent"],
        covariance: Float[Tensor, "*#stack latent latent"],
    ) -> Float[Tensor, " batch"]:
        """The exact ELBO of q(z | x) = N(loc, covariance), in nats per datum, differentiable.

        Args:
            x: Data, shape (batch, features).
            loc: Means of q, shape (batch, latent).
            covariance: Of q, shape (batch, latent, latent), or (latent, latent) for all data.

        Raises:
            ValueError: If x is refused, or a covariance is not positive definite.
        """
        self._check(x)
        entropy_and_spread = self._minus_half_trace(covariance) + _half_log_det(covariance)
        return self._log_joint(x, loc) + entropy_and_spread + self.latent_dim / 2

    @takes_arrays()
    def kl_to_posterior(
        self,
        x: Float[Tensor, "batch features"],
        loc: Float[Tensor, "batch latent"],
        covariance: Float[Tensor, "*#stack latent latent"],
    ) -> Float[Tensor, " batch"]:
        """The exact KL(q || p(z | x)) of q(z | x) = N(loc, covariance), in nats per datum.

        It is the gap `log_evidence - elbo`, computed without their difference. Arguments and
        errors are those of `elbo`.
        """
        self._check(x)
        root = self._posterior_scale_tril()
        away = torch.linalg.solve_triangular(root, (loc - self._posterior_mean(x)).mT, upper=False)
        spread = self._minus_half_trace(covariance) + _half_log_det(covariance)
        half_log_det_precision = -root.diagonal().log().sum()
        divergence = 0.5 * away.square().sum(0) - spread - half_log_det_precision
        return divergence - self.latent_dim / 2

    def diagonal_gap(self) -> Float[Tensor, ""]:
        r"""The gap that `best_diagonal_guide` leaves, in nats, the same for every datum.

        .. math:: \tfrac12 \Bigl( \sum_i \log L_{ii} - \log |L| \Bigr)
        """
        half_log_det = -self._posterior_scale_tril().diagonal().log().sum()
        return 0.5 * self.posterior_precision.diagonal().log().sum() - half_log_det

    @property
    def _noise_scale(self) -> Float[Tensor, " features"]:
        return self.generative.log_scale.exp().expand(self.data_dim)

    def _check(self, x: Tensor) -> None:
        check_batch(x, self.data_dim, like=self.weight)
        if is_validation_enabled():  # a graph cannot be captured through a branch on data
            check_finite(x)

    def _posterior_scale_tril(self) -> Float[Tensor, "latent latent"]:
        """The lower root S of the posterior covariance, from a Cholesky factor of its inverse."""
        flipped = _cholesky(self.posterior_precision.flip(0, 1)).flip(0, 1)  # U, with U U^T = L
        return torch.linalg.solve_triangular(flipped.mT, _identity_like(flipped), upper=False)

    def _posterior_mean(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch latent"]:
        root = self._posterior_scale_tril()
        return ((x - self.bias) / self.noise_variance) @ self.weight @ root @ root.mT

    def _log_joint(
        self, x: Float[Tensor, "batch features"], z: Float[Tensor, "batch latent"]
    ) -> Float[Tensor, " batch"]:
        r""":math:`\log p(x, z) + \tfrac H2 \log 2\pi`."""
        residual = (x - self.bias - z @ self.weight.mT) / self._noise_scale
        log_normaliser = self.data_dim * math.log(2 * math.pi) + self.noise_variance.log().sum()
        return -0.5 * (residual.square().sum(-1) + z.square().sum(-1) + log_normaliser)

    def _minus_half_trace(
        self, covariance: Float[Tensor, "*stack latent latent"]
    ) -> Float[Tensor, "*stack"]:
        return -0.5 * (covariance * self.posterior_precision).sum((-2, -1))


class _AffineNormal(nn.Module):
    """The conditional normal N(A u + a, diagonal) of an affine map."""

    def __init__(self, in_dim: int, out_dim: int, num_scales: int) -> None:
        super().__init__()
        self.affine = nn.Linear(in_dim, out_dim)
        self.log_scale = nn.Parameter(torch.zeros(num_scales))

    def forward(self, inputs: Float[Tensor, "*batch inputs"]) -> Independent:
        return dist.Normal(self.affine(inputs), self.log_scale.exp()).to_event(1)

    @torch.no_grad()
    def set(self, weight: Tensor, bias: Tensor, scale: Tensor) -> None:
        self.affine.weight.copy_(weight)
        self.affine.bias.copy_(bias)
        self.log_scale.copy_(scale.log())


def _identity_like(matrix: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim dim"]:
    return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _cholesky(matrix: Float[Tensor, "*stack dim dim"]) -> Float[Tensor, "*stack dim dim"]:
    try:
        return torch.linalg.cholesky(matrix)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"a covariance or precision is not positive definite in {matrix.dtype}; check it, or "
            "use float64 (`model.double()`)"
        ) from error


def _half_log_det(matrix: Float[Tensor, "*stack dim dim"]) -> Float[Tensor, "*stack"]:
    return _cholesky(matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _ppca_spectrum(
    x: Float[Tensor, "batch features"], latent_dim: int
) -> tuple[Float[Tensor, " features"], Float[Tensor, "features features"], Float[Tensor, ""]]:
    """Eigenvalues (falling) and axes of the covariance, and the noise variance, in float64."""
    data_dim = x.shape[1]
    if not 0 < latent_dim < data_dim:
        raise ValueError(
            f"latent_dim must lie between 1 and {data_dim - 1} for data with {data_dim} features, "
            f"not {latent_dim}"
        )
    check_finite(x)
    centred = x.detach().double() - x.detach().double().mean(0)
    eigenvalues, axes = torch.linalg.eigh(centred.mT @ centred / len(x))
    eigenvalues, axes = eigenvalues.flip(0).clamp(min=0), axes.flip(1)
    noise_variance = eigenvalues[latent_dim:].mean()
    if noise_variance <= data_dim * torch.finfo(torch.float64).eps * eigenvalues[0]:
        raise ValueError(
            f"the data leave no variance for the noise: they lie in {latent_dim} dimensions. Use a "
            "smaller latent_dim, or more data"
        )
    return eigenvalues, axes, noise_variance
