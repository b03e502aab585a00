"""The training loop behind `fit`: what it reached, what it keeps, how it ends and goes on."""

import copy
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_vae.inference.estimators import loss_options
from pyro_vae.inference.programs import (
    FittedProgram,
    Program,
    as_arguments,
    common_owner,
    describe_programs,
    evaluation_mode,
    ieee_precision,
    keep_random_state,
    run_programs,
    store_state,
    trace_programs,
)
from pyro_vae.inference.svi.checkpoint import (
    FORMAT,
    CheckpointError,
    check_same_run,
    complete_run,
    load_tensors,
    write_run,
)
from pyro_vae.inference.svi.history import best_row, history_result
from pyro_vae.inference.svi.optimizer import make_optimizer
from pyro_vae.inference.svi.preparation import check_held_out, prepare
from pyro_vae.inference.svi.settings import FitSettings
from pyro_vae.inference.svi.shuffling import TrainingData
from pyro_vae.inference.svi.step import (
    Interruptible,
    ScaledLatents,
    deferred_interrupt,
    refuse_infinite,
    without_validation,
)
from pyro_vae.progress import progress_bar, say
from pyro_vae.results import Result, float32_precision, summary_html

__all__ = ["Fit", "TrainingRun"]

_EVALUATION_DATA = 1000  # training data on which the bound is measured after an epoch
_LARGE_STEP = 2_000_000_000  # multiplications from which threads are worth waiting for each other


@dataclass(frozen=True, repr=False)
class Fit(Interruptible):
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
                said = name.replace("_", " ")
                if row[name].attrs["bound"] == "objective":
                    said = said.replace("bound", "objective")
                text += f"; {said} {float(row[name]):.2f}{spread} nats per datum"
        if int(row.epoch) != int(last.epoch):
            text += f" (back to epoch {int(row.epoch)})"
        return f"{text}; {count:,} parameters"

    def _reached(self) -> int:
        """The row of the history that speaks of the parameters."""
        if self.config["fit"]["patience"] is None or self.status == "interrupted":
            return -1
        return best_row(self.history.validation_bound.values.tolist())

    def __repr__(self) -> str:
        return f"<{self.summary()}>"

    def _repr_html_(self) -> str:
        return summary_html(self.summary(), self.history)


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


