r"""How the tools run a user's Pyro programs, and leave the caller's world as it was.

`run_programs` gives the log-probabilities of any number of particles, per datum; `program_scope`
keeps the caller's parameters, random state and settings; `FittedProgram` carries fitted ones.
"""

import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vae.inference.programs.arguments import (
    Arguments,
    Program,
    ProgramError,
    ProgramStructure,
    Site,
    Split,
    messenger_of,
)
from pyro_vae.inference.programs.scope import keep_random_state, shown_value
from pyro_vae.inference.state_sums import StateSumError, sum_states
from pyro_vae.inference.supports import family_of, support_of

__all__ = [
    "bytes_of_run",
    "draw_traces",
    "enumerating",
    "fixed_draws",
    "in_particle_plate",
    "map_draw",
    "measured",
    "naming_the_site",
    "particles_at_once",
    "rerun_traces",
    "run_programs",
    "site_log_prob",
    "site_log_probs",
    "site_values",
    "split_count",
    "split_weights",
    "subsamples",
    "sum_dims",
    "sum_sites",
    "sum_traces",
    "trace_programs",
    "weighted_sites",
]


def run_programs(
    model: Program,
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
    num_particles: int,
) -> tuple[Float[Tensor, "particles batch"], Float[Tensor, "particles batch"], dict[str, Tensor]]:
    r"""Runs guide and model and sums the log-probabilities of each particle and datum.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        arguments: From `as_arguments`.
        structure: From `inspect_programs`.
        num_particles: Draws from the guide for each datum.

    Returns:
        log p(x, z) and log q(z | x) in nats, without the factor N/B, each `[particles, batch]`
        (batch 1 if joint), and the parts of log p(x, z) by observed (`likelihood`) and latent
        (`prior`) sites, which do not exist where latents are summed out.
    """
    traces = draw_traces(model, guide, arguments, structure, num_particles)
    if structure.enumerated:
        log_p = sum_traces([(model, k) for _, model, k in traces], structure)
        log_q = sum_traces([(guide, k) for guide, _, k in traces], structure)
        return log_p, log_q.to(log_p).expand_as(log_p), {}
    likelihood = sum_traces([(model, k) for _, model, k in traces], structure, _is_observed)
    prior = sum_traces([(model, k) for _, model, k in traces], structure, _is_latent)
    posterior = sum_traces([(guide, k) for guide, _, k in traces], structure)
    # A sum over no site is one zero; every result has the weights' shape and dtype all the same.
    weights = likelihood + prior - posterior
    likelihood, prior, posterior = (
        part.to(weights).expand_as(weights) for part in (likelihood, prior, posterior)
    )
    return likelihood + prior, posterior, {"likelihood": likelihood, "prior": prior}


def draw_traces(
    model: Program,
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
    num_particles: int,
) -> list[tuple[Trace, Trace, int]]:
    """Traces of guide and model with the number of particles in each.

    One pair holds all particles, or, where programs cannot run them together, each pair holds one;
    all then see the same subsample of the data.
    """
    model = enumerating(model, structure)
    count = num_particles if structure.vectorizable else 1
    drawn: list[tuple[Trace, Trace, int]] = []
    while len(drawn) * count < num_particles:
        traces = trace_programs(model, guide, arguments, count, structure.max_plate_nesting)
        for site in weighted_sites(traces[0]).values():
            site_log_prob(site)  # at once: a flow without an inverse knows its last draw alone
        if not drawn and count < num_particles:
            same = subsamples(*traces)
            model, guide = poutine.replay(model, trace=same), poutine.replay(guide, trace=same)
        drawn.append((*traces, count))
    return drawn


def enumerating(model: Program, structure: ProgramStructure) -> Program:
    """The model with its enumerated latents laid out along dims to the left of the particles."""
    if not structure.enumerated:
        return model
    return poutine.enum(model, first_available_dim=-2 - structure.max_plate_nesting)


def _is_observed(_name: str, site: Site) -> bool:
    return site["is_observed"]


def _is_latent(_name: str, site: Site) -> bool:
    return not site["is_observed"]


