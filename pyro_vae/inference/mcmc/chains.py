"""`sample_posterior`: chains that start, adapt and sample, for every datum at once."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.checks import check_count, check_positive
from pyro_vae.data import Seed, as_seed
from pyro_vae.inference.mcmc.adaptation import (
    DualAveraging,
    TrajectoryLength,
    estimated_scale,
    factor_or,
    is_dense,
    window_ends,
)
from pyro_vae.inference.mcmc.convergence import bulk_ess, split_rhat
from pyro_vae.inference.mcmc.hmc import Scale, Transition, hmc_step, jittered, random_length
from pyro_vae.inference.mcmc.sample import PosteriorSample
from pyro_vae.inference.optimisation import PathNormals, find_paths, starting_points
from pyro_vae.inference.programs import (
    Program,
    UnconstrainedModel,
    label_sites,
    program_scope,
    tool_of_model,
    unconstrained_model,
)
from pyro_vae.inference.tempered import Point, Tempered
from pyro_vae.progress import progress_bar
from pyro_vae.results import sha256_of

__all__ = ["Adapted", "Chains", "run_chains", "sample_posterior", "warm_up"]

_MOST_AT_FIRST = 12  # leapfrog steps on average, until the scale is known from draws
_NO_MASS = 10.0  # nats, and one for each latent, below the best path's ELBO
_METRICS = ("auto", "dense", "diagonal")


@dataclass(frozen=True)
class Chains:
    """Settings of Hamiltonian Monte Carlo; see `sample_posterior`."""

    num_chains: int = 4
    num_warmup: int = 300
    num_samples: int = 500
    num_leapfrog: int | None = None
    target_accept: float = 0.8
    step_size: float = 0.1
    metric: str = "auto"

    def __post_init__(self) -> None:
        least = {"num_chains": 1, "num_warmup": 0, "num_samples": 4}
        for name, fewest in least.items():
            value = getattr(self, name)
            check_count(name, value, fewest)
        check_count("num_leapfrog", self.num_leapfrog, optional=True)
        if not 0 < self.target_accept < 1:
            raise ValueError(
                f"target_accept is a probability between 0 and 1, not {self.target_accept!r}"
            )
        check_positive("step_size", self.step_size)
        if self.metric not in _METRICS:
            raise ValueError(f"metric is one of {', '.join(_METRICS)}, not {self.metric!r}")


@tool_of_model()
def sample_posterior(
    model: Program,
    x: Any,
    *,
    guide: Program | None = None,
    num_chains: int = 4,
    num_warmup: int = 300,
    num_samples: int = 500,
    num_leapfrog: int | None = None,
    target_accept: float = 0.8,
    step_size: float = 0.1,
    metric: str = "auto",
    joint: bool | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> PosteriorSample:
    r"""Draws from the posterior of each datum by Hamiltonian Monte Carlo, all in parallel.

    Each chain climbs from a draw of the prior or guide towards a mode, and starts from the normal
    of the highest ELBO on its way (Pathfinder). During warm-up each datum adapts a step size (dual
    averaging) and a metric of its own from all its chains, in windows that double; the length of
    trajectories, which all data share, follows the ChEES criterion. Every trajectory has a step
    size within 20% of the adapted one and a random number of steps, so that none keeps closing on
    itself or ending opposite to its start (which moves the mean fast and the spread hardly at all).
    Constrained sites are moved in unconstrained space, several sites together; discrete sites
    marked for enumeration are summed out.

    Args:
        model: The generative program.
        x: The data; a tuple for several arguments, a dict for keywords.
        guide: Where the chains start; the prior if left out.
        num_chains: Chains of each datum.
        num_warmup: Steps of each chain that only adapt, and are thrown away; with 0 the chains
            start from the draws themselves.
        num_samples: Draws kept of each chain, at least 4.
        num_leapfrog: Evaluations of the gradient in each step, on average: their number is uniform
            from 1 to twice this less one. Adapted if None, up to an average of 32.
        target_accept: Mean acceptance probability to adapt to, in (0, 1).
        step_size: Leapfrog step to begin with, where nothing is known of the scale.
        metric: `"dense"` (a covariance of each datum), `"diagonal"`, or `"auto"`: dense up to 100
            latents where the last window has 5 draws for each.
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
        sampler; Hoffman, Radul & Sountsov (2021), An adaptive-MCMC scheme for setting trajectory
        lengths in Hamiltonian Monte Carlo; Zhang, Carpenter, Gelman & Vehtari (2022), Pathfinder.

    Example:
        >>> import torch
        >>> from pyro_vae import LinearGaussian
        >>> model = LinearGaussian(data_dim=3, latent_dim=2)
        >>> found = sample_posterior(model.model, torch.zeros(5, 3), num_warmup=100)
        >>> found.draws["z"].shape
        torch.Size([4, 500, 5, 2])
    """
    settings = Chains(
        num_chains, num_warmup, num_samples, num_leapfrog, target_accept, step_size, metric
    )
    seed = as_seed(seed)
    with program_scope(seed):
        latent_model = unconstrained_model(model, guide, x, joint=joint)
    return run_chains(latent_model, settings, seed=seed, progress=progress)


def run_chains(
    latent_model: UnconstrainedModel, settings: Chains, *, seed: int, progress: bool
) -> PosteriorSample:
    """What `sample_posterior` does, of a log joint that is at hand; starts from its guide."""
    with torch.no_grad(), program_scope(seed):
        steps = settings.num_warmup + settings.num_samples
        target = Tempered(latent_model, capture=steps * (settings.num_leapfrog or 10) > 300)
        start = "guide" if latent_model.has_guide else "prior"
        point = starting_points(target, settings.num_chains, start)
        shown = progress_bar(steps, "step", show=progress, what="HMC")
        with shown:
            found = warm_up(target, point, settings, shown.update)
            moves, point = [], found.point
            for _ in range(settings.num_samples):
                moves.append(found.move(target, point))
                point = moves[-1].point
                shown.update()
        draws = torch.stack([move.point.u for move in moves], 1)
        constrained = latent_model.constrain(draws.flatten(0, 1))
        ((trace, count),) = latent_model.traces(draws[:1, 0])
        sites = label_sites(trace, latent_model.structure, count)
    shape = draws.shape[:2]
    rhat, ess = split_rhat(draws), bulk_ess(draws)
    return PosteriorSample(
        draws={name: value.unflatten(0, shape) for name, value in constrained.items()},
        unconstrained=draws,
        log_joint=torch.stack([move.point.joint for move in moves], 1),
        acceptance=torch.stack([move.acceptance for move in moves]).mean(0),
        step_size=found.step_size,
        divergences=torch.stack([move.diverged for move in moves]).sum(0),
        rhat=torch.where(latent_model.active, rhat, 1.0).amax(-1),
        ess=torch.where(latent_model.active, ess, math.inf).amin(-1),
        latent_model=latent_model,
        config={
            **asdict(settings),
            "num_leapfrog": found.num_leapfrog,
            "metric": "diagonal" if found.scale.dim() == 2 else "dense",
            "start": start,
            "joint": latent_model.structure.batch_dim is None,
            "seed": seed,
        },
        data_sha256=sha256_of(*latent_model.data),
        sites=sites,
    )


# --- warm-up --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapted:
    """Chains after their warm-up, and what they adapted.

    Attributes:
        point: Where they are.
        step_size: In units of the scale, `[batch]`.
        scale: Of each posterior.
        num_leapfrog: Of each step, on average.
    """

    point: Point
    step_size: Float[Tensor, " batch"]
    scale: Scale
    num_leapfrog: float

    def move(self, target: Tempered, point: Point) -> Transition:
        """One step of all chains."""
        return hmc_step(
            target,
            point,
            jittered(self.step_size, point),
            num_leapfrog=random_length(self.num_leapfrog),
            scale=self.scale,
            active=target.latent_model.active,
        )


def warm_up(
    target: Tempered, point: Point, settings: Chains, advance: Callable[[], Any] = lambda: None
) -> Adapted:
    """Climbs towards the mass, then adapts step sizes, scales and the trajectories' length."""
    num_warmup, fixed = settings.num_warmup, settings.num_leapfrog
    scale: Scale = torch.ones_like(point.u[0])
    first = torch.full_like(point.log_density[0], settings.step_size)
    if not num_warmup:
        return Adapted(point, first, scale, fixed or 10)
    ends = window_ends(num_warmup)
    num_chains, _, dim = point.u.shape
    dense = is_dense(settings.metric, dim, num_chains * (ends[-1] - ends[-2]))
    point, scale = _climbed(target, point, num_iterations=min(num_warmup, 200), dense=dense)
    # Of a whitened target the step size depends on the dimension alone, and weakly.
    fresh = torch.full_like(first, 0.5 * dim**-0.25)
    steps = DualAveraging(fresh, settings.target_accept)
    length, centre = TrajectoryLength(), point.u.mean(0)
    window: list[Tensor] = []
    for count in range(1, num_warmup + 1):
        average = fixed or length.num_leapfrog(steps.step_size)
        if fixed is None and count <= ends[1]:  # the scale is a guess: long ones would be wasted
            average = min(average, _MOST_AT_FIRST)
        size, number = jittered(steps.step_size, point), random_length(average)
        moved = hmc_step(
            target,
            point,
            size,
            num_leapfrog=number,
            scale=scale,
            active=target.latent_model.active,
        )
        if fixed is None and count > ends[0]:
            length.update(moved, point.u, centre, scale, size * number)
        point = moved.point
        steps.update(moved.acceptance)
        window.append(point.u)
        if count in ends and len(window) * num_chains > 9:
            drawn = torch.stack(window).flatten(0, 1)
            enough = dense and len(drawn) > 2 * dim
            if enough or not dense:
                scale, centre = estimated_scale(drawn, scale, dense=dense), drawn.mean(0)
                steps.restart(fresh)
                length.restart()
            window = []
        advance()
    return Adapted(point, steps.mean, scale, fixed or length.num_leapfrog(steps.mean, mean=True))


