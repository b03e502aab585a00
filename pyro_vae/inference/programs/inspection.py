r"""A pair of programs with its data, inspected once and handed on.

`Pair.inspect` runs a model and its guide a few times, reads off where the batch lies, and refuses,
naming the site, what no tool built on log weights can do. What it saw goes with the pair, so that
no tool that is given one has to look again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.inference.programs.arguments import (
    Arguments,
    Axes,
    Program,
    ProgramError,
    ProgramStructure,
    SubsampleError,
    as_arguments,
    batch_axes,
    map_batch,
    take,
)
from pyro_vae.inference.programs.enumerate import check_states
from pyro_vae.inference.programs.refusals import (
    FirstRun,
    check_enumerable,
    check_module_names,
    check_observed,
    check_point_mass,
    check_same_latents,
    check_unchanged,
    common_scale,
    first_run,
    max_plate_nesting,
    versions,
)
from pyro_vae.inference.programs.reruns import (
    check_at_once,
    check_deterministic,
    check_independent,
    is_vectorizable,
    takes_part,
)
from pyro_vae.inference.programs.scope import ieee_precision, keep_random_state
from pyro_vae.inference.programs.simulate import redraw_local
from pyro_vae.inference.programs.sites import find_batch, find_split
from pyro_vae.inference.programs.tool import warn_of_unfitted
from pyro_vae.inference.programs.traces import (
    draw_traces,
    enumerating,
    fixed_draws,
    naming_the_site,
    rerun_traces,
    run_programs,
    site_log_prob,
    split_weights,
    sum_sites,
    trace_programs,
    weighted_sites,
)
from pyro_vae.inference.state_sums import read_states

__all__ = ["Pair", "has_global_latents", "inspect_programs"]


@dataclass(frozen=True, eq=False)
class Pair:
    """A model, a guide and their data, with what `inspect` found out about them.

    The methods run the programs: call them inside `program_scope`.

    Attributes:
        model: The generative program.
        guide: The program of the approximate posterior.
        x: The data; a tuple for several arguments, a dict for keywords.
        structure: What the runs of `inspect` showed.
        bytes_of_particle: A measure of the memory that a run with one particle takes.
        traces: Of guide and model, from the first run on these data; None for a part of the data.
        axes: The axes of `x` that hold the data, once `sliceable` has found them.
    """

    model: Program
    guide: Program
    x: Any
    structure: ProgramStructure
    bytes_of_particle: float = 0.0
    traces: tuple[Trace, Trace] | None = None
    axes: Axes = ()

    @classmethod
    def inspect(
        cls,
        model: Program,
        guide: Program,
        x: Any,
        *,
        joint: bool | None = False,
        num_particles: int = 2,
        run: FirstRun | None = None,
    ) -> "Pair":
        """Looks a pair over; see `inspect_programs`, whose refusals these are.

        Args:
            model: The generative program.
            guide: The program of the approximate posterior.
            x: The data.
            joint: One weight per particle on all data; None for that where latents are global.
            num_particles: With 1, programs that cannot run particles together are not found out.
            run: A run of theirs on these data, where there was one.
        """
        return _look(model, guide, x, joint, num_particles, run=run)

    @property
    def arguments(self) -> Arguments:
        """The data as the programs take them."""
        return as_arguments(self.x)

    @property
    def joint(self) -> bool:
        """Whether all data have one weight together."""
        return self.structure.batch_dim is None

    @property
    def num_data(self) -> int:
        """Data with weights of their own: 1 if joint."""
        return 1 if self.joint else self.structure.batch_size

    def first_run(self) -> tuple[Trace, Trace]:
        """Traces of guide and model with one particle; those of `inspect`, if of these data."""
        if self.traces is not None:
            return self.traces
        with torch.no_grad(), pyro.validation_enabled(False):
            return trace_programs(self.model, self.guide, self.arguments)

    def draws(self, num_particles: int) -> list[tuple[Trace, Trace, int]]:
        """Traces of guide and model with the number of particles in each; see `draw_traces`."""
        return draw_traces(self.model, self.guide, self.arguments, self.structure, num_particles)

    def log_probs(
        self, num_particles: int
    ) -> tuple[
        Float[Tensor, "particles batch"], Float[Tensor, "particles batch"], dict[str, Tensor]
    ]:
        """Log p(x, z) and log q(z | x) of fresh draws, and the parts of the first."""
        return run_programs(self.model, self.guide, self.arguments, self.structure, num_particles)

    def log_weights(self, num_particles: int) -> Float[Tensor, "particles batch"]:
        """Log importance weights of fresh draws, in nats."""
        log_p, log_q, _ = self.log_probs(num_particles)
        return log_p - log_q

    def split_log_weights(
        self, num_particles: int
    ) -> tuple[Float[Tensor, " particles"], Float[Tensor, "particles batch"]]:
        """Of fresh draws log p(theta)/q(theta), and log p(x, z | theta)/q(z | x, theta) per datum.

        Raises:
            ProgramError: If no latent is global, or the guide draws all latents as one vector.
        """
        return split_weights(self.draws(num_particles), self.structure)

    def nested_log_weights(
        self, num_particles: int, num_inner: int
    ) -> tuple[Float[Tensor, " particles"], Float[Tensor, "particles inner batch"]]:
        """The same with so many draws of the data's latents beside each of the global ones."""
        draws, structure = self.draws(num_particles), self.structure
        above, _ = split_weights(draws, structure)
        pair = (self.model, self.guide, self.arguments)
        _, inside = split_weights(redraw_local(*pair, structure, draws, num_inner), structure)
        return above, inside.unflatten(0, (num_particles, num_inner))

    def replay(self, draws: list[tuple[Trace, Trace, int]]) -> list[tuple[Trace, Trace, int]]:
        """The same draws run again, through which no gradient passes."""
        return rerun_traces(self.model, self.guide, self.arguments, self.structure, draws)

    def with_guide(self, guide: Program) -> "Pair":
        """The pair with another guide of the same sites and plates, such as a refitted one."""
        return replace(self, guide=guide, traces=None)

    def sliceable(self, length: int) -> "Pair | None":
        """The pair with the axes along which its programs take so many data as they take all.

        None if there are none: plates or parameters of a fixed size, data that are subsampled.
        """
        if self.structure.scale != 1.0 or self.joint or self.traces is None:
            return None
        for axes in batch_axes(self.x, self.structure.batch_size):
            # The last rows: programs that index by position take the first ones as they are.
            last = torch.arange(self.num_data - length, self.num_data)
            part = as_arguments(map_batch(self.x, take(last), axes))
            if takes_part(self.model, self.guide, part, self.structure, self.traces, last):
                return replace(self, axes=axes)
        return None

    def rows(self, part: slice | Tensor) -> "Pair":
        """Some of the data of a pair that is `sliceable`, whose structure it has."""
        if isinstance(part, slice):
            size = len(range(*part.indices(self.structure.batch_size)))
        else:
            size = len(part)
        return replace(
            self,
            x=map_batch(self.x, take(part), self.axes),
            structure=replace(self.structure, batch_size=size),
            bytes_of_particle=self.bytes_of_particle * size / self.structure.batch_size,
            traces=None,
        )


