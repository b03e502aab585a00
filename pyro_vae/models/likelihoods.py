r"""Likelihoods: what a decoder's output says about one observation, :math:`p(x \mid z)`.

A likelihood is a small `nn.Module` (it may own a learned scale) that turns the decoder's output
into a distribution over the whole feature vector. It names the measure its numbers live on: a
probability of binary pixels and a density of grey ones are different things.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

__all__ = [
    "Bernoulli",
    "ContinuousBernoulli",
    "Gaussian",
    "Likelihood",
    "check_batch",
    "check_finite",
    "make_likelihood",
]


class Likelihood(nn.Module, ABC):
    """The abstract likelihood; its subclasses are final.

    Attributes:
        measure: What the data are, and so what `log_prob` is: `"binary"` (log-probabilities),
            `"grey"` (log-densities on [0, 1]) or `"real"` (log-densities on the real line). Nats.
    """

    measure: ClassVar[str]

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """A JSON-able mapping from which `make_likelihood` rebuilds this likelihood."""

    @abstractmethod
    def num_parameters(self, data_dim: int) -> int:
        """The number of outputs that the decoder must have for `data_dim` features."""

    @abstractmethod
    def distribution(self, decoder_output: Float[Tensor, "*batch outputs"]) -> Distribution:
        """The distribution of x given the decoder's output.

        Args:
            decoder_output: Shape (*batch, num_parameters(data_dim)).

        Returns:
            A distribution with batch shape `batch` and event shape (data_dim,).
        """

    @abstractmethod
    def mean(
        self, decoder_output: Float[Tensor, "*batch outputs"]
    ) -> Float[Tensor, "*batch features"]:
        """The mean of every feature given the decoder's output: what pictures show."""

    @abstractmethod
    def _on_support(self, x: Float[Tensor, "*batch features"]) -> bool:
        """Whether all of x is finite and on the support. Runs every step, so it must be fast."""

    @abstractmethod
    def _way_out(self, x: Float[Tensor, "*batch features"]) -> str:
        """What to do about data that lie off the support, one sentence."""

    def check(self, x: Float[Tensor, "*batch features"]) -> None:
        """Raises if x lies off the support of this likelihood.

        Raises:
            ValueError: If a value is NaN or infinite, or lies off the support; says which way out.

        Note: the programs call this under Pyro's validation switch (on by default), since a
            graph cannot be captured through a branch on data. Code that switches validation off
            calls `check` itself, once per data set.
        """
        if not self._on_support(x):
            check_finite(x)
            raise ValueError(self._way_out(x))


class Bernoulli(Likelihood):
    r"""Independent binary pixels; the decoder gives their logits. Refuses grey pixels.

    .. math:: \log p(x \mid z) = \sum_d x_d \log \sigma(l_d) + (1 - x_d) \log \sigma(-l_d)
    """

    measure = "binary"

    @property
    def config(self) -> dict[str, Any]:
        """See `Likelihood.config`."""
        return {"name": "bernoulli"}

    def num_parameters(self, data_dim: int) -> int:
        """One logit per pixel."""
        return data_dim

    def distribution(self, decoder_output: Float[Tensor, "*batch outputs"]) -> Distribution:
        """See `Likelihood.distribution`; the outputs are logits."""
        return dist.Bernoulli(logits=decoder_output).to_event(1)

    def mean(
        self, decoder_output: Float[Tensor, "*batch outputs"]
    ) -> Float[Tensor, "*batch features"]:
        """The probability that each pixel is one."""
        return decoder_output.sigmoid()

    def _on_support(self, x: Float[Tensor, "*batch features"]) -> bool:
        return torch.equal(x.square(), x) and bool(x.max() <= 1)  # inf is its own square

    def _way_out(self, x: Float[Tensor, "*batch features"]) -> str:
        if x.min() >= 0 and x.max() <= 1:
            return (
                "Grey pixels have no probability under a Bernoulli: binarise them, or use the "
                "'continuous_bernoulli' likelihood."
            )
        return _off_support(x, "0 or 1", "binarise them, or use the 'gaussian' likelihood")


