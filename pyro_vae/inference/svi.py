r"""The one training loop: `fit`, on `pyro.infer.SVI`, without its silent traps.

Pyro trains nothing, without a word, when a module was never registered or another program holds
its name, warns only when the guide lacks a latent, and goes on from a loss of NaN. `fit` runs SVI
in a parameter store of its own, gives each module its own names, and raises in these cases.
"""

import copy
import json
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import (
    ELBO,
    SVI,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoGuide
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_vae.inference.checkpoint import CheckpointError, holds_run, load_tensors, write_run
from pyro_vae.inference.inspection import check_module_names, check_parameters, inspect_programs
from pyro_vae.inference.optimizer import TrainingError, make_optimizer
from pyro_vae.inference.programs import (
    Arguments,
    FittedProgram,
    Program,
    ProgramError,
    ProgramStructure,
    as_arguments,
    batch_length,
    common_owner,
    evaluation_mode,
    keep_random_state,
    map_batch,
    modules_of,
    program_scope,
    run_programs,
    trace_programs,
    unwrap_programs,
    weighted_sites,
)
from pyro_vae.results import Result, label, make_result, sha256_of

__all__ = ["Fit", "FittedProgram", "TrainingError", "fit"]

_EVALUATION_DATA = 1000  # training data on which the bound is measured after an epoch
_DEFAULT_BATCH = 128
_MUST_AGREE = (  # what a resumed run may not change, as config.json has it
    "loss",
    "num_particles",
    "optimizer",
    "learning_rate",
    "optimizer_arguments",
    "batch_size",
    "seed",
    "warmup_epochs",
    "num_data",
    "data_sha256",
    "dtype",
)
_ANNEALABLE = (Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO)


@dataclass(frozen=True, repr=False)
class Fit:
    """What `fit` reached.

    Attributes:
        model: The model with the fitted parameters in place, ready for every tool.
        guide: The guide, likewise.
        history: A row an epoch, dimension `epoch`; see `fit`.
        config: How it was trained, as JSON can hold it.
        parameters: Fitted values by name, in the space users see (constrained), detached.
        status: "finished", "stopped early" or "interrupted".
    """

    model: FittedProgram
    guide: FittedProgram
    history: Result
    config: dict[str, Any]
    parameters: dict[str, Tensor]
    status: Literal["finished", "stopped early", "interrupted"]

    def summary(self) -> str:
        """One sentence: how long it trained and which bound it reached."""
        count = sum(value.numel() for value in self.parameters.values())
        if not self.history.sizes["epoch"]:
            return f"fit {self.status} before its first epoch ended; {count:,} parameters"
        last = self.history.isel(epoch=-1)
        text = f"fit {self.status} after {int(last.epoch)} epochs, {float(last.seconds):.1f} s"
        row = self.history.isel(epoch=self._reached())
        for name in ("bound", "validation_bound"):
            if name in row:
                spread = f" +- {float(row[name + '_se']):.2f}" if name + "_se" in row else ""
                text += f"; {name.replace('_', ' ')} {float(row[name]):.2f}{spread} nats per datum"
        if int(row.epoch) != int(last.epoch):
            text += f" (back to epoch {int(row.epoch)})"
        return f"{text}; {count:,} parameters"

    def _reached(self) -> int:
        """The row of the history that speaks of the parameters."""
        if self.config["fit"]["patience"] is None or self.status == "interrupted":
            return -1
        return _best_row(self.history.validation_bound.values.tolist())

    def __repr__(self) -> str:
        return f"<{self.summary()}>"


def fit(
    model: Program,
    guide: Program,
    x: Any,
    *,
    loss: ELBO | None = None,
    optimizer: PyroOptim | Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
    learning_rate: float | Callable[[int], float] = 1e-3,
    epochs: int = 100,
    batch_size: int | None = None,
    seed: int = 0,
    validation: Any = None,
    evaluate_every: int = 1,
    patience: int | None = None,
    warmup_epochs: int = 0,
    transform: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    device: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Fit:
    r"""Trains a model and its guide by stochastic variational inference.

    Each row of the history has: `loss` (mean over the epoch of what was minimised), `bound` (the
    ELBO of up to 1000 training data, the same data and the same draws after every epoch),
    `reconstruction` and `kl` (its two parts, E log p(x|z) and E log q(z|x) - log p(z)), `bound_se`,
    the same for the held-out data as `validation_*`, `seconds` and `data_passes`. All are nats per
    datum. Where latents are summed out of the model the parts are absent. For a guide without a
    density (a `Delta`), and where log weights cannot be had, `bound` is the negative loss, is
    labelled an objective, and the parts and `bound_se` are absent.

    Args:
        model: The generative program, called as `model(x)`.
        guide: The program of the approximate posterior.
        x: The data; a tuple for several arguments, a dict for keywords. Tensors as long as the
            first are cut into mini-batches together.
        loss: Any Pyro ELBO, Pyro's own or ours; `Trace_ELBO()` if None.
        optimizer: A function from parameters to a torch optimizer
            (`functools.partial(torch.optim.SGD, lr=0.1)`), or a `PyroOptim`. If None, one fused
            Adam.
        learning_rate: For the default optimizer, or for each epoch (counted from 0) if it is a
            function.
        epochs: Passes over the data.
        batch_size: Data in a mini-batch. None means 128 where every latent belongs to a datum and
            the guide is amortised, else all data at once.
        seed: Seeds initial draws, shuffling and particles; the caller's random state is left alone.
        validation: Held-out data as the model takes them: `transform` is not applied.
        evaluate_every: Epochs between rows of the history.
        patience: Stops when the validation bound has not risen for so many evaluations; at the end
            the best parameters are put back.
        warmup_epochs: Epochs over which the weight of the KL term rises from 0 to 1 (Bowman et al.
            2016); ELBOs only.
        transform: Applied to the first tensor of each mini-batch with a generator, such as dynamic
            binarisation.
        device: Where modules and data are moved first; None leaves them.
        checkpoint: A run folder, written every `checkpoint_every` epochs, at the end and on Ctrl-C.
            One that holds a run already is refused unless `resume` is set.
        checkpoint_every: Epochs between checkpoints.
        resume: Goes on from `checkpoint`, to `epochs` in all. Random numbers that programs take
            from NumPy or `random` are not part of it; those of torch are.
        config: Further facts for the run folder's `config.json` (such as the name of the data).
        progress: Shows a bar where stderr is a terminal.

    Returns:
        The fitted programs and the history. Modules that were passed in have their weights updated
        as well. Ctrl-C ends training after the step at hand and returns what was reached (`status`
        "interrupted"); a second Ctrl-C ends it at once, without writing to `checkpoint`.

    Raises:
        ProgramError: If a parameter that the programs use was never registered, a latent of the
            model is missing from the guide, or mini-batches were asked for a model with global
            latents or a guide with parameters for each datum.
        TrainingError: If the loss or a gradient is not finite.
        ValueError: If an argument is out of its range.
        CheckpointError: If `resume` finds no run to go on from, or another than this one; or if
            `checkpoint` holds a run and `resume` is not set.
    """
    _check_numbers(
        epochs=epochs,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        batch_size=batch_size,
        patience=patience,
    )
    _check_arguments(loss, learning_rate, seed, warmup_epochs, config)
    if patience is not None and validation is None:
        raise ValueError("patience watches the validation bound; pass validation=held_out_data")
    if isinstance(optimizer, PyroOptim) and callable(learning_rate):
        raise ValueError(
            "a learning-rate function needs a torch optimizer; pass optimizer=None or a function "
            "of parameters"
        )
    folder = _check_folder(checkpoint, resume, optimizer)
    if warmup_epochs > epochs:
        warnings.warn(
            f"KL warm-up of {warmup_epochs} epochs is longer than training ({epochs}): the full "
            "bound is never optimised",
            stacklevel=2,
        )
    start, model, guide = unwrap_programs(model, guide)
    if device is not None:
        for program in (model, guide):
            for module in modules_of(program):
                module.to(device)
        x, validation = _to_device(x, device), _to_device(validation, device)
    check_module_names(model, guide)
    with program_scope(seed), torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not registered .* because requires_grad=False")
        warnings.filterwarnings("ignore", "Encountered (NaN|.?inf): loss")  # raised as our own
        store = pyro.get_param_store()
        own = {
            name: value.detach().clone().requires_grad_()
            for name, value in store.get_state()["params"].items()
        }
        store.set_state({"params": own, "constraints": store.get_state()["constraints"]})
        store.set_state(start)
        run = _Run(
            model=model,
            guide=guide,
            data=_Data(x, transform, seed),
            validation=validation,
            given_loss=loss,
            optimizer=optimizer,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            epochs=epochs,
            evaluate_every=evaluate_every,
            patience=patience,
            warmup_epochs=warmup_epochs,
            checkpoint=folder,
            checkpoint_every=checkpoint_every,
            config=dict(config or {}),
        )
        if resume:
            run.load()
        run.train(progress)
        return run.result()


# --- the loop -------------------------------------------------------------------------------------


@dataclass
class _State:
    """What changes while training, apart from tensors; JSON can hold it."""

    epoch: int = 0
    position: int = 0
    loss_sum: float = 0.0
    loss_data: int = 0
    seconds: float = 0.0
    best: float | None = None
    stale: int = 0
    status: Literal["finished", "stopped early", "interrupted"] = "interrupted"
    history: list[dict[str, Any]] = field(default_factory=list)


class _Data:
    """Data held in memory, shuffled by a generator of its own."""

    def __init__(self, x: Any, transform: Any, seed: int) -> None:
        self.x, self.length, self.transform = x, batch_length(x), transform
        if self.length == 0:
            raise ValueError("there are no data to fit: the first tensor of x has length 0")
        self.seed = seed
        self.shuffler = torch.Generator().manual_seed(_stream_seed(seed, 0))
        self.noise = self.generator(1)

    def generator(self, stream: int) -> torch.Generator:
        """A source of randomness where the data lie, independent of the others of this run."""
        args, kwargs = as_arguments(self.x)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        device = tensors[0].device if tensors else "cpu"
        return torch.Generator(device=device).manual_seed(_stream_seed(self.seed, stream))

    def first(self, rows: int, stream: int) -> Any:
        """The first rows, with draws of their own that are the same each time."""
        index = torch.arange(rows) if rows < self.length else None
        return self.batch(index, self.generator(stream))

    def batch(self, index: Tensor | None, noise: torch.Generator | None = None) -> Any:
        """The data at `index` (all if None), in the form of `x`, transformed."""
        x = self.x if index is None else map_batch(self.x, lambda a: a[index.to(a.device)])
        if self.transform is None:
            return x
        todo = [self.transform]  # for the first tensor alone
        return map_batch(x, lambda a: todo.pop()(a, noise or self.noise) if todo else a)


def _stream_seed(seed: int, stream: int) -> int:
    return int(np.random.SeedSequence((seed, stream)).generate_state(1)[0])


def _to_device(x: Any, device: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(_to_device(a, device) for a in x)
    if isinstance(x, Mapping):
        return {name: _to_device(a, device) for name, a in x.items()}
    return x.to(device) if isinstance(x, Tensor) else x


@dataclass
class _Run:
    """One call of `fit`: set up, train, and hand over."""

    model: Program
    guide: Program
    data: _Data
    validation: Any
    given_loss: ELBO | None
    optimizer: Any
    learning_rate: float | Callable[[int], float]
    batch_size: int | None
    seed: int
    epochs: int
    evaluate_every: int
    patience: int | None
    warmup_epochs: int
    checkpoint: Path | None
    checkpoint_every: int
    config: dict[str, Any]

    def __post_init__(self) -> None:
        self.state = _State()
        self.order: Tensor | None = None
        self.best_values: dict[str, Tensor] = {}
        self.loss = copy.copy(self.given_loss) if self.given_loss is not None else Trace_ELBO()
        enumerates = isinstance(self.loss, TraceEnum_ELBO)
        foreign = set(pyro.get_param_store().keys())
        with _running_modules() as modules:  # training mode would move what evaluation may not
            rows = self._rows_to_inspect()
            probe = as_arguments(self.data.first(rows, stream=2))
            used = check_parameters(self.model, self.guide, probe, enumerates)
            self.foreign = foreign - set(used)
            self.structure, self.joint = self._inspect(probe)
            self._look_at_plates()
        self.modules = list(modules)
        self._choose_batch_size()
        self.optim = make_optimizer(self.optimizer, self.learning_rate)
        self.optim.add(self._parameters().values())
        for parameter in self._parameters().values():
            parameter.grad = None  # SVI would add to what a caller left there
        guarded = _refuse_infinite(self.loss.loss_and_grads)
        self.svi = SVI(
            self.model, self.guide, self.optim, loss=self.loss.loss, loss_and_grads=guarded
        )
        if self.validation is not None:
            self._check_validation()
        self.data_sha256 = _data_sha256(self.data.x)

    def _rows_to_inspect(self) -> int:
        """As many data as a mini-batch has; all where parameters depend on how many there are."""
        length = self.data.length
        few = min(self.batch_size or _DEFAULT_BATCH, length)
        self.per_datum = ""  # the name of a parameter with a value for each datum
        self.fixed = False  # whether the programs take all data and no fewer
        if isinstance(self.guide, AutoGuide):  # makes its parameters when it first runs
            return length
        if length == 1:
            return 1
        shapes, others = (self._parameter_shapes(rows) for rows in (few, few - 1 or 2))
        if shapes is None or (few == length and others is None):
            self.fixed = self.batch_size in (None, length)
            return length if self.fixed else few
        if others is not None:
            differ = [name for name, shape in shapes.items() if others.get(name, shape) != shape]
            self.per_datum = differ[0] if differ else ""
        return length if self.per_datum else few

    def _parameter_shapes(self, rows: int) -> dict[str, torch.Size] | None:
        """Shapes of the parameters where programs see so many data; None where they cannot."""
        store = pyro.get_param_store()
        with store.scope(store.get_state()), poutine.trace(param_only=True) as params:
            if self._traces(rows) is None:
                return None
        return {name: site["value"].shape for name, site in params.trace.nodes.items()}

    def _traces(self, rows: int) -> tuple[poutine.Trace, poutine.Trace] | None:
        """The programs' traces on the first rows; None where they take another number of them."""
        arguments = as_arguments(self.data.first(rows, stream=2))
        with torch.no_grad(), keep_random_state():
            try:
                traces = trace_programs(self.model, self.guide, arguments)
                for trace in traces:
                    trace.compute_log_prob()
            except Exception:  # a fault of another kind shows again on all data
                return None
        return traces

    def _inspect(self, probe: Arguments) -> tuple[ProgramStructure | None, bool]:
        """How log weights can be had: per datum, jointly (global latents), or not at all."""
        for joint in (False, True):
            try:
                return inspect_programs(
                    self.model, self.guide, probe, joint=joint, num_particles=1
                ), joint
            except ProgramError as error:
                if "support" in str(error):
                    raise
        return None, False

    def _look_at_plates(self) -> None:
        """Which latents are global, how many data the loss speaks for, and its plate nesting."""
        traces = self._traces(min(self.batch_size or _DEFAULT_BATCH, self.data.length))
        traces = traces or self._traces(self.data.length)
        assert traces is not None  # they ran a moment ago
        guide_sites, sites = (weighted_sites(trace) for trace in traces)
        frames = {
            name: {f.name: f for f in site["cond_indep_stack"] if f.vectorized}
            for name, site in (guide_sites | sites).items()
        }
        observed = [frames[name] for name, site in sites.items() if site["is_observed"]]
        batch = set(observed[0]).intersection(*observed) if observed else set()
        latents = [n for n, s in sites.items() if n in guide_sites and not s["is_observed"]]
        self.globals = [name for name in latents if not batch & set(frames[name])]
        self.has_plate = bool(batch)
        plates = [observed[0][name] for name in batch]
        self.subsampled = next((f for f in plates if f.full_size not in (None, f.size)), None)
        if isinstance(self.guide, AutoGuide) and len(self.globals) < len(latents):
            self.per_datum = next(name for name in latents if name not in self.globals)
        if math.isinf(self.loss.max_plate_nesting):  # Pyro's own guess would draw random numbers
            depths = [-f.dim for stack in frames.values() for f in stack.values()]
            particles = self.loss.vectorize_particles and self.loss.num_particles > 1
            self.loss.max_plate_nesting = max(depths, default=0) + int(particles)
        enumerated = any(site["infer"].get("enumerate") for site in (guide_sites | sites).values())
        if self.warmup_epochs and enumerated and isinstance(self.loss, TraceEnum_ELBO):
            raise ProgramError(
                "KL warm-up scales latent sites, which has no meaning for those that are summed "
                "out; pass warmup_epochs=0"
            )

    def _choose_batch_size(self) -> None:
        length = self.data.length
        whole = self.joint or self.globals or self.per_datum or self.fixed or not self.has_plate
        if self.batch_size is None:
            self.batch_size = length if whole or self.subsampled else _DEFAULT_BATCH
        self.batch_size = min(self.batch_size, length)
        if self.batch_size == length or self.subsampled:
            return
        if self.per_datum:
            raise ProgramError(
                f"'{self.per_datum}' has a posterior or parameter for each datum, which "
                f"mini-batches of {self.batch_size} would share at random; pass batch_size=None, "
                "or amortise the guide"
            )
        if self.joint or self.globals:
            names = self.globals or list(self.structure.latents if self.structure else ())
            raise ProgramError(
                f"mini-batches of {self.batch_size} would count the global latents {names} once a "
                "batch; pass batch_size=None, or subsample inside the model with "
                "pyro.plate(..., subsample_size=...)"
            )

    def _check_validation(self) -> None:
        """Held-out data that do not fit should not be found out after an epoch."""
        if batch_length(self.validation) == 0:
            raise ValueError("the validation data are empty; pass validation=None or some data")
        if self.per_datum:
            raise ProgramError(
                f"'{self.per_datum}' has a posterior or parameter for each training datum, so the "
                "guide says nothing of held-out data; amortise it, or pass validation=None"
            )
        few = min(batch_length(self.validation), _DEFAULT_BATCH)
        self._bound(
            self.validation if self.joint else map_batch(self.validation, lambda a: a[:few])
        )

    # -- training

    def train(self, progress: bool) -> None:
        state = self.state
        if state.status == "stopped early" or state.epoch >= self.epochs:
            state.status = "stopped early" if state.status == "stopped early" else "finished"
            self._go_back()
            return
        terminal = sys.stderr is not None and sys.stderr.isatty()
        bar = tqdm(
            total=self.epochs,
            initial=state.epoch,
            unit="epoch",
            disable=not (progress and terminal),
            leave=False,
        )
        state.status = "interrupted"
        with bar, _deferred_interrupt() as interrupted:
            try:
                while state.status == "interrupted" and self._epoch(interrupted):
                    bar.update()
                    self._show(bar)
                    if self.patience is not None and state.stale >= self.patience:
                        state.status = "stopped early"
                    elif state.epoch == self.epochs:
                        state.status = "finished"
                    elif state.epoch % self.checkpoint_every == 0:
                        self.save(self._training_tensors() if self.checkpoint else {})
            except KeyboardInterrupt:  # in the middle of a step, which no file should hold
                return
            tensors = self._training_tensors() if self.checkpoint else {}
            self._go_back()
            self.save(tensors)

    def _go_back(self) -> None:
        """Puts the best parameters back at the end."""
        if self.patience is not None and self.best_values and self.state.status != "interrupted":
            self._set_values(self.best_values)

    def _epoch(self, interrupted: Callable[[], bool]) -> bool:
        """Trains to the end of the epoch at hand; False if Ctrl-C came first."""
        state, length, size = self.state, self.data.length, self.batch_size
        assert size is not None
        steps = math.ceil(length / size)
        if self.order is None:
            self.order = torch.randperm(length, generator=self.data.shuffler)
        if callable(self.learning_rate):
            self.optim.set_learning_rate(self.learning_rate(state.epoch))
        with nullcontext() if state.epoch == 0 else _without_validation():
            while state.position < steps:
                started = time.perf_counter()
                index = self.order[state.position * size : (state.position + 1) * size]
                args, kwargs = as_arguments(self.data.batch(index if size < length else None))
                with self._annealing(state.epoch + state.position / steps):
                    loss = self.svi.step(*args, **kwargs)
                share = len(index) / self._num_data(len(index))
                state.loss_sum += (loss[0] if isinstance(loss, tuple) else loss) * share
                state.loss_data += len(index)
                state.position += 1
                state.seconds += time.perf_counter() - started
                if interrupted():
                    return False
        state.epoch, state.position, self.order = state.epoch + 1, 0, None
        if state.epoch % self.evaluate_every == 0 or state.epoch == self.epochs:
            self._evaluate()
        return True

    def _num_data(self, seen: int) -> int:
        """How many data the loss of a batch speaks for: a subsampled plate scales it to all."""
        return self.subsampled.full_size if self.subsampled is not None else seen

    def _annealing(self, epoch: float) -> Any:
        if epoch >= self.warmup_epochs:
            return nullcontext()
        return _ScaledLatents(max(epoch / self.warmup_epochs, 1e-3))

    def _show(self, bar: Any) -> None:
        if not bar.disable and self.state.history:
            row = self.state.history[-1]
            rate = self.data.length * self.state.epoch / max(self.state.seconds, 1e-9)
            shown = {"bound": f"{row['bound']:.2f}", "data/s": f"{rate:.3g}"}
            if "validation_bound" in row:
                shown["held out"] = f"{row['validation_bound']:.2f}"
            bar.set_postfix(shown)

    # -- evaluation, which moves nothing

    def _evaluate(self) -> None:
        state = self.state
        passes = float(state.epoch)
        if self.subsampled is not None and self.batch_size == self.data.length:
            passes *= self.subsampled.size / self.subsampled.full_size
        row: dict[str, Any] = {
            "epoch": state.epoch,
            "seconds": state.seconds,
            "data_passes": passes,
            "loss": state.loss_sum / max(state.loss_data, 1),
        }
        state.loss_sum, state.loss_data = 0.0, 0
        some = self.structure is not None and not (self.joint or self.per_datum or self.fixed)
        rows = min(self.data.length, _EVALUATION_DATA) if some else self.data.length
        row |= self._bound(self.data.first(rows, stream=3))
        row["measure"] = self.structure.measure if self.structure is not None else "mixed"
        if self.validation is not None:
            held_out = self._bound(self.validation)
            row |= {f"validation_{name}": value for name, value in held_out.items()}
            if state.best is None or held_out["bound"] > state.best:
                state.best, state.stale = held_out["bound"], 0
                if self.patience is not None:
                    self.best_values = {n: v.detach().clone() for n, v in self._values().items()}
            else:
                state.stale += 1
        state.history.append(row)

    def _bound(self, x: Any) -> dict[str, float]:
        """The ELBO per datum by one particle, its parts and its standard error over data."""
        arguments = as_arguments(x)
        length = batch_length(x)
        evaluation = evaluation_mode(self.model, self.guide, *self.modules)
        with torch.no_grad(), keep_random_state(), evaluation:
            pyro.set_rng_seed(self.seed)
            if self.structure is None:
                value = self.loss.loss(self.model, self.guide, *arguments[0], **arguments[1])
                value = value[0] if isinstance(value, tuple) else value
                return {"bound": -float(value) / self._num_data(length)}
            log_p, log_q, parts = run_programs(self.model, self.guide, arguments, self.structure, 1)
            per = 1.0 if not self.joint else 1.0 / length
            log_weights = (log_p - log_q)[0] * per
            found = {"bound": float(log_weights.mean())}
            if parts:
                found["reconstruction"] = float(parts["likelihood"].mean()) * per
                found["kl"] = float((log_q - parts["prior"]).mean()) * per
            if len(log_weights) > 1:
                found["bound_se"] = float(log_weights.std() / math.sqrt(len(log_weights)))
            return found

    # -- parameters and files

    def _parameters(self) -> dict[str, Tensor]:
        """Unconstrained parameters by name: the tensors that the optimizer moves."""
        named = pyro.get_param_store().named_parameters()
        return {name: value for name, value in named if name not in self.foreign}

    def _values(self) -> dict[str, Tensor]:
        """Parameters and the buffers of modules (running means): all that training moves."""
        buffers = {
            f"buffer.{place}.{name}": buffer
            for place, module in enumerate(self.modules)
            for name, buffer in module.named_buffers(recurse=False)
        }
        return {f"parameter.{name}": p for name, p in self._parameters().items()} | buffers

    @torch.no_grad()
    def _set_values(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self._values().items():
            value.copy_(values[name])

    def config_dict(self) -> dict[str, Any]:
        owner = common_owner(self.model, self.guide)
        described: dict[str, Any] = {
            "program": getattr(self.model, "__qualname__", type(self.model).__name__)
        }
        if owner is not None and hasattr(owner, "config"):
            described = {"class": type(owner).__name__, "arguments": owner.config}
        rate = self.learning_rate if self.optimizer is None else None  # an optimizer has its own
        return {
            "format": 1,
            "model": described,
            **self.config,
            "fit": {
                "loss": type(self.loss).__name__,
                "num_particles": self.loss.num_particles,
                "optimizer": self.optim.name,
                "learning_rate": "a function" if callable(self.learning_rate) else rate,
                "optimizer_arguments": self.optim.arguments,
                "epochs": self.epochs,
                "batch_size": self.batch_size,
                "seed": self.seed,
                "patience": self.patience,
                "warmup_epochs": self.warmup_epochs,
                "evaluate_every": self.evaluate_every,
                "num_data": self.data.length,
                "data_sha256": self.data_sha256,
                "num_threads": torch.get_num_threads(),
                "dtype": str(next(iter(self._parameters().values())).dtype).removeprefix("torch."),
            },
        }

    def _training_tensors(self) -> dict[str, Tensor]:
        """All that going on needs, copied."""
        parameters = self._parameters()
        tensors = self._values()
        tensors |= {f"best.{name}": value for name, value in self.best_values.items()}
        tensors |= {f"optimizer.{n}": value for n, value in self.optim.tensors(parameters).items()}
        tensors |= {
            "random.torch": torch.get_rng_state(),
            "random.shuffler": self.data.shuffler.get_state(),
            "random.noise": self.data.noise.get_state(),
        }
        if self.data.noise.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.data.noise.device)
        if self.order is not None:
            tensors["order"] = self.order
        return {name: value.detach().clone() for name, value in tensors.items()}

    def save(self, training: Mapping[str, Tensor]) -> None:
        if self.checkpoint is None:
            return
        owner = common_owner(self.model, self.guide)
        weights = (
            owner.state_dict()
            if owner is not None
            else {n: v for n, v in pyro.get_param_store().items() if n not in self.foreign}
        )
        rows = self.state.history
        best = self.patience is not None and self.state.status != "interrupted" and rows
        reached = _best_row([row["validation_bound"] for row in rows]) if best else -1
        write_run(
            self.checkpoint,
            config=self.config_dict(),
            weights=weights,
            training=training,
            state=asdict(self.state),
            history=rows,
            reached=rows[reached] if rows else None,
        )

    def load(self) -> None:
        assert self.checkpoint is not None
        tensors, metadata = load_tensors(self.checkpoint / "training.safetensors")
        config, mine = metadata.get("config", {}), json.loads(json.dumps(self.config_dict()))
        if config.get("format") != mine["format"] or "state" not in metadata:
            raise CheckpointError(
                f"{self.checkpoint}/training.safetensors is not of a run that this version of "
                "pyro_vae can go on with; start a new run in another folder"
            )
        for key in _MUST_AGREE:
            if config["fit"].get(key) != mine["fit"][key]:
                raise CheckpointError(
                    f"{self.checkpoint} was trained with {key} {config['fit'].get(key)!r}, not "
                    f"{mine['fit'][key]!r}; resume with the same setting, or start a new run in "
                    "another folder"
                )
        if config["fit"]["num_threads"] != mine["fit"]["num_threads"]:
            warnings.warn(
                f"resuming with {mine['fit']['num_threads']} threads what was begun with "
                f"{config['fit']['num_threads']}: the last bits of the result will differ from an "
                "uninterrupted run",
                stacklevel=3,
            )
        wanted = {name: tuple(value.shape) for name, value in self._values().items()}
        kinds = ("parameter.", "buffer.")
        saved = {n: tuple(t.shape) for n, t in tensors.items() if n.startswith(kinds)}
        if wanted != saved:
            raise CheckpointError(
                f"the parameters in {self.checkpoint} are not those of this model and guide; "
                "resume with the programs of that run"
            )
        self._set_values(tensors)
        self.best_values = _part(tensors, "best.")
        self.optim.restore(_part(tensors, "optimizer."), self._parameters())
        torch.set_rng_state(tensors["random.torch"])
        self.data.shuffler.set_state(tensors["random.shuffler"])
        if self.data.noise.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.data.noise.device)
            self.data.noise.set_state(tensors["random.noise"])
        elif self.data.noise.device.type == "cpu" and "random.cuda" not in tensors:
            self.data.noise.set_state(tensors["random.noise"])
        self.order = tensors.get("order")
        self.state = _State(**metadata["state"])
        if self.state.status == "stopped early" and self.epochs > config["fit"]["epochs"]:
            self.state.status, self.state.stale = "interrupted", 0  # asked to go on all the same

    def result(self) -> Fit:
        store = pyro.get_param_store()
        state = {
            part: {name: value for name, value in values.items() if name not in self.foreign}
            for part, values in store.get_state().items()
        }
        config = self.config_dict()
        values = {n: v.detach().clone() for n, v in store.items() if n not in self.foreign}
        for parameter in self._parameters().values():
            parameter.grad = None
        return Fit(
            model=FittedProgram(self.model, state),
            guide=FittedProgram(self.guide, state),
            history=_history(self.state.history, config, self.seed),
            config=config,
            parameters=values,
            status=self.state.status,
        )


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _best_row(bounds: list[float]) -> int:
    """The place of the highest; the first of equals, as `patience` counts them."""
    return max(range(len(bounds)), key=lambda i: -math.inf if math.isnan(bounds[i]) else bounds[i])


def _data_sha256(x: Any) -> str:
    args, kwargs = as_arguments(x)
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    return sha256_of(*tensors or [torch.empty(0)])  # a program may bring its data itself


def _history(rows: list[dict[str, Any]], config: dict[str, Any], seed: int) -> Result:
    """The rows as a labelled result with dimension `epoch`."""
    texts = {
        "loss": ("objective", "what was minimised, mean over the epoch; lower is better"),
        "bound": ("lower", "ELBO of the training data"),
        "reconstruction": ("objective", "E log p(x | z), the first part of the ELBO"),
        "kl": ("objective", "E log q(z | x) - log p(z), subtracted in the ELBO"),
    }
    measure = rows[-1]["measure"] if rows else "mixed"
    variables: dict[str, Any] = {}
    for name in rows[-1] if rows else ():
        values = [row.get(name, math.nan) for row in rows]
        base = name.removeprefix("validation_").removesuffix("_se")
        if name == "seconds":
            attrs = label(
                unit="seconds", reduction="none", bound="none", description="training time so far"
            )
            variables[name] = ("epoch", values, attrs)
        elif name == "data_passes":
            attrs = label(
                unit="none", reduction="none", bound="none", description="passes over the data"
            )
            variables[name] = ("epoch", values, attrs)
        elif base in texts:
            bound, description = texts[base]
            if base == "bound" and not {"kl", "bound_se"} & rows[-1].keys():
                bound, description = "objective", "the negative loss, which bounds nothing"
            held = " (held-out data)" if name.startswith("validation_") else ""
            attrs = label(
                bound=bound,
                measure=measure,
                num_particles=1,
                seed=seed,
                description=description + held,
            )
            variables[name] = ("epoch", values, attrs)
    return make_result(
        variables,
        function="fit",
        config=config,
        seed=seed,
        data_sha256=config["fit"]["data_sha256"],
        coords={"epoch": [row["epoch"] for row in rows]},
    )


# --- what runs around a step ----------------------------------------------------------------------


def _refuse_infinite(loss_and_grads: Callable[..., Any]) -> Callable[..., Any]:
    """Raises before the optimizer moves anything."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        loss = loss_and_grads(*args, **kwargs)
        for part in loss if isinstance(loss, tuple) else (loss,):
            if not math.isfinite(part):
                raise TrainingError(
                    f"the loss is {float(part)}; the parameters are those of the last good step. "
                    "Lower the learning rate, look for a scale that goes to 0, or for missing "
                    "values in the data"
                )
        return loss

    return guarded


class _ScaledLatents(Messenger):
    """Scales the latent sites of model and guide alike: the beta-ELBO E log p(x|z) - beta KL."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.beta


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


@contextmanager
def _without_validation() -> Iterator[None]:
    """Checks cost a quarter of a small step, and the first epoch has made them."""
    names = (
        "validate_distributions_pyro",
        "validate_distributions_torch",
        "validate_infer",
        "validate_poutine",
    )
    with pyro.settings.context(**dict.fromkeys(names, False)):
        yield


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Lets the step at hand end when Ctrl-C comes; a second Ctrl-C interrupts at once."""
    pressed = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    ours = threading.current_thread() is threading.main_thread()
    if not ours or before in (None, signal.SIG_IGN):  # a job in the background ignores Ctrl-C
        yield pressed.is_set
        return

    def handler(number: int, frame: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    signal.signal(signal.SIGINT, handler)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


# --- checks ---------------------------------------------------------------------------------------


def _check_numbers(**values: Any) -> None:
    for name, value in values.items():
        optional = name in ("batch_size", "patience")
        if value is None and optional:
            continue
        if not _is_integer(value) or value < 1:
            raise ValueError(
                f"{name} must be a positive integer{' or None' if optional else ''}, not {value!r}"
            )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_arguments(
    loss: Any, learning_rate: Any, seed: Any, warmup_epochs: Any, config: Any
) -> None:
    if loss is not None and not isinstance(loss, ELBO):
        raise ValueError(f"loss must be an ELBO such as Trace_ELBO() or None, not {loss!r}")
    rate = isinstance(learning_rate, int | float) and not isinstance(learning_rate, bool)
    if not callable(learning_rate) and not (rate and 0 < learning_rate < math.inf):
        raise ValueError(
            f"learning_rate must be a positive number or a function, not {learning_rate!r}"
        )
    if not _is_integer(seed) or not 0 <= seed < 2**32:  # what NumPy takes
        raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, not {seed!r}")
    if not _is_integer(warmup_epochs) or warmup_epochs < 0:
        raise ValueError(f"warmup_epochs must be 0 or a positive integer, not {warmup_epochs!r}")
    jitted = type(loss).__name__.startswith("Jit")  # keeps the weight of its first step for ever
    if warmup_epochs and loss is not None and (jitted or not isinstance(loss, _ANNEALABLE)):
        raise ValueError(
            f"KL warm-up scales sites, which is wrong inside {type(loss).__name__}; use a loss "
            "that is an ELBO"
        )
    try:
        json.dumps(dict(config or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config must be what JSON can hold ({error})") from error


def _check_folder(checkpoint: Any, resume: bool, optimizer: Any) -> Path | None:
    if checkpoint is None:
        if resume:
            raise ValueError("resume=True needs checkpoint=FOLDER, the run to go on from")
        return None
    if isinstance(optimizer, PyroOptim):
        raise ValueError(
            "a PyroOptim cannot be written to a checkpoint; pass optimizer as a function from "
            "parameters to a torch optimizer"
        )
    folder = Path(checkpoint)
    if not resume and (found := holds_run(folder)):
        raise CheckpointError(
            f"{folder} already has a {found}, which this run would replace; pass resume=True to go "
            "on with that run, name another folder, or delete it"
        )
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; checkpoint names a folder")
    return folder
