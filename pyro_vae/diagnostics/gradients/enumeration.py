r"""Bounds of models with few discrete latents, exactly: every outcome of every particle."""

import itertools
import math
from typing import Any

import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from pyro_vae.inference.programs import (
    Arguments,
    Program,
    ProgramError,
    ProgramStructure,
    as_arguments,
    enumerating,
    fixed_draws,
    inspect_programs,
    keep_random_state,
    program_scope,
    sum_sites,
    tool,
    trace_programs,
    weighted_sites,
)

__all__ = ["enumerated_bound"]

_MAX_STATES = 4096
_MAX_OUTCOMES = 500_000


@tool
def enumerated_bound(
    model: Program, guide: Program, x: Any, bound: str = "ELBO", num_particles: int = 1
) -> Float[Tensor, " batch"]:
    r"""The expectation of a bound over all draws of a discrete guide, differentiable.

    .. math:: \sum_{z_1 \dots z_K} \prod_k q(z_k \mid x) \; \log \frac1K \sum_k
              \frac{p(x, z_k)}{q(z_k \mid x)}

    for the importance bound, where particles are exchangeable and only their counts are summed
    over; the mean of the log weights for the ELBO. Parameters are those of the store at hand.

    Args:
        model: The generative program.
        guide: A guide whose latents are all discrete and finite, with few states a datum.
        x: The data; a tuple for several arguments, a dict for keywords.
        bound: "ELBO" or "IWAE".
        num_particles: Particles of the importance bound, K.

    Returns:
        The bound of each datum in nats, exact, without the factor N/B.

    Raises:
        ProgramError: If a latent cannot be enumerated.
        ValueError: If there are too many outcomes, or the bound is another one.
    """
    if bound not in ("ELBO", "IWAE"):
        raise ValueError(f"the bounds that can be enumerated are 'ELBO' and 'IWAE', not {bound!r}")
    with program_scope():
        log_p, log_q = _joint_table(model, guide, as_arguments(x))
    # Where q is 0 the log weight is infinite and its share 0; a large finite number has a gradient.
    weights = (log_p - log_q).nan_to_num(posinf=0.0)
    total = log_q.detach().exp().sum(0)
    if not torch.allclose(total, torch.ones_like(total), atol=1e-4):
        raise ProgramError("the guide's enumerated probabilities do not add up to 1")
    if bound == "ELBO" or num_particles == 1:
        return (log_q.exp() * weights).sum(0)
    return _expected_importance_bound(log_q, weights, num_particles)


def _joint_table(
    model: Program, guide: Program, arguments: Arguments
) -> tuple[Float[Tensor, "states batch"], Float[Tensor, "states batch"]]:
    """Log p(x, z) and log q(z | x) for every value of the latents."""
    structure = inspect_programs(model, guide, arguments, num_particles=1)
    model = enumerating(model, structure)
    with keep_random_state(), torch.no_grad():
        traces = trace_programs(model, guide, arguments)
    args, kwargs = arguments
    log_p: list[Tensor] = []
    log_q: list[Tensor] = []
    for state in _states(weighted_sites(traces[0]), structure):
        given = fixed_draws(*traces)
        for name, value in state.items():
            given.nodes[name] = {**given.nodes[name], "value": value}
        for program, found in ((model, log_p), (guide, log_q)):
            trace = poutine.trace(poutine.replay(program, trace=given)).get_trace(*args, **kwargs)
            found.append(sum_sites(trace, structure, 1)[0])
    return torch.stack(log_p), torch.stack(log_q)


def _expected_importance_bound(
    log_q: Float[Tensor, "states batch"],
    log_weights: Float[Tensor, "states batch"],
    num_particles: int,
) -> Float[Tensor, " batch"]:
    """Sums over how many particles are in which state."""
    states = len(log_q)
    outcomes = math.comb(states + num_particles - 1, num_particles)
    if outcomes > _MAX_OUTCOMES:
        raise ValueError(
            f"{num_particles} particles in {states} states have {outcomes:,} outcomes, more than "
            f"{_MAX_OUTCOMES:,}; use fewer particles, or the pooled reference"
        )
    chosen = torch.tensor(
        list(itertools.combinations_with_replacement(range(states), num_particles))
    )
    counts = torch.zeros(outcomes, states, dtype=log_q.dtype)
    counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=log_q.dtype))
    orders = math.lgamma(num_particles + 1) - torch.lgamma(counts + 1).sum(1)
    probability = (orders.to(log_q)[:, None] + log_q[chosen].sum(1)).exp()
    bounds = log_weights[chosen].logsumexp(1) - math.log(num_particles)
    return (probability * bounds).sum(0)


def _states(sites: dict[str, Any], structure: ProgramStructure) -> list[dict[str, Tensor]]:
    """Every joint value of the latents of a datum, the same for all data."""
    per_site = [
        [(name, value) for value in _values(name, site["fn"], structure.batch_dim)]
        for name, site in sites.items()
        if not site["is_observed"]
    ]
    count = math.prod(len(values) for values in per_site)
    _check_count(count)
    return [dict(state) for state in itertools.product(*per_site)]


def _values(name: str, fn: Any, batch_dim: int | None) -> list[Tensor]:
    base, event_dims = fn, 0
    while isinstance(base, torch.distributions.Independent):
        event_dims += base.reinterpreted_batch_ndims
        base = base.base_dist
    if not getattr(base, "has_enumerate_support", False) or batch_dim is None:
        raise ProgramError(
            f"the guide's site '{name}' is a {type(base).__name__}, which has no finite support to "
            "enumerate; use the pooled reference"
        )
    shape = base.batch_shape
    support = base.enumerate_support(expand=False).reshape(-1, *base.event_shape)
    own = list(shape)
    own[len(shape) - event_dims + batch_dim] = 1
    coordinates = math.prod(own)
    _check_count(len(support) ** coordinates)
    return [
        support[list(index)].reshape(*own, *base.event_shape).expand(*shape, *base.event_shape)
        for index in itertools.product(range(len(support)), repeat=coordinates)
    ]


def _check_count(count: int) -> None:
    if count > _MAX_STATES:
        raise ValueError(
            f"the latents of a datum have {count:,} states, more than {_MAX_STATES:,}; use the "
            "pooled reference"
        )
