"""What `fit` must know of data and programs before the first step, found by running them.

`prepare` tells latents and parameters of each datum from global ones, and chooses the mini-batch
accordingly; `TrainingData` cuts the mini-batches.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.inference.programs import (
    Arguments,
    Axes,
    JointOnlyError,
    NoParametersError,
    Program,
    ProgramError,
    ProgramStructure,
    SupportError,
    as_arguments,
    batch_axes,
    batch_length,
    check_parameters,
    count_data,
    inspect_programs,
    keep_random_state,
    map_batch,
    take,
    tensors_of,
    trace_programs,
    weighted_sites,
)
from pyro_vae.results import sha256_of

__all__ = [
    "Preparation",
    "TrainingData",
    "check_held_out",
    "move_data",
    "prepare",
]

_DEFAULT_BATCH = 128


# --- data -----------------------------------------------------------------------------------------


class TrainingData:
    """Data held in memory, shuffled by a generator of its own.

    Args:
        x: The data, in one of the forms of `as_arguments`.
        transform: As for `fit`.
        seed: Seeds shuffling, the draws of `transform` and the streams of `generator`.

    Attributes:
        axes: The axes that data lie along, as `batch_axes` has them: the first one until the
            programs have said otherwise; None throughout where no part can be taken.
        length: Number of data.

    Raises:
        ValueError: If there are no data.
    """

    def __init__(
        self, x: Any, transform: Callable[[Tensor, torch.Generator], Tensor] | None, seed: int
    ) -> None:
        self.x, self.transform = x, transform
        self.axes: Axes = next(iter(batch_axes(x)), ())
        self.length = batch_length(x, self.axes)
        if self.length == 0:
            raise ValueError("there are no data to fit: the first tensor of x has length 0")
        self.seed = seed
        self.shuffler = torch.Generator().manual_seed(_stream_seed(seed, 0))
        self.noise = self.generator(1)

    def sha256(self) -> str:
        """The hash of the data; that of an empty tensor where programs bring their own."""
        return sha256_of(*tensors_of(self.x) or [torch.empty(0)])

    def generator(self, stream: int) -> torch.Generator:
        """A source of randomness where the data lie, independent of the others of this run."""
        tensors = tensors_of(self.x)
        device = tensors[0].device if tensors else "cpu"
        return torch.Generator(device=device).manual_seed(_stream_seed(self.seed, stream))

    def random_states(self) -> dict[str, Tensor]:
        """The states of shuffler and noise, and of the device where the data lie, by name."""
        states = {"shuffler": self.shuffler.get_state(), "noise": self.noise.get_state()}
        if self.noise.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.noise.device)
        return states

    def set_random_states(self, states: Mapping[str, Tensor]) -> None:
        """Puts back what `random_states` gave, as far as it is of the same kind of device."""
        self.shuffler.set_state(states["shuffler"])
        on_cuda = self.noise.device.type == "cuda"
        if on_cuda and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.noise.device)
        if on_cuda == ("cuda" in states):
            self.noise.set_state(states["noise"])

    def first(self, rows: int, stream: int) -> Any:
        """The first rows, with draws of their own that are the same each time."""
        index = torch.arange(rows) if rows < self.length else None
        return self.batch(index, self.generator(stream))

    def batch(self, index: Tensor | None, noise: torch.Generator | None = None) -> Any:
        """The data at `index` (all if None), in the form of `x`, transformed."""
        x = self.x if index is None else map_batch(self.x, take(index), self.axes)
        if self.transform is None:
            return x
        todo = [self.transform]  # for the first tensor alone
        return map_batch(
            x, lambda a, _: todo.pop()(a, noise or self.noise) if todo else a, self.axes
        )


def _stream_seed(seed: int, stream: int) -> int:
    return int(np.random.SeedSequence((seed, stream)).generate_state(1)[0])


def move_data(x: Any, device: str | torch.device) -> Any:
    """The data with all their tensors on a device; what is no tensor is passed on."""
    if isinstance(x, tuple):
        return tuple(move_data(a, device) for a in x)
    if isinstance(x, Mapping):
        return {name: move_data(a, device) for name, a in x.items()}
    return x.to(device) if isinstance(x, Tensor) else x


# --- programs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preparation:
    """What `prepare` found.

    Attributes:
        structure: How log weights can be had; None where they cannot.
        joint: Whether there is one weight on all data, for global latents, and none per datum.
        batch_size: Data in a mini-batch.
        per_datum: The name of a parameter or latent with a value for each training datum, or "".
        fixed: Whether the programs take all data and no fewer.
        subsampled: The plate that the model itself subsamples, if it does.
        max_plate_nesting: For the loss.
        data: The training data, which know along which axes they lie.
        modules: Those that run, however the programs reach them.
        foreign: Names of the caller's parameters that these programs do not use.
    """

    structure: ProgramStructure | None
    joint: bool
    batch_size: int
    per_datum: str
    fixed: bool
    subsampled: Any
    max_plate_nesting: int
    data: TrainingData
    modules: tuple[nn.Module, ...]
    foreign: frozenset[str]

    @property
    def takes_some(self) -> bool:
        """Whether the bound of some data can be had without that of all."""
        return self.structure is not None and not (self.joint or self.per_datum or self.fixed)

    def length_of(self, x: Any) -> int:
        """How many data there are in such data as those of the training."""
        cut = any(axis is not None for axis in self.data.axes)
        return batch_length(x, self.data.axes) if cut else self.data.length

    def num_data(self, seen: int) -> int:
        """How many data the loss of a batch speaks for: a subsampled plate scales it to all."""
        return self.subsampled.full_size if self.subsampled is not None else seen


@dataclass(frozen=True)
class _Plates:
    """What one run shows of plates: the names of global latents and of all, the data's plates."""

    global_latents: list[str]
    latents: list[str]
    data_plates: list[Any]
    depth: int
    enumerates: bool

    @property
    def subsampled(self) -> Any:
        """The plate of the data that the model subsamples itself, if it does."""
        return next((f for f in self.data_plates if f.full_size not in (None, f.size)), None)


