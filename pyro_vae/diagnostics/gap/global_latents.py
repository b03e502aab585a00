r"""The ELBO gap of a pair with global latents, cut at the chain rule of the KL divergence.

.. math:: \log p(x) - \mathcal L = \mathrm{KL}\big(q(\theta) \,\|\, p(\theta \mid x)\big)
          + \sum_n \mathbb E_{q(\theta)} \mathrm{KL}\big(q(z_n \mid x_n, \theta) \,\|\,
          p(z_n \mid x_n, \theta)\big)
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.inference.log_weights import (
    effective_sample_size,
    importance_bound,
    importance_bound_error,
    mean_error,
    pareto_tail,
)
from pyro_vae.inference.programs import Pair, particles_at_once, split_count
from pyro_vae.results import Result, label

__all__ = ["NUM_INNER", "global_gap_columns", "global_gap_variables"]

NUM_INNER = 32
"""Draws of each datum's latents beside one draw of the global ones."""

_TEXTS = {
    "log_evidence": "log p(x) of all data",
    "elbo": "evidence lower bound of all data",
    "gap": "log evidence - ELBO: KL(q || p(theta, z | x))",
    "global_gap": "KL(q(theta) || p(theta | x)), the part of the global latents",
    "local_gap": "E_q KL(q(z | x, theta) || p(z | x, theta)), the part of each datum",
    "ess": "effective draws of the global latents",
    "khat": "Pareto k-hat of the weights of the global latents",
}


def global_gap_columns(
    pair: Pair, num_particles: int, known: Result | None, max_memory: float
) -> dict[str, Tensor]:
    """Every number of the decomposition, of draws of the global latents with `NUM_INNER` inside.

    Args:
        pair: Inspected, with global latents.
        num_particles: Draws of the global latents.
        known: Log evidence of all data; None for importance sampling with these draws.
        max_memory: Of the draws made at once, in GiB, roughly.
    """
    split = pair.structure.split
    assert split is not None
    # Where the data draw no latents (they have none, or these are summed out) all draws are one.
    inner = NUM_INNER if split.local_sites & set(pair.structure.latents) else 1
    most = particles_at_once(num_particles, max_memory, pair.bytes_of_particle * inner)
    with torch.no_grad():
        parts = [pair.nested_log_weights(n, inner) for n in split_count(num_particles, most)]
    above = torch.cat([part[0] for part in parts]).double()
    inside = torch.cat([part[1] for part in parts]).double()
    evidence_of_datum, bias = _inner_evidence(inside)
    marginal, elbo = above + evidence_of_datum.sum(1), above + inside.mean(1).sum(1)
    columns: dict[str, Tensor] = {}
    unseen: Tensor | float
    if known is None:
        tail = pareto_tail(marginal[:, None])
        error = importance_bound_error(marginal[:, None], tail)
        evidence, unseen = importance_bound(marginal[:, None])[0], error.unseen[0]
        columns |= {"log_evidence_se": error.se[0], "log_evidence_bias": error.bias[0]}
        columns |= {"error_reliable": error.reliable[0], "khat": tail.khat[0]}
        columns["ess"] = effective_sample_size(marginal[:, None])[0]
        influence = (marginal - evidence).exp() - 1
    else:
        evidence = torch.as_tensor(known["log_evidence"].values).double()
        stated = "log_evidence_se" in known
        unseen = float(known["log_evidence_se"]) if stated else 0.0
        columns["log_evidence_se"] = torch.as_tensor(unseen)
        influence = torch.zeros_like(marginal)
    each, corrected = evidence_of_datum - bias - inside.mean(1), bias.mean(0)
    above_all, unsure = marginal - bias.sum(1), torch.as_tensor(unseen).hypot(corrected.sum())
    for name, value, draws, other in (
        ("elbo", elbo.mean(), elbo, 0.0),
        ("gap", evidence - elbo.mean(), influence - elbo, unseen),
        ("global_gap", evidence - above_all.mean(), influence - above_all, unsure),
    ):
        columns[name], columns[f"{name}_se"] = (
            value,
            mean_error(draws).hypot(torch.as_tensor(other)),
        )
    columns |= {"log_evidence": evidence, "local_gap": each.mean(0)}
    columns["local_gap_se"] = mean_error(each).hypot(corrected)  # as unsure as its correction
    return columns


def _inner_evidence(
    inside: Float[Tensor, "particles inner batch"],
) -> tuple[Float[Tensor, "particles batch"], Float[Tensor, "particles batch"]]:
    """The importance bound of log p(x | theta) of each datum, and its bias to first order, -v / 2K.

    v is the relative variance of a datum's weights (Nowozin 2018, Debiasing evidence
    approximations).
    """
    count = inside.shape[1]
    if count == 1:  # log p(x | theta) itself
        return inside[:, 0], torch.zeros_like(inside[:, 0])
    found = importance_bound(inside.movedim(1, 0).flatten(1)).unflatten(0, inside.shape[::2])
    relative = (inside - found[:, None]).exp()
    return found, -relative.var(1) / (2 * count)


def global_gap_variables(
    columns: dict[str, Tensor], num_particles: int, measure: str, known: Result | None
) -> dict[str, Any]:
    """The columns with their labels: totals over the data, but for `local_gap`."""
    kind = "lower" if known is None else str(known["log_evidence"].attrs["bound"])
    bounds = {"log_evidence": kind, "elbo": "lower"}
    bounds["gap"] = "lower" if kind == "lower" else "none"
    variables: dict[str, Any] = {}
    for name, values in columns.items():
        own = name.removesuffix("_se").removesuffix("_bias")
        dims = "datum" if own == "local_gap" else ()
        if values.dtype == torch.bool:
            variables[name] = (dims, values, {})
            continue
        nats = own not in ("ess", "khat")
        attrs = label(
            unit="nats" if nats else "particles" if own == "ess" else "none",
            reduction=("per datum" if dims else "total") if nats else "none",
            bound=bounds.get(own, "none"),
            measure=measure if nats else None,
            num_particles=num_particles,
            description=_TEXTS[own],
        )
        variables[name] = (dims, values, attrs)
    return variables
