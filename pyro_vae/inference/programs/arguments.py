"""The `x` of every tool as the arguments of a program."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["Arguments", "as_arguments", "batch_length", "map_batch", "tensors_of"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


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


def tensors_of(x: Any) -> list[Tensor]:
    """The tensors among the arguments that `x` stands for, in their order."""
    args, kwargs = as_arguments(x)
    return [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]


def batch_length(x: Any) -> int:
    """Number of data in `x`: the length of its first tensor (1 if it has none)."""
    return next((len(a) for a in tensors_of(x) if a.dim() > 0), 1)


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
