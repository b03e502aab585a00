r"""Newton's method where the quadratic is trusted: the step of a trust region, by eigenvalues."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["trust_region_step"]

_BISECTIONS = 80


def trust_region_step(
    gradient: Float[Tensor, " numbers"], hessian: Float[Tensor, "numbers numbers"], radius: float
) -> tuple[Float[Tensor, " numbers"], float, bool]:
    r"""Minimises the quadratic :math:`g^T s + s^T H s / 2` within a radius.

    Lengths are in units in which the diagonal of H is one (plus or minus), so that no scale of a
    parameter counts, and a length is about the root of twice the nats it moves.

    Args:
        gradient: g, of what is minimised.
        hessian: H, symmetric, of whatever sign.
        radius: The longest step.

    Returns:
        The step, the decrease that the quadratic promises, and whether the radius held it back.

    References:
        More & Sorensen (1983), Computing a trust region step; Nocedal & Wright (2006), Numerical
        optimization, chapter 4.
    """
    live = hessian.abs().sum(0) > 0
    if not bool(live.all()):  # numbers that nothing depends on stay
        step = torch.zeros_like(gradient)
        if not bool(live.any()):
            return step, 0.0, False
        part = trust_region_step(gradient[live], hessian[live][:, live], radius)
        step[live] = part[0]
        return step, *part[1:]
    unit = hessian.diagonal().abs().sqrt()
    unit = torch.where(unit > 0, unit, 1.0)
    values, vectors = torch.linalg.eigh(hessian / unit[:, None] / unit)
    along = vectors.T @ (gradient / unit)

    def length(shift: float) -> float:
        return float((along / (values + shift)).norm())

    lowest = float(values[0])
    rounding = len(values) * torch.finfo(values.dtype).eps * float(values.abs().max())
    held = not (lowest > rounding and length(0.0) <= radius)
    shift = 0.0
    if held:
        low = max(0.0, -lowest) + rounding
        high = low + float(along.norm()) / radius
        for _ in range(_BISECTIONS):
            shift = (low + high) / 2
            low, high = (shift, high) if length(shift) > radius else (low, shift)
        shift = high
    moved = -along / (values + shift)
    short = radius**2 - float(moved.square().sum())
    if held and lowest <= 0 and short > 1e-6 * radius**2:  # nothing pulls along the worst direction
        moved[0] += math.copysign(math.sqrt(short + float(moved[0]) ** 2), float(moved[0]))
    step = (vectors @ moved) / unit
    promised = -float(gradient @ step + 0.5 * step @ hessian @ step)
    return step, promised, held