def prepare(
    model: Program,
    guide: Program,
    data: TrainingData,
    *,
    loss: ELBO,
    batch_size: int | None,
    warmup_epochs: int,
) -> Preparation:
    """Runs the programs on some of the data and says how they can be trained.

    Parameters that the programs make when they first run are from then on in the parameter store.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        data: The training data.
        loss: The objective.
        batch_size: As asked for; None to choose it.
        warmup_epochs: As for `fit`.

    Raises:
        ProgramError: If SVI would train the programs in part or not at all, observed data lie off
            their support, mini-batches were asked for where data do not stand alone, or KL warm-up
            where latents are summed out.
    """
    foreign = frozenset(pyro.get_param_store().keys())
    with _running_modules() as modules:  # training mode would move what evaluation may not
        _locate_data(model, data, batch_size)
        rows, per_datum, fixed = _rows_to_inspect(model, guide, data, batch_size)
        probe = as_arguments(data.first(rows, stream=2))
        try:
            used = check_parameters(model, guide, probe, isinstance(loss, TraceEnum_ELBO))
        except NoParametersError as error:  # often the least of the pair's faults
            _, _, refusal = _inspect(model, guide, probe)
            if refusal is None:
                raise
            fault = refusal.reason if isinstance(refusal, JointOnlyError) else refusal
            raise NoParametersError(f"{fault}; besides, {error}") from error
        structure, joint, _ = _inspect(model, guide, probe)
        plates = _look_at_plates(model, guide, data, batch_size)
        if plates.subsampled and rows < data.length and batch_size in (None, data.length):
            # N/B is that of all the data, which such a program cuts itself
            structure, joint, _ = _inspect(model, guide, as_arguments(data.first(data.length, 2)))
            plates = _look_at_plates(model, guide, data, data.length)
        if _is_automatic(guide):
            own = [name for name in plates.latents if name not in plates.global_latents]
            per_datum = own[0] if own else per_datum
        if warmup_epochs and plates.enumerates and isinstance(loss, TraceEnum_ELBO):
            raise ProgramError(
                "KL warm-up scales latent sites, which has no meaning for those that are summed "
                "out; pass warmup_epochs=0"
            )
    subsampled = plates.subsampled
    whole = joint or plates.global_latents or per_datum or fixed or not plates.data_plates
    if batch_size is None:
        batch_size = data.length if whole or subsampled else _DEFAULT_BATCH
    batch_size = min(batch_size, data.length)
    if batch_size < data.length and not subsampled:
        names = plates.global_latents or list(structure.latents if structure else ())
        _check_batches(batch_size, per_datum, names if joint or plates.global_latents else None)
    return Preparation(
        structure=structure,
        joint=joint,
        batch_size=batch_size,
        per_datum=per_datum,
        fixed=fixed,
        subsampled=subsampled,
        max_plate_nesting=_max_plate_nesting(loss, plates.depth),
        data=data,
        modules=tuple(modules),
        foreign=foreign - set(used),
    )


