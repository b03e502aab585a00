r"""Bridge sampling: log p(x) from draws of the posterior and of a normalised density near it.

.. math:: p(x) = \frac{E_q[h(z)\, p(x, z)]}{E_{p(z \mid x)}[h(z)\, q(z)]}, \qquad
          h = \frac{1}{s_1\, p(x, z) + s_2\, p(x)\, q(z)}

with Meng & Wong's optimal bridge h, which needs the answer and is therefore iterated.
"""

import math
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_vae.inference.mcmc import Chains, PosteriorSample, bulk_ess, mean_ess, run_chains
from pyro_vae.inference.programs import UnconstrainedModel

__all__ = ["Bridging", "bridge_columns", "bridge_evidence"]

_ITERATIONS = 200
_PARTICLES = 500  # evaluated at once


@dataclass(frozen=True)
class Bridging:
    """Settings of bridge sampling.

    Attributes:
        proposal: `"guide"`, or `"normal"`: one fitted to the first half of the posterior draws.
        num_chains: Posterior chains of each datum.
        num_warmup: Their warm-up steps.
        num_samples: Their draws.
        num_leapfrog: Gradient evaluations of each step, on average; adapted if None.
        target_accept: Acceptance probability they adapt to.
    """

    proposal: str = "guide"
    num_chains: int = 4
    num_warmup: int = 300
    num_samples: int = 500
    num_leapfrog: int | None = None
    target_accept: float = 0.8

    def __post_init__(self) -> None:
        if self.proposal not in ("guide", "normal"):
            raise ValueError(f"proposal is 'guide' or 'normal', not {self.proposal!r}")


def bridge_columns(
    latent_model: UnconstrainedModel, settings: Bridging, *, seed: int
) -> dict[str, Float[Tensor, " batch"]]:
    """Log evidence of each datum by bridge sampling, with errors and the chains' diagnostics."""
    chains = {name: value for name, value in asdict(settings).items() if name != "proposal"}
    found = run_chains(latent_model, Chains(**chains), seed=seed, progress=False)
    half = settings.num_samples // 2
    if settings.proposal == "guide":
        latent_model.check_guide_density("fit a normal to the draws (proposal='normal')")
        posterior = _guide_ratio(latent_model, found.unconstrained)
        drawn = latent_model.draw(posterior.shape[0] * posterior.shape[1], "guide")
        proposed = _guide_ratio(latent_model, drawn[None])[0]
    else:
        fitted = _fit_normal(found, half)
        kept = found.unconstrained[:, half:]
        posterior = found.log_joint[:, half:] - _log_prob(fitted, kept, latent_model)
        drawn = _draw(fitted, kept.shape[0] * kept.shape[1], latent_model)
        proposed = _joint_at(latent_model, drawn) - _log_prob(fitted, drawn, latent_model)
    value, error = bridge_evidence(posterior.double(), proposed.double())
    return {
        "log_evidence": value,
        "log_evidence_se": error,
        "ess": found.ess,
        "rhat": found.rhat,
        "acceptance": found.acceptance.mean(0),
    }


