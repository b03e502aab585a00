"""What further runs of a pair show: noise, data that depend on one another, mixed particles.

`check_at_once` looks at all of it in two runs of the model. Where it finds a fault, or cannot tell,
the checks one by one say which.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae.inference.programs.arguments import (
    Arguments,
    JointOnlyError,
    Program,
    ProgramError,
    ProgramStructure,
    messenger_of,
)
from pyro_vae.inference.programs.refusals import is_delta
from pyro_vae.inference.programs.scope import keep_random_state
from pyro_vae.inference.programs.sites import agree, find_batch
from pyro_vae.inference.programs.traces import (
    fixed_draws,
    in_particle_plate,
    map_draw,
    site_log_prob,
    subsamples,
    sum_dims,
    sum_sites,
    trace_programs,
    weighted_sites,
)

__all__ = [
    "check_at_once",
    "check_deterministic",
    "check_independent",
    "is_vectorizable",
    "takes_part",
]

Traces = tuple[Trace, Trace]


def check_at_once(
    model: Program,
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
    traces: Traces,
) -> bool:
    """Whether two runs of the model show that none of the checks one by one has a fault to find.

    One run holds particles that share the first run's latents row by row: whatever the rows of
    other latents, and the other particles, their densities must be those of the first run. The
    other run has the first run's latents and other data in other rows.

    Returns:
        True if the pair is deterministic, its data independent and its particles vectorisable;
        False if one of these does not hold or could not be seen so.
    """
    if messenger_of(guide) is not None or not structure.latents:
        return False
    try:
        other = _other_draw(guide, arguments, structure, traces)
        if other is None:
            return False
        if structure.batch_dim is None or structure.batch_size == 1:
            return _particles_agree(model, arguments, structure, traces, other)
        number = torch.arange(structure.batch_size)
        even, first_half = number % 2 == 0, number < (structure.batch_size + 1) // 2
        # Others stand first and last: programs for one particle read one end or the other, and
        # a mask may leave no other rows to see it by.
        none = number < 0
        owners = (none, even, ~even, first_half, ~first_half, none)
        if not _mixtures_agree(model, arguments, structure, traces, other, owners):
            return False
        own = _mixed_rows(structure.batch_size)
        changed = _with_other_data(arguments, structure, traces[1], own)
    except Exception:  # the checks one by one have the sentence
        return False
    if changed is None:
        return True
    try:
        mixed = _run_model(model, changed, fixed_draws(*traces))
    except Exception:  # whatever a program does with data of rows that it knows to be others
        return True
    return _rows_agree(mixed, traces[1], structure, own)


def _other_draw(
    guide: Program, arguments: Arguments, structure: ProgramStructure, traces: Traces
) -> Trace | None:
    """A second draw in the shapes of the first, out of two particles that were drawn at once.

    None if one of these does not weigh alone what it weighs beside the other.
    """
    args, kwargs = arguments
    vectorized = replace(structure, vectorizable=True)
    same = poutine.replay(guide, trace=subsamples(*traces))
    drawing = in_particle_plate(same, 2, -1 - structure.max_plate_nesting)
    together = poutine.trace(drawing).get_trace(*args, **kwargs)
    log_q = sum_sites(together, vectorized, 2)
    for index in (0, 1):
        given = _particle(index, (together, traces[1]), traces, structure)
        if given is None:
            return None
        alone = poutine.trace(poutine.replay(guide, trace=_without_deltas(given)))
        found = sum_sites(alone.get_trace(*args, **kwargs), structure, 1)
        if not agree(log_q[index : index + 1] if log_q.dim() else log_q, found):
            return None
    return given


def _particles_agree(
    model: Program, arguments: Arguments, structure: ProgramStructure, traces: Traces, other: Trace
) -> bool:
    """Whether two draws weigh together what each weighs alone."""
    first = fixed_draws(*traces)
    together = _run_together(model, arguments, structure, [first, other])
    log_p = sum_sites(together, replace(structure, vectorizable=True), 2)
    alone = [sum_sites(traces[1], structure, 1)]
    alone.append(sum_sites(_run_model(model, arguments, other), structure, 1))
    return agree(log_p, torch.cat(alone))


def _mixtures_agree(
    model: Program,
    arguments: Arguments,
    structure: ProgramStructure,
    traces: Traces,
    other: Trace,
    rows: tuple[Tensor, ...],
) -> bool:
    """Whether rows with the first run's latents weigh what they weighed there."""
    given = [_latents_of_both(fixed_draws(*traces), other, structure, own) for own in rows]
    mixed = _run_together(model, arguments, structure, given)
    sites = weighted_sites(mixed)
    for name, site in weighted_sites(traces[1]).items():
        if name not in sites:
            return False
        before = sum_dims(site_log_prob(site), structure, 1)
        again = sum_dims(site_log_prob(sites[name]), structure, len(given))
        for index, own in enumerate(rows):
            if not agree(before[..., own], again[..., index : index + 1, own]):
                return False
    return True


