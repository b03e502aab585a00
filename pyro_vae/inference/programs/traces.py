r"""How the tools run a user's Pyro programs, and leave the caller's world as it was.

`run_programs` gives the log-probabilities of any number of particles, per datum; `program_scope`
keeps the caller's parameters, random state and settings; `FittedProgram` carries fitted ones.
"""

import random
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial, reduce
from types import CellType
from typing import Any

import numpy as np
import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.nn import PyroModule
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Independent, transform_to

from pyro_vae.inference.programs.arguments import Arguments

__all__ = [
    "FilledGaps",
    "FittedProgram",
    "JointOnlyError",
    "NoParametersError",
    "PointMassError",
    "Program",
    "ProgramError",
    "ProgramStructure",
    "Site",
    "SitesError",
    "SubsampleError",
    "SupportError",
    "all_data",
    "bytes_of_run",
    "common_owner",
    "describe_programs",
    "draw_traces",
    "enumerating",
    "evaluation_mode",
    "fixed_draws",
    "ieee_precision",
    "in_particle_plate",
    "keep_random_state",
    "modules_of",
    "program_scope",
    "pyro_parameters",
    "rerun_traces",
    "run_programs",
    "shown_value",
    "site_log_prob",
    "site_log_probs",
    "site_values",
    "subsamples",
    "sum_dims",
    "sum_sites",
    "sum_traces",
    "trace_programs",
    "unwrap_programs",
    "weighted_sites",
]

Program = Callable[..., Any]
Site = dict[str, Any]


class ProgramError(ValueError):
    """A model or guide is not of the form that the tool needs; the message names the site."""


class SitesError(ProgramError):
    """Model and guide do not sample the same latents, so no objective of theirs is a bound."""


class SupportError(ProgramError):
    """Observed values lie outside the support of their distribution."""


class NoParametersError(ProgramError):
    """There is nothing to train."""


class PointMassError(ProgramError):
    """The guide is a point, so its objective is a MAP objective."""


class SubsampleError(ProgramError):
    """The programs draw a part of their data, and the tool needs all of them."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason}; call the tool inside `with pyro_vae.all_data():`, where plates draw no "
            "subsample (where a plate is given its own, pass all data), and without poutine.scale"
        )


class JointOnlyError(ProgramError):
    """Data have no weights of their own; together they may have one.

    Attributes:
        reason: Why, without the advice to pass joint=True.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}, or pass joint=True for one weight per particle on all data")
        self.reason = reason


@dataclass(frozen=True)
class ProgramStructure:
    """What one run of a model and its guide shows.

    Attributes:
        batch_dim: The batch plate's dim, counted from the right (negative); None for joint weights.
        batch_size: Number of data in the run that was inspected.
        max_plate_nesting: Dims that plates and batch shapes take; particles go to the left of them.
        scale: The factor N/B of a subsampled plate, applied outside every reduction.
        measure: The measure the observed data live on: binary, grey, real, counts or mixed.
        vectorizable: Whether particles in one tensor program give what they give one by one.
        replayable: Whether the guide's density can be evaluated at given latents (a flow without an
            inverse cannot): what a second pass needs.
        latents: Names of the latent sites, in the guide's order, without auxiliary ones.
        observed: Names of the observed sites of the model.
        enumerated: Names of the model's discrete latents that the guide leaves out and that are
            summed out exactly.
    """

    batch_dim: int | None
    batch_size: int
    max_plate_nesting: int
    scale: float
    measure: str
    vectorizable: bool
    replayable: bool
    latents: tuple[str, ...]
    observed: tuple[str, ...]
    enumerated: tuple[str, ...] = ()


# --- scope ----------------------------------------------------------------------------------------


