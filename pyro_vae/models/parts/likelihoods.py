r"""Likelihoods: what a decoder's output says about one observation, :math:`p(x \mid z)`.

A likelihood is a small `nn.Module` (it may own a learned scale) that turns the decoder's output
into a distribution over the whole feature vector. It names the measure its numbers live on: a
probability of binary pixels and a density of grey ones are different things.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, final

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.models.parts.distributions import (
    _continuous_bernoulli_mean,
    _ContinuousBernoulli,
    _GreyGrid,
    _Levels,
    _Logistics,
)

__all__ = [
    "Bernoulli",
    "CategoricalLevels",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Gaussian",
    "Likelihood",
    "check_batch",
    "check_finite",
    "make_likelihood",
]


class Likelihood(nn.Module, ABC):
    """The abstract likelihood; its subclasses are final.

    Attributes:
        measure: What the data are, and so what `log_prob` is: `"binary"` or `"counts"`
            (log-probabilities, of pixels that are 0 or 1 and of grey levels), `"grey"`
            (log-densities on [0, 1]) or `"real"` (log-densities on the real line). Nats.
    """

    measure: ClassVar[str]

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """A JSON-able mapping from which `make_likelihood` rebuilds this likelihood."""

    @abstractmethod
    def num_parameters(self, data_dim: int) -> int:
        """The number of outputs that the decoder must have for `data_dim` features.

        They are blocks of one number per feature, one block after another.
        """

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
        variational autoencoders, arXiv:1907.06845.
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
        decoders, arXiv:2006.13202.
    """

    measure = "real"

    def __init__(self, scale: str | float = "shared", min_scale: float = 1e-3) -> None:
        super().__init__()
        if isinstance(scale, str) and scale not in ("shared", "pixel"):
            raise ValueError(f"scale is 'shared', 'pixel' or a positive number, not {scale!r}")
        if not isinstance(scale, str) and not (0 < scale < math.inf):
            raise ValueError(f"a fixed scale must be positive and finite, not {scale}")
        if not 0 < min_scale < 1:
            raise ValueError(f"min_scale must lie between 0 and 1, not {min_scale}")
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


class _GreyLevels(Likelihood):
    """Independent pixels on a grid of grey levels, given as k / (levels - 1) in [0, 1]."""

    measure = "counts"

    def __init__(self, levels: int) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels must be at least 2, not {levels}")
        self.levels = levels

    def _on_support(self, x: Float[Tensor, "*batch features"]) -> bool:
        return bool(_GreyGrid(self.levels).check(x).all())

    def _way_out(self, x: Float[Tensor, "*batch features"]) -> str:
        top = self.levels - 1
        if x.min() >= 0 and x.max() <= 1:
            return (
                f"The data lie in [0, 1], but not on its {self.levels} grey levels k / {top}: "
                f"round them, (x * {top}).round() / {top}, or pass the levels that they have."
            )
        return _off_support(
            x, f"grey levels k / {top} in [0, 1]", f"divide pixels 0..{top} by {top}"
        )


@final
class CategoricalLevels(_GreyLevels):
    r"""A probability for every grey level of every pixel; the decoder gives their logits.

    .. math:: \log p(x \mid z) = \sum_d \log \operatorname{softmax}(l_d)_{k_d},
              \qquad k_d = (L - 1)\, x_d

    Args:
        levels: Number L of grey levels; data are k / (L - 1).

    References:
        van den Oord, Kalchbrenner & Kavukcuoglu (2016), Pixel recurrent neural networks,
        arXiv:1601.06759, section 2.2.
    """

    def __init__(self, levels: int = 256) -> None:
        super().__init__(levels)

    @property
    def config(self) -> dict[str, Any]:
        """See `Likelihood.config`."""
        return {"name": "categorical", "levels": self.levels}

    def num_parameters(self, data_dim: int) -> int:
        """A logit for each level and pixel: all pixels of the first level, and so on."""
        return self.levels * data_dim

    def distribution(self, decoder_output: Float[Tensor, "*batch outputs"]) -> Distribution:
        """See `Likelihood.distribution`."""
        return _Levels(self._logits(decoder_output).log_softmax(-1)).to_event(1)

    def mean(
        self, decoder_output: Float[Tensor, "*batch outputs"]
    ) -> Float[Tensor, "*batch features"]:
        """The mean grey level of each pixel, in [0, 1]."""
        probs = self._logits(decoder_output).softmax(-1)
        levels = torch.linspace(0, 1, self.levels, dtype=probs.dtype, device=probs.device)
        return (probs * levels).sum(-1)

    def _logits(
        self, decoder_output: Float[Tensor, "*batch outputs"]
    ) -> Float[Tensor, "*batch features levels"]:
        return decoder_output.unflatten(-1, (self.levels, -1)).mT