def trace_programs(
    model: Program,
    guide: Program,
    arguments: Arguments,
    num_particles: int = 1,
    max_plate_nesting: int = 0,
) -> tuple[Trace, Trace]:
    """Traces the guide, and the model at the guide's latents; particles are the outermost plate."""
    args, kwargs = arguments
    dim = -1 - max_plate_nesting
    model = in_particle_plate(model, num_particles, dim)
    guide = in_particle_plate(guide, num_particles, dim)
    inner = messenger_of(guide)
    if inner is not None:  # Pyro's guide messengers run the model themselves
        guide(*args, **kwargs)
        model_trace, guide_trace = inner.get_traces()
        return guide_trace, model_trace
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    # Replay stands outside the particle plate: a replayed site skips the plates inside replay.
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return guide_trace, model_trace


def rerun_traces(
    model: Program,
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
    traces: list[tuple[Trace, Trace, int]],
) -> list[tuple[Trace, Trace, int]]:
    """Runs both programs again at the draws of `traces`, through which no gradient passes."""
    args, kwargs = arguments
    model = enumerating(model, structure)
    again = []
    for guide_trace, model_trace, count in traces:
        given = fixed_draws(guide_trace, model_trace)
        dim = -1 - structure.max_plate_nesting
        programs = [in_particle_plate(program, count, dim) for program in (guide, model)]
        rerun = [
            poutine.trace(poutine.replay(program, trace=given)).get_trace(*args, **kwargs)
            for program in programs
        ]
        again.append((rerun[0], rerun[1], count))
    return again


def fixed_draws(guide_trace: Trace, model_trace: Trace) -> Trace:
    """A trace to replay: every latent, detached, and the subsamples of both programs."""
    given = guide_trace.copy()
    for name, site in subsamples(model_trace).nodes.items():
        if name not in given:
            given.add_node(name, **{k: v for k, v in site.items() if k != "name"})
    for name, site in weighted_sites(given).items():
        # A clone, so that a transform computes its inverse instead of remembering it.
        given.nodes[name] = {**site, "value": map_draw(_detached, site["value"])}
        given.nodes[name].pop("masked_log_prob", None)
    return given


def map_draw(change: Callable[..., Tensor], *draws: Tensor) -> Tensor:
    """Makes a draw of draws, and with it what straight-through draws were rounded from."""
    changed = change(*draws)
    soft = [getattr(draw, "_unquantize", None) for draw in draws]
    if all(one is not None for one in soft):
        changed._unquantize = change(*soft)  # type: ignore[attr-defined]
    return changed


def _detached(value: Tensor) -> Tensor:
    return value.detach().clone()


@contextmanager
def measured() -> Iterator[Callable[[tuple[Trace, Trace]], int]]:
    """Yields a measure of the memory that the run inside takes, from its traces.

    It is the bytes of what one particle draws and what modules put out.
    """
    outputs = 0

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal outputs
        if isinstance(output, Tensor):
            outputs += output.numel() * output.element_size()

    def size(traces: tuple[Trace, Trace]) -> int:
        values = [site["value"] for trace in traces for site in weighted_sites(trace).values()]
        return outputs + sum(value.numel() * value.element_size() for value in values)

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield size
    finally:
        handle.remove()


def bytes_of_run(model: Program, guide: Program, arguments: Arguments) -> int:
    """Bytes that one particle draws and that modules put out: a measure of a run's memory."""
    with torch.no_grad(), keep_random_state(), measured() as size:
        traces = trace_programs(model, guide, arguments)
    return size(traces)


def particles_at_once(num_particles: int, max_memory: float, bytes_of_particle: float) -> int:
    """How many particles a run may hold in so many GiB, at least one."""
    return int(min(num_particles, max(max_memory * 2**30 / max(bytes_of_particle, 64.0), 1)))


def split_count(total: int, most: int) -> list[int]:
    """Parts that sum to the total, none above `most`."""
    full, rest = divmod(total, most)
    return [most] * full + [rest] * (rest > 0)