@contextmanager
def program_scope(seed: int | None = None, *, training: bool = False) -> Iterator[None]:
    """Runs a user's programs so that the caller's world is afterwards what it was.

    Inside, the parameter store starts as a copy of the caller's. Parameters that belong to a
    module are left out: they register themselves when the program runs, so two programs that use
    one name do not meet.

    Args:
        seed: Seeds torch, NumPy and `random` inside; their states are restored at the end. With
            None, random numbers are taken from the caller's streams, as Pyro's own tools do.
        training: Leaves float32 products to the precision that the caller chose for their speed;
            everything else runs in `ieee_precision`.
    """
    store = pyro.get_param_store()
    settings = pyro.settings.get()
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    state = store.get_state()
    inside = {
        part: {
            name: value
            for name, value in state[part].items()
            if not isinstance(state["params"][name], nn.Parameter)
        }
        for part in ("params", "constraints")
    }
    try:
        with ExitStack() as stack:
            stack.enter_context(store.scope(inside))
            stack.enter_context(warnings.catch_warnings())
            # Parameters are held fixed on purpose.
            warnings.filterwarnings("ignore", ".*not registered .* because requires_grad=False")
            stack.enter_context(_OwnNames())
            stack.enter_context(_float32_products(None if training else "ieee"))
            if training:
                stack.enter_context(FilledGaps())
            if seed is not None:
                stack.enter_context(keep_random_state())
                pyro.set_rng_seed(seed)
            yield
    finally:
        pyro.settings.set(**settings)
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextmanager
def all_data() -> Iterator[None]:
    """Plates draw no subsample inside: programs that were trained on parts see all their data.

    A plate whose subsample is given (`pyro.plate(..., subsample=...)`) keeps it.

    Example:
        >>> with all_data(), pyro.plate("data", 5, subsample_size=2) as rows:
        ...     len(rows)
        5
    """
    own = SubsampleMessenger._subsample

    def whole(
        name: str,
        size: int | None = None,
        subsample_size: int | None = None,
        subsample: Tensor | None = None,
        *device: Any,
    ) -> Any:
        # Pyro compares the size with what any handler of the subsample gives: it must not be one.
        given = subsample is not None or size is None
        return own(name, size, subsample_size if given else None, subsample, *device)

    SubsampleMessenger._subsample = staticmethod(whole)
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(own)


def ieee_precision() -> AbstractContextManager[None]:
    """Computes float32 products in float32, whatever the caller allows for their speed.

    `torch.set_float32_matmul_precision` and `torch.backends` let products of matrices, convolutions
    and recurrent cells round their factors to bfloat16 or TF32, also on a CPU. Sums over many
    pixels then move by nats.
    """
    return _float32_products("ieee")


@contextmanager
def _float32_products(precision: str | None) -> Iterator[None]:
    """Sets the precision of float32 products, if one is given, and restores it at the end."""
    backends: Any = torch.backends
    cuda, cudnn, cpu = backends.cuda, backends.cudnn, backends.mkldnn
    products = [cpu.matmul, cpu.conv, cpu.rnn, cuda.matmul, cudnn.conv, cudnn.rnn]
    before = [product.fp32_precision for product in products]
    switches: list[tuple[Any, Any, Any]] = [  # older ones
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        (partial(getattr, cudnn, "allow_tf32"), partial(setattr, cudnn, "allow_tf32"), False),
    ]
    older = []
    for read, write, full in switches:
        with suppress(RuntimeError):  # torch refuses to read one that contradicts `products`
            older.append((write, read(), full))
    try:
        if precision is not None:
            for write, _, full in older:
                write(full)
            for product in products:
                product.fp32_precision = precision
        yield
    finally:
        for write, value, _ in older:
            write(value)
        for product, value in zip(products, before, strict=True):
            product.fp32_precision = "none"
            if product.fp32_precision != value:  # else it is inherited, as it was
                product.fp32_precision = value


