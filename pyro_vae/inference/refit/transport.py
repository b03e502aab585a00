"""The draw that standard normal noise gives: by a formula, or by the quantile function."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from scipy import special
from torch import Tensor
from torch import distributions as torch_dist
from torch.autograd.function import FunctionCtx

from pyro_vae.inference.refit.parameters import normal_kinds

__all__ = ["from_noise", "noise_shape"]

_WRAPPERS = (torch_dist.Independent, MaskedDistribution, ExpandedDistribution)


def noise_shape(fn: Any, batch_shape: torch.Size) -> torch.Size | None:
    """The shape of the noise of a draw; None where no map from normal noise is known."""
    if isinstance(fn, normal_kinds):
        return batch_shape + fn.event_shape
    if isinstance(fn, _WRAPPERS) or _moved(fn):
        return noise_shape(fn.base_dist, batch_shape + fn.base_dist.batch_shape[_dims(fn) :])
    if isinstance(fn, torch_dist.Dirichlet):
        return batch_shape + fn.event_shape[:-1] + (fn.event_shape[-1] - 1,)
    if _row(fn) is None and not _has_quantiles(fn):
        return None
    return batch_shape


def _dims(fn: Any) -> int:
    return len(fn.batch_shape)


def _moved(fn: Any) -> bool:
    """Whether a distribution is another one moved by bijective transforms."""
    moved = isinstance(fn, torch_dist.TransformedDistribution)
    return moved and all(t.bijective for t in fn.transforms)


def _has_quantiles(fn: Any) -> bool:
    if fn.event_shape:
        return False
    try:
        with torch.no_grad():
            fn.icdf(torch.full(fn.batch_shape, 0.5))
    except (NotImplementedError, AttributeError):
        return False
    return True


def from_noise(fn: Any, noise: Tensor) -> Tensor:
    """The draw of a site that standard normal noise of `noise_shape` gives."""
    if isinstance(fn, normal_kinds):
        if hasattr(fn, "scale_tril"):
            return fn.loc + (fn.scale_tril @ noise[..., None])[..., 0]
        return fn.loc + fn.scale * noise
    if isinstance(fn, _WRAPPERS):
        return from_noise(fn.base_dist, noise)
    if _moved(fn):
        value = from_noise(fn.base_dist, noise)
        for transform in fn.transforms:
            value = transform(value)
        return value
    row = _row(fn)
    if row is not None:
        return row(fn, noise)
    return fn.icdf(_probability(noise))


def _probability(noise: Tensor) -> Tensor:
    """The normal distribution function, short of 0 and 1."""
    info = torch.finfo(noise.dtype)
    return torch.special.ndtr(noise).clamp(info.tiny, 1 - info.eps)


def _row(fn: Any) -> Callable[[Any, Tensor], Tensor] | None:
    return next((row for kind, row in _ROWS.items() if isinstance(fn, kind)), None)


def _of_gamma(fn: Any, noise: Tensor) -> Tensor:
    return _quantile(_gamma_quantile, noise, fn.concentration) / fn.rate


def _of_beta(fn: Any, noise: Tensor) -> Tensor:
    return _quantile(_beta_quantile, noise, fn.concentration1, fn.concentration0)


def _of_student(fn: Any, noise: Tensor) -> Tensor:
    return fn.loc + fn.scale * _quantile(_student_quantile, noise, fn.df)


def _of_ratio(fn: Any, noise: Tensor) -> Tensor:
    """F of a beta variable b: (d2 / d1) b / (1 - b)."""
    share = _quantile(_beta_quantile, noise, fn.df1 / 2, fn.df2 / 2)
    return fn.df2 / fn.df1 * share / (1 - share)


def _of_relaxed(fn: Any, noise: Tensor) -> Tensor:
    odds = torch.special.log_ndtr(noise) - torch.special.log_ndtr(-noise)
    return (fn.logits + odds) / fn.temperature


def _of_dirichlet(fn: Any, noise: Tensor) -> Tensor:
    """Each share of what is left is a beta variable."""
    a = fn.concentration
    after = a.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    share = _quantile(_beta_quantile, noise, a[..., :-1], after)
    left = (1 - share).cumprod(-1)
    one = torch.ones_like(left[..., :1])
    return torch.cat([share, one], -1) * torch.cat([one, left], -1)


_ROWS: dict[type, Callable[[Any, Tensor], Tensor]] = {
    torch_dist.Gamma: _of_gamma,
    torch_dist.Beta: _of_beta,
    torch_dist.StudentT: _of_student,
    torch_dist.FisherSnedecor: _of_ratio,
    torch_dist.Dirichlet: _of_dirichlet,
    torch_dist.relaxed_bernoulli.LogitRelaxedBernoulli: _of_relaxed,
}


# --- quantile functions that torch lacks ----------------------------------------------------------


def _gamma_quantile(noise: Any, concentration: Any) -> Any:
    below = special.gammaincinv(concentration, special.ndtr(noise))
    above = special.gammainccinv(concentration, special.ndtr(-noise))  # keeps the upper tail
    return np.where(noise < 0, below, above)


def _beta_quantile(noise: Any, a: Any, b: Any) -> Any:
    return special.betaincinv(a, b, special.ndtr(noise))


def _student_quantile(noise: Any, df: Any) -> Any:
    size = special.stdtrit(df, special.ndtr(-abs(noise)))
    return np.where(noise < 0, size, -size)


def _quantile(inverse: Callable[..., Any], *inputs: Tensor) -> Tensor:
    return _Quantile.apply(inverse, *torch.broadcast_tensors(*inputs))


class _Quantile(torch.autograd.Function):
    """A function of NumPy's, with derivatives by central differences in double precision."""

    @staticmethod
    def forward(ctx: FunctionCtx, inverse: Callable[..., Any], *inputs: Tensor) -> Tensor:
        ctx.inverse = inverse  # type: ignore[attr-defined]
        ctx.save_for_backward(*inputs)
        return _call(inverse, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs = [value.double() for value in ctx.saved_tensors]
        grads: list[Tensor | None] = [None]
        for index, value in enumerate(inputs):
            if not ctx.needs_input_grad[index + 1]:
                grads.append(None)
                continue
            step = 1e-5 * value.abs() if index else torch.full_like(value, 1e-5)
            ends = [
                _call(ctx.inverse, [*inputs[:index], value + sign * step, *inputs[index + 1 :]])
                for sign in (1, -1)
            ]
            grads.append(grad * ((ends[0] - ends[1]) / (2 * step)).to(grad))
        return tuple(grads)


def _call(inverse: Callable[..., Any], inputs: Any) -> Tensor:
    arrays = [value.detach().double().cpu().numpy() for value in inputs]
    return torch.as_tensor(inverse(*arrays)).to(inputs[0])
