r"""Annealed importance sampling between a start (prior or guide) and the posterior, both ways.

.. math:: \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1})
          \bigl[\log p(x, z_{t-1}) - \log f_0(z_{t-1})\bigr], \qquad z_t \sim \mathcal T_t(z_{t-1})

along :math:`f_\beta = f_0^{1-\beta} \, p(x, z)^\beta`, with Hamiltonian transitions. Forward, from
draws of the start, the mean of w is p(x): its logarithm is a lower bound in expectation. In
reverse, from an exact posterior draw (known where the data are simulated), the mean of 1/w is
1/p(x): an upper bound. Their distance bounds the error of both (bidirectional Monte Carlo:
Grosse, Ghahramani & Adams 2015, arXiv:1511.02543).

Step sizes are learnt along the path by pilot chains and held fixed afterwards, for transitions
that adapt themselves would bias the weights and could not be reversed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.checks import check_count, check_positive
from pyro_vae.inference.log_weights import (
    effective_sample_size,
    importance_bound,
    importance_bound_error,
)
from pyro_vae.inference.mcmc import Scale, estimated_scale, hmc_step, jittered
from pyro_vae.inference.programs import UnconstrainedModel
from pyro_vae.inference.tempered import Tempered
from pyro_vae.intervals import student_factor

__all__ = [
    "FEWEST_SIMULATIONS",
    "Annealing",
    "annealed_weights",
    "reduce_forward",
    "reduce_reverse",
    "temperatures",
    "with_shared_draws",
]

FEWEST_SIMULATIONS = 10
"""From which on their spread tells what an exact draw contributes."""

_PILOT_STEPS = 150  # of the pilot chains: they skip temperatures, or stay for several steps
_SETTLE = 30  # steps in which the pilot finds a step size before it moves on
_GAIN = 0.4  # change of the log step size for each unit of acceptance missed
_SCALE_DRAWS = 100  # draws of the start from which its scale is taken
_MOST_CORRELATED = 20  # latents up to which these show correlations, those of a guide
_STEEPNESS = 4.0  # delta of the sigmoid schedule in Wu et al.


@dataclass(frozen=True)
class Annealing:
    """Settings of annealed importance sampling.

    Attributes:
        num_chains: Independent chains of each datum.
        num_temperatures: Steps from the start to the posterior; the error falls with their number.
        schedule: `"sigmoid"` (finer at both ends) or `"linear"`.
        start: `"prior"` or `"guide"`. Where `log_evidence` is given a guide with a density and
            `joint`, it starts from the guide unless told otherwise: the prior of global latents may
            lie hundreds of nats away.
        num_leapfrog: Gradient evaluations of each transition.
        target_accept: Acceptance probability the pilot chains adapt to.
        step_size: Where the pilot chains begin.
    """

    num_chains: int = 16
    num_temperatures: int = 500
    schedule: str = "sigmoid"
    start: str = "prior"
    num_leapfrog: int = 10
    target_accept: float = 0.65
    step_size: float = 0.1

    def __post_init__(self) -> None:
        for name in ("num_chains", "num_temperatures", "num_leapfrog"):
            value = getattr(self, name)
            check_count(name, value)
        if self.schedule not in ("linear", "sigmoid"):
            raise ValueError(f"schedule is 'linear' or 'sigmoid', not {self.schedule!r}")
        if self.start not in ("prior", "guide"):
            raise ValueError(f"start is 'prior' or 'guide', not {self.start!r}")
        if not 0 < self.target_accept < 1:
            raise ValueError(f"target_accept lies between 0 and 1, not {self.target_accept!r}")
        check_positive("step_size", self.step_size)


def temperatures(num_temperatures: int, schedule: str) -> list[float]:
    r"""The path :math:`0 = \beta_0 < \dots < \beta_T = 1`.

    The sigmoid schedule is :math:`\sigma(\delta (2t/T - 1))`, scaled to [0, 1], with
    :math:`\delta = 4`.

    References:
        Wu, Burda, Salakhutdinov & Grosse (2017), On the quantitative analysis of decoder-based
        generative models.
    """
    grid = torch.linspace(0, 1, num_temperatures + 1, dtype=torch.float64)
    if schedule == "sigmoid":
        values = torch.sigmoid(_STEEPNESS * (2 * grid - 1))
        grid = (values - values[0]) / (values[-1] - values[0])
    return [0.0, *grid[1:-1].tolist(), 1.0]


@dataclass(frozen=True)
class _Path:
    """The transitions along the path: what forward and reverse chains share."""

    target: Tempered
    betas: list[float]
    step_sizes: Float[Tensor, "temperatures batch"]
    scale: Scale
    num_leapfrog: int


def annealed_weights(
    latent_model: UnconstrainedModel,
    settings: Annealing,
    exact: Float[Tensor, "1 batch dim"] | None = None,
) -> dict[str, Tensor]:
    """Runs the chains of every datum from the start to the posterior, and back if asked.

    Args:
        latent_model: The model at the data; used inside `program_scope`.
        settings: The settings.
        exact: An exact posterior draw of each datum, from which to anneal back.

    Returns:
        `forward`, log weights `[chains, batch]` whose log-mean-exp is a lower bound in expectation;
        `reverse`, if asked, log weights of which minus the log-mean-exp of the negatives is an
        upper bound; `acceptance` `[batch]`.

    Raises:
        ProgramError: If the start is the guide and its density cannot be evaluated.

    References:
        Neal (2001), Annealed importance sampling; Grosse, Ghahramani & Adams (2015), Sandwiching
        the marginal likelihood using bidirectional Monte Carlo, arXiv:1511.02543; Grosse, Ancha &
        Roy (2016), Measuring the reliability of MCMC inference with bidirectional Monte Carlo.
    """
    if settings.start == "guide":
        latent_model.check_guide_density("start from the prior (start='prior')")
    target = Tempered(latent_model, settings.start)
    path = _learn_path(latent_model, target, settings)
    forward, acceptance = _anneal(path, latent_model.draw(settings.num_chains, settings.start))
    found = {"forward": forward, "acceptance": acceptance}
    if exact is not None:
        chains = exact.expand(settings.num_chains, *exact.shape[1:])
        found["reverse"], backwards = _anneal(path, chains, reverse=True)
        found["acceptance"] = (acceptance + backwards) / 2
    return found


def _learn_path(latent_model: UnconstrainedModel, target: Tempered, settings: Annealing) -> _Path:
    """Learns the step size of every datum at every temperature with pilot chains."""
    drawn = latent_model.draw(_SCALE_DRAWS, settings.start)
    dense = settings.start == "guide" and 1 < latent_model.dim <= _MOST_CORRELATED
    scale = estimated_scale(drawn, torch.ones_like(drawn[0]), dense=dense)
    betas = temperatures(settings.num_temperatures, settings.schedule)
    u = latent_model.draw(max(2, settings.num_chains // 4), settings.start)
    log_step = torch.full_like(u[0, :, 0], math.log(settings.step_size))
    learnt = []
    stride = max(1, settings.num_temperatures // _PILOT_STEPS)
    visited = range(1, settings.num_temperatures, stride)
    stay = max(1, _PILOT_STEPS // max(len(visited), 1))
    for t in visited:
        for _ in range(stay + _SETTLE * (t == 1)):
            point = target(u, betas[t])
            moved = hmc_step(
                partial(target, beta=betas[t]),
                point,
                jittered(log_step.exp(), point),
                num_leapfrog=settings.num_leapfrog,
                scale=scale,
                active=latent_model.active,
            )
            u = moved.point.u
            missed = moved.acceptance.mean(0) - settings.target_accept
            log_step = (log_step + _GAIN * missed).clamp(-30.0, 3.0)
        learnt.append(log_step.exp())
    if not learnt:
        steps = log_step.new_empty(0, len(log_step))
    else:
        steps = torch.stack(learnt).repeat_interleave(stride, 0)
    return _Path(target, betas, steps, scale, settings.num_leapfrog)


def _anneal(
    path: _Path, u: Float[Tensor, "chains batch dim"], *, reverse: bool = False
) -> tuple[Float[Tensor, "chains batch"], Float[Tensor, " batch"]]:
    """Log weights and mean acceptance of chains that go along the path, or back along it."""
    betas, last = path.betas, len(path.betas) - 1
    total = torch.zeros_like(u[..., 0], dtype=torch.float64)
    accepted, count = torch.zeros_like(u[0, :, 0]), 0
    order = range(last, 0, -1) if reverse else range(1, last + 1)
    for t in order:
        # The weight's share of temperature t is taken before a forward move and after a reverse
        # one, so that both visit the same states.
        beta = betas[max(t - 1, 1)] if reverse else betas[t]
        point = path.target(u, beta)
        total = total + (betas[t] - betas[t - 1]) * _log_ratio(point.joint, point.start)
        moves_at = t - 1 if reverse else t
        if not 1 <= moves_at < last:
            continue
        moved = hmc_step(
            partial(path.target, beta=betas[moves_at]),
            point,
            jittered(path.step_sizes[moves_at - 1], point),
            num_leapfrog=path.num_leapfrog,
            scale=path.scale,
            active=path.target.latent_model.active,
        )
        u = moved.point.u
        accepted, count = accepted + moved.acceptance.mean(0), count + 1
    return total, accepted / count if count else torch.ones_like(accepted)


def _log_ratio(joint: Tensor, start: Tensor) -> Tensor:
    """Log p(x, z) - log f_0(z); minus infinity where the joint density is zero."""
    return torch.where(joint == -math.inf, -math.inf, joint - start).double()


def reduce_forward(log_weights: Float[Tensor, "chains batch"]) -> dict[str, Tensor]:
    """The lower bound of each datum with its error, from the log weights of its chains."""
    error = importance_bound_error(log_weights)
    return {
        "log_evidence": importance_bound(log_weights),
        "log_evidence_se": error.se,
        "log_evidence_bias": error.bias,
        "error_reliable": error.reliable,
        "ess": effective_sample_size(log_weights),
    }


def reduce_reverse(log_weights: Float[Tensor, "chains batch"]) -> dict[str, Tensor]:
    """The upper bound of each datum with its error, from the log weights of reverse chains.

    The chains of a datum share their exact draw, whose part in the error the error leaves out; see
    `with_shared_draws`.
    """
    found = reduce_forward(-log_weights)
    flipped = {name: -found[name] for name in ("log_evidence", "log_evidence_bias")}
    return found | flipped


def with_shared_draws(found: Mapping[str, Tensor], num_chains: int) -> dict[str, Tensor]:
    r"""Adds to the error of each simulated upper bound what its one exact draw contributes.

    All reverse chains of a simulation start from the same exact draw, so their spread does not show
    what another draw would have given. With d the distance of upper and lower bound, in which the
    evidence of the simulation cancels, and s the errors by the spread of chains,

    .. math:: \mathrm{se}_n^2 = s_{u,n}^2 + \max\bigl(0, \operatorname{var}(d)
              - \overline{s_u^2}\bigr)

    the same for all simulations (bias and Student's factor taken out of s on the right). The noise
    of the lower bound is left in, as room for the skewness of the upper one.

    Args:
        found: The columns of all simulations, `[simulation]`.
        num_chains: Chains of each.

    Returns:
        The columns; as they were where there are fewer than 10 simulations.
    """
    distance = found["simulated_upper"] - found["simulated_lower"]
    if len(distance) < FEWEST_SIMULATIONS:
        return dict(found)
    noise = found["simulated_upper_se"].square() - found["simulated_upper_bias"].square()
    noise = noise / float(student_factor(num_chains)) ** 2
    shared = (distance.var() - noise.mean()).clamp_min(0.0)
    error = (found["simulated_upper_se"].square() + shared).sqrt()
    return {**found, "simulated_upper_se": torch.where(shared.isfinite(), error, math.nan)}
