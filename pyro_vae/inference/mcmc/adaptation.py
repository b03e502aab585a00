r"""What the warm-up of Hamiltonian Monte Carlo adapts: step sizes, scales, trajectory lengths.

Every datum has a posterior of its own, hence a step size and a scale of its own. The number of
leapfrog steps is what a batched program pays for, whichever datum asks for it: all data share it.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.inference.mcmc.hmc import Scale, Transition

__all__ = ["DualAveraging", "TrajectoryLength", "estimated_scale", "is_dense", "window_ends"]

MOST_DENSE = 100
"""Latents up to which a metric is dense, unless it is asked for."""

_COST = 0.5  # power of the length that the criterion is divided by: without one it would drift
_FEWEST = 2.0  # leapfrog steps on average: of a single one, all trajectories are of equal length
_DRAWS_PER_LATENT = 5  # in the last window, from which on a covariance is worth its noise


class DualAveraging:
    r"""Adapts the step size of each datum to a target acceptance, from all its chains.

    Args:
        step_size: To begin with.
        target_accept: The mean acceptance probability to reach.

    References:
        Hoffman & Gelman (2014), The No-U-Turn sampler, with its constants.
    """

    def __init__(self, step_size: Float[Tensor, " batch"], target_accept: float) -> None:
        self.target_accept = target_accept
        self.restart(step_size)

    def restart(self, step_size: Float[Tensor, " batch"]) -> None:
        """Forgets what was seen and begins at `step_size`."""
        self.step_size = step_size
        self._towards = (10 * step_size).log()
        self._error = torch.zeros_like(step_size)
        self._log_mean = step_size.log()
        self._count = 0

    def update(self, acceptance: Float[Tensor, "chains batch"]) -> None:
        """Takes in what the last step's proposals were accepted with."""
        self._count += 1
        weight = 1 / (self._count + 10)
        self._error = (1 - weight) * self._error + weight * (
            self.target_accept - acceptance.mean(0)
        )
        log_step = self._towards - math.sqrt(self._count) / 0.05 * self._error
        log_step = log_step.clamp(-30.0, 10.0)
        forget = self._count**-0.75
        self._log_mean = forget * log_step + (1 - forget) * self._log_mean
        self.step_size = log_step.exp()

    @property
    def mean(self) -> Float[Tensor, " batch"]:
        """The step size to go on with when adaptation ends."""
        return self._log_mean.exp()


class TrajectoryLength:
    r"""Adapts how long trajectories are, in units of the scale, one length T for all data.

    It climbs the expected change of the squared distance from the centre (ChEES), over a cost,

    .. math:: \frac{1}{4 \sqrt T}
              E\bigl[(\lVert v' - \bar v \rVert^2 - \lVert v - \bar v \rVert^2)^2\bigr]

    in the coordinates :math:`v = L^{-1} u` of each datum's scale, where latents and data are alike.

    Args:
        length: To begin with; a quarter of a turn of a standard normal is :math:`\pi / 2`.
        most: Leapfrog steps on average, at most.

    References:
        Hoffman, Radul & Sountsov (2021), An adaptive-MCMC scheme for setting trajectory lengths in
        Hamiltonian Monte Carlo, AISTATS; Sountsov & Hoffman (2021), Focusing on difficult
        directions for learning HMC trajectory lengths (who divide by a cost).
    """

    def __init__(self, length: float = math.pi / 2, most: int = 32) -> None:
        self.most = most
        self._log_length = math.log(length)
        self._slope, self._gain, self._count = 0.0, 0.0, 0
        self._log_mean, self._weight = 0.0, 0.0

    def restart(self) -> None:
        """Forgets what the criterion was, in the coordinates of another scale."""
        self._slope, self._gain, self._count = 0.0, 0.0, 0

    def num_leapfrog(self, step_size: Float[Tensor, " batch"], *, mean: bool = False) -> float:
        """How many steps of these sizes make the length, on average over data."""
        log_length = self._log_mean / self._weight if mean and self._weight else self._log_length
        number = math.exp(log_length - float(step_size.log().mean()))
        return min(max(number, _FEWEST), float(self.most))

    def update(
        self,
        moved: Transition,
        start: Float[Tensor, "chains batch dim"],
        centre: Float[Tensor, "batch dim"],
        scale: Scale,
        elapsed: Float[Tensor, "chains batch"],
    ) -> None:
        """Takes in where the last trajectories led.

        Args:
            moved: The last transition.
            start: Where it began.
            centre: Of each posterior, roughly.
            scale: Of each posterior.
            elapsed: How long the trajectories were, in units of the scale.
        """
        before, after = (_in_scale(scale, u - centre) for u in (start, moved.proposal))
        gain = after.square().sum(-1) - before.square().sum(-1)
        slope = gain * (after * moved.velocity).sum(-1) * elapsed
        weight = torch.where(slope.isfinite(), moved.acceptance, 0.0)
        total = max(float(weight.sum()), 1e-30)
        slope_mean = float((weight * torch.where(weight > 0, slope, 0.0)).sum()) / total
        gain_mean = float((weight * torch.where(weight > 0, gain.square() / 4, 0.0)).sum()) / total
        self._count += 1
        self._slope = 0.95 * self._slope + 0.05 * slope_mean
        self._gain = 0.95 * self._gain + 0.05 * gain_mean
        relative = self._slope / (self._gain + 1e-30) - _COST
        # Those that run off say nothing of the criterion, but they were too long.
        ascent = max(-1.0, min(relative, 1.0)) - float(moved.diverged.double().mean())
        self._log_length += 0.2 / math.sqrt(self._count / 10 + 1) * ascent
        self._log_length = max(min(self._log_length, 10.0), -10.0)
        forget = self._count**-0.5
        self._log_mean = (1 - forget) * self._log_mean + forget * self._log_length
        self._weight = (1 - forget) * self._weight + forget