def in_particle_plate(program: Program, num_particles: int, dim: int) -> Program:
    """The program inside the plate of particles, which stands to the left of its own.

    One particle has no dim of its own: the program is then what it was.
    """
    if num_particles == 1:
        return program

    def run(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate("_particles", num_particles, dim=dim):
            return program(*args, **kwargs)

    return run


def weighted_sites(trace: Trace) -> dict[str, dict[str, Any]]:
    """The sites that carry density: no subsampling, no `pyro.deterministic`, no reparameterised."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
        and not (site["is_observed"] and _is_function_of_others(site["fn"]))
    }


def _is_function_of_others(fn: Any) -> bool:
    """What Pyro's reparameterisers leave of a site: the value that its new site gives it."""
    return (
        isinstance(fn, MaskedDistribution)
        and fn._mask is False
        and isinstance(fn.base_dist, pyro.distributions.Delta)
    )


def site_log_prob(site: Site) -> Tensor:
    """A site's log-probability in nats, with its mask and without its scale; computed once."""
    if "masked_log_prob" not in site:
        value = shown_value(site)
        try:
            log_prob = site["fn"].log_prob(value, *site["args"], **site["kwargs"])
        except ValueError as error:
            _check_drawn_within_support(site, error)
            raise
        site["masked_log_prob"] = scale_and_mask(log_prob, 1.0, site["mask"])
    return site["masked_log_prob"]


def _check_drawn_within_support(site: Site, error: ValueError) -> None:
    """Says of a value that torch refuses that the guide must not draw it."""
    fn = site["fn"]
    try:
        outside = not site["is_observed"] and not bool(support_of(fn).check(site["value"]).all())
    except (AttributeError, NotImplementedError):
        return
    if outside:
        raise ProgramError(
            f"the value of the latent site '{site['name']}' lies outside the support of its "
            f"{family_of(fn)} ({support_of(fn)}); give the guide a distribution on that support"
        ) from error


@contextmanager
def naming_the_site() -> Iterator[None]:
    """Names the site when it is its distribution that cannot do what a program asks of it."""
    try:
        yield
    except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
        if isinstance(error, ProgramError):
            raise
        for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
            here = frame.f_locals
            if frame.f_code is pyro.sample.__code__ and not isinstance(error, ValueError):
                name, fn, lacks = here["name"], here["fn"], "cannot be drawn in its plates"
            elif frame.f_code is inspect.unwrap(site_log_prob).__code__:
                name, fn = here["site"]["name"], here["site"]["fn"]
                lacks = "has no density that can be computed"
            else:
                continue
            said = str(error).splitlines() or [""]
            raise ProgramError(
                f"the site '{name}' ({family_of(fn)}) {lacks} "
                f"({': '.join(filter(None, [type(error).__name__, said[0]]))}); use another "
                "distribution there"
            ) from error
        raise


def site_values(trace: Trace, name: str, structure: ProgramStructure) -> Tensor:
    """A site's value, `[particles, batch, inner plates, event]`; without batch if joint."""
    site = trace.nodes[name]
    return _plates_first(site["value"], site, structure, len(site["fn"].event_shape))


def site_log_probs(
    trace: Trace, name: str, structure: ProgramStructure, num_particles: int
) -> Tensor:
    """A site's log-probabilities, `[particles, batch, inner plates]`; without batch if joint."""
    values = _plates_first(site_log_prob(trace.nodes[name]), trace.nodes[name], structure, 0)
    return values.expand(num_particles, *values.shape[1:])


def _plates_first(value: Tensor, site: Site, structure: ProgramStructure, event: int) -> Tensor:
    """Particles, data and the dims that inner plates declare first; dims that only pad go."""
    nesting = structure.max_plate_nesting
    plates = value.dim() - event
    if plates <= nesting:  # one particle has no dim of its own
        value = value.reshape(1, *(1,) * (nesting - plates), *value.shape)
    declared = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    inner = sorted(d for d in declared if -nesting <= d and d != structure.batch_dim)
    kept = [0] if structure.batch_dim is None else [0, 1 + nesting + structure.batch_dim]
    kept += [1 + nesting + dim for dim in inner]
    kept += range(1 + nesting, value.dim())
    padding = [dim for dim in range(value.dim()) if dim not in kept]
    value = value.permute(*kept, *padding)
    return value.reshape(value.shape[: len(kept)])


def sum_traces(
    traces: list[tuple[Trace, int]],
    structure: ProgramStructure,
    keep: Callable[[str, Site], bool] | None = None,
) -> Tensor:
    """`sum_sites` over all particles, `[particles, batch]`; one zero if there is no such site."""
    parts = [sum_sites(trace, structure, count, keep) for trace, count in traces]
    return parts[0] if parts[0].dim() == 0 else torch.cat(parts)


def split_weights(
    traces: list[tuple[Trace, Trace, int]], structure: ProgramStructure
) -> tuple[Float[Tensor, " particles"], Float[Tensor, "particles batch"]]:
    """Log weights of the global latents, and of each datum given these.

    Raises:
        ProgramError: If no latent is global, or the guide draws all latents as one vector.
    """
    split = structure.split
    if split is None:
        raise ProgramError("no latent is global, so log weights have one part: use log_weights")
    _check_splits(traces[0][0], split)
    guides = [(guide, count) for guide, _, count in traces]
    models = [(model, count) for _, model, count in traces]
    inside = replace(structure, batch_dim=split.dim, batch_size=split.size)

    def is_local(name: str, _site: Site) -> bool:
        return name in split.local_sites

    def is_global(name: str, _site: Site) -> bool:
        return name not in split.local_sites

    local = sum_traces(models, inside, is_local) - sum_traces(guides, inside, is_local)
    above = sum_traces(models, structure, is_global) - sum_traces(guides, structure, is_global)
    return above[:, 0], local


def _check_splits(guide_trace: Trace, split: Split) -> None:
    """Refuses a guide whose latents are parts of one vector: it has no density per datum."""
    sites = weighted_sites(guide_trace)
    for name, site in sites.items():
        if name in split.local_sites and getattr(site["fn"], "draws_together", False):
            raise ProgramError(
                f"the guide is a mixture, one component of which draws global latents and '{name}' "
                "of all data, so log q has no part for each datum; pass joint=True for one weight "
                "per particle, or one of its components"
            )
    auxiliary = [n for n, s in sites.items() if s["infer"].get("is_auxiliary")]
    vectors = [n for n in auxiliary if n not in split.local_sites]
    local = [n for n in sites if n in split.local_sites]
    if vectors and local and not set(auxiliary) & split.local_sites:
        points = [n for n in local if type(sites[n]["fn"]).__name__ == "Delta"]
        if len(points) == len(local):
            raise ProgramError(
                f"the guide draws global latents and those of the data as one vector, its site "
                f"'{vectors[0]}', so log q has no part for each datum; pass joint=True for one "
                "weight per particle, or use a guide with a site for each latent (AutoNormal)"
            )


def sum_sites(
    trace: Trace,
    structure: ProgramStructure,
    num_particles: int,
    keep: Callable[[str, Site], bool] | None = None,
) -> Tensor:
    """Sums the log-probabilities of a trace's sites, or those to keep, per particle and datum.

    Raises:
        ProgramError: If the states of enumerated sites cannot be summed out of these sites.
    """
    sites = {n: s for n, s in weighted_sites(trace).items() if keep is None or keep(n, s)}
    if any("_enumerate_dim" in site["infer"] for site in sites.values()):
        log_probs = {name: _of_states(site) for name, site in sites.items()}
        try:
            weights = sum_states(trace, log_probs, scaled=structure.scaled)
        except StateSumError as error:
            raise ProgramError(f"{error}; or sample the enumerated site in the guide") from error
    else:
        weights = [
            site_log_prob(site) * site["scale"] if structure.scaled else site_log_prob(site)
            for site in sites.values()
        ]
    total = torch.zeros(())
    for weight in weights:
        total = total + sum_dims(weight, structure, num_particles)
    return total


def _of_states(site: Site) -> Tensor:
    """A site's log-probability; of states its masks are left out, where they sum to 1 unread."""
    fn = site["fn"]
    if "_enumerate_dim" not in site["infer"]:
        return site_log_prob(site)
    while isinstance(fn, MaskedDistribution):
        fn = fn.base_dist
    return fn.log_prob(site["value"], *site["args"], **site["kwargs"])


def sum_dims(
    log_prob: Tensor, structure: ProgramStructure, num_particles: int
) -> Float[Tensor, "*enumerated particles batch"]:
    """Sums a site's log-probabilities over all dims but particles, data and enumerated ones."""
    nesting = structure.max_plate_nesting
    log_prob = log_prob[(None,) * (nesting + 1 - log_prob.dim())]
    particle_dim = log_prob.dim() - nesting - 1  # dims to the left of it are enumerated
    if log_prob.shape[particle_dim] != num_particles:
        sizes = list(log_prob.shape)
        sizes[particle_dim] = num_particles
        log_prob = log_prob.expand(sizes)
    others = [dim for dim in range(-nesting, 0) if dim != structure.batch_dim]
    if others:
        log_prob = log_prob.sum(others)
    return log_prob if structure.batch_dim is not None else log_prob[..., None]


def subsamples(*traces: Trace) -> Trace:
    """A trace of the subsampling sites alone, so that further particles see the same data."""
    kept = Trace()
    for trace in traces:
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and site_is_subsample(site) and name not in kept:
                kept.add_node(name, **{k: v for k, v in site.items() if k != "name"})
    return kept