def has_global_latents(model: Program, guide: Program, x: Any) -> bool:
    """Whether one run shows latents outside the plate of the data; False where it fails."""
    with torch.no_grad(), keep_random_state(), ieee_precision():
        store = pyro.get_param_store()
        with store.scope(store.get_state()):
            try:
                return find_split(*trace_programs(model, guide, as_arguments(x))) is not None
            except Exception:  # its fault is said where the pair is inspected
                return False


def inspect_programs(
    model: Program,
    guide: Program,
    arguments: Arguments,
    *,
    joint: bool = False,
    num_particles: int = 2,
    linear: bool = False,
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
        num_particles: With 1, programs that cannot run particles together are not found out.
        linear: Whether a joint weight may be an estimate of that on all data, by the data of a
            subsampled plate (`ProgramStructure.scaled`), which no bound but the ELBO may.

    Returns:
        The structure of the pair.

    Raises:
        ProgramError: If a latent lies outside the batch plate, a model latent is missing from the
            guide (or the guide has one that the model lacks), the guide is a point mass or observes
            something, scales differ between sites, a batch dim is undeclared, an observed value is
            off its support, one datum depends on another's latents, two PyroModules share names, or
            the programs are not deterministic given their latents.
    """
    args, kwargs = arguments
    x: Any = kwargs if kwargs and not args else args
    return _look(model, guide, x, joint, num_particles, arguments, linear=linear).structure


def _look(
    model: Program,
    guide: Program,
    x: Any,
    joint: bool | None,
    num_particles: int,
    arguments: Arguments | None = None,
    run: FirstRun | None = None,
    linear: bool = False,
) -> Pair:
    arguments = as_arguments(x) if arguments is None else arguments
    check_module_names(model, guide)
    warn_of_unfitted(model, guide)
    with torch.no_grad(), keep_random_state(), ieee_precision(), _refuse_modules_in_training():
        # A stream of its own: parameters that are first drawn here owe nothing to later draws.
        pyro.set_rng_seed(int(torch.randint(2**31, ())))
        before = versions(arguments)
        run = run or first_run(model, guide, arguments)
        traces = run.traces
        check_same_latents(traces, {"parallel"})
        check_unchanged(arguments, before)
        measure = check_observed(weighted_sites(traces[1]))
        shapes = _shapes_of(traces)  # before the guide runs again, for a flow may know one draw
        check_point_mass(guide, arguments, traces[0])
        split = find_split(*traces)
        joint = split is not None if joint is None else joint
        structure = _read(traces, shapes, measure, joint, linear)
        structure = replace(structure, split=split if joint else None)
        seen = traces
        running = model
        if structure.enumerated:
            check_enumerable(weighted_sites(traces[1]), structure)
            running = enumerating(model, structure)
            seen = _trace_states(running, guide, arguments)
            structure = _check_sums(model, arguments, seen, structure)
        structure = _run_again(running, guide, arguments, structure, seen, num_particles > 1)
        if structure.enumerated:
            _check_states(model, arguments, seen, structure)
    return Pair(model, guide, x, structure, run.size, traces)


Shapes = dict[tuple[str, str], torch.Size]


def _shapes_of(traces: tuple[Trace, Trace]) -> Shapes:
    """Of the log-probabilities of each site of the guide and of the model."""
    with naming_the_site():
        return {
            (role, name): _log_prob_of(name, site).shape
            for role, trace in zip(("guide", "model"), traces, strict=True)
            for name, site in weighted_sites(trace).items()
        }


def _read(
    traces: tuple[Trace, Trace], shapes: Shapes, measure: str, joint: bool, linear: bool
) -> ProgramStructure:
    """What the first run shows, as far as it goes."""
    guide_sites, model_sites = map(weighted_sites, traces)
    dim, size = (None, 1) if joint else (0, 0)
    nesting = max_plate_nesting(guide_sites, model_sites, shapes.values())
    scaled = False
    try:
        scale = common_scale(guide_sites, model_sites, joint)
    except SubsampleError:
        if not (joint and linear):
            raise
        scale, scaled = 1.0, True
    if not joint:
        dim, size = find_batch(*traces, shapes)
    latent = {name: name in guide_sites for name, s in model_sites.items() if not s["is_observed"]}
    return ProgramStructure(
        batch_dim=dim,
        batch_size=size,
        max_plate_nesting=nesting,
        scale=scale,
        measure=measure,
        vectorizable=False,
        replayable=True,
        latents=tuple(
            name for name, s in guide_sites.items() if name in model_sites and not s["is_observed"]
        ),
        observed=tuple(name for name, s in model_sites.items() if s["is_observed"]),
        enumerated=tuple(name for name, drawn in latent.items() if not drawn),
        scaled=scaled,
    )


def _trace_states(model: Program, guide: Program, arguments: Arguments) -> tuple[Trace, Trace]:
    try:
        return trace_programs(model, guide, arguments)
    except Exception as error:
        raise ProgramError(
            f"the model cannot run with the states of its enumerated latents side by side "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); let latents have further "
            "dims on the left, which are their states, or sample them in the guide"
        ) from error


def _check_sums(
    model: Program, arguments: Arguments, traces: tuple[Trace, Trace], structure: ProgramStructure
) -> ProgramStructure:
    """Refuses states that cannot be summed out; data that share a state have no parts."""
    trace = traces[1]
    try:
        sum_sites(trace, structure, 1)
    except RuntimeError:  # shapes of a site that reads states by wrong dims
        _check_states(model, arguments, traces, structure)
        raise
    if structure.split is None:
        return structure
    sites = weighted_sites(trace)
    read = read_states(trace, {name: site_log_prob(site) for name, site in sites.items()})
    local = structure.split.local_sites
    shared = any(states - local for name, states in read.items() if name in local)
    return replace(structure, split=None) if shared else structure


def _check_states(
    model: Program, arguments: Arguments, traces: tuple[Trace, Trace], structure: ProgramStructure
) -> None:
    """Refuses a model that weighs its enumerated latents otherwise than where it draws them."""
    args, kwargs = arguments
    given = fixed_draws(*traces)
    for name in structure.enumerated:
        given.nodes.pop(name, None)
    enumerated = traces[1].copy()
    enumerated.compute_log_prob()
    enumerated.symbolize_dims()
    plain = poutine.trace(poutine.replay(model, trace=given))
    size = structure.batch_size if structure.split is None else structure.split.size
    check_states(enumerated, lambda: plain.get_trace(*args, **kwargs), size)


def _run_again(
    model: Program,
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
    traces: tuple[Trace, Trace],
    together: bool,
) -> ProgramStructure:
    """What further runs show: in two if all is well, else one check after the other."""
    if check_at_once(model, guide, arguments, structure, traces):
        return replace(structure, vectorizable=together)
    replayable = check_deterministic(model, guide, arguments, structure, traces)
    structure = replace(structure, replayable=replayable)
    if structure.batch_size > 1:
        check_independent(model, guide, arguments, structure, traces)
    vectorizable = together and is_vectorizable(model, guide, arguments, structure, traces)
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
