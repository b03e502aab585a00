r"""One batched Hamiltonian Monte Carlo kernel: chains times data in one tensor program.

Every datum has its own step size and its own scale, a vector or a Cholesky factor. The same kernel
draws posterior references (`sample_posterior`) and moves the chains of annealed importance
sampling.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_vae.inference.tempered import Point

__all__ = ["Scale", "Transition", "hmc_step", "jittered", "random_length"]

_DIVERGED = 1000.0  # nats of energy error beyond which a trajectory is given up, as in Stan

Scale = Float[Tensor, "batch dim"] | Float[Tensor, "batch dim dim"]
"""Of a posterior: its latents' sds, or the lower Cholesky factor of its covariance."""


@dataclass(frozen=True)
class Transition:
    """One step of all chains.

    Attributes:
        point: Where the chains are afterwards.
        acceptance: Probability with which the proposal was accepted, `[chains, batch]`.
        diverged: Whether the trajectory ran off (it was then rejected), `[chains, batch]`.
        proposal: Where the trajectories ended, `[chains, batch, dim]`.
        velocity: There, in the coordinates of the scale, `[chains, batch, dim]`.
    """

    point: Point
    acceptance: Float[Tensor, "chains batch"]
    diverged: Bool[Tensor, "chains batch"]
    proposal: Float[Tensor, "chains batch dim"]
    velocity: Float[Tensor, "chains batch dim"]


def hmc_step(
    target: Callable[[Tensor], Point],
    point: Point,
    step_size: Float[Tensor, "*chains batch"],
    *,
    num_leapfrog: int = 10,
    scale: Scale | None = None,
    active: Bool[Tensor, "batch dim"] | None = None,
) -> Transition:
    r"""Moves every chain of every datum by one trajectory, and accepts or rejects each.

    The trajectory is that of the latents :math:`v` with :math:`u = L v`, L the scale, whose
    momentum is standard normal: the mass matrix is the inverse of :math:`L L^T`. A trajectory whose
    energy error passes 1000 nats or is undefined is given up: it returns to its start, counts as
    rejected, and is reported. So no value is ever nan.

    Args:
        target: Gives log-density and gradient.
        point: Where the chains are: what `target` gave there.
        step_size: Of each datum, or of each chain and datum, in units of the scale.
        num_leapfrog: Steps of the trajectory; each costs one evaluation.
        scale: Roughly the target's; ones if left out.
        active: Latents that have a density; the others stay where they are.

    References:
        Neal (2011), MCMC using Hamiltonian dynamics.
    """
    first = point.u
    scale = torch.ones_like(first[0]) if scale is None else scale
    if active is not None:
        scale = scale * (active if scale.dim() == 2 else active[..., None])
    momentum = torch.randn_like(first)
    energy = _kinetic(momentum) - point.log_density
    step = step_size[..., None]
    u, now = first, point
    dead = torch.zeros_like(point.log_density, dtype=torch.bool)
    momentum = momentum + 0.5 * step * _pull(scale, now.gradient)
    for leap in range(num_leapfrog):
        u = u + step * _push(scale, momentum)
        dead = dead | ~u.isfinite().all(-1)
        u = torch.where(dead[..., None], first, u)
        now = target(u)
        last = leap == num_leapfrog - 1
        momentum = momentum + (0.5 if last else 1.0) * step * _pull(scale, now.gradient)
        error = _kinetic(momentum) - now.log_density - energy
        # From a point of zero density every other one is an improvement.
        dead = dead | ~(error < _DIVERGED) & (energy < math.inf)
        dead = dead | (now.log_density == -math.inf)
    log_ratio = torch.where(energy < math.inf, -error, 0.0)
    acceptance = torch.where(dead, 0.0, log_ratio.clamp_max(0.0).exp())
    accepted = torch.rand_like(acceptance) < acceptance
    moved = Point(
        *(
            torch.where(accepted[..., None] if new.dim() == 3 else accepted, new, old)
            for new, old in zip(now, point, strict=True)
        )
    )
    return Transition(moved, acceptance, dead & (energy < math.inf), now.u, momentum)


def _push(scale: Scale, v: Tensor) -> Tensor:
    """A vector of the scale's coordinates, in those of the latents."""
    return scale * v if scale.dim() == 2 else torch.einsum("nij,cnj->cni", scale, v)


def _pull(scale: Scale, gradient: Tensor) -> Tensor:
    """A gradient by the latents, as one by the scale's coordinates."""
    if scale.dim() == 2:
        return scale * gradient
    return torch.einsum("nij,cni->cnj", scale, gradient)


def _kinetic(momentum: Tensor) -> Float[Tensor, "chains batch"]:
    return 0.5 * momentum.square().sum(-1)


def jittered(step_size: Float[Tensor, " batch"], point: Point) -> Float[Tensor, "chains batch"]:
    """Step sizes within 20% of the given ones, another for each chain."""
    return step_size * (0.8 + 0.4 * torch.rand_like(point.log_density))


def random_length(num_leapfrog: float) -> int:
    """A number of leapfrog steps of the given mean, uniform from 1 (Neal 2011)."""
    return 1 + int(torch.rand(()) * (2 * num_leapfrog - 1))