@final
class DiscretizedLogistic(_GreyLevels):
    r"""Grey levels whose probability is what a logistic density has in their bin.

    .. math:: p(x_d = \tfrac{k}{L-1} \mid z)
        = \sum_m \pi_m \bigl[ \sigma(\tfrac{x_d + \delta/2 - \mu_m}{s_m})
          - \sigma(\tfrac{x_d - \delta/2 - \mu_m}{s_m}) \bigr], \qquad \delta = \tfrac1{L-1}

    The bins of the darkest and the brightest level reach to infinity, so that the levels'
    probabilities sum to 1.

    Args:
        levels: Number L of grey levels; data are k / (L - 1).
        components: Number of logistics in the mixture of each pixel.
        scale: `"shared"` learns one scale for all (starting at 0.1); `"pixel"` takes one for each
            pixel and component from the decoder (0.1 where it gives 0).
        min_scale: The lower bound of the scales, in the data's units.

    References:
        Kingma et al. (2016), Improved variational inference with inverse autoregressive flow,
        arXiv:1606.04934, appendix C.5; Salimans, Karpathy, Chen & Kingma (2017), PixelCNN++,
        arXiv:1701.05517.
    """

    def __init__(
        self,
        levels: int = 256,
        components: int = 1,
        scale: str = "pixel",
        min_scale: float = 1e-3,
    ) -> None:
        super().__init__(levels)
        if components < 1:
            raise ValueError(f"components must be positive, not {components}")
        if scale not in ("shared", "pixel"):
            raise ValueError(f"scale is 'shared' or 'pixel', not {scale!r}")
        if not 0 < min_scale < _START_SCALE:
            raise ValueError(f"min_scale must lie between 0 and {_START_SCALE}, not {min_scale}")
        self.components = components
        self._scale = scale
        self._min_scale = float(min_scale)
        if scale == "shared":
            self.raw_scale = nn.Parameter(torch.zeros(()))

    @property
    def config(self) -> dict[str, Any]:
        """See `Likelihood.config`."""
        return {
            "name": "discretized_logistic",
            "levels": self.levels,
            "components": self.components,
            "scale": self._scale,
            "min_scale": self._min_scale,
        }

    def num_parameters(self, data_dim: int) -> int:
        """Locations, then unconstrained scales if `"pixel"`, then logits of a mixture."""
        blocks = 1 + (self._scale == "pixel") + (self.components > 1)
        return blocks * self.components * data_dim

    def distribution(self, decoder_output: Float[Tensor, "*batch outputs"]) -> Distribution:
        """See `Likelihood.distribution`; a location of 0 is the middle grey."""
        return _Logistics(*self._mixture_of(decoder_output), self.levels).to_event(1)

    def mean(
        self, decoder_output: Float[Tensor, "*batch outputs"]
    ) -> Float[Tensor, "*batch features"]:
        """The mean grey level of each pixel, in [0, 1]."""
        return _Logistics(*self._mixture_of(decoder_output), self.levels).mean

    def _mixture_of(
        self, decoder_output: Float[Tensor, "*batch outputs"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Locations, scales and log-weights, each (*batch, features, components)."""
        blocks = 1 + (self._scale == "pixel") + (self.components > 1)
        parts = list(decoder_output.unflatten(-1, (blocks, self.components, -1)).mT.unbind(-3))
        locs = 0.5 + parts.pop(0)
        raw_scale = parts.pop(0) if self._scale == "pixel" else self.raw_scale
        scales = self._min_scale + (_START_SCALE - self._min_scale) * raw_scale.exp()
        log_weights = (
            parts.pop(0).log_softmax(-1) if self.components > 1 else torch.zeros_like(locs)
        )
        return locs, scales.expand_as(locs), log_weights


_START_SCALE = 0.1  # of a logistic, in units of the grey range
_LIKELIHOODS: Mapping[str, type[Likelihood]] = MappingProxyType(
    {
        "bernoulli": Bernoulli,
        "categorical": CategoricalLevels,
        "continuous_bernoulli": ContinuousBernoulli,
        "discretized_logistic": DiscretizedLogistic,
        "gaussian": Gaussian,
    }
)


def make_likelihood(likelihood: str | Mapping[str, Any] | Likelihood) -> Likelihood:
    """Turns a name or a `Likelihood.config` into a likelihood; an instance passes through.

    Args:
        likelihood: `"bernoulli"`, `"categorical"`, `"continuous_bernoulli"`,
            `"discretized_logistic"`, `"gaussian"`; a mapping with such a `"name"` and the
            arguments of its class; or a likelihood.

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
        raise ValueError(f"Unknown likelihood {name!r}: choose one of {sorted(_LIKELIHOODS)}")
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
            f"the data must have shape (batch, {data_dim}), not {tuple(x.shape)}: flatten each "
            "observation into one row, and give at least one"
        )
    if x.dtype != like.dtype:
        raise ValueError(
            f"the data are {x.dtype} but the parameters are {like.dtype}: convert one of them, "
            f"for example x.to({like.dtype})"
        )


def check_finite(x: Tensor, way_out: str = "remove or impute them first") -> None:
    """Raises if x holds NaN or infinite values.

    Args:
        x: Any numbers.
        way_out: What the error says to do.

    Raises:
        ValueError: If it does.
    """
    if not _is_finite(x):
        raise ValueError(f"the data hold NaN or infinite values; {way_out}")


def _is_finite(x: Tensor) -> bool:
    # The sum is 25 times faster; it can only err by overflowing.
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def _off_support(x: Tensor, support: str, way_out: str) -> str:
    return (
        f"The data must be {support}, but lie between {x.min():.3g} and {x.max():.3g}: {way_out}."
    )