def window_ends(num_warmup: int) -> list[int]:
    """After which steps of a warm-up the scale is set: windows that double, between two buffers."""
    shares = (0.1, 0.2, 0.4, 0.8)
    return [round(num_warmup * share) for share in shares]


def is_dense(metric: str, dim: int, num_draws: int) -> bool:
    """Whether a metric has correlations; `"auto"` says yes where so many draws can estimate them.

    Args:
        metric: `"auto"`, `"dense"` or `"diagonal"`.
        dim: Latents of a datum.
        num_draws: In the last window of the warm-up, of all chains.
    """
    if metric != "auto":
        return metric == "dense"
    return 1 < dim <= MOST_DENSE and num_draws >= _DRAWS_PER_LATENT * dim


def estimated_scale(u: Float[Tensor, "draws batch dim"], before: Scale, *, dense: bool) -> Scale:
    """The scale of draws, as it is: drawn to any fixed matrix it would lose strong correlations.

    Latents that have not moved, and covariances that have no factor, keep what they had before.
    """
    count, draws = len(u), u.double()
    variance = draws.var(0)
    old = before if before.dim() == 2 else before.square().sum(-1).sqrt()
    still = ~(variance > 0) | ~variance.isfinite()
    variance = torch.where(still, old.double().square(), variance)
    if not dense:
        return variance.sqrt().to(u)
    centred = torch.where(still, 0.0, draws - draws.mean(0))
    covariance = torch.einsum("cni,cnj->nij", centred, centred) / (count - 1)
    covariance = covariance + torch.diag_embed(torch.where(still, variance, 0.0))
    otherwise = before if before.dim() == 3 else torch.diag_embed(variance.sqrt())
    return factor_or(covariance, otherwise.double()).to(u)


def factor_or(
    covariance: Float[Tensor, "batch dim dim"], otherwise: Float[Tensor, "batch dim dim"]
) -> Float[Tensor, "batch dim dim"]:
    """Lower Cholesky factors, or what is given for matrices that have none."""
    chol, failed = torch.linalg.cholesky_ex(covariance)
    broken = (failed > 0) | ~chol.isfinite().flatten(1).all(1)
    return torch.where(broken[:, None, None], otherwise, chol)


def _in_scale(scale: Scale, u: Float[Tensor, "chains batch dim"]) -> Tensor:
    """Latents in the coordinates of their scale."""
    if scale.dim() == 2:
        return u / scale
    return torch.linalg.solve_triangular(scale, u.movedim(0, -1), upper=False).movedim(-1, 0)
