r"""What can be had from a pair of programs, and the sentences that refuse the rest.

`inspect_programs` runs a model and its guide a few times, reads off where the batch lies, and
refuses, naming the site, what no tool built on log weights can do. `check_parameters` refuses what
SVI would silently train in part.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.inference.programs.arguments import (
    Arguments,
    JointOnlyError,
    Program,
    ProgramError,
    ProgramStructure,
)
from pyro_vae.inference.programs.refusals import (
    check_enumerable,
    check_enumerated,
    check_module_names,
    check_observed,
    check_point_mass,
    check_unchanged,
    common_scale,
    find_batch,
    is_delta,
    max_plate_nesting,
    trace_same_latents,
    versions,
)
from pyro_vae.inference.programs.scope import (
    ieee_precision,
    keep_random_state,
)
from pyro_vae.inference.programs.traces import (
    enumerating,
    fixed_draws,
    site_log_prob,
    subsamples,
    sum_dims,
    sum_sites,
    trace_programs,
    weighted_sites,
)
from pyro_vae.inference.programs.unfitted import warn_of_unfitted

__all__ = ["inspect_programs"]


def inspect_programs(
    model: Program,
    guide: Program,
    arguments: Arguments,
    *,
    joint: bool = False,
    num_particles: int = 2,
) -> ProgramStructure:
    """Runs model and guide a few times and says how log weights can be had from them.

    Random numbers that this takes are given back: afterwards the random state is what it was.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        arguments: From `as_arguments`.
        joint: One weight per particle on all data, for models with global latents. Plates then
            play no part (a sequential `for i in pyro.plate` has no dim for weights per datum, but
            its sites are sites like any other).
        num_particles: With 1, the check that particles can be vectorised is left out.

    Returns:
        The structure of the pair.

    Raises:
        ProgramError: If a latent lies outside the batch plate, a model latent is missing from the
            guide (or the guide has one that the model lacks), the guide is a point mass or observes
            something, scales differ between sites, a batch dim is undeclared, an observed value is
            off its support, one datum depends on another's latents, two PyroModules share names, or
            the programs are not deterministic given their latents.
    """
    provisional = ProgramStructure(None, 1, 0, 1.0, "mixed", False, True, (), ())
    check_module_names(model, guide)
    warn_of_unfitted(model, guide)
    with torch.no_grad(), keep_random_state(), ieee_precision(), _refuse_modules_in_training():
        # A stream of its own: parameters that are first drawn here owe nothing to later draws.
        pyro.set_rng_seed(int(torch.randint(2**31, ())))
        before = versions(arguments)
        guide_trace, model_trace = trace_same_latents(model, guide, arguments, {"parallel"})
        check_unchanged(arguments, before)
        guide_sites, model_sites = weighted_sites(guide_trace), weighted_sites(model_trace)
        measure = check_observed(model_sites)
        shapes = {
            (role, name): _log_prob_of(name, site).shape
            for role, sites in (("guide", guide_sites), ("model", model_sites))
            for name, site in sites.items()
        }
        check_point_mass(guide, arguments, guide_trace)
        structure = replace(
            provisional,
            max_plate_nesting=max_plate_nesting(guide_sites, model_sites, shapes.values()),
            scale=common_scale(guide_sites, model_sites, joint),
            measure=measure,
            latents=tuple(
                n for n, s in guide_sites.items() if n in model_sites and not s["is_observed"]
            ),
            observed=tuple(n for n, s in model_sites.items() if s["is_observed"]),
            enumerated=tuple(
                n for n, s in model_sites.items() if n not in guide_sites and not s["is_observed"]
            ),
        )
        if not joint:
            dim, size = find_batch(guide_trace, model_trace, shapes)
            structure = replace(structure, batch_dim=dim, batch_size=size)
        if structure.enumerated:
            check_enumerable(model_sites, structure)
            model = enumerating(model, structure)
            guide_trace, model_trace = trace_programs(model, guide, arguments)
            check_enumerated(weighted_sites(model_trace), structure)
        structure = replace(
            structure,
            replayable=_check_deterministic(
                model, guide, arguments, structure, (guide_trace, model_trace)
            ),
        )
        if structure.batch_size > 1:
            _check_independent(model, guide, arguments, structure, (guide_trace, model_trace))
        vectorizable = num_particles > 1 and _is_vectorizable(
            model, guide, arguments, structure, (guide_trace, model_trace)
        )
    return replace(structure, vectorizable=vectorizable)


def _log_prob_of(name: str, site: dict[str, Any]) -> Tensor:
    """A site's log-probability; refuses data that do not fit their distribution's shape."""
    try:
        return site_log_prob(site)
    except ValueError as error:
        fn = site["fn"]
        if not site["is_observed"] or not isinstance(site["value"], Tensor):
            raise
        raise ProgramError(
            f"the data at site '{name}' have shape {tuple(site['value'].shape)}, which does not "
            f"fit their distribution's batch shape {tuple(fn.batch_shape)} and event shape "
            f"{tuple(fn.event_shape)}; add .to_event(1) to the distribution, or give it its plates"
        ) from error


@contextmanager
def _refuse_modules_in_training() -> Iterator[None]:
    """Refuses dropout and batch normalisation in training mode before they do anything."""

    def hook(module: nn.Module, _inputs: Any) -> None:
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.track_running_stats:
            raise ProgramError(
                f"{kind} without running statistics couples the data of a batch in every mode, so "
                "log weights per datum do not exist; give it track_running_stats=True, and call "
                ".eval() on the module"
            )
        if not module.training:
            return
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            raise ProgramError(
                f"{kind} in training mode couples the data of a batch, so log weights per datum do "
                "not exist; call .eval() on the module first"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ProgramError(
                f"{kind} in training mode makes the program random given its latents; call .eval() "
                "on the module first"
            )

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _rerun(
    model: Program, guide: Program, arguments: Arguments, structure: ProgramStructure, given: Trace
) -> tuple[Tensor | None, Tensor]:
    """Log q and log p of one particle at given latents; no log q where the guide cannot give it."""
    args, kwargs = arguments
    model_trace = poutine.trace(poutine.replay(model, trace=given)).get_trace(*args, **kwargs)
    log_p = sum_sites(model_trace, structure, 1)
    drawn = given.copy()  # a Delta computes its value again: its density has no room for rounding
    for name, site in weighted_sites(given).items():
        if is_delta(site["fn"]):
            del drawn.nodes[name]
    try:
        guide_trace = poutine.trace(poutine.replay(guide, trace=drawn)).get_trace(*args, **kwargs)
        return sum_sites(guide_trace, structure, 1), log_p
    except (KeyError, NotImplementedError):  # how Pyro's transforms without an inverse answer
        return None, log_p


def _agree(a: Tensor, b: Tensor) -> bool:
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    return a.shape == b.shape and torch.allclose(
        a, b, rtol=tolerance, atol=10 * tolerance, equal_nan=True
    )


def _check_deterministic(
    model: Program,
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
    traces: tuple[Trace, Trace],
) -> bool:
    """Runs both programs again at the same latents; returns whether the guide could be."""
    if isinstance(poutine.unwrap(guide), poutine.messenger.Messenger):
        return False
    log_q, log_p = _rerun(model, guide, arguments, structure, fixed_draws(*traces))
    for role, trace, again in (("model", traces[1], log_p), ("guide", traces[0], log_q)):
        if again is not None and not _agree(sum_sites(trace, structure, 1), again):
            raise ProgramError(
                f"the {role} is not deterministic given its latents (a second run at the same "
                "latents gave another log-probability); take noise that is not a pyro.sample site "
                "out of it, or make it one"
            )
    return log_q is not None


def _check_independent(
    model: Program,
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
    traces: tuple[Trace, Trace],
) -> None:
    """Refuses a model in which one datum moves the density of another, by latents or as data."""
    if structure.batch_dim is None:
        return
    number = torch.arange(structure.batch_size)
    even = number % 2 == 0
    if structure.latents:
        same = subsamples(*traces)
        others = trace_programs(
            poutine.replay(model, trace=same), poutine.replay(guide, trace=same), arguments
        )
        for own in (even, number < (structure.batch_size + 1) // 2):
            given = _latents_of_both(traces, others, structure, own)
            mixed = _run_model(model, arguments, given)
            advice = "latents of other data; make each row depend on its own latents"
            _check_rows(mixed, traces[1], structure, own, advice)
            _check_rows(mixed, others[1], structure, ~own, advice)
    changed = _with_data_of_first(arguments, structure, traces[1], even)
    if changed is None:
        return
    try:
        mixed = _run_model(model, changed, fixed_draws(*traces))
    except Exception:  # whatever a program does with data of rows that it knows to be others
        return
    advice = "observed data of others (their mean, perhaps); pass such a number as an argument"
    _check_rows(mixed, traces[1], structure, even, advice)


def _run_model(model: Program, arguments: Arguments, given: Trace) -> Trace:
    args, kwargs = arguments
    return poutine.trace(poutine.replay(model, trace=given)).get_trace(*args, **kwargs)


def _latents_of_both(
    traces: tuple[Trace, Trace],
    others: tuple[Trace, Trace],
    structure: ProgramStructure,
    own: Tensor,
) -> Trace:
    """A trace to replay whose rows `own` have the latents of the one run, the rest the other's."""
    given, drawn = fixed_draws(*traces), weighted_sites(others[0])
    for name in structure.latents:
        site = given.nodes[name]
        after = -structure.batch_dim - 1 + len(site["fn"].event_shape)  # type: ignore[operator]
        rows = own.to(site["value"].device).reshape(-1, *[1] * after)
        given.nodes[name] = {
            **site,
            "value": torch.where(rows, site["value"], drawn[name]["value"].detach()),
        }
    return given


