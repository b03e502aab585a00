r"""How the tools run a user's Pyro programs, and leave the caller's world as it was.

`run_programs` gives the log-probabilities of any number of particles, per datum; `program_scope`
keeps the caller's parameters, random state and settings; `FittedProgram` carries fitted ones.
"""

import random
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

__all__ = [
    "Arguments",
    "FittedProgram",
    "Program",
    "ProgramError",
    "ProgramStructure",
    "as_arguments",
    "batch_length",
    "bytes_of_run",
    "common_owner",
    "evaluation_mode",
    "keep_random_state",
    "map_batch",
    "modules_of",
    "program_scope",
    "run_programs",
    "site_log_prob",
    "subsamples",
    "sum_sites",
    "trace_programs",
    "unwrap_programs",
    "weighted_sites",
]

Program = Callable[..., Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class ProgramError(ValueError):
    """A model or guide is not of the form that the tool needs; the message names the site."""


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


# --- arguments and scope --------------------------------------------------------------------------


def as_arguments(x: Any) -> Arguments:
    """Turns the `x` of every tool into a program's arguments.

    Args:
        x: A tensor (one argument), a tuple (several positional ones) or a dict (keywords).

    Returns:
        Positional and keyword arguments.
    """
    if isinstance(x, tuple):
        return x, {}
    if isinstance(x, Mapping):
        return (), dict(x)
    return (x,), {}


def batch_length(x: Any) -> int:
    """Number of data in `x`: the length of its first tensor (1 if it has none)."""
    args, kwargs = as_arguments(x)
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim() > 0]
    return len(tensors[0]) if tensors else 1


def map_batch(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Applies `change` to the tensors of `x` as long as the first; the others are passed on."""
    length = batch_length(x)

    def apply(a: Any) -> Any:
        return change(a) if isinstance(a, Tensor) and a.dim() > 0 and len(a) == length else a

    if isinstance(x, tuple):
        return tuple(apply(a) for a in x)
    if isinstance(x, Mapping):
        return {name: apply(a) for name, a in x.items()}
    return apply(x)


@contextmanager
def program_scope(seed: int | None = None) -> Iterator[None]:
    """Runs a user's programs so that the caller's world is afterwards what it was.

    Inside, the parameter store starts as a copy of the caller's. Parameters that belong to a
    module are left
    out: they register themselves when the program runs, so two programs that use one name do not
        meet.

    Args:
        seed: Seeds torch, NumPy and `random` inside; their states are restored at the end. With
            None, random
            numbers are taken from the caller's streams, as Pyro's own tools do.
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
            stack.enter_context(_OwnNames())
            if seed is not None:
                stack.enter_context(keep_random_state())
                pyro.set_rng_seed(seed)
            yield
    finally:
        pyro.settings.set(**settings)
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


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
        (batch 1 if joint), and
        the parts of log p(x, z) by observed (`likelihood`) and latent (`prior`) sites.
    """
    if structure.vectorizable or num_particles == 1:
        traces = [
            trace_programs(model, guide, arguments, num_particles, structure.max_plate_nesting)
        ]
        counts = [num_particles]
    else:
        first = trace_programs(model, guide, arguments)
        same = subsamples(*first)
        traces = [first] + [
            trace_programs(
                poutine.replay(model, trace=same),
                poutine.replay(guide, trace=same),
                arguments,
            )
            for _ in range(num_particles - 1)
        ]
        counts = [1] * num_particles
    likelihood, prior, posterior = (
        torch.cat(
            [
                sum_sites(trace[i], structure, k, observed)
                for trace, k in zip(traces, counts, strict=True)
            ]
        )
        for i, observed in ((1, True), (1, False), (0, None))
    )
    return likelihood + prior, posterior, {"likelihood": likelihood, "prior": prior}


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
        model = _in_particle_plate(model, num_particles, dim)
        guide = _in_particle_plate(guide, num_particles, dim)
    inner = poutine.unwrap(guide)
    if isinstance(
        inner, poutine.messenger.Messenger
    ):  # Pyro's guide messengers run the model themselves
        guide(*args, **kwargs)
        model_trace, guide_trace = inner.get_traces()
        return guide_trace, model_trace
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    # Replay stands outside the particle plate: a replayed site skips the plates inside replay.
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return guide_trace, model_trace


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


def _in_particle_plate(program: Program, num_particles: int, dim: int) -> Program:
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


def site_log_prob(site: dict[str, Any]) -> Tensor:
    """A site's log-probability in nats, with its mask and without its scale."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, 1.0, site["mask"])


def sum_sites(
    trace: Trace, structure: ProgramStructure, num_particles: int, observed: bool | None
) -> Float[Tensor, "particles batch"]:
    """Sums the log-probabilities of a trace over all but particles and data."""
    total: Tensor | None = None
    for site in weighted_sites(trace).values():
        if observed is None or site["is_observed"] is observed:
            part = _sum_dims(site_log_prob(site), structure, num_particles)
            total = part if total is None else total + part
    if total is None:
        return torch.zeros(num_particles, 1)  # broadcasts over the batch
    return total


def _sum_dims(log_prob: Tensor, structure: ProgramStructure, num_particles: int) -> Tensor:
    nesting = structure.max_plate_nesting
    log_prob = log_prob[(None,) * (nesting + 1 - log_prob.dim())]
    if log_prob.shape[0] != num_particles:
        log_prob = log_prob.expand(num_particles, *log_prob.shape[1:])
    keep = None if structure.batch_dim is None else nesting + 1 + structure.batch_dim
    others = [dim for dim in range(1, nesting + 1) if dim != keep]
    if others:
        log_prob = log_prob.sum(others)
    return log_prob if keep is not None else log_prob[:, None]


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
        return getattr(self.__dict__["__wrapped__"], name)

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


def modules_of(program: Any) -> list[nn.Module]:
    """The modules a program reaches: itself, its owner, those its closure and globals name."""
    if isinstance(program, nn.Module):
        return [program]
    owner = getattr(program, "__self__", None)
    if isinstance(owner, nn.Module):
        return [owner]
    function = getattr(
        program, "func", getattr(program, "__wrapped__", program)
    )  # partial, decorated
    cells = [
        cell.cell_contents
        for cell in getattr(function, "__closure__", None) or ()
        if cell.cell_contents is not None
    ]
    code = getattr(function, "__code__", None)
    named = [function.__globals__.get(name) for name in code.co_names] if code is not None else []
    return [value for value in (*cells, *named) if isinstance(value, nn.Module)]


def common_owner(model: Program, guide: Program) -> nn.Module | None:
    """The one module that model and guide are methods of."""
    owner = getattr(model, "__self__", None)
    return (
        owner
        if isinstance(owner, nn.Module) and owner is getattr(guide, "__self__", None)
        else None
    )
