"""One torch optimizer behind the `PyroOptim` that `pyro.infer.SVI` asks for."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

__all__ = [
    "FusedOptim",
    "SeenRows",
    "TrainingError",
    "check_gradients",
    "make_optimizer",
    "positive_inverse",
]


class TrainingError(RuntimeError):
    """Training cannot start or go on; the parameters are those of the last good step."""


@dataclass(frozen=True)
class SeenRows:
    """The rows that a mini-batch has of parameters with a value for each datum.

    Attributes:
        rows: Which data.
        axes: By parameter, the axis of the data.
        visits: How often each of these rows was seen before.
    """

    rows: Tensor
    axes: Mapping[Tensor, int]
    visits: int

    @contextmanager
    def alone(self, state: Mapping[Tensor, dict[str, Any]]) -> Iterator[None]:
        """Steps of an optimizer inside move these rows alone, and what it keeps of them.

        The other rows have a gradient of zero, which momentum and weight decay move all the same.
        Each row has a count of steps of its own, as Adam's correction of its first steps asks.
        """
        before: list[tuple[Tensor, Tensor, int]] = []
        for p, axis in self.axes.items():
            kept = state.get(p, {})
            if isinstance(kept.get("step"), Tensor):
                kept["step"].fill_(self.visits)
            elif "step" in kept:
                kept["step"] = self.visits
            tensors = [p.detach(), *(t for t in kept.values() if isinstance(t, Tensor))]
            before += [(t, t.clone(), axis) for t in tensors if t.shape == p.shape]
        yield
        for now, was, axis in before:
            rows = self.rows.to(now.device)
            now.copy_(was.index_copy(axis, rows, now.index_select(axis, rows)))


class FusedOptim(PyroOptim):
    """One torch optimizer over all parameters.

    Pyro's own makes one per tensor, which costs more than a small VAE's arithmetic.
    """

    def __init__(self, factory: Callable[[Iterable[Tensor]], torch.optim.Optimizer]) -> None:
        super().__init__(factory, {})
        self.factory = factory
        self.optimizer: torch.optim.Optimizer | None = None
        self.names: dict[Tensor, str] = {}
        self.seen: SeenRows | None = None
        self.newton: tuple[float, Tensor] | None = None

    @property
    def name(self) -> str:
        """What the run folder says was used."""
        return type(self.optimizer).__name__

    @property
    def arguments(self) -> dict[str, Any]:
        """The optimizer's settings, as JSON can hold them."""
        defaults = self.optimizer.defaults if self.optimizer is not None else {}
        return json.loads(json.dumps(defaults, default=str))

    def __call__(self, params: Iterable[Tensor], *_args: Any, **_kwargs: Any) -> None:
        """Makes one step from the gradients that the parameters hold, and takes them away."""
        params = list(params)
        new = [p for p in params if p not in self.names]
        if new:
            self.add(new)
        assert self.optimizer is not None
        check_gradients(params)
        if self.newton is not None:
            self._newton_step(*self.newton)
        else:
            with self._in_seen_rows(self.optimizer.state):
                self.optimizer.step()
        for p in params:  # spares SVI a tensor of zeros each, and a later step what is not its own
            p.grad = None

    def see(self, rows: Tensor, axes: Mapping[str, int], visits: int) -> None:
        """The next step moves these rows alone, of parameters with the axis of their rows by name.

        Args:
            rows: Which data.
            axes: By parameter.
            visits: How often each of these rows was seen before.
        """
        stored = dict(pyro.get_param_store().named_parameters())
        self.seen = SeenRows(rows, {stored[name]: axis for name, axis in axes.items()}, visits)

    def _in_seen_rows(self, state: Mapping[Tensor, dict[str, Any]]) -> AbstractContextManager[None]:
        return nullcontext() if self.seen is None else self.seen.alone(state)

    @torch.no_grad()
    def _newton_step(self, rate: float, inverse: Tensor) -> None:
        """A step along the inverse Hessian times the gradient, shorter where it leads far."""
        moved = [p for p in self.names if p.requires_grad]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in moved]
        gradient = torch.cat([g.reshape(-1).double() for g in parts]).cpu()
        step = -rate * (inverse @ gradient)
        here = torch.cat([p.reshape(-1).double() for p in moved]).cpu()
        nats = float(-step @ gradient)  # what it promises
        longest = float((step.abs() / (1 + here.abs())).max())
        step /= max(1.0, longest, math.sqrt(max(nats, 0.0) / (10 + len(step))))
        for p, part in zip(moved, step.split([p.numel() for p in moved]), strict=True):
            p += part.reshape(p.shape)

    def set_newton(self, rate: float, inverse: Tensor | None) -> None:
        """Sets the rate, and the inverse Hessian to follow; None for the optimizer's own steps."""
        if inverse is None:
            self.newton = None
            self.set_learning_rate(rate)
        else:
            self.newton = rate, inverse

    def add(self, params: Iterable[Tensor]) -> None:
        """Takes further parameters into the one optimizer."""
        store = pyro.get_param_store()
        named = sorted((str(store.param_name(p)), p) for p in params)
        self.names |= {p: name for name, p in named}
        if self.optimizer is None:
            self.optimizer = self.factory([p for _, p in named])
            if not isinstance(self.optimizer, torch.optim.Optimizer):
                raise ValueError(
                    "optimizer must be a function from parameters to a torch optimizer, such as "
                    f"functools.partial(torch.optim.SGD, lr=0.1); it gave {self.optimizer!r}"
                )
        else:
            self.optimizer.add_param_group({"params": [p for _, p in named]})

    @property
    def rate(self) -> float:
        """The first group's learning rate."""
        assert self.optimizer is not None
        return float(self.optimizer.param_groups[0]["lr"])

    def set_learning_rate(self, rate: float) -> None:
        """Sets the learning rate of every parameter."""
        if not 0 <= rate < math.inf:
            raise ValueError(f"the learning-rate function gave {rate!r}, which is no rate")
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The optimizer's state by key and parameter, and the numbers of its groups."""
        assert self.optimizer is not None
        state = {
            f"{'state' if isinstance(value, Tensor) else 'number'}.{key}.{name}": torch.as_tensor(
                value
            )
            for name, p in parameters.items()
            for key, value in self.optimizer.state.get(p, {}).items()
            if value is not None
        }
        groups = {  # some optimizers change these as they go
            f"group.{place}.{key}": torch.tensor(value, dtype=torch.float64)
            for place, group in enumerate(self.optimizer.param_groups)
            for key, value in group.items()
            if isinstance(value, float)
        }
        return state | groups

    def restore(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` gave."""
        assert self.optimizer is not None
        for full, value in tensors.items():
            kind, first, second = full.split(".", 2)
            if kind == "group":
                self.optimizer.param_groups[int(first)][second] = value.item()
                continue
            state = self.optimizer.state[parameters[second]]
            if kind == "number":
                state[first] = value.item()
            else:
                state[first] = value.to(parameters[second].device) if value.dim() else value


class _PyroOptim(FusedOptim):
    """A user's own `PyroOptim`, used as it is; it cannot be written to a checkpoint."""

    def __init__(self, optim: PyroOptim) -> None:
        super().__init__(lambda params: None)  # type: ignore[arg-type, return-value]
        self.optim = optim

    @property
    def name(self) -> str:
        return f"pyro.optim {getattr(self.optim.pt_optim_constructor, '__name__', 'optimizer')}"

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        params = list(params)
        check_gradients(params)
        made = self.optim.optim_objs
        with self._in_seen_rows({p: made[p].state[p] for p in params if p in made}):
            self.optim(params, *args, **kwargs)

    def add(self, params: Iterable[Tensor]) -> None:
        """Leaves it to the user's optimizer, which takes parameters as they come."""


def check_gradients(params: Sequence[Tensor]) -> None:
    """Refuses gradients that are not finite, before they move anything.

    Raises:
        TrainingError: If one is not finite; says whose.
    """
    gradients = [p.grad for p in params if p.grad is not None]
    # One number for all; where it overflows, each gradient is looked at.
    if not gradients or torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
        return
    store = pyro.get_param_store()
    for p in params:
        if p.grad is not None and not p.grad.isfinite().all():
            raise TrainingError(
                f"the gradient of '{store.param_name(p)}' is not finite; the parameters are those "
                "of the last good step. Lower the learning rate, or look for a scale that goes to 0"
            )


def make_optimizer(optimizer: Any, learning_rate: Any) -> FusedOptim:
    """One fused Adam unless told otherwise; see `fit` for what may be given."""
    if isinstance(optimizer, PyroOptim):
        return _PyroOptim(optimizer)
    if optimizer is not None:
        if not callable(optimizer):
            raise ValueError(
                "optimizer must be a function from parameters to a torch optimizer, such as "
                f"functools.partial(torch.optim.SGD, lr=0.1), not {optimizer!r}"
            )
        return FusedOptim(optimizer)
    rate = 0.0 if callable(learning_rate) else learning_rate  # set at the start of each epoch

    def adam(params: Iterable[Tensor]) -> torch.optim.Optimizer:
        params = list(params)
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params)
        return torch.optim.Adam(params, lr=rate, fused=fused)

    adam.__name__ = "Adam"
    return FusedOptim(adam)


def positive_inverse(hessian: Tensor) -> Tensor | None:
    """The inverse with the absolute eigenvalues, in units in which the diagonal is one."""
    hessian = (hessian + hessian.T) / 2
    if not hessian.isfinite().all():
        return None
    unit = hessian.diagonal().abs().sqrt()
    unit = torch.where(unit > 0, unit, 1.0)
    values, vectors = torch.linalg.eigh(hessian / unit[:, None] / unit)
    values = values.abs().clamp_min(1e-7)
    return (vectors / values) @ vectors.T / unit[:, None] / unit