class _OwnNames(Messenger):
    """Gives a module's parameter another name when another module's holds the one it asks for."""

    def _pyro_param(self, msg: Any) -> None:
        name, *rest = msg["args"]
        if not rest or not isinstance(rest[0], nn.Parameter):
            return
        stored = dict(pyro.get_param_store().named_parameters())
        own, count = name, 1
        while own in stored and stored[own] is not rest[0]:
            count += 1
            own = f"{name}#{count}"
            if count > 2:  # one for the model and one for the guide
                raise ProgramError(
                    f"parameter '{name}' is another nn.Parameter at every call, so no fitted value "
                    "could reach it; give pyro.param a plain tensor, or every module a name of its "
                    "own"
                )
        if own != name:
            msg["name"], msg["args"] = own, (own, *rest)


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Restores the random states of torch (every device), NumPy and `random` at the end."""
    others = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state users' programs use
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])  # noqa: NPY002


# --- running --------------------------------------------------------------------------------------


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
    if num_particles > 1:
        dim = -1 - max_plate_nesting
        model = in_particle_plate(model, num_particles, dim)
        guide = in_particle_plate(guide, num_particles, dim)
    inner = poutine.unwrap(guide)
    if isinstance(inner, Messenger):  # Pyro's guide messengers run the model themselves
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
        programs = [guide, model]
        if count > 1:
            dim = -1 - structure.max_plate_nesting
            programs = [in_particle_plate(program, count, dim) for program in programs]
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
        given.nodes[name] = {**site, "value": site["value"].detach().clone()}
        given.nodes[name].pop("masked_log_prob", None)
    return given


def bytes_of_run(model: Program, guide: Program, arguments: Arguments) -> int:
    """Bytes that one particle draws and that modules put out: a measure of a run's memory."""
    total = 0

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += output.numel() * output.element_size()

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        with torch.no_grad(), keep_random_state():
            traces = trace_programs(model, guide, arguments)
    finally:
        handle.remove()
    values = [site["value"] for trace in traces for site in weighted_sites(trace).values()]
    return total + sum(value.numel() * value.element_size() for value in values)


def in_particle_plate(program: Program, num_particles: int, dim: int) -> Program:
    """The program inside the plate of particles, which stands to the left of its own."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate("_particles", num_particles, dim=dim):
            return program(*args, **kwargs)

    return run


def weighted_sites(trace: Trace) -> dict[str, dict[str, Any]]:
    """The sites that carry density: no subsampling, no `pyro.deterministic`."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    }


def site_log_prob(site: Site) -> Tensor:
    """A site's log-probability in nats, with its mask and without its scale; computed once."""
    if "masked_log_prob" not in site:
        log_prob = site["fn"].log_prob(shown_value(site), *site["args"], **site["kwargs"])
        site["masked_log_prob"] = scale_and_mask(log_prob, 1.0, site["mask"])
    return site["masked_log_prob"]


def shown_value(site: Any) -> Any:
    """A site's value; of an observed one, with a point of the support under its masks.

    Nothing depends on what is there, but a missing value (NaN) would be refused by torch's checks,
    and 0 times its gradient is NaN.
    """
    value = site["value"]
    if not (site["is_observed"] and isinstance(value, Tensor)):
        return value
    hidden = _hidden(site)
    if hidden is None:
        return value
    try:
        support = site["fn"].support
        point = transform_to(support)(torch.zeros_like(value))
    except (AttributeError, NotImplementedError):  # it states none, or is discrete
        point = torch.zeros_like(value)
    return torch.where(hidden, point.to(value), value)


def _hidden(site: Any) -> Tensor | None:
    """Which entries of a site's value are under a mask, of poutine.mask or of its distribution."""
    fn = site["fn"]
    masks = [(site["mask"], len(fn.event_shape))]
    while isinstance(fn, MaskedDistribution | Independent | ExpandedDistribution):
        masks.append((getattr(fn, "_mask", None), len(fn.event_shape)))
        fn = fn.base_dist
    hidden = [
        ~torch.as_tensor(mask, device=site["value"].device)[(..., *(None,) * events)]
        for mask, events in masks
        if mask is not None and mask is not True
    ]
    return reduce(torch.logical_or, hidden) if hidden else None


class FilledGaps(Messenger):
    """Fills missing values under masks, for losses that ask the distributions themselves."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not msg["infer"].get("_deterministic"):
            value, shown = msg["value"], shown_value(msg)
            if shown is not value:
                msg["value"] = torch.where(value.isnan(), shown, value)


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


def sum_sites(
    trace: Trace,
    structure: ProgramStructure,
    num_particles: int,
    keep: Callable[[str, Site], bool] | None = None,
) -> Tensor:
    """Sums the log-probabilities of a trace's sites, or those to keep, per particle and datum."""
    total = torch.zeros(())
    for name, site in weighted_sites(trace).items():
        if keep is None or keep(name, site):
            total = total + sum_dims(site_log_prob(site), structure, num_particles)
    return total if total.dim() <= 2 else total.flatten(0, -3).logsumexp(0)


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


