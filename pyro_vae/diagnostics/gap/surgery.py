"""Where the ELBO goes on average: reconstruction, information, the aggregate posterior."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae.checks import check_count
from pyro_vae.data import Seed, as_seed
from pyro_vae.diagnostics.gap.elbo_gap import data_hash
from pyro_vae.inference.log_weights import (
    mean_error,
)
from pyro_vae.inference.programs import (
    Arguments,
    JointOnlyError,
    Program,
    ProgramError,
    ProgramStructure,
    SubsampleError,
    as_arguments,
    draw_traces,
    fixed_draws,
    in_particle_plate,
    inspect_programs,
    is_delta,
    program_scope,
    sum_traces,
    tool,
    weighted_sites,
)
from pyro_vae.results import Result, label, make_result

__all__ = ["elbo_surgery"]


_ACTIVE = 1e-2


@tool
def elbo_surgery(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_particles: int = 50,
    seed: Seed = 0,
) -> Result:
    r"""Cuts the ELBO into distortion and rate, and the rate into information and marginal KL.

    .. math:: \mathcal L = -\underbrace{\mathbb E[-\log p(x \mid z)]}_{\text{distortion}}
              - \underbrace{I_q(n; z)}_{\text{mutual information}}
              - \underbrace{\mathrm{KL}(q(z) \| p(z))}_{\text{marginal KL}}

    with :math:`q(z) = \frac1N \sum_n q(z \mid x_n)` over the given data, all of them: no
    mini-batch stands in for it. The mutual information is that of the index n of a datum and z, at
    most log N, estimated without bias by draws; over random data sets it is, in expectation, a
    lower bound of the information in the population. `mutual_information_upper` leaves the datum's
    own posterior out of the mixture, which bounds it from above (infinite is honest).

    Args:
        model: The generative program.
        guide: The program of the approximate posterior; its density is evaluated at the draws of
            all other data, N runs of the guide, so of order N^2 evaluations.
        x: The data, at least two.
        num_particles: Draws for each datum, at least 2.
        seed: Seeds the draws; the caller's random state is left alone.

    Returns:
        ==========================  =====  ==============  =========================================
        name                        dims   unit, bound     meaning
        ==========================  =====  ==============  =========================================
        `elbo`                      datum  nats, lower     evidence lower bound of the guide
        `distortion`                datum  nats, unbiased  E_q[-log p(x | z)]
        `rate`                      datum  nats, unbiased  KL(q(z | x) || p(z))
        `mutual_information`        datum  nats, unbiased  contribution of each datum to the mean,
                                                           I_q(n; z)
        `mutual_information_upper`  datum  nats, upper     the same to the leave-one-out bound of
                                                           I_q(x; z) in the population
        `marginal_kl`               datum  nats, unbiased  the same to KL(q(z) || p(z))
        `activity`                  unit   none, unbiased  variance over data of the posterior mean,
                                                           corrected for the draws
        `active_units`              none   none            how many activities exceed 0.01
        ==========================  =====  ==============  =========================================

        Those in nats have standard errors `*_se`. `unit` runs over the numbers in the latent sites.

    Raises:
        ProgramError: If the pair has no log weights, or the guide's density is not known at
            another datum's draws (a flow without an inverse, a `Delta` on auxiliary draws), or
            the model's latents are enumerated.
        ValueError: If there are too few data or particles.

    References:
        Hoffman & Johnson (2016), ELBO surgery; Alemi et al. (2018), Fixing a broken
        ELBO; Burda, Grosse & Salakhutdinov (2016) (activity); Poole et al. (2019),
        On variational bounds of mutual information.
    """
    seed = as_seed(seed)
    check_count("num_particles", num_particles, 2)
    arguments = as_arguments(x)
    with torch.no_grad(), program_scope(seed):
        try:
            structure = inspect_programs(model, guide, arguments, num_particles=num_particles)
        except JointOnlyError as error:
            raise ProgramError(f"{error.reason}; each datum needs latents of its own") from error
        _check_surgery(guide, arguments, structure)
        traces = draw_traces(model, guide, arguments, structure, num_particles)
        own = sum_traces([(g, k) for g, _, k in traces], structure)
        parts = {
            kind: sum_traces([(m, k) for _, m, k in traces], structure, keep)
            for kind, keep in (
                ("likelihood", lambda _, site: site["is_observed"]),
                ("prior", lambda _, site: not site["is_observed"]),
            )
        }
        others = _mixture(guide, arguments, structure, traces, own)
        activity, units = _activity(traces, structure)
    return _surgery_result(
        own.double(), parts, others, activity, units, structure, x, num_particles, seed
    )


def _check_surgery(guide: Program, arguments: Arguments, structure: ProgramStructure) -> None:
    if structure.batch_size < 2:
        raise ValueError("the surgery needs at least 2 data, for q(z) is a mixture over them")
    if structure.enumerated:
        raise ProgramError(
            f"the model's latent '{structure.enumerated[0]}' is summed out, so it has no draws to "
            "cut the rate by; sample it in the guide"
        )
    if structure.scale != 1.0:
        raise SubsampleError("the programs subsample their data, of which every one is compared")
    args, kwargs = arguments
    trace = poutine.trace(guide).get_trace(*args, **kwargs)
    deltas = [name for name, site in weighted_sites(trace).items() if is_delta(site["fn"])]
    if deltas or not structure.replayable:
        site = f"'{deltas[0]}'" if deltas else "of a flow without an inverse"
        raise ProgramError(
            f"the guide's density at site {site} is known at its own draws alone, but the "
            "aggregated posterior needs it at those of every datum; use a guide without auxiliary "
            "sites and with invertible transforms"
        )


def _mixture(
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
    traces: list[tuple[Trace, Trace, int]],
    own: Float[Tensor, "particles batch"],
) -> Float[Tensor, "particles batch"]:
    """Log of the sum of q(z_kn | x_m) over the data m other than n."""
    total = torch.full_like(own, -math.inf, dtype=torch.float64)
    for shift in range(1, structure.batch_size):
        scored = []
        for drawn, model_trace, count in traces:
            given = _rolled(fixed_draws(drawn, model_trace), structure, shift)
            trace = _replayed(guide, arguments, structure, given, count)
            scored.append((trace, count))
        log_q = sum_traces(scored, structure).double()
        # Row m scored the draws of datum m - shift.
        total = torch.logaddexp(total, log_q.roll(-shift, 1))
    return total


def _replayed(
    guide: Program, arguments: Arguments, structure: ProgramStructure, given: Trace, count: int
) -> Trace:
    args, kwargs = arguments

    program = in_particle_plate(guide, count, -1 - structure.max_plate_nesting)
    return poutine.trace(poutine.replay(program, trace=given)).get_trace(*args, **kwargs)


def _rolled(given: Trace, structure: ProgramStructure, shift: int) -> Trace:
    """The same draws, each handed on to the datum `shift` places further."""
    assert structure.batch_dim is not None
    for name, site in weighted_sites(given).items():
        dim = structure.batch_dim - site["fn"].event_dim
        given.nodes[name] = {**site, "value": site["value"].roll(shift, dim)}
    return given


def _activity(
    traces: list[tuple[Trace, Trace, int]], structure: ProgramStructure
) -> tuple[Float[Tensor, " unit"], list[str]]:
    """The variance over data of the posterior mean of each number in the latent sites."""
    assert structure.batch_dim is not None
    found, names = [], []
    nesting = structure.max_plate_nesting
    for name in structure.latents:
        draws = []
        for guide_trace, _, count in traces:
            site = guide_trace.nodes[name]
            value, event = site["value"].double(), site["fn"].event_dim
            value = value[(None,) * (nesting + 1 + event - value.dim())]
            value = value.movedim((-1 - nesting - event, structure.batch_dim - event), (0, 1))
            value = value.expand(count, *value.shape[1:])
            draws.append(value.reshape(*value.shape[:2], -1))
        rows = torch.cat(draws)
        noise = rows.var(0).mean(0) / len(rows)
        found.append(rows.mean(0).var(0) - noise)
        size = rows.shape[2]
        names += [name] if size == 1 else [f"{name}[{i}]" for i in range(size)]
    return torch.cat(found), names


def _surgery_result(
    own: Float[Tensor, "particles batch"],
    parts: Mapping[str, Tensor],
    others: Float[Tensor, "particles batch"],
    activity: Float[Tensor, " unit"],
    units: list[str],
    structure: ProgramStructure,
    x: Any,
    num_particles: int,
    seed: int,
) -> Result:
    num_data = structure.batch_size
    prior = parts["prior"].to(own).expand_as(own)
    likelihood = parts["likelihood"].to(own).expand_as(own)
    mixture = torch.logaddexp(own, others) - math.log(num_data)
    without = others - math.log(num_data - 1)
    draws = {
        "elbo": ("lower", likelihood + prior - own, "evidence lower bound of the guide"),
        "distortion": ("unbiased", -likelihood, "E_q[-log p(x | z)]"),
        "rate": ("unbiased", own - prior, "KL(q(z | x) || p(z))"),
        "mutual_information": (
            "unbiased",
            own - mixture,
            "contribution to I_q(n; z) over the given data, at most log N; exact mixture",
        ),
        "mutual_information_upper": (
            "upper",
            own - without,
            "leave-one-out bound of I_q(x; z) in the population",
        ),
        "marginal_kl": (
            "unbiased",
            mixture - prior,
            "contribution to KL(aggregated posterior || prior) over the given data",
        ),
    }
    variables: dict[str, Any] = {}
    for name, (bound, values, description) in draws.items():
        attrs = label(
            bound=bound,
            measure=structure.measure if name in ("elbo", "distortion") else None,
            num_particles=num_particles,
            description=description,
        )
        variables[name] = ("datum", values.mean(0), attrs)
        variables[f"{name}_se"] = ("datum", mean_error(values), attrs)
    about = label(
        unit="none",
        reduction="none",
        bound="unbiased",
        num_particles=num_particles,
        description="variance over data of the posterior mean",
    )
    variables["activity"] = ("unit", activity, about)
    variables["active_units"] = ((), int((activity > _ACTIVE).sum()), {})
    return make_result(
        variables,
        function="elbo_surgery",
        config={"num_particles": num_particles, "active_above": _ACTIVE},
        seed=seed,
        data_sha256=data_hash(x),
        coords={"unit": units},
        notes=[
            f"I_q(n; z) is at most log N = {math.log(num_data):.2f} nats: near it, it says how "
            "many data there are and not how much z tells; more data lift it.",
        ],
    )