def bridge_evidence(
    posterior: Float[Tensor, "chains draws batch"], proposed: Float[Tensor, "particles batch"]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    r"""Iterates the optimal bridge to its fixed point.

    Args:
        posterior: log p(x, z) - log q(z) at draws of the posterior.
        proposed: The same at draws of q.

    Returns:
        log p(x) and its standard error, in nats; the error takes in the chains' autocorrelation.

    References:
        Meng & Wong (1996), Simulating ratios of normalizing constants, Statistica Sinica 6, eq.
        4.1; Frühwirth-Schnatter (2004), Estimating marginal likelihoods for mixture and Markov
        switching models using bridge sampling techniques, Econometrics Journal 7.
    """
    flat = posterior.flatten(0, 1)
    effective = bulk_ess(posterior).clamp(1.0, float(len(flat)))
    share = effective / (effective + len(proposed))
    log_s1, log_s2 = share.log(), (1 - share).log()
    value = proposed.logsumexp(0) - math.log(len(proposed))
    # A start far off is as good: the iteration contracts to its only fixed point.
    value = torch.where(value.isfinite(), value, flat.median(0).values)
    for _ in range(_ITERATIONS):
        above, below = _terms(flat, proposed, value, log_s1, log_s2)
        new = above.logsumexp(0) - math.log(len(above))
        new = new - below.logsumexp(0) + math.log(len(below))
        change = (new - value).abs()
        value = new
        if not bool((change > 1e-12 * (1 + value.abs())).any()):
            break
    above, below = _terms(flat, proposed, value, log_s1, log_s2)
    chains, draws = posterior.shape[:2]
    terms = below.unflatten(0, (chains, draws))
    # The mean is one of the terms themselves: their ranks alone say too little where few count.
    effective = torch.minimum(bulk_ess(terms), mean_ess((terms - below.amax(0)).exp()))
    correlated = len(flat) / effective.clamp_min(1.0)
    variance = _relative_variance(above) / len(above)
    variance = variance + correlated * _relative_variance(below) / len(below)
    return value, variance.sqrt()


def _terms(
    posterior: Tensor, proposed: Tensor, value: Tensor, log_s1: Tensor, log_s2: Tensor
) -> tuple[Tensor, Tensor]:
    """Logs of h p(x, z) at draws of q, and of h q at draws of the posterior."""

    def bottom(ratio: Tensor) -> Tensor:
        return torch.logaddexp(log_s1 + ratio, log_s2 + value)

    return proposed - bottom(proposed), -bottom(posterior)


def _relative_variance(logs: Float[Tensor, "draws batch"]) -> Float[Tensor, " batch"]:
    scaled = (logs - logs.logsumexp(0) + math.log(len(logs))).exp()
    return scaled.var(0)


def _guide_ratio(
    latent_model: UnconstrainedModel, u: Tensor
) -> Float[Tensor, "chains draws batch"]:
    found = []
    for part in u.flatten(0, 1).split(_PARTICLES):
        densities = latent_model.log_densities(part, "guide")
        found.append((densities.joint - densities.start).detach())
    return torch.cat(found).unflatten(0, u.shape[:2])


def _joint_at(latent_model: UnconstrainedModel, u: Tensor) -> Float[Tensor, "particles batch"]:
    return torch.cat([latent_model.log_density(part).detach() for part in u.split(_PARTICLES)])


def _fit_normal(found: PosteriorSample, half: int) -> list[MultivariateNormal]:
    """The normal with the moments of the first half of each datum's draws, on active latents."""
    fitted = []
    draws = found.unconstrained[:, :half].flatten(0, 1)
    for datum in range(draws.shape[1]):
        active = found.latent_model.active[datum]
        u = draws[:, datum, active].double()
        covariance = torch.atleast_2d(u.T.cov())
        ridge = 1e-9 * covariance.diagonal().mean() + 1e-300
        covariance = covariance + ridge * torch.eye(len(covariance)).to(covariance)
        fitted.append(MultivariateNormal(u.mean(0), covariance))
    return fitted


def _log_prob(
    fitted: list[MultivariateNormal], u: Tensor, latent_model: UnconstrainedModel
) -> Float[Tensor, "*draws batch"]:
    columns = [q.log_prob(u[..., n, latent_model.active[n]].double()) for n, q in enumerate(fitted)]
    return torch.stack(columns, -1)


def _draw(fitted: list[MultivariateNormal], count: int, latent_model: UnconstrainedModel) -> Tensor:
    drawn = latent_model.like.new_zeros(count, *latent_model.active.shape, dtype=torch.float64)
    for n, q in enumerate(fitted):
        drawn[:, n, latent_model.active[n]] = q.sample(torch.Size((count,)))
    return drawn.to(latent_model.like)
