r"""The one training loop: `fit`, on `pyro.infer.SVI`, without its silent traps.

Pyro trains nothing, without a word, when a module was never registered or another program holds
its name, warns only when
the guide lacks a latent, and goes on from a loss of NaN. `fit` runs SVI in a parameter store of
its own, gives
each module its own names, and raises in these cases.
"""

import copy
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

import pyro
import torch
from pyro.infer import (
    ELBO,
    SVI,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.inference.checkpoint import CheckpointError, load_tensors, write_run
from pyro_vae.inference.inspection import check_module_names, check_parameters, inspect_programs
from pyro_vae.inference.optimizer import TrainingError, make_optimizer
from pyro_vae.inference.programs import (
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
    unwrap_programs,
)
from pyro_vae.results import Result, label, make_result, sha256_of

__all__ = ["Fit", "FittedProgram", "TrainingError", "fit"]

_EVALUATION_DATA = 1000  # training data on which the bound is measured after an epoch
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
        text = (
            f"fit {self.status} after {int(self.history.epoch[-1])} epochs, "
            f"{float(self.history.seconds[-1]):.1f} s"
            if (self.history.sizes["epoch"])
            else f"fit {self.status} before its first epoch ended"
        )
        for name in ("bound", "validation_bound"):
            if name in self.history and self.history.sizes["epoch"]:
                value = float(self.history[name][-1])
                error = (
                    f" +- {float(self.history[name + '_se'][-1]):.2f}"
                    if name + "_se" in self.history
                    else ""
                )
                text += f"; {name.replace('_', ' ')} {value:.2f}{error} nats per datum"
        return f"{text}; {count:,} parameters"

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
    ELBO of up to 1000
    training data, the same data and the same draws after every epoch), `reconstruction` and `kl`
    (its two parts, E log p(x|z) and E log
    q(z|x) - log p(z)), `bound_se`, the same for the held-out data as `validation_*`, `seconds` and
    `data_passes`. All
    are nats per datum. For a guide without a density (a `Delta`), and where latents are summed out
    of the model, `bound` is the
    negative loss and the parts are absent.

    Args:
        model: The generative program, called as `model(x)`.
        guide: The program of the approximate posterior.
        x: The data; a tuple for several arguments, a dict for keywords. Tensors as long as the
            first are cut into mini-batches
            together.
        loss: Any Pyro ELBO, Pyro's own or ours; `Trace_ELBO()` if None.
        optimizer: A function from parameters to a torch optimizer
            (`functools.partial(torch.optim.SGD, lr=0.1)`), or a
            `PyroOptim`. If None, one fused Adam.
        learning_rate: For the default optimizer, or for each epoch (counted from 0) if it is a
            function.
        epochs: Passes over the data.
        batch_size: Data in a mini-batch. None means 128 where every latent belongs to a datum,
            else all data at once.
        seed: Seeds initial draws, shuffling and particles; the caller's random state is left alone.
        validation: Held-out data in the form of `x`.
        evaluate_every: Epochs between rows of the history.
        patience: Stops when the validation bound has not risen for so many evaluations, and goes
            back to the best parameters.
        warmup_epochs: Epochs over which the weight of the KL term rises from 0 to 1 (Bowman et al.
            2016); ELBOs only.
        transform: Applied to the first tensor of each mini-batch with a generator, such as dynamic
            binarisation.
        device: Where modules and data are moved first; None leaves them.
        checkpoint: A run folder, written every `checkpoint_every` epochs, at the end and on Ctrl-C.
        checkpoint_every: Epochs between checkpoints.
        resume: Goes on from `checkpoint`, to `epochs` in all.
        config: Further facts for the run folder's `config.json` (such as the name of the data).
        progress: Shows a bar where stderr is a terminal.

    Returns:
        The fitted programs and the history. Modules that were passed in have their weights updated
        as well. Ctrl-C ends
        training after the step at hand and returns what was reached (`status` "interrupted").

    Raises:
        ProgramError: If a parameter that the programs use was never registered, a latent of the
            model is missing from the
            guide, or mini-batches were asked for a model with global latents.
        TrainingError: If the loss or a gradient is not finite.
        ValueError: If an argument is out of its range.
        CheckpointError: If `resume` finds no run to go on from.
    """
    _check_numbers(
        epochs=epochs,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        batch_size=batch_size,
        patience=patience,
    )
    if patience is not None and validation is None:
        raise ValueError("patience watches the validation bound; pass validation=held_out_data")
    if resume and checkpoint is None:
        raise ValueError("resume=True needs checkpoint=FOLDER, the run to go on from")
    if warmup_epochs and loss is not None and not isinstance(loss, _ANNEALABLE):
        raise ValueError(
            f"KL warm-up scales sites, which is wrong inside {type(loss).__name__}; use a loss "
            "that is an ELBO"
        )
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
    with program_scope(seed):
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
            batch_size=batch_size or 0,
            seed=seed,
            epochs=epochs,
            evaluate_every=evaluate_every,
            patience=patience,
            warmup_epochs=warmup_epochs,
            checkpoint=Path(checkpoint) if checkpoint is not None else None,
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
    best: float = -math.inf
    stale: int = 0
    status: Literal["finished", "stopped early", "interrupted"] = "finished"
    history: list[dict[str, Any]] = field(default_factory=list)


class _Data:
    """Data held in memory, shuffled by a generator of its own."""

    def __init__(self, x: Any, transform: Any, seed: int) -> None:
        self.x, self.length, self.transform = x, batch_length(x), transform
        if self.length == 0:
            raise ValueError("there are no data to fit: the first tensor of x has length 0")
        self.shuffler = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator().manual_seed(seed + 1)

    def batch(self, index: Tensor | None, noise: torch.Generator | None = None) -> Any:
        """The data at `index` (all if None), in the form of `x`, transformed."""
        x = self.x if index is None else map_batch(self.x, lambda a: a[index.to(a.device)])
        if self.transform is None:
            return x
        todo = [self.transform]  # for the first tensor alone
        return map_batch(x, lambda a: todo.pop()(a, noise or self.noise) if todo else a)


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
    batch_size: int
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
        self.best_parameters: dict[str, Tensor] = {}
        noise = torch.Generator().manual_seed(self.seed)
        probe = self.data.batch(torch.arange(min(self.data.length, 128)), noise)
        enumerates = isinstance(self.given_loss, TraceEnum_ELBO)
        check_parameters(self.model, self.guide, as_arguments(probe), enumerates)
        self.structure, self.joint = self._inspect(probe)
        self._choose_batch_size()
        nesting = self.structure.max_plate_nesting if self.structure is not None else math.inf
        self.loss = copy.copy(self.given_loss) or Trace_ELBO(max_plate_nesting=nesting)
        self.optim = make_optimizer(self.optimizer, self.learning_rate)
        if self.checkpoint is not None and not self.optim.can_be_saved:
            raise ValueError(
                "a PyroOptim cannot be written to a checkpoint; pass optimizer as a function from "
                "parameters to a torch optimizer"
            )
        guarded = _refuse_infinite(self.loss.loss_and_grads)
        self.svi = SVI(
            self.model, self.guide, self.optim, loss=self.loss.loss, loss_and_grads=guarded
        )

    def _choose_batch_size(self) -> None:
        length, structure = self.data.length, self.structure
        local = structure is not None and not self.joint and structure.scale == 1.0
        if self.batch_size == 0:
            self.batch_size = 128 if local else length
        self.batch_size = min(self.batch_size, length)
        if self.batch_size < length and self.joint and structure is not None:
            raise ProgramError(
                f"mini-batches of {self.batch_size} would count the global latents "
                f"{structure.latents} once a batch; pass batch_size=None, or subsample inside "
                "the model with pyro.plate(..., subsample_size=...)"
            )

    def _inspect(self, probe: Any) -> tuple[ProgramStructure | None, bool]:
        """How log weights can be had: per datum, jointly (global latents), or not at all."""
        with evaluation_mode(self.model, self.guide):
            for joint, x in (
                (False, probe),
                (True, self.data.batch(None) if self.data.transform is None else probe),
            ):
                try:
                    return inspect_programs(
                        self.model, self.guide, as_arguments(x), joint=joint, num_particles=1
                    ), joint
                except ProgramError as error:
                    if "support" in str(error):
                        raise
        return None, False

    # -- training

    def train(self, progress: bool) -> None:
        steps = math.ceil(self.data.length / self.batch_size)
        bar = tqdm(
            total=self.epochs,
            initial=self.state.epoch,
            unit="epoch",
            disable=not (progress and sys.stderr.isatty()),
            leave=False,
        )
        self.state.status = "finished"
        with bar, _deferred_interrupt() as interrupted:
            try:
                while self.state.epoch < self.epochs:
                    if not self._epoch(steps, interrupted):
                        self.state.status = "interrupted"
                        break
                    bar.update()
                    self._show(bar)
                    if self.patience is not None and self.state.stale >= self.patience:
                        self.state.status = "stopped early"
                        break
                    if (
                        self.state.epoch % self.checkpoint_every == 0
                        and self.state.epoch < self.epochs
                    ):
                        self.save()
            except KeyboardInterrupt:
                self.state.status = "interrupted"
        if (
            self.patience is not None
            and self.best_parameters
            and self.state.status != "interrupted"
        ):
            self._set_parameters(self.best_parameters)
        self.save()

    def _epoch(self, steps: int, interrupted: Callable[[], bool]) -> bool:
        """Trains to the end of the epoch at hand; False if Ctrl-C came first."""
        state = self.state
        if self.order is None:
            self.order = torch.randperm(self.data.length, generator=self.data.shuffler)
        if callable(self.learning_rate):
            self.optim.set_learning_rate(self.learning_rate(state.epoch))
        validation = nullcontext() if state.epoch == 0 else _without_validation()
        with validation:
            while state.position < steps:
                started = time.perf_counter()
                index = self.order[
                    state.position * self.batch_size : (state.position + 1) * self.batch_size
                ]
                x = self.data.batch(index if self.batch_size < self.data.length else None)
                args, kwargs = as_arguments(x)
                with self._annealing(state.epoch + state.position / steps):
                    loss = self.svi.step(*args, **kwargs)
                state.loss_sum += loss[0] if isinstance(loss, tuple) else loss
                state.loss_data += len(index)
                state.position += 1
                state.seconds += time.perf_counter() - started
                if interrupted():
                    return False
        state.epoch, state.position, self.order = state.epoch + 1, 0, None
        if state.epoch % self.evaluate_every == 0 or state.epoch == self.epochs:
            self._evaluate()
        return True

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
        row: dict[str, Any] = {
            "epoch": state.epoch,
            "seconds": state.seconds,
            "data_passes": float(state.epoch),
            "loss": state.loss_sum / max(state.loss_data, 1),
        }
        state.loss_sum, state.loss_data = 0.0, 0
        if self.structure is not None and not self.joint:
            subset = torch.arange(min(self.data.length, _EVALUATION_DATA))
            row |= self._bound(
                self.data.batch(subset, torch.Generator().manual_seed(self.seed + 2))
            )
        else:
            row |= self._bound(self.data.batch(None, torch.Generator().manual_seed(self.seed + 2)))
        row["measure"] = self.structure.measure if self.structure is not None else "mixed"
        if self.validation is not None:
            held_out = self._bound(self.validation)
            row |= {f"validation_{name}": value for name, value in held_out.items()}
            if held_out["bound"] > state.best:
                state.best, state.stale = held_out["bound"], 0
                if self.patience is not None:
                    self.best_parameters = {
                        n: p.detach().clone() for n, p in self._parameters().items()
                    }
            else:
                state.stale += 1
        state.history.append(row)

    def _bound(self, x: Any) -> dict[str, float]:
        """The ELBO per datum by one particle, its parts and its standard error over data."""
        arguments = as_arguments(x)
        length = batch_length(x)
        with torch.no_grad(), keep_random_state(), evaluation_mode(self.model, self.guide):
            pyro.set_rng_seed(self.seed)
            if self.structure is None:
                value = self.loss.loss(self.model, self.guide, *arguments[0], **arguments[1])
                return {"bound": -(value[0] if isinstance(value, tuple) else value) / length}
            log_p, log_q, parts = run_programs(self.model, self.guide, arguments, self.structure, 1)
            per = 1.0 if not self.joint else 1.0 / length
            log_weights = (log_p - log_q)[0] * per
            found = {
                "bound": float(log_weights.mean()),
                "reconstruction": float(parts["likelihood"].mean()) * per,
                "kl": float((log_q - parts["prior"]).mean()) * per,
            }
            if len(log_weights) > 1:
                found["bound_se"] = float(log_weights.std() / math.sqrt(len(log_weights)))
            return found

    # -- parameters and files

    def _parameters(self) -> dict[str, Tensor]:
        """Unconstrained parameters by name: the tensors that the optimizer moves."""
        return dict(pyro.get_param_store().named_parameters())

    @torch.no_grad()
    def _set_parameters(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters().items():
            parameter.copy_(values[name])

    def config_dict(self) -> dict[str, Any]:
        owner = common_owner(self.model, self.guide)
        described: dict[str, Any] = {
            "program": getattr(self.model, "__qualname__", type(self.model).__name__)
        }
        if owner is not None and hasattr(owner, "config"):
            described = {"class": type(owner).__name__, "arguments": owner.config}
        rate = self.learning_rate
        return {
            "format": 1,
            "model": described,
            **self.config,
            "fit": {
                "loss": type(self.loss).__name__,
                "num_particles": self.loss.num_particles,
                "optimizer": self.optim.name,
                "learning_rate": rate if not callable(rate) else "a function",
                "epochs": self.epochs,
                "batch_size": self.batch_size,
                "seed": self.seed,
                "patience": self.patience,
                "warmup_epochs": self.warmup_epochs,
                "evaluate_every": self.evaluate_every,
                "num_data": self.data.length,
                "num_threads": torch.get_num_threads(),
                "dtype": str(next(iter(self._parameters().values())).dtype).removeprefix("torch."),
            },
        }

    def save(self) -> None:
        if self.checkpoint is None:
            return
        parameters = self._parameters()
        tensors = {f"parameter.{name}": value for name, value in parameters.items()}
        tensors |= {f"best.{name}": value for name, value in self.best_parameters.items()}
        tensors |= {
            f"optimizer.{name}": value for name, value in self.optim.tensors(parameters).items()
        }
        tensors |= {
            "random.torch": torch.get_rng_state(),
            "random.shuffler": self.data.shuffler.get_state(),
            "random.noise": self.data.noise.get_state(),
        }
        if self.order is not None:
            tensors["order"] = self.order
        owner = common_owner(self.model, self.guide)
        weights = (
            owner.state_dict()
            if owner is not None
            else {n: v for n, v in pyro.get_param_store().items()}
        )
        write_run(
            self.checkpoint,
            config=self.config_dict(),
            weights=weights,
            training=tensors,
            state=asdict(self.state),
            history=self.state.history,
        )

    def load(self) -> None:
        assert self.checkpoint is not None
        tensors, metadata = load_tensors(self.checkpoint / "training.safetensors")
        config, mine = metadata["config"], self.config_dict()
        for key in ("loss", "num_particles", "optimizer", "batch_size", "num_data", "dtype"):
            if config["fit"][key] != mine["fit"][key]:
                raise CheckpointError(
                    f"{self.checkpoint} was trained with {key} {config['fit'][key]!r}, not "
                    f"{mine['fit'][key]!r}; resume with the "
                    "same setting, or start a new run in another folder"
                )
        if config["fit"]["num_threads"] != mine["fit"]["num_threads"]:
            warnings.warn(
                f"resuming with {mine['fit']['num_threads']} threads what was begun with "
                f"{config['fit']['num_threads']}: the last "
                "bits of the result will differ from an uninterrupted run",
                stacklevel=4,
            )
        saved = {
            n.removeprefix("parameter."): t
            for n, t in tensors.items()
            if n.startswith("parameter.")
        }
        names = {name: tuple(value.shape) for name, value in self._parameters().items()}
        if names != {name: tuple(value.shape) for name, value in saved.items()}:
            raise CheckpointError(
                f"the parameters in {self.checkpoint} are not those of this model and guide; "
                "resume with the programs of that run"
            )
        self._set_parameters(saved)
        self.best_parameters = {
            n.removeprefix("best."): t for n, t in tensors.items() if n.startswith("best.")
        }
        self.optim.restore(
            {
                n.removeprefix("optimizer."): t
                for n, t in tensors.items()
                if n.startswith("optimizer.")
            },
            self._parameters(),
        )
        torch.set_rng_state(tensors["random.torch"])
        self.data.shuffler.set_state(tensors["random.shuffler"])
        self.data.noise.set_state(tensors["random.noise"])
        self.order = tensors.get("order")
        self.state = _State(**metadata["state"])

    def result(self) -> Fit:
        store = pyro.get_param_store()
        state = dict(store.get_state())
        config = self.config_dict()
        return Fit(
            model=FittedProgram(self.model, state),
            guide=FittedProgram(self.guide, state),
            history=_history(self.state.history, config, self.seed, self.data.x),
            config=config,
            parameters={name: value.detach().clone() for name, value in store.items()},
            status=self.state.status,
        )


def _history(rows: list[dict[str, Any]], config: dict[str, Any], seed: int, x: Any) -> Result:
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
            bound = "objective" if base == "bound" and "kl" not in rows[-1] else bound
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
        data_sha256=sha256_of(
            *[a for a in (x if isinstance(x, tuple) else (x,)) if isinstance(a, Tensor)]
        ),
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
                    "Lower the learning rate, look for a "
                    "scale that goes to 0, or for missing values in the data"
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
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.getsignal(signal.SIGINT)

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
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{name} must be a positive integer{' or None' if optional else ''}, not {value!r}"
            )