class ContinuousBernoulli(Likelihood):
    r"""Independent grey pixels in [0, 1]; the decoder gives the natural parameter ("logits") l.

    .. math:: \log p(x \mid z)
        = \sum_d (x_d - \tfrac12) l_d - \log \frac{\sinh(l_d / 2)}{l_d / 2}

    This is a normalised density. Its mean is not :math:`\sigma(l)` but
    :math:`\tfrac12 + \tfrac12 [\coth(l/2) - 2/l]`.

    Note: torch's own `ContinuousBernoulli` clamps probabilities; in float32 it is off by 0.2 nats
        a pixel at a logit of 20 and by 0.6 at 30. The one used here is exact at every logit.

    References:
        Loaiza-Ganem & Cunningham (2019), The continuous Bernoulli: fixing a pervasive error in
        variational autoencoders, arXiv:1907.06845, eqs 6-8.
    """

    measure = "grey"

    @property
    def config(self) -> dict[str, Any]:
        """See `Likelihood.config`."""
        return {"name": "continuous_bernoulli"}

    def num_parameters(self, data_dim: int) -> int:
        """One natural parameter per pixel."""
        return data_dim

    def distribution(self, decoder_output: Float[Tensor, "*batch outputs"]) -> Distribution:
        """See `Likelihood.distribution`; the outputs are natural parameters."""
        return _ContinuousBernoulli(decoder_output).to_event(1)

    def mean(
        self, decoder_output: Float[Tensor, "*batch outputs"]
    ) -> Float[Tensor, "*batch features"]:
        """The mean of each pixel, in (0, 1)."""
        return _continuous_bernoulli_mean(decoder_output)

    def _on_support(self, x: Float[Tensor, "*batch features"]) -> bool:
        low, high = x.aminmax()
        return bool(low >= 0) and bool(high <= 1)  # NaN propagates, and fails

    def _way_out(self, x: Float[Tensor, "*batch features"]) -> str:
        return _off_support(x, "in [0, 1]", "rescale them, or use the 'gaussian' likelihood")


class Gaussian(Likelihood):
    r"""Independent real features; the decoder gives their means.

    A learned scale is bounded below by :math:`s = m + e^{r}` with r unconstrained, which is the
    soft clip of :math:`\log s` at :math:`\log m` of Rybkin et al. Without a bound the density of
    a pixel that is constant over the data set grows without end.

    Args:
        scale: `"shared"` learns one scale for all features (starting at 1); `"pixel"` takes a
            scale per feature from the decoder; a positive number is a fixed scale.
        min_scale: The lower bound m of a learned scale, in the data's own units.

    References:
        Rybkin, Daniilidis & Levine (2021), Simple and effective VAE training with calibrated
        decoders, arXiv:2006.13202, section 4 and appendix.
    """

    measure = "real"

    def __init__(self, scale: str | float = "shared", min_scale: float = 1e-3) -> None:
        super().__init__()
        if isinstance(scale, str) and scale not in ("shared", "pixel"):
            raise ValueError(f"scale is 'shared', 'pixel' or a positive number, not {scale!r}.")
        if not isinstance(scale, str) and not (0 < scale < math.inf):
            raise ValueError(f"A fixed scale must be positive and finite, not {scale}.")
        if not 0 < min_scale < 1:
            raise ValueError(f"min_scale must lie between 0 and 1, not {min_scale}.")
        self._scale = scale if isinstance(scale, str) else float(scale)
        self._min_scale = float(min_scale)
        if scale == "shared":
            self.raw_scale = nn.Parameter(torch.tensor(math.log(1 - self._min_scale)))

    @property
    def config(self) -> dict[str, Any]:
        """See `Likelihood.config`."""
        return {"name": "gaussian", "scale": self._scale, "min_scale": self._min_scale}

    def num_parameters(self, data_dim: int) -> int:
        """A mean per feature, and with `scale="pixel"` an unconstrained scale per feature."""
        return 2 * data_dim if self._scale == "pixel" else data_dim

    def distribution(self, decoder_output: Float[Tensor, "*batch outputs"]) -> Distribution:
        """See `Likelihood.distribution`; the outputs are means, then unconstrained scales."""
        return dist.Normal(self.mean(decoder_output), self.scale(decoder_output)).to_event(1)

    def mean(
        self, decoder_output: Float[Tensor, "*batch outputs"]
    ) -> Float[Tensor, "*batch features"]:
        """The mean of each feature."""
        return decoder_output.chunk(2, dim=-1)[0] if self._scale == "pixel" else decoder_output

    def scale(self, decoder_output: Float[Tensor, "*batch outputs"]) -> Tensor:
        """The standard deviation: shape (*batch, features) with `scale="pixel"`, else a scalar."""
        if isinstance(self._scale, float):
            return decoder_output.new_full((), self._scale)
        if self._scale == "shared":
            return self._min_scale + self.raw_scale.exp()
        return self._min_scale + decoder_output.chunk(2, dim=-1)[1].exp()

    def _on_support(self, x: Float[Tensor, "*batch features"]) -> bool:
        return _is_finite(x)

    def _way_out(self, x: Float[Tensor, "*batch features"]) -> str:
        return _off_support(x, "real", "remove the others")


_LIKELIHOODS: Mapping[str, type[Likelihood]] = MappingProxyType(
    {
        "bernoulli": Bernoulli,
        "continuous_bernoulli": ContinuousBernoulli,
        "gaussian": Gaussian,
    }
)