@dataclass
class TrainingRun:
    """One call of `fit`: set up, train, and hand over."""

    model: Program
    guide: Program
    data: TrainingData
    validation: Any
    settings: FitSettings

    def __post_init__(self) -> None:
        asked, threads = self.settings, torch.get_num_threads()
        torch.set_num_threads(asked.threads or 1)
        self.state = _State()
        self.order: Tensor | None = None
        self.saved_config: dict[str, Any] | None = None
        self.best_values: dict[str, Tensor] = {}
        self.loss = copy.copy(asked.loss) if asked.loss is not None else Trace_ELBO()
        self.prepared = prepare(
            self.model,
            self.guide,
            self.data,
            loss=self.loss,
            batch_size=asked.batch_size,
            warmup_epochs=asked.warmup_epochs,
        )
        self.loss.max_plate_nesting = self.prepared.max_plate_nesting
        self.optim = make_optimizer(asked.optimizer, asked.learning_rate)
        self.optim.add(self._parameters().values())
        if asked.threads is None and self._multiplications() >= _LARGE_STEP:
            torch.set_num_threads(threads)
        self.start = {
            n: v.detach().clone()
            for n, v in self._parameters().items()
            if not isinstance(v, nn.Parameter)
        }
        for parameter in self._parameters().values():
            parameter.grad = None  # SVI would add to what a caller left there
        losses = self.loss.loss, refuse_infinite(self.loss.loss_and_grads)
        self.svi = SVI(self.model, self.guide, self.optim, *losses)
        if self.validation is not None:  # what does not fit should not be found out after an epoch
            self._bound(check_held_out(self.prepared, self.validation))
        self.data_sha256 = self.data.sha256()  # once: data may be large

    def _multiplications(self) -> int:
        """Of a step, roughly: enough to tell small ones from large ones, on any machine alike."""
        numbers = sum(parameter.numel() for parameter in self._parameters().values())
        return numbers * self.prepared.batch_size * self.loss.num_particles

    # -- training

    def train(self, progress: bool) -> None:
        """Makes what is left of the epochs, and keeps what was reached."""
        state, asked = self.state, self.settings
        if state.status == "stopped early" or state.epoch >= asked.epochs:
            self._nothing_left()
            return
        steps = math.ceil(self.data.length / self.prepared.batch_size)
        if progress:
            counted = {"epoch": asked.epochs, "step": steps, "thread": torch.get_num_threads()}
            epochs, each, threads = (f"{n} {what}{'s' * (n != 1)}" for what, n in counted.items())
            say(f"training: {epochs} of {each} on {threads}")
        bar = progress_bar(
            asked.epochs * steps,
            "step",
            show=progress,
            what="training",
            initial=state.epoch * steps + state.position,
        )
        state.status = "interrupted"
        with bar, deferred_interrupt(saves=asked.checkpoint is not None) as interrupted:
            if self.saved_config is None:
                self._save(self._training_tensors())
            try:
                while state.status == "interrupted" and self._epoch(interrupted, bar):
                    self._show(bar)
                    if asked.patience is not None and state.stale >= asked.patience:
                        state.status = "stopped early"
                    elif state.epoch == asked.epochs:
                        state.status = "finished"
                    elif state.epoch % asked.checkpoint_every == 0:
                        self._save(self._training_tensors())
            except KeyboardInterrupt:  # in the middle of a step, which no file should hold
                return
            tensors = self._training_tensors()
            self._go_back()
            self._save(tensors)

    def _nothing_left(self) -> None:
        """Ends a run that was trained to its end before."""
        ended = self.state.status != "interrupted"
        if self.state.status != "stopped early":
            self.state.status = "finished"
        self._go_back()
        say(f"nothing is left to train: {self.state.epoch} epochs were made before")
        if ended and self.settings.checkpoint is not None and self.saved_config is not None:
            complete_run(self.settings.checkpoint, config=self.saved_config, **self._derived())

    def _keeps_best(self) -> bool:
        """Whether the parameters at the end are those of the best row, not of the last."""
        return self.settings.patience is not None and self.state.status != "interrupted"

    def _go_back(self) -> None:
        """Puts the best parameters back at the end."""
        if self._keeps_best() and self.best_values:
            self._set_values(self.best_values)

    def _epoch(self, interrupted: Callable[[], bool], bar: Any) -> bool:
        """Trains to the end of the epoch at hand; False if Ctrl-C came first."""
        state, length, size = self.state, self.data.length, self.prepared.batch_size
        steps = math.ceil(length / size)
        if self.order is None:
            self.order = torch.randperm(length, generator=self.data.shuffler)
        if callable(self.settings.learning_rate):
            self.optim.set_learning_rate(self.settings.learning_rate(state.epoch))
        # The first epoch makes Pyro's checks.
        with nullcontext() if state.epoch == 0 else without_validation():
            while state.position < steps:
                started = time.perf_counter()
                index = self.order[state.position * size : (state.position + 1) * size]
                args, kwargs = as_arguments(self.data.batch(index if size < length else None))
                annealing = self._annealing(state.epoch + state.position / steps)
                with annealing, self._rows(index):
                    loss = self.svi.step(*args, **kwargs)
                share = len(index) / self.prepared.num_data(len(index))
                state.loss_sum += (loss[0] if isinstance(loss, tuple) else loss) * share
                state.loss_data += len(index)
                state.position += 1
                state.seconds += time.perf_counter() - started
                bar.update()
                if interrupted():
                    return False
        state.epoch, state.position, self.order = state.epoch + 1, 0, None
        if state.epoch % self.settings.evaluate_every == 0 or state.epoch == self.settings.epochs:
            self._evaluate()
        return True

    def _rows(self, index: Tensor) -> AbstractContextManager[None]:
        """Plates hold these data inside, and the optimizer moves these rows."""
        if self.prepared.mini_batches is not None:
            self.optim.see(index, self.prepared.mini_batches.row_axes, visits=self.state.epoch)
        return self.prepared.on(index)

    def _annealing(self, epoch: float) -> Any:
        warmup_epochs = self.settings.warmup_epochs
        if epoch >= warmup_epochs:
            return nullcontext()
        return ScaledLatents(max(epoch / warmup_epochs, 1e-3))

    def _show(self, bar: Any) -> None:
        if not bar.disable and self.state.history:
            row = self.state.history[-1]
            rate = self.data.length * self.state.epoch / max(self.state.seconds, 1e-9)
            shown = {"epoch": str(self.state.epoch), "bound": f"{row['bound']:.2f}"}
            shown["data/s"] = f"{rate:.3g}"
            if "validation_bound" in row:
                shown["held out"] = f"{row['validation_bound']:.2f}"
            bar.set_postfix(shown)

    # -- evaluation, which moves nothing

    def _evaluate(self) -> None:
        state, found = self.state, self.prepared
        passes = float(state.epoch)
        if found.subsampled is not None and found.batch_size == self.data.length:
            passes *= found.subsampled.size / found.subsampled.full_size
        row: dict[str, Any] = {
            "epoch": state.epoch,
            "seconds": state.seconds,
            "data_passes": passes,
            "loss": state.loss_sum / max(state.loss_data, 1),
        }
        state.loss_sum, state.loss_data = 0.0, 0
        rows = min(self.data.length, _EVALUATION_DATA) if found.takes_some else self.data.length
        row |= self._bound(self.data.first(rows, stream=3))
        row["measure"] = found.structure.measure if found.structure is not None else "mixed"
        if self.validation is not None:
            held_out = self._bound(self.validation)
            row |= {f"validation_{name}": value for name, value in held_out.items()}
            if state.best is None or held_out["bound"] > state.best:
                state.best, state.stale = held_out["bound"], 0
                if self.settings.patience is not None:
                    self.best_values = {n: v.detach().clone() for n, v in self._values().items()}
            else:
                state.stale += 1
        state.history.append(row)

    def _bound(self, x: Any) -> dict[str, float]:
        """The ELBO per datum by one particle, its parts and its standard error over data."""
        arguments, length = as_arguments(x), self.prepared.length_of(x)
        structure = self.prepared.structure
        evaluation = evaluation_mode(self.model, self.guide, *self.prepared.modules)
        everything = self.prepared.on(None, length)
        with torch.no_grad(), keep_random_state(), evaluation, ieee_precision(), everything:
            pyro.set_rng_seed(self.settings.seed)
            if structure is None:
                value = self.loss.loss(self.model, self.guide, *arguments[0], **arguments[1])
                value = value[0] if isinstance(value, tuple) else value
                return {"bound": -float(value) / self.prepared.num_data(length, evaluated=True)}
            log_p, log_q, parts = run_programs(self.model, self.guide, arguments, structure, 1)
            per = 1.0 if not self.prepared.joint else 1.0 / length
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
        return {name: value for name, value in named if name not in self.prepared.foreign}

    def _values(self) -> dict[str, Tensor]:
        """Parameters and the buffers of modules (running means): all that training moves."""
        values = {f"parameter.{name}": p for name, p in self._parameters().items()}
        for place, module in enumerate(self.prepared.modules):
            for name, buffer in module.named_buffers(recurse=False):
                values[f"buffer.{place}.{name}"] = buffer
        return values

    @torch.no_grad()
    def _set_values(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self._values().items():
            value.copy_(values[name])

    def _config(self) -> dict[str, Any]:
        """What config.json says."""
        asked = self.settings
        rate = asked.learning_rate if asked.optimizer is None else None  # it has one of its own
        return {
            "format": FORMAT,
            "model": describe_programs(self.model, self.guide) | self._statistics(),
            **asked.config,
            "fit": {
                "loss": type(self.loss).__name__,
                "loss_options": loss_options(self.loss),
                "num_particles": self.loss.num_particles,
                "optimizer": self.optim.name,
                "learning_rate": "a function" if callable(asked.learning_rate) else rate,
                "optimizer_arguments": self.optim.arguments,
                "epochs": asked.epochs,
                "batch_size": self.prepared.batch_size,
                "seed": asked.seed,
                "patience": asked.patience,
                "warmup_epochs": asked.warmup_epochs,
                "evaluate_every": asked.evaluate_every,
                "num_data": self.data.length,
                "data_sha256": self.data_sha256,
                "num_threads": torch.get_num_threads(),
                "float32_precision": float32_precision(),
                "dtype": str(next(iter(self._parameters().values())).dtype).removeprefix("torch."),
            },
        }

    def _statistics(self) -> dict[str, Any]:
        """Says where modules have running statistics, which are no parameters."""
        owner = common_owner(self.model, self.guide)
        modules = () if owner is not None else self.prepared.modules
        names = {type(m).__name__ for m in modules if getattr(m, "running_mean", None) is not None}
        return {"statistics_left_out": sorted(names)} if names else {}

    def _training_tensors(self) -> dict[str, Tensor]:
        """All that going on needs, copied; nothing where no file is to hold it."""
        if self.settings.checkpoint is None:
            return {}
        parameters = self._parameters()
        tensors = self._values()
        tensors |= {f"best.{name}": value for name, value in self.best_values.items()}
        tensors |= {f"optimizer.{n}": value for n, value in self.optim.tensors(parameters).items()}
        states = {"torch": torch.get_rng_state(), **self.data.random_states()}
        tensors |= {f"random.{name}": state for name, state in states.items()}
        if self.order is not None:
            tensors["order"] = self.order
        return {name: value.detach().clone() for name, value in tensors.items()}

    def _stored(self) -> dict[str, Tensor]:
        """The parameters as users see them (constrained), by name."""
        store = pyro.get_param_store()
        return {n: v for n, v in store.items() if n not in self.prepared.foreign}

    def _weights(self, owner: nn.Module | None) -> dict[str, Tensor]:
        """What model.safetensors holds: see `inference.checkpoint`."""
        if owner is None:
            return self._parameters()
        bare = {n: v for n, v in self._parameters().items() if not isinstance(v, nn.Parameter)}
        return owner.state_dict() | bare

    def _save(self, training: Mapping[str, Tensor]) -> None:
        if self.settings.checkpoint is None:
            return
        write_run(
            self.settings.checkpoint,
            config=self._config(),
            training=training,
            state=asdict(self.state),
            **self._derived(),
        )

    def _derived(self) -> dict[str, Any]:
        """What a run folder holds beside the state to resume from, but for the configuration."""
        owner, rows = common_owner(self.model, self.guide), self.state.history
        bounds = [row["validation_bound"] for row in rows] if self._keeps_best() else []
        return {
            "weights": self._weights(owner),
            "history": rows,
            "reached": rows[best_row(bounds) if bounds else -1] if rows else None,
        }

    def load(self) -> None:
        """Takes up what the run folder holds."""
        folder = self.settings.checkpoint
        assert folder is not None
        tensors, metadata = load_tensors(folder / "training.safetensors")
        if self.settings.threads is None and "config" in metadata:
            torch.set_num_threads(metadata["config"]["fit"]["num_threads"])
        check_same_run(folder, metadata, self._config())
        self.saved_config = metadata["config"]
        wanted = {name: tuple(value.shape) for name, value in self._values().items()}
        kinds = ("parameter.", "buffer.")
        saved = {n: tuple(t.shape) for n, t in tensors.items() if n.startswith(kinds)}
        if wanted != saved:
            raise CheckpointError(
                f"the parameters in {folder} are not those of this model and guide; resume with "
                "the programs of that run"
            )
        self._set_values(tensors)
        self.best_values = _part(tensors, "best.")
        self.optim.restore(_part(tensors, "optimizer."), self._parameters())
        torch.set_rng_state(tensors["random.torch"])
        self.data.set_random_states(_part(tensors, "random."))
        self.order = tensors.get("order")
        self.state = _State(**metadata["state"])
        begun = metadata["config"]["fit"]["epochs"]
        if self.state.status == "stopped early" and self.settings.epochs > begun:
            self.state.status, self.state.stale = "interrupted", 0  # asked to go on all the same

    def bare_names(self) -> list[tuple[Program, list[str]]]:
        """Each program with the names of its parameters that no module holds."""
        if not self.start:
            return []
        rows = self.prepared.batch_size
        probe, some = self.data.first(rows, stream=2), self.prepared.on(torch.arange(rows))
        with torch.no_grad(), keep_random_state(), without_validation(), ieee_precision(), some:
            traces = trace_programs(self.model, self.guide, as_arguments(probe))
        pairs = zip((self.guide, self.model), traces, strict=True)
        return [
            (program, sorted(self.start.keys() & trace.nodes.keys())) for program, trace in pairs
        ]

    def result(self) -> Fit:
        """What was reached, for the caller."""
        state = store_state(lambda name: name not in self.prepared.foreign)
        config, seed = self._config(), self.settings.seed
        for parameter in self._parameters().values():
            parameter.grad = None
        return Fit(
            model=FittedProgram(self.model, state),
            guide=FittedProgram(self.guide, state),
            history=history_result(self.state.history, config, seed, self.data_sha256),
            config=config,
            parameters={n: v.detach().clone() for n, v in self._stored().items()},
            status=self.state.status,
        )


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