def _climbed(
    target: Tempered, point: Point, *, num_iterations: int, dense: bool
) -> tuple[Point, Scale]:
    """Draws of the best normals on the chains' ways to their modes, and the scale of the best."""
    found = find_paths(target, point.u, num_iterations=num_iterations)
    drawn = _drawn(found)
    usable = drawn.isfinite().all(-1, keepdim=True) & target.latent_model.active
    begun = target(torch.where(usable, drawn, point.u))
    worse = ~begun.joint.isfinite()
    begun = Point(
        *(
            torch.where(worse[..., None] if new.dim() == 3 else worse, old, new)
            for new, old in zip(begun, point, strict=True)
        )
    )
    best = found.elbo.argmax(0)
    covariance = found.covariance.dense() if dense else None
    rows = torch.arange(point.u.shape[1])
    if covariance is None:
        beta, gamma = found.covariance.low_rank()
        variance = found.covariance.diagonal + ((beta @ gamma) * beta).sum(-1)
        variance = variance[best, rows]
        return begun, torch.where(variance > 0, variance, 1.0).sqrt()
    chosen = covariance[best, rows].double()
    ones = torch.diag_embed(torch.ones_like(chosen[..., 0]))
    return begun, factor_or(chosen, ones).to(point.u)


def _drawn(found: PathNormals) -> Float[Tensor, "chains batch dim"]:
    """A draw of each chain's normal, or of another chain's where its own holds next to no mass.

    The ELBO of a normal is the log of the mass near it, but for its misfit, which grows with the
    number of latents.
    """
    chains, _, dim = found.loc.shape
    hopeless = found.elbo < found.elbo.amax(0) - _NO_MASS - dim
    weights = torch.where(hopeless, 0.0, 1.0) + 1e-30
    others = torch.multinomial(weights.T, chains, replacement=True).T
    drawn = found.draw(1)[0][0]
    again = found.draw(1)[0][0].gather(0, others[..., None].expand_as(drawn))
    return torch.where(hopeless[..., None], again, drawn)
