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
from pyro.infer import SVI
from torch import Tensor, nn

from pyro_vae.inference.estimators import loss_options
from pyro_vae.inference.programs import (
    FittedProgram,
    Program,
    as_arguments,
    common_owner,
    describe_programs,
    ieee_precision,
    keep_random_state,
    store_state,
    trace_programs,
)
from pyro_vae.inference.svi import methods
from pyro_vae.inference.svi.checkpoint import (
    FORMAT,
    CheckpointError,
    check_same_run,
    complete_run,
    load_tensors,
    part_of,
    write_run,
)
from pyro_vae.inference.svi.convergence import BlockRule, PhaseRule
from pyro_vae.inference.svi.evaluation import bound_of, check_held_out, entropy_residual
from pyro_vae.inference.svi.history import Fit, best_row, history_result
from pyro_vae.inference.svi.mini_batches import TrainingData
from pyro_vae.inference.svi.optimizer import TrainingError, make_optimizer
from pyro_vae.inference.svi.preparation import prepare
from pyro_vae.inference.svi.settings import (
    CONVERGED,
    DEFAULT_EPOCHS,
    DEFAULT_RATE,
    FitSettings,
)
from pyro_vae.inference.svi.step import (
    ScaledLatents,
    deferred_interrupt,
    refuse_infinite,
    without_validation,
)
from pyro_vae.progress import progress_bar, say
from pyro_vae.results import float32_precision

__all__ = ["TrainingRun"]