def _with_data_of_first(
    arguments: Arguments, structure: ProgramStructure, trace: Trace, own: Tensor
) -> Arguments | None:
    """Arguments whose rows but `own` hold the data of the first; None if none is observed as is.

    An argument's rows are known where a site observes a view of it: by their number and stride.
    """
    assert structure.batch_dim is not None
    number = torch.arange(len(own))
    rows = torch.where(own, number, 0)
    views = []
    for site in weighted_sites(trace).values():
        value = site["value"]
        if site["is_observed"] and isinstance(value, Tensor):
            dim = value.dim() - len(site["fn"].event_shape) + structure.batch_dim
            if dim >= 0 and value.shape[dim] == len(own):
                views.append((value.untyped_storage().data_ptr(), value.stride(dim)))
    found = False

    def change(a: Any) -> Any:
        nonlocal found
        # Where values are missing, a mask of the model may go with their rows.
        if isinstance(a, Tensor) and not bool(a.isnan().any()):
            start = a.untyped_storage().data_ptr()
            for dim in range(a.dim()):
                if a.shape[dim] == len(own) and (start, a.stride(dim)) in views:
                    found = True
                    return a.index_select(dim, rows.to(a.device))
        return a

    args, kwargs = arguments
    changed = tuple(map(change, args)), {name: change(a) for name, a in kwargs.items()}
    return changed if found else None