@contextmanager
def _running_modules() -> Iterator[dict[nn.Module, bool]]:
    """Collects the modules that run, however a program reaches them, in evaluation mode."""
    modes: dict[nn.Module, bool] = {}

    def hook(module: nn.Module, _inputs: Any) -> None:
        if module not in modes:
            modes[module] = module.training
            module.training = False

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield modes
    finally:
        handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _is_automatic(guide: Program) -> bool:
    """Whether a guide is one of Pyro's, which make their parameters when they first run."""
    while not isinstance(guide, AutoGuide) and hasattr(guide, "__wrapped__"):
        guide = guide.__wrapped__
    return isinstance(guide, AutoGuide)


def _few(data: TrainingData, batch_size: int | None) -> int:
    """As many data as a mini-batch will have, as far as one can say yet."""
    return min(batch_size or _DEFAULT_BATCH, data.length)


def _locate_data(model: Program, data: TrainingData, batch_size: int | None) -> None:
    """Finds how many data there are, and their axes, from the size of the model's batch plate.

    A run on a few along the first axis tells nearly always: its plate has their number.
    """
    others = {size for tensor in tensors_of(data.x) for size in tensor.shape[1:]}
    few = _few(data, batch_size)
    while few in others and few > 1:  # a plate of that size may be one of another axis
        few -= 1
    if _sees(model, data, few):
        return
    counts = [size for size, _ in _count(model, data, data.length)]
    if not counts:  # no plate says it, or the fault shows in a moment
        return
    size = data.length if data.length in counts else counts[0]
    uncut: Axes = (None,) * len(data.axes)
    for axes in (*batch_axes(data.x, size), uncut):
        data.axes, data.length = axes, size
        part = min(_few(data, batch_size), size - 1)
        if part > 0 and axes != uncut and _sees(model, data, part):
            return


def _sees(model: Program, data: TrainingData, rows: int) -> bool:
    """Whether the model's plate has the size of the part of the data that it is given."""
    return any(rows in counts for counts in _count(model, data, rows))


def _count(model: Program, data: TrainingData, rows: int) -> list[tuple[int, int]]:
    """What `count_data` says of the first rows; nothing where the model fails on them."""
    args, kwargs = as_arguments(data.first(rows, stream=2))
    store = pyro.get_param_store()
    with store.scope(store.get_state()), torch.no_grad(), keep_random_state():
        try:
            return count_data(poutine.trace(model).get_trace(*args, **kwargs))
        except Exception:  # a fault of another kind shows again on all data
            return []


def _rows_to_inspect(
    model: Program, guide: Program, data: TrainingData, batch_size: int | None
) -> tuple[int, str, bool]:
    """How many data to look at: a mini-batch, or all where programs depend on how many there are.

    Returns:
        The number; the name of a parameter with a value for each datum, or ""; whether the
        programs take all data and no fewer.
    """
    if not any(axis is not None for axis in data.axes):
        if batch_size is not None and batch_size < data.length:
            raise ProgramError(
                f"the plate of the data keeps its size {data.length} whichever part of x the model "
                f"is given, so there are no mini-batches of {batch_size}; pass batch_size=None, or "
                "give the plate the size of its data"
            )
        return data.length, "", True
    if _is_automatic(guide):  # makes its parameters when it first runs
        return data.length, "", False
    if data.length == 1:
        return 1, "", False
    few = _few(data, batch_size)
    shapes, others = (_parameter_shapes(model, guide, data, rows) for rows in (few, few - 1 or 2))
    if shapes is None or (few == data.length and others is None):
        fixed = batch_size in (None, data.length)
        return (data.length if fixed else few), "", fixed
    for name, shape in shapes.items():
        if others is not None and others.get(name, shape) != shape:
            return data.length, name, False
    return few, "", False