_EVALUATION_DATA = 1000  # training data on which the bound is measured after an epoch
_MOST_STEPS, _MOST_EPOCHS = 30_000, 1000  # of a training that ends by itself
_LARGE_STEP = 2_000_000_000  # multiplications from which threads are worth waiting for each other


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
    rule: dict[str, Any] = field(default_factory=dict)


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
        self.bare: list[tuple[Program, list[str]]] = []
        self.prepared = prepare(
            self.model,
            self.guide,
            self.data,
            loss=copy.copy(asked.loss),
            batch_size=asked.batch_size,
            warmup_epochs=asked.warmup_epochs,
        )
        self.loss = self.prepared.loss
        self.converges = self._converges()
        if asked.loss is None and self.converges and self.one_batch:
            self.loss = methods.loss_for(asked, self.model, self.guide, self.prepared) or self.loss
        self.loss.max_plate_nesting = self.prepared.max_plate_nesting
        self.optim = make_optimizer(asked.optimizer, asked.learning_rate or DEFAULT_RATE)
        self.optim.add(self._parameters().values())
        if asked.threads is None and self._multiplications() >= _LARGE_STEP:
            torch.set_num_threads(threads)
        self.start = {
            n: v.detach().clone()
            for n, v in self._parameters().items()
            if not isinstance(v, nn.Parameter)
        }
        self._forget_gradients()  # SVI would add to what a caller left there
        losses = self.loss.loss, refuse_infinite(self.loss.loss_and_grads)
        self.svi = SVI(self.model, self.guide, self.optim, *losses)
        self.rule = methods.rule_for(self) if self.converges else None
        rule = self.rule
        self.advance = rule.advance if isinstance(rule, methods.MethodRule) else self.svi.step
        if self.validation is not None:  # what does not fit should not be found out after an epoch
            self._bound(check_held_out(self.prepared, self.validation))
        self.data_sha256 = self.data.sha256()  # once: data may be large

    @property
    def one_batch(self) -> bool:
        """Whether every step sees the same data."""
        cut = self.prepared.batch_size < self.data.length or self.prepared.subsampled
        return not cut and self.data.transform is None

    def _converges(self) -> bool:
        if self.settings.epochs is None:
            return self.one_batch and not self.settings.speaks_of_epochs
        return self.settings.epochs == CONVERGED

    @property
    def epochs(self) -> int:
        """The most epochs."""
        if self.converges:
            row = methods.METHODS[self.settings.method]
            return min(row.most_steps, _MOST_STEPS) if self.one_batch else _MOST_EPOCHS
        asked = self.settings.epochs
        return asked if isinstance(asked, int) else DEFAULT_EPOCHS

    def _multiplications(self) -> int:
        """Of a step, roughly: enough to tell small ones from large ones, on any machine alike."""
        numbers = sum(parameter.numel() for parameter in self._parameters().values())
        return numbers * self.prepared.batch_size * self.loss.num_particles

    # -- training

    def train(self, progress: bool) -> None:
        """Makes what is left of the epochs, and keeps what was reached."""
        state, asked = self.state, self.settings
        if state.status == "stopped early" or self._is_over():
            self._nothing_left()
            return
        steps = math.ceil(self.data.length / self.prepared.batch_size)
        if progress:
            counted = {"epoch": self.epochs, "step": steps, "thread": torch.get_num_threads()}
            epochs, each, threads = (f"{n} {what}{'s' * (n != 1)}" for what, n in counted.items())
            most = "to convergence, at most " * self.converges
            say(f"training: {most}{epochs} of {each} on {threads}")
        bar = progress_bar(
            self.epochs * steps,
            "step",
            show=progress,
            what="training",
            initial=state.epoch * steps + state.position,
        )
        state.status = "interrupted"
        with bar, deferred_interrupt(saves=asked.checkpoint is not None) as interrupted:
            if isinstance(self.rule, PhaseRule | methods.MethodRule):
                self.rule.begin()
            if self.saved_config is None:
                self._save(self._training_tensors())
            try:
                while state.status == "interrupted" and self._epoch(interrupted, bar):
                    self._show(bar)
                    if asked.patience is not None and state.stale >= asked.patience:
                        state.status = "stopped early"
                    elif self._is_over():
                        state.status = "finished"
                    elif self._is_to_be_saved():
                        self._save(self._training_tensors())
            except KeyboardInterrupt:  # in the middle of a step, which no file should hold
                return
            tensors = self._training_tensors()
            self._go_back()
            self._save(tensors)

    def _is_over(self) -> bool:
        return self.state.epoch >= self.epochs or (self.rule is not None and self.rule.ended)

    def _is_to_be_saved(self) -> bool:
        """Every so many epochs; of one step each, whenever the rule looks."""
        if self.rule is not None and self.one_batch:
            rows = self.state.history
            return bool(rows) and rows[-1]["epoch"] == self.state.epoch
        return self.state.epoch % self.settings.checkpoint_every == 0

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
                    loss = self._step(args, kwargs)
                share = len(index) / self.prepared.num_data(len(index))
                state.loss_sum += (loss[0] if isinstance(loss, tuple) else loss) * share
                state.loss_data += len(index)
                state.position += 1
                state.seconds += time.perf_counter() - started
                bar.update()
                if interrupted():
                    return False
        state.epoch, state.position, self.order = state.epoch + 1, 0, None
        due = state.epoch % self.settings.evaluate_every == 0 or state.epoch == self.epochs
        if self.rule.step() if isinstance(self.rule, PhaseRule | methods.MethodRule) else due:
            self._evaluate()
            if isinstance(self.rule, BlockRule):
                row = state.history[-1]
                self.rule.take(row.get("validation_bound", row["bound"]), state.epoch)
        return True

    def _rows(self, index: Tensor) -> AbstractContextManager[None]:
        """Plates hold these data inside, and the optimizer moves these rows."""
        if self.prepared.mini_batches is not None:
            self.optim.see(index, self.prepared.mini_batches.row_axes, visits=self.state.epoch)
        return self.prepared.on(index)

    def _step(self, args: Any, kwargs: Any) -> Any:
        try:
            return self.advance(*args, **kwargs)
        except TrainingError:
            if self.rule is None or not self.rule.retreat():
                raise
            self._forget_gradients()
            return math.nan  # the step had no loss, and the history says so

    def _forget_gradients(self) -> None:
        for parameter in self._parameters().values():
            parameter.grad = None

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
        seen = self.data.first(rows, stream=3)
        row |= self._bound(seen)
        row |= entropy_residual(self.model, self.guide, seen, found, self.settings.seed)
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
        pair = (self.model, self.guide)
        return bound_of(*pair, x, self.prepared, self.loss, self.settings.seed)

    # -- parameters and files

    def _parameters(self) -> dict[str, Tensor]:
        """Unconstrained parameters by name: the tensors that the optimizer moves, each once."""
        names = {p: name for name, p in pyro.get_param_store().named_parameters()}
        return {name: p for p, name in names.items() if name not in self.prepared.foreign}

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
        rate = asked.learning_rate or (None if self.converges else DEFAULT_RATE)
        rate = rate if asked.optimizer is None else None  # it has one of its own
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
                "epochs": CONVERGED if self.converges else self.epochs,
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
                **methods.method_config(asked),
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
        if self.rule is not None:
            tensors |= {f"rule.{name}": value for name, value in self.rule.tensors().items()}
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
            state=asdict(self.state) | {"rule": self.rule.saved() if self.rule else {}},
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
        begun = metadata.get("config", {}).get("fit", {}).get("epochs")
        if (begun == CONVERGED) != self.converges:
            raise CheckpointError(
                f"{folder} was trained with epochs {begun!r}; resume with epochs='converged' or "
                "a number, as it was begun, or start a new run in another folder"
            )
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
        self.best_values = part_of(tensors, "best.")
        self.optim.restore(part_of(tensors, "optimizer."), self._parameters())
        torch.set_rng_state(tensors["random.torch"])
        self.data.set_random_states(part_of(tensors, "random."))
        self.order = tensors.get("order")
        self.state = _State(**metadata["state"])
        if self.rule is not None:
            self.rule.restore(self.state.rule, part_of(tensors, "rule."))
        elif self.state.status == "stopped early" and self.epochs > begun:
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
        self._forget_gradients()
        return Fit(
            model=FittedProgram(self.model, state),
            guide=FittedProgram(self.guide, state),
            history=history_result(self.state.history, config, seed, self.data_sha256),
            config=config,
            parameters={n: v.detach().clone() for n, v in self._stored().items()},
            status=self.state.status,
            convergence=self.rule.report() if self.rule is not None else None,
            posterior=methods.posterior_of(self.rule, config, self.data_sha256),
        )
