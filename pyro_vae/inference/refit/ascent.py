"""Ascent on one objective for each datum, each with a step size of its own."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pyro_vae.results import ShortRepr

__all__ = ["maximize_per_datum"]

# Steps: particles in each, steps in a window, windows without a rise before the rate falls, by how
# much it falls, and how often before a datum counts as converged.
_DRAWS, _WINDOW, _PATIENCE, _DECAY, _STAGES = 16, 20, 3, 0.2, 3


@dataclass(repr=False)
class Maximized(ShortRepr):
    """Where `maximize_per_datum` came to, per datum.

    Attributes:
        last: The last iterates.
        mean: Their means since the value last rose.
        steps: Steps taken.
        converged: Whether the value had stopped rising.
    """

    last: dict[str, Tensor]
    mean: dict[str, Tensor]
    steps: Int64[Tensor, " batch"]
    converged: Bool[Tensor, " batch"]


def maximize_per_datum(
    value: Callable[[dict[str, Tensor]], Float[Tensor, " batch"]],
    start: Mapping[str, Tensor],
    axes: Mapping[str, int],
    *,
    max_steps: int,
    step_size: float,
    advance: Callable[[int], object] = lambda steps: None,
) -> Maximized:
    """Maximises a noisy value for each datum by Adam, with a step size and an end of its own.

    The value of a datum may depend on its own slice of each tensor alone. Its step size falls to a
    fifth whenever its mean over a window of 20 steps has not risen for 3 windows, and it stops at
    the third fall. At each fall the datum goes to the mean of its iterates since the last rise.

    Args:
        value: Gives the value of every datum, differentiably.
        start: The tensors to begin with.
        axes: The axis of the data in each tensor, negative.
        max_steps: The most steps.
        step_size: Of the first steps.
        advance: Called with the number of steps done since the last call.

    References:
        Kingma & Ba (2015), Adam: a method for stochastic optimization.
    """
    now = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    mean = {name: tensor.detach().clone() for name, tensor in start.items()}
    first = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    plateau: _Plateau | None = None
    for step in range(1, max_steps + 1):
        with torch.enable_grad():
            values = value(now)
            finite = torch.where(values.isfinite(), values, 0.0).sum()
            grads = torch.autograd.grad(finite, list(now.values()), allow_unused=True)
        if plateau is None:
            plateau = _Plateau(values.detach(), step_size)
        with torch.no_grad():
            for (name, tensor), grad in zip(now.items(), grads, strict=True):
                grad = torch.zeros_like(tensor) if grad is None else grad.nan_to_num(0.0, 0.0, 0.0)
                first[name].lerp_(grad, 0.1)
                second[name].lerp_(grad.square(), 0.01)
                scale = (second[name] / (1 - 0.99**step)).sqrt() + 1e-8
                rate = _along(plateau.rate, tensor, axes[name])
                tensor += rate * first[name] / (1 - 0.9**step) / scale
                share = _along(plateau.share(values.isfinite()), tensor, axes[name])
                mean[name] += share * (tensor - mean[name])
            fell = plateau.see(values.detach())
            for name, tensor in now.items():  # a smaller step starts from the mean
                restart = _along(fell, tensor, axes[name])
                tensor.copy_(torch.where(restart, mean[name], tensor))
        if step % _WINDOW == 0:
            advance(_WINDOW)
            if not plateau.active.any():
                break
    assert plateau is not None
    last = {name: tensor.detach() for name, tensor in now.items()}
    return Maximized(last, mean, plateau.steps, ~plateau.active)


def _along(per_datum: Tensor, like: Tensor, axis: int) -> Tensor:
    return per_datum.to(like.device).reshape(-1, *(1,) * (-axis - 1))


class _Plateau:
    """Per datum: the step size, when it falls, and when the steps end."""

    def __init__(self, values: Float[Tensor, " batch"], step_size: float) -> None:
        self.rate = torch.full_like(values, step_size)
        self.best = torch.full_like(values, -math.inf)
        self.window = torch.zeros_like(values)
        self.stale = torch.zeros_like(values)
        self.stage = torch.zeros_like(values)
        self.averaged = torch.zeros_like(values)
        self.steps = torch.zeros_like(values, dtype=torch.int64)
        self.count = 0

    @property
    def active(self) -> Bool[Tensor, " batch"]:
        return self.stage < _STAGES

    def share(self, finite: Bool[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """How much of this iterate goes into the running mean: nothing beyond a support's end."""
        return torch.where(self.active & finite, 1 / (self.averaged + 1), 0.0)

    def see(self, values: Float[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        """Takes note of the values of a step; returns for which data the step size falls."""
        self.averaged += self.active
        self.steps += self.active
        self.window += values / _WINDOW
        self.count += 1
        if self.count % _WINDOW:
            return torch.zeros_like(values, dtype=torch.bool)
        risen = self.window > self.best  # nan has not
        self.best = torch.where(risen, self.window, self.best)
        self.stale = torch.where(risen, 0.0, self.stale + 1)
        self.window = torch.zeros_like(values)
        fell = (self.stale >= _PATIENCE) & self.active
        self.stage = self.stage + fell
        self.rate = torch.where(fell, self.rate * _DECAY, self.rate)
        self.rate = torch.where(self.active, self.rate, 0.0)
        self.stale = torch.where(fell, 0.0, self.stale)
        self.best = torch.where(fell, -math.inf, self.best)  # a lucky window ends no later stage
        moving = (risen | fell) & self.active  # the mean is of iterates that rise no more
        self.averaged = torch.where(moving, 0.0, self.averaged)
        return fell