def _parameter_shapes(
    model: Program, guide: Program, data: TrainingData, rows: int
) -> dict[str, torch.Size] | None:
    """Shapes of the parameters where programs see so many data; None where they cannot."""
    store = pyro.get_param_store()
    with store.scope(store.get_state()), poutine.trace(param_only=True) as params:
        if _traces(model, guide, data, rows) is None:
            return None
    return {name: site["value"].shape for name, site in params.trace.nodes.items()}


def _traces(
    model: Program, guide: Program, data: TrainingData, rows: int
) -> tuple[Trace, Trace] | None:
    """The programs' traces on the first rows; None where they take another number of them."""
    arguments = as_arguments(data.first(rows, stream=2))
    with torch.no_grad(), keep_random_state():
        try:
            traces = trace_programs(model, guide, arguments)
            for trace in traces:
                trace.compute_log_prob()
        except Exception:  # a fault of another kind shows again on all data
            return None
    return traces


def _inspect(
    model: Program, guide: Program, probe: Arguments
) -> tuple[ProgramStructure | None, bool, ProgramError | None]:
    """How log weights can be had: per datum, jointly (global latents), or not at all.

    Returns:
        The structure, if there is one; whether it is a joint one; why there are no weights per
        datum.
    """
    refusal: ProgramError | None = None
    for joint in (False, True):
        try:
            found = inspect_programs(model, guide, probe, joint=joint, num_particles=1)
            return found, joint, refusal
        except SupportError:
            raise
        except ProgramError as error:
            refusal = refusal or error
    return None, False, refusal


def _look_at_plates(
    model: Program, guide: Program, data: TrainingData, batch_size: int | None
) -> _Plates:
    traces = _traces(model, guide, data, _few(data, batch_size))
    traces = traces or _traces(model, guide, data, data.length)
    assert traces is not None  # they ran a moment ago
    guide_sites, sites = (weighted_sites(trace) for trace in traces)
    both = guide_sites | sites
    frames = {
        name: {f.name: f for f in site["cond_indep_stack"] if f.vectorized}
        for name, site in both.items()
    }
    observed = [frames[name] for name, site in sites.items() if site["is_observed"]]
    batch = set(observed[0]).intersection(*observed) if observed else set()
    latents = [n for n, s in sites.items() if n in guide_sites and not s["is_observed"]]
    return _Plates(
        global_latents=[name for name in latents if not batch & set(frames[name])],
        latents=latents,
        data_plates=[observed[0][name] for name in batch],
        depth=max((-f.dim for stack in frames.values() for f in stack.values()), default=0),
        enumerates=any(site["infer"].get("enumerate") for site in both.values()),
    )


def _max_plate_nesting(loss: ELBO, depth: int) -> int:
    """What the loss was given, or what was seen: Pyro's own guess would draw random numbers."""
    if not math.isinf(loss.max_plate_nesting):
        return loss.max_plate_nesting
    return depth + int(loss.vectorize_particles and loss.num_particles > 1)


def _check_batches(batch_size: int, per_datum: str, global_latents: list[str] | None) -> None:
    """Refuses mini-batches where data do not stand alone."""
    if per_datum:
        raise ProgramError(
            f"'{per_datum}' has a posterior or parameter for each datum, which mini-batches of "
            f"{batch_size} would share at random; pass batch_size=None, or amortise the guide"
        )
    if global_latents is not None:
        raise ProgramError(
            f"mini-batches of {batch_size} would count the global latents {global_latents} once a "
            "batch; pass batch_size=None, or subsample inside the model with pyro.plate(..., "
            "subsample_size=...)"
        )


def check_held_out(prepared: Preparation, validation: Any) -> Any:
    """Refuses held-out data that the guide cannot speak of; returns as many as a trial needs.

    Raises:
        ValueError: If they are empty.
        ProgramError: If the guide has values for each training datum.
    """
    length = prepared.length_of(validation)
    if length == 0:
        raise ValueError("the validation data are empty; pass validation=None or some data")
    if prepared.per_datum:
        raise ProgramError(
            f"'{prepared.per_datum}' has a posterior or parameter for each training datum, so the "
            "guide says nothing of held-out data; amortise it, or pass validation=None"
        )
    if prepared.joint:
        return validation
    return map_batch(validation, take(slice(_DEFAULT_BATCH)), prepared.data.axes)