def make_likelihood(likelihood: str | Mapping[str, Any] | Likelihood) -> Likelihood:
    """Turns a name or a `Likelihood.config` into a likelihood; an instance passes through.

    Args:
        likelihood: `"bernoulli"`, `"continuous_bernoulli"`, `"gaussian"`; a mapping with such a
            `"name"` and the arguments of its class; or a likelihood.

    Raises:
        ValueError: If the name is unknown or missing.
        TypeError: If an argument is not one of that likelihood's.

    Example:
        >>> make_likelihood({"name": "gaussian", "scale": 0.1}).config["scale"]
        0.1
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    arguments = {"name": likelihood} if isinstance(likelihood, str) else dict(likelihood)
    name = str(arguments.pop("name", None))
    if name not in _LIKELIHOODS:
        raise ValueError(f"Unknown likelihood {name!r}: choose one of {sorted(_LIKELIHOODS)}.")
    return _LIKELIHOODS[name](**arguments)


def check_batch(x: Tensor, data_dim: int, like: Tensor) -> None:
    """Raises unless x is a batch of rows that a model with parameters `like` can take.

    Args:
        x: The data.
        data_dim: The number of features that the model was built for.
        like: Any parameter of the model.

    Raises:
        ValueError: If x is not of shape (batch, data_dim), or not of the parameters' dtype.
    """
    if x.ndim != 2 or x.shape[1] != data_dim or len(x) == 0:
        raise ValueError(
            f"The data must have shape (batch, {data_dim}), not {tuple(x.shape)}: flatten each "
            "observation into one row, and give at least one."
        )
    if x.dtype != like.dtype:
        raise ValueError(
            f"The data are {x.dtype} but the parameters are {like.dtype}: convert one of them, "
            f"for example x.to({like.dtype})."
        )


def check_finite(x: Tensor) -> None:
    """Raises if x holds NaN or infinite values.

    Raises:
        ValueError: If it does.
    """
    if not _is_finite(x):
        raise ValueError("The data hold NaN or infinite values; remove or impute them first.")


def _is_finite(x: Tensor) -> bool:
    # The sum is 25 times faster; it can only err by overflowing.
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def _off_support(x: Tensor, support: str, way_out: str) -> str:
    return (
        f"The data must be {support}, but lie between {x.min():.3g} and {x.max():.3g}: {way_out}."
    )


class _ContinuousBernoulli(dist.TorchDistribution):
    """The continuous Bernoulli in its natural parameter, without torch's clamping."""

    arg_constraints: ClassVar[dict[str, Any]] = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(
        self, logits: Float[Tensor, "*batch"], *, validate_args: bool | None = None
    ) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "_ContinuousBernoulli":
        new = self._get_checked_instance(_ContinuousBernoulli, _instance)
        new.logits = self.logits.expand(batch_shape)
        super(_ContinuousBernoulli, new).__init__(new.logits.shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Float[Tensor, "*batch"]:
        return _continuous_bernoulli_mean(self.logits)

    def log_prob(self, value: Float[Tensor, "*any"]) -> Float[Tensor, "*all"]:
        if self._validate_args:
            self._validate_sample(value)
        return (value - 0.5) * self.logits - _log_sinhc(self.logits / 2)

    def rsample(self, sample_shape: Any = ()) -> Float[Tensor, "*all"]:
        shape = self._extended_shape(torch.Size(sample_shape))
        uniform = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
        # The inverse CDF at -|l|, where nothing overflows; x -> 1 - x turns l into -l.
        decay = -self.logits.abs()
        safe = torch.where(decay == 0, -1.0, decay)
        below = torch.where(decay == 0, uniform, torch.log1p(uniform * safe.expm1()) / safe)
        return torch.where(self.logits > 0, 1 - below, below).clamp(0, 1)


_SERIES_BELOW = 0.1  # five terms leave a relative error of 7e-16 there


def _log_sinhc(u: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    r""":math:`\log(\sinh(u)/u)`, with a gradient that is finite and right at zero."""
    small = u.abs() < _SERIES_BELOW
    square = torch.where(small, u, 0.0).square()
    series = square * (1 / 6 - square * (1 / 180 - square * (1 / 2835 - square / 37800)))
    size = torch.where(small, 1.0, u).abs()
    return torch.where(small, series, size - (2 * size).log() + torch.log1p(-(-2 * size).exp()))


def _continuous_bernoulli_mean(logits: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    r""":math:`\tfrac12 + \tfrac12 (\coth u - 1/u)` with :math:`u = l/2`."""
    u = logits / 2
    small = u.abs() < _SERIES_BELOW
    square = torch.where(small, u, 0.0).square()
    terms = 1 / 45 - square * (2 / 945 - square * (1 / 4725 - square * 2 / 93555))
    series = u * (1 / 3 - square * terms)
    large = torch.where(small, 1.0, u)
    return 0.5 + 0.5 * torch.where(small, series, 1 / large.tanh() - 1 / large)
