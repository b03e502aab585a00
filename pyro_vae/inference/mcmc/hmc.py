r"""One batched Hamiltonian Monte Carlo kernel: chains times data in one tensor program.

Every datum has its own step size. The same kernel draws posterior references (`sample_posterior`)
and moves the chains of annealed importance sampling.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_vae.checks import check_count, check_positive
from pyro_vae.data import Seed, as_seed
from pyro_vae.inference.mcmc.convergence import bulk_ess, split_rhat
from pyro_vae.inference.mcmc.sample import PosteriorSample
from pyro_vae.inference.mcmc.tempered import Point, Tempered
from pyro_vae.inference.programs import (
    Potential,
    Program,
    ProgramError,
    label_sites,
    latent_potential,
    program_scope,
    tool_of_model,
)
from pyro_vae.progress import progress_bar
from pyro_vae.results import sha256_of

__all__ = [
    "Chains",
    "DualAveraging",
    "PosteriorSample",
    "Transition",
    "hmc_step",
    "jittered",
    "run_chains",
    "sample_posterior",
]

_DIVERGED = 1000.0  # nats of energy error beyond which a trajectory is given up, as in Stan
_STARTS = 20  # draws tried for a chain that starts where the density is zero


@dataclass(frozen=True)
class Chains:
    """Settings of Hamiltonian Monte Carlo; see `sample_posterior`."""

    num_chains: int = 4
    num_warmup: int = 300
    num_samples: int = 300
    num_leapfrog: int = 10
    target_accept: float = 0.8
    step_size: float = 0.1

    def __post_init__(self) -> None:
        least = {"num_chains": 1, "num_warmup": 0, "num_samples": 4, "num_leapfrog": 1}
        for name, fewest in least.items():
            value = getattr(self, name)
            check_count(name, value, fewest)
        if not 0 < self.target_accept < 1:
            raise ValueError(
                f"target_accept is a probability between 0 and 1, not {self.target_accept!r}"
            )
        check_positive("step_size", self.step_size)


@dataclass(frozen=True)
class Transition:
    """One step of all chains.

    Attributes:
        point: Where the chains are afterwards.
        acceptance: Probability with which the proposal was accepted, `[chains, batch]`.
        diverged: Whether the trajectory ran off (it was then rejected), `[chains, batch]`.
    """

    point: Point
    acceptance: Float[Tensor, "chains batch"]
    diverged: Bool[Tensor, "chains batch"]


def hmc_step(
    target: Callable[[Tensor], Point],
    point: Point,
    step_size: Float[Tensor, "*chains batch"],
    *,
    num_leapfrog: int = 10,
    inverse_mass: Float[Tensor, "batch dim"] | None = None,
    active: Bool[Tensor, "batch dim"] | None = None,
) -> Transition:
    r"""Moves every chain of every datum by one trajectory, and accepts or rejects each.

    A trajectory whose energy error passes 1000 nats or is undefined is given up: it returns to its
    start, counts as rejected, and is reported. So no value is ever nan.

    Args:
        target: Gives log-density and gradient.
        point: Where the chains are: what `target` gave there.
        step_size: Of each datum, or of each chain and datum.
        num_leapfrog: Steps of the trajectory; each costs one evaluation.
        inverse_mass: Diagonal, roughly the variances of the target; ones if left out.
        active: Latents that have a density; the others stay where they are.

    References:
        Neal (2011), MCMC using Hamiltonian dynamics.
    """
    first = point.u
    variances = torch.ones_like(first[0]) if inverse_mass is None else inverse_mass
    if active is not None:
        variances = variances * active
    momentum = torch.randn_like(first) * torch.where(variances > 0, variances.rsqrt(), 0.0)
    energy = _kinetic(momentum, variances) - point.log_density
    step = step_size[..., None]
    u, now = first, point
    dead = torch.zeros_like(point.log_density, dtype=torch.bool)
    momentum = momentum + 0.5 * step * now.gradient
    for leap in range(num_leapfrog):
        u = u + step * variances * momentum
        dead = dead | ~u.isfinite().all(-1)
        u = torch.where(dead[..., None], first, u)
        now = target(u)
        last = leap == num_leapfrog - 1
        momentum = momentum + (0.5 if last else 1.0) * step * now.gradient
        error = _kinetic(momentum, variances) - now.log_density - energy
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
    return Transition(moved, acceptance, dead & (energy < math.inf))


def _kinetic(momentum: Tensor, variances: Tensor) -> Float[Tensor, "chains batch"]:
    return 0.5 * (variances * momentum**2).sum(-1)


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


@tool_of_model()
def sample_posterior(
    model: Program,
    x: Any,
    *,
    guide: Program | None = None,
    num_chains: int = 4,
    num_warmup: int = 300,
    num_samples: int = 300,
    num_leapfrog: int = 10,
    target_accept: float = 0.8,
    step_size: float = 0.1,
    joint: bool | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> PosteriorSample:
    r"""Draws from the posterior of each datum by Hamiltonian Monte Carlo, all in parallel.

    During warm-up each datum adapts its step size (dual averaging) and a diagonal mass matrix, from
    all its chains. Every trajectory has a step size within 20% of the adapted one and a random
    number of steps, so that none keeps closing on itself or ending opposite to its start (which
    moves the mean fast and the spread hardly at all). Constrained sites are moved in
    unconstrained space, several sites together; discrete sites marked for enumeration are summed
    out.

    Args:
        model: The generative program.
        x: The data; a tuple for several arguments, a dict for keywords.
        guide: Where the chains start; the prior if left out.
        num_chains: Chains of each datum.
        num_warmup: Steps of each chain that only adapt, and are thrown away.
        num_samples: Draws kept of each chain, at least 4.
        num_leapfrog: Evaluations of the gradient in each step, on average: their number is uniform
            from 1 to twice this less one.
        target_accept: Mean acceptance probability to adapt to, in (0, 1).
        step_size: Leapfrog step to begin with.
        joint: True for one posterior on the full data; None for that where latents are global.
        seed: Seeds everything; the caller's random state is left alone.
        progress: Shows a bar on stderr where that is a terminal.

    Raises:
        ProgramError: If a latent is discrete and not enumerated (names it), the programs do not fit
            together, or the density is zero wherever a chain could start (says for which data).
        ValueError: If an argument is out of its range.

    Note: started from a guide or a prior that never visits a mode, all chains may miss it, and
    R-hat cannot tell.

    References:
        Neal (2011), MCMC using Hamiltonian dynamics; Hoffman & Gelman (2014), The No-U-Turn
        sampler.

    Example:
        >>> import torch
        >>> from pyro_vae import LinearGaussian
        >>> model = LinearGaussian(data_dim=3, latent_dim=2)
        >>> found = sample_posterior(model.model, torch.zeros(5, 3), num_warmup=100)
        >>> found.draws["z"].shape
        torch.Size([4, 300, 5, 2])
    """
    settings = Chains(num_chains, num_warmup, num_samples, num_leapfrog, target_accept, step_size)
    seed = as_seed(seed)
    with program_scope(seed):
        potential = latent_potential(model, guide, x, joint=joint)
    return run_chains(potential, settings, seed=seed, progress=progress)


def run_chains(
    potential: Potential, settings: Chains, *, seed: int, progress: bool
) -> PosteriorSample:
    """What `sample_posterior` does, of a log joint that is at hand; starts from its guide."""
    with torch.no_grad(), program_scope(seed):
        steps = settings.num_warmup + settings.num_samples
        target = Tempered(potential, capture=steps * settings.num_leapfrog > 300)
        point = _starting_points(potential, target, settings.num_chains)
        shown = progress_bar(steps, "step", show=progress, what="HMC")
        with shown:
            point, step, mass = _warm_up(potential, target, point, settings, shown.update)
            moves = []
            for _ in range(settings.num_samples):
                moves.append(_move(potential, target, point, step, mass, settings))
                point = moves[-1].point
                shown.update()
        draws = torch.stack([move.point.u for move in moves], 1)
        constrained = potential.constrain(draws.flatten(0, 1))
        ((trace, count),) = potential.traces(draws[:1, 0])
        sites = label_sites(trace, potential.structure, count)
    shape = draws.shape[:2]
    rhat, ess = split_rhat(draws), bulk_ess(draws)
    return PosteriorSample(
        draws={name: value.unflatten(0, shape) for name, value in constrained.items()},
        unconstrained=draws,
        log_joint=torch.stack([move.point.joint for move in moves], 1),
        acceptance=torch.stack([move.acceptance for move in moves]).mean(0),
        step_size=step,
        divergences=torch.stack([move.diverged for move in moves]).sum(0),
        rhat=torch.where(potential.active, rhat, 1.0).amax(-1),
        ess=torch.where(potential.active, ess, math.inf).amin(-1),
        potential=potential,
        config={
            **asdict(settings),
            "start": "guide" if potential.has_guide else "prior",
            "joint": potential.structure.batch_dim is None,
            "seed": seed,
        },
        data_sha256=sha256_of(*potential.data),
        sites=sites,
    )


def _move(
    potential: Potential,
    target: Tempered,
    point: Point,
    step_size: Tensor,
    mass: Tensor,
    settings: Chains,
) -> Transition:
    return hmc_step(
        target,
        point,
        jittered(step_size, point),
        num_leapfrog=_random_length(settings.num_leapfrog),
        inverse_mass=mass,
        active=potential.active,
    )


def _starting_points(potential: Potential, target: Tempered, num_chains: int) -> Point:
    """Draws of guide or prior at which the density is positive."""
    start = "guide" if potential.has_guide else "prior"
    u = potential.draw(num_chains, start)
    for _ in range(_STARTS):
        point = target(u)
        bad = (point.joint == -math.inf) | ~point.joint.isfinite()
        if not bool(bad.any()):
            return point
        u = torch.where(bad[..., None], potential.draw(num_chains, start), u)
    data = sorted(set(torch.nonzero(bad)[:, 1].tolist()))
    listed = ", ".join(map(str, data[:5])) + (", ..." if len(data) > 5 else "")
    raise ProgramError(
        f"the log joint of datum {listed} is not finite at any of {_STARTS} draws of the {start}, "
        "so no chain can start there; leave the data out, or pass a guide that draws where the "
        "density is positive"
    )


def _warm_up(
    potential: Potential,
    target: Tempered,
    point: Point,
    settings: Chains,
    advance: Callable[[], Any],
) -> tuple[Point, Float[Tensor, " batch"], Float[Tensor, "batch dim"]]:
    """Adapts step sizes, then twice the masses and the step sizes to them."""
    first = torch.full_like(point.log_density[0], settings.step_size)
    steps = DualAveraging(first, settings.target_accept)
    mass, num_warmup = torch.ones_like(point.u[0]), settings.num_warmup
    # Shares of the warm-up; the masses are set from the draws of the second and the third part.
    ends = [round(num_warmup * share) for share in (0.15, 0.35, 0.65, 1.0)]
    window: list[Tensor] = []
    for count in range(1, num_warmup + 1):
        moved = _move(potential, target, point, steps.step_size, mass, settings)
        point = moved.point
        steps.update(moved.acceptance)
        window.append(point.u)
        if count == ends[0]:
            window = []
        elif count in ends[1:3] and len(window) * len(point.u) > 9:
            mass = _regularised_variance(torch.stack(window).flatten(0, 1))
            # Of a whitened target the step size depends on the dimension alone, and weakly.
            steps.restart(torch.full_like(steps.step_size, point.u.shape[-1] ** -0.25))
            window = []
        advance()
    return point, (steps.mean if num_warmup else steps.step_size), mass


def _regularised_variance(u: Float[Tensor, "draws batch dim"]) -> Float[Tensor, "batch dim"]:
    """Variances, drawn a little towards a small number as in Stan."""
    count = len(u)
    return (count * u.var(0) + 5 * 1e-3) / (count + 5)


def jittered(step_size: Float[Tensor, " batch"], point: Point) -> Float[Tensor, "chains batch"]:
    """Step sizes within 20% of the given ones, another for each chain."""
    return step_size * (0.8 + 0.4 * torch.rand_like(point.log_density))


def _random_length(num_leapfrog: int) -> int:
    """A number of leapfrog steps of the given mean, uniform from 1 (Neal 2011)."""
    return int(torch.randint(1, 2 * num_leapfrog, ()))