# --- programs and their modules -------------------------------------------------------------------


class FittedProgram:
    """A program with fitted parameters in place, whatever the caller's parameter store holds.

    Calling it runs the program in a parameter store that has the fitted values; other attributes
    are those of the program.
    """

    def __init__(self, program: Program, state: dict[str, Any]) -> None:
        self.__wrapped__ = program
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        try:
            with pyro.get_param_store().scope(self.state):
                return self.__wrapped__(*args, **kwargs)
        finally:
            for value in self.state["params"].values():  # leaving a scope strips what SVI looks for
                value.unconstrained = weakref.ref(value)

    def __getattr__(self, name: str) -> Any:
        if "__wrapped__" not in self.__dict__:  # while copying or unpickling
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)

    def __repr__(self) -> str:
        return f"fitted {self.__wrapped__!r}"


def unwrap_programs(model: Program, guide: Program) -> tuple[dict[str, Any], Program, Program]:
    """Programs without fitted parameters around them, and copies of those to start from."""
    start: dict[str, Any] = {"params": {}, "constraints": {}}
    programs = []
    for program in (model, guide):
        while isinstance(program, FittedProgram):
            for name, value in program.state["params"].items():
                if not isinstance(value, nn.Parameter):
                    start["params"].setdefault(name, value.detach().clone().requires_grad_())
                    start["constraints"].setdefault(name, program.state["constraints"][name])
            program = program.__wrapped__
        programs.append(program)
    return start, programs[0], programs[1]


@contextmanager
def evaluation_mode(*programs: Program) -> Iterator[None]:
    """Puts the modules of the programs in evaluation mode, and each back in its own."""
    modules = {
        id(m): m for program in programs for root in modules_of(program) for m in root.modules()
    }.values()
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def modules_of(program: Any) -> Collection[nn.Module]:
    """The modules a program reaches: itself, its owner, those its closure and globals name."""
    while not isinstance(program, nn.Module):  # fitted, partial and decorated programs
        if isinstance(getattr(program, "__self__", None), nn.Module):
            break  # a decorated method's own function knows no module
        inner = getattr(program, "func", getattr(program, "__wrapped__", None))
        if inner is None:
            break
        program = inner
    if isinstance(program, nn.Module):
        return [program]
    owner = getattr(program, "__self__", program)
    if isinstance(owner, nn.Module):
        return [owner]
    function = program if hasattr(program, "__code__") else type(program).__call__
    cells = [cell for cell in getattr(function, "__closure__", None) or () if cell != CellType()]
    names = function.__code__.co_names if hasattr(function, "__code__") else ()
    named = [function.__globals__.get(name) for name in names]
    held = getattr(owner, "__dict__", {}).values()
    reached = (*(cell.cell_contents for cell in cells), *named, *held)
    return [value for value in reached if isinstance(value, nn.Module)]


def pyro_parameters(program: Program) -> Iterator[tuple[str, nn.Parameter]]:
    """The `PyroParam`s of the modules a program reaches, as an optimizer moves them, by name."""
    for root in modules_of(program):
        for module in root.modules() if isinstance(root, PyroModule) else ():
            for name in getattr(module, "_pyro_params", {}):
                full = f"{module._pyro_name}.{name}".lstrip(".")
                yield full, getattr(module, f"{name}_unconstrained")


def common_owner(model: Program, guide: Program) -> nn.Module | None:
    """The one module that model and guide are methods of."""
    owner = getattr(model, "__self__", None)
    shared = isinstance(owner, nn.Module) and owner is getattr(guide, "__self__", None)
    return owner if shared else None


def describe_programs(model: Program, guide: Program) -> dict[str, Any]:
    """What config.json says of them: the class that makes both and its arguments, or a name."""
    owner = common_owner(model, guide)
    if owner is not None and hasattr(owner, "config"):
        return {"class": type(owner).__name__, "arguments": owner.config}
    return {"program": getattr(model, "__qualname__", type(model).__name__)}