def _run_together(
    model: Program, arguments: Arguments, structure: ProgramStructure, given: list[Trace]
) -> Trace:
    """One run with these draws as its particles."""
    together = given[0].copy()
    for name, site in weighted_sites(given[0]).items():
        if site["is_observed"]:
            continue
        nesting = structure.max_plate_nesting + len(site["fn"].event_shape)
        values = [trace.nodes[name]["value"] for trace in given]
        padding = (1,) * (nesting - values[0].dim())
        shape = (len(values), *padding, *values[0].shape)
        stacked = map_draw(partial(_stacked, shape=shape), *values)
        together.nodes[name] = {**site, "value": stacked}
    particles = in_particle_plate(model, len(given), -1 - structure.max_plate_nesting)
    return _run_model(particles, arguments, together)


def _stacked(*values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.stack(values).reshape(shape)


def _chosen(rows: Tensor, value: Tensor, rest: Tensor) -> Tensor:
    return torch.where(rows, value, rest.detach())


def _selected(value: Tensor, *, dim: int, index: int, shape: torch.Size) -> Tensor:
    return value.select(dim, index).reshape(shape)


def _rerun(
    model: Program, guide: Program, arguments: Arguments, structure: ProgramStructure, given: Trace
) -> tuple[Tensor | None, Tensor]:
    """Log q and log p of one particle at given latents; no log q where the guide cannot give it."""
    args, kwargs = arguments
    model_trace = poutine.trace(poutine.replay(model, trace=given)).get_trace(*args, **kwargs)
    log_p = sum_sites(model_trace, structure, 1)
    try:
        again = poutine.replay(guide, trace=_without_deltas(given))
        guide_trace = poutine.trace(again).get_trace(*args, **kwargs)
        return sum_sites(guide_trace, structure, 1), log_p
    except (KeyError, NotImplementedError):  # how Pyro's transforms without an inverse answer
        return None, log_p


def _without_deltas(given: Trace) -> Trace:
    """A `Delta` computes its value again: its density has no room for rounding."""
    drawn = given.copy()
    for name, site in weighted_sites(given).items():
        if is_delta(site["fn"]):
            del drawn.nodes[name]
    return drawn


def check_deterministic(
    model: Program,
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
    traces: Traces,
) -> bool:
    """Runs both programs again at the same latents; returns whether the guide could be."""
    if messenger_of(guide) is not None:
        return False
    log_q, log_p = _rerun(model, guide, arguments, structure, fixed_draws(*traces))
    for role, trace, again in (("model", traces[1], log_p), ("guide", traces[0], log_q)):
        if again is not None and not agree(sum_sites(trace, structure, 1), again):
            raise ProgramError(
                f"the {role} is not deterministic given its latents (a second run at the same "
                "latents gave another log-probability); take noise that is not a pyro.sample site "
                "out of it, or make it one"
            )
    return log_q is not None


def check_independent(
    model: Program,
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
    traces: Traces,
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
            given = _latents_of_both(fixed_draws(*traces), others[0], structure, own)
            mixed = _run_model(model, arguments, given)
            advice = "latents of other data; make each row depend on its own latents"
            _check_rows(mixed, traces[1], structure, own, advice)
            _check_rows(mixed, others[1], structure, ~own, advice)
    own = _mixed_rows(structure.batch_size)
    changed = _with_other_data(arguments, structure, traces[1], own)
    if changed is None:
        return
    try:
        mixed = _run_model(model, changed, fixed_draws(*traces))
    except Exception:  # whatever a program does with data of rows that it knows to be others
        return
    advice = "observed data of others (their mean, perhaps); pass such a number as an argument"
    _check_rows(mixed, traces[1], structure, own, advice)


def _mixed_rows(batch_size: int) -> Tensor:
    """Rows with an odd number of ones in binary (Thue and Morse), among which 0 is not.

    The pattern has no period, so rows that read those a fixed number of places away, or the first
    one, read some that are not of it.
    """
    return torch.tensor([row.bit_count() % 2 == 1 for row in range(batch_size)])


def _run_model(model: Program, arguments: Arguments, given: Trace) -> Trace:
    args, kwargs = arguments
    return poutine.trace(poutine.replay(model, trace=given)).get_trace(*args, **kwargs)


def _latents_of_both(given: Trace, other: Trace, structure: ProgramStructure, own: Tensor) -> Trace:
    """A trace to replay whose rows `own` have the latents given, the rest those of another run."""
    drawn = weighted_sites(other)
    for name in structure.latents:
        site = given.nodes[name]
        after = -structure.batch_dim - 1 + len(site["fn"].event_shape)  # type: ignore[operator]
        rows = own.to(site["value"].device).reshape(-1, *[1] * after)
        value, rest = site["value"], drawn[name]["value"]
        mixed = map_draw(partial(_chosen, rows), value, rest)
        given.nodes[name] = {**site, "value": mixed}
    return given


def _with_other_data(
    arguments: Arguments, structure: ProgramStructure, trace: Trace, own: Tensor
) -> Arguments | None:
    """Arguments whose rows but `own` hold the data of row 1; None if none is observed as is.

    An argument's rows are known where a site observes a view of it: by their number and stride.
    """
    assert structure.batch_dim is not None
    number = torch.arange(len(own))
    rows = torch.where(own, number, 1)
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
    for name in weighted_sites(expected):
        if not _rows_agree(mixed, expected, structure, rows, name):
            raise JointOnlyError(
                f"the density of one datum at the model's site '{name}' depends on the {reason}"
            )


def _rows_agree(
    mixed: Trace, expected: Trace, structure: ProgramStructure, rows: Tensor, *names: str
) -> bool:
    """Whether the densities of these rows are the same in both runs, at some sites or at all."""
    sites, before = weighted_sites(mixed), weighted_sites(expected)
    for name in names or before:
        if name not in sites:
            return False
        densities = (sum_dims(site_log_prob(s), structure, 1) for s in (before[name], sites[name]))
        if not agree(*(density[..., rows] for density in densities)):
            return False
    return True


def is_vectorizable(
    model: Program,
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
    traces: Traces,
) -> bool:
    """Whether two particles in one tensor program weigh what each weighs when run alone.

    Both must: a program whose dims mix the particles has their densities summed, and that sum is
    the density of one of them where it is far the greater.
    """
    if messenger_of(guide) is not None:
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
        if not agree(log_p, log_p_alone):
            return False
        if log_q_alone is not None and not agree(log_q, log_q_alone):
            return False
    return True


def _particle(
    index: int,
    together: Traces,
    single: Traces,
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
        one = map_draw(partial(_selected, dim=dim, index=index, shape=shape), value)
        given.nodes[name] = {**site, "value": one}
    return given


def takes_part(
    model: Program,
    guide: Program,
    part: Arguments,
    structure: ProgramStructure,
    traces: Traces,
    rows: Tensor,
) -> bool:
    """Whether the programs weigh some rows of the data, given alone, as they weighed them in all.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        part: The arguments with these rows alone.
        structure: Of the pair with all data.
        traces: Of guide and model with all data.
        rows: Which rows.
    """
    assert structure.batch_dim is not None
    same = structure.replayable and not structure.enumerated
    try:
        if same:
            given = _without_deltas(_rows_of(fixed_draws(*traces), structure, rows))
            guide = poutine.replay(guide, trace=given)
        with keep_random_state(), torch.no_grad():
            alone = trace_programs(model, guide, part)
            shapes = {
                (role, name): site_log_prob(site).shape
                for role, trace in zip(("guide", "model"), alone, strict=True)
                for name, site in weighted_sites(trace).items()
            }
            _, size = find_batch(*alone, shapes)
            if size != len(rows) or not same:
                return size == len(rows)
            part_structure = replace(structure, batch_size=size)
            return all(
                agree(
                    sum_sites(before, structure, 1)[..., rows],
                    sum_sites(again, part_structure, 1).expand(1, size),
                )
                for before, again in zip(traces, alone, strict=True)
            )
    except (RuntimeError, ValueError, IndexError, KeyError):  # plates or parameters of fixed size
        return False


def _rows_of(given: Trace, structure: ProgramStructure, rows: Tensor) -> Trace:
    """The draws of some rows, to replay where these rows are all the data."""
    assert structure.batch_dim is not None
    for plate in subsamples(given).nodes:  # of as many data as there were
        del given.nodes[plate]
    for name, site in weighted_sites(given).items():
        value = site["value"]
        dim = value.dim() - len(site["fn"].event_shape) + structure.batch_dim
        if not site["is_observed"] and dim >= 0 and value.shape[dim] == structure.batch_size:
            taken = map_draw(
                partial(torch.index_select, dim=dim, index=rows.to(value.device)), value
            )
            given.nodes[name] = {**site, "value": taken}
    return given
