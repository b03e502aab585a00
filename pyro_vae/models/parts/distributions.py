"""Distributions of pixels that torch lacks: continuous Bernoulli, and grey levels."""

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional


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


_GRID_TOLERANCE = 1e-3  # of a level: single precision keeps 1e-5, noise added to pixels does not


class _GreyGrid(constraints.Constraint):
    """The values k / (levels - 1)."""

    is_discrete = True

    def __init__(self, levels: int) -> None:
        self.top = levels - 1

    def check(self, value: Tensor) -> Tensor:
        """Whether each value is a level; NaN and infinite ones are none."""
        scaled = value * self.top
        near = (scaled - scaled.round()).abs() < _GRID_TOLERANCE
        return near & (value > -0.5 / self.top) & (value < 1 + 0.5 / self.top)

    def __repr__(self) -> str:
        return f"k / {self.top} in [0, 1]"


class _Levels(dist.TorchDistribution):
    """A distribution over grey levels; its log-probabilities are normalised."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(
        self, log_probs: Float[Tensor, "*batch levels"], *, validate_args: bool | None = None
    ) -> None:
        self.log_probs = log_probs
        super().__init__(log_probs.shape[:-1], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return _GreyGrid(self.log_probs.shape[-1])

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "_Levels":
        new = self._get_checked_instance(_Levels, _instance)
        new.log_probs = self.log_probs.expand((*batch_shape, -1))
        super(_Levels, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Float[Tensor, "*any"]) -> Float[Tensor, "*all"]:
        if self._validate_args:
            self._validate_sample(value)
        index = (value * (self.log_probs.shape[-1] - 1)).round().long()[..., None]
        shape = torch.broadcast_shapes(index.shape[:-1], self.log_probs.shape[:-1])
        every = self.log_probs.expand((*shape, -1))
        return every.gather(-1, index.expand((*shape, 1))).squeeze(-1)

    def sample(self, sample_shape: Any = ()) -> Float[Tensor, "*all"]:
        with torch.no_grad():
            index = dist.Categorical(logits=self.log_probs).sample(torch.Size(sample_shape))
            return index.to(self.log_probs) / (self.log_probs.shape[-1] - 1)


class _Logistics(dist.TorchDistribution):
    """A mixture of logistics, in the bins of a grid."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(
        self,
        locs: Float[Tensor, "*batch components"],
        scales: Float[Tensor, "*batch components"],
        log_weights: Float[Tensor, "*batch components"],
        levels: int,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.locs, self.scales, self.log_weights = locs, scales, log_weights
        self.levels = levels
        super().__init__(locs.shape[:-1], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return _GreyGrid(self.levels)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "_Logistics":
        new = self._get_checked_instance(_Logistics, _instance)
        for name in ("locs", "scales", "log_weights"):
            setattr(new, name, getattr(self, name).expand((*batch_shape, -1)))
        new.levels = self.levels
        super(_Logistics, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Float[Tensor, "*any"]) -> Float[Tensor, "*all"]:
        if self._validate_args:
            self._validate_sample(value)
        half = 0.5 / (self.levels - 1)
        away = value[..., None] - self.locs
        above, below = (away + half) / self.scales, (away - half) / self.scales
        # s(b) - s(a) = s(b) s(-a) (1 - e^(a-b)), where nothing cancels.
        width = -torch.expm1(-2 * half / self.scales)
        log_bin = functional.logsigmoid(above) + functional.logsigmoid(-below) + width.log()
        log_bin = torch.where(value[..., None] < half, functional.logsigmoid(above), log_bin)
        log_bin = torch.where(value[..., None] > 1 - half, functional.logsigmoid(-below), log_bin)
        return (self.log_weights + log_bin).logsumexp(-1)

    @property
    def mean(self) -> Float[Tensor, "*batch"]:
        """The sum over levels k >= 1 of P(x >= k), a level at a time to spare memory."""
        top, weights = self.levels - 1, self.log_weights.exp()
        total = torch.zeros_like(self.locs)
        for level in range(1, self.levels):
            total = total + ((self.locs - (level - 0.5) / top) / self.scales).sigmoid()
        return (weights * total).sum(-1) / top

    def sample(self, sample_shape: Any = ()) -> Float[Tensor, "*all"]:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            chosen = dist.Categorical(logits=self.log_weights).sample(torch.Size(sample_shape))
            locs, scales = (
                p.expand((*shape, -1)).gather(-1, chosen[..., None]).squeeze(-1)
                for p in (self.locs, self.scales)
            )
            uniform = torch.rand_like(locs).clamp(torch.finfo(locs.dtype).tiny, None)
            drawn = locs + scales * (uniform.log() - torch.log1p(-uniform))
            top = self.levels - 1
            return (drawn * top).round().clamp(0, top) / top
