"""What `fit` must know of data and programs before the first step, found by running them.

`prepare` tells latents and parameters of each datum from global ones, and chooses the mini-batch
accordingly.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_vae.inference.estimators import Objective
from pyro_vae.inference.programs import (
    Arguments,
    Axes,
    FirstRun,
    JointOnlyError,
    NoParametersError,
    Pair,
    Program,
    ProgramError,
    ProgramStructure,
    SupportError,
    as_arguments,
    batch_axes,
    batch_length,
    check_parameters,
    count_data,
    first_run,
    ieee_precision,
    keep_random_state,
    site_log_prob,
    tensors_of,
    weighted_sites,
)
from pyro_vae.inference.svi.mini_batches import (
    MiniBatches,
    TrainingData,
    check_loss,
    data_plates,
    find_mini_batches,
    takes_parts,
)
from pyro_vae.progress import say

__all__ = [
    "Preparation",
    "prepare",
]

_DEFAULT_BATCH = 128


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
        mini_batches: How a part of the data is given to programs whose data share latents, have
            parameters of their own or lie in a plate of stated size; None elsewhere.
        max_plate_nesting: For the loss.
        data: The training data, which know along which axes they lie.
        modules: Those that run, however the programs reach them.
        foreign: Names of the caller's parameters that these programs do not use.
        loss: As asked for, or chosen.
    """

    structure: ProgramStructure | None
    joint: bool
    batch_size: int
    per_datum: str
    fixed: bool
    subsampled: Any
    mini_batches: MiniBatches | None
    max_plate_nesting: int
    data: TrainingData
    modules: tuple[nn.Module, ...]
    foreign: frozenset[str]
    loss: ELBO

    @property
    def takes_some(self) -> bool:
        """Whether the bound of some data can be had without that of all."""
        return self.structure is not None and not (self.joint or self.per_datum or self.fixed)

    def length_of(self, x: Any) -> int:
        """How many data there are in such data as those of the training."""
        cut = any(axis is not None for axis in self.data.axes)
        return batch_length(x, self.data.axes) if cut else self.data.length

    def num_data(self, seen: int, *, evaluated: bool = False) -> int:
        """How many data a loss speaks for: the plate of a mini-batch, not of an evaluation, scales.

        A plate that the programs subsample themselves scales in both.
        """
        if self.mini_batches is not None and (self.mini_batches.plates or not self.subsampled):
            return seen if evaluated else self.mini_batches.num_data
        return self.subsampled.full_size if self.subsampled is not None else seen

    def on(self, index: Tensor | None, num_data: int | None = None) -> AbstractContextManager[None]:
        """Inside, plates hold the data at `index`, out of so many; all of them if None."""
        if self.mini_batches is None:
            return nullcontext()
        return self.mini_batches.on(
            torch.arange(num_data or self.data.length) if index is None else index, num_data
        )


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
    loss: ELBO | None,
    batch_size: int | None,
    warmup_epochs: int,
) -> Preparation:
    """Runs the programs on some of the data and says how they can be trained.

    Parameters that the programs make when they first run are from then on in the parameter store.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        data: The training data.
        loss: The objective; None for Pyro's ELBO, which sums out what the guide leaves to it.
        batch_size: As asked for; None to choose it.
        warmup_epochs: As for `fit`.

    Raises:
        ProgramError: If SVI would train the programs in part or not at all, observed data lie off
            their support, mini-batches were asked for where data do not stand alone, or KL warm-up
            where latents are summed out.
    """
    foreign = frozenset(pyro.get_param_store().keys())
    with _running_modules() as modules:  # training mode would move what evaluation may not
        runs = _Runs(model, guide, data)
        _locate_data(runs, batch_size)
        rows, per_datum, fixed = _rows_to_inspect(runs, batch_size)
        loss = loss if loss is not None else _default_loss(runs.at(rows))
        used = _check_parameters(runs, rows, isinstance(loss, TraceEnum_ELBO | Objective))
        structure, joint, _ = runs.inspect(rows)
        plates = _look_at_plates(runs, batch_size)
        if plates.subsampled and rows < data.length and batch_size in (None, data.length):
            # N/B is that of all the data, which such a program cuts itself
            structure, joint, _ = runs.inspect(data.length)
            plates = _look_at_plates(runs, data.length)
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
        mini_batches = None
        if batch_size < data.length and (whole or subsampled):
            check_loss(loss, plates.global_latents)
            mini_batches = _find_mini_batches(runs, batch_size)
            per_datum = per_datum or next(iter(mini_batches.row_axes), "")
            if subsampled and mini_batches.plates:  # all data can be had after all
                structure, joint, _ = runs.inspect(data.length)
    return Preparation(
        structure=structure,
        joint=joint,
        batch_size=batch_size,
        per_datum=per_datum,
        fixed=fixed,
        subsampled=subsampled,
        mini_batches=mini_batches,
        max_plate_nesting=_max_plate_nesting(loss, plates.depth),
        data=data,
        modules=tuple(modules),
        foreign=foreign - set(used),
        loss=loss,
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


class _Runs:
    """Runs of the programs on the first rows of the data, each of which is made once.

    They leave no parameters behind: what a run adds to the store is put there by `keep`.
    """

    def __init__(self, model: Program, guide: Program, data: TrainingData) -> None:
        self.model, self.guide, self.data = model, guide, data
        self._seen: dict[int, tuple[FirstRun, dict[str, Any]] | None] = {}
        self._first: dict[int, Any] = {}
        self.mini_batches: MiniBatches | None = None

    def forget(self) -> None:
        """Drops what was seen: the data are cut along other axes now."""
        self._seen.clear()
        self._first.clear()

    def first(self, rows: int) -> Any:
        """The first rows, the same tensors each time: inspection knows them by where they lie."""
        if rows not in self._first:
            self._first[rows] = self.data.first(rows, stream=2)
        return self._first[rows]

    def arguments(self, rows: int) -> Arguments:
        """The first rows, as the programs take them."""
        return as_arguments(self.first(rows))

    def at(self, rows: int) -> FirstRun | None:
        """A run with gradients; None where the programs take another number of data."""
        if rows not in self._seen:
            store = pyro.get_param_store()
            with (
                store.scope(store.get_state()),
                keep_random_state(),
                ieee_precision(),
                self.on(rows),
            ):
                try:
                    with torch.enable_grad():
                        run = first_run(self.model, self.guide, self.arguments(rows))
                        for trace in run.traces:
                            for site in weighted_sites(trace).values():
                                site_log_prob(site)
                    self._seen[rows] = run, store.get_state()
                except Exception:  # a fault of another kind shows again where it can be said
                    self._seen[rows] = None
        found = self._seen[rows]
        return None if found is None else found[0]

    def on(self, rows: int) -> AbstractContextManager[None]:
        """Plates hold the first rows inside, where they are to be given them."""
        if self.mini_batches is None:
            return nullcontext()
        return self.mini_batches.on(torch.arange(rows))

    def keep(self, rows: int) -> FirstRun | None:
        """The same, and its parameters are from now on in the store."""
        run = self.at(rows)
        found = self._seen[rows]
        if found is not None:
            pyro.get_param_store().set_state(found[1])
        return run

    def counts(self, rows: int) -> list[tuple[int, int]]:
        """What `count_data` says of the first rows; nothing where the model fails on them.

        Automatic guides are not run for it: they take the size of what they first see.
        """
        if not _is_automatic(self.guide) and (run := self.at(rows)) is not None:
            return count_data(run.traces[1])
        args, kwargs = self.arguments(rows)
        store = pyro.get_param_store()
        with store.scope(store.get_state()), torch.no_grad(), keep_random_state():
            try:
                return count_data(poutine.trace(self.model).get_trace(*args, **kwargs))
            except Exception:  # a fault of another kind shows again on all data
                return []

    def inspect(self, rows: int) -> tuple[ProgramStructure | None, bool, ProgramError | None]:
        """How log weights can be had: per datum, jointly (global latents), or not at all.

        Returns:
            The structure, if there is one; whether it is a joint one; why there are no weights per
            datum.
        """
        refusal: ProgramError | None = None
        x, run = self.first(rows), self.at(rows)
        for joint in (False, True):
            try:
                with self.on(rows):
                    found = Pair.inspect(
                        self.model, self.guide, x, joint=joint, num_particles=1, run=run
                    )
                return found.structure, joint, refusal
            except SupportError:
                raise
            except ProgramError as error:
                refusal = refusal or error
        return None, False, refusal


def _check_parameters(runs: _Runs, rows: int, enumerates: bool) -> list[str]:
    """The names of the parameters that will be trained, which are then in the store."""
    arguments, run = runs.arguments(rows), runs.keep(rows)
    try:
        return check_parameters(runs.model, runs.guide, arguments, enumerates, run)
    except NoParametersError as error:  # often the least of the pair's faults
        _, _, refusal = runs.inspect(rows)
        if refusal is None:
            raise
        fault = refusal.reason if isinstance(refusal, JointOnlyError) else refusal
        raise NoParametersError(f"{fault}; besides, {error}") from error


def _locate_data(runs: _Runs, batch_size: int | None) -> None:
    """Finds how many data there are, and their axes, from the size of the model's batch plate.

    A run on a few along the first axis tells nearly always: its plate has their number.
    """
    data = runs.data
    others = {size for tensor in tensors_of(data.x) for size in tensor.shape[1:]}
    few = _few(data, batch_size)
    while few in others and few > 1:  # a plate of that size may be one of another axis
        few -= 1
    if _sees(runs, few):
        return
    counts = [size for size, _ in runs.counts(data.length)]
    if not counts:  # no plate says it, or the fault shows in a moment
        return
    size = data.length if data.length in counts else counts[0]
    uncut: Axes = (None,) * len(data.axes)
    for axes in (*batch_axes(data.x, size), uncut):
        data.axes, data.length = axes, size
        runs.forget()
        part = min(_few(data, batch_size), size - 1)
        if part > 0 and axes != uncut and _sees(runs, part):
            return


def _sees(runs: _Runs, rows: int) -> bool:
    """Whether the model's plate has the size of the part of the data that it is given."""
    return any(rows in counts for counts in runs.counts(rows))


def _rows_to_inspect(runs: _Runs, batch_size: int | None) -> tuple[int, str, bool]:
    """How many data to look at: a mini-batch, or all where programs depend on how many there are.

    Returns:
        The number; the name of a parameter with a value for each datum, or ""; whether the
        programs take all data and no fewer.
    """
    data = runs.data
    if not any(axis is not None for axis in data.axes):
        return data.length, "", True
    if _is_automatic(runs.guide):  # makes its parameters when it first runs
        return data.length, "", False
    if data.length == 1:
        return 1, "", False
    few = _few(data, batch_size)
    run = runs.at(few)
    if run is None:
        return data.length, "", True
    shapes = _shapes(run)
    if any(_may_count(size, few) for shape in shapes.values() for size in shape):
        other = runs.at(few - 1 or 2)
        others = shapes if other is None else _shapes(other)
        for name, shape in shapes.items():
            if others.get(name, shape) != shape:
                return data.length, name, False
        if few == data.length:
            return few, "", other is None
    if few < data.length and (long := [n for n, s in shapes.items() if data.length in s]):
        x = runs.first(data.length)
        if not takes_parts(runs.model, runs.guide, x, data.axes, data.length, few):
            return data.length, long[0], False
    return few, "", False


def _shapes(run: FirstRun) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in run.parameters.items()}


