r"""L-BFGS over chains and data in one tensor program, and the covariances that its path implies.

The inverse Hessian of every iterate is :math:`\operatorname{diag}(\alpha) + \beta \gamma \beta^T`
with at most two columns in :math:`\beta` for each remembered step, so that nothing here is square
in the number of latents unless it is asked for.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Ascent", "InverseHessian", "climb"]

_MEMORY = 6  # steps that an inverse Hessian is made of
_ARMIJO, _WOLFE = 1e-4, 0.9
_TRIALS = 25  # step lengths tried in a line search
_PATIENCE = 5  # steps without a gain
_WORST_CONDITION = 1e12  # of a step and the change of the gradient along it, as in Pathfinder

Target = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Log density `[chains, batch]` and its gradient, at `[chains, batch, dim]`."""


class InverseHessian(NamedTuple):
    r"""Of minus the log density: :math:`\operatorname{diag}(\alpha) + \beta \gamma \beta^T`.

    Attributes:
        diagonal: alpha, `[chains, batch, dim]`.
        steps: Remembered steps, the last one last; zero where one was left out,
            `[chains, batch, dim, memory]`.
        changes: By how much the gradient of minus the log density changed along each, likewise.

    References:
        Byrd, Nocedal & Schnabel (1994), Representations of quasi-Newton matrices and their use in
        limited memory methods; Zhang, Carpenter, Gelman & Vehtari (2022), Pathfinder: Parallel
        quasi-Newton variational inference, JMLR 23.
    """

    diagonal: Float[Tensor, "chains batch dim"]
    steps: Float[Tensor, "chains batch dim memory"]
    changes: Float[Tensor, "chains batch dim memory"]

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Beta, `[chains, batch, dim, 2 memory]`, and gamma."""
        products = self.steps.mT @ self.changes
        own = products.diagonal(dim1=-2, dim2=-1)
        identity = torch.eye(own.shape[-1]).to(own)
        upper = products.triu() + torch.diag_embed((own == 0).to(own))
        inverse = torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=True)
        weighted = self.diagonal[..., None] * self.changes
        inner = torch.diag_embed(own) + self.changes.mT @ weighted
        corner = inverse.mT @ inner @ inverse
        gamma = torch.cat(
            [
                torch.cat([torch.zeros_like(inverse), -inverse], -1),
                torch.cat([-inverse.mT, corner], -1),
            ],
            -2,
        )
        return torch.cat([weighted, self.steps], -1), gamma

    def times(self, gradient: Float[Tensor, "chains batch dim"]) -> Tensor:
        """The inverse Hessian times a vector."""
        beta, gamma = self.low_rank()
        low = beta @ (gamma @ (beta.mT @ gradient[..., None]))
        return self.diagonal * gradient + low[..., 0]

    def dense(self) -> Float[Tensor, "chains batch dim dim"]:
        """The matrix itself."""
        beta, gamma = self.low_rank()
        return torch.diag_embed(self.diagonal) + beta @ gamma @ beta.mT

    def normal(
        self, noise: Float[Tensor, "draws chains batch dim"]
    ) -> tuple[Tensor, Float[Tensor, "draws chains batch"]]:
        """Draws of the centred normal with this covariance made of noise; their log densities."""
        beta, gamma = self.low_rank()
        root = self.diagonal.sqrt()
        q, r = torch.linalg.qr(beta / root[..., None])
        inner = r @ gamma @ r.mT + torch.eye(r.shape[-2]).to(r)
        chol, _ = torch.linalg.cholesky_ex((inner + inner.mT) / 2)
        along = torch.einsum("nbik,cnbi->cnbk", q, noise)
        change = torch.einsum("nbkl,cnbl->cnbk", chol, along) - along
        draws = root * (noise + torch.einsum("nbik,cnbk->cnbi", q, change))
        log_det = root.log().sum(-1) + chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * noise.shape[-1] * math.log(2 * math.pi)
        return draws, -0.5 * noise.square().sum(-1) - log_det - constant

    def is_empty(self) -> Bool[Tensor, "chains batch"]:
        """Where no step is remembered."""
        return (self.steps == 0).flatten(2).all(2)

    def forgotten(self, where: Bool[Tensor, "chains batch"]) -> "InverseHessian":
        """That of a path which begins anew, of some chains and data."""
        return InverseHessian(
            torch.where(where[..., None], 1.0, self.diagonal),
            *(torch.where(where[..., None, None], 0.0, t) for t in (self.steps, self.changes)),
        )

    def extended(self, step: Tensor, change: Tensor) -> "InverseHessian":
        """With one more step; the old ones where the curvature along it is not positive."""
        inner = (step * change).sum(-1, keepdim=True)
        good = inner > change.square().sum(-1, keepdim=True) / _WORST_CONDITION
        step, change = (torch.where(good, t, 0.0) for t in (step, change))
        old, safe = self.diagonal, torch.where(good, inner, 1.0)
        # The diagonal of Gilbert & Lemaréchal (1989), as Pathfinder has it.
        spread = (change.square() * old).sum(-1, keepdim=True)
        length = (step.square() / old).sum(-1, keepdim=True)
        precision = spread / old + change.square()
        precision = precision - spread * (step / old).square() / torch.where(good, length, 1.0)
        diagonal = torch.where(good & (precision > 0), safe / precision, old)
        kept = (
            torch.where(good[..., None], torch.cat([past[..., 1:], new[..., None]], -1), past)
            for past, new in ((self.steps, step), (self.changes, change))
        )
        return InverseHessian(diagonal, *kept)


class Ascent(NamedTuple):
    """An iterate of every chain of every datum.

    Attributes:
        u: Where it is, `[chains, batch, dim]`.
        log_density: There, `[chains, batch]`.
        gradient: There, `[chains, batch, dim]`.
        inverse_hessian: What the path up to here says of the curvature.
        moving: Whether the chain is still on its way, `[chains, batch]`.
    """

    u: Tensor
    log_density: Tensor
    gradient: Tensor
    inverse_hessian: InverseHessian
    moving: Bool[Tensor, "chains batch"]


def climb(
    target: Target,
    u: Float[Tensor, "chains batch dim"],
    *,
    num_iterations: int,
    tolerance: float = 1e-6,
) -> Iterator[Ascent]:
    """Climbs the log density from each start, and yields every iterate, the start left out.

    Args:
        target: Gives log density and gradient of all chains and data.
        u: Where to begin: the density must be positive there.
        num_iterations: At most so many steps.
        tolerance: A chain stops when five steps in a row gain less each, in nats.

    References:
        Liu & Nocedal (1989), On the limited memory BFGS method for large scale optimization; Lewis
        & Overton (2013), Nonsmooth optimization via quasi-Newton methods (the line search).
    """
    log_density, gradient = target(u)
    nothing = u.new_zeros(*u.shape, _MEMORY)
    hessian = InverseHessian(torch.ones_like(u), nothing, nothing)
    now = Ascent(u, log_density, gradient, hessian, torch.ones_like(log_density).bool())
    stalled = torch.zeros_like(log_density).long()
    for _ in range(num_iterations):
        direction = now.inverse_hessian.times(now.gradient)
        slope = (direction * now.gradient).sum(-1)
        lost = ~(slope > 0) | ~direction.isfinite().all(-1)  # of rounding: begin again
        direction = torch.where(lost[..., None], now.gradient, direction)
        slope = torch.where(lost, now.gradient.square().sum(-1), slope)
        forgotten = now.inverse_hessian.is_empty() | lost
        length = torch.where(forgotten, 1 / now.gradient.norm(dim=-1).clamp_min(1.0), 1.0)
        found, new, gradient = _search(target, now, direction, slope, length)
        step = torch.where(found > 0, found, 0.0)[..., None] * direction
        gain = torch.where(found > 0, new - now.log_density, 0.0)
        gradient = torch.where(found[..., None] > 0, gradient, now.gradient)
        stalled = torch.where(gain <= tolerance, stalled + 1, 0)
        hessian = now.inverse_hessian.extended(step, now.gradient - gradient)
        now = Ascent(
            now.u + step,
            now.log_density + gain,
            gradient,
            hessian.forgotten((found <= 0) & now.moving),
            now.moving & (stalled < _PATIENCE),
        )
        yield now
        if not bool(now.moving.any()):
            return


def _search(
    target: Target, now: Ascent, direction: Tensor, slope: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A length that fulfils the weak Wolfe conditions, by bisection, with value and gradient.

    Where none is found in time the largest that gains enough, or zero.
    """
    low, high = torch.zeros_like(length), torch.full_like(length, math.inf)
    value, gradient = now.log_density, now.gradient
    done = ~now.moving | ~(slope > 0)
    for _ in range(_TRIALS):
        tried = torch.where(done, low, length)
        new, at = target(now.u + tried[..., None] * direction)
        enough = (new >= now.log_density + _ARMIJO * tried * slope) & new.isfinite() & ~done
        flat = (at * direction).sum(-1) <= _WOLFE * slope
        low = torch.where(enough, tried, low)
        value = torch.where(enough, new, value)
        gradient = torch.where(enough[..., None], at, gradient)
        high = torch.where(enough | done, high, tried)
        done = done | (enough & flat)
        if bool(done.all()):
            break
        # Far from the end of the support halves would take long.
        short = torch.where(low > 0, (low + high) / 2, high / 4)
        length = torch.where(high.isinf(), 2 * length, short)
    return low, value, gradient
