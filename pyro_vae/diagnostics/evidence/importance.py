"""Importance sampling: log evidence, ELBO and gap from the same draws of the guide."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.checks import check_count
from pyro_vae.diagnostics.evidence.chunks import ChunkPlan, Columns
from pyro_vae.inference.log_weights import (
    effective_sample_size,
    elbo,
    importance_bound,
    importance_bound_error,
    khat_threshold,
    mean_error,
    pareto_tail,
)
from pyro_vae.inference.programs import Pair, UnconstrainedModel
from pyro_vae.results import data_text

__all__ = ["Importance", "importance_columns", "importance_notes", "two_sided_columns"]


@dataclass(frozen=True)
class Importance:
    """Settings of importance sampling.

    Attributes:
        num_particles: Draws from the guide for each datum.
    """

    num_particles: int = 1000

    def __post_init__(self) -> None:
        value = self.num_particles
        check_count("num_particles", value)


def importance_columns(pair: Pair, plan: ChunkPlan, num_particles: int) -> Columns:
    """Every column of a chunk of data, its particles drawn in parts."""
    weights = torch.cat([pair.log_weights(count) for count in plan.particles(num_particles)])
    return _reduce(weights.double())


def two_sided_columns(
    latent_model: UnconstrainedModel, exact: Float[Tensor, "1 batch dim"], num_particles: int
) -> Columns:
    r"""ELBO, importance bound and EUBO of simulated data, whose exact posterior draws are known.

    .. math:: \mathbb E_q[\log w] \le \log p(x) \le \mathbb E_{p(z \mid x)}[\log w]

    and the two lie KL(q || p) below and KL(p || q) above. One exact draw gives the upper one
    without bias, and is never where the posterior is not.

    Args:
        latent_model: The pair at the simulated data.
        exact: The latents behind them.
        num_particles: Draws of the guide.

    Raises:
        ProgramError: If the guide's density cannot be evaluated at a given latent.
    """
    latent_model.check_guide_density("use method='bidirectional', which can start at the prior")
    draws = latent_model.draw(num_particles, "guide")
    lower, upper = (
        (joint - start).double()
        for joint, start in (latent_model.log_densities(u, "guide") for u in (draws, exact))
    )
    found = _reduce(lower)
    kept = {"log_evidence": "simulated_lower", "elbo": "simulated_elbo"}
    columns = {
        f"{new}{part}": found[f"{old}{part}"]
        for old, new in kept.items()
        for part in ("", "_se", "_bias")
        if f"{old}{part}" in found
    }
    return columns | {"simulated_upper": upper[0]}


def _reduce(log_weights: Float[Tensor, "particles batch"]) -> dict[str, Tensor]:
    """Every number of the result from the weights of a chunk of data."""
    bound, mean = importance_bound(log_weights), elbo(log_weights)
    tail = pareto_tail(log_weights)
    error = importance_bound_error(log_weights, tail)
    relative = (log_weights - bound).exp() - 1  # the influence of each draw on the importance bound
    return {
        "log_evidence": bound,
        "log_evidence_se": error.se,
        "log_evidence_bias": error.bias,
        "elbo": mean,
        "elbo_se": mean_error(log_weights),
        "gap": bound - mean,
        "gap_se": torch.hypot(mean_error(relative - log_weights), error.unseen),
        "gap_bias": error.bias,
        "error_reliable": error.reliable,
        "ess": effective_sample_size(log_weights),
        "khat": tail.khat,
        "khat_se": tail.khat_se,
    }


def importance_notes(found: Columns, settings: Importance) -> list[str]:
    """What must not be parted from the numbers."""
    threshold = khat_threshold(settings.num_particles)
    bad = int((~found["error_reliable"]).sum())
    notes = [
        "k-hat, ESS and every importance estimate are blind to a mode that the guide never visits."
    ]
    if bad:
        notes.insert(
            0,
            f"the upper 90 % limit of k-hat is above {threshold:.2f} (or unknown), or the error "
            f"above 0.5 nats, for {data_text(bad, len(found['khat']))}: there the log evidence is "
            "a lower bound whose error is unreliable, not an estimate. More particles or a better "
            "guide help.",
        )
    return notes