def _may_count(size: int, rows: int) -> bool:
    """Whether a dim of this size may be there for the number of data."""
    return size % rows == 0 or abs(size - rows) == 1


def _look_at_plates(runs: _Runs, batch_size: int | None) -> _Plates:
    data = runs.data
    run = runs.at(_few(data, batch_size)) or runs.at(data.length)
    assert run is not None  # they ran a moment ago
    guide_sites, sites = map(weighted_sites, run.traces)
    both = guide_sites | sites
    frames = {
        name: {f.name: f for f in site["cond_indep_stack"] if f.vectorized}
        for name, site in both.items()
    }
    around = data_plates(run.traces)
    batch = {frame.name for frame in around}
    latents = [n for n, s in sites.items() if n in guide_sites and not s["is_observed"]]
    return _Plates(
        global_latents=[name for name in latents if not batch & set(frames[name])],
        latents=latents,
        data_plates=around,
        depth=max((-f.dim for stack in frames.values() for f in stack.values()), default=0),
        enumerates=any(site["infer"].get("enumerate") for site in both.values()),
    )


def _default_loss(run: FirstRun | None) -> ELBO:
    """The ELBO that sums over the latents marked for it that the guide does not sample."""
    if run is None:
        return Trace_ELBO()
    guide_sites, model_sites = map(weighted_sites, run.traces)
    summed = [
        name
        for name, site in model_sites.items()
        if site["infer"].get("enumerate") and not site["is_observed"] and name not in guide_sites
    ]
    if not summed:
        return Trace_ELBO()
    say(f"loss: TraceEnum_ELBO(), which sums over {', '.join(summed)}")
    return TraceEnum_ELBO()


def _max_plate_nesting(loss: ELBO, depth: int) -> int:
    """What the loss was given, or what was seen: Pyro's own guess would draw random numbers."""
    if not math.isinf(loss.max_plate_nesting):
        return loss.max_plate_nesting
    return depth + int(loss.vectorize_particles and loss.num_particles > 1)


def _find_mini_batches(runs: _Runs, batch_size: int) -> MiniBatches:
    """How mini-batches are given to programs that cannot be given the rows alone."""
    data = runs.data
    run = runs.at(data.length)
    traces = run.traces if run is not None else None
    found, reason = find_mini_batches(
        runs.model, runs.guide, runs.first(data.length), traces, data.length, batch_size
    )
    if found is None:
        plate = next((f.name for f in data_plates(traces)), "data") if traces else "data"
        raise ProgramError(
            f"there are no mini-batches of {batch_size} for these programs ({reason}); write `with "
            f"pyro.plate('{plate}', {data.length}) as rows:` around what belongs to a datum, in "
            "model and guide alike, take values of each datum as loc[rows], or pass batch_size=None"
        )
    data.axes, data.whole = found.axes, found.whole
    runs.mini_batches = found
    runs.forget()
    return found