def _check_rows(
    mixed: Trace, expected: Trace, structure: ProgramStructure, rows: Tensor, reason: str
) -> None:
    """The densities of these rows must be the same in both runs of the model."""
    sites = weighted_sites(mixed)
    for name, site in weighted_sites(expected).items():
        before = sum_dims(site_log_prob(site), structure, 1)[..., rows]
        again = (
            sum_dims(site_log_prob(sites[name]), structure, 1)[..., rows] if name in sites else None
        )
        if again is None or not _agree(before, again):
            raise JointOnlyError(
                f"the density of one datum at the model's site '{name}' depends on the {reason}, "
                "or pass joint=True for one weight per particle on all data, for log weights per "
                "datum do not exist"
            )


def _is_vectorizable(
    model: Program,
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
    traces: tuple[Trace, Trace],
) -> bool:
    """Whether two particles in one tensor program weigh what each weighs when run alone.

    Both must: a program whose dims mix the particles has their densities summed, and that sum is
    the density of one of them where it is far the greater.
    """
    if isinstance(poutine.unwrap(guide), poutine.messenger.Messenger):
        return False  # it runs the model itself, and cannot be run again at given latents
    vectorized = replace(structure, vectorizable=True)
    try:
        together = trace_programs(model, guide, arguments, 2, structure.max_plate_nesting)
        totals = [sum_sites(trace, vectorized, 2) for trace in together]
        alone = [_particle(index, together, traces, structure) for index in (0, 1)]
    except Exception:  # whatever a program that was written for one particle does with two
        return False
    for index, given in enumerate(alone):
        if given is None:
            return False
        # A sum over no site has no particles.
        log_q, log_p = (total[index : index + 1] if total.dim() else total for total in totals)
        log_q_alone, log_p_alone = _rerun(model, guide, arguments, structure, given)
        if not _agree(log_p, log_p_alone):
            return False
        if log_q_alone is not None and not _agree(log_q, log_q_alone):
            return False
    return True


def _particle(
    index: int,
    together: tuple[Trace, Trace],
    single: tuple[Trace, Trace],
    structure: ProgramStructure,
) -> Trace | None:
    """One of two particles in the shapes of a run with one; None if they do not fit."""
    given = fixed_draws(*together)
    reference = fixed_draws(*single)
    for name, site in weighted_sites(given).items():
        if site["is_observed"] or name not in reference:
            continue
        value, shape = site["value"], reference.nodes[name]["value"].shape
        dim = value.dim() - len(site["fn"].event_shape) - structure.max_plate_nesting - 1
        if dim < 0 or value.shape[dim] != 2 or value.select(dim, index).numel() != shape.numel():
            return None
        given.nodes[name] = {**site, "value": value.select(dim, index).reshape(shape)}
    return given
