"""One torch optimizer behind the `PyroOptim` that `pyro.infer.SVI` asks for."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

__all__ = ["FusedOptim", "TrainingError", "make_optimizer"]


class TrainingError(RuntimeError):
    """Training cannot start or go on; the parameters are those of the last good step."""


class FusedOptim(PyroOptim):
    """One torch optimizer over all parameters.

    Pyro's own makes one per tensor, which costs more than a small VAE's arithmetic.
    """

    can_be_saved = True

    def __init__(self, factory: Callable[[Iterable[Tensor]], torch.optim.Optimizer]) -> None:
        super().__init__(factory, {})
        self.factory = factory
        self.optimizer: torch.optim.Optimizer | None = None
        self.names: dict[Tensor, str] = {}

    @property
    def name(self) -> str:
        """What the run folder says was used."""
        return (
            type(self.optimizer).__name__
            if self.optimizer
            else getattr(self.factory, "__name__", "optimizer")
        )

    def __call__(self, params: Iterable[Tensor], *_args: Any, **_kwargs: Any) -> None:
        """Makes one step from the gradients that the parameters hold."""
        new = [p for p in params if p not in self.names]
        if new:
            self.add(new)
        assert self.optimizer is not None
        gradients = [p.grad for p in self.names if p.grad is not None]
        if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            bad = next(
                name
                for p, name in self.names.items()
                if p.grad is not None and not p.grad.isfinite().all()
            )
            raise TrainingError(
                f"the gradient of '{bad}' is not finite; lower the learning rate, or look for a "
                "scale that goes to 0"
            )
        self.optimizer.step()

    def add(self, params: Iterable[Tensor]) -> None:
        """Takes further parameters into the one optimizer."""
        store = pyro.get_param_store()
        named = sorted((str(store.param_name(p)), p) for p in params)
        self.names |= {p: name for name, p in named}
        if self.optimizer is None:
            self.optimizer = self.factory([p for _, p in named])
        else:
            self.optimizer.add_param_group({"params": [p for _, p in named]})

    def set_learning_rate(self, rate: float) -> None:
        """Sets the learning rate of every parameter."""
        if self.optimizer is None:
            self.add(dict(pyro.get_param_store().named_parameters()).values())
        for group in self.optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = rate

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The optimizer's state as `KEY.PARAMETER` tensors."""
        if self.optimizer is None:
            return {}
        return {
            f"{key}.{name}": torch.as_tensor(value)
            for name, p in parameters.items()
            for key, value in self.optimizer.state.get(p, {}).items()
            if value is not None
        }

    def restore(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` gave."""
        if not tensors:
            return
        self.add(p for p in parameters.values() if p not in self.names)
        assert self.optimizer is not None
        for full, value in tensors.items():
            key, name = full.split(".", 1)
            self.optimizer.state[parameters[name]][key] = (
                value.to(parameters[name].device) if value.dim() else value
            )


class _PyroOptim(FusedOptim):
    """A user's own `PyroOptim`, used as it is; it cannot be written to a checkpoint."""

    can_be_saved = False

    def __init__(self, optim: PyroOptim) -> None:
        super().__init__(lambda params: None)  # type: ignore[arg-type, return-value]
        self.optim = optim

    @property
    def name(self) -> str:
        return f"pyro.optim {getattr(self.optim.pt_optim_constructor, '__name__', 'optimizer')}"

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        self.optim(list(params), *args, **kwargs)

    def set_learning_rate(self, rate: float) -> None:
        raise ValueError(
            "a learning-rate function needs a torch optimizer; pass optimizer=None or a function "
            "of parameters"
        )


def make_optimizer(optimizer: Any, learning_rate: Any) -> FusedOptim:
    """One fused Adam unless told otherwise; see `fit` for what may be given."""
    if isinstance(optimizer, PyroOptim):
        return _PyroOptim(optimizer)
    if optimizer is not None:
        return FusedOptim(optimizer)
    rate = learning_rate(0) if callable(learning_rate) else learning_rate

    def adam(params: Iterable[Tensor]) -> torch.optim.Optimizer:
        params = list(params)
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params)
        return torch.optim.Adam(params, lr=rate, fused=fused)

    adam.__name__ = "Adam"
    return FusedOptim(adam)
